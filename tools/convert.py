"""Weights from any layout that weights.py reads into ours, KAT's or FlashKAT's.

python tools/convert.py kat_tiny_patch16_224.pth.tar OUT/kat_tiny.pth                         # main.py --eval --resume OUT/kat_tiny.pth
python tools/convert.py vit_tiny.npz OUT/kat_tiny.pth --model kat_tiny_gelu_patch16_224       # a KAT that starts as the ViT
python tools/convert.py OUT/best_checkpoint.pth OUT/kat_tiny_patch16_224.pth --to kat         # for KAT's published code
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import os
import re
from argparse import BooleanOptionalAction, Namespace

import safetensors.torch
import torch
from torch import Tensor

import utils
import weights
from arguments import Arguments, Parser, parse
from groups import kind
from kan_options import MODEL_FLAGS
from models.build import build_model, outputs_of
from models.kat import KATMixin
from models.load import choose, load_matching
from utils import UserError

# the arguments that describe a model and its images
DESCRIPTION = ("model", "model_kwargs", "input_size", "mean", "std", "eval_crop_ratio", "interpolation", *MODEL_FLAGS)
LAYOUTS = {"kat": "KAT", "flashkat": "FlashKAT"}
COEFFICIENTS = re.compile(r"\.act[12]\.weight_(numerator|denominator)$")


def get_args_parser() -> Parser:
    p = Parser("convert.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    p.add_argument("source", metavar="SOURCE", help="a path, a URL or hf_hub:USER/NAME")
    p.add_argument("target", metavar="TARGET", help="file to write; *.safetensors holds the tensors alone")
    p.add_argument(
        "--to",
        default="ours",
        choices=["ours", *LAYOUTS],
        help="a checkpoint for main.py, or bare weights under the names of KAT's or FlashKAT's code (default: ours)",
    )
    p.add_argument("--model", help="model to fill, of the source's or another kind (default: the source's)")
    p.add_argument(
        "--model-kwargs", nargs="*", metavar="KEY=VALUE", help="further options of the model (default: the source's)"
    )
    p.add_argument("--input-size", type=int, help="image side, pixels (default: the source's)")
    p.add_argument("--nb-classes", type=int, help="outputs of the classifier (default: the source's)")
    p.add_argument(
        "--use-ema",
        action=BooleanOptionalAction,
        help="averaged or raw weights (default: the better ones if the source says so, else the "
        "averaged ones if there are any)",
    )
    p.add_argument("--force", action="store_true", help="replace TARGET if it exists")
    return p


def describe(checkpoint: dict, options: Namespace, source: str) -> Arguments:
    """Arguments of the checkpoint's model: the options, else what the checkpoint says, its tensors imply or timm knows of the model.

    Raises: UserError if nothing names the model, or the options contradict each other.
    """
    if not options.model and not (checkpoint.get("args") or {}).get("model"):
        raise UserError(f"{source} does not say which model it is of: name it with --model")
    argv = ["--eval", f"--resume={source}"]
    argv += [
        f"--{key}={value}"
        for key in ("model", "input_size", "nb_classes")
        if (value := getattr(options, key, None)) is not None
    ]
    argv += [] if options.use_ema is None else ["--use-ema" if options.use_ema else "--no-use-ema"]
    argv += ["--model-kwargs", *options.model_kwargs] if getattr(options, "model_kwargs", None) else []
    return parse(
        argv,
        lambda _: {
            **checkpoint,
            "args": {key: value for key, value in (checkpoint.get("args") or {}).items() if key in DESCRIPTION},
        },
    )[0]


def convert(options: Namespace) -> None:
    target = Path(options.target)
    if os.path.exists(options.source) and target.exists() and os.path.samefile(options.source, target):
        raise UserError(f"SOURCE and TARGET are the same file, {target}")
    if target.is_dir():
        raise UserError(f"{target} is a folder: TARGET is a file")
    if target.exists() and not options.force:
        raise UserError(f"{target} exists already: name another file, or replace it with --force")
    if not target.parent.is_dir() or target.suffix == ".npz":
        raise UserError(
            f"cannot write {target}: "
            + (".npz is read, not written" if target.parent.is_dir() else f"there is no folder {target.parent}")
        )
    checkpoint = weights.read(options.source)
    args = describe(checkpoint, options, options.source)
    chosen, which = choose(checkpoint, args.use_ema)
    outputs = outputs_of(checkpoint, args) or 0
    utils.seed_everything(args.seed)  # what the source lacks is drawn the same every time
    model = build_model(args, options.nb_classes or outputs, weights_follow=True)
    if isinstance(
        model, KATMixin
    ):  # was built bare: timm's initialisation is enough for a classifier, KAT's takes long
        model.weight_init_mode = ""
        model.init_weights()
    print(*load_matching(model, chosen, f"{options.source} ({which} weights)"), sep="\n")
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    for name, value in chosen.items():
        if COEFFICIENTS.search(name) and name in state and state[name].shape != value.shape:
            raise UserError(
                f"{options.source}: {name} has shape {tuple(value.shape)} and the model {tuple(state[name].shape)}: name its degrees and "
                "groups, such as --model-kwargs 'degrees=(5, 4)' num_groups=8 numerator_groups=1"
            )
    if options.to != "ours":
        state = published(state, options.to)
    elif target.suffix != ".safetensors":
        classes = checkpoint.get("classes") if model.num_classes == outputs else None
        state = {
            "model": state,
            "args": {key: args.plain()[key] for key in DESCRIPTION},
            "versions": utils.versions(),
            **({"classes": classes} if classes else {}),
        }
    try:
        utils.write_atomically(
            target,
            lambda file: (
                file.write(safetensors.torch.save(state))
                if target.suffix == ".safetensors"
                else torch.save(state, file)
            ),
        )
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        raise UserError(f"cannot write {target} ({utils.first_line(error)})") from error
    print(f"{target}: {args.model}, {args.input_size} pixels, {model.num_classes} outputs")


def published(state: dict[str, Tensor], layout: str) -> dict[str, Tensor]:
    """Under the names that KAT's or FlashKAT's code has; KAT's has 8 groups and one numerator, both have degrees 5 and 4.

    Raises: UserError for a model that the code cannot build.
    """
    shapes = {name: tuple(value.shape) for name, value in state.items() if COEFFICIENTS.search(name)}
    faults = [
        f"{name} has shape {shape}"
        for name, shape in shapes.items()
        for right in [(1, 6) if name.endswith("numerator") else (8, 4)]
        if shape[-1] != right[-1] or layout == "kat" and shape != right
    ]
    faults += ["there is Kolmogorov-Arnold attention"] * any(kind(name) == "karat" for name in state)
    faults += ["there are no rational functions"] * (not shapes) + ["there is a distillation token"] * (
        "dist_token" in state
    )
    if faults:
        raise UserError(f"--to {layout}: {LAYOUTS[layout]}'s code has no such model: {faults[0]}")
    return {
        COEFFICIENTS.sub(lambda match: match[0].replace("weight_", "") + "_v", name)
        if layout == "flashkat"
        else name: value
        for name, value in state.items()
    }


def main(argv: list[str] | None = None) -> int:
    try:
        convert(get_args_parser().parse_intermixed_args(argv))
        return 0
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main())
