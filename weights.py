"""Weights of any layout, read without running code from the file. models/load.py brings them into a model.

Read are our checkpoints, those of DeiT and KArAt (an argparse.Namespace inside), of timm's and KAT's trainers, bare state dicts,
FlashKAT's renamed parameters, safetensors and AugReg's .npz; from a path, a URL or the Hugging Face hub.
"""

import argparse
import hashlib
import inspect
import math
import os
import pathlib
import pickle
import re
import sys
import warnings
import zipfile
from http.client import HTTPException
from pathlib import Path

import numpy as np
import timm
import torch
from filelock import FileLock
from safetensors.torch import load_file
from timm.models import load_model_config_from_hf, load_state_dict_from_hf
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from models.kat import default_cfgs as kat_cfgs
from utils import UserError, first_line

HUB = ("hf_hub:", "hf-hub:")
# sha256 in a file name: its start after a dash, as torch.hub has it, or the whole, as KAT's files have it
CHECKSUM = re.compile(r"(?:-(?=[0-9]*[a-f])([0-9a-f]{8,63})|[-_]([0-9a-f]{64}))\.\w+$")
# types besides tensors and plain ones that trainers put into checkpoints; rebuilding them runs no code of the file
_SCALAR = np.float64(0).__reduce__()[0]  # of numpy numbers
SAFE = [
    argparse.Namespace,
    *((pathlib.PosixPath, f"{module}.PosixPath") for module in ("pathlib", "pathlib._local")),
    np.dtype,
    *((_SCALAR, f"{module}.multiarray.scalar") for module in ("numpy.core", "numpy._core")),
    *(type(np.dtype(t)) for t in "fdilqb?"),
]
# what a foreign checkpoint says about its model; how it was trained stays its own trainer's affair
FOREIGN_ARGS = {
    "model": "model",
    "arch": "model",
    "input_size": "input_size",
    "img_size": "input_size",
    "model_kwargs": "model_kwargs",
    "opt": "opt",
    "mean": "mean",
    "std": "std",
    "crop_pct": "eval_crop_ratio",
    "eval_crop_ratio": "eval_crop_ratio",
    "interpolation": "interpolation",
}
# options of timm.create_model that read files or the network: never taken from a checkpoint
NOT_OF_A_MODEL = {
    *inspect.signature(timm.create_model).parameters,
    "pretrained_strict",
    "pretrained_filter_fn",
    "kwargs_filter",
    "feature_cfg",
}
NPZ_NAMES = re.compile(
    r"(opt/target/)?(cls|(embedding|head|Transformer/encoder_norm)/(kernel|bias|scale)|Transformer/posembed_input/pos_embedding|"
    r"Transformer/encoderblock_\d+/.*)"
)


def _three_numbers(value) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(isinstance(v, (int, float)) for v in value)


