"""P(x) / Q(x): the definition of the rational functions (kan_basis.rational) and its gradient in closed form."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kan_basis import kernels, torch_internals

# Elements that are evaluated at once on the CPU: the temporaries of one chunk stay in its caches.
CHUNK = 1 << 18


def quotient(x: Tensor, a: Tensor, b: Tensor, version: str, recorded: bool = True) -> Tensor:
    """P(x) / Q(x).

    Args:
        x: (...).
        a: a_0..a_m, (m + 1, ...), broadcasts against x.
        b: b_1..b_n, (n, ...), likewise.
        version: "A" or "B".
        recorded: whether autograd or a compiler sees the operations; if not, buffers are reused.
    """
    if version == "A":
        q = _one_plus(_abs(b, recorded), _abs(x, recorded), recorded)
    else:
        q = 1 + _abs(x * _horner(b.unbind(), x, recorded), recorded)
    p = _horner(a.unbind(), x, recorded)
    return p / q if recorded else p.div_(q)


def _abs(t: Tensor, recorded: bool) -> Tensor:
    return torch.where(t < 0, -t, t) if recorded else t.abs()


def _one_plus(b: Tensor, t: Tensor, recorded: bool) -> Tensor:
    """1 + b_1 t + ... + b_n t^n."""
    return _horner([torch.ones_like(b[0]), *b.unbind()], t, recorded)


def _horner(c: Sequence[Tensor], x: Tensor, recorded: bool) -> Tensor:
    """c_0 + c_1 x + c_2 x^2 + ... in a new tensor."""
    if len(c) == 1:
        return c[0] + torch.zeros_like(x)
    y = torch.addcmul(c[-2], c[-1], x)
    for coefficient in reversed(c[:-2]):
        y = torch.addcmul(coefficient, y, x, out=None if recorded else y)
    return y


def _traced() -> bool:
    return torch.compiler.is_compiling() or torch.onnx.is_in_onnx_export()


def _is_batch(grad: Tensor) -> bool:
    """Whether these are several gradients at once, of is_grads_batched."""
    return not torch.compiler.is_compiling() and torch_internals.is_batch(grad)


def _backward(
    grad: Tensor, x: Tensor, a: Tensor, b: Tensor, coefficients: bool, recorded: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of version A, see `kan_basis.rational.rational`.

    Returns: grad dF/dx like x, and the sums over all but the channels of grad dF/da_i, (C, m + 1), and of
        grad dF/d|b_j|, (C, n).
    """
    ax, b = x.abs(), b.abs()
    s = _horner([j * c for j, c in enumerate(b.unbind(), 1)], ax, recorded)
    s = torch.where(x < 0, -s, s)  # copysign would take -0.0 for negative
    q = _one_plus(b, ax, recorded)
    y = _horner(a.unbind(), x, recorded).div_(q)
    t = grad / q
    r = _horner([i * c for i, c in enumerate(a[1:].unbind(), 1)], x, recorded) if len(a) > 1 else torch.zeros_like(x)
    times = torch.mul if _is_batch(t) else Tensor.mul_
    grad_x = times(r.addcmul_(y, s, value=-1), t)
    if not coefficients:
        return grad_x, x.new_zeros(x.shape[1], len(a)), x.new_zeros(x.shape[1], len(b))
    w = times(y, t).neg_()
    grad_a, grad_b = [_channel_sum(t)], []
    for _ in range(1, len(a)):
        grad_a.append(_channel_sum(t.mul_(x)))  # t = grad x^i / Q
    for _ in range(len(b)):
        grad_b.append(_channel_sum(w.mul_(ax)))  # w = -grad |x|^j P / Q^2
    return grad_x, torch.stack(grad_a, 1), torch.stack(grad_b, 1)


def _channel_sum(t: Tensor) -> Tensor:
    return t.sum(0).sum(-1)


