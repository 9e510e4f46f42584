"""Projection on the probability simplex, the l1 projection of Kolmogorov-Arnold attention."""

import torch
from torch import Tensor


def project_l1(x: Tensor) -> Tensor:
    """Nearest point, in Euclidean distance, of each row on the simplex {y >= 0, sum(y) = 1}: y = max(x - tau, 0).

    tau = (sum_S x - 1) / |S|, S the entries above tau, found by sorting. The gradient is exact: g - mean_S(g) on S, 0 elsewhere.

    Args:
        x: (..., N), any float dtype.
    Returns: (..., N), float32, or float64 for float64.
    Source: Duchi et al. 2008, Efficient projections onto the l1-ball for learning in high dimensions, fig. 1.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    with torch.no_grad():
        top = x.amax(
            -1, keepdim=True
        )  # the projection does not see a shift: sums of large scores would lose the digits
        descending = (x - top).sort(-1, descending=True).values
        excess = descending.cumsum(-1) - 1
        rank = torch.arange(1, x.shape[-1] + 1, device=x.device)
        last = (descending * rank > excess).sum(-1, keepdim=True).clamp_min(1) - 1  # 0 entries only in rows with NaN
        inside = x - top > excess.gather(-1, last) / (last + 1)
    x = x - top
    # S counted again: entries that equal tau up to rounding may be in or out, but alike in the sum and in |S|
    tau = (torch.where(inside, x, 0).sum(-1, keepdim=True) - 1) / inside.sum(-1, keepdim=True)
    return (x - tau).clamp_min(0)
