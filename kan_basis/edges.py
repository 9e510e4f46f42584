"""Sums of functions of a basis that is not linear in its coefficients, one function for each input and output.

    out_p = sum_q phi(x_q; theta_pq)

`edges` takes x, `edge_attention` takes the x that are the scores of an attention, without a tensor of all scores.
The definition evaluates chunks, and computes them again in the backward pass, so that no tensor has rows x outputs x
inputs elements. On a GPU kernels in Triton (cuda/edges_triton.py) compute the functions that they know, a basis's
`edge_function`; kan_basis.kernels chooses.
Source: Kolmogorov-Arnold attention (arXiv:2503.10632).
"""

from functools import partial

import torch
from torch import Tensor

from kan_basis import kernels, torch_internals
from kan_basis.basis import Basis
from kan_basis.chunks import exporting, in_chunks

# Values phi(x_q; theta_pq) in one chunk. The definition keeps several tensors of this size.
MAX_EDGES = 1 << 22


def edges(x: Tensor, theta: Tensor, basis: Basis, scale: Tensor | None = None) -> Tensor:
    """out_p = scale_pq phi(x_q; theta_pq), summed over q, for each head.

    Args:
        x: (h, M, N), float32 or float64.
        theta: (h, r, N, P), P coefficients of each function.
        basis: the family of functions.
        scale: (h, r, N), factors of the functions, or None for 1.
    Returns: (h, M, r), dtype of x.
    Raises: ValueError if the shapes do not fit together, or if the kernels were chosen and do not take the tensors.
    """
    h, _, N = x.shape
    if theta.ndim != 4 or (theta.shape[0], theta.shape[2]) != (h, N):
        raise ValueError(f"edges: theta must be ({h}, r, {N}, P) for x {tuple(x.shape)}, not {tuple(theta.shape)}")
    basis.check(theta)
    if x.is_cuda and x.dtype is torch.float32 and has_kernel(x, theta, basis):
        return torch.ops.kan.edges(x, _scaled(theta, scale, basis), *basis.edge_function)
    return _edges(x, theta, basis, scale)


def edge_attention(
    query: Tensor, key: Tensor, theta: Tensor, score_scale: float, basis: Basis, scale: Tensor | None = None
) -> Tensor:
    """`edges` of the scores x = score_scale Q K^T of an attention.

    Only Q, K and theta are kept for the backward pass. Scores exist for a few images at a time, in float32.

    Args:
        query, key: (B, h, M, d) and (B, h, N, d), any strides, of one dtype.
        theta, basis, scale: see `edges`.
        score_scale: factor of the scores.
    Returns: (B, h, M, r), float32, or float64 if Q and K are.
    Raises: see `edges`.
    """
    h, N = key.shape[1:3]
    if theta.ndim != 4 or (theta.shape[0], theta.shape[2]) != (h, N):
        raise ValueError(f"edge_attention: theta must be ({h}, r, {N}, P), not {tuple(theta.shape)}")
    basis.check(theta)
    if query.is_cuda and query.dtype is key.dtype and has_kernel(query, theta, basis):
        theta = _scaled(theta, scale, basis)
        return torch.ops.kan.edge_attention(query, key, theta, score_scale, *basis.edge_function)

    def of_images(q: Tensor, k: Tensor) -> Tensor:
        dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), torch.float32)
        with torch_internals.no_autocast(q):
            x = q.to(dtype) @ k.to(dtype).mT * score_scale
        rows = x.transpose(0, 1).flatten(1, 2)  # (h, B M, N)
        return _edges(rows, theta, basis, scale).unflatten(1, (q.shape[0], -1)).transpose(0, 1)

    size = max(1, MAX_EDGES // max(1, h * query.shape[2] * N))
    return in_chunks(of_images, query, key, size=size, dim=0)


def has_kernel(x: Tensor, theta: Tensor, basis: Basis) -> bool:
    """Whether the kernels compute the functions of x, or of scores of queries x, for tensors on a GPU.

    An exported program has the definition, which runs everywhere.
    Raises: ValueError where the kernels were chosen and do not take the tensors.
    """
    phi = basis.edge_function
    # An operator would drop the tangents of forward mode.
    if phi is None or exporting() or not torch.compiler.is_compiling() and torch_internals.forward_mode():
        return False
    if kernels.edges is None:
        refused = kernels.missing
    elif phi[0] not in kernels.edges.FUNCTIONS:
        return False
    else:
        refused = kernels.edges.refusal(x.dtype, *phi, theta.numel()) or kernels.launch.refusal(x.device.index)
    return kernels.path(refused, torch_internals.watched(x, theta), "an edge function") != "definition"


def _scaled(theta: Tensor, scale: Tensor | None, basis: Basis) -> Tensor:
    theta = theta.to(torch.float32)
    return theta if scale is None else basis.scaled(theta, scale.to(torch.float32))


def _edges(x: Tensor, theta: Tensor, basis: Basis, scale: Tensor | None) -> Tensor:
    """The definition of `edges`."""

    def sums(x: Tensor, theta: Tensor, scale: Tensor | None) -> Tensor:
        phi = basis(x[:, :, None], theta[:, None])  # (h, rows, outputs, N)
        return (phi if scale is None else phi * scale[:, None]).sum(-1)

    (h, r, N, _) = theta.shape
    outputs = min(r, max(1, MAX_EDGES // (h * N)))  # of which one row fits in a chunk
    thetas = theta.split(outputs, 1)
    scales = [None] * len(thetas) if scale is None else scale.split(outputs, 1)
    parts = [
        in_chunks(partial(sums, theta=t, scale=s), x, size=MAX_EDGES // (h * N * outputs), dim=1)
        for t, s in zip(thetas, scales)
    ]
    return torch.cat(parts, -1)
