"""One epoch of training, and evaluation."""

import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from timm.models import model_parameters
from timm.utils import ModelEmaV3, dispatch_clip_grad
from torch import Tensor, nn

from groups import GradNorms
from losses import DistillationLoss
from utils import World


class NonFiniteLoss(Exception):
    """The training loss became NaN or infinite; the message names rank, epoch and step."""


@dataclass
class Training:
    """What a training run moves forward. `forward` is `model`, possibly compiled and distributed around it."""

    model: nn.Module
    forward: nn.Module
    criterion: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: object
    scaler: torch.amp.GradScaler
    num_classes: int
    amp: str  # bf16, fp16 or off
    ema: ModelEmaV3 | None = None
    mixup: object = None
    grad_norms: GradNorms | None = None
    updates: int = 0  # optimizer steps so far
    best: dict = field(default_factory=lambda: {"accuracy": -1.0, "weights": "", "epoch": -1})


def autocast(device: torch.device, amp: str):
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(amp)
    return torch.autocast(device.type, dtype) if dtype else nullcontext()


def train_one_epoch(run: Training, loader, epoch: int, epochs: int, args, world: World) -> tuple[dict, dict]:
    """Train on every batch of `loader` once; its images come normalised, and on the device.

    The device is only synchronised when something is logged: losses are summed there, and the first step with a NaN or infinite loss
    is remembered there and looked at by all processes together, at every log line and at the end of the epoch.

    Returns: ({train_loss: per image, over all processes; train_lr; with run.grad_norms their means over the steps},
        {train_seconds, images_per_second, ...} of all processes).
    Raises: NonFiniteLoss on every process.
    """
    run.forward.train(args.train_mode)
    run.criterion.train()
    device, steps = world.device, len(loader)
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    first_bad = torch.full((), -1, dtype=torch.long, device=device)
    images_seen, logged, start = 0, (0, 0.0, time.perf_counter()), time.perf_counter()
    title = f"epoch {epoch + 1}/{epochs}"
    bar = _progress_bar(steps, title) if world.is_main and sys.stdout.isatty() else None
    run.optimizer.zero_grad(set_to_none=True)
    if run.grad_norms is not None:
        run.grad_norms.reset()

    for step, (images, targets) in enumerate(loader):
        if run.mixup is not None:
            images, targets = run.mixup(images, targets)
        if args.cosub:
            images = torch.cat((images, images))
        if args.bce_loss:
            targets = _binary_targets(targets, run.num_classes)
        window = _accumulation_window(step, steps, args.grad_accum_steps)
        is_update = (step + 1) % args.grad_accum_steps == 0 or step + 1 == steps
        with nullcontext() if is_update or world.world_size == 1 else run.forward.no_sync():
            with autocast(device, run.amp):
                outputs = run.forward(images)
                loss = _loss(run.criterion, images, outputs, targets)
            run.scaler.scale(loss / window).backward()
        loss = loss.detach()
        loss_sum += loss * len(targets)
        first_bad = torch.where((first_bad < 0) & ~torch.isfinite(loss), step, first_bad)
        images_seen += len(targets)
        if is_update:
            _update(run, args)
        if (step + 1) % args.print_freq == 0 or step + 1 == steps:
            _stop_if_not_finite(first_bad, epoch, world)
            now = images_seen, loss_sum.item(), time.perf_counter()
            images, losses, seconds = (new - old for new, old in zip(now, logged))
            logged = now
            message = (
                f"loss {losses / images:.4f} (mean {now[1] / images_seen:.4f})  lr {run.optimizer.param_groups[0]['lr']:.2e}  "
                f"{images * world.world_size / seconds:.0f} images/s"
            )
            if run.grad_norms is not None:
                message += "  grad norms " + "  ".join(
                    f"{kind} {norm:.2e}" for kind, norm in run.grad_norms.last().items()
                )
            if bar and step + 1 < steps:
                bar.update(step + 1 - bar.n)
                bar.set_postfix_str(message)
                continue
            if bar:
                bar.close()
            world.log(f"{title}  step {step + 1}/{steps}  {message}")
    total, count = world.all_sum(loss_sum.item(), images_seen)
    seconds = time.perf_counter() - start
    speed = {"train_seconds": round(seconds, 3), "images_per_second": round(count / seconds, 1)}
    if device.type == "cuda":
        speed["peak_memory_mib"] = torch.cuda.max_memory_allocated(device) >> 20
    entry = {"train_loss": total / count, "train_lr": run.optimizer.param_groups[0]["lr"]}
    if run.grad_norms is not None:
        entry |= {f"grad_norm_{kind}": norm for kind, norm in run.grad_norms.mean().items()}
    return entry, speed


