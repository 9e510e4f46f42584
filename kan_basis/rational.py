"""Group-rational functions: the activation of KAT and FlashKAT, in plain PyTorch.

This file is the definition. It is what runs on the CPU, and what every faster path is tested against; on a GPU the kernels of cuda/rational.cu
run instead wherever CuPy is installed (`use_kernel`).

    F(x) = P(x) / Q(x),   P(x) = a_0 + a_1 x + ... + a_m x^m,   Q(x) = 1 + |b_1| |x| + ... + |b_n| |x|^n

Q >= 1 for every x, so F has no poles ("safe Pade activation unit, version A": one absolute value per term).
Source: Molina et al. 2020 (arXiv:1907.06732), version A; sharing by channel groups: Yang & Wang 2025 (arXiv:2409.10594), sec. 4.
"""

import json
import math
import os
import warnings
from functools import cache, lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

try:  # registers the operators; CuPy is imported at the first launch
    from cuda import launch
    from cuda import rational as kernel
except ImportError as error:  # another package of that name
    kernel, _operators, _why_not = None, None, f"the kernels in cuda/ cannot be imported ({error})"
else:
    _operators = kernel.library
    kernel, _why_not = (
        (kernel, "") if launch.available() else (None, "CuPy is not installed (pip install cupy-cuda13x)")
    )

CHUNK = 1 << 18  # elements evaluated at once on the CPU: the temporaries of one chunk stay in its caches
FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


KERNELS = ("auto", "cuda", "torch")
_choice = os.environ.get("KAN_KERNEL", "auto")
if _choice not in KERNELS:
    warnings.warn(f"KAN_KERNEL={_choice} is none of {', '.join(KERNELS)}: auto is taken", stacklevel=2)
    _choice = "auto"


def use_kernel(choice: str) -> None:
    """auto: the CUDA kernels where they can run, else plain PyTorch, with one warning; cuda: the kernels; torch: plain PyTorch.

    Also by the environment variable KAN_KERNEL.
    Raises: ValueError for another choice, or for cuda where the kernels cannot run.
    """
    global _choice
    if choice not in KERNELS:
        raise ValueError(f"unknown kernel '{choice}'; there are: {', '.join(KERNELS)}")
    if choice == "cuda" and (kernel is None or not torch.cuda.is_available()):
        raise ValueError(f"the CUDA kernels cannot run here: {_why_not or 'there is no CUDA GPU'}")
    _choice = choice


@cache
def _warn_once() -> None:
    warnings.warn(
        f"rational runs in plain PyTorch, several times slower than its CUDA kernels: {_why_not}", stacklevel=4
    )


@torch.compiler.assume_constant_result  # a compiler calls it where it would warn about the warning
def _warn() -> bool:
    _warn_once()
    return True


def _path(watched: bool) -> str:
    """Where to compute what the kernels support: "kernel"; "operator", the same through torch's dispatcher; "definition"."""
    if _choice == "torch" or watched and torch.onnx.is_in_onnx_export():
        return "definition"
    if kernel is None:
        _warn()
        return "definition"
    return "operator" if watched else "kernel"


