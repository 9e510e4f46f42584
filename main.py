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
from timm.data.loader import PrefetchLoader
from timm.utils import distribute_bn
from torch import nn

import stopping
import utils
from arguments import Arguments, Command, parse
from checkpoint import Checkpoint
from checkpoint.fill import load_all, load_matching
from checkpoint.read import BEST
from checkpoint.save import complete, restore, save, state_of
from datasets import ImageDataset, build_datasets
from engine import NonFiniteLoss, Training, evaluate, stop_if_requested, train_one_epoch
from kan_basis.kernels import KernelRefusal, use_kernel
from labels import output_indices
from model_factory import build_model, freeze_all_but_attention, is_ours, on_meta, outputs_of, portable
from records import Records
from samplers import ExactEvalBatchSampler, train_sampler
from training import build_training, fitting_batch_size
from transforms import build_loader
from utils import UserError, World


def main(argv: list[str] | None = None) -> int:
    rank, command = os.environ.get("RANK", "0"), None
    try:
        command = parse(argv)
        run(command, utils.init_world(command.args.device, command.args.dist_url))
        return 0
    except (UserError, KernelRefusal) as error:
        if command or rank == "0":  # All processes find the same fault in the arguments.
            utils.report(error)
        return 2
    except NonFiniteLoss as error:
        sys.stderr.write(f"stopped (process {rank}): {error}; the checkpoint of the last good epoch is untouched\n")
        return 1
    except stopping.Stopped as signal:
        if rank == "0":
            then = "--resume auto continues after the last saved epoch"
            saved = then if command.args.output_dir else "without --output-dir nothing of this run is saved"
            sys.stderr.write(f"{signal}; {saved}\n")
        return signal.code
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; --resume auto continues after the last finished epoch\n")
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def run(command: Command, world: World) -> None:
    args, resumed, start = command
    utils.seed_everything(args.seed + world.rank)
    torch.backends.cudnn.benchmark = not args.deterministic
    if args.deterministic:
        utils.set_deterministic()
    if args.kernel:
        try:
            use_kernel(args.kernel)
        except ValueError as error:
            raise UserError(f"--kernel {args.kernel}: {error}") from error
    amp = args.amp or utils.default_amp(world.device)
    if amp == "fp16" and world.device.type == "cpu":
        raise UserError("--amp fp16 needs a GPU; use --amp bf16 on the CPU")
    train_set, val_set, classes = build_datasets(args, world.rank, world.world_size)
    outputs = args.nb_classes or (outputs_of(resumed, args.model) if args.eval else len(classes))
    model = build_model(args, outputs, weights_follow=resumed is not None)
    parameters = sum(p.numel() for p in model.parameters())
    world.log(f"{args.model}: {parameters:,} parameters, {args.input_size} pixels, amp {amp}")
    images = f"{len(train_set):,} training and " if train_set else ""
    world.log(f"{args.data_set}: {images}{len(val_set):,} validation images, {len(classes)} classes")
    name_outputs(model, val_set, classes, resumed or start, args, world)
    if resumed and not args.eval:
        load_all(model, resumed.weights, resumed.source)
    elif start:
        load_start(model, start, args, world)
    if args.attn_only:
        freeze_all_but_attention(model)
    model.to(world.device)
    val_batches = ExactEvalBatchSampler(len(val_set), int(1.5 * args.batch_size), world.world_size, world.rank)
    val_loader = build_loader(
        val_set, args, world.device, num_workers(args, world), is_train=False, batch_sampler=val_batches
    )
    if args.eval:
        evaluate_checkpoint(model, resumed, val_loader, amp, args, world)
    else:
        train(model, resumed, train_set, val_loader, classes, amp, args, world)


def name_outputs(
    model: nn.Module, val_set, classes: list[str], checkpoint: Checkpoint | None, args: Arguments, world: World
) -> None:
    """For --eval number the classes of the data like the outputs of the model, otherwise check that outputs suffice."""
    trained_on, note = checkpoint.classes if checkpoint else None, ""
    if args.eval:
        indices, note = output_indices(classes, model.num_classes, trained_on, args.data_set == "IMNET")
        val_set.targets = np.array(indices)[val_set.targets]
    elif len(classes) > model.num_classes:
        raise UserError(f"--nb-classes {model.num_classes} are too few: the data have {len(classes)} classes")
    elif trained_on not in (None, classes):
        note = f"the checkpoint was trained on other classes ({', '.join(trained_on[:3])}, ...)"
    if note:
        world.log(f"note: {note}")


