"""The command line of main.py: parsing, what a checkpoint contributes, and what does not go together."""

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from math import inf
from typing import NamedTuple

import timm
from timm.optim import list_optimizers

import flags
import kan_flags
from checkpoint import Checkpoint, find, read
from checkpoint.layouts import NOT_OF_A_MODEL
from checkpoint.read import HUB
from model_factory import base_name, check_unchanged, is_ours, on_meta, portable, updated
from models.published import model_in
from param_groups import kind
from utils import UserError

# Settings of a checkpoint that do not become defaults of --eval or --resume: they belong to the machine or the command.
NOT_RESUMED = set(
    """resume eval pretrained finetune start_epoch use_ema result output_dir device pin_mem world_size dist_url
    distributed kernel karat_resample imports data model_kwargs""".split()
)
TRAINING_ONLY = set(
    """num_workers compile compile_mode run_name run_id save_every mixup cutmix cutmix_minmax distillation_type cosub
    attn_only""".split()
)
# A data folder in first place is the command line of timm's train.py. KAT's published commands rely on its defaults.
TIMM_DEFAULTS = dict(
    unscale_lr=True, warmup_lr=1e-5, min_lr=0.0, train_interpolation="random", repeated_aug=False, decay_rational=True
)


class Arguments(argparse.Namespace):
    """The parsed arguments. They are read-only once `freeze` was called."""

    __slots__ = ("frozen",)  # which is then no argument

    def __setattr__(self, name, value):
        if hasattr(self, "frozen"):
            raise AttributeError(f"arguments are read-only (attempt to set {name})")
        super().__setattr__(name, value)

    def freeze(self) -> "Arguments":
        self.frozen = True
        return self

    def plain(self) -> dict:
        """Plain types only, for checkpoints and logs; without options that only say where weights come from."""
        options = {k: v for k, v in self.model_options.items() if k not in NOT_OF_A_MODEL}
        return {**vars(self), "model_options": options}


class Parser(argparse.ArgumentParser):
    """Takes --data-set and --data_set alike; the answer to an unknown flag names the nearest known ones."""

    def parse_intermixed_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else args
        args = [re.sub(r"^--[^=]+", lambda name: name[0].replace("_", "-"), a) for a in args]
        # A bare --amp would take DATA, which follows it, as its value.
        pairs = zip(args, [*args[1:], ""])
        args = ["--amp=bf16" if a == "--amp" and after not in flags.AMP else a for a, after in pairs]
        try:
            return super().parse_intermixed_args(args, namespace)
        except ValueError as error:  # of timm's KEY=VALUE parser
            raise UserError("--model-kwargs takes KEY=VALUE pairs, such as depth=6") from error

    def error(self, message):
        unknown = re.match(r"unrecognized.*? (--[^\s=]+)", message)
        near = difflib.get_close_matches(unknown[1], self._option_string_actions, n=3) if unknown else []
        super().error(f"{message} (did you mean {', '.join(near)}?)" if near else message)


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        plain = action.default in (None, False, "", {}, [])
        return action.help if plain else super()._get_help_string(action)


def get_args_parser() -> Parser:
    parser = Parser(
        "main.py",
        usage="main.py [DATA] [options]",
        description="Train or evaluate vision transformers with Kolmogorov-Arnold functions.",
        formatter_class=partial(_Formatter, max_help_position=34, width=120),
        allow_abbrev=False,
    )
    flags.add_arguments(parser)
    return parser


def import_modules(argv: list[str] | None) -> None:
    """Import the modules of --import, which may register bases, before the parser is made from the registry.

    They are looked up in the current folder, too.
    Raises: UserError for a module that does not exist.
    """
    early = Parser(add_help=False, allow_abbrev=False)
    early.add_argument("--import", dest="imports", action="append", default=[])
    for name in early.parse_known_args(argv)[0].imports:
        sys.path.append(os.getcwd())
        try:
            import_module(name)
        except ModuleNotFoundError as error:
            raise UserError(f"--import {name}: {error}") from error


class Command(NamedTuple):
    """What a command line says.

    args: frozen; `model_options` are all options of the model.
    resumed: the checkpoint to go on from or to evaluate. start: the checkpoint that --finetune starts from.
    """

    args: Arguments
    resumed: Checkpoint | None
    start: Checkpoint | None


