"""Random pairs of options, of a training and of a later --resume or --eval: the same model, or a refusal."""

import random
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import kan_flags
import utils
from arguments import Arguments, get_args_parser, parse
from checkpoint.fill import load_all
from model_factory import build_model
from utils import UserError

KARAT = """--basis-type SplineBasis|--basis-type WaveletBasis|--basis-type FourierBasis|--basis-type RationalBasis
|--basis-type radial|--grid 3|--grid 4|--grid 3 4|--order 2|--grid-range -2 2|--wavelet-type dog|--rational-version A
|--rational-order 3 2|--universal|--blockwise|--modular-attn|--modular-mode w1_phi2|--modular-mode phi1_w2|--depth 1
|--depth 2|--hidden-dim 5|--hidden-dim 12|--hidden-dim 5 6|--mixed-head|--num-attention 1|--karat-blocks 0|--project-l1
|--output-scale sqrt|--output-scale 1|--base-fn nn.SiLU|--base-fn ZeroModule|--karat-init scaled|--karat-init-scale 0.5
|--basis-not-trainable|--base-not-trainable|basis_type=fourier|universal=True|grid=3|karat_depth=2|modular_attn=False
|project_l1=False|hidden_dim=None|karat_blocks=0-1""".split("|")
MLP = """--mlp-basis spline|--mlp-basis fourier|--mlp-basis rational|--mlp-basis chebyshev|--mlp-groups 4|--mlp-groups 8
|--mlp-grid 3|--mlp-order 2|--mlp-degrees 3 2|--mlp-degrees 5 4|--mlp-numerator-groups 2|--mlp-version B
|--init variance_preserving|--init released|mlp_basis=rational|mlp_groups=None|num_groups=4|act_init=gelu
|act_init=swish""".split("|")
TIMM = """act_layer=relu|act_layer=gelu|qk_norm=True|qk_norm=False|num_heads=1|num_heads=2|global_pool=avg
|global_pool=token|no_embed_class=True|proj_drop_rate=0.1|attn_drop_rate=0.1|init_values=0.5|mlp_ratio=2|qkv_bias=False
|reg_tokens=1|pre_norm=True|embed_dim=32|depth=2|depth=1|weight_init=jax|fc_norm=True|norm_layer=rmsnorm|act_layer=None
|no_such_option=1|img_size=48|num_classes=7|scale_mlp_norm=True|final_norm=False""".split("|")
KARAT, MLP, TIMM = ([option.strip() for option in pool] for pool in (KARAT, MLP, TIMM))
FAMILIES = {
    "vit_micro_patch8_32_karat": KARAT + TIMM,
    "kat_micro_patch8_32_karat": KARAT + MLP + TIMM,
    "kat_micro_patch8_32": MLP + TIMM,
    "flash_kat_micro_patch8_32": MLP + TIMM,
    "vit_micro_patch8_32": TIMM,
    "vit_tiny_patch16_224": TIMM,
}
SIZE = dict(depth="2", embed_dim="32", num_heads="2")


class Pair(NamedTuple):
    """Options of a training, and those of a later command beside --resume and perhaps --eval."""

    trained: list[str]
    later: list[str]
    evaluates: bool


def command(options: list[str], sizes: dict[str, str] | None = None) -> list[str]:
    """Flags and KEY=VALUE pairs as one command line."""
    flags = [word for option in options if option.startswith("--") for word in option.split()]
    pairs = {k: v for k, v in (sizes or {}).items() if k not in {o.partition("=")[0] for o in options}}
    kwargs = [f"{k}={v}" for k, v in pairs.items()] + [option for option in options if not option.startswith("--")]
    return [*flags, "--model-kwargs", *kwargs] if kwargs else flags


def random_pair(rng: random.Random) -> Pair:
    name = rng.choice(list(FAMILIES))
    pool = FAMILIES[name]
    trained = [f"--model {name}", *rng.sample(pool, rng.randint(0, 3))]
    later = rng.sample(trained, rng.randint(0, min(2, len(trained))))
    later += [option for option in rng.sample(pool, rng.randint(0, 2)) if option not in later]
    if rng.random() < 0.1:
        later = [option for option in later if "--model" not in option] + [f"--model {rng.choice(list(FAMILIES))}"]
    if rng.random() < 0.05:
        later += rng.sample(KARAT + MLP, 1)
    return Pair(trained, later, rng.random() < 0.5)


def trained_model(options: list[str], path: Path) -> tuple[nn.Module, Arguments] | None:
    """A model with random weights, in a checkpoint; None if its options do not go together."""
    try:
        args = parse(["--input-size", "32", *command(options, SIZE)]).args
        model = build_model(args, 10).eval()
    except (UserError, SystemExit):
        return None
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    torch.save(dict(model=model.state_dict(), args=args.plain(), versions=utils.versions()), path)
    return model, args


def given(options: list[str]) -> dict[str, Any]:
    """The options of the model that a command gives."""
    parser = get_args_parser()
    return kan_flags.given_options(parser.parse_intermixed_args(command(options), Arguments()), parser._actions)


@torch.no_grad()
def logits(model: nn.Module, images: Tensor) -> Tensor:
    return model.eval()(images)


def outcome(pair: Pair, model: nn.Module, args: Arguments, path: Path) -> str:
    """What the later command does: "same", "refused", or what is wrong with it."""
    try:
        mode = ["--eval"] if pair.evaluates else []
        later = parse([*mode, "--resume", str(path), *command(pair.later)])
    except UserError as error:
        names = {name for option in pair.later for name in (option.split()[0], *given([option]))}
        named = any(name in str(error) for name in names)
        return "refused" if named and "\n" not in str(error) else f"refused without a name: {error}"
    except SystemExit:  # argparse: --universal --blockwise
        return "refused"
    again = build_model(later.args, model.num_classes, weights_follow=True)
    load_all(again, later.resumed.weights, "file")
    images = torch.randn(2, *model.patch_embed.proj.weight.shape[1:2], args.input_size, args.input_size)
    if type(again) is not type(model) or repr(again) != repr(model) or later.args.model != args.model:
        return "another model"
    if later.args.model_options != args.model_options:
        return f"other options: {later.args.model_options}"
    if not torch.equal(logits(again, images), logits(model, images)):
        return "other logits"
    # Whatever was given is true of the model: it could have been trained with these options as well.
    options = {k: v for k, v in {**args.model_options, **given(pair.later)}.items() if v is not None}
    claimed = build_model(Arguments(**{**args.plain(), "model_options": options}), model.num_classes)
    load_all(claimed, model.state_dict(), "file")
    if repr(claimed) != repr(model) or not torch.equal(logits(claimed, images), logits(model, images)):
        return "an option is passed over in silence"
    return "same"


def test_random_pairs_of_options_never_build_another_model(tmp_path):
    rng, path, outcomes = random.Random(12), tmp_path / "checkpoint.pth", {}
    while len(outcomes) < 50:
        pair = random_pair(rng)
        if built := trained_model(pair.trained, path):
            outcomes[str(pair)] = outcome(pair, *built, path)
    counts = Counter(outcomes.values())
    assert set(counts) == {"same", "refused"}, {k: v for k, v in outcomes.items() if v not in ("same", "refused")}
    assert min(counts.values()) >= 10
