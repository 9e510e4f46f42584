"""Weights of any layout, read without running code from the file, and their way into a model.

Read are our checkpoints, those of DeiT and KArAt (an argparse.Namespace inside), of timm's and KAT's trainers, bare state dicts,
FlashKAT's renamed parameters, safetensors and AugReg's .npz; from a path, a URL or the Hugging Face hub.
"""
import argparse
import hashlib
import math
import os
import pathlib
import pickle
import re
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import timm
import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import load_model_config_from_hf, load_state_dict_from_hf
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from models.kat import default_cfgs as kat_cfgs
from utils import UserError

HUB = ("hf_hub:", "hf-hub:")
CHECKSUM = re.compile(r"[-_](?=[0-9]*[a-f])([0-9a-f]{8,64})\.\w+$")  # start of the sha256, as torch.hub and KAT put it into file names
# types besides tensors and plain ones that trainers put into checkpoints; rebuilding them runs no code of the file
SAFE = [argparse.Namespace, *((pathlib.PosixPath, f"{module}.PosixPath") for module in ("pathlib", "pathlib._local"))]
# what a foreign checkpoint says about its model; how it was trained stays its own trainer's affair
FOREIGN_ARGS = {"model": "model", "arch": "model", "input_size": "input_size", "img_size": "input_size", "model_kwargs": "model_kwargs",
                "opt": "opt", "mean": "mean", "std": "std", "crop_pct": "eval_crop_ratio", "eval_crop_ratio": "eval_crop_ratio"}
