"""Checkpoints of a training: written whole or not at all, plain tensors and plain types only. weights.py reads them.

A checkpoint is one dictionary: model, model_ema, optimizer, scaler, epoch (the last one finished), updates (optimizer steps so far),
schedule, best (accuracy, which weights, epoch), rng (one state per process), args, versions, classes.
"""

import os
import shutil
from pathlib import Path

import torch
from torch import Tensor

import utils
from arguments import Arguments
from engine import Training
from models.load import load_all
from utils import World, sync_directory, write_atomically
from weights import CheckpointError

LAST, BEST = "checkpoint.pth", "best_checkpoint.pth"


def save(folder: Path, state: dict, is_best: bool, keep_as: str | None = None) -> None:
    """Write `state` as checkpoint.pth; the same file becomes best_checkpoint.pth and `keep_as` where asked.

    Raises: CheckpointError if the disk refuses; the earlier files are then untouched.
    """
    try:
        write_atomically(folder / LAST, lambda file: torch.save(state, file))
        for name in ([BEST] if is_best else []) + ([keep_as] if keep_as else []):
            _link(folder / LAST, folder / name)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        free = shutil.disk_usage(folder).free >> 20
        raise CheckpointError(
            f"cannot write a checkpoint into {folder}, where {free} MiB are free ({utils.first_line(error)}); an earlier one is "
            "untouched"
        ) from error


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


def find(resume: str, output_dir: str) -> str | Path | None:
    """Path, URL or hub name of the checkpoint that `--resume FILE|auto` means; None for auto where there is none yet."""
    if resume != "auto":
        return resume or None
    path = Path(output_dir) / LAST
    return path if path.is_file() else None


def state_of(training: Training, epoch: int, rng: list, classes: list[str], args: Arguments) -> dict:
    plateau = getattr(training.scheduler, "lr_scheduler", None)
    return {
        "model": training.model.state_dict(),
        "model_ema": training.ema.module.state_dict() if training.ema else None,
        "optimizer": training.optimizer.state_dict(),
        "schedule": plateau.state_dict() if plateau else {},
        "scaler": training.scaler.state_dict(),
        "epoch": epoch,
        "updates": training.updates,
        "best": training.best,
        "rng": rng,
        "args": args.plain(),
        "versions": utils.versions(),
        "classes": classes,
    }


def restore(training: Training, checkpoint: dict, updates_per_epoch: int, args: Arguments, world: World) -> int:
    """Put a training back where the checkpoint left it (the model's weights are loaded already); the epoch to go on with.

    Of DeiT's, KArAt's, timm's and KAT's trainers: weights, averaged weights, optimizer and epoch; they keep no random states.
    """
    if checkpoint.get("args", {}).get("opt", args.opt) != args.opt:
        raise CheckpointError(
            f"{args.resume} was trained with --opt {checkpoint['args']['opt']}: its state does not fit --opt {args.opt}"
        )
    missing = [
        k for k in ("optimizer", "epoch") if not isinstance(checkpoint.get(k), (dict, int)) or checkpoint[k] == {}
    ]
    if missing:
        raise CheckpointError(
            f"{args.resume} holds weights but no training to resume ({', '.join(missing)} missing); --finetune starts one from them"
        )
    if checkpoint.get("foreign"):
        metric = checkpoint.get("metric")
        which = "EMA" if checkpoint["model_ema"] else "raw"
        best = (
            {"accuracy": metric, "weights": which, "epoch": checkpoint["epoch"]}
            if isinstance(metric, float)
            else training.best
        )
        checkpoint |= {
            "optimizer": _renumbered(training, checkpoint, args),
            "updates": (checkpoint["epoch"] + 1) * updates_per_epoch,
            "scaler": {},
            "schedule": {},
            "best": best,
            "rng": [],
        }
    wanted = [
        {k: v for k, v in group.items() if k != "params" and (k != "lr" or args.sched != "plateau")}
        for group in training.optimizer.param_groups
    ]
    try:
        training.optimizer.load_state_dict(checkpoint["optimizer"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        differ = [
            f"--{k.replace('_', '-')}"
            for k in ("decay_rational", "attn_only", "weight_decay", "attn_lr")
            if checkpoint["args"].get(k, getattr(args, k)) != getattr(args, k)
        ]
        because = f"{', '.join(differ)} differ from its own" if differ else utils.first_line(error)
        raise CheckpointError(
            f"the state of the optimizer in {args.resume} does not fit this training: {because}"
        ) from error
    for group, own in zip(
        training.optimizer.param_groups, wanted
    ):  # what this command line says, not what the file did
        group.update(own)
    if checkpoint["scaler"]:
        training.scaler.load_state_dict(checkpoint["scaler"])
    training.updates, training.best, start = checkpoint["updates"], checkpoint["best"], checkpoint["epoch"] + 1
    if training.ema is not None:
        load_all(training.ema.module, checkpoint["model_ema"] or checkpoint["model"], args.resume)
    if checkpoint["schedule"] and hasattr(training.scheduler, "lr_scheduler"):
        training.scheduler.lr_scheduler.load_state_dict(checkpoint["schedule"])
    elif training.scheduler is not None:
        training.scheduler.step(start)
        training.scheduler.step_update(training.updates)
    if len(checkpoint["rng"]) == world.world_size:
        utils.set_rng_state(checkpoint["rng"][world.rank], world.device)
    else:
        utils.seed_everything(args.seed + world.rank + 1000 * start)
        of = (
            f"is of {len(checkpoint['rng'])} process(es), this run has {world.world_size}"
            if checkpoint["rng"]
            else "has no random states"
        )
        world.log(f"note: the checkpoint {of}: they start anew")
    world.log(f"resumed after epoch {start} from {args.resume}")
    return start


def _renumbered(training: Training, checkpoint: dict, args: Arguments) -> dict:
    """The state of an optimizer of timm's or DeiT's trainer, in the order that the parameters have here.

    Optimizers number parameters without naming them: first those without weight decay, in the order of the model, then the others.
    """
    try:
        theirs, state = (
            [len(group["params"]) for group in checkpoint["optimizer"]["param_groups"]],
            checkpoint["optimizer"]["state"],
        )
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"the optimizer in {args.resume} is none of torch's") from error
    frozen = set(training.model.no_weight_decay()) if hasattr(training.model, "no_weight_decay") else set()
    parameters = {name: p for name, p in training.model.named_parameters() if p.requires_grad}
    ordered = [name for name in checkpoint["model"] if name in parameters]
    plain = [name for name in ordered if parameters[name].ndim <= 1 or name.endswith(".bias") or name in frozen]
    names = ordered if len(theirs) == 1 else plain + [name for name in ordered if name not in plain]
    if sum(theirs) != len(names) or (len(theirs) > 1 and theirs != [len(plain), len(ordered) - len(plain)]):
        raise CheckpointError(
            f"the optimizer in {args.resume} has groups of {theirs} parameters, which are not those of {args.model}; "
            "--finetune takes its weights alone"
        )
    number = {name: index for index, name in enumerate(names)}
    own_names = {id(p): name for name, p in parameters.items()}
    own = training.optimizer.state_dict()
    order = [own_names[id(p)] for group in training.optimizer.param_groups for p in group["params"]]
    own["state"] = {index: state[number[name]] for index, name in enumerate(order) if number[name] in state}
    for index, values in own["state"].items():
        if any(isinstance(v, Tensor) and v.ndim and v.shape != parameters[order[index]].shape for v in values.values()):
            raise CheckpointError(
                f"the optimizer in {args.resume} does not fit {order[index]} of {args.model}; --finetune takes its weights alone"
            )
    return own