def _per_channel(rows: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """Coefficients (groups, K) as columns (K, C, 1): every operation then has long contiguous inner loops."""
    return rows.to(dtype).repeat_interleave(channels // rows.shape[0], 0).t().unsqueeze(-1).contiguous()


def _per_group(sums: Tensor, like: Tensor) -> Tensor:
    return sums.reshape(like.shape[0], -1, like.shape[1]).sum(1).to(like.dtype)


def _prepare(x: Tensor, numerator: Tensor, denominator: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """x as (outer, C, inner), and the coefficients of each channel in the dtype of the computation."""
    channels, dtype = x.shape[dim], torch.promote_types(x.dtype, torch.float32)
    x3 = x.reshape(math.prod(x.shape[:dim]), channels, math.prod(x.shape[dim + 1 :]))
    return x3, _per_channel(numerator, channels, dtype), _per_channel(denominator, channels, dtype)


def evaluate(x: Tensor, numerator: Tensor, denominator: Tensor, dim: int) -> Tensor:
    """The rational functions of `kan_basis.rational.rational`, without their gradients in closed form."""
    x3, a, b = _prepare(x, numerator, denominator, dim)
    if _whole(x):
        return quotient(x3.to(a.dtype), a, b, "A", _traced()).to(x.dtype).reshape(x.shape)
    y = torch.empty_like(x3)
    for rows in _chunks(x3):
        y[rows] = quotient(x3[rows].to(a.dtype), a, b, "A", recorded=False)
    return y.reshape(x.shape)


class Rational(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, numerator: Tensor, denominator: Tensor, dim: int, path: str) -> Tensor:
        ctx.save_for_backward(x, numerator, denominator)
        ctx.dim, ctx.path = dim, path
        return (kernels.kernel.forward if path == "kernel" else evaluate)(x, numerator, denominator, dim)

    @staticmethod
    def backward(ctx, grad: Tensor):
        refuse_second_derivatives()
        x, numerator, denominator = ctx.saved_tensors
        if ctx.path == "kernel":
            behind_dispatcher = _is_batch(grad) or torch_internals.watched(grad)
            run = torch.ops.kan.rational_backward if behind_dispatcher else kernels.kernel.backward
            return *run(grad, x, numerator, denominator, ctx.dim), None, None
        x3, a, b = _prepare(x, numerator, denominator, ctx.dim)
        grad3, coefficients = grad.reshape(x3.shape), any(ctx.needs_input_grad[1:3])
        if _is_batch(grad) or _whole(x):
            grad_x, sum_a, sum_b = _backward(grad3.to(a.dtype), x3.to(a.dtype), a, b, coefficients, _traced())
            grad_x = grad_x.to(x.dtype)
        else:
            grad_x = torch.empty_like(x3)
            sum_a, sum_b = (a.new_zeros(a.shape[1], len(c)) for c in (a, b))
            for rows in _chunks(x3):
                operands = grad3[rows].to(a.dtype), x3[rows].to(a.dtype), a, b
                grad_x[rows], part_a, part_b = _backward(*operands, coefficients, recorded=False)
                sum_a += part_a
                sum_b += part_b
        sign = torch.where(denominator < 0, -1, 1)  # sign(0) = +1
        return grad_x.reshape(x.shape), _per_group(sum_a, numerator), _per_group(sum_b, denominator) * sign, None, None


def refuse_second_derivatives(what: str = "rational") -> None:
    """Raises: RuntimeError in a backward pass that is to be differentiated itself."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(f"{what} is differentiable once: it has no second derivatives (create_graph=True)")


def _whole(x: Tensor) -> bool:
    """Whether to evaluate x at once, not in chunks: a compiler fuses the operations, and a GPU would only get more."""
    return x.device.type != "cpu" or _traced()


def _chunks(x3: Tensor):
    rows = max(1, CHUNK // max(1, x3.shape[1] * x3.shape[2]))
    return (slice(i, i + rows) for i in range(0, x3.shape[0], rows))
