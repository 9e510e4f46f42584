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
SHARED = 113 << 10  # bytes of shared memory for each of two blocks of a multiprocessor
WARPS = 7  # of a block
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


def _rows(N: int, least: int = 1) -> tuple[int, int]:
    """Warps of a block, at least `least`, and blocks for N rows, of which a warp takes 32."""
    warps = math.ceil(N / 32)
    blocks = math.ceil(warps / WARPS)
    return max(least, math.ceil(warps / blocks)), blocks


def _chunk(N: int, bytes_of_row: int, fixed: int) -> int:
    """Tokens of a chunk, as few chunks as fit into shared memory."""
    most = (SHARED - fixed) // bytes_of_row // 16 * 16
    return _up(math.ceil(N / math.ceil(_up(N) / most)))


def _resident(device: int) -> int:
    """Blocks that run at the same time."""
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count


def forward(q, k, v, packed, values, z, out, scale, basis, order, low, step, base) -> None:
    B, H, N, d = q.shape
    F, D, device = packed.shape[1] // 2, _up(d), q.get_device()
    warps, blocks = _rows(N)
    row, fixed = 2 * (2 * (D + 8) + (F + 1) * RANK + 8), 2 * RANK * (D + 8)
    chunk = _chunk(N, row, fixed)
    types = MATRIX * 3 + "PPP" + MATRIX + SIZES
    kernel = _kernel("forward", types, q.dtype, basis, order, base, F, d, row * chunk + fixed, device)
    kernel(
        min(B * H * blocks, _resident(device)), 32 * warps, *_matrix(q), *_matrix(k), *_matrix(v), packed.data_ptr(),
        values.data_ptr(), z.data_ptr(), *_matrix(out), B, H, N, d, packed.shape[2], chunk, scale, low, step,
    )


def backward(grad, q, k, v, packed, values, z, dz, dq, dk, dv, scale, basis, order, low, step, base) -> Tensor:
    B, H, N, d = q.shape
    F, D, device = packed.shape[1] // 2, _up(d), q.get_device()
    common, sizes = (q.dtype, basis, order, base, F, d), (B, H, N, d, packed.shape[2])
    warps, blocks = _rows(N, least=D // 16)
    row, fixed = 2 * (D + 8 + F * RANK + 8), 2 * (16 * warps * (D + 8 + RANK + 8) + RANK * (D + 8))
    chunk = _chunk(N, row, fixed)
    kernel = _kernel("backward_query", MATRIX * 3 + "PPPPPP" + MATRIX + SIZES, *common, row * chunk + fixed, device)
    dvalues = torch.empty_like(values)
    parts = torch.empty(B, H, blocks, RANK, d, dtype=torch.float32, device=q.device) if blocks > 1 else None
    kernel(
        min(B * H * blocks, _resident(device)), 32 * warps, *_matrix(grad), *_matrix(q), *_matrix(k), packed.data_ptr(),
        values.data_ptr(), z.data_ptr(), dz.data_ptr(), dvalues.data_ptr(), 0 if parts is None else parts.data_ptr(),
        *_matrix(dq), *sizes, chunk, scale, low, step,
    )
    if parts is not None:
        dvalues = parts.sum(2).to(q.dtype)
    key_blocks = math.ceil(math.ceil(N / 16) / KEY_WARPS)
    warps = math.ceil(math.ceil(N / 16) / key_blocks)
    chunk = min(KEY_CHUNK, _up(N))
    shared = 2 * 2 * (chunk * (D + 8 + RANK + 8) + (32 * warps + RANK) * (D + 8)) + 4 * 8 * 32 * warps
    images = math.ceil(B / max(1, min(B, _resident(device) // (key_blocks * H))))
    number = math.ceil(B / images)
    sums = torch.empty(number, H, F + 1, packed.shape[2], RANK, dtype=torch.float32, device=q.device)
    types = MATRIX * 3 + "PPP" + MATRIX * 2 + "P" + SIZES + "i"
    kernel = _kernel("backward_key", types, *common, shared, device, f", {KEY_WARPS}")
    kernel(
        number * H * key_blocks, 32 * warps, *_matrix(q), *_matrix(k), *_matrix(v), packed.data_ptr(), dz.data_ptr(),
        dvalues.data_ptr(), *_matrix(dk), *_matrix(dv), sums.data_ptr(), *sizes, chunk, scale, low, step, images,
    )
    return sums
