"""Parameters and FLOPs of models for one image, side by side.

    python tools/flops.py --model vit_tiny_patch16_224 kat_tiny_patch16_224 vit_tiny_patch16_224_karat
    python tools/flops.py --model kat_tiny_patch16_224 vit_base_patch16_224_karat --grid 1 --nb-classes 10 --json FILE

All flags of main.py are accepted; those of attention and MLP bases shape the models that have them. One FLOP is one
multiply-add, as fvcore counts: linear layers and convolutions, and layer norms at 5 per element; biases, softmax, GELU,
sine and exponential count nothing. fvcore traces the model without the learned functions, which it would see partly or
not at all, depending on how they are computed. They are counted by formula, where c is `flops` of the basis:

    MLP of a KAT           c for each element of the input of an activation; 21 for the published rational functions
    attention of a KArAt   c for each function of a row of scores, one for each function that has a base function,
                           and one for each entry of the projection W: (3 G + 1) N^2 r h L for the published
                           operators (N tokens, h heads, L blocks, rank r), whose W is applied to each row

"Attention products" are Q K^T and the product with V, N^2 d each for a head, for KArAt as for softmax. models/karat.py
computes less: it applies W to V, and the r functions of a score share its features.

Published figures. KAT's (1.13, 4.35, 17.06; its ViT 1.08, 4.25, 16.87) leave the attention products out, because fvcore
skips fused attention, and are for 1,000 classes. KArAt's Table 13 includes them and is for 10 classes. Its activation
is the formula above (T .1677, S .3353, B .2682). Its ViTs (1.262, 4.614, 17.595 in version 3) are, to 0.001, the
figures of this tool (1.2582, 4.6080, 17.5820) plus one FLOP for each entry of a softmax and of GELU, which fvcore does
not count (1.2614, 4.6144, 17.5948). Its KArAts (1.425, 4.941, 17.847) are the figures of this tool (1.4259, 4.9433,
17.8502) less 2 N C for each block of width C, as if the two norms of a block were counted at 4 per element, which is
what fvcore counts for norms without weights.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import argparse
import copy
import json
import warnings
from functools import partial

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kan_flags
from arguments import Arguments, Parser, get_args_parser
from model_factory import (
    build_model,
    freeze_all_but_attention,
    is_ours,
    kan_defaults,
    kan_option_names,
    on_meta,
)
from models.karat import KArAtAttention
from models.kat import activations
from models.operator import KArAtOperator
from utils import UserError, first_line, report

# Products of two activations, which are those of attention.
PRODUCTS = ("scaled_dot_product_attention", "matmul", "bmm", "baddbmm", "einsum")
COLUMNS = {
    "model": "model",
    "parameters": "params M",
    "trainable": "trainable M",
    "without_attention_products": "GFLOPs without attention products",
    "with_attention_products": "with them",
    "kan": "KAN functions alone",
}


def kan_flops(module: nn.Module, size: int) -> int:
    """FLOPs of an activation for `size` elements, or of an operator for `size` rows of scores in each head."""
    if not isinstance(module, KArAtOperator):
        return size * module.basis.flops
    edges = sum(f.in_features * f.out_features * (f.basis.flops + (f.base_fn is not None)) for f in module.layers)
    projections = sum(w[0].numel() for w in (module.project_in, module.project_out) if w is not None)
    return size * module.num_heads * (edges + projections)


def _without_functions(model: nn.Module) -> tuple[nn.Module, list[tuple[nn.Module, int]]]:
    """A copy of the model in which activations are the identity and operators are softmax attention.

    A forward pass fills the list with the arguments of `kan_flops`.
    """
    model, seen = copy.deepcopy(model).eval(), []

    def identity(act: nn.Module, x: Tensor) -> Tensor:
        seen.append((act, int(x.numel())))
        return x

    def softmax(operator: KArAtOperator, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        seen.append((operator, int(query.shape[0] * query.shape[2])))
        return F.scaled_dot_product_attention(query, key, value)

    for activation in activations(model).values():
        activation.forward = partial(identity, activation)
    for module in model.modules():
        if isinstance(module, KArAtAttention):
            module.apply_operator = softmax
    return model, seen


def _attention_products(inputs: list, outputs: list) -> int:
    """Q K^T and A V of fused attention: (..., M, d), (..., N, d), (..., N, e)."""
    query, key, value = (t.type().sizes() for t in inputs[:3])
    return torch.Size(query[:-1]).numel() * key[-2] * (query[-1] + value[-1])


@torch.no_grad()
def count(model: nn.Module, input_size: int) -> dict[str, int]:
    """Parameters and FLOPs of one image of input_size x input_size pixels, by the keys of COLUMNS.

    Raises: UserError if fvcore is not installed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about the jit that fvcore uses
        try:
            from fvcore.nn import FlopCountAnalysis
        except ImportError as error:
            raise UserError("FLOPs are counted by fvcore, which is not installed: pip install fvcore") from error
        image = torch.zeros(1, 3, input_size, input_size, device=next(model.parameters()).device)
        plain, seen = _without_functions(model)
        analysis = FlopCountAnalysis(plain, image)
        analysis.set_op_handle("aten::scaled_dot_product_attention", _attention_products)
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
        traced = {name: int(flops) for name, flops in analysis.by_operator().items()}
    learned = sum(kan_flops(*each) for each in seen)
    products = sum(flops for name, flops in traced.items() if name in PRODUCTS)
    total = sum(traced.values()) + learned
    parameters = list(model.parameters())
    return {
        "parameters": sum(p.numel() for p in parameters),
        "trainable": sum(p.numel() for p in parameters if p.requires_grad),
        "without_attention_products": total - products,
        "with_attention_products": total,
        "kan": learned,
    }


