"""Wavelets, one per function: a mother wavelet psi, moved and stretched.

    phi(x; theta) = w psi((x - tau) / s),   theta = [w, tau, s]

Source: Wav-KAN, Bozorgasl & Chen 2024 (arXiv:2405.12832), and KArAt, Maity et al. 2025 (arXiv:2503.10632). Where the
widespread Wav-KAN code differs from the papers, `<name>_wavkan` is what that code computes. There is no
`shannon_wavkan`: the window of that code runs over the position in the tensor, so that it is not a function of x.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kan_basis.basis import Basis, check_init, mean_square, option, register

MIN_SCALE = 1e-2  # the smallest |s| that is used as a divisor
FAR = 64.0  # beyond it every psi is 0, also in float64: exp(-64^2 / 2) underflows

WAVELETS: dict[str, Callable[[Tensor], Tensor]] = {}


def register_wavelet(psi: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Decorator that enters psi under the name of the function. psi acts on each element and is 0 for |u| >= FAR.

    Raises: ValueError if the name is taken.
    """
    if psi.__name__ in WAVELETS:
        raise ValueError(f"there is a wavelet '{psi.__name__}' already")
    WAVELETS[psi.__name__] = psi
    return psi


@register_wavelet
def mexican_hat(u: Tensor) -> Tensor:
    """2 / (sqrt(3) pi^(1/4)) (u^2 - 1) exp(-u^2 / 2): the second derivative of a Gaussian, negative at 0, norm 1."""
    return 2 / (math.sqrt(3) * math.pi**0.25) * (u * u - 1) * _gauss(u)


@register_wavelet
def morlet(u: Tensor) -> Tensor:
    """cos(5 u) exp(-u^2 / 2)."""
    return torch.cos(5 * u) * _gauss(u)


@register_wavelet
def dog(u: Tensor) -> Tensor:
    """-d/du exp(-u^2 / 2) = u exp(-u^2 / 2)."""
    return u * _gauss(u)


@register_wavelet
def dog_wavkan(u: Tensor) -> Tensor:
    """+d/du exp(-u^2 / 2) = -u exp(-u^2 / 2)."""
    return -u * _gauss(u)


@register_wavelet
def meyer(u: Tensor) -> Tensor:
    """sin(pi |u|) m(nu(|u|)), where m(t) = 1 up to 1/2, cos(pi/2 nu(2t - 1)) up to 1, then 0; nu is a smooth step."""
    u = u.abs()
    return torch.sin(math.pi * u) * _meyer_window(_smooth_step(u))


@register_wavelet
def meyer_wavkan(u: Tensor) -> Tensor:
    """sin(pi |u|) m(|u|), without the inner nu."""
    u = u.abs()
    return torch.sin(math.pi * u) * _meyer_window(u)


@register_wavelet
def shannon(u: Tensor) -> Tensor:
    """sin(u) / u times the symmetric Hamming window 0.54 + 0.46 cos(pi u / 8) for |u| <= 8, else 0 (see above)."""
    window = torch.where(u.abs() <= 8, 0.54 + 0.46 * torch.cos(math.pi / 8 * u), 0)
    near = u.abs() < 0.1  # sin(u) / u would lose the gradient's digits
    v = torch.where(near, 1, u)
    t = torch.where(near, u * u, 0)
    series = 1 - t / 6 * (1 - t / 20 * (1 - t / 42 * (1 - t / 72)))
    return torch.where(near, series, torch.sin(v) / v) * window


def _gauss(u: Tensor) -> Tensor:
    return torch.exp(-0.5 * u * u)


def _smooth_step(t: Tensor) -> Tensor:
    """nu(t) = t^4 (35 - 84 t + 70 t^2 - 20 t^3), 0 below 0 and 1 above 1.

    Above 1/2, where the terms would cancel, it is computed as 1 - nu(1 - t).
    """
    t = t.clamp(0, 1)
    low = t < 0.5
    r = torch.where(low, t, 1 - t)
    nu = r**4 * (35 + r * (-84 + r * (70 - 20 * r)))
    return torch.where(low, nu, 1 - nu)


def _meyer_window(t: Tensor) -> Tensor:
    return torch.where(t < 1, torch.cos(math.pi / 2 * _smooth_step(2 * t - 1)), 0)


@register("wavelet")
@dataclass(frozen=True)
class WaveletBasis(Basis):
    """One wavelet per function; P = 3: weight w, translation tau and scale s.

    A scale that training moves through 0 must not make the function explode. |s| below MIN_SCALE = 0.01 is therefore
    replaced by 0.01 with the sign of s (+ at 0), and the gradient passes as if s had that value, so that s can leave
    again. Elsewhere the formula is exact.
    """

    wavelet: str = option(
        "mexican_hat", "mother wavelet", choices=lambda: list(WAVELETS), attention_name="wavelet_type"
    )

    @property
    def num_coefficients(self) -> int:
        return 3

    @property
    def flops(self) -> int:
        return 5  # argument, square, wave, envelope and weight

    @property
    def formula(self) -> str:
        return f"w {self.wavelet}((x - tau) / s)"

    @property
    def edge_function(self) -> tuple[str, int, int]:
        return self.wavelet, 0, 0

    def scaled(self, theta: Tensor, scale: Tensor) -> Tensor:
        w, rest = theta.tensor_split([1], -1)
        return torch.cat([w * scale.unsqueeze(-1), rest], -1)

    def __call__(self, x: Tensor, theta: Tensor) -> Tensor:
        self.check(theta)
        dtype = torch.promote_types(x.dtype, theta.dtype)
        x, theta = (t.to(torch.promote_types(dtype, torch.float32)) for t in (x, theta))
        w, tau, s = theta.unbind(-1)
        safe = torch.where(s < 0, s.clamp(max=-MIN_SCALE), s.clamp(min=MIN_SCALE))
        u = (x - tau) / (s + (safe - s).detach())
        # Without the clamp u^2 may overflow, and inf * 0 is not a number.
        return (w * WAVELETS[self.wavelet](u.clamp(-FAR, FAR))).to(dtype)

    @torch.no_grad()
    def reset_(self, theta: Tensor, init: str = "published", fan_in: int = 1) -> Tensor:
        """tau = 0, s = 1 and w ~ N(0, 1) (published) or N(0, 1 / (fan_in E[psi(x)^2])) (scaled)."""
        check_init(init, fan_in)
        energy = 1.0 if init == "published" else fan_in * mean_square(WAVELETS[self.wavelet])
        self.zero_(theta)[..., 0].normal_(std=1 / math.sqrt(energy))
        return theta

    @torch.no_grad()
    def zero_(self, theta: Tensor) -> Tensor:
        """w = tau = 0 and s = 1."""
        theta.zero_()[..., 2] = 1
        return theta
