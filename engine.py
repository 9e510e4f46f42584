"""One epoch of training, and evaluation."""

import time
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from timm.models import model_parameters
from timm.utils import ModelEmaV3, dispatch_clip_grad
from torch import Tensor, nn

from losses import DistillationLoss
from param_groups import GradNorms
from stopping import Stopped, requested
from utils import UserError, World


class NonFiniteLoss(Exception):
    """The training loss is NaN or infinite; the message names epoch, rank and step."""


@dataclass
class Training:
    """State of a training run. `forward` is `model`, where needed compiled and wrapped in DistributedDataParallel."""

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
    epochs: int = 0  # with the cool-down
    updates: int = 0  # optimizer steps so far
    unevaluated: dict | None = None  # results of a trained epoch whose evaluation comes first in a resumed run
    best: dict = field(default_factory=lambda: {"accuracy": -1.0, "weights": "", "epoch": -1})


def autocast(device: torch.device, amp: str):
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(amp)
    return torch.autocast(device.type, dtype) if dtype else nullcontext()


def train_one_epoch(run: Training, loader, epoch: int, epochs: int, args, world: World) -> tuple[dict, dict]:
    """Train once on every batch of `loader`, whose images are normalised and on the device.

    The host waits for the device only at log lines: the device sums the losses and remembers the first step with a NaN
    or infinite loss, which all processes check together at every log line and at the end of the epoch.

    Returns: ({train_loss: mean over the images of all processes; train_lr; with run.grad_norms the mean norms},
        {train_seconds, images_per_second, ...} of all processes).
    A signal stops the epoch before its last step: one process after the current step, several at their next log line.
    Raises: NonFiniteLoss or Stopped, on every process.
    """
    run.forward.train(args.train_mode)
    device, steps = world.device, len(loader)
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    first_bad = torch.full((), -1, dtype=torch.long, device=device)
    start = time.perf_counter()
    images_seen, logged = 0, (0, 0.0, start)
    title = f"epoch {epoch + 1}/{epochs}"
    run.optimizer.zero_grad(set_to_none=True)
    if run.grad_norms:
        run.grad_norms.reset()

    for step, (images, targets) in enumerate(loader):
        if run.mixup:
            images, targets = run.mixup(images, targets)
        if args.cosub:
            images = torch.cat((images, images))
        if args.bce_loss:
            targets = _binary_targets(targets, run.num_classes)
        is_last = step + 1 == steps
        is_update = is_last or (step + 1) % args.grad_accum_steps == 0
        with nullcontext() if is_update or world.world_size == 1 else run.forward.no_sync():
            with autocast(device, run.amp):
                outputs = run.forward(images)
                distils = isinstance(run.criterion, DistillationLoss)
                loss = run.criterion(*([images] if distils else []), outputs, targets)
            run.scaler.scale(loss / _accumulation_window(step, steps, args.grad_accum_steps)).backward()
        loss = loss.detach()
        loss_sum += loss * len(targets)
        first_bad = torch.where((first_bad < 0) & ~torch.isfinite(loss), step, first_bad)
        images_seen += len(targets)
        if is_update:
            _update(run, args)
        if world.world_size == 1 and not is_last:
            stop_if_requested(world)
        if is_last or (step + 1) % args.print_freq == 0:
            _stop_if_not_finite(first_bad, epoch, world)
            now = images_seen, loss_sum.item(), time.perf_counter()
            new_images, new_loss, seconds = (new - old for new, old in zip(now, logged))
            logged = now
            lr = run.optimizer.param_groups[0]["lr"]
            message = (
                f"loss {new_loss / new_images:.4f} (mean {now[1] / images_seen:.4f})  lr {lr:.2e}  "
                f"{new_images * world.world_size / seconds:.0f} images/s"
            )
            if run.grad_norms:
                norms = run.grad_norms.last().items()
                message += "  grad norms " + "  ".join(f"{kind} {norm:.2e}" for kind, norm in norms)
            world.log(f"{title}  step {step + 1}/{steps}  {message}")
            if not is_last:
                stop_if_requested(world)
    total, count = world.all_sum(loss_sum.item(), images_seen)
    seconds = time.perf_counter() - start
    speed = {"train_seconds": round(seconds, 3), "images_per_second": round(count / seconds, 1)}
    if device.type == "cuda":
        speed["peak_memory_mib"] = torch.cuda.max_memory_allocated(device) >> 20
    entry = {"train_loss": total / count, "train_lr": lr}  # The last step is always logged.
    if run.grad_norms:
        entry |= {f"grad_norm_{kind}": norm for kind, norm in run.grad_norms.mean().items()}
    return entry, speed


