"""The layouts of checkpoint files, ours and foreign ones, and how each becomes a Checkpoint.

Ours is one dictionary: model and model_ema (weights), optimizer, scaler, epoch, updates, schedule, best, rng, entry and
evaluated (see Progress), args (arguments of main.py with model and model_options), versions, classes.
"""

import argparse
import inspect
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from .record import Checkpoint, CheckpointError, Progress

# Options of timm.create_model that read files or the network. They are never taken from a checkpoint.
NOT_OF_A_MODEL = {
    *inspect.signature(timm.create_model).parameters,
    "pretrained_strict",
    "pretrained_filter_fn",
    "kwargs_filter",
    "feature_cfg",
}
NPZ_NAMES = re.compile(
    r"(opt/target/)?(cls|(embedding|head|Transformer/encoder_norm)/(kernel|bias|scale)|"
    r"Transformer/posembed_input/pos_embedding|Transformer/encoderblock_\d+/.*)"
)


def _three_numbers(value) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(isinstance(v, (int, float)) for v in value)


def _dictionary(value) -> bool:
    return isinstance(value, dict)


BEST_ENTRIES = {"accuracy": (int, float), "weights": str, "epoch": int}
# What the entries of a checkpoint may be.
ENTRIES = {
    **dict.fromkeys(("model", "model_ema", "args", "optimizer", "scaler", "schedule"), _dictionary),
    **dict.fromkeys(("epoch", "updates"), lambda v: isinstance(v, int) and v >= 0),
    "best": lambda v: _dictionary(v) and all(isinstance(v.get(key), kind) for key, kind in BEST_ENTRIES.items() if v),
    "rng": lambda v: isinstance(v, list) and all(map(_dictionary, v)),
    "entry": lambda v: _dictionary(v) and all(isinstance(x, (int, float, str)) for kv in v.items() for x in kv),
    "evaluated": lambda v: isinstance(v, bool),
    "classes": lambda v: isinstance(v, list) and all(isinstance(c, str) for c in v),
}
# What the settings of a model and its images may be.
SETTINGS = {
    **dict.fromkeys(("model", "opt"), lambda v: isinstance(v, str) and v != ""),
    **dict.fromkeys(("model_options", "model_kwargs"), _dictionary),
    "input_size": lambda v: isinstance(v, int) and v > 0,
    **dict.fromkeys(("mean", "std"), _three_numbers),
    "eval_crop_ratio": lambda v: isinstance(v, (int, float)) and v > 0,
    "interpolation": lambda v: v in ("bicubic", "bilinear"),
}
# What a foreign checkpoint says about its model and images. How it was trained is not taken over.
FOREIGN_SETTINGS = {
    **{name: name for name in SETTINGS},
    "arch": "model",
    "img_size": "input_size",
    "model_kwargs": "model_options",
    "crop_pct": "eval_crop_ratio",
}


def to_record(raw: Any, source: str) -> Checkpoint:
    """The checkpoint that the content of a file stands for.

    Raises: CheckpointError if there are no weights, or an entry is of another type than every checkpoint has.
    """
    if not isinstance(raw, dict):
        raise CheckpointError(f"{source} has no weights: it holds a {type(raw).__name__}")
    dictionaries = {key: value for key, value in raw.items() if isinstance(value, dict)}
    ema = dictionaries.get("model_ema", dictionaries.get("state_dict_ema"))
    weights = dictionaries.get("model", dictionaries.get("state_dict", ema))
    if weights is None and raw and all(isinstance(value, Tensor) for value in raw.values()):
        weights = raw
    if weights is None:
        found = ", ".join(map(str, list(raw)[:5])) or "nothing"
        raise CheckpointError(f"{source} has no weights: no entry 'model' or 'state_dict', but {found}")
    weights, ema = _renamed(weights, source), ema and _renamed(ema, source)
    foreign = "versions" not in dictionaries
    if foreign:
        entries = {key: raw[key] for key in ("optimizer", "epoch") if ENTRIES[key](raw.get(key))}
        settings = _foreign_settings(raw, weights)
        if isinstance(raw.get("metric"), float) and "epoch" in entries:
            which = "EMA" if ema else "raw"
            entries["best"] = {"accuracy": raw["metric"], "weights": which, "epoch": entries["epoch"]}
    else:
        _check(raw, ENTRIES, source)
        entries, settings = raw, raw.get("args") or {}
        _check(settings, SETTINGS, source)
        if "model_options" not in settings:
            settings["model_options"] = _options_of_flags(settings)
    options = settings.pop("model_options", None) or {}
    if unsafe := NOT_OF_A_MODEL & options.keys():
        raise CheckpointError(
            f"{source} asks for the model option {', '.join(sorted(map(str, unsafe)))}, which is not one of a model; "
            "it was not loaded"
        )
    progress = Progress.from_entries(entries)
    return Checkpoint(
        source, weights, ema, settings.pop("model", None), options, settings, entries.get("classes"), foreign, progress
    )


def _check(found: dict, rules: dict, source: str) -> None:
    for entry, fits in rules.items():
        if found.get(entry) is not None and not fits(found[entry]):
            raise CheckpointError(
                f"{source} is not a checkpoint or is damaged: its entry '{entry}' has an impossible value"
            )