# what entries of a checkpoint, and among them the settings of a model and its images, may be
ENTRIES = {
    "args": lambda v: isinstance(v, dict),
    "best": lambda v: isinstance(v, dict),
    "epoch": lambda v: isinstance(v, int),
    "classes": lambda v: isinstance(v, list) and all(isinstance(c, str) for c in v),
}
ARGS = {
    "model": lambda v: isinstance(v, str) and (timm.is_model(v.split(".")[0]) or v.startswith(HUB)),
    "model_kwargs": lambda v: isinstance(v, dict),
    "input_size": lambda v: isinstance(v, int) and v > 0,
    "mean": _three_numbers,
    "std": _three_numbers,
    "eval_crop_ratio": lambda v: isinstance(v, (int, float)) and v > 0,
    "interpolation": lambda v: v in ("bicubic", "bilinear"),
}


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, unsafe or of another model."""


def read(source: str | Path) -> dict:
    """A checkpoint in our layout, on the CPU: at least {model: weights, args: {...}}; see checkpoints.py for all entries.

    Args:
        source: a path, an http(s) URL (kept in torch.hub's folder; checked where its file name ends in the sha256) or hf_hub:USER/NAME.
    Raises: CheckpointError, one sentence, for what is missing, cut short, or holds more than tensors and plain types.
    """
    name = str(source)
    if name.startswith(HUB):
        return _read_hub(name)
    path = _download(name) if "://" in name else Path(source)
    if not path.is_file():
        raise CheckpointError(
            f"{name} is a folder, not a checkpoint" if path.is_dir() else f"there is no checkpoint {name}"
        )
    try:
        return _read_file(path, name)
    except CheckpointError:
        if "://" in name:  # the next try downloads it again
            path.unlink(missing_ok=True)  # another process may have been here
        raise


def _read_file(path: Path, name: str) -> dict:
    try:
        kind = _kind(path)
        if kind == "npz":
            return _canonical({"model": _read_npz(path), "args": {"mean": [0.5] * 3, "std": [0.5] * 3}}, name)
        if kind == "safetensors":
            return _canonical(load_file(path), name)
        with torch.serialization.safe_globals(SAFE), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols
            return _canonical(torch.load(path, map_location="cpu", weights_only=True), name)
    except pickle.UnpicklingError as error:
        unsafe = re.search(r"GLOBAL ([\w.]+)|([\w.]+) was not an allowed global", str(error))
        reason = (
            f"holds objects other than tensors and plain types ({unsafe[1] or unsafe[2]})"
            if unsafe
            else "is not a checkpoint or is damaged"
        )
        raise CheckpointError(f"{name} {reason}; nothing in it was run and it was not loaded") from error
    except CheckpointError:
        raise
    except Exception as error:  # what damaged files make the readers of four formats raise has no end
        raise CheckpointError(f"{name} is not a checkpoint or is damaged ({type(error).__name__})") from error


def _kind(path: Path) -> str:
    """npz, safetensors or torch, whatever the file is called."""
    with open(path, "rb") as file:
        head = file.read(9)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return "npz" if any(name.endswith(".npy") for name in archive.namelist()) else "torch"
    return (
        "safetensors"
        if path.suffix == ".safetensors" or head[8:] == b"{"
        else "npz"
        if path.suffix == ".npz"
        else "torch"
    )


def _download(url: str) -> Path:
    """The file of a URL; processes of one machine take turns, and only the first downloads."""
    file_name = url.split("?")[0].rsplit("/", 1)[-1]
    checksum = _checksum_in(file_name)
    folder = Path(torch.hub.get_dir(), "checkpoints", hashlib.sha256(url.encode()).hexdigest()[:16])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f".{file_name}.lock"):
            if not (folder / file_name).exists():
                torch.hub.download_url_to_file(url, str(folder / file_name), checksum, progress=sys.stderr.isatty())
    except RuntimeError as error:  # the checksum
        raise CheckpointError(f"{url} is not the file its name promises: {error}; it was not kept") from error
    except (OSError, ValueError, HTTPException) as error:
        raise CheckpointError(f"{url} could not be downloaded ({first_line(error)})") from error
    return folder / file_name


def _checksum_in(file_name: str) -> str | None:
    found = CHECKSUM.search(file_name)
    return found and (found[1] or found[2])


def _read_hub(name: str) -> dict:
    try:
        config, model, kwargs = load_model_config_from_hf(name[len(HUB[0]) :])
        weights = load_state_dict_from_hf(name[len(HUB[0]) :], weights_only=True)
    except Exception as error:  # the hub's client has many
        raise CheckpointError(f"{name} could not be loaded from the hub ({first_line(error)})") from error
    return _canonical(
        {
            "state_dict": weights,
            "args": {**config, "model": model, "input_size": config.get("input_size"), "model_kwargs": kwargs},
        },
        name,
    )


def _read_npz(path: Path) -> dict[str, Tensor]:
    """Google's ViT files (AugReg): timm's loader fills a ViT of the file's own shape."""
    with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
        prefix = "opt/target/" if "opt/target/embedding/kernel" in arrays else ""
        kernel, position = (
            arrays[f"{prefix}embedding/kernel"],
            arrays[f"{prefix}Transformer/posembed_input/pos_embedding"],
        )
        block = f"{prefix}Transformer/encoderblock_0/"
        heads = arrays[f"{block}MultiHeadDotProductAttention_1/query/kernel"].shape[1]
        hidden = arrays[f"{block}MlpBlock_3/Dense_0/kernel"].shape[1]
        classes = arrays[f"{prefix}head/bias"].shape[0] if f"{prefix}head/bias" in arrays else 0
        depth = len({match[1] for key in arrays if (match := re.search(r"encoderblock_(\d+)/", key))})
        unused = {key: torch.from_numpy(arrays[key]) for key in arrays if not NPZ_NAMES.fullmatch(key)}
    side = math.isqrt(position.shape[1] - 1) * kernel.shape[0]
    vit = VisionTransformer(
        img_size=side,
        patch_size=kernel.shape[0],
        in_chans=kernel.shape[2],
        embed_dim=kernel.shape[3],
        depth=depth,
        num_heads=heads,
        mlp_ratio=hidden / kernel.shape[3],
        num_classes=classes,
        weight_init="skip",
    )
    vit.load_pretrained(str(path))
    return {**vit.state_dict(), **unused}


def _canonical(raw: dict, name: str) -> dict:
    """Our layout: model, model_ema, args, and of our own checkpoints everything else."""
    if not isinstance(raw, dict):
        raise CheckpointError(f"{name} has no weights: it holds a {type(raw).__name__}")
    weights, ema = (
        next((raw[key] for key in keys if isinstance(raw.get(key), dict)), None)
        for keys in (("model", "state_dict"), ("model_ema", "state_dict_ema"))
    )
    if weights is None and ema is None and raw and all(isinstance(value, Tensor) for value in raw.values()):
        weights = raw
    if weights is None and ema is None:
        raise CheckpointError(
            f"{name} has no weights: no entry 'model' or 'state_dict', but {', '.join(map(str, list(raw)[:5])) or 'nothing'}"
        )
    state = {"model": _renamed(weights if weights is not None else ema, name), "model_ema": _renamed(ema, name)}
    if "versions" in raw:
        state = {**raw, **state, "args": raw.get("args") or {}}
    else:
        state |= {
            "args": _foreign_args(raw, state["model"], name),
            "foreign": True,
            **{key: raw[key] for key in ("optimizer", "epoch", "metric") if key in raw},
        }
    _check(state, name)
    return state


def _check(state: dict, name: str) -> None:
    """Raises: CheckpointError if an entry is of another type than every checkpoint has, or an option of the model would read something else."""
    for found, rules in ((state, ENTRIES), (state["args"], ARGS)):
        for entry, fits in rules.items():
            if entry in found and not fits(found[entry]):
                raise CheckpointError(f"{name} is not a checkpoint or is damaged: its entry '{entry}' makes no sense")
    if unsafe := NOT_OF_A_MODEL & set(state["args"].get("model_kwargs", {})):
        raise CheckpointError(
            f"{name} asks for the model option {', '.join(sorted(map(str, unsafe)))}, which is not one of a model; it was not loaded"
        )


def _renamed(weights: dict | None, file: str) -> dict | None:
    """Without the prefixes of DistributedDataParallel and torch.compile, and with KAT's names for FlashKAT's coefficients.

    Raises: CheckpointError for tensors that are not dense real numbers.
    """
    for name, value in (weights or {}).items():
        if isinstance(value, Tensor) and (
            value.layout is not torch.strided or value.device.type != "cpu" or value.is_quantized or value.is_complex()
        ):
            raise CheckpointError(f"{file} is not a checkpoint or is damaged: {name} is no plain tensor")
        if (
            isinstance(value, Tensor)
            and value.dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)
            and value.isnan().any()
        ):
            raise CheckpointError(f"{file} is of no use: {name} holds NaN")
    return weights and {
        re.sub(r"\.(numerator|denominator)_v$", r".weight_\1", re.sub(r"^(?:module\.|_orig_mod\.)+", "", name)): value
        for name, value in weights.items()
        if isinstance(value, Tensor)
    }