def _update(run: Training, args) -> None:
    if run.scheduler:
        run.scheduler.step_update(run.updates)  # no effect unless the schedule counts updates
    if args.clip_grad is not None or run.grad_norms:
        run.scaler.unscale_(run.optimizer)
    if run.grad_norms:
        run.grad_norms.update()
    if args.clip_grad is not None:
        # Adaptive gradient clipping excludes the classifier (Brock et al. 2021).
        parameters = model_parameters(run.model, exclude_head=args.clip_mode == "agc")
        dispatch_clip_grad(parameters, args.clip_grad, mode=args.clip_mode)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    run.updates += 1
    if run.ema:
        run.ema.update(run.model, step=run.updates)


def _binary_targets(targets: Tensor, num_classes: int) -> Tensor:
    """Multi-hot targets for binary cross-entropy: every class of a mixed image counts fully (DeiT III)."""
    if targets.ndim == 1:
        targets = F.one_hot(targets, num_classes).float()
    return targets.gt(0.0).to(targets.dtype)


def _accumulation_window(step: int, steps: int, accumulate: int) -> int:
    """Number of batches in the optimizer step that `step` belongs to; the last one of an epoch may have fewer."""
    first = step // accumulate * accumulate
    return min(accumulate, steps - first)


def stop_if_requested(world: World) -> None:
    """Raises: Stopped on every process if one of them has received a signal."""
    if number := max(world.gather(requested())):
        raise Stopped(number)


def _stop_if_not_finite(first_bad: Tensor, epoch: int, world: World) -> None:
    steps = world.gather(first_bad.item())
    bad = [f"rank {rank} at step {step + 1}" for rank, step in enumerate(steps) if step >= 0]
    if bad:
        raise NonFiniteLoss(f"the loss is not finite in epoch {epoch + 1}: {', '.join(bad)}")


@torch.no_grad()
def evaluate(
    models: dict[str, nn.Module], loader, amp: str, world: World, compiled: bool = False
) -> dict[str, dict[str, float]]:
    """Evaluate models in one pass over the validation set: every image counts once, for any number of processes.

    compiled: torch.compile the models. Weights are inputs of the compiled graph, so that all models of one architecture
    share it, in this call and in later ones; smaller batches are padded to the batch size that it is compiled for.
    The mode is always the default: CUDA graphs would keep another set of activations in memory for each model.

    Returns: for each model {acc1, acc5 (per cent; with C < 5 classes acc5 is the top-C accuracy), loss (mean
    cross-entropy per image), images}.
    Raises: on every process UserError if one of them cannot read an image, Stopped if one has received a signal.
    """
    forwards = []
    for model in models.values():
        model.eval()
        forwards.append(torch.compile(model, dynamic=False) if compiled else model)
    batch_size = loader.batch_sampler.batch_size if compiled else 0
    sums = torch.zeros(len(models), 3, dtype=torch.float64, device=world.device)  # loss, top-1 hits, top-5 hits
    count, fault = 0, None
    try:
        for images, targets in loader:
            if requested():
                break
            if len(images) < batch_size:
                images = torch.cat((images, images.new_zeros(batch_size - len(images), *images.shape[1:])))
            for model_sums, forward in zip(sums, forwards):
                with autocast(world.device, amp):
                    logits = forward(images)
                logits = logits[: len(targets)].float()
                loss = F.cross_entropy(logits, targets, reduction="none").double().sum()
                hits = logits.topk(min(5, logits.shape[1]), 1).indices.eq(targets[:, None])
                model_sums += torch.stack((loss, hits[:, 0].sum(), hits.sum()))
            count += len(targets)
    except UserError as error:  # A corrupt image stops all processes, not only the one that meets it.
        fault = error
    if sentence := next(filter(None, world.gather(fault and str(fault))), None):
        raise UserError(sentence) from fault
    stop_if_requested(world)
    *totals, total = world.all_sum(*sums.flatten().tolist(), count)
    return {
        name: {"acc1": 100 * top1 / total, "acc5": 100 * top5 / total, "loss": loss / total, "images": int(total)}
        for name, loss, top1, top5 in zip(models, totals[::3], totals[1::3], totals[2::3])
    }
