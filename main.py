"""Train, resume or evaluate: arguments -> data, model, optimizer -> epochs.

python main.py --model kat_tiny_patch16_224 --data-set IMNET --data-path DIR --output-dir OUT
torchrun --nproc_per_node=8 main.py ...
python main.py --eval --resume OUT/best_checkpoint.pth
"""

import copy
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, distribute_bn
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import checkpoints
import utils
import weights
from arguments import Arguments, mixing, parse
from datasets import DataError, build_datasets
from engine import NonFiniteLoss, Training, evaluate, train_one_epoch
from groups import GradNorms, optimizer_groups
from kan_basis.rational import use_kernel
from kan_options import differences, model_of
from labels import output_indices
from losses import CosubLoss, DistillationLoss
from models.build import build_model, build_teacher, freeze_all_but_attention, outputs_of
from models.load import choose, known_best, load_all, load_matching
from samplers import ExactEvalBatchSampler, train_sampler
from transforms import DeviceLoader, build_loader
from utils import UserError, World, first_line


def main(argv: list[str] | None = None) -> int:
    everywhere = False
    try:
        args, checkpoint = parse(argv, load_start)
        everywhere = True  # from here on what goes wrong may go wrong in one process alone
        run(args, checkpoint, utils.init_world(args.device, args.dist_url))
        return 0
    except (UserError, DataError) as error:
        if everywhere or os.environ.get("RANK", "0") == "0":
            sys.stderr.write(f"error: {error}\n")
        return 2
    except NonFiniteLoss as error:
        rank = os.environ.get("RANK", "0")
        sys.stderr.write(f"stopped (process {rank}): {error}; the checkpoint of the last good epoch is untouched\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; --resume auto goes on from the last finished epoch\n")
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def load_start(args: Arguments) -> dict | None:
    """The checkpoint that a command goes on from, evaluates, or (where there is none to go on from) starts from by --finetune."""
    path = checkpoints.find(args.resume, args.output_dir)
    if path is None and args.finetune and not args.eval:
        return {**weights.read(args.finetune), "finetune": True}
    return weights.read(path) if path else None


def run(args: Arguments, checkpoint: dict | None, world: World) -> None:
    utils.seed_everything(args.seed + world.rank)
    if args.deterministic:
        utils.set_deterministic()
    else:
        torch.backends.cudnn.benchmark = True
    if args.kernel:
        try:
            use_kernel(args.kernel)
        except ValueError as error:
            raise UserError(f"--kernel {args.kernel}: {error}") from error
    amp = args.amp or utils.default_amp(world.device)
    if amp == "fp16" and world.device.type == "cpu":
        raise UserError("--amp fp16 needs a GPU; use --amp bf16 on the CPU")
    train_set, val_set, classes = build_datasets(args, world.rank, world.world_size)
    start, checkpoint = (checkpoint, None) if checkpoint and checkpoint.get("finetune") else (None, checkpoint)
    trained_on = (checkpoint or start or {}).get("classes")
    model = build_model(
        args,
        args.nb_classes or (outputs_of(checkpoint, args) if args.eval else len(classes)),
        weights_follow=checkpoint is not None,
    )
    world.log(
        f"{args.model}: {sum(p.numel() for p in model.parameters()):,} parameters, {args.input_size} pixels, amp {amp}"
    )
    world.log(
        f"{args.data_set}: {f'{len(train_set):,} training and ' if train_set else ''}{len(val_set):,} validation images, {len(classes)} classes"
    )
    if args.eval:
        indices, note = output_indices(classes, model.num_classes, trained_on, args.data_set == "IMNET")
        val_set.targets = np.array(indices)[val_set.targets]
    elif len(classes) > model.num_classes:
        raise UserError(f"--nb-classes {model.num_classes} are too few: the data have {len(classes)} classes")
    else:
        note = (
            ""
            if trained_on in (None, classes)
            else f"the checkpoint was trained on other classes ({', '.join(trained_on[:3])}, ...)"
        )
    if note:
        world.log(f"note: {note}")
    if checkpoint is not None and not args.eval:
        load_all(model, checkpoint["model"], args.resume)
    elif start is not None:
        chosen, which = choose(start, args.use_ema)
        trained = None if start.get("foreign") else model_of(start["args"])
        world.log(
            *load_matching(model, chosen, f"{args.finetune} ({which} weights)", args.karat_resample, trained), sep="\n"
        )
        if theirs := start.get("args", {}).get("model") and differences(vars(args), start["args"]):
            world.log(f"note: unlike this model, that of {args.finetune} was trained {'; '.join(theirs)}")
        start.clear()  # its memory
    if args.attn_only:
        freeze_all_but_attention(model)
    model.to(world.device)
    val_batches = ExactEvalBatchSampler(len(val_set), int(1.5 * args.batch_size), world.world_size, world.rank)
    val_loader = build_loader(
        val_set, args, world.device, num_workers(args, world), is_train=False, batch_sampler=val_batches
    )
    if args.eval:
        evaluate_checkpoint(model, checkpoint, val_loader, amp, args, world)
    else:
        train(model, checkpoint, train_set, val_loader, classes, amp, args, world)


