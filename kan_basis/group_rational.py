"""The activation of KAT and FlashKAT: learned rational functions, one per group of channels, and their presets."""

import json
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from kan_basis.basis import count_groups
from kan_basis.rational import RationalBasis, rational

PRESETS_PATH = Path(__file__).with_name("presets.json")


@cache
def presets() -> dict[str, dict]:
    """Coefficients by name, with the target, the interval and the largest error of each (presets.json)."""
    return json.loads(PRESETS_PATH.read_text())


@cache
def preset_coefficients(mode: str, degrees: tuple[int, int]) -> tuple[list[float], list[float]]:
    """a_0..a_m and b_1..b_n of a preset, filled with zeros for larger degrees and fitted again for smaller ones.

    Raises: ValueError for an unknown preset, or a published one that has larger degrees.
    """
    if mode not in presets():
        raise ValueError(f"unknown rational preset '{mode}'; there are: {', '.join(sorted(presets()))}")
    preset = presets()[mode]
    a, b = preset["numerator"], preset["denominator"]
    m, n = degrees
    if any(a[m + 1 :]) or any(b[n:]):
        if mode.startswith("published_"):
            raise ValueError(f"preset '{mode}' needs degrees of at least {len(a) - 1} {len(b)}, not {m} {n}")
        from kan_basis.fit import fit_rational  # scipy is needed only here

        a, b, _ = fit_rational(preset["target"], degrees, tuple(preset["interval"]))
    return [*a, *[0.0] * (m + 1)][: m + 1], [*b, *[0.0] * n][:n]


class GroupRational(nn.Module):
    """Learnable activation: one rational function per group of channels (`kan_basis.rational.rational`).

    Args:
        num_groups: groups of the denominator; 0 or less: one per channel.
        mode: preset that the functions start from (`presets`), such as "identity", "swish" or "gelu".
        degrees: (m, n), degrees of numerator and denominator, m >= 0 and n >= 1.
        numerator_groups: groups of the numerator; 1 as in the published KAT weights; 0 or less: one per channel.
        num_channels: number of channels C; required only for one function per channel, otherwise checked early.
        channel_dim: -1 for channels last, 1 for (B, C, H, W).
    Shape: any shape with C channels along `channel_dim` -> the same.
    Raises: ValueError for an unknown preset, impossible degrees or groups.
    """

    def __init__(
        self,
        num_groups: int = 8,
        mode: str = "swish",
        degrees: tuple[int, int] = (5, 4),
        numerator_groups: int = 1,
        num_channels: int | None = None,
        channel_dim: int = -1,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.basis = RationalBasis(degrees, "A", numerator_groups)
        self.mode, self.channel_dim = mode, channel_dim
        (m, n), dd = self.basis.degrees, dict(device=device, dtype=dtype)
        self.weight_numerator = nn.Parameter(torch.empty(count_groups(numerator_groups, num_channels), m + 1, **dd))
        self.weight_denominator = nn.Parameter(torch.empty(count_groups(num_groups, num_channels), n, **dd))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        coefficients = preset_coefficients(self.mode, self.basis.degrees)
        for weight, values in zip((self.weight_numerator, self.weight_denominator), coefficients):
            weight.copy_(torch.tensor(values, dtype=torch.float64).expand_as(weight))

    def forward(self, x: Tensor) -> Tensor:
        # A look-up in _parameters takes a third of the time of an attribute.
        parameters = self._parameters
        numerator, denominator = parameters.get("weight_numerator"), parameters.get("weight_denominator")
        if numerator is None or denominator is None:  # parametrized, or a replica
            numerator, denominator = self.weight_numerator, self.weight_denominator
        return rational(x, numerator, denominator, self.channel_dim)

    def extra_repr(self) -> str:
        return (
            f"{self.weight_denominator.shape[0]} groups, numerator groups {self.weight_numerator.shape[0]}, "
            f"degrees {self.basis.degrees}, mode '{self.mode}'"
        )
