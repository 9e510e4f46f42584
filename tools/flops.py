"""Parameters and FLOPs of models for one image, side by side.

    python tools/flops.py --model vit_tiny_patch16_224 kat_tiny_patch16_224 vit_tiny_patch16_224_karat
    python tools/flops.py --model kat_tiny_patch16_224 vit_base_patch16_224_karat --grid 1 --mlp-basis spline --nb-classes 10 --json OUT/flops.json

All flags of main.py are taken; those of attention and MLP bases shape the models that have them. One FLOP is one multiply-add, as fvcore counts:
linear layers and convolutions, layer norms at 5 per element; no bias, softmax, GELU, sine or exponential. fvcore traces the model without our own
functions, which it would see in part or not at all, depending on how they are computed. They are counted by formula:

    MLP of a KAT       c for each element of the input of an activation; 21 for the published rationals, where a product and a sum count as two
    attention of       c for each function of a row of scores, one for each that has a base function, and one for each entry of the projection W:
    a KArAt            (3 G + 1) N^2 r h L for the published ones (N tokens, h heads, L blocks, rank r), whose W is applied to each row
    c                  Fourier 3 G: G angles, 2 G products
                       rational of degrees (m, n) 2 m + 2 n + 3: two Horner schemes, a division, an absolute value and a power of it
                       B-spline (2 k + 1) G + 3 k^2: the k steps of the recursion, 2 for each piece, and G + k products
                       wavelet 5: argument, square, wave, envelope and weight

"Attention products" are Q K^T and the product with V, N^2 d each for a head, for KArAt as for softmax. models/karat.py itself computes less, by applying
W to V, and its features are shared by the r functions of a score.

How the published figures come about: KAT's (1.13, 4.35, 17.06; its ViT 1.08, 4.25, 16.87) leave the attention products out, because fvcore skips fused
attention, and have 1,000 classes. KArAt's have them (ViT-T 1.258) and 10 classes; its activation alone is the formula above (T .1677, S .3353, B .2682).
Its totals (1.425, 4.941, 17.847) are, to all digits and for all three models, the sum of both less 2 N C for each block of width C: as if the two norms of
a block were counted at 4 per element, which is fvcore's figure for norms without weights. Why is not published, and the same norms stand with 5 in the
ViT-T to which they are compared; so this tool does not follow, and prints 1.426, 4.943 and 17.850.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import argparse
import json
import warnings
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kan_options
from arguments import Arguments, Parser, get_args_parser
from kan_basis import GroupBasis, GroupRational
from kan_basis.basis import Basis
from models.build import build_model, freeze_all_but_attention
from models.karat import KArAtAttention
from models.operator import KArAtOperator
from utils import UserError, first_line

FORMULAS = {
    "fourier": lambda b: 3 * b.grid,
    "rational": lambda b: 2 * sum(b.degrees) + 3,
    "spline": lambda b: (2 * b.order + 1) * b.grid + 3 * b.order**2,
    "wavelet": lambda b: 5,
}
PRODUCTS = (
    "scaled_dot_product_attention",
    "matmul",
    "bmm",
    "baddbmm",
    "einsum",
)  # of two activations: what attention takes
COLUMNS = {
    "model": "model",
    "parameters": "params M",
    "trainable": "trainable M",
    "without_attention_products": "GFLOPs without attention products",
    "with_attention_products": "with them",
    "kan": "KAN functions alone",
}


def function_flops(basis: Basis) -> int:
    """c above: FLOPs of one function at one point. Raises: UserError for a basis without a formula."""
    if basis.name not in FORMULAS:
        raise UserError(
            f"there is no formula for the FLOPs of the {basis.name} basis: tools/flops.py lists them in FORMULAS"
        )
    return FORMULAS[basis.name](basis)


def kan_flops(module: GroupRational | GroupBasis | KArAtOperator, size: int) -> int:
    """Of an activation for `size` elements, or of an operator for `size` rows of scores in each head."""
    if isinstance(module, GroupRational):
        return size * FORMULAS["rational"](module)
    if isinstance(module, GroupBasis):
        return size * function_flops(module.basis)
    edges = sum(
        layer.in_features * layer.out_features * (function_flops(layer.basis) + (layer.base_fn is not None))
        for layer in module.layers
    )
    projections = sum(w[0].numel() for w in (module.project_in, module.project_out) if w is not None)
    return size * module.num_heads * (edges + projections)


@contextmanager
def _own_functions_replaced(model: nn.Module):
    """Activations by the identity, operators by softmax attention; yields a list that a forward pass fills with the arguments of `kan_flops`."""
    seen, replaced = [], []

    def identity(act: nn.Module, x: Tensor) -> Tensor:
        seen.append((act, int(x.numel())))
        return x

    def softmax(operator: KArAtOperator, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        seen.append((operator, int(query.shape[0] * query.shape[2])))
        return F.scaled_dot_product_attention(query, key, value)

    for module in model.modules():
        if isinstance(module, (GroupRational, GroupBasis)):
            module.forward = partial(identity, module)
            replaced.append((module, "forward"))
        elif isinstance(module, KArAtAttention):
            module.apply_operator = softmax
            replaced.append((module, "apply_operator"))
    try:
        yield seen
    finally:
        for module, name in replaced:
            delattr(module, name)


def _attention_products(inputs: list, outputs: list) -> int:
    """Q K^T and A V of fused attention: (..., M, d), (..., N, d), (..., N, e)."""
    query, key, value = (t.type().sizes() for t in inputs[:3])
    return torch.Size(query[:-1]).numel() * key[-2] * (query[-1] + value[-1])


@torch.no_grad()
def count(model: nn.Module, input_size: int) -> dict[str, int]:
    """Parameters and FLOPs of one image of input_size x input_size pixels, by the keys of COLUMNS.

    Raises: UserError where fvcore is not installed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about the jit that fvcore uses
        try:
            from fvcore.nn import FlopCountAnalysis
        except ImportError as error:
            raise UserError("FLOPs are counted by fvcore, which is not installed: pip install fvcore") from error
        image = torch.zeros(1, 3, input_size, input_size, device=next(model.parameters()).device)
        with _own_functions_replaced(model.eval()) as seen:
            analysis = FlopCountAnalysis(model, image).set_op_handle(
                "aten::scaled_dot_product_attention", _attention_products
            )
            analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
            traced = {name: int(flops) for name, flops in analysis.by_operator().items()}
    own, products = (
        sum(kan_flops(*each) for each in seen),
        sum(flops for name, flops in traced.items() if name in PRODUCTS),
    )
    total = sum(traced.values()) + own
    parameters = list(model.parameters())
    return {
        "parameters": sum(p.numel() for p in parameters),
        "trainable": sum(p.numel() for p in parameters if p.requires_grad),
        "without_attention_products": total - products,
        "with_attention_products": total,
        "kan": own,
    }


