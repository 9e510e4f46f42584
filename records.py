"""Records of a run: log.txt, speed.txt, args.json, curves.png, Weights & Biases."""

import itertools
import json
import os
import random
import sys
import time
from pathlib import Path

from arguments import Arguments
from run_folder import RunFolder
from utils import versions, write_atomically


class Records:
    """Files of a run in its output folder (if it has one), and its Weights & Biases log; only rank 0 writes them.

    The folder is this run's until `close`.
    log.txt has one JSON object per epoch, equal for two runs of the same seed; speed.txt the times; args.json the
    arguments, the command and versions; curves.png loss and accuracy over the epochs.
    With the entry `last` of a checkpoint, the run in the folder continues: its entries from `start_epoch` on are
    dropped, and `last` is added where a kill came between the checkpoint and log.txt. None starts a fresh run.
    """

    def __init__(self, folder: Path | None, start_epoch: int, args: Arguments, last: dict | None) -> None:
        self.folder, self.held = folder, RunFolder(folder) if folder else None
        self.entries, self.plotted = [], time.monotonic()
        if folder:
            about = {"args": args.plain(), "command": sys.argv, "versions": versions()}
            self.held.prepare(about, fresh=last is None)
            self.entries = _keep(folder / "log.txt", start_epoch, last)
            _keep(folder / "speed.txt", start_epoch)
        state = random.getstate()  # W&B may draw from this generator.
        self.wandb = start_wandb(args, folder) if args.run_name else None
        random.setstate(state)

    def add(self, entry: dict, speed: dict) -> None:
        self.entries.append(entry)
        if self.folder:
            for name, values in (("log.txt", entry), ("speed.txt", {"epoch": entry["epoch"], **speed})):
                with open(self.folder / name, "a") as file:
                    file.write(json.dumps(values) + "\n")
            if time.monotonic() - self.plotted >= 30:
                plot_curves(self.entries, self.folder / "curves.png")
                self.plotted = time.monotonic()
        self._tell_wandb("log", {**entry, **speed}, step=entry["epoch"])

    def close(self) -> None:
        if self.folder and self.entries:
            plot_curves(self.entries, self.folder / "curves.png")
        self._tell_wandb("finish")
        if self.held:
            self.held.close()

    def _tell_wandb(self, method: str, *args, **kwargs) -> None:
        if self.wandb:
            try:
                getattr(self.wandb, method)(*args, **kwargs)
            except Exception as error:  # No fault of the logger may stop the training.
                reason = f"{type(error).__name__}: {error}"
                print(f"Weights & Biases {method} failed ({reason}); continuing without it.", flush=True)
                self.wandb = None


def _keep(path: Path, start_epoch: int, last: dict | None = None) -> list[dict]:
    """Drop the entries of a file from `start_epoch` on, and a last line that a crash cut short; returns the others.

    The entry `last` of the epoch before is added where it is missing. A damaged file is kept under another name.
    """
    *lines, cut = path.read_bytes().split(b"\n") if path.exists() else [b""]
    entries = [entry for entry in map(_entry_of, lines) if entry]
    if len(entries) < len(lines):
        names = (path.with_name(f"{path.name}.damaged-{n}") for n in itertools.count(1))
        aside = next(name for name in names if not name.exists())
        path.rename(aside)
        print(f"{path} is damaged: kept as {aside.name}; its readable lines are in the new {path.name}", flush=True)
    kept = [entry for entry in entries if entry["epoch"] < start_epoch]
    if last and last.get("epoch") == start_epoch - 1 and last["epoch"] not in [entry["epoch"] for entry in kept]:
        kept.append(last)
    write_atomically(path, lambda file: file.write("".join(json.dumps(entry) + "\n" for entry in kept).encode()))
    return kept


def _entry_of(line: bytes) -> dict | None:
    try:
        entry = json.loads(line)
        return entry if isinstance(entry["epoch"], int) else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def start_wandb(args: Arguments, folder: Path | None):
    """A Weights & Biases run: offline without network or login, None without the package; a line says so."""
    try:
        import wandb
    except ImportError:
        print("wandb is not installed (pip install wandb): this run is logged to its output folder only.", flush=True)
        return None
    options = dict(
        project=args.wandb_project,
        name=args.run_name,
        id=args.run_id or None,
        resume="allow" if args.run_id else None,
        config=args.plain(),
        dir=folder,
    )
    modes = (os.environ.get("WANDB_MODE") or "online offline").split()
    for mode in modes:
        try:
            if mode == "online" and not (os.environ.get("WANDB_API_KEY") or wandb.api.api_key):
                raise RuntimeError("no login")
            return wandb.init(mode=mode, settings=wandb.Settings(init_timeout=30), **options)
        except Exception as error:  # No fault of the logger may stop the training.
            then = "logging offline (wandb sync uploads it)" if mode != modes[-1] else "continuing without it"
            print(f"Weights & Biases {mode} failed ({type(error).__name__}: {error}); {then}.", flush=True)
    return None


def plot_curves(entries: list[dict], path: Path) -> None:
    """Training and validation loss, and top-1 accuracy of raw and EMA weights, against the epoch."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("matplotlib is not installed (pip install matplotlib): no curves.png.", flush=True)
        return
    figure = Figure(figsize=(10, 4), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    losses = {"train_loss": "train (augmented)", "test_loss": "validation", "test_ema_loss": "validation, EMA"}
    for axis, names in ((loss, losses), (accuracy, {"test_acc1": "raw weights", "test_ema_acc1": "EMA weights"})):
        for key, label in names.items():
            points = [(e["epoch"] + 1, e[key]) for e in entries if key in e]
            if points:
                axis.plot(*zip(*points), marker=".", label=label)
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.3)
        axis.xaxis.get_major_locator().set_params(integer=True)
        if axis.lines:
            axis.legend()
    loss.set_ylabel("loss per image")
    accuracy.set_ylabel("validation top-1 (%)")
    write_atomically(path, lambda f: figure.savefig(f, format="png", dpi=120))
