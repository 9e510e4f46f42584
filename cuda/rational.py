"""The operators kan::rational and kan::rational_backward, on the kernels of rational.cu.

They are registered without CuPy, which is imported at the first launch. Fake kernels make them opaque to torch.compile
and torch.export. The checks of arguments are in kan_basis/rational.py, the definition in kan_basis/quotient.py.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from . import launch

TYPES = {torch.float32: "float", torch.float16: "__half", torch.bfloat16: "__nv_bfloat16"}
MAX_DEGREE = 8
MAX_FUNCTIONS = 4096
# (threads of a block, blocks of a multiprocessor, stages of the pipeline), measured on an H200
CONFIG = {"forward": (192, 8, 3), "backward": (512, 1, 4)}
TILE = 4  # rows of a tile
TEAM = 64  # blocks whose sums are summed first, where there are more than 512


def refusal(
    shape: tuple[int, ...], dtype: torch.dtype, a_shape: tuple[int, int], b_shape: tuple[int, int], dim: int
) -> str:
    """Why the kernels do not take valid arguments of these shapes, "" if they do.

    A compiler may not know the sizes of x yet; they are left to the operators.
    """
    if dtype not in TYPES:
        return "they take float32, float16 and bfloat16, not float64"
    if a_shape[1] > MAX_DEGREE + 1 or b_shape[1] > MAX_DEGREE:
        return f"they take degrees up to {MAX_DEGREE}"
    if math.lcm(a_shape[0], b_shape[0]) > MAX_FUNCTIONS:
        return f"they take up to {MAX_FUNCTIONS} different functions"
    if torch.compiler.is_compiling():
        return ""
    if math.prod(shape) * dtype.itemsize >= 1 << 34:
        return "they take tensors of less than 16 GiB"
    if math.prod(shape[dim:]) >= 1 << 31:
        return "they take less than 2^31 elements in the channels and the dimensions behind them"
    return ""


class Plan(NamedTuple):
    """How a kernel goes over x. Lengths are in vectors of 16 bytes, or in elements."""

    vectors: bool
    segments: bool
    grid: int
    rows: int  # of partial sums, in the backward kernel
    outer: int
    groups: int  # as many contiguous groups of channels as it takes for both coefficient tensors to be constant on each
    length: int
    tile: int


def plan(
    kind: str,
    shape: tuple[int, ...],
    dim: int,
    a_rows: int,
    b_rows: int,
    size: int,
    aligned: bool,
    multiprocessors: int,
) -> Plan:
    """The plan of a "forward" or "backward" kernel; `size` is the size of an element in bytes."""
    threads, blocks, _ = CONFIG[kind]
    outer, inner, groups = math.prod(shape[:dim]), math.prod(shape[dim + 1 :]), math.lcm(a_rows, b_rows)
    length, per_vector = shape[dim] // groups * inner, 16 // size
    vectors = aligned and length % per_vector == 0
    length //= per_vector if vectors else 1
    period = groups * length
    unit = period // math.gcd(period, threads)
    # The last condition bounds the partial sums, of which there are at least `unit` rows otherwise.
    segments = period > 4096 and (length >= 32 or unit > blocks * multiprocessors) or unit * groups >= 1 << 20
    low, high = sorted((threads, period))
    if kind == "forward" and vectors and not segments and high % low == 0:
        grid = math.ceil(outer * period / (TILE * high)) * (high // threads)
        return Plan(vectors, segments, grid, 0, outer, groups, length, TILE)
    unit = groups if segments else unit
    grid = max(1, min(blocks * multiprocessors // unit, math.ceil(outer * period / (threads * unit)))) * unit
    rows = 0 if kind == "forward" else grid // groups if segments else grid
    return Plan(vectors, segments, grid, rows, outer, groups, length, 0)


def team_size(rows: int, groups: int) -> int:
    """How many rows of partial sums are summed first. Long rows take one block too long: their teams are small."""
    if groups > 1024:
        return math.isqrt(max(rows, 1) - 1) + 1
    return rows if rows <= 512 else TEAM


class Launch(NamedTuple):
    kernel: "launch.Kernel"
    grid: int
    threads: int
    numbers: tuple[int, ...]  # arguments of the kernel
    floats: int  # of partial sums


@lru_cache(maxsize=4096)
def _prepare(
    kind: str,
    shape: tuple[int, ...],
    dim: int,
    a_shape: tuple[int, int],
    b_shape: tuple[int, int],
    dtype: torch.dtype,
    aligned: bool,
    device: int,
) -> Launch:
    (threads, blocks, stages), K = CONFIG[kind], a_shape[1] + b_shape[1]
    multiprocessors = launch.multiprocessors(device)
    p = plan(kind, shape, dim, a_shape[0], b_shape[0], dtype.itemsize, aligned, multiprocessors)
    slots, table = 16 * threads * stages * p.vectors, 0
    if kind == "backward":
        stages -= K > 12  # 99 KiB is what the smallest GPUs have for a block
        slots, table = 32 * threads * stages * p.vectors, 4 * (K * (threads + 1) + threads)
    shared = slots + table if dtype is torch.float32 else max(slots, table)  # see FLUSH in rational.cu
    shared = max(shared, 32 * threads if kind == "backward" else 0)
    flags = f"{p.vectors}, {p.segments}".lower()
    degrees = f"{a_shape[1] - 1}, {b_shape[1]}"
    name = f"rational_{kind}_kernel<{TYPES[dtype]}, {degrees}, {flags}, {threads}, {blocks}, {stages}>"
    team = team_size(p.rows, p.groups)
    teams = math.ceil(p.rows / team) if p.rows else 0
    assert teams < launch.COUNTERS
    types = ("PPPP" if kind == "forward" else "PPPPPPPPP") + "qiiiii"
    kernel = launch.kernel("rational.cu", name, types, shared, device)
    shares = p.groups // a_shape[0], p.groups // b_shape[0]
    numbers = (p.outer, p.groups, p.length, *shares, p.tile if kind == "forward" else team)
    return Launch(kernel, p.grid, threads, numbers, (p.rows + teams + 1) * p.groups * K)


def _plain(t: Tensor) -> Tensor:
    return t if t.dtype is torch.float32 and t.is_contiguous() else t.float().contiguous()


def forward(x: Tensor, numerator: Tensor, denominator: Tensor, dim: int) -> Tensor:
    x, a, b = x.contiguous(), _plain(numerator), _plain(denominator)
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    address = x.data_ptr()
    kernel, grid, threads, numbers, _ = _prepare(
        "forward", x.shape, dim, a.shape, b.shape, x.dtype, address % 16 == 0, x.get_device()
    )
    kernel(grid, threads, address, a.data_ptr(), b.data_ptr(), y.data_ptr(), *numbers)
    return y


def backward(
    grad: Tensor, x: Tensor, numerator: Tensor, denominator: Tensor, dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    grad, x, a, b = (
        (grad if grad.dtype is x.dtype else grad.to(x.dtype)).contiguous(),
        x.contiguous(),
        _plain(numerator),
        _plain(denominator),
    )
    grad_x, grad_a, grad_b = torch.empty_like(x), torch.empty_like(a), torch.empty_like(b)
    if x.numel() == 0:
        return grad_x, torch.zeros_like(numerator), torch.zeros_like(denominator)
    grad_address, address, device = grad.data_ptr(), x.data_ptr(), x.get_device()
    kernel, grid, threads, numbers, floats = _prepare(
        "backward", x.shape, dim, a.shape, b.shape, x.dtype, (grad_address | address) % 16 == 0, device
    )
    counters, partials, owner = launch.workspace(device, floats)
    kernel(
        grid,
        threads,
        grad_address,
        address,
        a.data_ptr(),
        b.data_ptr(),
        grad_x.data_ptr(),
        grad_a.data_ptr(),
        grad_b.data_ptr(),
        partials,
        counters,
        *numbers,
    )
    del owner  # needed until the launch
    return (
        grad_x,
        grad_a if a is numerator else grad_a.to(numerator.dtype),
        grad_b if b is denominator else grad_b.to(denominator.dtype),
    )


library = torch.library.Library("kan", "DEF")
library.define("rational(Tensor x, Tensor numerator, Tensor denominator, int dim) -> Tensor")
library.define(
    "rational_backward(Tensor grad, Tensor x, Tensor numerator, Tensor denominator, int dim)"
    " -> (Tensor, Tensor, Tensor)"
)


@lru_cache(maxsize=4096)
def _check(shape, dtype, device, a_shape, a_device, b_shape, b_device, dim: int) -> None:
    """The operators' arguments, which may come from an exported program or another caller. Raises: ValueError."""
    fit = (
        a_device == b_device == device
        and len(a_shape) == len(b_shape) == 2
        and -len(shape) <= dim < len(shape)
        and 0 not in (*a_shape, *b_shape)
        and shape[dim] % a_shape[0] == shape[dim] % b_shape[0] == 0
    )
    reason = refusal(shape, dtype, a_shape, b_shape, dim) if fit else "shapes or devices do not fit together"
    if reason:
        raise ValueError(
            f"kan::rational cannot take x {tuple(shape)} {dtype} on {device}, channels in dimension {dim}, with the "
            f"numerator {tuple(a_shape)} on {a_device} and the denominator {tuple(b_shape)} on {b_device}: {reason}"
        )


