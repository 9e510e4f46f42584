"""The flags of Kolmogorov-Arnold attention and MLPs: what they are, what does not go together, and which options of the model they mean.

None is what is not given: then the model keeps its own default, and a name alone is the published model. For attention that is W Phi(A)
(--modular-attn in its default order); --depth by itself asks for layers of functions without a projection.
"""

import inspect
import math
from argparse import ArgumentParser, BooleanOptionalAction, Namespace

import timm
import torch
from torch import nn

from kan_basis import BASES
from kan_basis.basis import INITS as KARAT_INITS
from kan_basis.group import TARGETS
from kan_basis.pade import VERSIONS
from kan_basis.rational import KERNELS, presets
from kan_basis.wavelet import WAVELETS
from models.karat import KArAtMixin
from models.kat import INITS, KATMixin
from models.operator import MODES, OUTPUT_SCALES
from models.resample import INTERPOLATIONS
from utils import UserError, first_line

# flags that belong to a basis, and the parameter of the basis by which it is known
BASIS = {
    "grid": "grid",
    "order": "order",
    "grid_range": "grid_range",
    "wavelet_type": "wavelet",
    "rational_order": "degrees",
    "rational_version": "version",
}
MLP_BASIS = {
    "mlp_grid": "grid",
    "mlp_order": "order",
    "mlp_grid_range": "grid_range",
    "mlp_wavelet": "wavelet",
    "mlp_degrees": "degrees",
    "mlp_numerator_groups": "degrees",
}
# flags that are options of the model, by another name where they have one
ATTENTION = {
    name: name
    for name in (
        "basis_type",
        *BASIS,
        "base_fn",
        "hidden_dim",
        "modular_attn",
        "modular_mode",
        "mixed_head",
        "num_attention",
        "universal",
        "karat_blocks",
        "project_l1",
        "output_scale",
        "karat_init",
        "karat_init_scale",
    )
}
ATTENTION |= {"depth": "karat_depth", "basis_not_trainable": "basis_trainable", "base_not_trainable": "base_trainable"}
MLP = {name: name for name in ("mlp_basis", "mlp_grid", "mlp_order", "mlp_grid_range", "mlp_wavelet")}
MLP |= {"mlp_degrees": "degrees", "mlp_groups": "num_groups", "mlp_numerator_groups": "numerator_groups"}
FLASH_KAT = {"num_groups": "den_groups", "numerator_groups": "num_groups"}  # FlashKAT's names of these
MODEL_FLAGS = (*ATTENTION, *MLP)
_REFUSALS = (
    TypeError,
    ValueError,
    AttributeError,
    AssertionError,
    RuntimeError,
    ArithmeticError,
    LookupError,
)  # of a model's constructor