def num_workers(args: Arguments, world: World) -> int:
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", world.world_size))
    return min(10, len(os.sched_getaffinity(0)) // processes) if args.num_workers is None else args.num_workers


def evaluate_checkpoint(
    model: nn.Module, checkpoint: dict | None, loader: DeviceLoader, amp: str, args: Arguments, world: World
) -> None:
    models = {"raw": model}
    if checkpoint is not None:
        both = args.use_ema is None and checkpoint.get("model_ema") is not None
        own, which = choose(checkpoint, False if both else args.use_ema)
        models = {which: model}
        if both:
            models["EMA"] = copy.deepcopy(model)
            load_all(
                models["EMA"],
                checkpoint["model_ema"],
                f"the EMA of {args.resume}",
                resample=True,
                mode=args.karat_resample,
            )
        if resampled := load_all(model, own, args.resume, resample=True, mode=args.karat_resample):
            world.log(f"note: resampled {', '.join(resampled)}")
    results = evaluate(models, loader, amp, world)
    known = known_best(checkpoint) if len(results) > 1 else None
    chosen = known or max(results, key=lambda name: results[name]["acc1"])
    for name, result in results.items():
        world.log(f"{name} weights: " + format_result(result))
    world.log(f"top-1 {results[chosen]['acc1']:.2f} % ({chosen} weights)")
    top1, top5 = results[chosen]["acc1"], results[chosen]["acc5"]
    if args.result and world.is_main:
        utils.write_result(
            args.result,
            {
                "model": args.model,
                "top1": round(top1, 4),
                "top1_err": round(100 - top1, 4),
                "top5": round(top5, 4),
                "top5_err": round(100 - top5, 4),
                "param_count": round(sum(p.numel() for p in model.parameters()) / 1e6, 2),
                "img_size": args.input_size,
                "crop_pct": args.eval_crop_ratio,
                "interpolation": args.interpolation,
            },
        )


def format_result(result: dict) -> str:
    return f"Acc@1 {result['acc1']:.3f}  Acc@5 {result['acc5']:.3f}  loss {result['loss']:.5f}  ({result['images']} images)"


def train(
    model: nn.Module,
    checkpoint: dict | None,
    train_set,
    val_loader: DeviceLoader,
    classes: list[str],
    amp: str,
    args: Arguments,
    world: World,
) -> None:
    sampler = train_sampler(train_set, world.world_size, world.rank, args.seed, repeats=3 if args.repeated_aug else 1)
    batch_size = fitting_batch_size(len(sampler), args, world)
    loader = build_loader(
        train_set, args, world.device, num_workers(args, world), is_train=True, sampler=sampler, batch_size=batch_size
    )
    training, epochs = build_training(model, len(loader), batch_size, model.num_classes, amp, args, world)
    folder = Path(args.output_dir) if args.output_dir else None
    start_epoch, goes_on = args.start_epoch or 0, False
    updates_per_epoch = -(-len(loader) // args.grad_accum_steps)
    if checkpoint is not None:
        done = checkpoints.restore(training, checkpoint, updates_per_epoch, args, world)
        start_epoch = done if args.start_epoch is None else args.start_epoch
        checkpoint.clear()  # its memory
        goes_on = (
            folder is not None
            and Path(checkpoints.find(args.resume, args.output_dir)).resolve().parent == folder.resolve()
        )
        if folder is None:
            world.log("note: without --output-dir nothing of this run is saved")
    if args.start_epoch is not None:
        training.updates = start_epoch * updates_per_epoch
        if training.scheduler is not None and (args.sched != "plateau" or args.warmup_epochs):
            anew = (
                args.sched == "plateau" and checkpoint is None
            )  # a plateau knows its rate from where it came, else from the end of the warm-up
            training.scheduler.step(min(start_epoch, args.warmup_epochs) if anew else start_epoch)
            training.scheduler.step_update(training.updates)
    records = fault = None
    if world.is_main:
        try:
            records = utils.Records(
                folder, start_epoch if goes_on else 0, args.plain(), args.run_name, args.run_id, args.wandb_project
            )
        except UserError as error:
            fault = str(error)
    if fault := world.gather(fault)[0]:
        raise UserError(fault)
    if start_epoch >= epochs:
        world.log(f"nothing to train: {start_epoch} of {epochs} epochs are done")

    try:
        run_epochs(
            training, range(start_epoch, epochs), loader, sampler, val_loader, records, folder, classes, args, world
        )
    finally:
        if records:
            records.close()
    best = training.best
    if best["weights"]:
        world.log(f"best top-1 {best['accuracy']:.2f} % ({best['weights']} weights, epoch {best['epoch'] + 1})")
    if folder and (folder / checkpoints.BEST).exists():
        world.log(
            f"checkpoint: {folder / checkpoints.BEST}\nlog: {folder / 'log.txt'}\ncurves: {folder / 'curves.png'}"
        )


def run_epochs(
    training: Training,
    epochs: range,
    loader: DeviceLoader,
    sampler,
    val_loader: DeviceLoader,
    records: utils.Records | None,
    folder: Path | None,
    classes: list[str],
    args: Arguments,
    world: World,
) -> None:
    for epoch in epochs:
        sampler.set_epoch(epoch)
        entry, speed = train_one_epoch(training, loader, epoch, epochs.stop, args, world)
        entry = {"epoch": epoch, **entry}
        is_best = False
        if (epoch + 1) % args.eval_every == 0 or epoch + 1 == epochs.stop:
            if world.world_size > 1:  # batch-norm statistics are of each process: evaluate and save their mean
                for averaged in (training.model, training.ema.module if training.ema else nn.Identity()):
                    distribute_bn(averaged, world.world_size, reduce=True)
            is_best = evaluate_epoch(training, val_loader, epoch, entry, world)
        if training.scheduler is not None:  # the rate of the next epoch
            training.scheduler.step(epoch + 1, entry.get("test_acc1"))
        rng = world.gather(utils.rng_state(world.device))
        if world.is_main:
            records.add(entry, speed)
            if folder:
                keep_as = (
                    f"checkpoint-{epoch + 1:04d}.pth"
                    if args.save_every and (epoch + 1) % args.save_every == 0
                    else None
                )
                checkpoints.save(folder, checkpoints.state_of(training, epoch, rng, classes, args), is_best, keep_as)
                records.plot(at_most_every=30)


def fitting_batch_size(images: int, args: Arguments, world: World) -> int:
    """--batch-size, or less where a process has fewer images than that; even where batches are mixed in pairs."""
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


def build_training(
    model: nn.Module, steps: int, batch_size: int, num_classes: int, amp: str, args: Arguments, world: World
) -> tuple[Training, int]:
    """Everything that training moves, and the number of epochs (cool-down included)."""
    global_batch = batch_size * world.world_size * args.grad_accum_steps
    lr, attn_lr = (
        rate if args.unscale_lr or rate is None else rate * global_batch / 512 for rate in (args.lr, args.attn_lr)
    )
    scaled = "not scaled" + (
        ", as in timm's and KAT's scripts, because the data folder comes first" if args.timm_style else ""
    )
    scaled = scaled if args.unscale_lr else f"base {args.lr:g} x {global_batch} / 512"
    world.log(
        f"learning rate {lr:g} ({scaled}; global batch {global_batch} = {batch_size} images x {world.world_size} processes x "
        f"{args.grad_accum_steps} accumulated)" + ("" if attn_lr is None else f"; of the operators {attn_lr:g}")
    )
    fused = {"fused": True} if args.opt == "adamw" and world.device.type == "cuda" else {}
    try:
        groups = optimizer_groups(
            model, args.weight_decay, args.decay_rational, None if attn_lr is None else attn_lr / lr
        )
        optimizer = create_optimizer_v2(
            groups,
            opt=args.opt,
            lr=lr,
            weight_decay=0.0,
            momentum=args.momentum,
            **fused,
            **{k: v for k, v in (("eps", args.opt_eps), ("betas", args.opt_betas)) if v is not None},
        )
    except (TypeError, ValueError, AssertionError, RuntimeError, ImportError, IndexError) as error:
        raise UserError(f"--opt {args.opt} cannot be used: {first_line(error)}") from error
    updates_per_epoch = -(-steps // args.grad_accum_steps)
    scheduler, epochs = None, args.epochs
    if args.warmup_epochs >= args.epochs > 0 and args.sched != "none":
        world.log(
            f"note: the warm-up of {args.warmup_epochs:g} epochs takes all {args.epochs} epochs (--warmup-epochs)"
        )
    if args.sched != "none" and args.epochs:
        scheduler, epochs = create_scheduler_v2(
            optimizer,
            args.sched,
            num_epochs=args.epochs,
            decay_epochs=args.decay_epochs,
            decay_milestones=args.decay_milestones,
            cooldown_epochs=args.cooldown_epochs,
            patience_epochs=args.patience_epochs,
            decay_rate=args.decay_rate,
            min_lr=args.min_lr,
            warmup_lr=args.warmup_lr,
            warmup_epochs=args.warmup_epochs,
            noise=args.lr_noise,
            noise_pct=args.lr_noise_pct,
            noise_std=args.lr_noise_std,
            noise_seed=args.seed,
            step_on_epochs=not args.sched_on_updates,
            updates_per_epoch=updates_per_epoch,
        )
        if args.sched != "plateau" or args.warmup_epochs:  # timm's plateau would start at --warmup-lr and stay there
            scheduler.step(0)
    if scheduler is None:
        for group in optimizer.param_groups:
            group["lr"] *= group.get("lr_scale", 1.0)
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
            num_classes=num_classes,
        )
    forward = torch.compile(model, mode=compile_mode(args, world)) if args.compile else model
    if world.world_size > 1:
        forward = DistributedDataParallel(
            forward, device_ids=[world.device.index] if world.device.type == "cuda" else None
        )
    ema = None
    if args.model_ema:  # of the weights that all processes now have
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
        build_criterion(model, num_classes, args, world).to(world.device),
        optimizer,
        scheduler,
        torch.amp.GradScaler(world.device.type, enabled=amp == "fp16"),
        num_classes,
        amp,
        ema,
        mixup,
        GradNorms(model) if args.log_grad_norms else None,
    ), epochs


def compile_mode(args: Arguments, world: World) -> str:
    """--compile-mode. A CUDA graph writes the gradients of each replay to the same memory, where none can be accumulated; DistributedDataParallel
    splits a model at its buckets, and older versions of torch then record again at every step."""
    if args.compile_mode != "auto":
        return args.compile_mode
    return (
        "reduce-overhead"
        if world.device.type == "cuda" and world.world_size == args.grad_accum_steps == 1
        else "default"
    )


def build_criterion(model: nn.Module, num_classes: int, args: Arguments, world: World) -> nn.Module:
    if args.cosub:
        return CosubLoss()
    if args.bce_loss:
        criterion = nn.BCEWithLogitsLoss()
    elif mixing(args):  # smoothing is part of the mixed targets
        criterion = SoftTargetCrossEntropy()
    else:
        criterion = LabelSmoothingCrossEntropy(args.smoothing) if args.smoothing else nn.CrossEntropyLoss()
    if args.distillation_type == "none":
        return criterion
    if hasattr(model, "set_distilled_training"):
        model.set_distilled_training(True)
    return DistillationLoss(
        criterion,
        build_teacher(args, num_classes),
        args.distillation_type,
        args.distillation_alpha,
        args.distillation_tau,
    )


def evaluate_epoch(training: Training, loader: DeviceLoader, epoch: int, entry: dict, world: World) -> bool:
    """Evaluate raw and EMA weights into `entry`; True if one of them is the best so far (the EMA where both are equal)."""
    models = {"raw": training.model}
    if training.ema is not None:
        on_device = next(training.ema.module.parameters()).device == world.device
        models["EMA"] = training.ema.module if on_device else copy.deepcopy(training.ema.module).to(world.device)
    winner, best = None, training.best
    for which, result in evaluate(models, loader, training.amp, world).items():
        world.log(f"epoch {epoch + 1}  {which} weights: " + format_result(result))
        prefix = "test_ema" if which == "EMA" else "test"
        entry |= {f"{prefix}_{k}": result[k] for k in ("loss", "acc1", "acc5")}
        if winner is None or result["acc1"] >= winner["accuracy"]:
            winner = {"accuracy": result["acc1"], "weights": which, "epoch": epoch}
    if winner["accuracy"] > best["accuracy"]:
        training.best = best = winner
    entry |= {
        "max_accuracy": best["accuracy"],
        "max_accuracy_weights": best["weights"],
        "max_accuracy_epoch": best["epoch"],
    }
    return best is winner


if __name__ == "__main__":
    sys.exit(main())
