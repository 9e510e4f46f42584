"""Bring weights into a model: all of them, or those that fit."""

import re
from collections.abc import Iterable
from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from kan_basis.basis import Basis
from models.kat import activations
from models.operator import KArAtOperator
from models.published import model_in
from models.resample import resample_operators
from utils import first_line

from .layouts import prefix_tokens
from .record import CheckpointError


def load_all(
    model: nn.Module, weights: dict[str, Tensor], source: str | Path, resample: bool = False, mode: str = "bicubic"
) -> list[str]:
    """Load all weights or none.

    With `resample`, position embeddings, patch embeddings and operators (by `mode`) may be of another size.
    Returns: what was resampled.
    Raises: CheckpointError that names the first tensors that are missing, unknown or of another shape.
    """
    target = model.state_dict()
    resized = _resampled(model, weights, source, mode) if resample else weights
    faults = [f"{name} is missing" for name in target if name not in resized]
    faults += [f"{name} is unknown to the model" for name in resized if name not in target]
    faults += [
        f"{name} has shape {tuple(resized[name].shape)} instead of {tuple(value.shape)}"
        for name, value in target.items()
        if name in resized and resized[name].shape != value.shape
    ]
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        which = _names_of_models(model, source)
        raise CheckpointError(f"{source} does not fit the model{which}: {'; '.join(faults[:3])}{more}")
    model.load_state_dict(resized)
    return _reshaped(weights, resized)


def _reshaped(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    return ranges(
        f"{name} {tuple(value.shape)} -> {tuple(after[name].shape)}"
        for name, value in before.items()
        if name in after and value.shape != after[name].shape
    )


def load_matching(
    model: nn.Module,
    weights: dict[str, Tensor],
    source: str | Path,
    mode: str = "bicubic",
    trained: nn.Module | None = None,
) -> list[str]:
    """Load every tensor that fits by name and shape; the others keep their values.

    Embeddings and operators (by `mode`) are resampled. Operators and activations are left out as a whole if they have
    another basis than in `trained`, the model of the file, where it is known.
    Returns: lines that name everything that does not fit, in the file or in the model.
    Raises: CheckpointError if less than a hundredth of the parameters of the model fit.
    """
    target = model.state_dict()
    of_another_basis = _of_another_basis(model, weights, trained)
    kept = {name: value for name, value in weights.items() if name not in of_another_basis}
    resized = kept
    # Embeddings and operators that cannot be resampled are listed below as tensors of another shape.
    for interpolation in (mode, None):
        try:
            resized = _resampled(model, kept, source, interpolation)
            break
        except CheckpointError:
            continue
    fit = {name: value for name, value in resized.items() if name in target and value.shape == target[name].shape}
    covered, total = (sum(value.numel() for value in values) for values in (fit.values(), target.values()))
    if covered < total / 100:
        raise CheckpointError(
            f"{source} does not fit the model{_names_of_models(model, source)}: nothing was loaded, because the "
            f"tensors that fit are {covered:,} of its {total:,} parameters"
        )
    model.load_state_dict(fit, strict=False)
    lines = {
        "resampled": _reshaped(kept, fit),
        "of another shape, not loaded": _reshaped(resized, target),
        "of another basis, not loaded": ranges(of_another_basis),
        "not in the file, keep their initial values": ranges(
            n for n in target if n not in resized and n not in of_another_basis
        ),
        "not in the model, left out": ranges(n for n in kept if n not in target),
    }
    first = f"{len(fit)} of {len(target)} tensors taken from {source}"
    return [first] + [f"  {what}: {', '.join(names)}" for what, names in lines.items() if names]


def _of_another_basis(model: nn.Module, weights: dict[str, Tensor], trained: nn.Module | None) -> list[str]:
    """The weights of operators and activations that have another basis than in `model`.

    The basis in `weights` is known from `trained`, or else from the number of coefficients.
    """
    known = {} if trained is None else _bases(trained)

    def differs(name: str, basis: Basis) -> bool:
        coefficients = (v for key, v in weights.items() if key.startswith(f"{name}.") and key.endswith("coefficients"))
        return known.get(name, basis) != basis or any(v.shape[-1:] != (basis.num_coefficients,) for v in coefficients)

    prefixes = tuple(f"{name}." for name, basis in _bases(model).items() if differs(name, basis))
    return [name for name in weights if name.startswith(prefixes)]


def _bases(model: nn.Module) -> dict[str, Basis]:
    """The basis of every operator and activation."""
    operators = {name: m.layers[0].basis for name, m in model.named_modules() if isinstance(m, KArAtOperator)}
    return operators | {name: m.basis for name, m in activations(model).items()}


def _names_of_models(model: nn.Module, source: str | Path) -> str:
    name, named = (getattr(model, "pretrained_cfg", None) or {}).get("architecture"), model_in(str(source))
    return f" {name} (its name says {named})" if name and named and name != named else f" {name}" if name else ""


def _resampled(model: nn.Module, weights: dict[str, Tensor], source: str | Path, mode: str | None) -> dict[str, Tensor]:
    """Embeddings of the size of `model`, by timm, and operators for its tokens, by models/resample.py (not for mode
    None).

    Positions of class and distillation tokens are added or left out first.
    """
    if not isinstance(model, VisionTransformer):
        return weights
    try:
        weights = dict(weights)
        if "pos_embed" in weights and model.pos_embed is not None:
            position, wanted = weights["pos_embed"], 0 if model.no_embed_class else model.num_prefix_tokens
            there = prefix_tokens(weights)
            added = model.pos_embed[:, there:wanted].to(position).detach()
            weights["pos_embed"] = torch.cat([position[:, : min(wanted, there)], added, position[:, there:]], 1)
        resized = resample_operators(weights, model, mode) if mode else weights
        return checkpoint_filter_fn(resized, model, adapt_layer_scale=True)
    except (RuntimeError, ValueError, TypeError, KeyError, IndexError) as error:
        raise CheckpointError(f"{source}: it cannot be resampled to the model ({first_line(error)})") from error


def ranges(names: Iterable[str]) -> list[str]:
    """Names that differ in one number, drawn together: blocks.{0-11}.mlp.act1.weight_numerator."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name in names:
        start, number, end = re.fullmatch(r"(?:(.*?\.)(\d+)(?=\.))?(.*)", name).groups("")
        groups.setdefault((start, end), []).append(number)
    return [start + (_spans(found) if len(found) > 1 else found[0]) + end for (start, end), found in groups.items()]


def _spans(found: list[str]) -> str:
    numbers = sorted(map(int, found))
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return "{" + ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends)) + "}"
