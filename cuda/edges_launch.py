"""Launches of the kernels of edges_triton.py, whose configurations are here. Importing this module imports Triton."""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .edges_triton import backward_kernel, finish_kernel, forward_kernel, pack_kernel

OUTPUTS = 4
FORWARD = 256, 2  # rows of a program, warps
# Columns of a program, warps, rows in one step and registers of a thread for up to K coefficients. With fewer registers
# than it wants, the compiler spills some.
BACKWARD = {3: (32, 1, 4, 96), 10: (32, 1, 4, 168), 17: (32, 1, 1, 255)}
PROGRAMS = 8  # of the backward kernel on a multiprocessor
OPTIONS = {"enable_fp_fusion": True}  # products and sums are fused, whatever the default of the version


class Function(NamedTuple):
    """A family of functions as the kernels know it: its name, and the degrees of a rational function."""

    name: str
    m: int = 0
    n: int = 0

    @property
    def count(self) -> int:
        """P, which is K, too."""
        return self.m + 1 + self.n if self.name.startswith("rational") else 3


def backward_config(function: Function) -> tuple[int, int, int, int]:
    return next(config for count, config in BACKWARD.items() if function.count <= count)


def padded(r: int) -> int:
    return triton.cdiv(r, OUTPUTS) * OUTPUTS


def packed(theta: Tensor, function: Function) -> Tensor:
    """c (h, N, K, R) of theta (h, r, N, P), contiguous."""
    h, r, N, _ = theta.shape
    c = torch.empty(h, N, function.count, padded(r), dtype=torch.float32, device=theta.device)
    grid = (triton.cdiv(h * N * padded(r), 128),)
    pack_kernel[grid](theta, c, h, N, r, padded(r), *function, function.count, 128, **OPTIONS)
    return c


def forward(x: Tensor, c: Tensor, z: Tensor, scale: float, function: Function, config=None) -> None:
    """z (B, h, M, r) of x (B, h, N, M), both contiguous."""
    block, warps = config or FORWARD
    (B, h, N, M), r, R = x.shape, z.shape[-1], c.shape[-1]
    grid = triton.cdiv(B * M, block) * (R // OUTPUTS), h
    forward_kernel[grid](
        x, c, z, scale, B * M, M, N, h, r, R, *function, function.count, block, OUTPUTS, num_warps=warps, **OPTIONS
    )


class Split(NamedTuple):
    """How the programs of the backward kernel share the images and the M rows of each."""

    images: int  # of a program
    rows: int  # of a program in each of its images
    parts: int  # of an image


def split_rows(B: int, M: int, blocks: int, multiprocessors: int) -> Split:
    """`blocks`: programs that have the same rows."""
    target = max(1, PROGRAMS * multiprocessors // blocks)
    images = triton.cdiv(B, target)
    rows = max(triton.cdiv(M, max(1, target // triton.cdiv(B, images))), min(M, 16))
    return Split(images, rows, triton.cdiv(M, rows))


class Sums:
    """The backward pass for one theta (h, r, N, P) of one or more chunks of at most B images with M rows each."""

    def __init__(self, theta: Tensor, function: Function, B: int, M: int, multiprocessors: int, config=None) -> None:
        h, _, N, _ = theta.shape
        self.theta, self.function, self.config = theta, function, config or backward_config(function)
        self.c, self.accumulate = packed(theta, function), False
        self.split = split_rows(B, M, triton.cdiv(h * N, self.config[0]), multiprocessors)
        splits = triton.cdiv(B, self.split.images) * self.split.parts
        self.partials = torch.empty(
            splits, function.count, self.c.shape[-1], h * N, dtype=torch.float32, device=theta.device
        )

    def backward(self, g: Tensor, x: Tensor, dx: Tensor, scratch: Tensor, scale: float) -> None:
        """dx (B, h, M, N) of g (B, h, M, r) and x (B, h, M, N) of a chunk, the largest one first; all contiguous.

        `scratch` has at least as many elements, in float32. It may be dx.
        """
        block, warps, step, registers = self.config
        (B, h, M, N), r, R = x.shape, g.shape[-1], self.c.shape[-1]
        grid = triton.cdiv(h * N, block), triton.cdiv(B, self.split.images) * self.split.parts
        tensors, numbers = (g, x, self.c, scratch, dx, self.partials), (scale, B, M, h, *self.split)
        constants = N, r, R, *self.function, self.function.count, block, step, OUTPUTS, self.accumulate
        backward_kernel[grid](*tensors, *numbers, *constants, num_warps=warps, maxnreg=registers, **OPTIONS)
        self.accumulate = True

    def finish(self) -> Tensor:
        """The gradient of theta."""
        h, r, N, K = self.theta.shape
        dtheta, block, step = torch.empty_like(self.theta), 32, 32
        grid = triton.cdiv(h * N, block), r
        constants = r, self.c.shape[-1], *self.function, K, block, step
        finish_kernel[grid](self.partials, self.theta, dtheta, len(self.partials), h, N, *constants, **OPTIONS)
        return dtheta