def arguments_of(names: list[str], argv: list[str]) -> list[Arguments]:
    """The arguments of main.py for each model, without options of learned functions that only other models have.

    Raises: UserError for an option that none of the models has.
    """
    parser, described, unused = get_args_parser(), [], []
    parser.prog, parser.usage = "flops.py", "flops.py --model NAME [NAME ...] [--json FILE] [options of main.py]"
    for name in names:
        cfg = timm.get_pretrained_cfg(name)  # the image size of a model that has only one, as in main.py
        parser.set_defaults(input_size=cfg.input_size[-1] if cfg and cfg.fixed_input_size else 224)
        args = parser.parse_intermixed_args([f"--model={name}", *argv], Arguments())
        given = kan_flags.given_options(args, parser._actions)
        known = kan_defaults(on_meta(name, {}, args.input_size), given) if is_ours(name) else {}
        args.model_options = {k: v for k, v in given.items() if k in known or k not in kan_option_names()}
        unused.append(given.keys() - args.model_options.keys())
        described.append(args.freeze())
    if nowhere := set.intersection(*unused):
        raise UserError(f"none of the models has the option {', '.join(sorted(nowhere))}")
    return described


def table(rows: list[dict]) -> str:
    """Millions of parameters, giga-FLOPs."""
    width = max(len(row["model"]) for row in rows)
    name, *titles = COLUMNS.values()
    lines = ["  ".join([name.ljust(width), *(title.rjust(10) for title in titles)])]
    for row in rows:
        line = row["model"].ljust(width)
        for key, value in row.items():
            if key != "model":
                unit = 1e6 if key in ("parameters", "trainable") else 1e9
                line += f"  {value / unit:{max(10, len(COLUMNS[key]))}.4f}"
        lines.append(line)
    return "\n".join(lines)


def options_parser() -> Parser:
    p = Parser(
        "flops.py",
        description=__doc__.splitlines()[0],
        epilog="All flags of main.py are taken too, such as --nb-classes (default: the model's), "
        "--input-size, --grid and --mlp-basis.",
        allow_abbrev=False,
    )
    p.add_argument("--model", "-m", nargs="+", required=True, metavar="NAME", help="one or more models")
    p.add_argument("--json", metavar="FILE", help="also write the rows there, in units of one")
    return p


def run(options: argparse.Namespace, argv: list[str]) -> None:
    rows = []
    for args in arguments_of(options.model, argv):
        model = build_model(args, args.nb_classes, weights_follow=True)
        if args.attn_only:
            freeze_all_but_attention(model)
        rows.append({"model": args.model, **count(model, args.input_size)})
    print(table(rows))
    if options.json:
        try:
            Path(options.json).write_text(json.dumps(rows, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"--json {options.json} cannot be written ({first_line(error)})") from error


def main(argv: list[str] | None = None) -> int:
    try:
        run(*options_parser().parse_known_args(argv))
        return 0
    except UserError as error:
        report(error)
        return 2


if __name__ == "__main__":
    sys.exit(main())
