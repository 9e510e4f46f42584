"""The command line of main.py: groups, defaults, and what does not go together."""

import argparse
import difflib
import os
import sys
from importlib.util import find_spec

import timm
from timm.optim import list_optimizers
from timm.utils import ParseKwargs

import kan_options
import models  # noqa: F401  enters our names into timm's registry
from datasets import DATASETS, INAT_CATEGORIES
from utils import UserError

AMP = ("bf16", "fp16", "off")
SCHEDULES = ("cosine", "tanh", "step", "multistep", "plateau", "poly", "none")
# what a checkpoint does not hand on to --eval or to a resumed run: it belongs to the machine or to the call
NOT_RESUMED = {
    "resume",
    "eval",
    "pretrained",
    "finetune",
    "start_epoch",
    "use_ema",
    "result",
    "output_dir",
    "device",
    "pin_mem",
    "world_size",
    "dist_url",
    "distributed",
    "kernel",
    "karat_resample",
}
TRAINING_ONLY = {
    "num_workers",
    "compile",
    "compile_mode",
    "run_name",
    "run_id",
    "save_every",
    "mixup",
    "cutmix",
    "cutmix_minmax",
    "distillation_type",
    "cosub",
    "attn_only",
}
# what KAT's published commands leave to the defaults of timm's train.py, which they are written for: a positional DATA brings them
TIMM_DEFAULTS = dict(
    unscale_lr=True, warmup_lr=1e-5, min_lr=0.0, train_interpolation="random", repeated_aug=False, decay_rational=True
)


