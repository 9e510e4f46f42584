"""Launches of the kernels of kan::attention and kan::attention_backward, in Triton and, by attention_mma.py, in CUDA.

Triton is imported at the first launch. The operators are registered in attention_operator.py. The definition and the
checks of arguments are in kan_basis/attention.py.
"""

import importlib
import math
from functools import cache

import torch
from torch import Tensor

from . import attention_mma, launch
from .attention_mma import ROWS, heads_last

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BASES = ("fourier", "chebyshev", "radial", "spline")
BASE_FUNCTIONS = ("", "identity", "relu", "silu", "gelu")
MAX_FEATURES = 64
# Accumulators of coefficient gradients that a program keeps in registers, in tiles of a thread block.
MAX_SUMS = 8
MAX_PARTIALS = 256 << 20  # bytes of the coefficient gradients of parts of the batch


@cache
def _kernels():
    return importlib.import_module(f"{__package__}.attention_kernels")


def refusal(shape: tuple[int, ...], dtype: torch.dtype, rank: int, features: int, basis: str, order: int, base: str):
    """Why the kernels do not take q, k and v of this shape (B, h, N, d), "" if they do."""
    if reason := launch.no_triton():
        return reason
    if dtype not in DTYPES:
        return "they take float32, float16 and bfloat16, not float64"
    if basis not in BASES:
        return f"they do not know the basis {basis}"
    if basis == "spline" and not 1 <= order <= 5:
        return f"they take splines of order 1 to 5, not {order}"
    if base not in BASE_FUNCTIONS:
        return f"they do not know the base function {base}"
    if not 1 <= shape[-1] <= 128:
        return f"they take heads of up to 128 channels, not {shape[-1]}"
    if rank > 64:
        return f"they take a rank of up to 64, not {rank}"
    if features > MAX_FEATURES:
        return f"they take up to {MAX_FEATURES} features, not {features}"
    return ""


