"""Weights into a model: all of them, or those that fit."""

import re
from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from kan_basis import GroupBasis
from kan_basis.basis import Basis
from utils import first_line
from weights import CheckpointError, model_in, prefix_tokens

from .operator import KArAtOperator
from .resample import resample_operators


def known_best(checkpoint: dict) -> str | None:
    """Which weights, "raw" or "EMA", were the best so far in the very epoch of the checkpoint; None where it does not say."""
    best = checkpoint.get("best") or {}
    return best.get("weights") or None if best.get("epoch") == checkpoint.get("epoch") else None


def choose(checkpoint: dict, use_ema: bool | None) -> tuple[dict[str, Tensor], str]:
    """Raw or EMA weights, and which. By default what was better in this very epoch, if known, else the EMA if there is one.

    Raises: CheckpointError if the EMA is asked for and there is none.
    """
    if use_ema is None:
        use_ema = checkpoint.get("model_ema") is not None and known_best(checkpoint) != "raw"
    if use_ema and checkpoint.get("model_ema") is None:
        raise CheckpointError("--use-ema: the checkpoint holds no averaged weights")
    return (checkpoint["model_ema"], "EMA") if use_ema else (checkpoint["model"], "raw")


def load_all(
    model: nn.Module, weights: dict[str, Tensor], source: str | Path, resample: bool = False, mode: str = "bicubic"
) -> list[str]:
    """Load all weights or none; with `resample`, position and patch embeddings and operators (by `mode`) may be of another size.

    Returns: what was resampled.
    Raises: CheckpointError naming the first tensors that are missing, unknown or of another shape.
    """
    own = model.state_dict()
    given, weights = weights, _resampled(model, weights, source, mode) if resample else weights
    faults = [f"{name} is missing" for name in own if name not in weights]
    faults += [f"{name} is unknown to the model" for name in weights if name not in own]
    faults += [
        f"{name} has shape {tuple(weights[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise CheckpointError(
            f"{source} does not fit the model{_other_model(model, source)}: {'; '.join(faults[:3])}{more}"
        )
    model.load_state_dict(weights)
    return ranges(
        f"{name} {tuple(value.shape)} -> {tuple(weights[name].shape)}"
        for name, value in given.items()
        if name in weights and value.shape != weights[name].shape
    )


def load_matching(
    model: nn.Module,
    weights: dict[str, Tensor],
    source: str | Path,
    mode: str = "bicubic",
    trained: nn.Module | None = None,
) -> list[str]:
    """Load every tensor that fits by name and shape, embeddings and operators (by `mode`) resampled; the others keep their values.

    Operators and functions of an MLP are left out whole if their basis is another one than in `trained`, the model of the file, where it is known.

    Returns: lines that name everything that did not fit, on either side.
    Raises: CheckpointError if less than a hundredth of the model's parameters fit.
    """
    own = model.state_dict()
    strange = {
        name for prefix in _of_another_basis(model, weights, trained) for name in weights if name.startswith(prefix)
    }
    all_weights, weights = weights, {name: value for name, value in weights.items() if name not in strange}
    try:
        resized = _resampled(model, weights, source, mode)
    except CheckpointError:  # what cannot be resampled is listed below as of another shape
        try:
            resized = _resampled(model, weights, source, None)
        except CheckpointError:
            resized = weights
    fit = {name: value for name, value in resized.items() if name in own and value.shape == own[name].shape}
    covered, total = (sum(value.numel() for value in values) for values in (fit.values(), own.values()))
    if covered < total / 100:
        raise CheckpointError(
            f"{source} does not fit the model{_other_model(model, source)}: nothing was loaded, because the tensors "
            f"that fit are {covered:,} of its {total:,} parameters"
        )
    model.load_state_dict(fit, strict=False)
    shapes = {
        name: f"{name} {tuple(weights[name].shape)} -> {tuple(own[name].shape)}" for name in weights if name in own
    }
    groups = {
        "resampled": ranges(shapes[name] for name in fit if name in weights and weights[name].shape != own[name].shape),
        "of another shape, not loaded": ranges(shapes[name] for name in resized if name in own and name not in fit),
        "of another basis, not loaded": ranges(name for name in all_weights if name in strange),
        "not in the file, start anew": ranges(name for name in own if name not in resized and name not in strange),
        "not in the model, left out": ranges(name for name in weights if name not in own),
    }
    return [f"{len(fit)} of {len(own)} tensors taken from {source}"] + [
        f"  {what}: {', '.join(names)}" for what, names in groups.items() if names
    ]


def _of_another_basis(model: nn.Module, weights: dict[str, Tensor], trained: nn.Module | None) -> list[str]:
    """Prefixes of the operators and functions of `model` whose coefficients in `weights` are of another basis, by `trained` or their number."""
    theirs = {} if trained is None else _bases(trained)
    return [
        f"{name}."
        for name, basis in _bases(model).items()
        if repr(theirs.get(name, basis)) != repr(basis)
        or any(
            value.shape[-1:] != (basis.num_coefficients,)
            for key, value in weights.items()
            if key.startswith(f"{name}.") and key.endswith("coefficients")
        )
    ]


def _bases(model: nn.Module) -> dict[str, Basis]:
    return {
        name: module.basis if isinstance(module, GroupBasis) else module.layers[0].basis
        for name, module in model.named_modules()
        if isinstance(module, (GroupBasis, KArAtOperator))
    }


def _other_model(model: nn.Module, source: str | Path) -> str:
    own, named = (getattr(model, "pretrained_cfg", None) or {}).get("architecture"), model_in(str(source))
    return f" {own} (its name says {named})" if own and named and own != named else f" {own}" if own else ""


def _resampled(model: nn.Module, weights: dict[str, Tensor], source: str | Path, mode: str) -> dict[str, Tensor]:
    """Position and patch embeddings in the size of `model`, by timm; class and distillation tokens are added or left out first.

    Kolmogorov-Arnold operators for the tokens of `model`, by models/resample.py and `mode`.
    """
    if not isinstance(model, VisionTransformer):
        return weights
    try:
        weights = dict(weights)
        if "pos_embed" in weights and model.pos_embed is not None:
            position, own = weights["pos_embed"], 0 if model.no_embed_class else model.num_prefix_tokens
            theirs = prefix_tokens(weights)
            weights["pos_embed"] = torch.cat(
                [
                    position[:, : min(own, theirs)],
                    model.pos_embed[:, theirs:own].to(position).detach(),
                    position[:, theirs:],
                ],
                1,
            )
        return checkpoint_filter_fn(
            resample_operators(weights, model, mode) if mode else weights, model, adapt_layer_scale=True
        )
    except (RuntimeError, ValueError, TypeError, KeyError, IndexError) as error:
        raise CheckpointError(f"{source}: it cannot be resampled to the model ({first_line(error)})") from error


def ranges(names) -> list[str]:
    """Names that differ in one number, drawn together: blocks.{0-11}.mlp.act1.weight_numerator."""
    groups: dict[str, list[int]] = {}
    for name in names:
        number = re.search(r"\.(\d+)\.", name)
        groups.setdefault(name.replace(number[0], ".{}.", 1) if number else name, []).append(
            int(number[1]) if number else 0
        )
    return [
        pattern.replace("{}", "{" + _spans(sorted(numbers)) + "}")
        if len(numbers) > 1
        else pattern.replace("{}", str(numbers[0]))
        for pattern, numbers in groups.items()
    ]


def _spans(numbers: list[int]) -> str:
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends))