def arguments_of(names: list[str], argv: list[str]) -> list[Arguments]:
    """For each model the flags of main.py, without those of bases that it does not have but another of the models does.

    Raises: UserError for flags that none of the models takes, or that do not fit a model.
    """
    parser, described = get_args_parser(), []
    parser.prog, parser.usage = "flops.py", "flops.py --model NAME [NAME ...] [--json FILE] [options of main.py]"
    for name in names:
        try:
            args = parser.parse_intermixed_args([f"--model={name}", *argv], Arguments())
        except ValueError as error:  # of timm's KEY=VALUE parser
            raise UserError("--model-kwargs takes KEY=VALUE pairs, such as depth=6") from error
        for part, flags in (("karat", kan_options.ATTENTION), ("kat_", kan_options.MLP)):
            if part not in name and any(part in other for other in names):
                for flag in flags:
                    setattr(args, flag, None)
        args.init = None  # no matter for a count
        kan_options.check(args)
        described.append(args.freeze())
    return described


def table(rows: list[dict]) -> str:
    """Millions of parameters, giga-FLOPs."""
    cells = [list(COLUMNS.values())]
    cells += [
        [
            row["model"],
            *(f"{row[key] / (1e6 if key in ('parameters', 'trainable') else 1e9):.4f}" for key in list(COLUMNS)[1:]),
        ]
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:]))])
        for line in cells
    )


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
        sys.stderr.write(f"error: {error}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main())