def add_arguments(p: ArgumentParser) -> None:
    """The groups KAN basis, attention and MLP basis."""
    on = dict(action="store_true", default=None)
    g = p.add_argument_group("KAN basis", "the functions in the attention of *_karat models")
    g.add_argument(
        "--basis-type",
        type=_published,
        choices=sorted(map(_published, BASES)),
        help="family of the functions (default: FourierBasis)",
    )
    g.add_argument(
        "--grid",
        type=int,
        nargs="+",
        metavar="G",
        help="frequencies of FourierBasis, cells of SplineBasis; several numbers: one for each "
        "KArAt block (default: 3)",
    )
    g.add_argument("--order", type=int, help="degree of the pieces of SplineBasis (default: 3)")
    g.add_argument(
        "--grid-range",
        type=float,
        nargs=2,
        metavar=("LO", "HI"),
        help="ends of the grid of SplineBasis, in units of the scores (default: -1 1)",
    )
    g.add_argument(
        "--wavelet-type", choices=sorted(WAVELETS), help="mother wavelet of WaveletBasis (default: mexican_hat)"
    )
    g.add_argument(
        "--rational-order",
        type=int,
        nargs=2,
        metavar=("M", "N"),
        help="degrees of numerator and denominator of RationalBasis (default: 5 4)",
    )
    g.add_argument(
        "--rational-version",
        choices=sorted(VERSIONS),
        help="denominator of RationalBasis: A, 1 + |b1| |x| + ..; B, 1 + |b1 x + ..| (default: B)",
    )
    g.add_argument(
        "--base-fn",
        help="what is added to the basis in each function: an element-wise activation of torch.nn, such as nn.SiLU or nn.ReLU, "
        "nn.Identity, or ZeroModule for nothing (default: ZeroModule)",
    )
    g.add_argument("--basis-not-trainable", **on, help="freeze coefficients and scales of the basis")
    g.add_argument("--base-not-trainable", **on, help="freeze the scales and parameters of --base-fn")
    g.add_argument(
        "--decay-rational",
        action=BooleanOptionalAction,
        default=False,
        help="weight decay on rational coefficients, and on coefficients and scales of all other bases, too, as in the published runs; off by "
        "default because decay pulls the functions towards zero instead of towards a simpler function",
    )

    g = p.add_argument_group("attention", "of *_karat models: softmax(A) becomes sigma(A), one operator for each head")
    one = g.add_mutually_exclusive_group()
    one.add_argument("--universal", action="store_const", const=True, help="one operator for all blocks")
    one.add_argument(
        "--blockwise", dest="universal", action="store_const", const=False, help="an operator for each block (default)"
    )
    g.add_argument(
        "--depth",
        type=int,
        metavar="N",
        help="layers of an operator: 1, all N x N functions Phi(A); 2, Phi2(Phi1(A)), or with --modular-attn "
        "one of them is a projection W (default: 2 with --modular-attn; --depth without --modular-attn means no projection)",
    )
    g.add_argument(
        "--modular-attn",
        **on,
        help="one layer of functions and one projection W, as in the published models (the default unless --depth is given)",
    )
    g.add_argument("--modular-mode", choices=MODES, help="their order, W Phi(A) or Phi(W A) (default: phi1_w2)")
    g.add_argument(
        "--hidden-dim",
        type=int,
        nargs="+",
        metavar="R",
        help="rank, the width between two layers; several numbers: one for each KArAt block (default: 12)",
    )
    g.add_argument("--mixed-head", **on, help="only some heads have an operator, the others stay softmax")
    g.add_argument("--num-attention", type=int, metavar="H", help="how many heads, with --mixed-head (default: half)")
    g.add_argument(
        "--karat-blocks",
        metavar="BLOCKS",
        help="blocks with operators, such as 0-3,11; the others stay softmax (default: all)",
    )
    g.add_argument("--project-l1", **on, help="project each row of sigma(A) on the probability simplex")
    g.add_argument(
        "--output-scale",
        choices=OUTPUT_SCALES,
        help="factor of sigma(A): 1, 1 / sqrt(tokens), or learned for each head (default: 1)",
    )
    g.add_argument(
        "--karat-init",
        choices=KARAT_INITS,
        help="initialisation: published, all coefficients ~ N(0, 1); scaled, sigma(A) V starts with the "
        "variance of V (default: published)",
    )
    g.add_argument(
        "--karat-init-scale", type=float, metavar="C", help="sigma(A) starts so many times as large (default: 1)"
    )
    g.add_argument(
        "--attn-lr",
        type=float,
        help="learning rate of the operators, scaled as --lr and at all times in the same proportion to it; 0 freezes "
        "them (default: --lr)",
    )
    g.add_argument(
        "--karat-resample",
        default="bicubic",
        choices=INTERPOLATIONS,
        help="interpolation of the operators of a file for another image or patch size",
    )

    g = p.add_argument_group("MLP basis", "the functions in the MLP of kat_* and flash_kat_* models")
    g.add_argument(
        "--init",
        choices=INITS,
        help="initialisation: as the published weights were trained, or as the paper describes (default: released)",
    )
    g.add_argument(
        "--mlp-basis", type=str.lower, choices=sorted(BASES), help="family of the functions (default: rational)"
    )
    g.add_argument(
        "--mlp-degrees",
        type=int,
        nargs=2,
        metavar=("M", "N"),
        help="degrees of numerator and denominator (rational; default: 5 4)",
    )
    g.add_argument(
        "--mlp-groups",
        type=int,
        metavar="N",
        help="groups of channels that share a function, 0: none share (default: 8)",
    )
    g.add_argument(
        "--mlp-numerator-groups",
        type=int,
        metavar="N",
        help="groups of channels that share a numerator (rational; default: 1)",
    )
    g.add_argument("--mlp-grid", type=int, metavar="G", help="frequencies (fourier) or cells (spline; default: 3)")
    g.add_argument("--mlp-order", type=int, help="degree of the pieces (spline; default: 3)")
    g.add_argument(
        "--mlp-grid-range", type=float, nargs=2, metavar=("LO", "HI"), help="ends of the grid (spline; default: -3 3)"
    )
    g.add_argument("--mlp-wavelet", choices=sorted(WAVELETS), help="mother wavelet (wavelet; default: mexican_hat)")
    g.add_argument(
        "--kernel",
        choices=KERNELS,
        help="what computes rational functions on a GPU: CUDA kernels or plain PyTorch (default: "
        "KAN_KERNEL or auto, the kernels where CuPy is installed)",
    )


