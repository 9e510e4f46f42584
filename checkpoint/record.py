"""What a checkpoint holds, whatever the layout of its file."""

from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor

from utils import UserError


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, unsafe or of another model."""


@dataclass
class Progress:
    """How far a training has come, apart from the weights.

    Args:
        epoch: the last finished one, counted from 0.
        updates: optimizer steps so far.
        schedule: state of a plateau schedule.
        best: accuracy in per cent, "raw" or "EMA" weights, and their epoch.
        rng: states of the random generators, one for each process.
        entry: the line of log.txt for the epoch.
        evaluated: False if the evaluation of the epoch failed, and is what a resumed run begins with.
    """

    optimizer: dict[str, Any]
    epoch: int
    updates: int = 0
    schedule: dict[str, Any] = field(default_factory=dict)
    scaler: dict[str, Any] = field(default_factory=dict)
    best: dict[str, Any] = field(default_factory=dict)
    rng: list[dict] = field(default_factory=list)
    entry: dict[str, Any] = field(default_factory=dict)
    evaluated: bool = True

    @classmethod
    def from_entries(cls, entries: dict[str, Any]) -> "Progress | None":
        """From the entries of a file, None if they do not include an optimizer and an epoch."""
        found = {f.name: entries[f.name] for f in fields(cls) if entries.get(f.name) is not None}
        return cls(**found) if found.get("optimizer") and "epoch" in found else None


@dataclass
class Checkpoint:
    """Weights of a model, and what the file says about the model and its training.

    Args:
        source: path, URL or hub name of the file.
        weights, ema: the raw weights, and their moving average where the file has one.
        model: timm's name of the model, None if the file does not say it.
        model_options: the options that built the model, see model_factory.py.
        settings: arguments of main.py, which become the defaults of a command that uses the checkpoint.
        classes: names of the classes, in the order of the outputs.
        foreign: the file was written by another trainer, or holds bare weights.
        progress: the state of the training, None for weights alone.
    """

    source: str
    weights: dict[str, Tensor]
    ema: dict[str, Tensor] | None = None
    model: str | None = None
    model_options: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    classes: list[str] | None = None
    foreign: bool = False
    progress: Progress | None = None

    def release(self) -> None:
        """Drop all tensors, whose memory a training needs."""
        self.weights, self.ema, self.progress = {}, None, None

    @property
    def known_best(self) -> str | None:
        """Which weights, "raw" or "EMA", were the best so far in the epoch of the file; None if it does not say."""
        progress = self.progress
        return progress.best.get("weights") if progress and progress.best.get("epoch") == progress.epoch else None

    def choose(self, use_ema: bool | None) -> tuple[dict[str, Tensor], str]:
        """Raw or EMA weights, and which of them.

        By default those that were better in the epoch of the file, if it says so, else the EMA if there is one.
        Raises: CheckpointError if the EMA is asked for and there is none.
        """
        if use_ema is None:
            use_ema = self.ema is not None and self.known_best != "raw"
        if use_ema and self.ema is None:
            raise CheckpointError("--use-ema: the checkpoint holds no averaged weights")
        return (self.ema, "EMA") if use_ema else (self.weights, "raw")
