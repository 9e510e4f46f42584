"""Keep a training in checkpoints that are written whole or not at all, and put it back where a checkpoint left it."""

import os
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import utils
from engine import Training
from utils import World, sync_directory, write_atomically

from .fill import load_all
from .read import BEST, LAST
from .record import Checkpoint, CheckpointError, Progress


def save(folder: Path, state: dict, is_best: bool, keep_as: str | None = None) -> None:
    """Write `state` as checkpoint.pth; the same file becomes best_checkpoint.pth and `keep_as` where asked.

    Where a kill comes between the files, `complete` or the next save of the epoch makes up for it.
    Raises: CheckpointError if the disk refuses; the earlier files are then untouched.
    """
    try:
        first, *others = filter(None, (keep_as, LAST, is_best and BEST))
        write_atomically(folder / first, lambda file: torch.save(state, file))
        for name in others:
            _link(folder / first, folder / name)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        raise _cannot_save(folder, error) from error


def complete(folder: Path, checkpoint: Checkpoint) -> None:
    """Make a resumed checkpoint best_checkpoint.pth where it is the best of its training.

    The training may have been killed after checkpoint.pth was written and before best_checkpoint.pth was.
    Raises: CheckpointError if the disk refuses.
    """
    source, best = Path(checkpoint.source), folder / BEST
    if not checkpoint.known_best or checkpoint.foreign or not source.is_file():
        return
    try:
        if not (best.exists() and best.samefile(source)):
            _link(source, best)
    except OSError as error:
        raise _cannot_save(folder, error) from error


def _cannot_save(folder: Path, error: Exception) -> CheckpointError:
    free = shutil.disk_usage(folder).free >> 20
    return CheckpointError(
        f"cannot write a checkpoint into {folder}, where {free} MiB are free ({utils.first_line(error)}); an earlier "
        "one is untouched"
    )


