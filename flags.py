"""The flags of main.py by topic: names, defaults and help. arguments.py parses and checks them."""

from argparse import Action
from argparse import BooleanOptionalAction as Switch
from collections.abc import Callable
from typing import Any

from timm.utils import ParseKwargs

import kan_flags
from datasets import DATASETS, INAT_CATEGORIES
from kan_basis.kernels import KERNELS

AMP = ("bf16", "fp16", "off")
SCHEDULES = ("cosine", "tanh", "step", "multistep", "plateau", "poly", "none")
COMPILE_MODES = ("auto", "default", "reduce-overhead", "max-autotune")


def add_arguments(parser) -> None:
    """Add all groups of flags."""
    _add_inputs(parser)
    kan_flags.add_arguments(parser)
    _add_training(parser)
    _add_run(parser)


def _group(parser, *title: str) -> Callable[..., None]:
    """The function that adds a flag to a new group: its names, its help, and keyword arguments of argparse.

    A default that is a number, or several, gives the type of the flag.
    """
    group = parser.add_argument_group(*title)

    def add(*names_and_help: str, **options) -> None:
        *names, text = names_and_help
        default = options.get("default")
        first = default[0] if isinstance(default, list) and default else default
        if type(first) in (int, float):
            options["type"] = type(first)
        group.add_argument(*names, help=text, **options)

    return add


def takes(action: Action, value: Any) -> bool:
    """Whether `value`, which a checkpoint holds, could come from this flag."""
    if isinstance(action, Switch) or action.nargs == 0:
        return isinstance(value, bool)
    several = action.nargs not in (None, "?")
    if several != isinstance(value, (list, tuple)):
        return False
    values = value if several else [value]
    kind = {int: int, float: (int, float)}.get(action.type, str)
    fit = all(isinstance(v, kind) and (action.choices is None or v in action.choices) for v in values)
    return fit and action.nargs in (None, "?", "+", "*", len(values))


def _add_inputs(parser) -> None:
    add = _group(parser, "data")
    add(
        "data",
        """folder of the data, as in KAT's and timm's scripts, which also brings their defaults: IMNET, --lr
        that is not scaled, --warmup-lr 1e-5, --min-lr 0, --train-interpolation random, --no-repeated-aug,
        --decay-rational""",
        nargs="?",
        metavar="DATA",
    )
    add(
        "--data-set",
        "data set; IMNET is any tree of class folders (default: IMNET if a folder is given, else DIGITS)",
        choices=sorted(DATASETS),
    )
    add("--data-path", "--data-dir", "folder of the data, into which they are downloaded (default: ./data)")
    add("--inat-category", "what INAT and INAT19 are classified by", default="name", choices=INAT_CATEGORIES)
    add(
        "--input-size",
        "--img-size",
        "side of the images in pixels; the default is the size of a model that has only one, such as *_32",
        default=224,
    )
    add("--mean", "channel means of the normalisation", nargs=3, default=[0.485, 0.456, 0.406])
    add("--std", "channel deviations of the normalisation", nargs=3, default=[0.229, 0.224, 0.225])
    add("--eval-crop-ratio", "--crop-pct", "share of the image that evaluation crops", default=0.875)
    add("--interpolation", "resizing for evaluation", default="bicubic", choices=["bicubic", "bilinear"])
    add("--train-subset", "number of training images, stratified by class and chosen by --seed", type=int)
    add("--val-subset", "number of validation images, stratified by class and chosen by --seed", type=int)
    add(
        "--check-images",
        "decode every image before training; auto: in trees of at most 100,000 images",
        default="auto",
        choices=["auto", "all", "off"],
    )
    add(
        "--num-workers",
        "--workers",
        "-j",
        "loader processes for each training process (default: its share of the cores, at most 10)",
        type=int,
    )
    add("--pin-mem", "page-locked host memory for faster copies to a GPU", action=Switch, default=True)

    add = _group(parser, "model")
    add(
        "--model",
        "-m",
        "a name of timm or of this repository (default: the model of the checkpoint, else kat_tiny_patch16_224)",
    )
    add(
        "--model-kwargs",
        "further options of the model; KEY=None goes back to the default of an option that a checkpoint sets",
        nargs="*",
        default={},
        action=ParseKwargs,
        metavar="KEY=VALUE",
    )
    add(
        "--import",
        "module to import first, such as a file of yours that registers a basis, a model or a data set",
        dest="imports",
        action="append",
        default=[],
        metavar="MODULE",
    )
    add(
        "--nb-classes",
        "--num-classes",
        "outputs of the classifier (default: the classes of the data; for --eval the outputs of the weights)",
        type=int,
    )
    add("--pretrained", "start from the published weights of the model (hub)", action="store_true")
    add(
        "--drop",
        "dropout in front of the classifier, probability (in the blocks: --model-kwargs proj_drop_rate=P)",
        default=0.0,
    )
    add("--drop-path", "stochastic depth, probability at the last block", default=0.1)
    add("--grad-checkpointing", "compute activations again in the backward pass", action="store_true")


