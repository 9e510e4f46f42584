"""Weights from any layout that can be read into ours, KAT's or FlashKAT's.

For main.py --eval --resume OUT/kat_tiny.pth; for a KAT that starts as a ViT; for the published code of KAT:

    python tools/convert.py kat_tiny_patch16_224.pth.tar OUT/kat_tiny.pth
    python tools/convert.py vit_tiny.npz OUT/kat_tiny.pth --model kat_tiny_gelu_patch16_224
    python tools/convert.py OUT/best_checkpoint.pth OUT/kat_tiny_patch16_224.pth --to kat
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import re
from argparse import BooleanOptionalAction, Namespace
from dataclasses import replace
from functools import partial

import safetensors.torch
import torch
from torch import Tensor

import utils
from arguments import Arguments, Parser, parse
from checkpoint import Checkpoint, read
from checkpoint.fill import load_matching
from model_factory import build_model, outputs_of
from models.kat import KATMixin
from models.published import model_in
from models.timm_internals import init_weights_by_timm
from param_groups import kind
from utils import UserError

# The arguments that describe a model and its images.
DESCRIPTION = ("model", "model_options", "input_size", "mean", "std", "eval_crop_ratio", "interpolation")
LAYOUTS = {"kat": "KAT", "flashkat": "FlashKAT"}
COEFFICIENTS = re.compile(r"\.act[12]\.weight_(numerator|denominator)$")


def get_args_parser() -> Parser:
    p = Parser("convert.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    p.add_argument("source", metavar="SOURCE", help="a path, a URL or hf_hub:USER/NAME")
    p.add_argument("target", metavar="TARGET", help="file to write; *.safetensors holds the tensors alone")
    text = """a checkpoint for main.py, or bare weights under the names of KAT's or FlashKAT's code (default: ours)"""
    p.add_argument("--to", default="ours", choices=["ours", *LAYOUTS], help=text)
    add_model_options(p)
    p.add_argument("--nb-classes", type=int, help="outputs of the classifier (default: the source's)")
    p.add_argument("--force", action="store_true", help="replace TARGET if it exists")
    return p


def add_model_options(p: Parser) -> None:
    p.add_argument("--model", help="name of the model (default: what the checkpoint or its name says)")
    text = "options of the model, such as act_init=relu (default: what the checkpoint says)"
    p.add_argument("--model-kwargs", nargs="*", metavar="KEY=VALUE", help=text)
    p.add_argument("--input-size", type=int, help="side of the images in pixels (default: the checkpoint's)")
    text = """averaged or raw weights (default: the better ones if the checkpoint says so, else the averaged ones if
    there are any)"""
    p.add_argument("--use-ema", action=BooleanOptionalAction, help=text)


def describe(checkpoint: Checkpoint, options: Namespace) -> Arguments:
    """Arguments of main.py for the model of a checkpoint: what is given, the file says, its tensors imply or timm
    knows.

    Raises: UserError if nothing names the model, or the options contradict each other.
    """
    if not options.model and not checkpoint.model and not model_in(checkpoint.source):
        raise UserError(f"{checkpoint.source} does not say which model it is of: name it with --model")
    argv = ["--eval", f"--resume={checkpoint.source}"]
    for key in ("model", "input_size", "nb_classes"):
        if (value := getattr(options, key, None)) is not None:
            argv.append(f"--{key}={value}")
    if options.use_ema is not None:
        argv.append("--use-ema" if options.use_ema else "--no-use-ema")
    argv += ["--model-kwargs", *(getattr(options, "model_kwargs", None) or ())]
    settings = {key: value for key, value in checkpoint.settings.items() if key in DESCRIPTION}
    return parse(argv, lambda _: replace(checkpoint, settings=settings)).args


def convert(options: Namespace) -> None:
    target = Path(options.target)
    if target.exists() and Path(options.source).exists() and target.samefile(options.source):
        raise UserError(f"SOURCE and TARGET are the same file, {target}")
    if target.is_dir():
        raise UserError(f"{target} is a folder: TARGET is a file")
    if target.exists() and not options.force:
        raise UserError(f"{target} exists already: name another file, or replace it with --force")
    if not target.parent.is_dir() or target.suffix == ".npz":
        reason = ".npz is read, not written" if target.parent.is_dir() else f"there is no folder {target.parent}"
        raise UserError(f"cannot write {target}: {reason}")
    checkpoint = read(options.source)
    # Like the file of another trainer, the source may fill any model.
    args = describe(replace(checkpoint, foreign=True), options)
    weights, which = checkpoint.choose(args.use_ema)
    outputs = outputs_of(checkpoint, args.model) or 0
    utils.seed_everything(args.seed)  # parameters that the source lacks are the same every time
    model = build_model(args, options.nb_classes or outputs, weights_follow=True)
    if isinstance(model, KATMixin):  # it is not initialised; timm's initialisation is quick and enough for a classifier
        init_weights_by_timm(model)
    print(*load_matching(model, weights, f"{options.source} ({which} weights)"), sep="\n")
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    for name, value in weights.items():
        if COEFFICIENTS.search(name) and name in state and state[name].shape != value.shape:
            raise UserError(
                f"{options.source}: {name} has shape {tuple(value.shape)} and the model {tuple(state[name].shape)}: "
                "name its degrees and groups, such as --model-kwargs 'degrees=(5, 4)' num_groups=8 numerator_groups=1"
            )
    if options.to != "ours":
        state = published(state, options.to)
    elif target.suffix != ".safetensors":
        described = {key: args.plain()[key] for key in DESCRIPTION}
        state = {"model": state, "args": described, "versions": utils.versions()}
        if checkpoint.classes and model.num_classes == outputs:
            state["classes"] = checkpoint.classes
    bare = target.suffix == ".safetensors"
    save = (lambda file: file.write(safetensors.torch.save(state))) if bare else partial(torch.save, state)
    try:
        utils.write_atomically(target, save)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        raise UserError(f"cannot write {target} ({utils.first_line(error)})") from error
    print(f"{target}: {args.model}, {args.input_size} pixels, {model.num_classes} outputs")


def published(state: dict[str, Tensor], layout: str) -> dict[str, Tensor]:
    """The weights under the names of KAT's or FlashKAT's code.

    Both have degrees 5 and 4, and KAT's code has 8 groups and one numerator.
    Raises: UserError for a model that the code cannot build.
    """
    shapes = {name: tuple(value.shape) for name, value in state.items() if COEFFICIENTS.search(name)}
    faults = {
        "there is Kolmogorov-Arnold attention": any(kind(name) == "karat" for name in state),
        "there are no rational functions": not shapes,
        "there is a distillation token": "dist_token" in state,
    }
    for name, shape in shapes.items():
        right = (1, 6) if name.endswith("numerator") else (8, 4)
        faults[f"{name} has shape {shape}"] = shape[-1] != right[-1] or layout == "kat" and shape != right
    for fault, holds in faults.items():
        if holds:
            raise UserError(f"--to {layout}: {LAYOUTS[layout]}'s code has no such model: {fault}")
    if layout == "kat":
        return state
    return {COEFFICIENTS.sub(lambda m: m[0].replace("weight_", "") + "_v", name): v for name, v in state.items()}


def main(argv: list[str] | None = None) -> int:
    try:
        convert(get_args_parser().parse_intermixed_args(argv))
        return 0
    except UserError as error:
        utils.report(error)
        return 2


if __name__ == "__main__":
    sys.exit(main())