def _renamed(weights: dict, source: str) -> dict[str, Tensor]:
    """Without the prefixes of DistributedDataParallel and torch.compile, with KAT's names for FlashKAT's coefficients.

    Raises: CheckpointError for tensors that are not dense real numbers.
    """
    renamed = {}
    for name, value in weights.items():
        if not isinstance(value, Tensor) or not isinstance(name, str):
            continue
        plain = value.layout is torch.strided and value.device.type == "cpu" and not value.is_quantized
        if not plain or value.is_complex():
            raise CheckpointError(f"{source} is not a checkpoint or is damaged: {name} is not a plain tensor")
        if value.is_floating_point() and value.element_size() > 1 and value.isnan().any():
            raise CheckpointError(f"{source} cannot be used: {name} holds NaN")
        name = re.sub(r"^(?:module\.|_orig_mod\.)+", "", name)
        renamed[re.sub(r"\.(numerator|denominator)_v$", r".weight_\1", name)] = value
    return renamed


# The flags of models in earlier files of ours, and the options that they stand for.
EARLIER_FLAGS = """basis_type grid order grid_range wavelet_type rational_order rational_version base_fn hidden_dim
modular_attn modular_mode mixed_head num_attention universal karat_blocks project_l1 output_scale karat_init
karat_init_scale mlp_basis mlp_grid mlp_order mlp_grid_range mlp_wavelet mlp_degrees mlp_groups
mlp_numerator_groups""".split()
EARLIER_NAMES = {name: name for name in EARLIER_FLAGS} | {"depth": "karat_depth", "init": "weight_init"}
EARLIER_SWITCHES = {"basis_not_trainable": "basis_trainable", "base_not_trainable": "base_trainable"}


def _options_of_flags(args: dict[str, Any]) -> dict[str, Any]:
    """Move the options of the model out of the arguments of an earlier file, where they have the names of flags."""
    options = args.pop("model_kwargs", None) or {}
    if args.get("depth") is not None and args.get("modular_attn") is None:
        options["modular_attn"] = False
    options |= {option: False for flag, option in EARLIER_SWITCHES.items() if args.pop(flag, None)}
    for flag, option in EARLIER_NAMES.items():
        value = args.pop(flag, None)
        if value is not None:
            options[option] = value[0] if isinstance(value, list) and len(value) == 1 else value
    return options


def _foreign_settings(raw: dict, weights: dict[str, Tensor]) -> dict:
    found = raw.get("args")
    found = vars(found) if isinstance(found, argparse.Namespace) else found if isinstance(found, dict) else {}
    found = {"arch": raw.get("arch"), **found}
    settings = {}
    for name, key in FOREIGN_SETTINGS.items():
        value = found.get(name)
        value = list(value) if isinstance(value, tuple) else value
        if key == "input_size" and isinstance(value, list) and value:
            value = value[-1]
        if SETTINGS[key](value):
            settings[key] = value
    if "input_size" not in settings and (size := _implied_size(weights)):
        settings["input_size"] = size
    return settings


def _implied_size(weights: dict[str, Tensor]) -> int | None:
    """Side in pixels of the square images that a position embedding is for."""
    position, patch = weights.get("pos_embed"), weights.get("patch_embed.proj.weight")
    if position is None or patch is None or position.ndim != 3 or patch.ndim != 4:
        return None
    patches = position.shape[1] - prefix_tokens(weights)
    return math.isqrt(patches) * patch.shape[-1] if _is_square(patches) else None


def prefix_tokens(weights: dict[str, Tensor]) -> int:
    """Positions in front of those of the patches, of class, distillation and register tokens.

    It is 0 if the model gives these tokens no position.
    """
    positions = weights["pos_embed"].shape[1]
    tokens = sum(weights[name].shape[1] for name in ("cls_token", "dist_token", "reg_token") if name in weights)
    return 0 if _is_square(positions) and not _is_square(positions - tokens) else tokens


def _is_square(n: int) -> bool:
    return n > 0 and math.isqrt(n) ** 2 == n


def read_npz(path: Path) -> dict[str, Tensor]:
    """Google's ViT files (AugReg), read by timm's loader into a ViT of the shape that the file has."""
    with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
        shapes = {key.removeprefix("opt/target/"): array.shape for key, array in arrays.items()}
        unused = {key: torch.from_numpy(arrays[key]) for key in arrays if not NPZ_NAMES.fullmatch(key)}
    patch_size, _, in_chans, embed_dim = shapes["embedding/kernel"]
    block = "Transformer/encoderblock_0/"
    vit = VisionTransformer(
        img_size=math.isqrt(shapes["Transformer/posembed_input/pos_embedding"][1] - 1) * patch_size,
        patch_size=patch_size,
        in_chans=in_chans,
        embed_dim=embed_dim,
        depth=sum(re.fullmatch(r"Transformer/encoderblock_\d+/LayerNorm_0/bias", key) is not None for key in shapes),
        num_heads=shapes[f"{block}MultiHeadDotProductAttention_1/query/kernel"][1],
        mlp_ratio=shapes[f"{block}MlpBlock_3/Dense_0/kernel"][1] / embed_dim,
        num_classes=shapes.get("head/bias", [0])[0],
        weight_init="skip",
    )
    vit.load_pretrained(str(path))
    return {**vit.state_dict(), **unused}