def model_options(a: Namespace) -> dict:
    """What the given flags mean to the model's constructor; nothing for flags that were not given."""
    options = _options({flag: getattr(a, flag) for flag in MODEL_FLAGS})
    if "flash_kat" in a.model:
        options = {FLASH_KAT.get(option, option): value for option, value in options.items()}
    return options


def _options(flags: dict) -> dict:
    options = {
        option: _value(flag, flags[flag]) for flag, option in (ATTENTION | MLP).items() if flags.get(flag) is not None
    }
    if flags.get("depth") is not None and flags.get("modular_attn") is None:
        options["modular_attn"] = False
    return options


def without_unknown_presets(model_kwargs: dict) -> dict:
    """The options of a checkpoint's model without presets that were fitted and saved elsewhere: the coefficients are in the checkpoint."""
    names = model_kwargs.get("act_init", ())
    unknown = {names} if isinstance(names, str) else set(names)
    return {key: value for key, value in model_kwargs.items() if key != "act_init" or unknown <= {*presets(), *TARGETS}}


def to_start_from(theirs: dict, given: Namespace) -> dict:
    """Of the settings of a file to fine-tune those that the model takes over: all that describe it, unless the flags given name another.

    A flag or model_kwargs given replace what the file says of the same option, and what says nothing beside them or contradicts them goes, too: the
    options of the file's basis beside another one, of its projection beside --depth.
    """
    if given.model not in (None, theirs.get("model")):
        return {}
    options = ATTENTION | MLP
    own_name = _own_names(theirs.get("model") or "")
    kwargs = {own_name.get(key, key): value for key, value in given.model_kwargs.items()}
    said = {options[flag]: getattr(given, flag) for flag in MODEL_FLAGS if getattr(given, flag) is not None} | kwargs
    gone = set(said)
    was = {**_options(theirs), **(theirs.get("model_kwargs") or {})}
    for chosen, flags, default in (("basis_type", BASIS, "fourier"), ("mlp_basis", MLP_BASIS, "rational")):
        if chosen in said and _short(said[chosen]) != _short(was.get(chosen) or default):
            gone |= {options[flag] for flag in flags}
    if said.get("modular_attn") is False or given.depth is not None and not said.get("modular_attn"):
        gone |= {"modular_attn", "modular_mode"}
    if said.get("karat_depth") == 1:
        gone |= {"modular_attn", "modular_mode", "hidden_dim"}
    if was.get("karat_depth") == 1 and said.keys() & {"modular_attn", "hidden_dim"}:
        gone |= {"karat_depth"}
    if said.get("mixed_head") is False:
        gone |= {"num_attention"}
    keys = [
        "model",
        *(flag for flag in MODEL_FLAGS if options[flag] not in gone),
        *["input_size"] * (given.model is None),
    ]
    kept = {
        key: value for key, value in (theirs.get("model_kwargs") or {}).items() if own_name.get(key, key) not in gone
    }
    return {**{key: theirs[key] for key in keys if key in theirs}, "model_kwargs": kept}


