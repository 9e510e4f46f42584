"""Builds a training: batch size, optimizer, schedule, loss, mixing, compilation and weight averaging."""

import torch
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from arguments import Arguments, mixing
from engine import Training
from losses import CosubLoss, DistillationLoss
from model_factory import build_teacher
from param_groups import GradNorms, optimizer_groups
from utils import UserError, World, first_line


def fitting_batch_size(images: int, args: Arguments, world: World) -> int:
    """--batch-size, or fewer where a process has fewer images; an even number where mixup or cutmix needs pairs."""
    batch_size = min(args.batch_size, images)
    if mixing(args) and batch_size < args.batch_size:
        batch_size -= batch_size % 2
    if batch_size == 0:
        raise UserError(
            f"{images} training image(s) for each of {world.world_size} process(es) are too few"
            + (" for mixup and cutmix, which need pairs: pass --mixup 0 --cutmix 0" if mixing(args) and images else "")
        )
    if batch_size < args.batch_size:
        world.log(
            f"only {images} training images for each process: batch size {batch_size} instead of {args.batch_size}"
        )
    return batch_size


def build_training(model: nn.Module, steps: int, batch_size: int, amp: str, args: Arguments, world: World) -> Training:
    """The state of a run that has not started. steps: batches of an epoch in each process."""
    optimizer = build_optimizer(model, batch_size, args, world)
    scheduler, epochs = build_scheduler(optimizer, -(-steps // args.grad_accum_steps), args, world)
    mixup = None
    if mixing(args):
        mixup = Mixup(
            args.mixup,
            args.cutmix,
            args.cutmix_minmax,
            args.mixup_prob,
            args.mixup_switch_prob,
            args.mixup_mode,
            label_smoothing=0.0 if args.bce_loss else args.smoothing,
            num_classes=model.num_classes,
        )
    forward = torch.compile(model, mode=compile_mode(args, world)) if args.compile else model
    if world.world_size > 1:
        device_ids = [world.device.index] if world.device.type == "cuda" else None
        forward = DistributedDataParallel(forward, device_ids=device_ids)
    ema = None
    if args.model_ema:  # after DistributedDataParallel has given all processes the same weights
        fixed = args.model_ema_decay is not None
        ema = ModelEmaV3(
            model,
            decay=args.model_ema_decay if fixed else 0.99996,
            use_warmup=not fixed,
            device="cpu" if args.model_ema_force_cpu else None,
        )
    return Training(
        model,
        forward,
        build_criterion(model, args).to(world.device),
        optimizer,
        scheduler,
        torch.amp.GradScaler(world.device.type, enabled=amp == "fp16"),
        model.num_classes,
        amp,
        ema=ema,
        mixup=mixup,
        grad_norms=GradNorms(model) if args.log_grad_norms else None,
        epochs=epochs,
    )


def build_optimizer(model: nn.Module, batch_size: int, args: Arguments, world: World) -> torch.optim.Optimizer:
    global_batch = batch_size * world.world_size * args.grad_accum_steps
    factor = 1 if args.unscale_lr else global_batch / 512
    lr, ratio = args.lr * factor, None if args.attn_lr is None else args.attn_lr / args.lr
    scaling = f"base {args.lr:g} x {global_batch} / 512"
    if args.unscale_lr:
        style = ", as in timm's and KAT's scripts, because the data folder comes first" if args.timm_style else ""
        scaling = "not scaled" + style
    world.log(
        f"learning rate {lr:g} ({scaling}; global batch {global_batch} = {batch_size} images x {world.world_size} "
        f"processes x {args.grad_accum_steps} accumulated)"
        + ("" if ratio is None else f"; of the operators {lr * ratio:g}")
    )
    groups = optimizer_groups(model, args.weight_decay, args.decay_rational, ratio)
    options = optimizer_kwargs(args) | {"lr": lr, "weight_decay": 0.0}  # Each group has its decay.
    if args.opt == "adamw" and world.device.type == "cuda":
        options["fused"] = True
    try:
        return create_optimizer_v2(groups, **options)
    except (AssertionError, ImportError, IndexError, ValueError) as error:  # a missing package or GPU; --opt-* values
        raise UserError(f"--opt {args.opt} cannot be used: {first_line(error)}") from error


def build_scheduler(
    optimizer: torch.optim.Optimizer, updates_per_epoch: int, args: Arguments, world: World
) -> tuple[object, int]:
    """The scheduler (None without a schedule) and the number of epochs, cool-down included; sets the first rate."""
    if args.sched == "none" or not args.epochs:
        for group in optimizer.param_groups:
            group["lr"] *= group.get("lr_scale", 1.0)
        return None, args.epochs
    if args.warmup_epochs >= args.epochs:
        world.log(
            f"note: the warm-up of {args.warmup_epochs:g} epochs takes all {args.epochs} epochs (--warmup-epochs)"
        )
    scheduler, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=updates_per_epoch)
    # Without a warm-up, timm's plateau schedule would start at --warmup-lr and stay there.
    if args.sched != "plateau" or args.warmup_epochs:
        scheduler.step(0)
    return scheduler, epochs


def compile_mode(args: Arguments, world: World) -> str:
    """--compile-mode; auto is reduce-overhead (CUDA graphs) on one GPU without gradient accumulation, else default.

    Each replay of a CUDA graph writes the gradients to the same memory, so they cannot be accumulated there.
    DistributedDataParallel splits a model at its buckets, and older versions of torch then record graphs at every step.
    """
    if args.compile_mode != "auto":
        return args.compile_mode
    alone = world.device.type == "cuda" and world.world_size == args.grad_accum_steps == 1
    return "reduce-overhead" if alone else "default"


def build_criterion(model: nn.Module, args: Arguments) -> nn.Module:
    if args.cosub:
        return CosubLoss()
    if args.bce_loss:
        criterion = nn.BCEWithLogitsLoss()
    elif mixing(args):  # The mixed targets are smooth already.
        criterion = SoftTargetCrossEntropy()
    else:
        criterion = LabelSmoothingCrossEntropy(args.smoothing) if args.smoothing else nn.CrossEntropyLoss()
    if args.distillation_type == "none":
        return criterion
    if hasattr(model, "set_distilled_training"):
        model.set_distilled_training(True)
    teacher = build_teacher(args, model.num_classes)
    return DistillationLoss(criterion, teacher, args.distillation_type, args.distillation_alpha, args.distillation_tau)