def _add_training(parser) -> None:
    add = _group(parser, "optimizer")
    add("--batch-size", "--batch", "-b", "images for each process and forward pass", default=64)
    add("--epochs", "number of epochs", default=100)
    add("--opt", "an optimizer of timm; without apex, its fused optimizers are those of timm", default="adamw")
    add("--opt-eps", "epsilon of the optimizer (default: the optimizer's)", type=float)
    add("--opt-betas", "betas of the optimizer (default: the optimizer's)", type=float, nargs="+")
    add("--momentum", "momentum of SGD and similar optimizers", default=0.9)
    add("--weight-decay", "weight decay", default=0.05)
    add("--clip-grad", "largest norm of the gradients (or value, see --clip-mode)", type=float)
    add("--clip-mode", "what --clip-grad bounds", default="norm", choices=["norm", "value", "agc"])
    add("--grad-accum-steps", "forward passes for each optimizer step", default=1)
    add("--amp", "mixed precision (default: bf16 on a GPU, off on the CPU)", nargs="?", const="bf16", choices=AMP)
    add("--compile", "compile the model with torch.compile, for training and evaluation", action="store_true")
    add(
        "--compile-mode",
        """mode of --compile in training; auto: on one GPU, unless gradients are accumulated, reduce-overhead,
        which replays CUDA graphs and keeps more memory; else default, which evaluation always uses""",
        default="auto",
        choices=COMPILE_MODES,
    )

    add = _group(parser, "schedule")
    add("--lr", "base learning rate, scaled by global batch / 512", default=5e-4)
    add("--unscale-lr", "--lr is the learning rate itself", action=Switch, default=False)
    add("--sched", "learning-rate schedule", default="cosine", choices=SCHEDULES)
    add("--sched-on-updates", "step the schedule at every optimizer step instead of every epoch", action="store_true")
    add("--warmup-epochs", "epochs of linear warm-up", default=5.0)
    add("--warmup-lr", "learning rate at the start of the warm-up", default=1e-6)
    add("--min-lr", "lowest learning rate", default=1e-5)
    add("--cooldown-epochs", "epochs at the lowest rate after --epochs (cosine, tanh, poly)", default=0)
    add("--decay-epochs", "epochs between decays (step)", default=30.0)
    add("--decay-milestones", "epochs of the decays (multistep)", nargs="+", default=[90, 180, 270])
    add("--decay-rate", "--dr", "factor of a decay (step, multistep, plateau), or power of poly", default=0.1)
    add("--patience-epochs", "epochs without progress before a decay (plateau)", default=10)
    add("--lr-noise", "epochs between which the rate is perturbed, as shares of all epochs", type=float, nargs="+")
    add("--lr-noise-pct", "limit of the perturbation, as a share of the rate", default=0.67)
    add("--lr-noise-std", "standard deviation of the perturbation", default=1.0)

    add = _group(parser, "augmentation and regularisation")
    add("--no-aug", "resize and crop only", action="store_true")
    add("--color-jitter", "strength of colour jitter, used without an --aa policy", default=0.3)
    add("--aa", "AutoAugment policy of timm, or none", default="rand-m9-mstd0.5-inc1")
    add(
        "--three-augment",
        "--ThreeAugment",
        "3-Augment of DeiT III instead of --aa, like there without random erasing unless --reprob is given",
        action="store_true",
    )
    add("--src", "simple random crop of DeiT III instead of random resized crop", action="store_true")
    add("--scale", "area of random resized crops, as a share of the image", nargs=2, default=[0.08, 1.0])
    add("--ratio", "aspect ratio of random resized crops", nargs=2, default=[3 / 4, 4 / 3])
    add("--hflip", "probability of a horizontal flip (default: 0.5; for DIGITS 0)", type=float)
    add("--vflip", "probability of a vertical flip", default=0.0)
    interpolations = ["bicubic", "bilinear", "random"]
    add("--train-interpolation", "resizing for training", default="bicubic", choices=interpolations)
    add(
        "--repeated-aug",
        """use a third of the images in each epoch, three times each (default: on for several processes, off
        for one, as in DeiT)""",
        action=Switch,
    )
    add("--train-mode", "--no-train-mode keeps dropout and drop path off while training", action=Switch, default=True)
    add("--reprob", "probability of random erasing", default=0.25)
    add("--remode", "what erased areas are filled with", default="pixel", choices=["const", "rand", "pixel"])
    add("--recount", "erased areas in an image", default=1)
    add("--resplit", "accepted from DeiT's command line, where it has no effect either", action="store_true")
    add("--mixup", "mixup alpha; 0 turns it off", default=0.8)
    add("--cutmix", "cutmix alpha; 0 turns it off", default=1.0)
    add("--cutmix-minmax", "smallest and largest share of the image, instead of --cutmix", type=float, nargs=2)
    add("--mixup-prob", "probability of mixup or cutmix for a batch", default=1.0)
    add("--mixup-switch-prob", "probability of cutmix if both are on", default=0.5)
    add("--mixup-mode", "what shares one mixing ratio", default="batch", choices=["batch", "pair", "elem"])
    add("--smoothing", "label smoothing", default=0.1)
    add("--bce-loss", "binary cross-entropy on unsmoothed targets, as in DeiT III", action="store_true")
    add("--cosub", "co-train two submodels drawn by --drop-path on each image (arXiv:2212.04884)", action="store_true")

    add = _group(parser, "weight averaging")
    add("--model-ema", "keep an exponential moving average (EMA) of the weights", action=Switch, default=True)
    add(
        "--model-ema-decay",
        """fixed decay of a step; DeiT's is 0.99996 (default: a warm-up, min(1 - t^(-2/3), 0.99996) at step t,
        which is 0.990 at step 1,000 and 0.9998 at 375,000)""",
        type=float,
    )
    add("--model-ema-force-cpu", "keep the average in host memory", action="store_true")

    add = _group(parser, "distillation")
    kinds = ["none", "soft", "hard"]
    add("--distillation-type", "what the student learns from the teacher", default="none", choices=kinds)
    add("--teacher-model", "a model of timm (default: the model of --teacher-path, else regnety_160)")
    add("--teacher-path", "checkpoint of the teacher", default="")
    add("--distillation-alpha", "weight of the teacher in the loss", default=0.5)
    add("--distillation-tau", "temperature of soft distillation", default=1.0)


