"""The CUDA path of kan_basis.rational: two operators, kan::rational and kan::rational_backward, on the kernels of rational.cu.

Registered without CuPy, which is imported at the first launch; fake kernels make them opaque to torch.compile and torch.export.
Checks, autograd (of the operators too) and the choice between this and the definition are in kan_basis/rational.py.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

from . import launch

TYPES = {torch.float32: "float", torch.float16: "__half", torch.bfloat16: "__nv_bfloat16"}
MAX_DEGREE = 8
# (threads of a block, blocks of a multiprocessor, stages of the pipeline), measured on an H200
CONFIG = {"forward": (192, 8, 3), "backward": (512, 1, 4)}
TILE = 4  # rows of a tile
TEAM = 64  # blocks whose sums are summed first, where there are more than 512


def supports(
    shape: tuple[int, ...], dtype: torch.dtype, a_shape: tuple[int, int], b_shape: tuple[int, int], dim: int
) -> bool:
    """Whether the kernels take valid arguments of these shapes: 32 or 16 bits, degrees up to 8, at most 1,024 functions, less than 16 GiB, and
    fewer than 2^31 elements from the channels on. The sizes that a compiler does not know yet are left to the operators."""
    return (
        dtype in TYPES
        and a_shape[1] <= MAX_DEGREE + 1
        and b_shape[1] <= MAX_DEGREE
        and math.lcm(a_shape[0], b_shape[0]) <= 1024
        and (
            torch.compiler.is_compiling()
            or math.prod(shape) * dtype.itemsize < 1 << 34
            and math.prod(shape[dim:]) < 1 << 31
        )
    )


def plan(
    kind: str,
    shape: tuple[int, ...],
    dim: int,
    a_rows: int,
    b_rows: int,
    size: int,
    aligned: bool,
    multiprocessors: int,
):
    """How a kernel goes over x: (vectors, segments, grid, rows of partial sums, outer, groups, length, tile), lengths in what a thread takes at once.

    groups: as many contiguous groups of channels as it takes for both coefficient tensors to be constant on each.
    """
    threads, blocks, _ = CONFIG[kind]
    outer, inner, groups = math.prod(shape[:dim]), math.prod(shape[dim + 1 :]), math.lcm(a_rows, b_rows)
    length, per_vector = shape[dim] // groups * inner, 16 // size
    vectors = aligned and length % per_vector == 0
    length //= per_vector if vectors else 1
    period = groups * length
    unit = period // math.gcd(period, threads)
    segments = (
        period > 4096 and (length >= 32 or unit > blocks * multiprocessors) or unit * groups >= 1 << 20
    )  # else that many rows of sums
    low, high = sorted((threads, period))
    if kind == "forward" and vectors and not segments and high % low == 0:
        grid = math.ceil(outer * period / (TILE * high)) * (high // threads)
        return vectors, segments, grid, 0, outer, groups, length, TILE
    unit = groups if segments else unit
    grid = max(1, min(blocks * multiprocessors // unit, math.ceil(outer * period / (threads * unit)))) * unit
    return vectors, segments, grid, grid // groups if segments else grid, outer, groups, length, 0


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
):
    """(kernel, grid, threads, the numbers among its arguments, floats of partial sums) of a call."""
    (threads, blocks, stages), K = CONFIG[kind], a_shape[1] + b_shape[1]
    vectors, segments, grid, rows, outer, groups, length, tile = plan(
        kind, shape, dim, a_shape[0], b_shape[0], dtype.itemsize, aligned, launch.multiprocessors(device)
    )
    slots, table = 16 * threads * stages * vectors, 0
    if kind == "backward":
        stages -= K > 12  # 99 KiB is what the smallest GPUs have for a block
        slots, table = 32 * threads * stages * vectors, 4 * (K * (threads + 1) + threads)
    shared = slots + table if dtype is torch.float32 else max(slots, table)  # see FLUSH in rational.cu
    shared = max(shared, 32 * threads if kind == "backward" else 0)
    name = (
        f"rational_{kind}_kernel<{TYPES[dtype]}, {a_shape[1] - 1}, {b_shape[1]}, {str(vectors).lower()}, {str(segments).lower()}, "
        f"{threads}, {blocks}, {stages}>"
    )
    team = rows if rows <= 512 else TEAM
    teams = math.ceil(rows / team) if rows else 0
    kernel = launch.kernel(
        "rational.cu", name, ("PPPP" if kind == "forward" else "PPPPPPPPP") + "qiiiii", shared, device
    )
    numbers = (outer, groups, length, groups // a_shape[0], groups // b_shape[0], tile if kind == "forward" else team)
    assert teams < launch.COUNTERS
    return kernel, grid, threads, numbers, (rows + teams + 1) * groups * K


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
    del owner  # it was needed until the launch
    return (
        grad_x,
        grad_a if a is numerator else grad_a.to(numerator.dtype),
        grad_b if b is denominator else grad_b.to(denominator.dtype),
    )


library = torch.library.Library("kan", "DEF")
library.define("rational(Tensor x, Tensor numerator, Tensor denominator, int dim) -> Tensor")
library.define(
    "rational_backward(Tensor grad, Tensor x, Tensor numerator, Tensor denominator, int dim) -> (Tensor, Tensor, Tensor)"
)


@lru_cache(maxsize=4096)
def _check(shape, dtype, device, a_shape, a_device, b_shape, b_device, dim: int) -> None:
    """Of the operators, which an exported program or another caller may give anything. Raises: ValueError."""
    fit = (
        a_device == b_device == device
        and len(a_shape) == len(b_shape) == 2
        and -len(shape) <= dim < len(shape)
        and 0 not in (*a_shape, *b_shape)
    )
    if not (
        fit
        and shape[dim] % a_shape[0] == shape[dim] % b_shape[0] == 0
        and supports(shape, dtype, a_shape, b_shape, dim)
    ):
        raise ValueError(
            f"kan::rational cannot take x {tuple(shape)} {dtype} on {device}, channels in dimension {dim}, with the numerator "
            f"{tuple(a_shape)} on {a_device} and the denominator {tuple(b_shape)} on {b_device}"
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
            f"kan::rational_backward cannot take a gradient {tuple(grad.shape)} on {grad.device} for x {tuple(x.shape)} on {x.device}"
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