def _update(run: Training, args) -> None:
    if run.scheduler is not None:
        run.scheduler.step_update(run.updates)  # acts only where the schedule counts updates
    if args.clip_grad is not None or run.grad_norms is not None:
        run.scaler.unscale_(run.optimizer)
    if run.grad_norms is not None:
        run.grad_norms.update()
    if args.clip_grad is not None:
        parameters = model_parameters(
            run.model, exclude_head=args.clip_mode == "agc"
        )  # adaptive clipping leaves out the head
        dispatch_clip_grad(parameters, args.clip_grad, mode=args.clip_mode)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    run.updates += 1
    if run.ema is not None:
        run.ema.update(run.model, step=run.updates)


def _loss(criterion: nn.Module, images: Tensor, outputs, targets: Tensor) -> Tensor:
    if isinstance(criterion, DistillationLoss):
        return criterion(images, outputs, targets)
    return criterion(outputs, targets)


def _binary_targets(targets: Tensor, num_classes: int) -> Tensor:
    """Multi-hot targets for the binary cross-entropy: every class that is mixed in counts fully (DeiT III)."""
    if targets.ndim == 1:
        targets = F.one_hot(targets, num_classes).float()
    return targets.gt(0.0).to(targets.dtype)


def _accumulation_window(step: int, steps: int, accumulate: int) -> int:
    """Number of batches in the optimizer step that `step` belongs to; the last one of an epoch may be shorter."""
    first = step // accumulate * accumulate
    return min(accumulate, steps - first)


def _stop_if_not_finite(first_bad: Tensor, epoch: int, world: World) -> None:
    steps = world.gather(first_bad.item())
    bad = {rank: step for rank, step in enumerate(steps) if step >= 0}
    if bad:
        where = ", ".join(f"rank {rank} at step {step + 1}" for rank, step in bad.items())
        raise NonFiniteLoss(f"the loss is not finite in epoch {epoch + 1}: {where}")


def _progress_bar(steps: int, title: str):
    from tqdm import tqdm

    return tqdm(total=steps, desc=title, leave=False, dynamic_ncols=True)


@torch.no_grad()
def evaluate(models: dict[str, nn.Module], loader, amp: str, world: World) -> dict[str, dict[str, float]]:
    """Evaluate models in one pass over the whole validation set: every image counts once, whatever the number of processes.

    Returns: for each model {acc1, acc5 (per cent; acc5 is the top-C accuracy where there are C < 5 classes), loss (mean cross-entropy
    per image), images}.
    """
    for model in models.values():
        model.eval()
    sums = torch.zeros(
        len(models), 3, dtype=torch.float64, device=world.device
    )  # loss, top-1 hits, top-5 hits of each model
    count = 0
    for images, targets in loader:
        for own_sums, model in zip(sums, models.values()):
            with autocast(world.device, amp):
                logits = model(images)
            logits = logits.float()
            loss = F.cross_entropy(logits, targets, reduction="none").double().sum()
            hits = logits.topk(min(5, logits.shape[1]), 1).indices.eq(targets[:, None])
            own_sums += torch.stack((loss, hits[:, 0].sum(), hits.sum()))
        count += len(targets)
    *totals, images = world.all_sum(*sums.flatten().tolist(), count)
    return {
        name: {"acc1": 100 * top1 / images, "acc5": 100 * top5 / images, "loss": loss / images, "images": int(images)}
        for name, loss, top1, top5 in zip(models, totals[::3], totals[1::3], totals[2::3])
    }