def _link(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`: a hard link, which costs nothing, or a copy where links do not exist."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        with open(source, "rb") as file:
            write_atomically(target, lambda copy: shutil.copyfileobj(file, copy))
        return
    os.replace(temporary, target)
    sync_directory(target.parent)


def state_of(training: Training, entry: dict, rng: list, classes: list[str], args: dict[str, Any]) -> dict:
    """What a checkpoint file holds, see layouts.py."""
    plateau = getattr(training.scheduler, "lr_scheduler", None)
    return {
        "model": training.model.state_dict(),
        "model_ema": training.ema.module.state_dict() if training.ema else None,
        "optimizer": training.optimizer.state_dict(),
        "schedule": plateau.state_dict() if plateau else {},
        "scaler": training.scaler.state_dict(),
        "epoch": entry["epoch"],
        "entry": entry,
        "updates": training.updates,
        "best": training.best,
        "rng": rng,
        "args": args,
        "versions": utils.versions(),
        "classes": classes,
    }


def restore(training: Training, checkpoint: Checkpoint, updates_per_epoch: int, args: Namespace, world: World) -> int:
    """Put a training back where the checkpoint left it, and return the epoch to go on with.

    The weights of the model are loaded already. Checkpoints of DeiT's, KArAt's, timm's and KAT's trainers have weights,
    averaged weights, optimizer and epoch, but no random states.
    Raises: CheckpointError if the checkpoint does not fit the training.
    """
    progress, settings = checkpoint.progress, checkpoint.settings
    if settings.get("opt", args.opt) != args.opt:
        raise CheckpointError(
            f"{checkpoint.source} was trained with --opt {settings['opt']}: its state does not fit --opt {args.opt}"
        )
    if progress is None:
        raise CheckpointError(
            f"{checkpoint.source} holds weights but no training to resume (optimizer and epoch are missing); "
            "--finetune starts one from them"
        )
    _restore_optimizer(training, checkpoint, args)
    start = progress.epoch + progress.evaluated
    training.unevaluated = None if progress.evaluated else progress.entry
    # With another global batch an epoch has another number of updates: the schedule goes on from the same epoch.
    training.updates = (progress.epoch + 1) * updates_per_epoch
    if not checkpoint.foreign and progress.updates != training.updates:
        before = progress.updates // (progress.epoch + 1)
        world.log(
            f"note: an epoch has {updates_per_epoch} optimizer steps now and had {before}; the schedule goes on from "
            "the same epoch"
        )
    training.best = progress.best or training.best
    if training.ema is not None:
        load_all(training.ema.module, checkpoint.ema or checkpoint.weights, checkpoint.source)
    plateau = progress.schedule and getattr(training.scheduler, "lr_scheduler", None)
    if training.scheduler is not None and not plateau:
        training.scheduler.step(start)
        training.scheduler.step_update(training.updates)
    try:
        if progress.scaler:
            training.scaler.load_state_dict(progress.scaler)
        if plateau:
            plateau.load_state_dict(progress.schedule)
        _restore_rng(progress, start, args, world)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = f"scaler, schedule or random states are wrong: {utils.first_line(error)}"
        raise CheckpointError(f"{checkpoint.source} is damaged ({reason})") from error
    then = "" if progress.evaluated else ", whose evaluation follows"
    world.log(f"resumed after epoch {progress.epoch + 1} from {checkpoint.source}{then}")
    return start


def _restore_rng(progress: Progress, start: int, args: Namespace, world: World) -> None:
    if len(progress.rng) == world.world_size:
        utils.set_rng_state(progress.rng[world.rank], world.device)
        return
    utils.seed_everything(args.seed + world.rank + 1000 * start)
    processes = f"is of {len(progress.rng)} process(es) and this run has {world.world_size}"
    reason = processes if progress.rng else "has no random states"
    world.log(f"note: the checkpoint {reason}: the random generators are seeded again")


def _restore_optimizer(training: Training, checkpoint: Checkpoint, args: Namespace) -> None:
    """The state of the optimizer is the file's, its settings are those of this command line.

    A plateau schedule goes on with the rate of the file.
    """
    state = _renumbered(training, checkpoint, args) if checkpoint.foreign else checkpoint.progress.optimizer
    groups = training.optimizer.param_groups
    not_set = {"params", "lr"} if args.sched == "plateau" else {"params"}
    settings = [{k: v for k, v in group.items() if k not in not_set} for group in groups]
    try:
        training.optimizer.load_state_dict(state)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        flags = ("decay_rational", "attn_only", "weight_decay", "attn_lr")
        used = {flag: checkpoint.settings.get(flag, getattr(args, flag)) for flag in flags}
        differ = [f"--{flag.replace('_', '-')}" for flag in flags if used[flag] != getattr(args, flag)]
        reason = f"{', '.join(differ)} differ from its training" if differ else utils.first_line(error)
        raise CheckpointError(
            f"the state of the optimizer in {checkpoint.source} does not fit this training: {reason}"
        ) from error
    for group, setting in zip(training.optimizer.param_groups, settings):
        group.update(setting)


def _renumbered(training: Training, checkpoint: Checkpoint, args: Namespace) -> dict:
    """The state of an optimizer of timm's or DeiT's trainer, in the order that the parameters have here.

    Optimizers number parameters without naming them: first those without weight decay, in the order of the model, then
    the others.
    """
    try:
        sizes = [len(group["params"]) for group in checkpoint.progress.optimizer["param_groups"]]
        state = checkpoint.progress.optimizer["state"]
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"the optimizer in {checkpoint.source} is not one of torch's") from error
    no_decay = getattr(training.model, "no_weight_decay", set)()
    parameters = {name: p for name, p in training.model.named_parameters() if p.requires_grad}
    ordered = [name for name in checkpoint.weights if name in parameters]
    plain = [n for n in ordered if parameters[n].ndim <= 1 or n.endswith(".bias") or n in no_decay]
    groups = [ordered] if len(sizes) == 1 else [plain, [name for name in ordered if name not in plain]]
    if sizes != [len(group) for group in groups]:
        raise CheckpointError(
            f"the optimizer in {checkpoint.source} has groups of {sizes} parameters, which are not those of "
            f"{args.model}; --finetune takes its weights alone"
        )
    states = {}
    for i, name in enumerate(sum(groups, [])):
        values, p = state.get(i, {}), parameters[name]
        if any(isinstance(v, Tensor) and v.ndim and v.shape != p.shape for v in values.values()):
            raise CheckpointError(
                f"the optimizer in {checkpoint.source} does not fit {name} of {args.model}; --finetune takes its "
                "weights alone"
            )
        if values:
            states[p] = values
    order = [p for group in training.optimizer.param_groups for p in group["params"]]
    renumbered = {i: states[p] for i, p in enumerate(order) if p in states}
    return {**training.optimizer.state_dict(), "state": renumbered}
