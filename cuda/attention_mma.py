"""Launches of the kernels of attention.cuh: half precision, short rows, small heads, ranks and numbers of features.

All other cases of kan_basis/attention.py run in Triton (attention_kernels.py).
"""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from . import launch

TYPES = {torch.float16: "__half", torch.bfloat16: "__nv_bfloat16"}
BASIS = {"fourier": "Fourier", "chebyshev": "Chebyshev", "radial": "Radial"}
BASE = {"": "Zero", "identity": "Identity", "relu": "Relu", "silu": "Silu", "gelu": "Gelu"}
RANK, MAX_FEATURES, MAX_CHANNELS, MAX_TOKENS = 16, 8, 64, 272
ROWS = 64  # The number of tokens of packed coefficients is a multiple of it.
MATRIX, SIZES = "Pqqq", "iiiiiifff"
GROUP = 5  # warps of a group, at most
KEY_WARPS = 2
KEY_CHUNK = 80


def takes(*tensors: Tensor, rank: int, features: int) -> bool:
    """Whether the kernels take q, k, v and other tensors (B, h, N, d) with this rank and number of features."""
    q = tensors[0]
    B, h, N, d = q.shape
    return (
        q.dtype in TYPES
        and q.is_cuda
        and launch.available()
        and rank <= RANK
        and features <= MAX_FEATURES
        and d <= MAX_CHANNELS
        and d % 8 == 0
        and N <= MAX_TOKENS
        and B * h * N < 1 << 31
        and all(t.data_ptr() % 16 == 0 and all(s % 8 == 0 for s in t.stride()[:3]) for t in tensors)
        and grids(B, h, N, d, features, q.get_device()) is not None
    )


def _matrix(t: Tensor) -> tuple[int, int, int, int]:
    return t.data_ptr(), *t.stride()[:3]


def _exact(scale: float, dtype: torch.dtype) -> str:
    """Template argument: whether q can be multiplied by the scale without rounding, which is then a power of two."""
    return "true" if dtype is torch.bfloat16 and math.frexp(scale)[0] == 0.5 and 1e-6 < scale <= 1 else "false"


def heads_last(q: Tensor) -> Tensor:
    """An empty tensor (B, h, N, d) in the memory order (B, N, h, d)."""
    B, h, N, d = q.shape
    return q.new_empty(B, N, h, d).transpose(1, 2)


def _up(size: int, unit: int = 16) -> int:
    return math.ceil(size / unit) * unit


@lru_cache(maxsize=4096)
def _kernel(kind: str, types: str, template: tuple, shared: int, device: int) -> "launch.Kernel":
    file = "attention_forward.cu" if kind in ("pack", "forward") else "attention_backward.cu"
    arguments = f"<{', '.join(map(str, template))}>" if template else ""
    return launch.kernel(file, f"attention_{kind}_kernel{arguments}", types, shared, device)


@lru_cache(maxsize=4096)
def _template(dtype: torch.dtype, basis: str, order: int, base: str, features: int) -> tuple[str, str, str, int]:
    """The first arguments of the templates."""
    return TYPES[dtype], BASIS.get(basis) or f"Spline<{order}>", BASE[base], features


class Grid(NamedTuple):
    blocks: int
    warps: int  # of a group
    groups: int  # of a block
    row_blocks: int  # blocks of the rows of an image, one for each turn of a group
    shared: int  # bytes


