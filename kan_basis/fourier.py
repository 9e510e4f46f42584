"""Truncated Fourier series: the default basis of KArAt.

    phi(x; theta) = a_1 cos x + ... + a_G cos(G x) + b_1 sin x + ... + b_G sin(G x),   theta = [a_1..a_G, b_1..b_G]

Source: Maity et al. 2025 (KArAt, arXiv:2503.10632).
"""

import math

import torch
from torch import Tensor

from kan_basis.basis import Basis, check_init, check_positive, register


@register("fourier")
class FourierBasis(Basis):
    """Fourier series without a constant, period 2 pi, linear in its P = 2 G coefficients.

    Args:
        grid: G, number of frequencies.
    Raises: ValueError if grid < 1.
    """

    linear = True

    def __init__(self, grid: int = 3) -> None:
        check_positive(grid=grid)
        self.grid, self.num_coefficients = grid, 2 * grid

    def features(self, x: Tensor, dim: int = -1) -> Tensor:
        """cos x .. cos(G x), sin x .. sin(G x): (...) -> (..., 2 G), float32 at least.

        By angle addition from cos x and sin x, an error of about m units in the last place; cos(m * x) would first round m x, off by 1e-5 at x = 100
        in float32.
        """
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        cos, sin = [x.cos()], [x.sin()]
        for _ in range(1, self.grid):
            c, s = cos[-1], sin[-1]
            cos.append(c * cos[0] - s * sin[0])
            sin.append(s * cos[0] + c * sin[0])
        return torch.stack(cos + sin, dim)

    @torch.no_grad()
    def reset_(self, theta: Tensor, init: str = "published", fan_in: int = 1) -> Tensor:
        """All coefficients N(0, 1) (published), or N(0, 1 / (G fan_in)) (scaled), because cos^2 + sin^2 = 1 for each frequency.

        Raises: ValueError for an unknown init or fan_in < 1.
        """
        check_init(init, fan_in)
        return theta.normal_(std=1.0 if init == "published" else 1 / math.sqrt(self.grid * fan_in))
