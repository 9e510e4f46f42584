"""Projection on the probability simplex, the l1 projection of Kolmogorov-Arnold attention."""

import torch
from torch import Tensor


def project_l1(x: Tensor) -> Tensor:
    """The point of the simplex {y >= 0, sum(y) = 1} nearest to each row in Euclidean distance: y = max(x - tau, 0).

    tau = (sum_S x - 1) / |S| with S the entries above tau, found by sorting.
    The gradient is exact: g - mean_S(g) on S, 0 elsewhere.

    Args:
        x: (..., N), any float dtype.
    Returns: (..., N), float32, or float64 for float64.
    Source: Duchi et al. 2008, Efficient projections onto the l1-ball for learning in high dimensions, fig. 1.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    with torch.no_grad():
        # A shift of x does not change the projection, but sums of large scores would lose digits.
        top = x.amax(-1, keepdim=True)
        descending = (x - top).sort(-1, descending=True).values
        excess = descending.cumsum(-1) - 1
        rank = torch.arange(1, x.shape[-1] + 1, device=x.device)
        last = (descending * rank > excess).sum(-1, keepdim=True).clamp_min(1) - 1  # 0 entries only in rows with NaN
        inside = x - top > excess.gather(-1, last) / (last + 1)
    x = x - top
    # Entries that equal tau up to rounding may count or not, but they must do so in the sum and in |S| alike.
    tau = (torch.where(inside, x, 0).sum(-1, keepdim=True) - 1) / inside.sum(-1, keepdim=True)
    return (x - tau).clamp_min(0)
