"""The operators kan::edges and kan::edge_attention with their gradients, on the kernels of edges_triton.py.

    edges            z[m, p] = sum_q phi(x[m, q]; theta[p, q])        x (h, M, N) -> z (h, M, r)
    edge_attention   the same of the scores x = scale Q K^T           Q (B, h, M, d), K (B, h, N, d) -> z (B, h, M, r)

edge_attention saves Q, K and theta alone. Forward and backward compute the scores of a chunk of the images at a time.
phi is named by a string and two degrees, which are 0 for a wavelet.

The operators are registered without Triton, which is imported at the first launch. Fake kernels make them opaque to
torch.compile. The checks of arguments and the definition are in kan_basis/edges.py.
"""

import importlib
import math
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from kan_basis import torch_internals

from . import launch

FUNCTIONS = (
    *("rational_A", "rational_B"),
    *("mexican_hat", "morlet", "dog", "dog_wavkan", "meyer", "meyer_wavkan", "shannon"),
)
MAX_DEGREE = 8
# Bytes of the scores of one chunk of images. Chunks that fit in the L2 cache of an H200 took longer.
CHUNK = 128 << 20
_HALF = (torch.bfloat16, torch.float16)


@torch.compiler.assume_constant_result
def refusal(dtype: torch.dtype, function: str, m: int, n: int, coefficients: int) -> str:
    """Why the kernels do not take tensors on a GPU, "" if they do.

    Args:
        dtype: of x, or of Q and K.
        function, m, n: one of FUNCTIONS, and the degrees of a rational function.
        coefficients: the number of elements of theta.
    """
    if reason := launch.no_triton():
        return reason
    if dtype not in (torch.float32, *_HALF):
        return f"they take float32, float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    if max(m, n) > MAX_DEGREE:
        return f"they take degrees up to {MAX_DEGREE}"
    if coefficients >= 1 << 31:
        return "they take less than 2^31 coefficients"
    return ""


@cache
def _kernels():
    """The module that launches the kernels. Triton is imported here."""
    return importlib.import_module(".edges_launch", __package__)


@contextmanager
def _on(t: Tensor):
    """Triton launches on the device of t, and products keep the dtype of their factors."""
    with torch.autocast(t.device.type, enabled=False):
        if t.is_cuda:
            with torch.cuda.device(t.device):
                yield
        else:
            yield


def forward(x: Tensor, theta: Tensor, function: str, m: int, n: int) -> Tensor:
    (h, M, _), r = x.shape, theta.shape[1]
    z = x.new_empty(h, M, r)
    if x.numel() == 0:
        return z.zero_()
    kernels, phi = _kernels(), _kernels().Function(function, m, n)
    with _on(x):
        c = kernels.packed(theta.contiguous(), phi)
        kernels.forward(x.mT.contiguous()[None], c, z[None], 1.0, phi)
    return z


def backward(grad: Tensor, x: Tensor, theta: Tensor, function: str, m: int, n: int) -> tuple[Tensor, Tensor]:
    if x.numel() == 0:
        return torch.empty_like(x, memory_format=torch.contiguous_format), _zeros(theta)
    kernels, phi = _kernels(), _kernels().Function(function, m, n)
    x, theta, grad = x.contiguous(), theta.contiguous(), grad.contiguous()
    dx = torch.empty_like(x)
    with _on(x):
        sums = kernels.Sums(theta, phi, 1, x.shape[1], launch.multiprocessors(x.get_device()))
        sums.backward(grad[None], x[None], dx[None], dx[None], 1.0)
        return dx, sums.finish()


def attention_forward(q: Tensor, k: Tensor, theta: Tensor, scale: float, function: str, m: int, n: int) -> Tensor:
    z = q.new_empty(*q.shape[:3], theta.shape[1], dtype=torch.float32)
    if z.numel() == 0 or k.numel() == 0:
        return z.zero_()
    kernels, phi = _kernels(), _kernels().Function(function, m, n)
    size = _images(q, k)
    with _on(q):
        c = kernels.packed(theta.contiguous(), phi)
        for i in range(0, len(q), size):
            scores = _product(_matrices(k[i : i + size]), _matrices(q[i : i + size]))
            kernels.forward(scores.unflatten(0, (-1, q.shape[1])), c, z[i : i + size], scale, phi)
            del scores  # so that the next ones take its memory
    return z


def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, theta: Tensor, scale: float, function: str, m: int, n: int
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k))
    if q.numel() == 0 or k.numel() == 0:
        return dq.zero_(), dk.zero_(), _zeros(theta)
    kernels, phi = _kernels(), _kernels().Function(function, m, n)
    theta, grad, size, half, scratch = theta.contiguous(), grad.contiguous(), _images(q, k), q.dtype in _HALF, None
    with _on(q):
        sums = kernels.Sums(theta, phi, size, q.shape[2], launch.multiprocessors(q.get_device()))
        for i in range(0, len(q), size):
            images = slice(i, i + size)
            qi, ki = _matrices(q[images]), _matrices(k[images])
            scores = _product(qi, ki)
            gradient = torch.empty_like(scores, dtype=q.dtype)
            if not half or scratch is None:
                scratch = torch.empty_like(scores) if half else gradient
            shape = -1, *q.shape[1:3], k.shape[2]
            sums.backward(grad[images], scores.view(shape), gradient.view(shape), scratch.view(shape), scale)
            torch.bmm(gradient, ki, out=dq[images].flatten(0, 1))
            torch.bmm(gradient.mT, qi, out=dk[images].flatten(0, 1))
            del scores, gradient  # so that the next ones take their memory
        return dq, dk, sums.finish()