NPZ_NAMES = re.compile(r"(opt/target/)?(cls|(embedding|head|Transformer/encoder_norm)/(kernel|bias|scale)|Transformer/posembed_input/pos_embedding|"
                       r"Transformer/encoderblock_\d+/.*)")


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, unsafe or of another model."""


def read(source: str | Path) -> dict:
    """A checkpoint in our layout, on the CPU: at least {model: weights, args: {...}}; see checkpoints.py for all entries.

    Args:
        source: a path, an http(s) URL (kept in torch.hub's folder; checked where its file name ends in the sha256) or hf_hub:USER/NAME.
    Raises: CheckpointError, one sentence, for what is missing, cut short, or holds more than tensors and plain types.
    """
    name = str(source)
    try:
        if name.startswith(HUB):
            return _read_hub(name)
        path = _download(name) if "://" in name else Path(source)
        if not path.is_file():
            raise CheckpointError(f"there is no checkpoint {name}")
        if path.suffix == ".npz":
            return _canonical(_read_npz(path), name)
        if path.suffix == ".safetensors":
            return _canonical(load_file(path), name)
        with torch.serialization.safe_globals(SAFE), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols
            return _canonical(torch.load(path, map_location="cpu", weights_only=True), name)
    except pickle.UnpicklingError as error:
        unsafe = re.search(r"GLOBAL ([\w.]+)|([\w.]+) was not an allowed global", str(error))
        reason = (f"holds objects other than tensors and plain types ({unsafe[1] or unsafe[2]})" if unsafe
                  else "is not a checkpoint or is damaged")
        raise CheckpointError(f"{name} {reason}; nothing in it was run and it was not loaded") from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, zipfile.BadZipFile, SafetensorError) as error:
        raise CheckpointError(f"{name} is not a checkpoint or is damaged ({type(error).__name__})") from error


def _download(url: str) -> Path:
    """The file of a URL; processes of one machine take turns, and only the first downloads."""
    file_name = url.split("?")[0].rsplit("/", 1)[-1]
    checksum = CHECKSUM.search(file_name)
    folder = Path(torch.hub.get_dir(), "checkpoints", "" if checksum else hashlib.sha256(url.encode()).hexdigest()[:8])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f".{file_name}.lock"):
            if not (folder / file_name).exists():
                torch.hub.download_url_to_file(url, str(folder / file_name), checksum and checksum[1], progress=sys.stderr.isatty())
    except RuntimeError as error:  # the checksum
        raise CheckpointError(f"{url} is not the file its name promises: {error}; it was not kept") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{url} could not be downloaded ({error})") from error
    return folder / file_name


def _read_hub(name: str) -> dict:
    try:
        config, model, kwargs = load_model_config_from_hf(name[len(HUB[0]):])
        weights = load_state_dict_from_hf(name[len(HUB[0]):], weights_only=True)
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # the hub's client has many
        raise CheckpointError(f"{name} could not be loaded from the hub ({str(error).strip().splitlines()[0]})") from error
    return _canonical({"state_dict": weights, "args": {**config, "model": model, "input_size": config.get("input_size"), "model_kwargs": kwargs}}, name)


def _read_npz(path: Path) -> dict[str, Tensor]:
    """Google's ViT files (AugReg): timm's loader fills a ViT of the file's own shape."""
    with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
        prefix = "opt/target/" if "opt/target/embedding/kernel" in arrays else ""
        kernel, position = arrays[f"{prefix}embedding/kernel"], arrays[f"{prefix}Transformer/posembed_input/pos_embedding"]
        block = f"{prefix}Transformer/encoderblock_0/"
        heads = arrays[f"{block}MultiHeadDotProductAttention_1/query/kernel"].shape[1]
        hidden = arrays[f"{block}MlpBlock_3/Dense_0/kernel"].shape[1]
        classes = arrays[f"{prefix}head/bias"].shape[0] if f"{prefix}head/bias" in arrays else 0
        depth = len({match[1] for key in arrays if (match := re.search(r"encoderblock_(\d+)/", key))})
        unused = {key: torch.from_numpy(arrays[key]) for key in arrays if not NPZ_NAMES.fullmatch(key)}
    side = math.isqrt(position.shape[1] - 1) * kernel.shape[0]
    vit = VisionTransformer(img_size=side, patch_size=kernel.shape[0], in_chans=kernel.shape[2], embed_dim=kernel.shape[3], depth=depth,
                            num_heads=heads, mlp_ratio=hidden / kernel.shape[3], num_classes=classes, weight_init="skip")
    vit.load_pretrained(str(path))
    return {**vit.state_dict(), **unused}


def _canonical(raw: dict, name: str) -> dict:
    """Our layout: model, model_ema, args, and of our own checkpoints everything else."""
    if not isinstance(raw, dict):
        raise CheckpointError(f"{name} has no weights: it holds a {type(raw).__name__}")
    weights, ema = (next((raw[key] for key in keys if isinstance(raw.get(key), dict)), None)
                    for keys in (("model", "state_dict"), ("model_ema", "state_dict_ema")))
    if weights is None and ema is None and raw and all(isinstance(value, Tensor) for value in raw.values()):
        weights = raw
    if weights is None and ema is None:
        raise CheckpointError(f"{name} has no weights (no entry 'model' or 'state_dict')")
    state = {"model": _renamed(weights if weights is not None else ema), "model_ema": _renamed(ema)}
    if "versions" in raw:
        return {**raw, **state}
    return {**state, "args": _foreign_args(raw, state["model"], name), "foreign": True,
            **{key: raw[key] for key in ("optimizer", "epoch", "metric") if key in raw}}


def _renamed(weights: dict | None) -> dict | None:
    """Without the prefixes of DistributedDataParallel and torch.compile, and with KAT's names for FlashKAT's coefficients."""
    return weights and {re.sub(r"\.(numerator|denominator)_v$", r".weight_\1", re.sub(r"^(?:module\.|_orig_mod\.)+", "", name)): value
                        for name, value in weights.items() if isinstance(value, Tensor)}


def _foreign_args(raw: dict, tensors: dict[str, Tensor], name: str) -> dict:
    theirs = raw.get("args") or {}
    theirs = {"arch": raw.get("arch"), **(vars(theirs) if isinstance(theirs, argparse.Namespace) else theirs)}
    args = {own: value for key, own in FOREIGN_ARGS.items() if (value := theirs.get(key)) not in (None, "", {})}
    if isinstance(args.get("input_size"), (tuple, list)):
        args["input_size"] = args["input_size"][-1]
    args.setdefault("input_size", _implied_size(tensors))
    if not timm.is_model(str(args.get("model", ""))):
        args["model"] = model_in(name)
    return {key: list(value) if isinstance(value, tuple) else value for key, value in args.items() if value is not None}


def _implied_size(tensors: dict[str, Tensor]) -> int | None:
    """Side of the square images that a position embedding is for, pixels."""
    position, patch = tensors.get("pos_embed"), tensors.get("patch_embed.proj.weight")
    if position is None or patch is None or position.ndim != 3 or patch.ndim != 4:
        return None
    first = sum(tensors[name].shape[1] for name in ("cls_token", "dist_token", "reg_token") if name in tensors)
    grid = next((math.isqrt(n) for n in (position.shape[1] - first, position.shape[1]) if n > 0 and math.isqrt(n) ** 2 == n), None)
    return grid and grid * patch.shape[-1]


def model_in(source: str) -> str | None:
    """The model that a file name begins with: deit_tiny_patch16_224 of deit_tiny_patch16_224-a1311bcf.pth, or that KAT published under it."""
    file_name = os.path.basename(source)
    published = [name.split(".")[0] for name, cfg in kat_cfgs.items() for tag in cfg.cfgs.values() if tag.url and tag.url.endswith(f"/{file_name}")]
    return next(iter(published), None) or max((name for name in timm.list_models() if file_name.startswith(name)), key=len, default=None)


def choose(checkpoint: dict, use_ema: bool | None) -> tuple[dict[str, Tensor], str]:
    """Raw or EMA weights, and which. By default what was better in this very epoch, if known, else the EMA if there is one.

    Raises: CheckpointError if the EMA is asked for and there is none.
    """
    best = checkpoint.get("best") or {}
    if use_ema is None:
        known = best.get("epoch") == checkpoint.get("epoch") and best.get("weights")
        use_ema = checkpoint.get("model_ema") is not None and (best["weights"] == "EMA" if known else True)
    if use_ema and checkpoint.get("model_ema") is None:
        raise CheckpointError("--use-ema: the checkpoint holds no averaged weights")
    return (checkpoint["model_ema"], "EMA") if use_ema else (checkpoint["model"], "raw")


def load(model: nn.Module, weights: dict[str, Tensor], source: str | Path, resample: bool = False) -> list[str]:
    """Load all weights or none; with `resample`, position and patch embeddings may be of another size.

    Returns: what was resampled.
    Raises: CheckpointError naming the first tensors that are missing, unknown or of another shape.
    """
    own = model.state_dict()
    given, weights = weights, _resampled(model, weights, source) if resample else weights
    faults = [f"{name} is missing" for name in own if name not in weights]
    faults += [f"{name} is unknown to the model" for name in weights if name not in own]
    faults += [f"{name} has shape {tuple(weights[name].shape)} instead of {tuple(own[name].shape)}"
               for name in own if name in weights and weights[name].shape != own[name].shape]
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise CheckpointError(f"{source} does not fit the model{_other_model(model, source)}: {'; '.join(faults[:3])}{more}")
    model.load_state_dict(weights)
    return [f"{name} {tuple(value.shape)} -> {tuple(weights[name].shape)}" for name, value in given.items()
            if name in weights and value.shape != weights[name].shape]


def load_matching(model: nn.Module, weights: dict[str, Tensor], source: str | Path) -> list[str]:
    """Load every tensor that fits by name and shape, position and patch embeddings resampled; the others keep their values.

    Returns: lines that name everything that did not fit, on either side.
    Raises: CheckpointError if less than a hundredth of the model's parameters fit.
    """
    own = model.state_dict()
    resized = _resampled(model, weights, source)
    fit = {name: value for name, value in resized.items() if name in own and value.shape == own[name].shape}
    covered, total = (sum(value.numel() for value in values) for values in (fit.values(), own.values()))
    if covered < total / 100:
        raise CheckpointError(f"{source} does not fit the model{_other_model(model, source)}: nothing was loaded, because its tensors cover "
                              f"{covered:,} of {total:,} parameters")
    model.load_state_dict(fit, strict=False)
    shapes = {name: f"{name} {tuple(weights[name].shape)} -> {tuple(own[name].shape)}" for name in weights if name in own}
    groups = {"resampled": [shapes[name] for name in fit if name in weights and weights[name].shape != own[name].shape],
              "of another shape, not loaded": [shapes[name] for name in resized if name in own and name not in fit],
              "not in the file, start anew": ranges(name for name in own if name not in resized),
              "not in the model, left out": ranges(name for name in weights if name not in own)}
    return [f"{len(fit)} of {len(own)} tensors taken from {source}"] + [f"  {what}: {', '.join(names)}" for what, names in groups.items() if names]


def _other_model(model: nn.Module, source: str | Path) -> str:
    own, named = (getattr(model, "pretrained_cfg", None) or {}).get("architecture"), model_in(str(source))
    return f" {own} (its name says {named})" if own and named and own != named else f" {own}" if own else ""


def _resampled(model: nn.Module, weights: dict[str, Tensor], source: str | Path) -> dict[str, Tensor]:
    """Position and patch embeddings in the size of `model`, by timm; class and distillation tokens are added or left out first."""
    if not isinstance(model, VisionTransformer):
        return weights
    if "pos_embed" in weights and model.pos_embed is not None and "cls_token" in weights:
        theirs = 1 + ("dist_token" in weights) + weights["reg_token"].shape[1] if "reg_token" in weights else 1 + ("dist_token" in weights)
        own = 0 if model.no_embed_class else model.num_prefix_tokens
        position = weights["pos_embed"]
        weights = {**weights, "pos_embed": torch.cat([position[:, :min(own, theirs)], model.pos_embed[:, theirs:own].to(position).detach(),
                                                      position[:, theirs:]], 1)} if position.shape[-1] == model.embed_dim else weights
    try:
        return checkpoint_filter_fn(weights, model, adapt_layer_scale=True)
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{source}: its embeddings cannot be resampled to the model ({str(error).splitlines()[0]})") from error


def ranges(names) -> list[str]:
    """Names that differ in one number, drawn together: blocks.{0-11}.mlp.act1.weight_numerator."""
    groups: dict[str, list[int]] = {}
    for name in names:
        number = re.search(r"\.(\d+)\.", name)
        groups.setdefault(name.replace(number[0], ".{}.", 1) if number else name, []).append(int(number[1]) if number else 0)
    return [pattern.replace("{}", "{" + _spans(sorted(numbers)) + "}") if len(numbers) > 1 else pattern.replace("{}", str(numbers[0]))
            for pattern, numbers in groups.items()]


def _spans(numbers: list[int]) -> str:
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends))
