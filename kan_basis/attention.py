"""Attention by learned univariate functions of the scores, which replace the softmax.

    x = scale Q K^T,   z_mp = sum over n of phi_pn(x_mn),   out = z (W^T V)
    phi_pn(x) = s_pn b(x) + sum over f of c_pnf F_f(x)

F_f are the features of a basis that is linear in its coefficients c, and b is a base function. This is W Phi(A) V of
Kolmogorov-Arnold attention (models/operator.py) in the order that needs no N x N result. On a GPU it runs in kernels
(kan_basis.kernels) that keep the scores on chip, so that memory is linear in N. They are tested against the definition
in this module.
Source: Maity et al. 2025 (KArAt, arXiv:2503.10632).
"""

from functools import lru_cache, partial

import torch
from torch import Tensor, nn

from kan_basis import kernels, layer, torch_internals
from kan_basis.basis import Basis
from kan_basis.chunks import exporting, in_chunks
from kan_basis.fourier import FourierBasis

NAME = "Kolmogorov-Arnold attention"  # in messages
FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# The names of base functions in the kernels. Only their class counts: a subclass may compute something else.
BASE_NAMES = {nn.Identity: "identity", nn.ReLU: "relu", nn.SiLU: "silu", nn.GELU: "gelu"}


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    coefficients: Tensor,
    projector: Tensor,
    basis: Basis,
    scale: float | None = None,
    base_fn: nn.Module | None = None,
    scale_base: Tensor | None = None,
) -> Tensor:
    """Phi(scale Q K^T) (W^T V), where Phi_p(x) = sum over n of phi_pn(x_n) for each row x of the scores.

    Scores are float32 or float64 up to the features on every path. On the CPU, in float64 and wherever the kernels do
    not run, the definition computes chunks of the batch, and once more in the backward pass. In the kernels, sums are
    float32, operands of products have the dtype of q, k and v, and there are no second derivatives. No path keeps an
    N x N tensor for the backward pass.

    Args:
        query, key, value: (B, h, N, d), any float dtype, any strides.
        coefficients: c, (h, r, N, P), as in KANLayer with its scale_basis multiplied in.
        projector: W, (h, N, r).
        basis: the family of functions with P coefficients; it must be linear in them.
        scale: factor of the scores, 1 / sqrt(d) by default.
        base_fn: b, an element-wise module, or None for b = 0.
        scale_base: s, (h, r, N), if there is a base function.
    Returns: (B, h, N, d) in the promoted dtype of query, key and value. Under autocast they are first cast to the
        autocast dtype, as torch.nn.functional.linear does. Gradients have the dtypes of the arguments.
    Raises: TypeError if a tensor is not floating point; ValueError if shapes, devices or basis do not fit together, or
        if the kernels were chosen (kan_basis.kernels) and do not take these tensors.
    """
    tensors = (query, key, value, coefficients, projector, *(() if scale_base is None else (scale_base,)))
    watched = torch_internals.watched(*tensors)
    (_check if watched else _check_once)(
        basis,
        base_fn is not None,
        tuple([t.shape for t in tensors]),
        tuple([t.dtype for t in tensors]),
        tuple([t.device for t in tensors]),
    )
    dtype = torch.promote_types(torch.promote_types(query.dtype, key.dtype), value.dtype)
    # The first question answers most calls and takes a fifth of the time.
    if (
        torch_internals.any_autocast()
        and not query.is_meta
        and dtype is not torch.float64
        and torch.is_autocast_enabled(query.device.type)
    ):
        dtype = torch.get_autocast_dtype(query.device.type)
    query, key, value = (t if t.dtype is dtype else t.to(dtype) for t in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    path = "definition"
    if kernels.takes_attention(query.device) and not exporting():
        refusal, base = _refusal if watched else _refusal_once, base_name(base_fn)
        refused = refusal(query.shape, dtype, query.device, coefficients.shape[1], basis, type(base_fn).__name__, base)
        path = kernels.path(refused, watched, NAME)
    if path == "definition":
        return _definition(query, key, value, coefficients, projector, basis, scale, base_fn, scale_base)
    if base_fn is not None:
        coefficients = torch.cat([coefficients, scale_base.unsqueeze(-1)], -1)
    inputs = query, key, value, coefficients.permute(0, 3, 2, 1), projector, scale, *basis.kernel, base_name(base_fn)
    # An operator would drop the tangents of forward mode; the autograd function refuses them.
    if path == "operator" and (torch.compiler.is_compiling() or not torch_internals.forward_mode()):
        return torch.ops.kan.attention(*inputs)[0]
    if not torch.is_grad_enabled() and not torch_internals.forward_mode():
        return kernels.attention.forward(*inputs)[0]  # the same without the cost of autograd
    return kernels.attention.Attention.apply(*inputs)


def fourier_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    coefficients: Tensor,
    projector: Tensor,
    scale: float | None = None,
) -> Tensor:
    """`attention` by Fourier series, phi_pn(x) = sum over m = 1..G of a_m cos(m x) + b_m sin(m x).

    Args:
        query, key, value: (B, h, N, d).
        coefficients: a_1..a_G, b_1..b_G, (h, r, N, 2 G).
        projector: W, (h, N, r).
        scale: factor of the scores, 1 / sqrt(d) by default.
    Returns: (B, h, N, d).
    Raises: ValueError for an odd number of coefficients; see `attention`.
    """
    P = coefficients.shape[-1]
    if P < 2 or P % 2:
        raise ValueError(f"fourier_attention: coefficients must end in 2 G, not in {P}")
    return attention(query, key, value, coefficients, projector, FourierBasis(P // 2), scale)


def base_name(base_fn: nn.Module | None) -> str | None:
    """The name of b in the kernels, "" for b = 0, None if they do not know it."""
    if base_fn is None:
        return ""
    return None if getattr(base_fn, "approximate", "none") != "none" else BASE_NAMES.get(type(base_fn))


def attention_scores(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Q K^T scale: (B, h, M, d), (B, h, N, d) -> (B, h, M, N).

    The scores are float32 or float64, also under autocast and for half-precision Q and K.
    """
    if query.dtype == key.dtype and torch_internals.has_float32_product(query):
        scores = _Fp32Product.apply(query.flatten(0, 1), key.flatten(0, 1))
        return scores.unflatten(0, query.shape[:2]) * scale
    dtype = torch.promote_types(query.dtype, torch.float32)
    with torch_internals.no_autocast(query):
        return query.to(dtype) @ key.to(dtype).transpose(-1, -2) * scale


def combine(z: Tensor, projector: Tensor, value: Tensor) -> Tensor:
    """z (W^T V): (B, h, M, r), (h, N, r), (B, h, N, d) -> (B, h, M, d)."""
    values = projector.to(value.dtype).transpose(-1, -2) @ value  # (B, h, r, d)
    return z.to(values.dtype) @ values


def _definition(query, key, value, coefficients, projector, basis, scale, base_fn, scale_base) -> Tensor:
    """`attention` in plain PyTorch, in chunks of the batch."""

    def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        sums = partial(layer.linear_sums, basis=basis, coefficients=coefficients)
        z = layer.apply_functions(attention_scores(q, k, scale), sums, base_fn, scale_base)
        return combine(z, projector, v)

    h, N = query.shape[1:3]
    size = layer.rows_of_chunk(h * N * N * max(1, basis.working_set))
    return in_chunks(core, query, key, value, size=size, dim=0)


def _check(basis: Basis, base: bool, shapes: tuple, dtypes: tuple, devices: tuple) -> None:
    """Raises: see `attention`."""
    names = ("query", "key", "value", "coefficients", "projector", "scale_base")
    for name, dtype, device in zip(names, dtypes, devices):
        if dtype not in FLOAT_DTYPES:
            raise TypeError(f"attention: {name} must be float32, float16, bfloat16 or float64, not {dtype}")
        if device != devices[0]:
            raise ValueError(f"attention: query is on {devices[0]} but {name} is on {device}")
    if not basis.linear:
        raise ValueError(f"attention: the {basis.name} basis is not linear in its coefficients")
    query = shapes[0]
    if len(query) != 4 or query != shapes[1] or query != shapes[2] or 0 in query[1:]:
        found = ", ".join(str(tuple(shape)) for shape in shapes[:3])
        raise ValueError(f"attention: query, key and value must have one shape (B, h, N, d), not {found}")
    h, N, P = query[1], query[2], basis.num_coefficients
    r = shapes[3][1] if len(shapes[3]) == 4 else 0
    if r == 0 or shapes[3] != (h, r, N, P):
        raise ValueError(f"attention: coefficients must have shape ({h}, r, {N}, {P}), not {tuple(shapes[3])}")
    if shapes[4] != (h, N, r):
        raise ValueError(f"attention: projector must have shape ({h}, {N}, {r}), not {tuple(shapes[4])}")
    if base != (len(shapes) == 6):
        raise ValueError("attention: base_fn and scale_base must be given together")
    if base and shapes[5] != (h, r, N):
        raise ValueError(f"attention: scale_base must have shape ({h}, {r}, {N}), not {tuple(shapes[5])}")


def _refusal(shape, dtype, device, rank: int, basis: Basis, base_class: str, base: str | None) -> str:
    """Why the kernels do not take these arguments, "" if they do."""
    if kernels.attention is None:
        return kernels.missing
    if basis.kernel is None:
        return f"they do not know the basis {basis.name}"
    if base is None:
        return f"they do not know this base function, of the class {base_class}"
    features = basis.num_coefficients + (base != "")
    return kernels.attention.refusal(shape, dtype, device, rank, features, *basis.kernel[:2], base)


# For sizes that are plain numbers; those of a compiler are not.
_check_once = lru_cache(maxsize=4096)(_check)
_refusal_once = lru_cache(maxsize=4096)(_refusal)


class _Fp32Product(torch.autograd.Function):
    """a b^T of two half-precision batches of matrices in float32; the gradients have the dtype of a and b."""

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return torch.bmm(a, b.mT, out_dtype=torch.float32)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        grad = grad.to(a.dtype)
        return torch.bmm(grad, b), torch.bmm(grad.mT, a)
