"""Gaussian radial basis functions on a uniform grid of centres.

    phi(x; theta) = sum_i theta_i exp(-((x - c_i) / h)^2),   c_i uniform on [lo, hi], h the distance of two centres

Source: FastKAN, Li 2024 (arXiv:2405.06721).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kan_basis.basis import Basis, at_least_float32, option, register


@register("radial")
@dataclass(frozen=True)
class RadialBasis(Basis):
    """G Gaussians, linear in their P = G coefficients. Raises: ValueError if the range is not finite and increasing."""

    grid: int = option(8, "Gaussians G", minimum=2)
    grid_range: tuple[float, float] = option(
        (-2.0, 2.0), "first and last centre, in units of the input", metavar=("LO", "HI"), increasing=True
    )
    linear = True

    @property
    def num_coefficients(self) -> int:
        return self.grid

    @property
    def flops(self) -> int:
        return 4 * self.grid  # a difference, a quotient, a square and a product for each Gaussian

    @property
    def formula(self) -> str:
        lo, hi = self.grid_range
        return f"sum over i = 1..{self.grid} of theta_i exp(-((x - c_i) / h)^2), c_i on [{lo:g}, {hi:g}]"

    @property
    def kernel(self) -> tuple[str, int, float, float]:
        lo, hi = self.grid_range
        return "radial", 0, lo, (self.grid - 1) / (hi - lo)

    def features(self, x: Tensor, dim: int = -1) -> Tensor:
        """exp(-((x - c_i) / h)^2) for every centre: (...) -> (..., G), float32 at least."""
        x = at_least_float32(x).unsqueeze(dim)
        lo, hi = self.grid_range
        index = torch.arange(self.grid, device=x.device, dtype=x.dtype).view(-1, *[1] * (-1 - dim))
        # In units of h the centres are the integers 0..G - 1. Beyond 64 the exponential is 0, but u^2 may overflow.
        u = ((x - lo) * ((self.grid - 1) / (hi - lo)) - index).clamp(-64, 64)
        return torch.exp(-u * u)

    def published_std(self, fan_in: int) -> float:
        """The deviation of FastKAN's code."""
        return 0.1
