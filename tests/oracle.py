"""The published formulation of the group-rational functions: a loop over groups that stacks the powers of x.

A second, independent formulation for the tests, differentiated by autograd and slow on purpose. Unlike the published
one it has sign(0) = +1, for x and for b.
"""

import torch
from torch import Tensor


def _abs(t: Tensor) -> Tensor:
    return torch.where(t < 0, -t, t)  # derivative +1 at 0, where that of torch.abs is 0


def rational_oracle(x: Tensor, numerator: Tensor, denominator: Tensor) -> Tensor:
    """x (..., C) -> (..., C); numerator (groups, m + 1) and denominator (groups, n) may have different groups."""
    C, groups = x.shape[-1], max(numerator.shape[0], denominator.shape[0])
    width = C // groups
    outputs = []
    for g in range(groups):
        z = x[..., g * width : (g + 1) * width].reshape(-1)
        a, b = numerator[g * numerator.shape[0] // groups], denominator[g * denominator.shape[0] // groups]
        powers = [torch.ones_like(z)]
        for _ in range(max(len(a) - 1, len(b))):
            powers.append(powers[-1] * z)
        powers = torch.stack(powers, 1)
        p = (powers[:, : len(a)] * a).sum(1)
        q = 1 + (_abs(powers[:, 1 : len(b) + 1]) * _abs(b)).sum(1)
        outputs.append((p / q).reshape(*x.shape[:-1], width))
    return torch.cat(outputs, -1)
