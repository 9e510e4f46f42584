"""The most probable classes of images.

python tools/predict.py IMAGE [IMAGE ...] --checkpoint OUT/best_checkpoint.pth
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import os
from argparse import Namespace

import torch
from timm.data import ImageNetInfo
from torchvision.transforms.functional import normalize

import utils
from arguments import Parser
from checkpoint import read
from checkpoint.fill import load_all
from convert import add_model_options, describe
from images import DataError, load_image
from labels import class_names
from model_factory import build_model, outputs_of
from transforms import build_transform
from utils import UserError


def get_args_parser() -> Parser:
    p = Parser("predict.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    p.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    p.add_argument("--checkpoint", required=True, metavar="FILE", help="a path, a URL or hf_hub:USER/NAME")
    add_model_options(p)
    p.add_argument("--topk", type=int, default=5, metavar="K", help="classes to print for each image (default: 5)")
    text = "names of the outputs, one a line (default: the checkpoint's, else ImageNet's)"
    p.add_argument("--classes", metavar="FILE", help=text)
    p.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu; without a GPU, the CPU (default: cuda)")
    return p


def names_of(outputs: int, trained_on: list[str] | None, file: str | None) -> list[str]:
    """A name for every output: the file's, else the checkpoint's, else ImageNet's, else its number; descriptions in
    place of ImageNet's wnids.

    Raises: UserError if the file cannot be read or has not as many names.
    """
    if file:
        try:
            names = Path(file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--classes {file} cannot be read ({utils.first_line(error)})") from error
        if len(names) != outputs:
            raise UserError(f"--classes {file} has {len(names)} names, the model {outputs} outputs")
        return names
    names = class_names(outputs, trained_on) or []
    description = ImageNetInfo().label_name_to_description

    def readable(name: str) -> str:
        try:
            return description(name)
        except KeyError:  # not a wnid
            return name

    return [readable(name) for name in names] + [f"class {index}" for index in range(len(names), outputs)]


@torch.inference_mode()
def predict(options: Namespace) -> int:
    """Print the classes of every image that can be read and name the others; the number of those."""
    if options.topk < 1:
        raise UserError(f"--topk must be at least 1, not {options.topk}")
    checkpoint = read(options.checkpoint)
    args = describe(checkpoint, options)
    weights, which = checkpoint.choose(args.use_ema)
    model = build_model(args, outputs_of(checkpoint, args.model), weights_follow=True)
    load_all(model, weights, f"{options.checkpoint} ({which} weights)", resample=True)
    names = names_of(model.num_classes, checkpoint.classes, options.classes)
    device = utils.init_world(options.device).device
    model.to(device)
    transform, unread = build_transform(False, args), 0
    for path in options.images:
        try:
            image = torch.as_tensor(transform(load_image("", os.fsencode(path))), device=device)
        except DataError as error:
            utils.report(error)
            unread += 1
            continue
        x = normalize(image / 255, args.mean, args.std)
        probabilities, indices = model(x[None])[0].softmax(-1).topk(min(options.topk, len(names)))
        print(
            path,
            *(f"{100 * p:7.2f} %  {names[i]}" for p, i in zip(probabilities.tolist(), indices.tolist())),
            sep="\n",
            flush=True,
        )
    return unread


def main(argv: list[str] | None = None) -> int:
    try:
        return 2 if predict(get_args_parser().parse_intermixed_args(argv)) else 0
    except UserError as error:
        utils.report(error)
        return 2


if __name__ == "__main__":
    sys.exit(main())