def _watched(*tensors: Tensor) -> bool:
    """Whether anything but autograd wants to see the operations: a compiler or tracer, a dispatch mode, a transform, a tensor subclass.

    Without them the dispatcher is left out, which costs more host time than the rest of a call.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
    ):
        return True
    for t in tensors:
        if type(t) is not Tensor and type(t) is not nn.Parameter:
            return True
    return torch._C._functorch.peek_interpreter_stack() is not None


def rational(x: Tensor, numerator: Tensor, denominator: Tensor, channel_dim: int = -1) -> Tensor:
    """Grouped rational function P(x) / Q(x) with Q(x) = 1 + sum_j |b_j| |x|^j (safe PAU, version A).

    The channels are split into contiguous groups that share one function. Numerator and denominator may be shared differently:
    each has its own number of rows, from 1 (all channels share) to C (one function per channel).

    Gradients, in closed form, with R = P' and S = dQ/dx = sign(x) (|b_1| + 2 |b_2| |x| + ... + n |b_n| |x|^(n-1)):
    dF/dx = R/Q - S P/Q^2,  dF/da_i = x^i / Q,  dF/db_j = -sign(b_j) |x|^j P/Q^2, where sign(0) = +1, so that a denominator
    that starts at b = 0 trains. Only x and the coefficients are kept for the backward pass, which is itself not differentiable;
    torch.func's transforms are not supported. |x|^m and |x|^n must not overflow: |x| < 1e7 in float32 with the degrees 5 and 4.

    Args:
        x: any shape with C channels along `channel_dim`, any strides, float32 / float16 / bfloat16 / float64.
        numerator: a_0..a_m, (rows, m + 1), rows divides C.
        denominator: b_1..b_n, (rows, n), rows divides C.
        channel_dim: -1 for channels last, 1 for (B, C, H, W).
    Returns: shape and dtype of x, computed in float32 (float64 for float64). Under autocast x is first cast to the autocast
        dtype, as torch.nn.functional.linear does. Coefficient gradients have the coefficients' dtype.
    Raises: TypeError if a tensor is not floating point; ValueError if shapes or devices do not fit together.
    """
    watched = _watched(x, numerator, denominator)
    supported = (_check if watched else _check_once)(
        x.shape,
        x.dtype,
        x.device,
        numerator.shape,
        numerator.dtype,
        numerator.device,
        denominator.shape,
        denominator.dtype,
        denominator.device,
        channel_dim,
    )
    # the first question answers most calls and takes a fifth of the time
    if (
        torch._C._is_any_autocast_enabled()
        and not x.is_meta
        and x.dtype is not torch.float64
        and torch.is_autocast_enabled(x.device.type)
    ):
        dtype = torch.get_autocast_dtype(x.device.type)
        x = x if x.dtype is dtype else x.to(dtype)
    dim, path = channel_dim % x.ndim, _path(watched) if supported else "definition"
    if path == "operator":
        return torch.ops.kan.rational(x, numerator, denominator, dim)
    if (
        path == "kernel"
        and torch.autograd.forward_ad._current_level < 0
        and not (torch.is_grad_enabled() and (x.requires_grad or numerator.requires_grad or denominator.requires_grad))
    ):
        return kernel.forward(x, numerator, denominator, dim)  # as below, without autograd's cost
    if watched and torch.onnx.is_in_onnx_export():
        return _evaluate(x, numerator, denominator, dim)
    return _Rational.apply(x, numerator, denominator, dim, path)


def _check(shape, dtype, device, a_shape, a_dtype, a_device, b_shape, b_dtype, b_device, channel_dim: int) -> bool:
    """Whether the kernels take these arguments. Raises: see `rational`."""
    for name, its_dtype, its_device in (
        ("x", dtype, device),
        ("numerator", a_dtype, a_device),
        ("denominator", b_dtype, b_device),
    ):
        if its_dtype not in FLOAT_DTYPES:
            raise TypeError(f"rational: {name} must be float32, float16, bfloat16 or float64, not {its_dtype}")
        if its_device != device:
            raise ValueError(f"rational: x is on {device} but {name} is on {its_device}")
    if not -len(shape) <= channel_dim < len(shape):
        raise ValueError(f"rational: channel_dim {channel_dim} does not exist in x of shape {tuple(shape)}")
    for name, its_shape, least in (("numerator", a_shape, "m + 1 >= 1"), ("denominator", b_shape, "n >= 1")):
        if len(its_shape) != 2 or 0 in its_shape:
            raise ValueError(f"rational: {name} must have shape (groups, {least}), not {tuple(its_shape)}")
        if shape[channel_dim] % its_shape[0]:
            raise ValueError(
                f"rational: the {shape[channel_dim]} channels of x {tuple(shape)} (dimension {channel_dim}) "
                f"do not divide into the {its_shape[0]} groups of {name} {tuple(its_shape)}"
            )
    return device.type == "cuda" and (
        kernel is None or kernel.supports(shape, dtype, a_shape, b_shape, channel_dim) and launch.runs_on(device.index)
    )


_check_once = lru_cache(maxsize=4096)(_check)  # for sizes that are plain numbers, which a compiler's are not


def _traced() -> bool:
    return torch.compiler.is_compiling() or torch.onnx.is_in_onnx_export()


def _abs(t: Tensor) -> Tensor:
    """|t|, with the derivative +1 at 0 where an exporter takes the definition apart and differentiates it by itself."""
    return torch.where(t < 0, -t, t) if torch.compiler.is_compiling() else t.abs()


def _is_batch(grad: Tensor) -> bool:
    """Whether these are several gradients at once, of is_grads_batched."""
    return not torch.compiler.is_compiling() and torch._C._functorch.is_legacy_batchedtensor(grad)


def _horner(coefficients: list[Tensor], x: Tensor) -> Tensor:
    """c_0 + c_1 x + c_2 x^2 + ... in a tensor of its own."""
    if len(coefficients) == 1:
        return coefficients[0].expand_as(x).clone()
    y = torch.addcmul(coefficients[-2], coefficients[-1], x)
    for c in reversed(coefficients[:-2]):
        y = torch.addcmul(c, y, x, out=None if _traced() else y)  # one buffer; a compiler needs no help
    return y


def _forward(x: Tensor, a: list[Tensor], b: list[Tensor]) -> Tensor:
    """P / Q for x (outer, C, inner); a and b = |b_j| hold one (C, 1) column per coefficient."""
    return _horner(a, x).div_(_horner([torch.ones_like(b[0]), *b], _abs(x)))


def _backward(
    grad: Tensor, x: Tensor, a: list[Tensor], b: list[Tensor], coefficients: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dF/dx * grad like x, and the sums over all but the channels of dF/da_i * grad and dF/d|b_j| * grad, (C, m + 1) and (C, n)."""
    ax = x.abs()
    s = _horner([j * c for j, c in enumerate(b, 1)], ax)
    s = torch.where(x < 0, -s, s)  # copysign would take -0.0 for negative
    q = _horner([torch.ones_like(b[0]), *b], ax)
    y = _horner(a, x).div_(q)
    t = grad / q
    r = _horner([i * c for i, c in enumerate(a[1:], 1)], x) if len(a) > 1 else torch.zeros_like(x)
    times = torch.mul if _is_batch(t) else Tensor.mul_
    grad_x = times(r.addcmul_(y, s, value=-1), t)
    if not coefficients:
        return grad_x, x.new_zeros(x.shape[1], len(a)), x.new_zeros(x.shape[1], len(b))
    w = times(y, t).neg_()
    grad_a, grad_b = [_channel_sum(t)], []
    for _ in a[1:]:
        grad_a.append(_channel_sum(t.mul_(x)))  # t = grad x^i / Q
    for _ in b:
        grad_b.append(_channel_sum(w.mul_(ax)))  # w = -grad |x|^j P / Q^2
    return grad_x, torch.stack(grad_a, 1), torch.stack(grad_b, 1)


