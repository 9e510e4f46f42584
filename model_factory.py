"""From options to models.

The options that built a model are one plain dictionary, `model_options`: keyword arguments of timm.create_model. A
checkpoint keeps it. --resume and --eval build from it verbatim, --finetune updates it once, and the constructor
validates it. The value None stands for an option that is not given.
"""

import inspect
import re
from argparse import Namespace
from typing import Any

import timm
import torch
from torch import nn

import models
from checkpoint import Checkpoint, read
from checkpoint.fill import load_all
from kan_basis import presets
from kan_basis.basis import Basis, basis_class, default_of, option_names
from kan_basis.group import TARGETS
from models.karat import KArAtMixin
from models.kat import KATMixin
from utils import UserError, first_line

# For each mixin: what its basis is used for, and the option that names the basis.
USES = {KArAtMixin: ("attention", "basis_type"), KATMixin: ("mlp", "mlp_basis")}
# What the constructors of models raise for options that they refuse, and reading pretrained weights for files.
REFUSALS = (TypeError, ValueError, AttributeError, AssertionError, RuntimeError, ArithmeticError, LookupError, OSError)


def base_name(name: str) -> str:
    """The name of a model without the tag of its weights."""
    return name.split(".")[0]


def is_ours(name: str) -> bool:
    """Whether the model is defined in models/."""
    known = timm.is_model(base_name(name))
    return known and timm.model_entrypoint(base_name(name)).__module__.startswith(models.__name__)


def create(name: str, options: dict[str, Any], **more) -> nn.Module:
    """timm.create_model. Raises: UserError, one sentence, if the model does not exist or refuses an option."""
    try:
        return timm.create_model(name, **{**more, **options})  # timm leaves out options that are None
    except REFUSALS as error:
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        reason = f"it has no option {unknown[1]}" if unknown else first_line(error)
        if not str(error):  # timm asserts without a word
            reason = f"it refuses {', '.join(f'{option}={value}' for option, value in options.items())}"
        raise UserError(f"cannot build {name}: {reason}") from error


def on_meta(name: str, options: dict[str, Any], img_size: int) -> nn.Module:
    """A model of ours without memory for its parameters, which shows whether the constructor takes the options."""
    with torch.device("meta"):
        return create(base_name(name), {"img_size": img_size, **options, "num_classes": 1})


