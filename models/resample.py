"""Kolmogorov-Arnold operators for another number of tokens. Their token axes are resampled like position embeddings.

Patches stand for points of an image, so the two sums over them (over q in Phi(A) and over n in sigma(A) V) must keep
their value when there are more patches. The terms of patches are therefore multiplied by P_old / P_new. The term of the
class token is not, because there is still one class token. An image whose patches are each split into equal ones then
gives the same result (except behind the l1 projection). The factor is folded into the parameters that have the token
axis:

    sum over q    scale_base and scale_basis of the first layer, or project_in if W comes first
    sum over n    project_out, or without it scale_base and scale_basis of the last layer (at depth 1 the same layer)
"""

import math
import re
from collections.abc import Collection

import torch
from timm.layers import to_2tuple
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional as F

from kan_basis.basis import at_least_float32

INTERPOLATIONS = ("bicubic", "bilinear", "nearest")
_KEY = re.compile(
    r"((?:.*\.)?(?:operator|karat)\.|)(?:layers\.(\d+)\.(?:coefficients|scale_base|scale_basis)|project_(in|out))"
)


def resample_operator_state(
    state_dict: dict[str, Tensor],
    old_grid: int | tuple[int, int],
    new_grid: int | tuple[int, int],
    num_prefix_tokens: int = 1,
    mode: str = "bicubic",
) -> dict[str, Tensor]:
    """A copy of the state in which all operators are for the patch grid `new_grid`; everything else is passed on.

    Args:
        state_dict: of a model, a KArAtAttention or a KArAtOperator.
        old_grid, new_grid: patches (height, width), one number for a square.
        num_prefix_tokens: class and register tokens in front, not resampled.
        mode: interpolation, "bicubic" or "bilinear", both with antialiasing, or "nearest" (to the nearest centre).
    Raises: ValueError for an unknown mode, or parameters that are not for `old_grid`.
    """
    if mode not in INTERPOLATIONS:
        raise ValueError(f"unknown mode '{mode}'; there are: {', '.join(INTERPOLATIONS)}")
    old, new = to_2tuple(old_grid), to_2tuple(new_grid)
    resampled = dict(state_dict)
    if old == new:
        return resampled
    prefix, ratio = num_prefix_tokens, math.prod(old) / math.prod(new)
    options = dict(mode="nearest-exact") if mode == "nearest" else dict(mode=mode, antialias=True)
    for name, axes in _token_axes(state_dict).items():
        scale = 1.0 if name.endswith("coefficients") else ratio  # a function that is not linear is scaled outside
        for axis in axes:
            rows = resampled[name].movedim(axis, -1)
            if rows.shape[-1] != prefix + math.prod(old):
                raise ValueError(f"{name}: expected {prefix} + {old[0]} x {old[1]} tokens, not {rows.shape[-1]}")
            patches = at_least_float32(rows[..., prefix:]).reshape(1, -1, *old)
            patches = (F.interpolate(patches, size=new, **options) * scale).reshape(*rows.shape[:-1], -1).to(rows.dtype)
            resampled[name] = torch.cat([rows[..., :prefix], patches], -1).movedim(-1, axis).contiguous()
    return resampled


def resample_operators(
    state_dict: dict[str, Tensor], model: VisionTransformer, mode: str = "bicubic"
) -> dict[str, Tensor]:
    """The state of a model, its operators resampled from the square grid that they are for to the grid of `model`.

    Raises: ValueError if they are for no square grid behind the class tokens of `model`.
    """
    prefix = model.num_prefix_tokens
    counts = {state_dict[name].shape[axis] for name, axes in _token_axes(state_dict).items() for axis in axes}
    old = min(counts - {prefix + model.patch_embed.num_patches}, default=None)
    if old is None:
        return state_dict
    side = math.isqrt(max(0, old - prefix))
    if prefix + side**2 != old:
        raise ValueError(f"operators for {old} tokens, which are not {prefix} and a square of patches")
    return resample_operator_state(state_dict, side, model.patch_embed.grid_size, prefix, mode)


def _token_axes(names: Collection[str]) -> dict[str, list[int]]:
    """The axes of tokens of every parameter (h, outputs, inputs[, P]) of an operator, by name."""
    outputs, inputs = 1, 2
    axes = {}
    for name in names:
        if match := _KEY.fullmatch(name):
            prefix, layer, projection = match.groups()
            first = projection == "in" or layer == "0" and f"{prefix}project_in" not in names
            is_last = layer and f"{prefix}layers.{int(layer) + 1}.coefficients" not in names
            last = projection == "out" or is_last and f"{prefix}project_out" not in names
            axes[name] = [axis for axis, is_token in ((inputs, first), (outputs, last)) if is_token]
    return axes