def _grid(B: int, H: int, N: int, table: int, most: int, of_group: int, of_warp: int, device: int) -> Grid | None:
    """How groups of warps share B images of N rows for each of H heads; None if there is too little shared memory.

    Args:
        most: warps of a block.
        table, of_group, of_warp: bytes of shared memory for the coefficients, each group and each warp.
    """
    tiles = math.ceil(N / 16)
    warps = min(GROUP, tiles)
    of_group += warps * of_warp
    groups = min(most // warps, (launch.shared_memory(device) - table) // of_group, 15)  # there are 15 named barriers
    if groups < 1:
        return None
    blocks = max(1, launch.multiprocessors(device) // H)

    def time(row_blocks: int) -> float:  # in rounds of 16 rows for each warp, and what it takes to begin
        turns = math.ceil(B * row_blocks / (blocks * groups))
        return turns * (math.ceil(math.ceil(tiles / row_blocks) / warps) + 0.3)

    row_blocks = min(range(1, math.ceil(tiles / warps) + 1), key=time)
    return Grid(min(blocks, B * row_blocks) * H, warps, groups, row_blocks, table + groups * of_group)


@lru_cache(maxsize=4096)
def grids(B: int, H: int, N: int, d: int, F: int, device: int) -> tuple[Grid, Grid] | None:
    """The grids of the forward kernel and of the kernel for dq, None if there is too little shared memory."""
    chunk, row = _up(N), 2 * (_up(d) + 8)
    found = (
        _grid(B, H, N, 2 * chunk * ((F + 1) * RANK + 8), 20, (chunk + RANK) * row, 0, device),
        _grid(B, H, N, 2 * chunk * (F * RANK + 8), 16, chunk * row, 16 * (row + 2 * (RANK + 8)), device),
    )
    return None if None in found else found


def forward(q, k, v, coefficients, projector, scale, basis, order, low, step, base):
    """out, z, W^T V and the packed coefficients, from arguments of kan::attention that `takes` accepts."""
    (B, H, N, d), (F, r), device = q.shape, coefficients.shape[1::2], q.get_device()
    template, padded = _template(q.dtype, basis, order, base, F), _up(N, ROWS)
    coefficients, projector = coefficients.float(), projector.float()
    packed = q.new_empty(H, 2 * F + 1, padded, RANK)
    kernel = _kernel("pack", MATRIX + "q" + "Pqqq" + "Piiii", template, 0, device)
    kernel(
        math.ceil(packed.numel() / 256),
        256,
        coefficients.data_ptr(),
        *coefficients.stride(),
        projector.data_ptr(),
        *projector.stride(),
        packed.data_ptr(),
        H,
        N,
        padded,
        r,
    )
    values, z = q.new_empty(B, H, RANK, d), q.new_empty(B, H, N, RANK)
    out = heads_last(q)
    grid, _ = grids(B, H, N, d, F, device)
    types = MATRIX * 3 + "PPP" + MATRIX + SIZES + "ii"
    kernel = _kernel("forward", types, (*template, _up(d), _exact(scale, q.dtype)), grid.shared, device)
    kernel(
        grid.blocks,
        32 * grid.warps * grid.groups,
        *_matrix(q),
        *_matrix(k),
        *_matrix(v),
        packed.data_ptr(),
        values.data_ptr(),
        z.data_ptr(),
        *_matrix(out),
        *(B, H, N, d, padded, _up(N), scale, low, step),
        grid.warps,
        grid.row_blocks,
    )
    return out, z, values, packed


def backward(grad, q, k, v, z, values, packed, rank, scale, basis, order, low, step, base):
    """The gradients of q, k, v, coefficients and projector."""
    (B, H, N, d), F, D, device = q.shape, packed.shape[1] // 2, _up(q.shape[3]), q.get_device()
    template, padded, chunk = _template(q.dtype, basis, order, base, F), packed.shape[2], _up(N)
    dz, dvalues = torch.empty_like(z), torch.empty_like(values)
    shared = 2 * (chunk * (D + 8 + RANK + 8) + RANK * (D + 8))
    kernel = _kernel("backward_values", MATRIX + "PPPP" + SIZES, (template[0], D), shared, device)
    sizes, numbers = (B, H, N, d, padded), (scale, low, step)
    pointers = values.data_ptr(), z.data_ptr(), dz.data_ptr(), dvalues.data_ptr()
    kernel(B * H, 2 * D, *_matrix(grad), *pointers, *sizes, chunk, *numbers)

    dq, dk, dv = (heads_last(q) for _ in range(3))
    _, grid = grids(B, H, N, d, F, device)
    types = MATRIX * 2 + "PP" + MATRIX + SIZES + "ii"
    kernel = _kernel("backward_query", types, (*template, D, _exact(scale, q.dtype)), grid.shared, device)
    kernel(
        grid.blocks,
        32 * grid.warps * grid.groups,
        *_matrix(q),
        *_matrix(k),
        packed.data_ptr(),
        dz.data_ptr(),
        *_matrix(dq),
        *(*sizes, chunk, *numbers),
        grid.warps,
        grid.row_blocks,
    )
    blocks = math.ceil(math.ceil(N / 16) / KEY_WARPS)
    warps, chunk = math.ceil(math.ceil(N / 16) / blocks), min(KEY_CHUNK, chunk)
    shared = 2 * 2 * (chunk * (D + 8 + RANK + 8) + (32 * warps + RANK) * (D + 8)) + 4 * 8 * 32 * warps
    resident = 8 // KEY_WARPS * launch.multiprocessors(device)
    images = math.ceil(B / max(1, min(B, resident // (blocks * H))))
    parts = math.ceil(B / images)
    sums = torch.empty(parts, H, F + 1, padded, RANK, dtype=torch.float32, device=q.device)
    types = MATRIX * 3 + "PPP" + MATRIX * 2 + "P" + SIZES + "i"
    kernel = _kernel("backward_key", types, (*template, D, KEY_WARPS), shared, device)
    kernel(
        parts * H * blocks,
        32 * warps,
        *_matrix(q),
        *_matrix(k),
        *_matrix(v),
        packed.data_ptr(),
        dz.data_ptr(),
        dvalues.data_ptr(),
        *_matrix(dk),
        *_matrix(dv),
        sums.data_ptr(),
        *(*sizes, chunk, *numbers),
        images,
    )
    da, dw = sums.new_empty(H, F, N, rank), sums.new_empty(H, N, rank)
    count = H * (F + 1) * N * rank
    kernel = _kernel("finish", "PPPiiiiii", (), 0, device)
    pointers = sums.data_ptr(), da.data_ptr(), dw.data_ptr()
    kernel(math.ceil(count / 256), 256, *pointers, parts, H, F, N, padded, rank)
    return dq, dk, dv, da, dw
