"""The flags of main.py for Kolmogorov-Arnold functions. They are made from the registry of bases.

The `dest` of each flag is an option of the model's constructor, which validates it. A flag that is not given is None,
and the model then keeps its default, so that a name alone is the published model.
"""

from argparse import Action, ArgumentParser, BooleanOptionalAction, Namespace, _ArgumentGroup
from typing import Any

from kan_basis.basis import BASES, INITS, basis_class, choices_of, default_of, option_names
from models.kat import INITS as KAT_INITS
from models.operator import MODES, OUTPUT_SCALES
from models.resample import INTERPOLATIONS
from utils import UserError


def add_arguments(p: ArgumentParser) -> None:
    """Add the groups KAN basis, attention and MLP basis."""
    on, off = (dict(action="store_const", const=const) for const in (True, False))
    g = p.add_argument_group("KAN basis", "the functions in the attention of *_karat models")
    names = sorted(cls.__name__ for cls in BASES.values())
    add(g, "--basis-type", "family of the functions (default: FourierBasis)", type=_class_name, choices=names)
    _add_basis_options(g, "attention")
    add(g, "--base-fn", "element-wise class of torch.nn to add to the basis, such as nn.SiLU (default: ZeroModule)")
    add(g, "--basis-not-trainable", "freeze coefficients and scales of the basis", dest="basis_trainable", **off)
    add(g, "--base-not-trainable", "freeze scales and parameters of --base-fn", dest="base_trainable", **off)
    g.add_argument(
        "--decay-rational",
        action=BooleanOptionalAction,
        default=False,
        help="""weight decay on the coefficients and scales of all learned functions, as in the published runs; off
        by default, because decay pulls a function towards zero and not towards a simpler function""",
    )

    g = p.add_argument_group("attention", "of *_karat models: sigma(A) replaces softmax(A), one operator for each head")
    one = g.add_mutually_exclusive_group()
    add(one, "--universal", "one operator for all blocks", **on)
    add(one, "--blockwise", "an operator for each block (default)", dest="universal", **off)
    add(
        g,
        "--depth",
        """stages of an operator: 1 is Phi(A) with N x N functions; 2 is Phi2(Phi1(A)), or with --modular-attn
        one layer of functions and one projection W (default: 2 with --modular-attn)""",
        dest="karat_depth",
        type=int,
    )
    add(g, "--modular-attn", "one stage is the projection W, as published (default, unless --depth is given)", **on)
    add(g, "--modular-mode", "order of --modular-attn: W Phi(A) or Phi(W A) (default: phi1_w2)", choices=MODES)
    add(
        g,
        "--hidden-dim",
        "rank, the width between two stages: one value, or one for each block with an operator (default: 12)",
        type=int,
        nargs="+",
    )
    add(g, "--mixed-head", "only some heads have an operator; the others keep the softmax", **on)
    add(g, "--num-attention", "number of heads with an operator (default: half of them)", type=int)
    add(g, "--karat-blocks", "blocks with operators, such as 0-3,11 (default: all)")
    add(g, "--project-l1", "project each row of sigma(A) on the probability simplex", **on)
    add(g, "--output-scale", "factor of sigma(A): 1, 1 / sqrt(N), or learned (default: 1)", choices=OUTPUT_SCALES)
    add(g, "--karat-init", "initialisation; scaled keeps the variance of V (default: published)", choices=INITS)
    add(g, "--karat-init-scale", "factor of sigma(A) at the start (default: 1)", type=float)
    g.add_argument(
        "--attn-lr",
        type=float,
        help="learning rate of the operators, scaled as --lr, in constant proportion to it; 0: frozen (default: --lr)",
    )
    g.add_argument(
        "--karat-resample",
        default="bicubic",
        choices=INTERPOLATIONS,
        help="interpolation of the operators of a checkpoint for another image or patch size",
    )

    g = p.add_argument_group("MLP basis", "the functions in the MLP of kat_* and flash_kat_* models")
    add(
        g,
        "--init",
        "initialisation of the published weights, or the one that the paper describes (default: released)",
        dest="weight_init",
        choices=KAT_INITS,
    )
    add(g, "--mlp-basis", "family of the functions (default: rational)", type=str.lower, choices=sorted(BASES))
    add(g, "--mlp-groups", "groups of channels, 0: one function per channel (default: 8)", type=int)
    _add_basis_options(g, "mlp")


def add(group: _ArgumentGroup, name: str, text: str, **options) -> None:
    """A flag that is an option of the model."""
    group.add_argument(name, help=text, **options).is_model_option = True


def _add_basis_options(group: _ArgumentGroup, use: str) -> None:
    """One flag for each option of any basis. In attention it takes one value, or one for each block."""
    for option in sorted(option_names(use)):
        owners = {cls.__name__: cls.options(use)[option] for cls in BASES.values() if option in cls.options(use)}
        field = next(iter(owners.values()))
        is_tuple = isinstance(field.default, tuple)
        values = sorted({value for f in owners.values() for value in choices_of(f)})
        text = "; ".join(
            f"{f.metadata['help']} ({name}, default {_shown(default_of(f, use))})" for name, f in owners.items()
        )
        add(
            group,
            "--" + option.replace("_", "-"),
            f"{text}: {', '.join(values)}" if values else text,
            type=type(field.default[0] if is_tuple else field.default),
            nargs=len(field.default) if is_tuple else "+" if use == "attention" else None,
            choices=values or None,
            metavar=field.metadata.get("metavar", "NAME" if values else "N"),
        )


def _shown(default: Any) -> Any:
    return " ".join(f"{v:g}" for v in default) if isinstance(default, tuple) else default


def _class_name(name: str) -> str:
    try:
        return basis_class(name).__name__
    except ValueError:  # argparse lists the choices
        return name


def given_options(args: Namespace, actions: list[Action]) -> dict[str, Any]:
    """Move the given options of the model out of `args`. Raises: UserError for an option that is given twice."""
    given = {}
    for action in actions:
        value = vars(args).pop(action.dest, None) if hasattr(action, "is_model_option") else None
        if value is not None:
            given[action.dest] = value[0] if isinstance(value, list) and len(value) == 1 else value
    if "karat_depth" in given:
        given.setdefault("modular_attn", False)
    model_kwargs = vars(args).pop("model_kwargs")
    for option in model_kwargs.keys() & given.keys():
        raise UserError(
            f"--model-kwargs {option}={model_kwargs[option]} and a flag set the same option: give one of them"
        )
    return given | {k: list(v) if isinstance(v, tuple) else v for k, v in model_kwargs.items()}


def check(given: dict[str, Any], options: dict[str, Any]) -> None:
    """Raises: UserError if an option that is given would have no effect among all options of the model."""
    if given.get("modular_mode") and not options.get("modular_attn"):
        raise UserError("--modular-mode is the order of --modular-attn: give both")
    if options.get("karat_depth") == 1 and given.get("modular_attn"):
        raise UserError("--depth 1 and --modular-attn do not go together: one stage leaves no place for a projection")
    if options.get("karat_depth") == 1 and "hidden_dim" in given:
        raise UserError("--hidden-dim is the width between two stages: --depth 1 has one")