def differences(settings: dict, theirs: dict) -> list[str]:
    """Where the functions of two models differ, by flags and model_kwargs: "without --grid 5", "with --universal, not --blockwise".

    What settings do not say is the default of the model's constructor. Attention and MLP count where both models have such a part.
    """
    (own, given), (trained, was) = map(_in_force, (settings, theirs))
    options = [
        option
        for part, group in (("karat", ATTENTION), ("kat_", MLP))
        if part in settings["model"] and part in theirs["model"]
        for option in group.values()
        if own[option] != trained[option]
    ]
    words = [
        (f"with {was[o]}, not {given[o]}" if o in given else f"with {was[o]}") if o in was else f"without {given[o]}"
        for o in options
    ]
    return list(dict.fromkeys(words))


def _in_force(settings: dict) -> tuple[dict, dict[str, str]]:
    """The options of the functions that settings amount to, and how those that they do say are written."""
    defaults = {
        name: p.default
        for cls in (KArAtMixin, KATMixin)
        for name, p in inspect.signature(cls.__init__).parameters.items()
        if name in (ATTENTION | MLP).values()
    }
    own_name = _own_names(settings["model"])
    kwargs = {own_name.get(key, key): value for key, value in (settings.get("model_kwargs") or {}).items()}
    kwargs = {option: value for option, value in kwargs.items() if option in defaults}
    written = {
        option: _words(flag, settings[flag])
        for flag, option in (ATTENTION | MLP).items()
        if settings.get(flag) is not None
    }
    if settings.get("depth") is not None:
        written.setdefault("modular_attn", written["karat_depth"])
    written |= {option: f"--model-kwargs {option}={value}" for option, value in kwargs.items()}
    options = defaults | _options(settings) | kwargs
    for option in ("basis_type", "mlp_basis"):
        options[option] = _short(options[option])
    return {
        option: list(value) if isinstance(value, (tuple, list)) else value for option, value in options.items()
    }, written


def check(a: Namespace, inherited: dict | None = None) -> None:
    """Raises: UserError, one sentence, for flags that do not fit each other or the model, or values that the model refuses.

    Args: inherited, those of the flags that a checkpoint gave.
    """
    attention, mlp = (
        [flag for flag in flags if getattr(a, flag) is not None] for flags in ((*ATTENTION, "attn_lr"), MLP)
    )
    attention += ["karat_resample"] * (a.karat_resample != "bicubic")
    for flags, part, what in (
        (attention, "karat", "models with Kolmogorov-Arnold attention (*_karat)"),
        (mlp, "kat_", "models with a KAN MLP (kat_*)"),
    ):
        if flags and part not in a.model:
            raise UserError(f"{_spelling(flags[0], a)} is for {what}, not {a.model}")
    for given, flags, chosen, default in (
        (attention, BASIS, "basis_type", "fourier"),
        (mlp, MLP_BASIS, "mlp_basis", "rational"),
    ):
        basis = _short(a.model_kwargs.get(chosen) or getattr(a, chosen) or default)
        for flag in given:
            takers = [name for name, cls in BASES.items() if flags.get(flag) in inspect.signature(cls).parameters]
            if flag in flags and basis in BASES and basis not in takers:
                spelt = _published if chosen == "basis_type" else str
                raise UserError(
                    f"{_spelling(flag, a)} is for {_spelling(chosen, a)} {' or '.join(map(spelt, sorted(takers)))}, not {spelt(basis)}"
                )
    if a.modular_mode is not None and not a.modular_attn:
        raise UserError("--modular-mode is the order of --modular-attn: give both")
    if a.modular_attn and a.depth == 1:
        raise UserError(
            "--depth 1 and --modular-attn do not go together: one layer of functions leaves no place for a projection"
        )
    if a.depth == 1 and a.hidden_dim is not None:
        raise UserError("--hidden-dim is the width between two layers: --depth 1 has one")
    if a.karat_init_scale is not None and not 0 < a.karat_init_scale < math.inf:
        raise UserError(f"--karat-init-scale must be positive, not {a.karat_init_scale}")
    for option in a.model_kwargs.keys() & model_options(a).keys():
        raise UserError(f"--model-kwargs {option}={a.model_kwargs[option]} says what a flag says too: give one of them")
    if (mlp or "karat" in a.model) and timm.is_model(a.model.split(".")[0]):
        _try(a, inherited or {})