def load_start(model: nn.Module, start: Checkpoint, args: Arguments, world: World) -> None:
    """Start a training from the weights of --finetune, and say what does not fit."""
    weights, which = start.choose(args.use_ema)
    trained = None
    if not start.foreign and start.model and is_ours(start.model):
        trained = on_meta(start.model, portable(start.model_options), start.settings.get("input_size", args.input_size))
    lines = load_matching(model, weights, f"{args.finetune} ({which} weights)", args.karat_resample, trained)
    differences = [f"{k}={v}" for k, v in start.model_options.items() if args.model_options.get(k) != v]
    if differences:
        lines.append(f"note: unlike this model, that of {args.finetune} has {', '.join(differences)}")
    world.log(*lines, sep="\n")
    start.release()


def num_workers(args: Arguments, world: World) -> int:
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", world.world_size))
    return min(10, len(os.sched_getaffinity(0)) // processes) if args.num_workers is None else args.num_workers


def evaluate_checkpoint(
    model: nn.Module, checkpoint: Checkpoint | None, loader: PrefetchLoader, amp: str, args: Arguments, world: World
) -> None:
    models, both = {"raw": model}, False
    if checkpoint:
        models, both = {}, checkpoint.ema is not None and args.use_ema is None
        for use_ema in (False, True) if both else (args.use_ema,):
            weights, which = checkpoint.choose(use_ema)
            models[which] = copy.deepcopy(model) if models else model
            source = f"{checkpoint.source} ({which} weights)"
            if resampled := load_all(models[which], weights, source, resample=True, mode=args.karat_resample):
                world.log(f"note: resampled {', '.join(resampled)} of {source}")
    results = evaluate(models, loader, amp, world, compiled=args.compile)
    chosen = (both and checkpoint.known_best) or max(results, key=lambda name: results[name]["acc1"])
    for name, result in results.items():
        world.log(f"{name} weights: " + format_result(result))
    top1, top5 = results[chosen]["acc1"], results[chosen]["acc5"]
    world.log(f"top-1 {top1:.2f} % ({chosen} weights)")
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
    accuracies = f"Acc@1 {result['acc1']:.3f}  Acc@5 {result['acc5']:.3f}"
    return f"{accuracies}  loss {result['loss']:.5f}  ({result['images']} images)"


def train(
    model: nn.Module,
    checkpoint: Checkpoint | None,
    train_set: ImageDataset,
    val_loader: PrefetchLoader,
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
    training = build_training(model, len(loader), batch_size, amp, args, world)
    folder = Path(args.output_dir) if args.output_dir else None
    start_epoch, updates_per_epoch = 0, -(-len(loader) // args.grad_accum_steps)
    if checkpoint:
        start_epoch = restore(training, checkpoint, updates_per_epoch, args, world)
    if args.start_epoch is not None:
        start_epoch = args.start_epoch
        training.updates, training.unevaluated = start_epoch * updates_per_epoch, None
        if training.scheduler and (args.sched != "plateau" or args.warmup_epochs):
            # Plateau keeps the checkpoint's rate; without a checkpoint it starts at the end of the warm-up.
            fresh_plateau = args.sched == "plateau" and not checkpoint
            training.scheduler.step(min(start_epoch, args.warmup_epochs) if fresh_plateau else start_epoch)
            training.scheduler.step_update(training.updates)
    continues = False
    if checkpoint and folder:
        continues = Path(checkpoint.source).resolve().parent == folder.resolve()
    elif checkpoint:
        world.log("note: without --output-dir nothing of this run is saved")
    records = fault = None
    if world.is_main:
        try:
            goes_on = continues and (start_epoch > 0 or training.unevaluated)
            records = Records(folder, start_epoch, args, checkpoint.progress.entry if goes_on else None)
            if checkpoint and folder:
                complete(folder, checkpoint)
        except UserError as error:
            fault = error
    if sentence := world.gather(fault and str(fault))[0]:  # All processes stop if the folder cannot be written.
        raise UserError(sentence) from fault
    if checkpoint:
        checkpoint.release()
    if start_epoch >= training.epochs:
        world.log(f"nothing to train: {start_epoch} of {training.epochs} epochs are done")
    epochs = range(start_epoch, training.epochs)
    try:
        with stopping.orderly():
            run_epochs(training, epochs, loader, val_loader, records, classes, args, world)
    finally:
        if records:
            records.close()
    best = training.best
    if best["weights"]:
        world.log(f"best top-1 {best['accuracy']:.2f} % ({best['weights']} weights, epoch {best['epoch'] + 1})")
    if folder and (folder / BEST).exists():
        world.log(f"checkpoint: {folder / BEST}\nlog: {folder / 'log.txt'}\ncurves: {folder / 'curves.png'}")


def run_epochs(
    training: Training,
    epochs: range,
    loader: PrefetchLoader,
    val_loader: PrefetchLoader,
    records: Records | None,
    classes: list[str],
    args: Arguments,
    world: World,
) -> None:
    for epoch in epochs:
        loader.sampler.set_epoch(epoch)
        entry, speed = training.unevaluated, {}
        if entry is None:
            entry, speed = train_one_epoch(training, loader, epoch, epochs.stop, args, world)
        entry, training.unevaluated = {"epoch": epoch, **entry}, None
        is_best = False
        if (epoch + 1) % args.eval_every == 0 or epoch + 1 == epochs.stop:
            if world.world_size > 1:  # Each process has its own batch-norm statistics: evaluate and save their mean.
                for averaged in filter(None, (training.model, training.ema)):
                    distribute_bn(averaged, world.world_size, reduce=True)
            rng = world.gather(utils.rng_state(world.device))
            try:
                is_best = evaluate_epoch(training, val_loader, epoch, entry, args, world)
            except (Exception, KeyboardInterrupt):
                if records and records.folder:
                    state = state_of(training, entry, rng, classes, args.plain())
                    save(records.folder, {**state, "evaluated": False}, is_best=False)
                    world.log(f"epoch {epoch + 1} is saved; --resume auto goes on with its evaluation")
                raise
        if training.scheduler:
            # The rate of the next epoch. DeiT's loop passes `epoch` here, so its rate lags the schedule by one epoch.
            training.scheduler.step(epoch + 1, entry.get("test_acc1"))
        rng = world.gather(utils.rng_state(world.device))
        if records:
            if records.folder:
                keep = args.save_every and (epoch + 1) % args.save_every == 0
                keep_as = f"checkpoint-{epoch + 1:04d}.pth" if keep else None
                save(records.folder, state_of(training, entry, rng, classes, args.plain()), is_best, keep_as)
            records.add(entry, speed)
        if epoch + 1 < epochs.stop:
            stop_if_requested(world)


def evaluate_epoch(
    training: Training, loader: PrefetchLoader, epoch: int, entry: dict, args: Arguments, world: World
) -> bool:
    """Evaluate raw and EMA weights and add the figures to `entry`; whether one of them is the best so far.

    Where both have the same accuracy, the EMA wins.
    """
    models = {"raw": training.model}
    if training.ema:
        ema = training.ema.module
        models["EMA"] = copy.deepcopy(ema).to(world.device) if args.model_ema_force_cpu else ema
    results = evaluate(models, loader, training.amp, world, compiled=args.compile)
    for which, result in results.items():
        world.log(f"epoch {epoch + 1}  {which} weights: " + format_result(result))
        prefix = "test_ema" if which == "EMA" else "test"
        entry |= {f"{prefix}_{k}": result[k] for k in ("loss", "acc1", "acc5")}
    winner = max(reversed(results), key=lambda which: results[which]["acc1"])
    is_best = results[winner]["acc1"] > training.best["accuracy"]
    if is_best:
        training.best = {"accuracy": results[winner]["acc1"], "weights": winner, "epoch": epoch}
    best = training.best
    entry |= {
        "max_accuracy": best["accuracy"],
        "max_accuracy_weights": best["weights"],
        "max_accuracy_epoch": best["epoch"],
    }
    return is_best


if __name__ == "__main__":
    sys.exit(main())
