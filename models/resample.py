"""Kolmogorov-Arnold operators for another number of tokens: their parameters have token axes, resampled as position embeddings are.

Patches stand for points of an image, so that the two sums over them, over q in Phi(A) and over n in sigma(A) V, have to keep their value when there
are more of them: the terms of patches are multiplied by P_old / P_new, those of the class token, of which there is one as before, are not. So an image
whose every patch is split in equal ones gives the same result (but not behind the l1 projection). Folded into the parameters that carry the axis,

    sum over q    scale_base and scale_basis of the first layer, or project_in where W comes first
    sum over n    project_out, or scale_base and scale_basis of the last layer where there is none (at depth 1 the same ones again)
"""

import math
import re

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional as F

INTERPOLATIONS = ("bicubic", "bilinear", "nearest")
_KEY = re.compile(
    r"((?:.*\.)?(?:operator|karat)\.|)(?:layers\.(\d+)\.(coefficients|scale_base|scale_basis)|(project_in|project_out))"
)


def resample_operator_state(
    state_dict: dict[str, Tensor],
    old_grid: int | tuple[int, int],
    new_grid: int | tuple[int, int],
    num_prefix_tokens: int = 1,
    mode: str = "bicubic",
    antialias: bool = True,
) -> dict[str, Tensor]:
    """A copy of the state in which all operators are for the patch grid `new_grid`; everything else is passed on.

    Args:
        state_dict: of a model, a KArAtAttention or a KArAtOperator.
        old_grid, new_grid: patches (height, width), one number for a square.
        num_prefix_tokens: class and register tokens in front, not resampled.
        mode: interpolation, "bicubic", "bilinear" or "nearest" (to the nearest centre); antialias for the first two.
    Raises: ValueError for an unknown mode, or parameters that are not for `old_grid`.
    """
    if mode not in INTERPOLATIONS:
        raise ValueError(f"unknown mode '{mode}'; there are: {', '.join(INTERPOLATIONS)}")
    old, new = ((g, g) if isinstance(g, int) else tuple(g) for g in (old_grid, new_grid))
    if old == new:
        return dict(state_dict)
    ratio = old[0] * old[1] / (new[0] * new[1])
    matches = {key: match for key in state_dict if (match := _KEY.fullmatch(key))}
    last = {}  # of each operator, its last layer
    for match in matches.values():
        last[match[1]] = max(last.get(match[1], 0), int(match[2] or 0))
    resampled = dict(state_dict)
    for key, match in matches.items():
        prefix, number, name, projection = match.groups()
        inputs, outputs = 2, 1  # of (h, outputs, inputs[, P])
        if projection:
            axes = [inputs if projection == "project_in" else outputs]
        else:
            axes = [inputs] * (int(number) == 0 and f"{prefix}project_in" not in state_dict)
            axes += [outputs] * (int(number) == last[prefix] and f"{prefix}project_out" not in state_dict)
        for axis in axes:
            try:
                scale = 1.0 if name == "coefficients" else ratio  # a function that is not linear is scaled outside
                resampled[key] = _resample(resampled[key], axis, old, new, num_prefix_tokens, mode, antialias, scale)
            except ValueError as error:
                raise ValueError(f"{key}: {error}") from error
    return resampled


def resample_operators(
    state_dict: dict[str, Tensor], model: VisionTransformer, mode: str = "bicubic"
) -> dict[str, Tensor]:
    """The state of a model, its operators resampled from the square grid that they are for to the grid of `model`.

    Raises: ValueError if they are for no square grid behind the class tokens of `model`.
    """
    old, prefix = _tokens(state_dict), model.num_prefix_tokens
    if old in (None, prefix + model.patch_embed.num_patches):
        return state_dict
    side = math.isqrt(max(0, old - prefix))
    if prefix + side**2 != old:
        raise ValueError(f"operators for {old} tokens, which are not {prefix} and a square of patches")
    return resample_operator_state(state_dict, side, model.patch_embed.grid_size, prefix, mode)


def _tokens(state_dict: dict[str, Tensor]) -> int | None:
    """The number of tokens that operators are for, None where there are no operators."""
    for key, value in state_dict.items():
        match = _KEY.fullmatch(key)
        if match and (match[4] == "project_in" or match[2] == "0" and f"{match[1]}project_in" not in state_dict):
            return value.shape[2]
    return None


def _resample(
    x: Tensor,
    axis: int,
    old: tuple[int, int],
    new: tuple[int, int],
    prefix: int,
    mode: str,
    antialias: bool,
    scale: float,
) -> Tensor:
    """Along the token axis: `prefix` tokens as they are, then the patches of the grid, row by row, times `scale`."""
    if x.shape[axis] != prefix + old[0] * old[1]:
        raise ValueError(f"expected {prefix} + {old[0]} x {old[1]} tokens, not {x.shape[axis]}")
    rows = x.movedim(axis, -1)
    patches = rows[..., prefix:].reshape(1, -1, *old).to(torch.promote_types(x.dtype, torch.float32))
    options = dict(mode="nearest-exact") if mode == "nearest" else dict(mode=mode, antialias=antialias)
    patches = (F.interpolate(patches, size=new, **options) * scale).reshape(*rows.shape[:-1], -1).to(x.dtype)
    return torch.cat([rows[..., :prefix], patches], -1).movedim(-1, axis).contiguous()