def _zeros(t: Tensor) -> Tensor:
    return torch.zeros_like(t, memory_format=torch.contiguous_format)


def _images(q: Tensor, k: Tensor) -> int:
    """Images of a chunk; all chunks but the last have as many."""
    B, h, M, _ = q.shape
    limit = max(1, CHUNK // (4 * h * M * k.shape[2]))
    return math.ceil(B / math.ceil(B / limit))


def _matrices(t: Tensor) -> Tensor:
    return t.flatten(0, 1)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b^T in float32."""
    if torch_internals.has_float32_product(a):
        return torch.bmm(a, b.mT, out_dtype=torch.float32)
    return torch.bmm(a.float(), b.float().mT)


_PHI = "str function, int m, int n"
library = torch.library.Library("kan", "FRAGMENT")
library.define(f"edges(Tensor x, Tensor theta, {_PHI}) -> Tensor")
library.define(f"edges_backward(Tensor grad, Tensor x, Tensor theta, {_PHI}) -> (Tensor, Tensor)")
library.define(f"edge_attention(Tensor q, Tensor k, Tensor theta, float scale, {_PHI}) -> Tensor")
library.define(
    f"edge_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor theta, float scale, {_PHI})"
    " -> (Tensor, Tensor, Tensor)"
)


def _check(x_shape, keys: int, theta: Tensor, function: str, m: int, n: int, dtype: torch.dtype, fit: bool) -> None:
    """The operators' arguments, which may come from another caller. Raises: ValueError."""
    known = function in FUNCTIONS
    count = m + 1 + n if function.startswith("rational") else 3
    fit = fit and known and theta.ndim == 4 and theta.shape[0] == x_shape[-3] and theta.shape[1] > 0
    if not fit or tuple(theta.shape[2:]) != (keys, count) or not theta.is_floating_point():
        reason = "shapes, types or devices do not fit together"
    else:
        reason = refusal(dtype, function, m, n, theta.numel())
    if reason:
        raise ValueError(
            f"the kernels cannot take {tuple(x_shape)} {dtype} with theta {tuple(theta.shape)} {theta.dtype} "
            f"for the function {function} of degrees {m} and {n}: {reason}"
        )


def _edges(x, theta, function, m, n):
    fit = x.ndim == 3 and x.dtype is torch.float32 and x.device == theta.device
    _check(x.shape, x.shape[-1], theta, function, m, n, x.dtype, fit)
    return forward(x, theta, function, m, n)


def _edges_backward(grad, x, theta, function, m, n):
    fit = x.ndim == 3 and x.dtype is torch.float32 and x.device == theta.device == grad.device
    fit = fit and grad.shape == (*x.shape[:2], theta.shape[1]) and grad.dtype is torch.float32
    _check(x.shape, x.shape[-1], theta, function, m, n, x.dtype, fit)
    return backward(grad, x, theta, function, m, n)


def _fit(q: Tensor, k: Tensor, theta: Tensor) -> bool:
    shapes = q.ndim == k.ndim == 4 and q.shape[:2] == k.shape[:2] and q.shape[3] == k.shape[3] > 0
    return shapes and q.dtype is k.dtype and q.device == k.device == theta.device


def _edge_attention(q, k, theta, scale, function, m, n):
    _check((*q.shape[1:3], k.shape[2]), k.shape[2], theta, function, m, n, q.dtype, _fit(q, k, theta))
    return attention_forward(q, k, theta, scale, function, m, n)


def _edge_attention_backward(grad, q, k, theta, scale, function, m, n):
    fit = _fit(q, k, theta) and grad.shape == (*q.shape[:3], theta.shape[1]) and grad.dtype is torch.float32
    _check((*q.shape[1:3], k.shape[2]), k.shape[2], theta, function, m, n, q.dtype, fit and grad.device == q.device)
    return attention_backward(grad, q, k, theta, scale, function, m, n)


library.impl("edges", _edges, "CUDA")
library.impl("edges_backward", _edges_backward, "CUDA")
library.impl("edge_attention", _edge_attention, "CUDA")
library.impl("edge_attention_backward", _edge_attention_backward, "CUDA")


def _like(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors)


@torch.library.register_fake("kan::edges", lib=library)
def _(x, theta, function, m, n):
    return x.new_empty(*x.shape[:2], theta.shape[1])


@torch.library.register_fake("kan::edges_backward", lib=library)
def _(grad, x, theta, function, m, n):
    return _like(x, theta)


@torch.library.register_fake("kan::edge_attention", lib=library)
def _(q, k, theta, scale, function, m, n):
    return q.new_empty(*q.shape[:3], theta.shape[1], dtype=torch.float32)


@torch.library.register_fake("kan::edge_attention_backward", lib=library)
def _(grad, q, k, theta, scale, function, m, n):
    return _like(q, k, theta)


def _save(ctx, inputs, output) -> None:
    tensors = sum(isinstance(t, Tensor) for t in inputs)
    ctx.save_for_backward(*inputs[:tensors])
    ctx.numbers = inputs[tensors:]


def _differentiate(operator: str):
    def backward(ctx, grad: Tensor):
        from kan_basis.quotient import refuse_second_derivatives  # here, because kan_basis imports this module

        refuse_second_derivatives(operator)
        gradients = getattr(torch.ops.kan, f"{operator}_backward")(grad, *ctx.saved_tensors, *ctx.numbers)
        return *gradients, *(None for _ in ctx.numbers)

    return backward


for _name in ("edges", "edge_attention"):
    torch.library.register_autograd(f"kan::{_name}", _differentiate(_name), setup_context=_save, lib=library)