class Arguments(argparse.Namespace):
    """The parsed arguments: read-only once `freeze` was called."""

    def __setattr__(self, name, value):
        if self.__dict__.get("_frozen"):
            raise AttributeError(f"arguments are read-only (attempt to set {name})")
        super().__setattr__(name, value)

    def freeze(self) -> "Arguments":
        self.__dict__["_frozen"] = True
        return self

    def plain(self) -> dict:
        """Plain types only, for checkpoints and logs."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self).items() if k != "_frozen"}


class Parser(argparse.ArgumentParser):
    """Takes --data-set and --data_set alike; a wrong flag is answered with the nearest right ones."""

    def parse_intermixed_args(self, args=None, namespace=None):
        args = [_dashed(a) for a in (sys.argv[1:] if args is None else args)]
        args = [
            "--amp=bf16" if a == "--amp" and after not in AMP else a for a, after in zip(args, [*args[1:], ""])
        ]  # else it would take DATA
        return super().parse_intermixed_args(args, namespace)

    def error(self, message):
        known = [option for action in self._actions for option in action.option_strings]
        for word in message.split():
            if message.startswith("unrecognized") and word.startswith("--"):
                near = difflib.get_close_matches(word.split("=")[0], known, n=3)
                message += f" (did you mean {', '.join(near)}?)" if near else ""
                break
        super().error(message)


def _dashed(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    def __init__(self, prog):
        super().__init__(prog, max_help_position=34, width=120)

    def _get_help_string(self, action):
        return (
            action.help
            if action.default is None or action.default is False or action.default in ("", {})
            else super()._get_help_string(action)
        )

    def _get_default_metavar_for_optional(self, action):
        return (
            action.type.__name__.upper()
            if action.type
            else "DIR"
            if action.dest.endswith(("_dir", "_path"))
            else "NAME"
        )


def get_args_parser() -> Parser:
    p = Parser(
        "main.py",
        usage="main.py [DATA] [options]",
        description="Train or evaluate vision transformers with Kolmogorov-Arnold functions.",
        formatter_class=_Formatter,
        allow_abbrev=False,
    )
    switch = argparse.BooleanOptionalAction

    g = p.add_argument_group("data")
    g.add_argument(
        "data",
        nargs="?",
        metavar="DATA",
        help="folder of the data, as in KAT's and timm's scripts, and with it their defaults: IMNET, "
        "--lr as it stands, --warmup-lr 1e-5, --min-lr 0, --train-interpolation random, --no-repeated-aug, --decay-rational",
    )
    g.add_argument(
        "--data-set",
        choices=sorted(DATASETS),
        help="data set; IMNET is any tree of class folders (default: IMNET where a folder is given, else DIGITS)",
    )
    g.add_argument("--data-path", "--data-dir", help="folder of the data; downloads go there (default: ./data)")
    g.add_argument(
        "--inat-category", default="name", choices=INAT_CATEGORIES, help="what INAT and INAT19 are classified by"
    )
    g.add_argument(
        "--input-size",
        "--img-size",
        type=int,
        default=224,
        help="image side, pixels; of models for one size, such as *_32, the default is that",
    )
    g.add_argument(
        "--mean", type=float, nargs=3, default=[0.485, 0.456, 0.406], help="channel means of the normalisation"
    )
    g.add_argument(
        "--std", type=float, nargs=3, default=[0.229, 0.224, 0.225], help="channel deviations of the normalisation"
    )
    g.add_argument(
        "--eval-crop-ratio", "--crop-pct", type=float, default=0.875, help="evaluation crops this share of the image"
    )
    g.add_argument(
        "--interpolation", default="bicubic", choices=["bicubic", "bilinear"], help="resizing for evaluation"
    )
    g.add_argument("--train-subset", type=int, help="train on so many images, stratified by class, chosen by --seed")
    g.add_argument("--val-subset", type=int, help="evaluate on so many images, stratified by class, chosen by --seed")
    g.add_argument(
        "--check-images",
        default="auto",
        choices=["auto", "all", "off"],
        help="decode every image before training; auto: trees of at most 100,000 images",
    )
    g.add_argument(
        "--num-workers",
        "--workers",
        "-j",
        type=int,
        help="loader processes for each training process (default: its share of the cores, at most 10)",
    )
    g.add_argument("--pin-mem", action=switch, default=True, help="page-locked host memory for faster copies to a GPU")

    g = p.add_argument_group("model")
    g.add_argument(
        "--model",
        "-m",
        help="a kat_* or flash_kat_* name or any timm model (default: that of --resume or --finetune, else "
        "kat_tiny_patch16_224)",
    )
    g.add_argument(
        "--model-kwargs",
        nargs="*",
        default={},
        action=ParseKwargs,
        metavar="KEY=VALUE",
        help="further options of the model",
    )
    g.add_argument(
        "--nb-classes",
        "--num-classes",
        type=int,
        help="outputs of the classifier (default: the classes of the data, to evaluate those of the weights)",
    )
    g.add_argument("--pretrained", action="store_true", help="start from the model's published weights (hub)")
    g.add_argument(
        "--drop",
        type=float,
        default=0.0,
        help="dropout before the classifier, probability (in the blocks: --model-kwargs proj_drop_rate=P)",
    )
    g.add_argument("--drop-path", type=float, default=0.1, help="stochastic depth, probability at the last block")
    g.add_argument(
        "--grad-checkpointing", action="store_true", help="recompute activations in the backward pass to save memory"
    )

    kan_options.add_arguments(p)

    g = p.add_argument_group("optimizer")
    g.add_argument(
        "--batch-size", "--batch", "-b", type=int, default=64, help="images for each process and forward pass"
    )
    g.add_argument("--epochs", type=int, default=100, help="epochs")
    g.add_argument(
        "--opt", default="adamw", help="any optimizer of timm; where apex is missing, its fused ones mean timm's"
    )
    g.add_argument("--opt-eps", type=float, help="epsilon of the optimizer (default: the optimizer's)")
    g.add_argument("--opt-betas", type=float, nargs="+", help="betas of the optimizer (default: the optimizer's)")
    g.add_argument("--momentum", type=float, default=0.9, help="momentum, for SGD and its kin")
    g.add_argument("--weight-decay", type=float, default=0.05, help="weight decay")
    g.add_argument("--clip-grad", type=float, help="clip gradients to this norm (or value, see --clip-mode)")
    g.add_argument("--clip-mode", default="norm", choices=["norm", "value", "agc"], help="what --clip-grad bounds")
    g.add_argument("--grad-accum-steps", type=int, default=1, help="forward passes for each optimizer step")
    g.add_argument(
        "--amp", nargs="?", const="bf16", choices=AMP, help="mixed precision (default: bf16 on a GPU, off on the CPU)"
    )
    g.add_argument("--compile", action="store_true", help="torch.compile the model for training")
    g.add_argument(
        "--compile-mode",
        default="auto",
        choices=["auto", "default", "reduce-overhead", "max-autotune"],
        help="mode of --compile; auto: "
        "reduce-overhead, which replays CUDA graphs and holds on to more memory, on one GPU unless gradients are accumulated, else default",
    )

    g = p.add_argument_group("schedule")
    g.add_argument("--lr", type=float, default=5e-4, help="base learning rate, scaled by global batch / 512")
    g.add_argument("--unscale-lr", action=switch, default=False, help="--lr is the learning rate itself")
    g.add_argument("--sched", default="cosine", choices=SCHEDULES, help="learning-rate schedule")
    g.add_argument(
        "--sched-on-updates", action="store_true", help="step the schedule at every optimizer step, not every epoch"
    )
    g.add_argument("--warmup-epochs", type=float, default=5, help="epochs of linear warm-up")
    g.add_argument("--warmup-lr", type=float, default=1e-6, help="learning rate at the start of the warm-up")
    g.add_argument("--min-lr", type=float, default=1e-5, help="lowest learning rate")
    g.add_argument(
        "--cooldown-epochs", type=int, default=0, help="epochs at the lowest rate, after --epochs (cosine, tanh, poly)"
    )
    g.add_argument("--decay-epochs", type=float, default=30, help="epochs between decays (step)")
    g.add_argument(
        "--decay-milestones", type=int, nargs="+", default=[90, 180, 270], help="epochs of the decays (multistep)"
    )
    g.add_argument(
        "--decay-rate",
        "--dr",
        type=float,
        default=0.1,
        help="factor of a decay (step, multistep, plateau), power of poly",
    )
    g.add_argument("--patience-epochs", type=int, default=10, help="epochs without progress before a decay (plateau)")
    g.add_argument(
        "--lr-noise", type=float, nargs="+", help="epochs (share of all) between which the rate is perturbed"
    )
    g.add_argument("--lr-noise-pct", type=float, default=0.67, help="limit of the perturbation, share of the rate")
    g.add_argument("--lr-noise-std", type=float, default=1.0, help="deviation of the perturbation")

    g = p.add_argument_group("augmentation and regularisation")
    g.add_argument("--no-aug", action="store_true", help="resize and crop only")
    g.add_argument(
        "--color-jitter", type=float, default=0.3, help="strength of colour jitter, where no --aa policy is used"
    )
    g.add_argument("--aa", default="rand-m9-mstd0.5-inc1", help="AutoAugment policy of timm, or none")
    g.add_argument(
        "--three-augment", "--ThreeAugment", action="store_true", help="3-Augment of DeiT III instead of --aa"
    )
    g.add_argument("--src", action="store_true", help="simple random crop of DeiT III instead of random resized crop")
    g.add_argument(
        "--scale", type=float, nargs=2, default=[0.08, 1.0], help="area of random resized crops, share of the image"
    )
    g.add_argument("--ratio", type=float, nargs=2, default=[3 / 4, 4 / 3], help="aspect ratio of random resized crops")
    g.add_argument("--hflip", type=float, help="probability of a horizontal flip (default: 0.5; DIGITS: 0)")
    g.add_argument("--vflip", type=float, default=0.0, help="probability of a vertical flip")
    g.add_argument(
        "--train-interpolation",
        default="bicubic",
        choices=["bicubic", "bilinear", "random"],
        help="resizing for training",
    )
    g.add_argument(
        "--repeated-aug", action=switch, default=True, help="each image three times an epoch, a third of the images"
    )
    g.add_argument(
        "--train-mode",
        action=switch,
        default=True,
        help="--no-train-mode keeps dropout and drop path off while training",
    )
    g.add_argument("--reprob", type=float, default=0.25, help="probability of random erasing")
    g.add_argument(
        "--remode", default="pixel", choices=["const", "rand", "pixel"], help="what erased areas are filled with"
    )
    g.add_argument("--recount", type=int, default=1, help="erased areas an image")
    g.add_argument(
        "--resplit",
        action="store_true",
        help="taken from DeiT's command line, where it has no effect either: there is one augmentation split",
    )
    g.add_argument("--mixup", type=float, default=0.8, help="mixup alpha, 0 turns it off")
    g.add_argument("--cutmix", type=float, default=1.0, help="cutmix alpha, 0 turns it off")
    g.add_argument(
        "--cutmix-minmax", type=float, nargs=2, help="smallest and largest share of the image, instead of --cutmix"
    )
    g.add_argument("--mixup-prob", type=float, default=1.0, help="probability of mixup or cutmix for a batch")
    g.add_argument("--mixup-switch-prob", type=float, default=0.5, help="probability of cutmix where both are on")
    g.add_argument(
        "--mixup-mode", default="batch", choices=["batch", "pair", "elem"], help="what shares one mixing ratio"
    )
    g.add_argument("--smoothing", type=float, default=0.1, help="label smoothing")
    g.add_argument("--bce-loss", action="store_true", help="binary cross-entropy on unsmoothed targets, as in DeiT III")
    g.add_argument(
        "--cosub",
        action="store_true",
        help="co-train two submodels drawn by --drop-path on each image (arXiv:2212.04884)",
    )

    g = p.add_argument_group("weight averaging")
    g.add_argument("--model-ema", action=switch, default=True, help="keep an exponential moving average of the weights")
    g.add_argument(
        "--model-ema-decay",
        type=float,
        help="fixed decay a step, such as DeiT's 0.99996 (default: a warm-up, min(1 - t^(-2/3), 0.99996) "
        "at step t, 0.990 at 1,000 and 0.9998 at 375,000)",
    )
    g.add_argument("--model-ema-force-cpu", action="store_true", help="keep the average in host memory")

    g = p.add_argument_group("distillation")
    g.add_argument(
        "--distillation-type",
        default="none",
        choices=["none", "soft", "hard"],
        help="what the student learns from the teacher",
    )
    g.add_argument("--teacher-model", help="any timm model (default: that of --teacher-path, else regnety_160)")
    g.add_argument("--teacher-path", default="", help="checkpoint of the teacher")
    g.add_argument("--distillation-alpha", type=float, default=0.5, help="weight of the teacher in the loss")
    g.add_argument("--distillation-tau", type=float, default=1.0, help="temperature of soft distillation")

    g = p.add_argument_group("checkpoint and evaluation")
    g.add_argument(
        "--output-dir",
        "--output",
        default="",
        help="folder for checkpoints, log.txt and curves.png; empty: nothing is saved",
    )
    g.add_argument(
        "--resume",
        "--checkpoint",
        default="",
        metavar="FILE|auto",
        help="go on from a checkpoint (auto: the last one in --output-dir, if "
        "any), or evaluate it; FILE: a path, a URL or hf_hub:USER/NAME; settings that are not given are taken from it",
    )
    g.add_argument(
        "--finetune",
        "--initial-checkpoint",
        "--pretrained-path",
        default="",
        metavar="FILE",
        help="start from the weights of FILE wherever "
        "they fit: of any class count, image or patch size, of a ViT for a KAT, AugReg's .npz; what does not fit is listed (with --resume auto: "
        "unless there is a checkpoint to go on from)",
    )
    g.add_argument(
        "--use-ema",
        action=switch,
        help="averaged or raw weights of the file (default: --eval shows both; --finetune takes the better ones "
        "if the file says so, else the averaged ones if there are any)",
    )
    g.add_argument(
        "--attn-only",
        action="store_true",
        help="train attention, position embedding and classifier only (arXiv:2203.09795)",
    )
    g.add_argument(
        "--start-epoch",
        type=int,
        metavar="N",
        help="first epoch, counted from 0 (default: what the checkpoint says, else 0)",
    )
    g.add_argument("--save-every", type=int, default=0, metavar="N", help="also keep the checkpoint of every Nth epoch")
    g.add_argument("--eval", action="store_true", help="evaluate only")
    g.add_argument(
        "--result",
        nargs="?",
        const="-",
        default="",
        metavar="FILE",
        help="after --eval print the JSON of KAT's validate.py, or write it to FILE",
    )
    g.add_argument("--eval-every", type=int, default=1, metavar="N", help="evaluate every Nth epoch, and the last")

    g = p.add_argument_group("logging")
    g.add_argument(
        "--print-freq", type=int, default=50, help="steps between log lines; each synchronises the device once"
    )
    g.add_argument(
        "--log-grad-norms",
        action="store_true",
        help="log the norms of the gradients, before clipping, by kind of parameter: operators, KAN "
        "coefficients, attention, MLP, embeddings and norms, head",
    )
    g.add_argument("--run-name", default="", help="log to Weights & Biases under this name")
    g.add_argument(
        "--log-wandb",
        action="store_true",
        help="log to Weights & Biases, under the name of the output folder unless --run-name is given",
    )
    g.add_argument("--run-id", default="", help="Weights & Biases run to continue")
    g.add_argument("--wandb-project", default="kan-vit", help="Weights & Biases project")

    g = p.add_argument_group("distributed", "torchrun sets these up; the flags are those of DeiT's command line")
    g.add_argument("--distributed", action="store_true", help="stop unless started by torchrun or another launcher")
    g.add_argument("--world-size", type=int, metavar="N", help="stop unless started with so many processes")
    g.add_argument("--dist-url", default="env://", metavar="URL", help="where the processes meet")
    g.add_argument(
        "--dist-eval",
        action="store_true",
        help="evaluation is always spread over the processes, each image counted once",
    )

    g = p.add_argument_group("device and reproducibility")
    g.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu; the CPU where there is no GPU")
    g.add_argument("--seed", type=int, default=0, help="seed of every random generator")
    g.add_argument("--deterministic", action="store_true", help="only kernels that repeat to the bit on a GPU")
    return p


def parse(argv: list[str] | None, load) -> tuple[Arguments, dict | None]:
    """Parse and check the command line. `load(args)` reads the checkpoint that --resume or --finetune names, whose settings become the defaults.

    Of a foreign checkpoint only those of the model and its images; of the one that --finetune names only the model, its options, unless --model
    names another, and where --model is not given its image size.

    Returns: the frozen arguments and the checkpoint, if any.
    Raises: UserError, one sentence, for flags that contradict each other.
    """
    parser = get_args_parser()
    try:
        first = parser.parse_intermixed_args(argv, Arguments())
    except ValueError as error:  # of timm's KEY=VALUE parser
        raise UserError("--model-kwargs takes KEY=VALUE pairs, such as depth=6") from error
    if first.resume not in ("", "auto") and first.finetune:
        raise UserError(
            "--finetune and --resume FILE do not go together: one starts a training, the other goes on with it"
        )
    if first.data and first.data_path:
        raise UserError(f"the data are in two places, {first.data} and --data-path {first.data_path}: name one")
    if first.data and not os.path.exists(first.data):
        raise UserError(
            f"the data folder {first.data} does not exist; a word that follows no flag which takes one is the data folder"
        )
    folder = first.data or first.data_path
    parser.set_defaults(
        data_set="IMNET" if folder else "DIGITS",
        data_path="./data",
        model="kat_tiny_patch16_224",
        **(TIMM_DEFAULTS if first.data else {}),
    )
    checkpoint = load(first)
    if first.eval and first.resume == "auto" and checkpoint is None:
        raise UserError(f"--resume auto finds no checkpoint in {first.output_dir or 'an empty --output-dir'}")
    named = first.model or checkpoint and (checkpoint.get("args") or {}).get("model") or parser.get_default("model")
    if (cfg := timm.get_pretrained_cfg(named, allow_unregistered=True)) and cfg.fixed_input_size:
        parser.set_defaults(input_size=cfg.input_size[-1])
    if checkpoint is not None:
        known = {action.dest for action in parser._actions} - NOT_RESUMED - (TRAINING_ONLY if first.eval else set())
        theirs = checkpoint.get("args") or {}
        if checkpoint.get("finetune"):
            theirs = kan_options.to_start_from(theirs, first)
        elif checkpoint.get("foreign") and not first.model and "model" not in theirs:
            raise UserError(f"{first.resume} does not say which model it is of: name it with --model")
        elif checkpoint.get("foreign") and (
            cfg := timm.get_pretrained_cfg(theirs.get("model") or first.model or "", allow_unregistered=True)
        ):
            theirs = {
                "mean": list(cfg.mean),
                "std": list(cfg.std),
                "eval_crop_ratio": cfg.crop_pct,
                "interpolation": cfg.interpolation,
                "input_size": cfg.input_size[-1],
                **theirs,
            }
        known -= {"data_set"} if first.data or (folder and theirs.get("data_set") == "DIGITS") else set()
        theirs = {**theirs, "model_kwargs": kan_options.without_unknown_presets(theirs.get("model_kwargs") or {})}
        parser.set_defaults(**{k: v for k, v in theirs.items() if k in known})
    args = parser.parse_intermixed_args(argv, Arguments())
    if checkpoint is not None and first.finetune:  # also where --resume auto goes on with what it started
        args.model_kwargs = {**theirs["model_kwargs"], **args.model_kwargs}
    args.timm_style, args.data_path = (
        args.data is not None,
        os.path.abspath(args.data or args.data_path),
    )  # to be evaluated from any folder
    del args.data
    if args.opt.removeprefix("fused") in list_optimizers() and find_spec("apex") is None:
        args.opt = args.opt.removeprefix("fused")
    args.pretrained = (
        args.pretrained and not args.finetune
    )  # KAT's scripts give --pretrained-path and --pretrained together
    if args.log_wandb and not args.run_name:
        args.run_name = os.path.basename(os.path.abspath(args.output_dir)) if args.output_dir else args.model
    if checkpoint is not None and not checkpoint.get("foreign") and not checkpoint.get("finetune"):
        kan_options.check_unchanged(args, theirs)
    _check(
        args,
        {flag: theirs[flag] for flag in kan_options.MODEL_FLAGS if flag in theirs and getattr(first, flag) is None}
        if checkpoint
        else {},
    )
    return args.freeze(), checkpoint


def _check(a: Arguments, inherited: dict) -> None:
    faults = [
        (a.eval and not a.resume and not a.pretrained, "--eval needs --resume FILE or --pretrained"),
        (a.use_ema is not None and not (a.eval or a.finetune), "--use-ema chooses weights for --eval or --finetune"),
        (a.result and not a.eval, "--result belongs to --eval"),
        (
            a.result not in ("", "-")
            and (os.path.isdir(a.result) or not os.path.isdir(os.path.dirname(a.result) or ".")),
            f"--result {a.result} is a folder or in none: it takes a file, or nothing before another flag",
        ),
        (a.eval and a.finetune, "--finetune is for training; --eval takes --resume FILE"),
        (a.cosub and a.distillation_type != "none", "--cosub and --distillation-type do not go together"),
        (
            a.distributed and "WORLD_SIZE" not in os.environ,
            "--distributed needs a launcher: torchrun --nproc_per_node=N main.py ...",
        ),
        (
            a.world_size not in (None, int(os.environ.get("WORLD_SIZE", 1))),
            f"--world-size {a.world_size}, but {os.environ.get('WORLD_SIZE', 1)} process(es) "
            "were started: torchrun --nproc_per_node=N says how many",
        ),
        (a.resume == "auto" and not a.output_dir, "--resume auto needs --output-dir"),
        (
            a.resume and a.pretrained and not a.eval,
            "--resume and --pretrained do not go together: choose the weights to start from",
        ),
        (a.save_every and not a.output_dir and not a.eval, "--save-every needs --output-dir"),
        (a.run_id and not a.run_name, "--run-id needs --run-name"),
        (a.compile_mode not in ("auto", "default") and not (a.compile or a.eval), "--compile-mode needs --compile"),
        (
            a.compile and a.compile_mode not in ("auto", "default") and a.grad_accum_steps > 1,
            f"--compile-mode {a.compile_mode} keeps gradients in the memory of a CUDA "
            "graph, where the next of --grad-accum-steps overwrites them: leave it out",
        ),
        (
            a.distillation_type != "none" and not a.teacher_path and not a.eval,
            "--distillation-type needs --teacher-path",
        ),
        (
            a.distillation_type != "none"
            and not a.eval
            and ":" not in a.teacher_path
            and not os.path.isfile(a.teacher_path),
            f"--teacher-path: there is no checkpoint {a.teacher_path}",
        ),
        (
            a.teacher_path and a.distillation_type == "none" and not a.eval,
            "--teacher-path needs --distillation-type soft or hard",
        ),
        (a.distillation_tau <= 0, f"--distillation-tau must be positive, not {a.distillation_tau}"),
        (a.clip_mode != "norm" and a.clip_grad is None and not a.eval, "--clip-mode needs --clip-grad"),
        (a.model_ema_decay is not None and not a.model_ema, "--model-ema-decay and --no-model-ema do not go together"),
        (a.no_aug and (a.three_augment or a.src), "--no-aug does not go together with --three-augment or --src"),
        (a.sched == "plateau" and a.sched_on_updates, "--sched plateau steps on epochs: drop --sched-on-updates"),
        (
            a.sched == "plateau" and a.eval_every != 1,
            "--sched plateau needs an evaluation every epoch: drop --eval-every",
        ),
        (a.attn_lr is not None and a.lr == 0, "--attn-lr is scheduled in proportion to --lr, which must be positive"),
        (a.init and "kat_" not in a.model, f"--init is for KAT models, not {a.model}"),
        (
            mixing(a) and a.batch_size % 2 and not a.eval,
            f"mixup and cutmix need an even --batch-size, not {a.batch_size}",
        ),
        (
            a.opt == "adahessian",
            "--opt adahessian needs second derivatives, which a training step here does not compute",
        ),
        (a.attn_lr == float("inf") or a.lr == float("inf"), "--lr and --attn-lr must be finite"),
        (min(a.std) <= 0, f"--std must be positive, not {a.std}"),
    ]
    faults += [
        (getattr(a, name) < least, f"--{name.replace('_', '-')} must be at least {least}, not {getattr(a, name)}")
        for name, least in (
            ("batch_size", 1),
            ("grad_accum_steps", 1),
            ("epochs", 0),
            ("input_size", 1),
            ("print_freq", 1),
            ("eval_every", 1),
            ("save_every", 0),
            ("seed", 0),
            ("start_epoch", 0),
            ("nb_classes", 1),
        )
        if getattr(a, name) is not None
    ]
    faults += [(a.seed >= 2**32, f"--seed must be below 2^32, not {a.seed}")]
    shares = (
        "drop",
        "drop_path",
        "hflip",
        "vflip",
        "reprob",
        "mixup_prob",
        "mixup_switch_prob",
        "smoothing",
        "model_ema_decay",
        "distillation_alpha",
        "eval_crop_ratio",
    )
    positive = (
        "lr",
        "weight_decay",
        "clip_grad",
        "mixup",
        "cutmix",
        "warmup_epochs",
        "warmup_lr",
        "min_lr",
        "cooldown_epochs",
        "patience_epochs",
        "num_workers",
        "attn_lr",
        "karat_init_scale",
    )
    for names, high in ((shares, 1), (positive, float("inf"))):
        faults += [
            (not 0 <= value <= high, f"--{name.replace('_', '-')} must be between 0 and {high:g}, not {value}")
            for name in names
            if (value := getattr(a, name)) is not None
        ]
    if a.opt.removeprefix("lookahead_") not in list_optimizers():
        faults.append((True, _unknown("optimizer", a.opt, list_optimizers())))
    for flag, name in (("model", a.model), ("teacher model", a.teacher_model)):
        if (
            name
            and not timm.is_model(name.split(".")[0])
            and not name.startswith("hf-hub:")
            and not name.startswith("hf_hub:")
        ):
            faults.append((True, _unknown(flag, name, timm.list_models())))
    for wrong, sentence in faults:
        if wrong:
            raise UserError(sentence)
    kan_options.check(a, inherited)


def mixing(a: Arguments) -> bool:
    """Whether batches are mixed, by mixup or cutmix."""
    return a.mixup > 0 or a.cutmix > 0 or a.cutmix_minmax is not None


def _unknown(kind: str, name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, n=8, cutoff=0.5)
    ours = [n for n in names if "kat_" in n] if "model" in kind else names
    return f"unknown {kind} '{name}'; " + (f"near it: {', '.join(near)}" if near else f"there are: {', '.join(ours)}")