def check_unchanged(a: Namespace, theirs: dict) -> None:
    """Raises: UserError for a flag that would make another model than the one that a checkpoint of ours, with settings `theirs`, is of."""
    if any(part in theirs.get("model", "") and part not in a.model for part in ("karat", "kat_")):
        raise UserError(f"the checkpoint is of {theirs['model']}, not {a.model}: drop --model")
    for difference in differences(vars(a), {"model": a.model, **theirs}):
        raise UserError(f"the checkpoint was trained {difference}: drop the flag")


def _words(flag: str, value) -> str:
    if flag == "universal":
        return "--universal" if value else "--blockwise"
    words = [] if value is True else value if isinstance(value, list) else [value]
    return " ".join(["--" + flag.replace("_", "-"), *map(str, words)])


def model_of(theirs: dict) -> nn.Module | None:
    """The model that settings of a checkpoint of ours are of, without memory for its parameters; None where it cannot be built."""
    settings = Namespace(
        **{
            **dict.fromkeys(MODEL_FLAGS),
            **theirs,
            "model_kwargs": without_unknown_presets(theirs.get("model_kwargs") or {}),
        }
    )
    try:
        return _on_meta(settings) if timm.is_model(settings.model.split(".")[0]) else None
    except _REFUSALS:
        return None


def _on_meta(a: Namespace) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(
            a.model.split(".")[0], **{"img_size": a.input_size, **model_options(a), **a.model_kwargs, "num_classes": 1}
        )


def _try(a: Namespace, inherited: dict) -> None:
    """Builds the model without memory for its parameters: its constructor knows best what it does not take."""
    try:
        _on_meta(a)
    except _REFUSALS as error:
        lists = {
            flag: value
            for flag, value in inherited.items()
            if flag in ("grid", "hidden_dim") and isinstance(value, list) and len(value) > 1
        }
        whose = " and ".join(_words(flag, value) for flag, value in lists.items())
        whose = f"; the checkpoint has {whose}: give another {' and '.join(_spelling(flag, a) for flag in lists)}"
        raise UserError(
            f"cannot build {a.model}: {first_line(error)}{whose if str(error).startswith(tuple(lists)) else ''}"
        ) from error


def _value(flag: str, value):
    if flag.endswith("not_trainable"):
        return not value
    if flag in ("grid", "hidden_dim") and isinstance(value, (list, tuple)) and len(value) == 1:
        return value[0]
    return value


def _own_names(model: str) -> dict[str, str]:
    """KAT's names of those options that the model knows by FlashKAT's."""
    return {value: key for key, value in FLASH_KAT.items()} if "flash_kat" in model else {}


def _short(basis) -> str:
    """fourier of FourierBasis."""
    return str(basis).removesuffix("Basis").lower()


def _published(basis: str) -> str:
    """FourierBasis of fourier, Fourier, FourierBasis; what is no basis stays as it is."""
    cls = BASES.get(basis.removesuffix("Basis").lower())
    return cls.__name__ if cls else basis


def _spelling(flag: str, a: Namespace) -> str:
    return "--blockwise" if flag == "universal" and not a.universal else "--" + flag.replace("_", "-")