def _foreign_args(raw: dict, tensors: dict[str, Tensor], name: str) -> dict:
    theirs = raw.get("args")
    theirs = {
        "arch": raw.get("arch"),
        **(vars(theirs) if isinstance(theirs, argparse.Namespace) else theirs if isinstance(theirs, dict) else {}),
    }
    args = {own: value for key, own in FOREIGN_ARGS.items() if (value := theirs.get(key)) not in (None, "", {})}
    args = {key: list(value) if isinstance(value, tuple) else value for key, value in args.items()}
    if isinstance(args.get("input_size"), list):
        args["input_size"] = args["input_size"][-1] if args["input_size"] else None
    args = {key: value for key, value in args.items() if ARGS.get(key, bool)(value)}
    if "model" not in args:
        args |= {"model": found} if (found := model_in(name)) else {}
    if "input_size" not in args:
        args |= {"input_size": found} if (found := _implied_size(tensors)) else {}
    return args


def _implied_size(tensors: dict[str, Tensor]) -> int | None:
    """Side of the square images that a position embedding is for, pixels."""
    position, patch = tensors.get("pos_embed"), tensors.get("patch_embed.proj.weight")
    if position is None or patch is None or position.ndim != 3 or patch.ndim != 4:
        return None
    patches = position.shape[1] - prefix_tokens(tensors)
    return math.isqrt(patches) * patch.shape[-1] if _is_square(patches) else None


def model_in(source: str) -> str | None:
    """The model that a file name begins with: deit_tiny_patch16_224 of deit_tiny_patch16_224-a1311bcf.pth, or that KAT published under it."""
    file_name = os.path.basename(source)
    published = [
        name.split(".")[0]
        for name, cfg in kat_cfgs.items()
        for tag in cfg.cfgs.values()
        if tag.url and tag.url.endswith(f"/{file_name}")
    ]
    return next(iter(published), None) or max(
        (name for name in timm.list_models() if file_name.startswith(name)), key=len, default=None
    )


def prefix_tokens(weights: dict[str, Tensor]) -> int:
    """Positions in front of those of the patches: of class, distillation and register tokens, unless the model gives them none."""
    positions = weights["pos_embed"].shape[1]
    tokens = sum(weights[name].shape[1] for name in ("cls_token", "dist_token", "reg_token") if name in weights)
    return 0 if _is_square(positions) and not _is_square(positions - tokens) else tokens


def _is_square(n: int) -> bool:
    return n > 0 and math.isqrt(n) ** 2 == n
