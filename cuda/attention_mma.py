"""Launches of the kernels of attention.cu: half precision, heads of up to 64 channels, rank up to 16, few features.

The other cases of kan_basis/attention.py run in Triton (attention_kernels.py), with the same packed coefficients.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

from . import launch

TYPES = {torch.float16: "__half", torch.bfloat16: "__nv_bfloat16"}
BASIS = {"fourier": "Fourier", "chebyshev": "Chebyshev", "radial": "Radial"}
BASE = {"": "Zero", "identity": "Identity", "relu": "Relu", "silu": "Silu", "gelu": "Gelu"}
RANK, MAX_FEATURES, MAX_CHANNELS = 16, 8, 64
MATRIX, SIZES = "Pqqq", "iiiiiifff"
SHARED = 227 << 10  # bytes of shared memory of a block
GROUP = 5  # warps of a group, at most
VALUES_CHUNK = 256
KEY_WARPS = 5
KEY_CHUNK = 112


def takes(*tensors: Tensor, rank: int, features: int) -> bool:
    """Whether the kernels take q, k, v and other tensors (B, h, N, d) with this rank and number of features."""
    q = tensors[0]
    return (
        q.dtype in TYPES
        and q.is_cuda
        and rank <= RANK
        and features <= MAX_FEATURES
        and q.shape[-1] <= MAX_CHANNELS
        and q.shape[-1] % 8 == 0
        and all(t.data_ptr() % 16 == 0 and all(s % 8 == 0 for s in t.stride()[:3]) for t in tensors)
    )


def _matrix(t: Tensor) -> tuple[int, int, int, int]:
    return t.data_ptr(), *t.stride()[:3]


def _up(size: int, unit: int = 16) -> int:
    return math.ceil(size / unit) * unit


@lru_cache(maxsize=4096)
def _kernel(kind, types, dtype, basis, order, base, features, d, shared, device, extra=""):
    file = "attention_forward.cu" if kind == "forward" else "attention_backward.cu"
    name = BASIS.get(basis) or f"Spline<{order}>"
    arguments = f"{TYPES[dtype]}, {name}, {BASE[base]}, {features}, {_up(d)}{extra}"
    return launch.kernel(file, f"attention_{kind}_kernel<{arguments}>", types, shared, device)


@lru_cache(maxsize=4096)
def _values_kernel(kind, types, dtype, D, chunk, device):
    file = "attention_forward.cu" if kind == "values" else "attention_backward.cu"
    shared = 2 * (chunk * (D + 8 + RANK + 8) + RANK * (D + 8))
    return launch.kernel(file, f"attention_{kind}_kernel<{TYPES[dtype]}, {D}>", types, shared, device)


def _groups(N: int, warps: int, D: int, F: int) -> tuple[int, int, int]:
    """Warps of a group that takes N rows in as few turns as possible, groups of a block, and tokens of a chunk."""
    tiles = math.ceil(N / 16)
    of_group = math.ceil(tiles / math.ceil(tiles / GROUP))
    groups = min(15, warps // of_group)  # the number of named barriers
    row = 2 * (F * RANK + 8 + groups * (D + 8))
    chunks = math.ceil(_up(N) / (SHARED // row // 16 * 16))
    return of_group, groups, _up(math.ceil(N / chunks))


def _blocks(B: int, N: int, H: int, of_group: int, groups: int, device: int) -> int:
    """Blocks of a grid, a multiple of H, so many that all multiprocessors work if there is enough to do."""
    turns = B * math.ceil(math.ceil(N / 16) / of_group)
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    return H * max(1, min(multiprocessors // H, math.ceil(turns / groups)))


def forward(q, k, v, packed, values, z, out, scale, basis, order, low, step, base) -> None:
    B, H, N, d = q.shape
    F, D, device, padded = packed.shape[1] // 2, _up(d), q.get_device(), packed.shape[2]
    of_group, groups, chunk = _groups(N, 20, D, F)
    shared = 2 * chunk * (F * RANK + 8 + groups * (D + 8))
    kernel = _kernel("forward", MATRIX * 2 + "PP" + SIZES + "i", q.dtype, basis, order, base, F, d, shared, device)
    kernel(
        _blocks(B, N, H, of_group, groups, device), 32 * of_group * groups, *_matrix(q), *_matrix(k), packed.data_ptr(),
        z.data_ptr(), B, H, N, d, padded, chunk, scale, low, step, of_group,
    )
    chunk = min(VALUES_CHUNK, _up(N))
    kernel = _values_kernel("values", MATRIX + "PiPP" + MATRIX + SIZES, q.dtype, D, chunk, device)
    kernel(
        B * H, 2 * D, *_matrix(v), packed[0, 2 * F].data_ptr(), packed.stride(0), z.data_ptr(), values.data_ptr(),
        *_matrix(out), B, H, N, d, padded, chunk, scale, low, step,
    )


def backward(grad, q, k, v, packed, values, z, dz, dq, dk, dv, scale, basis, order, low, step, base) -> Tensor:
    B, H, N, d = q.shape
    F, D, device = packed.shape[1] // 2, _up(d), q.get_device()
    common, sizes = (q.dtype, basis, order, base, F, d), (B, H, N, d, packed.shape[2])
    dvalues, chunk = torch.empty_like(values), min(VALUES_CHUNK, _up(N))
    kernel = _values_kernel("backward_values", MATRIX + "PPPP" + SIZES, q.dtype, D, chunk, device)
    kernel(
        B * H, 2 * D, *_matrix(grad), values.data_ptr(), z.data_ptr(), dz.data_ptr(), dvalues.data_ptr(), *sizes, chunk,
        scale, low, step,
    )
    of_group, groups, chunk = _groups(N, 16, D, F)
    shared = 2 * chunk * (F * RANK + 8 + groups * (D + 8))
    kernel = _kernel("backward_query", MATRIX * 2 + "PP" + MATRIX + SIZES + "i", *common, shared, device)
    kernel(
        _blocks(B, N, H, of_group, groups, device), 32 * of_group * groups, *_matrix(q), *_matrix(k), packed.data_ptr(),
        dz.data_ptr(), *_matrix(dq), *sizes, chunk, scale, low, step, of_group,
    )
    key_blocks = math.ceil(math.ceil(N / 16) / KEY_WARPS)
    warps = math.ceil(math.ceil(N / 16) / key_blocks)
    chunk = min(KEY_CHUNK, _up(N))
    shared = 2 * 2 * (chunk * (D + 8 + RANK + 8) + (32 * warps + RANK) * (D + 8)) + 4 * 8 * 32 * warps
    resident = 2 * torch.cuda.get_device_properties(device).multi_processor_count
    images = math.ceil(B / max(1, min(B, resident // (key_blocks * H))))
    number = math.ceil(B / images)
    sums = torch.empty(number, H, F + 1, packed.shape[2], RANK, dtype=torch.float32, device=q.device)
    types = MATRIX * 3 + "PPP" + MATRIX * 2 + "P" + SIZES + "i"
    kernel = _kernel("backward_key", types, *common, shared, device, f", {KEY_WARPS}")
    kernel(
        number * H * key_blocks, 32 * warps, *_matrix(q), *_matrix(k), *_matrix(v), packed.data_ptr(), dz.data_ptr(),
        dvalues.data_ptr(), *_matrix(dk), *_matrix(dv), sums.data_ptr(), *sizes, chunk, scale, low, step, images,
    )
    return sums
