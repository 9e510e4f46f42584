"""The CUDA path of kan_basis.rational: two operators, kan::rational and kan::rational_backward, on the kernels of rational.cu.

Registered without CuPy, which is imported at the first launch; fake kernels make them opaque to torch.compile and torch.export.
Checks, autograd and the choice between this and the definition are in kan_basis/rational.py.
"""
import math
from functools import lru_cache

import torch
from torch import Tensor

from cuda import launch

TYPES = {torch.float32: "float", torch.float16: "__half", torch.bfloat16: "__nv_bfloat16"}
MAX_DEGREE = 8
# (threads of a block, blocks of a multiprocessor, stages of the pipeline) by bytes of an element, measured on an H200. Persistent blocks; for the
# forward pass, which leaves no sums behind, blocks of TILE vectors a thread are quicker wherever a row of groups divides the threads.
CONFIG = {("forward", 2): (256, 4, 4), ("forward", 4): (512, 2, 4), ("backward", 2): (512, 1, 5), ("backward", 4): (384, 2, 4)}
TILES = ((192, 8, 3), (384, 4, 3), (768, 2, 3))
TILE = 4
TEAM = 64  # of rational.cu


def supports(x: Tensor, numerator: Tensor, denominator: Tensor) -> bool:
    """Whether the kernels take these (valid) arguments: 32 or 16 bits, degrees up to 8, at most 16 GiB, at most 1,024 functions."""
    return (x.dtype in TYPES and numerator.shape[1] <= MAX_DEGREE + 1 and denominator.shape[1] <= MAX_DEGREE
            and x.numel() * x.element_size() < 1 << 34 and math.lcm(numerator.shape[0], denominator.shape[0]) <= 1024)


def plan(kind: str, shape: tuple[int, ...], dim: int, a_rows: int, b_rows: int, size: int, aligned: bool, multiprocessors: int):
    """How a kernel goes over x: (configuration, vectors, segments, grid, outer, groups, length, tile), lengths in what a thread takes at once.

    groups: as many contiguous groups of channels as it takes for both coefficient tensors to be constant on each.
    """
    outer, inner, groups = math.prod(shape[:dim]), math.prod(shape[dim + 1:]), math.lcm(a_rows, b_rows)
    length, per_vector = shape[dim] // groups * inner, 16 // size
    vectors = aligned and length % per_vector == 0
    length //= per_vector if vectors else 1
    period = groups * length
    segments = period > 4096 and length >= 32
    if kind == "forward" and vectors and not segments:
        for config in TILES:
            if config[0] % period == 0:
                tile = TILE * config[0]
                return config, vectors, segments, math.ceil(outer * period / tile), outer, groups, length, tile
    threads, blocks, _ = config = CONFIG[kind, size]
    unit = groups if segments else period // math.gcd(period, threads)
    needed = math.ceil(outer * period / threads)
    grid = max(1, min(blocks * multiprocessors // unit, math.ceil(needed / unit))) * unit
    return config, vectors, segments, grid, outer, groups, length, 0


@lru_cache(maxsize=4096)
def _prepare(kind: str, shape: tuple[int, ...], dim: int, a_shape: tuple[int, int], b_shape: tuple[int, int], dtype: torch.dtype, aligned: bool,
             device: int):
    """(kernel, grid, threads, floats of partial sums, int64 arguments, int32 arguments) of a call."""
    size, K = dtype.itemsize, a_shape[1] + b_shape[1]
    config, vectors, segments, grid, outer, groups, length, tile = plan(kind, shape, dim, a_shape[0], b_shape[0], size, aligned,
                                                                        launch.multiprocessors(device))
    threads, blocks, stages = config
    tensors, table = (1, 0) if kind == "forward" else (2, 4 * K * (threads + 1))
    shared = max(16 * tensors * threads * stages if vectors else 0, table)
    name = (f"rational_{kind}_kernel<{TYPES[dtype]}, {a_shape[1] - 1}, {b_shape[1]}, {str(vectors).lower()}, {str(segments).lower()}, "
            f"{threads}, {blocks}, {stages}>")
    rows = grid // groups if segments else grid
    return (launch.kernel("rational.cu", name, shared, device), grid, threads, (rows + -(-rows // TEAM)) * groups * K, (outer,),
            (groups, length, groups // a_shape[0], groups // b_shape[0], tile), 1 + -(-rows // TEAM))


def _plain(t: Tensor) -> Tensor:
    return t if t.dtype is torch.float32 and t.is_contiguous() else t.float().contiguous()


def forward(x: Tensor, numerator: Tensor, denominator: Tensor, dim: int) -> Tensor:
    x, a, b = x.contiguous(), _plain(numerator), _plain(denominator)
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    address = x.data_ptr()
    kernel, grid, threads, _, longs, ints, _ = _prepare("forward", x.shape, dim, a.shape, b.shape, x.dtype, address % 16 == 0, x.device.index)
    kernel(grid, threads, (address, a.data_ptr(), b.data_ptr(), y.data_ptr()), longs, ints)
    return y


def backward(grad: Tensor, x: Tensor, numerator: Tensor, denominator: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    grad, x, a, b = grad.to(x.dtype).contiguous(), x.contiguous(), _plain(numerator), _plain(denominator)
    grad_x, grad_a, grad_b = torch.empty_like(x), torch.empty_like(a), torch.empty_like(b)
    if x.numel() == 0:
        return grad_x, torch.zeros_like(numerator), torch.zeros_like(denominator)
    addresses = grad.data_ptr(), x.data_ptr()
    kernel, grid, threads, floats, longs, ints, counters = _prepare("backward", x.shape, dim, a.shape, b.shape, x.dtype,
                                                          addresses[0] % 16 == 0 and addresses[1] % 16 == 0, x.device.index)
    partials = torch.empty(floats, dtype=torch.float32, device=x.device)
    zeros, owner = launch.counters(x.device, counters)
    kernel(grid, threads, (*addresses, a.data_ptr(), b.data_ptr(), grad_x.data_ptr(), grad_a.data_ptr(), grad_b.data_ptr(), partials.data_ptr(),
                           zeros), longs, ints)
    del owner  # it was needed until the launch
    return grad_x, grad_a.to(numerator.dtype), grad_b.to(denominator.dtype)


_library = torch.library.Library("kan", "DEF")
_library.define("rational(Tensor x, Tensor numerator, Tensor denominator, int dim) -> Tensor")
_library.define("rational_backward(Tensor grad, Tensor x, Tensor numerator, Tensor denominator, int dim) -> (Tensor, Tensor, Tensor)")
_library.impl("rational", forward, "CUDA")
_library.impl("rational_backward", backward, "CUDA")


@torch.library.register_fake("kan::rational", lib=_library)
def _(x, numerator, denominator, dim):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.register_fake("kan::rational_backward", lib=_library)
def _(grad, x, numerator, denominator, dim):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, numerator, denominator))
