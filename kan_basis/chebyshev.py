"""Chebyshev polynomials of the squashed input.

    phi(x; theta) = theta_0 T_0(t) + ... + theta_k T_k(t),   t = tanh x,   T_n(t) = cos(n arccos t)

Source: ChebyKAN, Sidharth et al. 2024 (arXiv:2405.07200), whose code squashes with tanh.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kan_basis.basis import Basis, at_least_float32, option, register


@register("chebyshev")
@dataclass(frozen=True)
class ChebyshevBasis(Basis):
    """Chebyshev polynomials of the first kind up to order k, in tanh x; P = k + 1."""

    order: int = option(3, "highest degree k of the polynomials", minimum=1)
    linear = True

    @property
    def num_coefficients(self) -> int:
        return self.order + 1

    @property
    def flops(self) -> int:
        return 3 * self.order  # k - 1 steps of the recursion at 2, k products and one doubling

    @property
    def formula(self) -> str:
        return f"sum over n = 0..{self.order} of theta_n T_n(tanh x)"

    @property
    def kernel(self) -> tuple[str, int, float, float]:
        return "chebyshev", 0, 0.0, 1.0

    def features(self, x: Tensor, dim: int = -1) -> Tensor:
        """T_0(tanh x) .. T_k(tanh x) by T_(n+1) = 2 t T_n - T_(n-1): (...) -> (..., k + 1), float32 at least."""
        t = at_least_float32(x).tanh()
        values = [torch.ones_like(t), t]
        for _ in range(1, self.order):
            values.append(2 * t * values[-1] - values[-2])
        return torch.stack(values, dim)

    def published_std(self, fan_in: int) -> float:
        """1 / (fan_in P), as in ChebyKAN's code."""
        return 1 / (fan_in * self.num_coefficients)
