"""Truncated Fourier series, the default basis of KArAt.

    phi(x; theta) = a_1 cos x + ... + a_G cos(G x) + b_1 sin x + ... + b_G sin(G x),   theta = [a_1..a_G, b_1..b_G]

Source: Maity et al. 2025 (KArAt, arXiv:2503.10632).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kan_basis.basis import Basis, at_least_float32, option, register


@register("fourier")
@dataclass(frozen=True)
class FourierBasis(Basis):
    """Fourier series without a constant term, of period 2 pi; P = 2 G.

    The published initialisation draws all coefficients from N(0, 1), the scaled one from N(0, 1 / (G fan_in)).
    """

    grid: int = option(3, "frequencies G", minimum=1)
    linear = True

    @property
    def num_coefficients(self) -> int:
        return 2 * self.grid

    @property
    def flops(self) -> int:
        return 3 * self.grid  # G angles and 2 G products

    @property
    def formula(self) -> str:
        return f"sum over m = 1..{self.grid} of a_m cos(m x) + b_m sin(m x)"

    @property
    def kernel(self) -> tuple[str, int, float, float]:
        return "fourier", 0, 0.0, 1.0

    def features(self, x: Tensor, dim: int = -1) -> Tensor:
        """cos x .. cos(G x), sin x .. sin(G x): (...) -> (..., 2 G), float32 at least.

        Angle addition from cos x and sin x has an error of about m units in the last place. cos(m * x) would first
        round m x, which costs 1e-5 at x = 100 in float32.
        """
        x = at_least_float32(x)
        cos, sin = [x.cos()], [x.sin()]
        for _ in range(1, self.grid):
            c, s = cos[-1], sin[-1]
            cos.append(c * cos[0] - s * sin[0])
            sin.append(s * cos[0] + c * sin[0])
        return torch.stack(cos + sin, dim)
