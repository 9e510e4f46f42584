"""From arguments to a model: built by timm, filled from a file, partly frozen."""

import timm
import torch
from torch import nn

import models  # noqa: F401  enters our names into timm's registry
import weights
from arguments import Arguments
from kan_options import MODEL_FLAGS, model_options, without_unknown_presets
from utils import UserError, first_line

from .load import choose, load_all


def build_model(args: Arguments, num_classes: int | None, weights_follow: bool = False) -> nn.Module:
    """The model of the arguments; with `weights_follow` neither downloaded nor initialised at length.

    Raises: UserError if there is no such model, or not with these options or this image size.
    """
    cfg = timm.get_pretrained_cfg(args.model, allow_unregistered=True)
    any_size = cfg is not None and (not cfg.fixed_input_size or cfg.input_size[-1] == args.input_size)
    options = {
        "num_classes": num_classes,
        "drop_rate": args.drop or None,
        "drop_path_rate": args.drop_path or None,
        "img_size": None if any_size else args.input_size,
        "weight_init": args.init,
        **model_options(args),
        **args.model_kwargs,
    }
    pretrained = args.pretrained and not weights_follow
    if (weights_follow or pretrained) and "kat_" in args.model:
        options["weight_init"] = "skip"
    try:  # timm leaves out what is None
        model = timm.create_model(args.model, pretrained=pretrained, **options)
        if args.grad_checkpointing:
            model.set_grad_checkpointing(True)
        with torch.no_grad():  # a size that does not fit shows here, not after the data are loaded
            model.eval()(torch.zeros(1, 3, args.input_size, args.input_size))
    except (
        TypeError,
        ValueError,
        AttributeError,
        AssertionError,
        RuntimeError,
        OSError,
        ArithmeticError,
        LookupError,
    ) as error:
        raise UserError(f"cannot build {args.model}: {first_line(error)}") from error
    return model


def build_teacher(args: Arguments, num_classes: int) -> nn.Module:
    """The model of --teacher-model, by default that of the file, with the weights of --teacher-path, for images of the student's size; where
    the file says which options a model of this name had, with these.

    Raises: UserError if it cannot be built or the file does not fit.
    """
    checkpoint = weights.read(args.teacher_path)
    theirs = checkpoint.get("args") or {}
    name = args.teacher_model or theirs.get("model") or "regnety_160"
    options = {
        key: theirs[key] for key in ("model_kwargs", *MODEL_FLAGS) if key in theirs and theirs.get("model") == name
    }
    options["model_kwargs"] = without_unknown_presets(options.get("model_kwargs", {}))
    plain = {
        **dict.fromkeys((*MODEL_FLAGS, "init")),
        "drop": 0,
        "drop_path": 0,
        "grad_checkpointing": False,
        "pretrained": False,
    }
    teacher = build_model(
        Arguments(**{**args.plain(), **plain, **options, "model": name}), num_classes, weights_follow=True
    )
    load_all(teacher, choose(checkpoint, None)[0], args.teacher_path, resample=True, mode=args.karat_resample)
    return teacher


def outputs_of(checkpoint: dict | None, args: Arguments) -> int | None:
    """Outputs of the classifier in a checkpoint; None, which stands for timm's own number, where there is none."""
    if checkpoint is None:
        return None
    cfg = timm.get_pretrained_cfg(args.model, allow_unregistered=True)
    names = (
        (cfg.classifier if isinstance(cfg.classifier, (tuple, list)) else (cfg.classifier,))
        if cfg and cfg.classifier
        else ("head", "fc", "classifier")
    )
    heads = [checkpoint["model"][f"{name}.weight"] for name in names if f"{name}.weight" in checkpoint["model"]]
    return heads[0].shape[0] if heads and heads[0].ndim else None


def freeze_all_but_attention(model: nn.Module) -> None:
    """Leave attention, position embedding and classifier to be trained.

    Raises: UserError for a model without blocks.*.attn.
    Source: Touvron et al. 2022 (arXiv:2203.09795).
    """
    classifier = model.get_classifier()
    heads = {
        id(p)
        for module in (classifier if isinstance(classifier, tuple) else (classifier,))
        for p in module.parameters()
    }
    if not any(".attn." in name for name, _ in model.named_parameters()):
        raise UserError("--attn-only needs a transformer with parameters named *.attn.*")
    for (
        name,
        p,
    ) in model.named_parameters():  # what is frozen already, such as the scale of a base function that is 0, stays so
        p.requires_grad_(
            p.requires_grad and (".attn." in name or name.startswith("karat.") or name == "pos_embed" or id(p) in heads)
        )