def _channel_sum(t: Tensor) -> Tensor:
    return t.sum(0).sum(-1)


def _per_channel(rows: Tensor, channels: int, dtype: torch.dtype) -> list[Tensor]:
    """Columns (C, 1) of the coefficients (groups, K): every operation then has long contiguous inner loops."""
    return list(rows.to(dtype).repeat_interleave(channels // rows.shape[0], 0).t().unsqueeze(-1).contiguous())


def _per_group(sums: Tensor, like: Tensor) -> Tensor:
    return sums.reshape(like.shape[0], -1, like.shape[1]).sum(1).to(like.dtype)


def _prepare(x: Tensor, numerator: Tensor, denominator: Tensor, dim: int):
    channels = x.shape[dim]
    x3 = x.reshape(math.prod(x.shape[:dim]), channels, math.prod(x.shape[dim + 1 :]))
    dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
    return x3, dtype, _per_channel(numerator, channels, dtype), _per_channel(_abs(denominator), channels, dtype)


def _evaluate(x: Tensor, numerator: Tensor, denominator: Tensor, dim: int) -> Tensor:
    """The definition, without gradients in closed form."""
    x3, dtype, a, b = _prepare(x, numerator, denominator, dim)
    if _whole(x):
        return _forward(x3.to(dtype), a, b).to(x.dtype).reshape(x.shape)
    y = torch.empty_like(x3)
    for rows in _chunks(x3):
        y[rows] = _forward(x3[rows].to(dtype), a, b)
    return y.reshape(x.shape)


class _Rational(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, numerator: Tensor, denominator: Tensor, dim: int, path: str) -> Tensor:
        ctx.save_for_backward(x, numerator, denominator)
        ctx.dim, ctx.path = dim, path
        return (kernel.forward if path == "kernel" else _evaluate)(x, numerator, denominator, dim)

    @staticmethod
    def backward(ctx, grad: Tensor):
        _refuse_second_derivatives()
        x, numerator, denominator = ctx.saved_tensors
        if ctx.path == "kernel":
            run = torch.ops.kan.rational_backward if _is_batch(grad) or _watched(grad) else kernel.backward
            return *run(grad, x, numerator, denominator, ctx.dim), None, None
        x3, dtype, a, b = _prepare(x, numerator, denominator, ctx.dim)
        grad3, coefficients = grad.reshape(x3.shape), any(ctx.needs_input_grad[1:3])
        if _is_batch(grad) or _whole(x):
            grad_x, sum_a, sum_b = _backward(grad3.to(dtype), x3.to(dtype), a, b, coefficients)
            grad_x = grad_x.to(x.dtype)
        else:
            grad_x = torch.empty_like(x3)
            sum_a, sum_b = (
                x3.new_zeros(x3.shape[1], len(a), dtype=dtype),
                x3.new_zeros(x3.shape[1], len(b), dtype=dtype),
            )
            for rows in _chunks(x3):
                grad_x[rows], part_a, part_b = _backward(grad3[rows].to(dtype), x3[rows].to(dtype), a, b, coefficients)
                sum_a += part_a
                sum_b += part_b
        sign = torch.where(denominator < 0, -1, 1)  # sign(0) = +1
        return grad_x.reshape(x.shape), _per_group(sum_a, numerator), _per_group(sum_b, denominator) * sign, None, None


def _refuse_second_derivatives() -> None:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError("rational is differentiable once: it has no second derivatives (create_graph=True)")


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.dim = inputs[3]


def _operator_backward(ctx, grad: Tensor):
    _refuse_second_derivatives()
    return *torch.ops.kan.rational_backward(grad, *ctx.saved_tensors, ctx.dim), None


if _operators is not None:
    torch.library.register_autograd("kan::rational", _operator_backward, setup_context=_save, lib=_operators)


def _whole(x: Tensor) -> bool:
    """A compiler fuses the whole expression, and a GPU would only see more launches: chunks are for eager mode on the CPU."""
    return x.device.type != "cpu" or _traced()


def _chunks(x3: Tensor):
    rows = max(1, CHUNK // max(1, x3.shape[1] * x3.shape[2]))
    return (slice(i, i + rows) for i in range(0, x3.shape[0], rows))


@cache
def presets() -> dict[str, dict]:
    """Coefficients by name, with the target, the interval and the largest error of each (presets.json)."""
    return json.loads(Path(__file__).with_name("presets.json").read_text())


@cache
def preset_coefficients(mode: str, degrees: tuple[int, int]) -> tuple[list[float], list[float]]:
    """a_0..a_m and b_1..b_n of a preset. Larger degrees are filled with zeros, smaller ones fitted anew.

    Raises: ValueError for a name that does not exist.
    """
    if mode not in presets():
        raise ValueError(f"unknown rational preset '{mode}'; there are: {', '.join(sorted(presets()))}")
    preset = presets()[mode]
    a, b = preset["numerator"], preset["denominator"]
    if degrees[0] < _degree(a) or degrees[1] < _degree([1.0, *b]):
        if mode.startswith("published_"):
            raise ValueError(
                f"preset '{mode}' needs degrees of at least {len(a) - 1} {len(b)}, not {degrees[0]} {degrees[1]}"
            )
        from kan_basis.fit import fit_rational  # scipy is needed only here

        a, b, _ = fit_rational(preset["target"], degrees, tuple(preset["interval"]))
    a, b = list(a)[: degrees[0] + 1], list(b)[: degrees[1]]
    return a + [0.0] * (degrees[0] + 1 - len(a)), b + [0.0] * (degrees[1] - len(b))


def _degree(coefficients: list[float]) -> int:
    return max((i for i, c in enumerate(coefficients) if c), default=0)


class GroupRational(nn.Module):
    """Learnable activation: one rational function per group of channels (`rational` above).

    Args:
        num_groups: rows of the denominator; 0 or less: one per channel.
        mode: preset that the functions start from (`presets`), such as "identity", "swish", "gelu".
        degrees: (m, n), degrees of numerator and denominator, m >= 0 and n >= 1.
        numerator_groups: rows of the numerator; 1 as in the published KAT weights; 0 or less: one per channel.
        num_channels: number of channels C, needed only for one function per channel (checked early otherwise).
        channel_dim: -1 for channels last, 1 for (B, C, H, W).
    Shape: any shape with C channels along `channel_dim` -> the same.
    Raises: ValueError for an unknown preset, impossible degrees or groups.
    """

    def __init__(
        self,
        num_groups: int = 8,
        mode: str = "swish",
        degrees: tuple[int, int] = (5, 4),
        numerator_groups: int = 1,
        num_channels: int | None = None,
        channel_dim: int = -1,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        m, n = degrees
        if m < 0 or n < 1:
            raise ValueError(f"degrees must be (m >= 0, n >= 1), not {tuple(degrees)}")
        rows = []
        for groups in (numerator_groups, num_groups):
            if groups <= 0 and num_channels is None:
                raise ValueError("one function per channel (groups <= 0) needs num_channels")
            groups = groups if groups > 0 else num_channels
            if num_channels is not None and num_channels % groups:
                raise ValueError(f"{num_channels} channels do not divide into {groups} groups")
            rows.append(groups)
        self.mode, self.degrees, self.channel_dim = mode, (m, n), channel_dim
        self.weight_numerator = nn.Parameter(torch.empty(rows[0], m + 1, device=device, dtype=dtype))
        self.weight_denominator = nn.Parameter(torch.empty(rows[1], n, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for weight, values in zip(
            (self.weight_numerator, self.weight_denominator), preset_coefficients(self.mode, self.degrees)
        ):
            weight.copy_(torch.tensor(values, dtype=torch.float64).expand_as(weight))

    def forward(self, x: Tensor) -> Tensor:
        numerator, denominator = (
            self._parameters.get("weight_numerator"),
            self._parameters.get("weight_denominator"),
        )  # a third of the time of self.
        if numerator is None or denominator is None:  # parametrized, or a replica
            numerator, denominator = self.weight_numerator, self.weight_denominator
        return rational(x, numerator, denominator, self.channel_dim)

    def extra_repr(self) -> str:
        return (
            f"{self.weight_denominator.shape[0]} groups, numerator groups {self.weight_numerator.shape[0]}, "
            f"degrees {self.degrees}, mode '{self.mode}'"
        )
