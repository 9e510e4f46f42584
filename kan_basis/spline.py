"""B-splines on a uniform grid.

    phi(x; theta) = sum_i theta_i B_i(x),   i = 1..G + k

[lo, hi] has G cells, and there are k more cells on either side. B_i is the bump of order k (degree k: 3 is cubic) over
k + 1 neighbouring cells. The B_i sum to 1 on the closed interval [lo, hi], and all of them are 0 outside the extended
grid [lo - k h, hi + k h], h = (hi - lo) / G.
Source: Cox-de Boor recursion; extended uniform grid, fit and grid update as in efficient-kan, the form that KArAt
(arXiv:2503.10632) uses.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kan_basis.basis import Basis, at_least_float32, option, register

REFIT_POINTS = 32  # per cell


@register("spline")
@dataclass(frozen=True)
class SplineBasis(Basis):
    """B-splines of order k on G uniform cells, P = G + k; their first k - 1 derivatives are continuous.

    Raises: ValueError if the range is not finite and increasing.
    """

    grid: int = option(3, "cells G of the grid", minimum=1)
    order: int = option(3, "degree k of the pieces", minimum=0)
    grid_range: tuple[float, float] = option(
        (-1.0, 1.0),
        "ends of the grid, in units of the input",
        metavar=("LO", "HI"),
        increasing=True,
        mlp_default=(-3.0, 3.0),
    )
    linear = True

    @property
    def num_coefficients(self) -> int:
        return self.grid + self.order

    @property
    def flops(self) -> int:
        # k steps of the recursion at 2 for each of their pieces, and G + k products
        return (2 * self.order + 1) * self.grid + 3 * self.order**2

    @property
    def formula(self) -> str:
        lo, hi = self.grid_range
        return f"sum over i = 1..{self.num_coefficients} of theta_i B_i(x), order {self.order} on [{lo:g}, {hi:g}]"

    @property
    def kernel(self) -> tuple[str, int, float, float]:
        lo, hi = self.grid_range
        return "spline", self.order, lo, self.grid / (hi - lo)

    @property
    def working_set(self) -> int:
        # Autograd keeps what every step of the recursion multiplies.
        return 3 * (self.grid + 2 * self.order)

    def features(self, x: Tensor, dim: int = -1) -> Tensor:
        """B_1(x) .. B_P(x): (...) -> (..., G + k), float32 at least.

        In units of cells the knots are the integers 0..G + 2k, exact in every dtype. Cells are half-open, the last one
        is closed.
        """
        x = at_least_float32(x).unsqueeze(dim)
        lo, hi = (x.new_full((), end) for end in self.grid_range)
        u = (x - lo) / (hi - lo) * self.grid + self.order  # hi is G + k without rounding
        cells = self.grid + 2 * self.order
        knot = torch.arange(cells, device=x.device, dtype=x.dtype).view(-1, *[1] * (-1 - dim))
        cell = torch.where(u == cells, cells - 1, u.floor())
        b = (cell == knot).to(x.dtype)  # (..., cells)
        for p in range(1, self.order + 1):
            left = u - knot[: cells - p]
            b = (left * b.narrow(dim, 0, cells - p) + (p + 1 - left) * b.narrow(dim, 1, cells - p)) / p
        return b

    @torch.no_grad()
    def fit(self, x: Tensor, y: Tensor) -> Tensor:
        """Least-squares coefficients of sampled curves; the smallest ones if the samples do not determine them.

        Args: x, (S,) for all curves or (..., S); y, (..., S).
        Returns: theta (..., P), dtype and device of y; solved in float64 on the CPU.
        Raises: ValueError if the shapes do not fit together or there are no samples.
        """
        if x.ndim == 0 or x.numel() == 0 or x.shape not in (y.shape, y.shape[-1:]):
            raise ValueError(
                f"fit needs x (S,) and y (..., S), or both of the same shape, not {tuple(x.shape)} and {tuple(y.shape)}"
            )
        a, b = self.features(x.double().cpu()), y.double().cpu()
        if x.ndim == 1:  # one factorisation for all curves
            b = b.reshape(-1, len(x)).T
        else:
            b = b.unsqueeze(-1)
        theta = torch.linalg.lstsq(a, b, driver="gelsd").solution
        return theta.mT.reshape(*y.shape[:-1], self.num_coefficients).to(y)

    @torch.no_grad()
    def update_grid(self, x: Tensor, margin: float = 0.01, quantile: float = 0.0) -> "SplineBasis":
        """A basis with the same G and k, whose range covers the samples x (any shape).

        Args:
            margin: what is added at each end, as a share of the range; a range of one point gets the old width.
            quantile: share of the samples to leave out at each end, in [0, 0.5).
        Raises: ValueError for no samples or any that is not finite, a negative margin, or a quantile outside [0, 0.5).
        """
        if x.numel() == 0 or not x.isfinite().all():
            raise ValueError("update_grid needs at least one sample, and finite ones only")
        if not (0 <= quantile < 0.5 and 0 <= margin < math.inf):
            raise ValueError(f"update_grid needs 0 <= quantile < 0.5 and margin >= 0, not {quantile} and {margin}")
        x = x.flatten().double().sort().values
        skip = int(quantile * (len(x) - 1))
        lo, hi = x[skip].item(), x[-1 - skip].item()
        extra = margin * (hi - lo) if hi > lo else (self.grid_range[1] - self.grid_range[0]) / 2
        return SplineBasis(self.grid, self.order, (lo - extra, hi + extra))

    @torch.no_grad()
    def refit(self, theta: Tensor, new_basis: "SplineBasis") -> Tensor:
        """Coefficients of the same functions on the grid of `new_basis`, by least squares.

        The result is exact if the new knots contain the old ones. The functions are compared on the whole new range,
        also beyond their old extended grid, where they are 0.

        Args: theta, (..., P).
        Returns: (..., P of new_basis), dtype and device of theta.
        """
        (lo, hi), (old_lo, old_hi) = new_basis.grid_range, self.grid_range
        cells = max(new_basis.grid, math.ceil((hi - lo) / (old_hi - old_lo) * self.grid))
        x = torch.linspace(lo, hi, REFIT_POINTS * cells + 1, dtype=torch.float64, device=theta.device)
        return new_basis.fit(x, self(x, theta.double().unsqueeze(-2))).to(theta.dtype)
