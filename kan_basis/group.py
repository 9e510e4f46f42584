"""Any basis as the activation of a network, with one learned function for each group of channels.

    phi(x; theta_g) = target(x) + basis(x; theta_g)

theta is (groups, P), and the groups of channels are contiguous, as in kan_basis.rational. The target is fixed, like the
base function of a KAN, and theta starts where the basis is 0. The network therefore starts as the one with ordinary
activations, whose initialisation is known and whose weights can be loaded. It also stays sound where a basis alone
would not: a spline is 0 beyond its grid, and a Fourier series sees x only up to its period.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kan_basis.basis import Basis, count_groups
from kan_basis.layer import in_chunks, rows_of_chunk
from kan_basis.rational import FLOAT_DTYPES

MAX_TERMS = 1 << 22  # elements of x times P in one chunk, the size of the largest temporary

TARGETS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "swish": F.silu,
    "mish": F.mish,
    "gelu": F.gelu,
}


def group_basis(x: Tensor, theta: Tensor, basis: Basis, target: str = "identity", channel_dim: int = -1) -> Tensor:
    """target(x) + basis(x; theta_g), where g is the group of the channel.

    Only x and theta are kept for the backward pass, which computes the terms of the basis again, in chunks.

    Args:
        x: any shape with C channels along `channel_dim`, any strides, float32 / float16 / bfloat16 / float64.
        theta: (groups, P), groups divides C.
        target: one of TARGETS.
        channel_dim: -1 for channels last, 1 for (B, C, H, W).
    Returns: shape and dtype of x, computed in float32 (float64 for float64). Under autocast x is first cast to the
        autocast dtype, as torch.nn.functional.linear does.
    Raises: TypeError if a tensor is not floating point; ValueError for an unknown target, or shapes that do not fit.
    """
    _check(x, theta, basis, channel_dim)
    _check_target(basis, target)
    if x.dtype is not torch.float64 and x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    dtype, dim = torch.promote_types(x.dtype, torch.float32), channel_dim % x.ndim

    def phi(rows: Tensor) -> Tensor:
        u = rows.to(dtype)
        return (TARGETS[target](u) + basis(u, theta.to(dtype)[:, None])).to(rows.dtype)

    groups, inner = theta.shape[0], math.prod(x.shape[dim + 1 :])
    rows = x.reshape(math.prod(x.shape[:dim]), groups, x.shape[dim] // groups * inner)
    size = rows_of_chunk(rows.shape[1:].numel() * basis.num_coefficients, MAX_TERMS)
    return in_chunks(phi, rows, size=size, dim=0).reshape(x.shape)


def _check(x: Tensor, theta: Tensor, basis: Basis, channel_dim: int) -> None:
    for name, t in (("x", x), ("theta", theta)):
        if t.dtype not in FLOAT_DTYPES:
            raise TypeError(f"group_basis: {name} must be float32, float16, bfloat16 or float64, not {t.dtype}")
    if not -x.ndim <= channel_dim < x.ndim:
        raise ValueError(f"group_basis: channel_dim {channel_dim} does not exist in x of shape {tuple(x.shape)}")
    P = basis.num_coefficients
    if theta.ndim != 2 or theta.shape[0] < 1 or theta.shape[1] != P:
        raise ValueError(f"group_basis: theta must have shape (groups, {P}), not {tuple(theta.shape)}")
    if x.shape[channel_dim] % theta.shape[0]:
        raise ValueError(
            f"group_basis: the {x.shape[channel_dim]} channels of x {tuple(x.shape)} (dimension {channel_dim}) "
            f"do not divide into {theta.shape[0]} groups"
        )


def _check_target(basis: Basis, target: str) -> None:
    if target not in TARGETS:
        raise ValueError(f"unknown target '{target}' of the {basis.name} basis; there are: {', '.join(TARGETS)}")


class GroupBasis(nn.Module):
    """Learnable activation with one function of a basis per group of channels; it starts exactly as its target.

    Args:
        basis: the family of functions, with P coefficients each.
        num_groups: number of functions; 0 or less: one per channel.
        target: the fixed part, one of TARGETS.
        num_channels: C; needed for one function per channel, otherwise checked early.
        channel_dim: -1 for channels last, 1 for (B, C, H, W).
    Parameters: weight_coefficients (groups, P).
    Shape: any shape with C channels along `channel_dim` -> the same.
    Raises: ValueError for an unknown target or impossible groups.
    """

    def __init__(
        self,
        basis: Basis,
        num_groups: int = 8,
        target: str = "identity",
        num_channels: int | None = None,
        channel_dim: int = -1,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        _check_target(basis, target)
        self.basis, self.target, self.channel_dim = basis, target, channel_dim
        shape = count_groups(num_groups, num_channels), basis.num_coefficients
        self.weight_coefficients = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.basis.zero_(self.weight_coefficients)

    def forward(self, x: Tensor) -> Tensor:
        return group_basis(x, self.weight_coefficients, self.basis, self.target, self.channel_dim)

    def extra_repr(self) -> str:
        return f"{self.weight_coefficients.shape[0]} groups, {self.basis!r}, target '{self.target}'"