def parse(argv: list[str] | None = None, load: Callable[[str], Checkpoint] = read) -> Command:
    """Parse and check the command line.

    The settings of a checkpoint that `load` reads become defaults. For --resume and --eval these are all settings of a
    checkpoint of ours, or the model and image settings of a foreign one. For --finetune they are the model, its options
    and its image size, unless --model names another model.
    Raises: UserError, one sentence, for flags that contradict each other.
    """
    import_modules(argv)
    parser = get_args_parser()
    first = parser.parse_intermixed_args(argv, Arguments())
    _check_start(first)
    parser.set_defaults(data_set="IMNET" if first.data or first.data_path else "DIGITS", data_path="./data")
    if first.data:
        parser.set_defaults(**TIMM_DEFAULTS)
    if first.three_augment:
        parser.set_defaults(reprob=0.0)
    resume = find(first.resume, first.output_dir)
    if first.eval and first.resume == "auto" and not resume:
        raise UserError(f"--resume auto finds no checkpoint in {first.output_dir or 'an empty --output-dir'}")
    source = resume or ("" if first.eval else first.finetune)
    checkpoint = load(source) if source else None
    trained = checkpoint and _model_of(checkpoint)
    if resume and not (first.model or trained):
        raise UserError(f"{resume} does not say which model it is of: name it with --model")
    name = first.model or trained or "kat_tiny_patch16_224"
    parser.set_defaults(model=name)
    cfg = timm.get_pretrained_cfg(name)
    if cfg and cfg.fixed_input_size:
        parser.set_defaults(input_size=cfg.input_size[-1])
    if resume:
        _resume_settings(parser, checkpoint, first, cfg)
    elif checkpoint and not first.model and "input_size" in checkpoint.settings:
        parser.set_defaults(input_size=checkpoint.settings["input_size"])
    args = parser.parse_intermixed_args(argv, Arguments())
    given = kan_flags.given_options(args, parser._actions)
    # --finetune takes the options of the file only for the model that the file is of.
    same = resume or (trained and base_name(name) == base_name(trained))
    of_file = portable(checkpoint.model_options) if same else {}
    verbatim = resume and not checkpoint.foreign
    args.model_options = of_file if verbatim else updated(of_file, given)
    args.timm_style = args.data is not None
    args.data_path = os.path.abspath(args.data or args.data_path)  # so that --eval works from any folder
    del args.data
    if args.opt.removeprefix("fused") in list_optimizers() and find_spec("apex") is None:
        args.opt = args.opt.removeprefix("fused")
    args.pretrained = args.pretrained and not args.finetune  # KAT's scripts give --pretrained-path and --pretrained
    if args.repeated_aug is None:
        args.repeated_aug = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if args.log_wandb and not args.run_name:
        folder = args.output_dir and os.path.basename(os.path.abspath(args.output_dir))
        args.run_name = folder or args.model
    _check(args)
    if verbatim:
        of_model = {option: value for option, value in given.items() if option not in NOT_OF_A_MODEL}
        check_unchanged(checkpoint, args.model, of_model, args.input_size)
    else:
        kan_flags.check(given, args.model_options)
    if is_ours(args.model):
        _check_model(args)
    return Command(args.freeze(), *((checkpoint, None) if resume else (None, checkpoint)))


def _check_start(first: Arguments) -> None:
    if first.resume not in ("", "auto") and first.finetune:
        raise UserError(
            "--finetune and --resume FILE do not go together: one starts a training, the other goes on with it"
        )
    if first.data and first.data_path:
        raise UserError(f"the data are in two places, {first.data} and --data-path {first.data_path}: name one")
    if first.data and not os.path.exists(first.data):
        raise UserError(
            f"the data folder {first.data} does not exist; a word that does not belong to a flag is the data folder"
        )


def _model_of(checkpoint: Checkpoint) -> str | None:
    """The model that a checkpoint, or its file name, says it is of."""
    known = checkpoint.model and (timm.is_model(base_name(checkpoint.model)) or checkpoint.model.startswith("hf"))
    if known or not checkpoint.foreign:
        return checkpoint.model
    return model_in(checkpoint.source)


def _resume_settings(parser: Parser, checkpoint: Checkpoint, first: Arguments, cfg) -> None:
    """The settings of a checkpoint become the defaults of the parser."""
    settings = checkpoint.settings
    if checkpoint.foreign and cfg:
        images = dict(mean=list(cfg.mean), std=list(cfg.std), input_size=cfg.input_size[-1])
        settings = {**images, "eval_crop_ratio": cfg.crop_pct, "interpolation": cfg.interpolation, **settings}
    left_out = NOT_RESUMED | (TRAINING_ONLY if first.eval else set())
    if first.data or (first.data_path and settings.get("data_set") == "DIGITS"):
        left_out |= {"data_set"}
    for action in parser._actions:
        value = None if action.dest in left_out else settings.get(action.dest)
        if value is not None:
            if not flags.takes(action, value):
                raise UserError(f"{checkpoint.source} is damaged: its argument '{action.dest}' has an impossible value")
            parser.set_defaults(**{action.dest: value})


def _check_model(a: Arguments) -> None:
    """Build the model without memory for its parameters: the constructor knows what it does not take."""
    model = on_meta(a.model, a.model_options, a.input_size)
    flag = "--attn-lr" if a.attn_lr is not None else "--karat-resample" if a.karat_resample != "bicubic" else None
    if flag and not any(kind(name) == "karat" for name, _ in model.named_parameters()):
        raise UserError(f"{flag} is for models with Kolmogorov-Arnold attention (*_karat), not {a.model}")


