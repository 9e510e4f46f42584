"""Checkpoints: written whole or not at all, plain tensors and plain types only, loaded without running any code in them.

A checkpoint is one dictionary: model, model_ema, optimizer, scaler, epoch (the last one finished), updates (optimizer steps so far),
schedule, best (accuracy, which weights, epoch), rng (one state per process), args, versions, classes.
"""
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import torch
from torch import nn

import utils
from arguments import Arguments
from engine import Training
from utils import UserError, World, sync_directory, write_atomically

LAST, BEST = "checkpoint.pth", "best_checkpoint.pth"


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, unsafe or of another model."""


def save(folder: Path, state: dict, is_best: bool, keep_as: str | None = None) -> None:
    """Write `state` as checkpoint.pth; the same file becomes best_checkpoint.pth and `keep_as` where asked.

    Raises: CheckpointError if the disk refuses; the earlier files are then untouched.
    """
    try:
        write_atomically(folder / LAST, lambda file: torch.save(state, file))
        for name in ([BEST] if is_best else []) + ([keep_as] if keep_as else []):
            _link(folder / LAST, folder / name)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        raise CheckpointError(f"cannot write a checkpoint into {folder} ({error}); the previous one is untouched") from error


def _link(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`: a hard link costs nothing; where there are none, a copy."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)
    sync_directory(target.parent)


def load(path: str | Path) -> dict:
    """The dictionary of a checkpoint on the CPU. Nothing in the file is executed.

    Raises: CheckpointError, one sentence, for a file that is missing, cut short, or holds more than tensors and plain types.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = "holds objects other than tensors and plain types" if "GLOBAL" in str(error) else "is not a checkpoint or is damaged"
        raise CheckpointError(f"{path} {reason}; it was not loaded") from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path} is not a checkpoint or is damaged ({type(error).__name__})") from error
    if not isinstance(state, dict) or "model" not in state:
        raise CheckpointError(f"{path} has no entry 'model'")
    return state


def find(resume: str, output_dir: str) -> Path | None:
    """Path of the checkpoint that `--resume PATH|auto` means; None for auto where there is none yet."""
    if resume != "auto":
        return Path(resume) if resume else None
    path = Path(output_dir) / LAST
    return path if path.is_file() else None


def load_weights(model: nn.Module, weights: dict[str, torch.Tensor], source: str | Path) -> None:
    """Load all weights or none.

    Raises: CheckpointError naming the first tensors that are missing, unknown or of another shape.
    """
    own = model.state_dict()
    faults = [f"{name} is missing" for name in own if name not in weights]
    faults += [f"{name} is unknown to the model" for name in weights if name not in own]
    faults += [f"{name} has shape {tuple(weights[name].shape)} instead of {tuple(own[name].shape)}"
               for name in own if name in weights and weights[name].shape != own[name].shape]
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise CheckpointError(f"{source} does not fit the model: {'; '.join(faults[:3])}{more}")
    model.load_state_dict(weights)


def state_of(training: Training, epoch: int, rng: list, classes: list[str], args: Arguments) -> dict:
    plateau = getattr(training.scheduler, "lr_scheduler", None)
    return {"model": training.model.state_dict(), "model_ema": training.ema.module.state_dict() if training.ema else None,
            "optimizer": training.optimizer.state_dict(), "schedule": plateau.state_dict() if plateau else {},
            "scaler": training.scaler.state_dict(), "epoch": epoch, "updates": training.updates, "best": training.best, "rng": rng,
            "args": args.plain(), "versions": utils.versions(), "classes": classes}


def restore(training: Training, checkpoint: dict, args: Arguments, world: World) -> int:
    """Put a training back where the checkpoint left it (the model's weights are loaded already); the epoch to go on with."""
    if checkpoint.get("args", {}).get("opt", args.opt) != args.opt:
        raise CheckpointError(f"{args.resume} was trained with --opt {checkpoint['args']['opt']}: its state does not fit --opt {args.opt}")
    missing = [k for k in ("optimizer", "epoch", "rng", "updates", "best") if k not in checkpoint]
    if missing:
        raise CheckpointError(f"{args.resume} holds weights but no training to resume ({', '.join(missing)} missing)")
    wanted = [{k: v for k, v in group.items() if k != "params" and (k != "lr" or args.sched != "plateau")} for group in training.optimizer.param_groups]
    try:
        training.optimizer.load_state_dict(checkpoint["optimizer"])
    except ValueError as error:
        raise CheckpointError(f"the optimizer in {args.resume} is not --opt {args.opt} on this model: {error}") from error
    for group, own in zip(training.optimizer.param_groups, wanted):  # what this command line says, not what the file did
        group.update(own)
    if checkpoint["scaler"]:
        training.scaler.load_state_dict(checkpoint["scaler"])
    training.updates, training.best, start = checkpoint["updates"], checkpoint["best"], checkpoint["epoch"] + 1
    if training.ema is not None:
        load_weights(training.ema.module, checkpoint["model_ema"] or checkpoint["model"], args.resume)
    if checkpoint["schedule"] and hasattr(training.scheduler, "lr_scheduler"):
        training.scheduler.lr_scheduler.load_state_dict(checkpoint["schedule"])
    elif training.scheduler is not None:
        training.scheduler.step(start)
        training.scheduler.step_update(training.updates)
    if len(checkpoint["rng"]) == world.world_size:
        utils.set_rng_state(checkpoint["rng"][world.rank], world.device)
    else:
        utils.seed_everything(args.seed + world.rank + 1000 * start)
        world.log(f"note: the checkpoint is of {len(checkpoint['rng'])} process(es), this run has {world.world_size}: random states start anew")
    world.log(f"resumed after epoch {start} from {args.resume}")
    return start