def _defaults(mixin: type[nn.Module]) -> dict[str, Any]:
    parameters = inspect.signature(mixin.__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def kan_option_names() -> set[str]:
    """The options of Kolmogorov-Arnold functions that some model has."""
    return set().union(*map(_defaults, USES), *(option_names(use) for use, _ in USES.values()))


def kan_defaults(model: nn.Module, options: dict[str, Any]) -> dict[str, Any]:
    """The options of Kolmogorov-Arnold functions that the model has, with their defaults beside `options`."""
    defaults = {}
    for mixin, (use, chooser) in USES.items():
        if isinstance(model, mixin):
            defaults |= _defaults(mixin)
            basis = basis_class(options.get(chooser) or defaults[chooser])
            defaults |= {name: default_of(f, use) for name, f in basis.options(use).items()}
    return defaults


def _basis(name: str) -> type[Basis]:
    """The class of a basis. Raises: UserError for an unknown name."""
    try:
        return basis_class(name)
    except ValueError as error:
        raise UserError(str(error)) from error


def updated(options: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The options of a checkpoint, overridden by those that are given. The options of a basis go with their basis."""
    for mixin, (use, chooser) in USES.items():
        before, after = (_basis(o.get(chooser) or _defaults(mixin)[chooser]) for o in (options, {**options, **given}))
        if before is not after:
            options = {name: value for name, value in options.items() if name not in option_names(use)}
    return {name: value for name, value in {**options, **given}.items() if value is not None}


def check_unchanged(checkpoint: Checkpoint, name: str, given: dict[str, Any], img_size: int) -> None:
    """Raises: UserError if the model or an option that is given is not that of a checkpoint of ours."""
    if checkpoint.model and base_name(name) != base_name(checkpoint.model):
        raise UserError(f"the checkpoint is of {checkpoint.model}, not {name}: drop --model")
    trained = checkpoint.model_options
    defaults = kan_defaults(on_meta(name, portable(trained), img_size), trained) if is_ours(name) else {}
    known = {**defaults, **trained}
    for option, value in given.items():
        value = defaults.get(option) if value is None else value
        if value is not None and option not in known:
            raise UserError(f"the model of the checkpoint was built without {option}={value}: drop that option")
        if _comparable(option, value) != _comparable(option, known.get(option)):
            raise UserError(f"the model of the checkpoint has {option}={known[option]}, not {value}: drop that option")
    if is_ours(name):  # One option may have two names.
        on_meta(name, {**portable(trained), **given}, img_size)


def _comparable(option: str, value: Any) -> Any:
    if option in ("basis_type", "mlp_basis") and value is not None:
        return _basis(value)
    return list(value) if isinstance(value, tuple) else value


def portable(options: dict[str, Any]) -> dict[str, Any]:
    """The options of a checkpoint without presets of activations that do not exist here, where they were not fitted.

    The coefficients are in the checkpoint.
    """
    names = options.get("act_init", ())
    unknown = ({names} if isinstance(names, str) else set(names)) - {*presets(), *TARGETS}
    return {name: value for name, value in options.items() if name != "act_init" or not unknown}


def build_model(args: Namespace, num_classes: int | None, weights_follow: bool = False) -> nn.Module:
    """The model of the arguments. With `weights_follow` it is neither downloaded nor initialised at length.

    Raises: UserError if there is no such model, or not with these options or this image size.
    """
    cfg = timm.get_pretrained_cfg(args.model)
    any_size = cfg is not None and (not cfg.fixed_input_size or cfg.input_size[-1] == args.input_size)
    pretrained = args.pretrained and not weights_follow
    options = portable(args.model_options) if weights_follow else dict(args.model_options)
    if (weights_follow or pretrained) and is_ours(args.model):
        if isinstance(on_meta(args.model, options, args.input_size), KATMixin):
            options["weight_init"] = "skip"
    model = create(
        args.model,
        options,
        pretrained=pretrained,
        num_classes=num_classes,
        img_size=None if any_size else args.input_size,
        drop_rate=args.drop or None,
        drop_path_rate=args.drop_path or None,
    )
    try:
        if args.grad_checkpointing:
            model.set_grad_checkpointing(True)
        with torch.no_grad():  # an image size that does not fit shows here, not after the data are loaded
            model.eval()(torch.zeros(1, 3, args.input_size, args.input_size))
    except REFUSALS as error:
        raise UserError(f"cannot build {args.model}: {first_line(error)}") from error
    for patch in getattr(getattr(model, "patch_embed", None), "patch_size", ()):
        if args.input_size % patch:
            raise UserError(
                f"--input-size {args.input_size} is not a multiple of the patch size {patch} of {args.model}: pixels "
                "at the edges would be dropped"
            )
    return model


def build_teacher(args: Namespace, num_classes: int) -> nn.Module:
    """The model of --teacher-model, with the weights of --teacher-path, for images of the size of the student's.

    The default is the model of the file. Its options are those that the file says of a model of this name.
    Raises: UserError if it cannot be built or the file does not fit.
    """
    checkpoint = read(args.teacher_path)
    name = args.teacher_model or checkpoint.model or models.published.model_in(args.teacher_path) or "regnety_160"
    same = checkpoint.model is not None and base_name(checkpoint.model) == base_name(name)
    options = dict(model=name, model_options=checkpoint.model_options if same else {})
    options |= dict(drop=0, drop_path=0, grad_checkpointing=False)
    teacher = build_model(Namespace(**{**vars(args), **options}), num_classes, weights_follow=True)
    load_all(teacher, checkpoint.choose(None)[0], args.teacher_path, resample=True, mode=args.karat_resample)
    return teacher


def outputs_of(checkpoint: Checkpoint | None, model: str) -> int | None:
    """Outputs of the classifier in a checkpoint; None, which stands for timm's number, if there is no checkpoint."""
    if checkpoint is None:
        return None
    cfg = timm.get_pretrained_cfg(model)
    names = getattr(cfg, "classifier", None) or ("head", "fc", "classifier")
    names = (names,) if isinstance(names, str) else names
    heads = (checkpoint.weights.get(f"{name}.weight") for name in names)
    return next((head.shape[0] for head in heads if head is not None and head.ndim), None)


def freeze_all_but_attention(model: nn.Module) -> None:
    """Leave attention, position embedding and classifier to be trained; parameters that are frozen stay frozen.

    Raises: UserError for a model without blocks.*.attn.
    Source: Touvron et al. 2022 (arXiv:2203.09795).
    """
    classifier = model.get_classifier()
    heads = classifier if isinstance(classifier, tuple) else (classifier,)
    ids = {id(p) for module in heads for p in module.parameters()}
    if not any(".attn." in name for name, _ in model.named_parameters()):
        raise UserError("--attn-only needs a transformer with parameters named *.attn.*")
    for name, p in model.named_parameters():
        trained = ".attn." in name or name.startswith("karat.") or name == "pos_embed" or id(p) in ids
        p.requires_grad_(p.requires_grad and trained)