def _add_run(parser) -> None:
    add = _group(parser, "checkpoint and evaluation")
    add(
        "--output-dir",
        "--output",
        "folder for checkpoints, log.txt and curves.png; without it nothing is saved",
        default="",
    )
    add(
        "--resume",
        "--checkpoint",
        """checkpoint to go on from, or to evaluate: a path, a URL, hf_hub:USER/NAME, or auto for the last one
        in --output-dir, if there is any; settings that are not given are taken from it""",
        default="",
        metavar="FILE|auto",
    )
    add(
        "--finetune",
        "--initial-checkpoint",
        "--pretrained-path",
        """checkpoint to start from, wherever its weights fit: of any number of classes, image or patch size,
        of a ViT for a KAT, AugReg's .npz; what does not fit is listed (with --resume auto it is used only if there
        is no checkpoint to go on from)""",
        default="",
        metavar="FILE",
    )
    add(
        "--use-ema",
        """averaged or raw weights of the file (default: --eval shows both; --finetune takes the better ones if
        the file says so, else the averaged ones if there are any)""",
        action=Switch,
    )
    add(
        "--attn-only", "train attention, position embedding and classifier only (arXiv:2203.09795)", action="store_true"
    )
    add(
        "--start-epoch",
        "first epoch, counted from 0 (default: what the checkpoint says, else 0)",
        type=int,
    )
    add("--save-every", "also keep the checkpoint of every Nth epoch", default=0)
    add("--eval", "evaluate only", action="store_true")
    add(
        "--result",
        "after --eval print the JSON of KAT's validate.py, or write it to FILE",
        nargs="?",
        const="-",
        default="",
        metavar="FILE",
    )
    add("--eval-every", "evaluate every Nth epoch, and the last one", default=1)

    add = _group(parser, "logging")
    add("--print-freq", "steps between log lines; each line synchronises the device once", default=50)
    add(
        "--log-grad-norms",
        """log the norms of the gradients, before clipping, by kind of parameter: operators, KAN coefficients,
        attention, MLP, embeddings and norms, head""",
        action="store_true",
    )
    add("--run-name", "log to Weights & Biases under this name", default="")
    add(
        "--log-wandb",
        "log to Weights & Biases, under the name of the output folder unless --run-name is given",
        action="store_true",
    )
    add("--run-id", "Weights & Biases run to continue", default="")
    add("--wandb-project", "Weights & Biases project", default="kan-vit")

    add = _group(parser, "distributed", "torchrun sets these; the flags are those of DeiT's command line")
    add("--distributed", "stop unless torchrun or another launcher started the process", action="store_true")
    add("--world-size", "stop unless this number of processes was started", type=int)
    add("--dist-url", "where the processes meet", default="env://")
    add(
        "--dist-eval", "no effect: evaluation always uses all processes and counts each image once", action="store_true"
    )

    add = _group(parser, "device and reproducibility")
    add("--device", "cuda, cuda:N or cpu; without a GPU, the CPU", default="cuda")
    add(
        "--kernel",
        """what computes rational functions on a GPU: cuda, the kernels, or an error for what they do not take;
        torch, plain PyTorch (default: KAN_KERNEL or auto, the kernels where they can run)""",
        choices=KERNELS,
    )
    add("--seed", "seed of every random generator", default=0)
    add("--deterministic", "on a GPU, only kernels that repeat to the bit", action="store_true")