NOT_NEGATIVE = """lr weight_decay clip_grad mixup cutmix warmup_epochs warmup_lr min_lr cooldown_epochs patience_epochs
num_workers attn_lr"""
SHARES = """drop drop_path hflip vflip reprob mixup_prob mixup_switch_prob smoothing model_ema_decay distillation_alpha
eval_crop_ratio"""
# Least and largest value of flags, and how a sentence says it.
RANGES = [
    (1, inf, "at least 1", "batch_size grad_accum_steps input_size print_freq eval_every nb_classes"),
    (0, inf, "at least 0", "epochs save_every start_epoch"),
    (0, 2**32 - 1, "at least 0 and below 2^32", "seed"),
    (0, inf, "between 0 and inf", NOT_NEGATIVE),
    (0, 1, "between 0 and 1", SHARES),
]


def _check(a: Arguments) -> None:
    """Raises: UserError with the first sentence of those below that applies."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    distils = a.distillation_type != "none"
    chosen_mode = a.compile_mode not in ("auto", "default")
    no_folder = os.path.isdir(a.result) or not os.path.isdir(os.path.dirname(a.result) or ".")
    no_teacher = ":" not in a.teacher_path and not os.path.isfile(a.teacher_path)
    of_evaluation = [
        (not a.resume and not a.pretrained, "--eval needs --resume FILE or --pretrained"),
        (a.finetune, "--finetune is for training; --eval takes --resume FILE"),
        (
            a.result not in ("", "-") and no_folder,
            f"--result {a.result} is a folder or in none: it takes a file or nothing",
        ),
    ]
    of_training = [
        (a.use_ema is not None and not a.finetune, "--use-ema chooses weights for --eval or --finetune"),
        (a.result, "--result belongs to --eval"),
        (a.resume and a.pretrained, "--resume and --pretrained do not go together: choose one of them"),
        (a.save_every and not a.output_dir, "--save-every needs --output-dir"),
        (chosen_mode and not a.compile, "--compile-mode needs --compile"),
        (distils and not a.teacher_path, "--distillation-type needs --teacher-path"),
        (distils and no_teacher, f"--teacher-path: there is no checkpoint {a.teacher_path}"),
        (a.teacher_path and not distils, "--teacher-path needs --distillation-type soft or hard"),
        (a.clip_mode != "norm" and a.clip_grad is None, "--clip-mode needs --clip-grad"),
        (mixing(a) and a.batch_size % 2, f"mixup and cutmix need an even --batch-size, not {a.batch_size}"),
    ]
    faults = [
        (a.cosub and distils, "--cosub and --distillation-type do not go together"),
        (a.distributed and "WORLD_SIZE" not in os.environ, "--distributed needs a launcher, such as torchrun"),
        (
            a.world_size not in (None, processes),
            f"--world-size {a.world_size}, but {processes} process(es) were started",
        ),
        (a.resume == "auto" and not a.output_dir, "--resume auto needs --output-dir"),
        (a.run_id and not a.run_name, "--run-id needs --run-name"),
        (
            a.compile and chosen_mode and a.grad_accum_steps > 1,
            f"--compile-mode {a.compile_mode} keeps gradients in the memory of a CUDA graph, where the next of "
            "--grad-accum-steps overwrites them: leave it out",
        ),
        (a.distillation_tau <= 0, f"--distillation-tau must be positive, not {a.distillation_tau}"),
        (a.model_ema_decay is not None and not a.model_ema, "--model-ema-decay and --no-model-ema do not go together"),
        (a.no_aug and (a.three_augment or a.src), "--no-aug does not go together with --three-augment or --src"),
        (a.sched == "plateau" and a.sched_on_updates, "--sched plateau steps on epochs: drop --sched-on-updates"),
        (a.sched == "plateau" and a.eval_every != 1, "--sched plateau evaluates every epoch: drop --eval-every"),
        (a.attn_lr is not None and a.lr == 0, "--attn-lr is scheduled in proportion to --lr, which must be positive"),
        (a.opt == "adahessian", "--opt adahessian needs second derivatives, which a training step does not compute"),
        (inf in (a.attn_lr, a.lr), "--lr and --attn-lr must be finite"),
        (min(a.std) <= 0, f"--std must be positive, not {a.std}"),
        *(of_evaluation if a.eval else of_training),
    ]
    for low, high, limits, names in RANGES:
        for name in names.split():
            value = getattr(a, name)
            wrong = value is not None and not low <= value <= high
            faults.append((wrong, f"--{name.replace('_', '-')} must be {limits}, not {value}"))
    optimizers = list_optimizers()
    faults.append((a.opt.removeprefix("lookahead_") not in optimizers, _unknown("optimizer", a.opt, optimizers)))
    for flag, name in (("model", a.model), ("teacher model", a.teacher_model)):
        known = not name or timm.is_model(base_name(name)) or name.startswith(HUB)
        faults.append((not known, known or _unknown(flag, name, timm.list_models())))
    for wrong, sentence in faults:
        if wrong:
            raise UserError(sentence)


def mixing(a: Arguments) -> bool:
    """Whether batches are mixed, by mixup or cutmix."""
    return a.mixup > 0 or a.cutmix > 0 or a.cutmix_minmax is not None


def _unknown(kind: str, name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, n=8, cutoff=0.5)
    ours = [n for n in names if "kat_" in n] if "model" in kind else names
    return f"unknown {kind} '{name}'; " + (f"near it: {', '.join(near)}" if near else f"there are: {', '.join(ours)}")