def _block(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


class Shapes:
    """Sizes and the constant arguments of the kernels."""

    def __init__(self, q: Tensor, rank: int, features: int, basis: str, order: int, base: str):
        self.B, self.H, self.N, self.D = q.shape
        self.R, self.F = _block(rank), features
        self.rank, self.padded = rank, math.ceil(self.N / ROWS) * ROWS
        P = features - (base != "")
        self.function = dict(P=P, F=features, ORDER=order, BASIS=basis, BASE=base, FAST=_fast(q))
        # Products and sums are fused, whatever the default of this version of Triton.
        self.sizes = dict(D=self.D, R=self.R, BLOCK_D=_block(self.D), enable_fp_fusion=True)


def _fast(q: Tensor) -> bool:
    return q.dtype is not torch.float32 and q.is_cuda


def _strided(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def _strides(*tensors: Tensor) -> list[int]:
    """Of images, heads and rows of each tensor (B, h, N, d)."""
    return [stride for t in tensors for stride in t.stride()[:3]]


# From the fastest configuration, measured on an H200, to the one that needs the least shared memory.
FORWARD = [dict(BLOCK_M=64, BLOCK_N=32, num_warps=4, num_stages=stages) for stages in (3, 2, 1)]
BACKWARD_QUERY = [dict(BLOCK_M=64, BLOCK_N=32, num_warps=4, num_stages=stages) for stages in (2, 1)]
BACKWARD_KEY = [
    dict(BLOCK_M=m, BLOCK_N=n, num_warps=4, num_stages=stages)
    for m, n, stages in ((32, 64, 2), (32, 32, 1), (16, 16, 1))
]


def _shared(config: dict[str, int], D: int, R: int, F: int, size: int) -> float:
    """Bytes of shared memory that a kernel needs at most, with elements of `size` bytes; 10 % more than was seen."""
    m, n, stages = config["BLOCK_M"], config["BLOCK_N"], config["num_stages"]
    elements = stages * n * (D + F * R) + m * D
    if config in BACKWARD_KEY:
        elements = n * R * (F + 1) + stages * m * (D + R) + n * D
    return 1.1 * size * elements


def _fitting(configs: list[dict[str, int]], q: Tensor, s: Shapes) -> dict[str, int]:
    """The first configuration whose tiles fit in shared memory, otherwise the last one."""
    limit = launch.shared_memory(q.get_device() if q.is_cuda else None)
    D, size = s.sizes["BLOCK_D"], q.element_size()
    return next((c for c in configs if _shared(c, D, s.R, s.F, size) <= limit), configs[-1])


def too_large(d: int, rank: int, features: int, size: int, device: int | None) -> str:
    """Why no configuration fits in the shared memory of a GPU, "" if one does."""
    needed = _shared(BACKWARD_KEY[-1], _block(d), _block(rank), features, size)
    if needed <= launch.shared_memory(device):
        return ""
    return f"{features} features of rank {rank} need {needed / 1024:.0f} KiB of shared memory"


def forward(q, k, v, coefficients, projector, scale, basis, order, low, step, base):
    """out, z, W^T V and the packed coefficients, from arguments of kan::attention."""
    q, k, v = map(_strided, (q, k, v))
    function = scale, basis, order, low, step, base
    if attention_mma.takes(q, k, v, rank=projector.shape[-1], features=coefficients.shape[1]):
        return attention_mma.forward(q, k, v, coefficients, projector, *function)
    kernels = _kernels()
    s = Shapes(q, projector.shape[-1], coefficients.shape[1], basis, order, base)
    packed = q.new_empty(s.H, 2 * s.F + 1, s.padded, s.R)
    kernels.pack_kernel[(s.padded // ROWS, 2 * s.F + 1, s.H)](
        coefficients,
        projector,
        packed,
        *coefficients.stride(),
        *projector.stride(),
        s.N,
        s.padded,
        s.rank,
        P=s.function["P"],
        F=s.F,
        BASIS=basis,
        R=s.R,
        BLOCK=ROWS,
        num_warps=2,
    )
    values, z = q.new_empty(s.B, s.H, s.R, s.D), q.new_empty(s.B, s.H, s.N, s.R)
    out = heads_last(q)
    kernels.project_kernel[(s.B * s.H,)](
        v, packed, values, *_strides(v), s.N, s.padded, s.H, F=s.F, **s.sizes, BLOCK=ROWS, num_warps=4
    )
    config = _fitting(FORWARD, q, s)
    kernels.forward_kernel[(math.ceil(s.N / config["BLOCK_M"]) * s.B * s.H,)](
        q,
        k,
        packed,
        values,
        z,
        out,
        *_strides(q, k, out),
        s.N,
        s.padded,
        s.H,
        scale,
        low,
        step,
        **s.function,
        **s.sizes,
        **config,
    )
    return out, z, values, packed


def backward(grad, q, k, v, z, values, packed, rank, scale, basis, order, low, step, base):
    """The gradients of q, k, v, coefficients and projector, from arguments of kan::attention_backward."""
    grad, q, k, v = map(_strided, (grad.to(q.dtype), q, k, v))
    function = scale, basis, order, low, step, base
    if attention_mma.takes(q, k, v, grad, rank=rank, features=packed.shape[1] // 2):
        return attention_mma.backward(grad, q, k, v, z, values, packed, rank, *function)
    kernels = _kernels()
    s = Shapes(q, rank, packed.shape[1] // 2, basis, order, base)
    dz = torch.empty_like(z)
    dq, dk, dv = (heads_last(q) for _ in range(3))
    config = _fitting(BACKWARD_QUERY, q, s)
    blocks = math.ceil(s.N / config["BLOCK_M"])
    parts = q.new_empty(s.B, s.H, blocks, s.R, s.D, dtype=torch.float32)
    kernels.backward_query_kernel[(blocks * s.B * s.H,)](
        grad,
        q,
        k,
        packed,
        values,
        z,
        dz,
        parts,
        dq,
        *_strides(grad, q, k, dq),
        s.N,
        s.padded,
        s.H,
        scale,
        low,
        step,
        **s.function,
        **s.sizes,
        **config,
    )
    config = _fitting(BACKWARD_KEY, q, s)
    # Parts of the batch: 12 blocks for each multiprocessor, unless their sums take more memory than MAX_PARTIALS.
    most = max(1, MAX_PARTIALS // (4 * s.H * (s.F + 1) * s.padded * s.R))
    wanted = math.ceil(12 * launch.multiprocessors(q.get_device()) / (math.ceil(s.N / config["BLOCK_N"]) * s.H))
    images = math.ceil(s.B / min(s.B, most, wanted))
    number = math.ceil(s.B / images)
    sums = q.new_empty(number, s.H, s.F + 1, s.padded, s.R, dtype=torch.float32)
    for first in range(0, s.F, MAX_SUMS):
        kernels.backward_key_kernel[(math.ceil(s.N / config["BLOCK_N"]), s.H, number)](
            q,
            k,
            v,
            packed,
            dz,
            parts,
            dk,
            dv,
            sums,
            *_strides(q, k, v, dk),
            s.B,
            s.N,
            s.padded,
            s.H,
            images,
            blocks,
            scale,
            low,
            step,
            **s.function,
            **s.sizes,
            FIRST=first,
            COUNT=min(MAX_SUMS, s.F - first),
            **config,
        )
    sums = sums[..., : s.N, :rank]
    return dq, dk, dv, sums[:, :, : s.F].sum(0), sums[:, :, s.F].sum(0)