def _forward_operator(x: Tensor, numerator: Tensor, denominator: Tensor, dim: int) -> Tensor:
    _check(x.shape, x.dtype, x.device, numerator.shape, numerator.device, denominator.shape, denominator.device, dim)
    return forward(x, numerator, denominator, dim % x.ndim)


def _backward_operator(
    grad: Tensor, x: Tensor, numerator: Tensor, denominator: Tensor, dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    _check(x.shape, x.dtype, x.device, numerator.shape, numerator.device, denominator.shape, denominator.device, dim)
    if grad.shape != x.shape or grad.device != x.device:
        raise ValueError(
            f"kan::rational_backward cannot take a gradient {tuple(grad.shape)} on {grad.device} "
            f"for x {tuple(x.shape)} on {x.device}"
        )
    return backward(grad, x, numerator, denominator, dim % x.ndim)


library.impl("rational", _forward_operator, "CUDA")
library.impl("rational_backward", _backward_operator, "CUDA")


@torch.library.register_fake("kan::rational", lib=library)
def _(x, numerator, denominator, dim):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.register_fake("kan::rational_backward", lib=library)
def _(grad, x, numerator, denominator, dim):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, numerator, denominator))


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.dim = inputs[3]


def _differentiate(ctx, grad: Tensor):
    from kan_basis.quotient import refuse_second_derivatives  # here, because kan_basis imports this module

    refuse_second_derivatives()
    return *torch.ops.kan.rational_backward(grad, *ctx.saved_tensors, ctx.dim), None


torch.library.register_autograd("kan::rational", _differentiate, setup_context=_save, lib=library)
