"""Read a checkpoint of any layout without running code from the file. No model is imported here."""

import argparse
import hashlib
import pathlib
import pickle
import re
import sys
import warnings
import zipfile
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from safetensors.torch import load_file
from timm.models import load_model_config_from_hf, load_state_dict_from_hf

from utils import first_line

from .layouts import read_npz, to_record
from .record import Checkpoint, CheckpointError

LAST, BEST = "checkpoint.pth", "best_checkpoint.pth"  # of a training, in its output folder
HUB = ("hf_hub:", "hf-hub:")
# The sha256 in a file name: its start after a dash, as torch.hub has it, or all of it, as KAT's files have it.
CHECKSUM = re.compile(r"(?:-(?=[0-9]*[a-f])([0-9a-f]{8,63})|[-_]([0-9a-f]{64}))\.\w+$")
# Types besides tensors and plain ones that trainers put into checkpoints. Rebuilding them runs no code of the file.
_SCALAR = np.float64(0).__reduce__()[0]  # rebuilds numpy's numbers
SAFE = [
    argparse.Namespace,
    *((pathlib.PosixPath, f"{module}.PosixPath") for module in ("pathlib", "pathlib._local")),
    np.dtype,
    *((_SCALAR, f"{module}.multiarray.scalar") for module in ("numpy.core", "numpy._core")),
    *(type(np.dtype(t)) for t in "fdilqb?"),
]


def read(source: str | Path) -> Checkpoint:
    """The checkpoint in a file, on the CPU.

    Readable are our checkpoints, those of DeiT, KArAt, KAT and timm, bare weights, safetensors and AugReg's .npz.

    Args:
        source: a path, an http(s) URL (kept in torch.hub's folder, and checked if its file name ends in the sha256) or
            hf_hub:USER/NAME.
    Raises: CheckpointError, one sentence, if the file is missing, cut short or holds more than tensors and plain types.
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
        return to_record(_read_file(path, name), name)
    except CheckpointError:
        if "://" in name:  # the next attempt downloads it again; another process may have deleted it already
            path.unlink(missing_ok=True)
        raise


def find(resume: str, output_dir: str) -> str | None:
    """Path, URL or hub name of the checkpoint that `--resume FILE|auto` means; None for auto if there is none yet."""
    if resume != "auto":
        return resume or None
    path = Path(output_dir) / LAST
    return str(path) if path.is_file() else None


def _read_file(path: Path, name: str) -> dict:
    try:
        kind = _kind(path)
        if kind == "npz":
            return {"model": read_npz(path), "args": {"mean": [0.5] * 3, "std": [0.5] * 3}}
        if kind == "safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(SAFE), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        unsafe = re.search(r"GLOBAL ([\w.]+)|([\w.]+) was not an allowed global", str(error))
        reason = (
            f"holds objects other than tensors and plain types ({unsafe[1] or unsafe[2]})"
            if unsafe
            else "is not a checkpoint or is damaged"
        )
        raise CheckpointError(f"{name} {reason}; nothing in it was run and it was not loaded") from error
    except Exception as error:  # a corrupt file can raise almost any exception in these readers
        raise CheckpointError(f"{name} is not a checkpoint or is damaged ({type(error).__name__})") from error


def _kind(path: Path) -> str:
    """npz, safetensors or torch, by the content of the file where it tells."""
    with open(path, "rb") as file:
        head = file.read(9)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return "npz" if any(name.endswith(".npy") for name in archive.namelist()) else "torch"
    if path.suffix == ".safetensors" or head[8:] == b"{":
        return "safetensors"
    return "npz" if path.suffix == ".npz" else "torch"


def _download(url: str) -> Path:
    """The file of a URL. The processes of one machine take turns, and only the first one downloads."""
    file_name = url.split("?")[0].rsplit("/", 1)[-1]
    checksum = _checksum_in(file_name)
    folder = Path(torch.hub.get_dir(), "checkpoints", hashlib.sha256(url.encode()).hexdigest()[:16])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f".{file_name}.lock"):
            if not (folder / file_name).exists():
                progress = sys.stderr.isatty()
                torch.hub.download_url_to_file(url, str(folder / file_name), checksum, progress=progress)
    except RuntimeError as error:  # the checksum does not match
        raise CheckpointError(f"{url} is not the file its name promises: {error}; it was not kept") from error
    except (OSError, ValueError, HTTPException) as error:
        raise CheckpointError(f"{url} could not be downloaded ({first_line(error)})") from error
    return folder / file_name


def _checksum_in(file_name: str) -> str | None:
    found = CHECKSUM.search(file_name)
    return found and (found[1] or found[2])


def _read_hub(name: str) -> Checkpoint:
    try:
        repository = name[len(HUB[0]) :]
        config, model, options = load_model_config_from_hf(repository)
        weights = load_state_dict_from_hf(repository, weights_only=True)
    except Exception as error:  # the client of the hub has many of its own
        raise CheckpointError(f"{name} could not be loaded from the hub ({first_line(error)})") from error
    settings = {**config, "model": model, "model_kwargs": options}
    return to_record({"state_dict": weights, "args": settings}, name)
