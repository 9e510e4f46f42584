"""Rational functions with one set of coefficients per function: the rational basis of KArAt.

    phi(x; theta) = (a_0 + a_1 x + ... + a_m x^m) / Q(x),   theta = [a_0..a_m, b_1..b_n]
    version B: Q(x) = 1 + |b_1 x + ... + b_n x^n|           (KArAt)
    version A: Q(x) = 1 + |b_1| |x| + ... + |b_n| |x|^n     (KAT; kan_basis.rational has it for groups of channels, with kernels)

Q >= 1, so there are no poles.
Source: Molina et al. 2020 (arXiv:1907.06732), versions A and B; Maity et al. 2025 (KArAt, arXiv:2503.10632).
"""

import math
from functools import cache

import torch
from torch import Tensor

from kan_basis.basis import Basis, check_init, mean_square, register

VERSIONS = ("A", "B")


@register("rational")
class RationalBasis(Basis):
    """Rational function P(x) / Q(x), P = m + 1 + n coefficients; not linear in them.

    |t| has the derivative +1 at t = 0, in x and in b, as in kan_basis.rational: a denominator that starts at 0 trains.

    Args:
        degrees: (m, n) of numerator and denominator.
        version: "B" or "A", the denominator above.
    Raises: ValueError for impossible degrees or an unknown version.
    """

    def __init__(self, degrees: tuple[int, int] = (5, 4), version: str = "B") -> None:
        if len(degrees) != 2 or degrees[0] < 0 or degrees[1] < 1:
            raise ValueError(f"degrees must be (m >= 0, n >= 1), not {tuple(degrees)}")
        if version not in VERSIONS:
            raise ValueError(f"unknown version '{version}'; there are: {', '.join(VERSIONS)}")
        self.degrees, self.version, self.num_coefficients = tuple(degrees), version, sum(degrees) + 1

    def __call__(self, x: Tensor, theta: Tensor) -> Tensor:
        """Raises: ValueError if theta does not end in P coefficients."""
        self.check(theta)
        dtype = torch.promote_types(x.dtype, theta.dtype)
        x, theta = (t.to(torch.promote_types(dtype, torch.float32)) for t in (x, theta))
        a, b = theta.tensor_split([self.degrees[0] + 1], -1)
        return (_polynomial(a, x) / denominator(x, b, self.version)).to(dtype)

    @torch.no_grad()
    def reset_(self, theta: Tensor, init: str = "published", fan_in: int = 1) -> Tensor:
        """All coefficients N(0, 1) (published), or each divided by the root mean square of its power of x (scaled).

        scaled: b_j ~ N(0, 1 / E[x^2j]) and a_i ~ N(0, 1 / (fan_in M E[x^2i])), E[x^2i] = (2i - 1)!!, so that no power dominates and the denominator is
        at work; M = E[sum_i x^2i / E[x^2i] / Q(x)^2] makes the variance 1. It is finite because Q >= 1.
        Raises: ValueError for an unknown init or fan_in < 1.
        """
        check_init(init, fan_in)
        theta.normal_()
        if init == "scaled":
            m, n = self.degrees
            numerator = 1 / math.sqrt(fan_in * _second_moment(m, n, self.version))
            for i in range(m + 1):
                theta[..., i] *= numerator * _unit_scale(i)
            for j in range(1, n + 1):
                theta[..., m + j] *= _unit_scale(j)
        return theta


def denominator(x: Tensor, b: Tensor, version: str) -> Tensor:
    """Q(x) of the version: x (...), b (..., n) = b_1..b_n, broadcast against each other without n."""
    if version == "A":
        x, b = _abs(x), _abs(b)
    y = x * _polynomial(b, x)
    return 1 + (y if version == "A" else _abs(y))


def _abs(t: Tensor) -> Tensor:
    return torch.where(t < 0, -t, t)


def _polynomial(c: Tensor, x: Tensor) -> Tensor:
    """c_0 + c_1 x + ...: c (..., K), x (...)."""
    *rest, y = c.unbind(-1)
    for coefficient in reversed(rest):
        y = torch.addcmul(coefficient, y, x)
    return y


def _unit_scale(power: int) -> float:
    """1 / sqrt(E[x^(2 power)]) for x ~ N(0, 1)."""
    return 1 / math.sqrt(math.prod(range(1, 2 * power, 2)))


@cache
def _second_moment(m: int, n: int, version: str, draws: int = 4096) -> float:
    """M above: over x by quadrature, over b by a mean of fixed draws."""
    scale = torch.tensor([_unit_scale(j) for j in range(1, n + 1)], dtype=torch.float64, device="cpu")
    b = scale * torch.randn(
        draws, n, dtype=torch.float64, device="cpu", generator=torch.Generator("cpu").manual_seed(0)
    )

    def f(x: Tensor) -> Tensor:
        x = x.unsqueeze(-1)
        numerator = sum((x**i * _unit_scale(i)) ** 2 for i in range(m + 1))
        return numerator.sqrt() / denominator(x, b, version)

    return mean_square(f, points=401)
