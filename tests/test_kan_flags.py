"""The flags of Kolmogorov-Arnold functions: what they build, and what they refuse."""

import pytest
import timm
import torch

import main
from arguments import parse
from kan_basis import BASES
from param_groups import kind
from tests.kan_helpers import BASE, NAME, built, first, operators
from tests.test_main import call, log

# (flags, what then holds of the model; without them it does not hold)
EFFECTS = [
    ("--universal", lambda m: len(set(map(id, operators(m)))) == 1),
    ("--grid 5", lambda m: first(m).layers[0].basis.grid == 5),
    ("--grid 1 2 3 4", lambda m: [op.layers[0].basis.grid for op in operators(m)] == [1, 2, 3, 4]),
    ("--hidden_dim 4", lambda m: first(m).project_out.shape == (2, 17, 4)),
    (
        "--hidden_dim 4 5 --karat_blocks 0,3",
        lambda m: [op and op.project_out.shape[2] for op in operators(m)] == [4, None, None, 5],
    ),
    ("--karat-blocks 1-2", lambda m: [op is not None for op in operators(m)] == [False, True, True, False]),
    ("--depth 1", lambda m: [(f.in_features, f.out_features) for f in first(m).layers] == [(17, 17)]),
    ("--depth 2", lambda m: [(f.in_features, f.out_features) for f in first(m).layers] == [(17, 12), (12, 17)]),
    ("--depth 3 --modular_attn", lambda m: len(first(m).layers) == 2 and first(m).project_out is not None),
    ("--modular_attn --modular_mode w1_phi2", lambda m: first(m).project_in is not None),
    ("--mixed_head", lambda m: first(m).num_heads == 1),
    ("--mixed_head --num_attention 1", lambda m: first(m).num_heads == 1),
    ("--project_l1", lambda m: first(m).project_l1),
    (
        "--basis_type SplineBasis --order 2 --grid_range -2 3",
        lambda m: (first(m).layers[0].basis.order, first(m).layers[0].basis.grid_range) == (2, (-2, 3)),
    ),
    ("--basis_type fourier --grid 4", lambda m: first(m).layers[0].basis.grid == 4),
    ("--basis_type WaveletBasis --wavelet_type dog", lambda m: first(m).layers[0].basis.wavelet == "dog"),
    (
        "--basis_type RationalBasis --rational_order 3 2 --rational_version A",
        lambda m: (first(m).layers[0].basis.degrees, first(m).layers[0].basis.version) == ((3, 2), "A"),
    ),
    (
        "--base_fn nn.SiLU",
        lambda m: isinstance(first(m).layers[0].base_fn, torch.nn.SiLU) and first(m).layers[0].scale_base.requires_grad,
    ),
    ("--basis_not_trainable", lambda m: not first(m).layers[0].coefficients.requires_grad),
    (
        "--base_fn SiLU --base_not_trainable",
        lambda m: first(m).layers[0].base_fn is not None and not first(m).layers[0].scale_base.requires_grad,
    ),
    ("--karat-init scaled", lambda m: first(m).layers[0].coefficients.std() < 0.5),
    ("--karat-init-scale 0.5", lambda m: first(m).layers[0].scale_basis.eq(0.5).all()),
    ("--output-scale learned", lambda m: isinstance(first(m).output_scale, torch.nn.Parameter)),
    ("--model-kwargs hidden_dim=6", lambda m: first(m).project_out.shape[2] == 6),
]


@pytest.mark.parametrize("flags, holds", EFFECTS, ids=[flags for flags, _ in EFFECTS])
def test_flag_has_its_effect(flags, holds):
    assert holds(built(flags))
    try:
        held = bool(holds(built("")))
    except (AttributeError, TypeError):  # what the check asks for is not there
        held = False
    assert not held, f"holds without {flags} as well"


def test_no_flags_are_the_published_model():
    published = {name: value.shape for name, value in timm.create_model(NAME, num_classes=10).state_dict().items()}
    for command in (
        "",
        "--blockwise",
        "--modular_attn",
        "--modular_attn --modular_mode phi1_w2 --depth 2 --hidden_dim 12 --grid 3 --basis_type FourierBasis",
    ):
        assert {name: value.shape for name, value in built(command).state_dict().items()} == published, command
    assert parse(BASE).args.model_options == {}


@pytest.mark.parametrize("name", BASES)
def test_mlp_basis(name):
    model = built(f"--mlp-basis {name} --mlp-groups 4", "kat_micro_patch8_32")
    coefficients = {"rational": 4, "fourier": 6, "spline": 6, "wavelet": 3, "chebyshev": 4, "radial": 8}[name]
    assert (4, coefficients) in [tuple(p.shape) for n, p in model.named_parameters() if kind(n) == "kan"]


def test_mlp_options():
    def shapes(command, model):
        return [tuple(p.shape) for p in built(command, model).blocks[0].mlp.act1.parameters()]

    for model in ("kat_micro_patch8_32", "flash_kat_micro_patch8_32"):
        assert shapes("--mlp-degrees 3 2 --mlp-groups 4 --mlp-numerator-groups 2", model) == [(2, 4), (4, 2)], model
    assert shapes(
        "--mlp-basis spline --mlp-grid 5 --mlp-order 2 --mlp-grid-range -1 1", "kat_micro_patch8_32_karat"
    ) == [(8, 7)]
    assert (
        built("--mlp-basis wavelet --mlp-wavelet dog", "kat_micro_patch8_32").blocks[0].mlp.act2.basis.wavelet == "dog"
    )


@pytest.mark.parametrize(
    "flags, sentence",
    [
        ("--universal --blockwise", "not allowed with"),
        ("--order 2", "order is an option of ChebyshevBasis or SplineBasis, not of FourierBasis"),
        (
            "--grid-range -1 1 --basis_type WaveletBasis",
            "grid_range is an option of RadialBasis or SplineBasis, not of W",
        ),
        ("--basis_type WaveletBasis --grid 3", "grid is an option of FourierBasis or"),
        ("--basis_type RationalBasis --grid 3", "not of RationalBasis"),
        ("--wavelet_type dog", "wavelet_type is an option of WaveletBasis, not of FourierBasis"),
        ("--rational_order 3 2", "rational_order is an option of RationalBasis, not of FourierBasis"),
        ("--rational-version A", "rational_version is an option of"),
        ("--modular_mode phi1_w2", "give both"),
        ("--depth 1 --modular_attn", "no place for a projection"),
        ("--depth 0", "depth must be at least 1"),
        ("--hidden_dim 0", "hidden_dim must be at least 1"),
        ("--depth 1 --hidden-dim 4", "--depth 1 has one"),
        ("--karat-init-scale 0", "must be positive"),
        ("--grid 3 --model-kwargs grid=4", "give one of them"),
        ("--grid 0", "grid must be at least 1"),
        ("--num_attention 1", "num_attention needs mixed_head"),
        ("--mixed_head --num_attention 3", "from 1 to 2"),
        ("--karat-blocks 0-4", "from 0 to 3"),
        ("--karat-blocks 0-999999999999", "from 0 to 3"),
        ("--karat-blocks x", "like '0-3,11'"),
        ("--model-kwargs depth=2 --karat-blocks 2", "from 0 to 1"),
        ("--grid 1 2", "each of the 4"),
        ("--universal --hidden_dim 1 2 3 4", "one value"),
        ("--basis-type Bessel", "invalid choice"),
        ("--wavelet_type haar --basis_type WaveletBasis", "invalid choice"),
        ("--base_fn os.system", "unknown base_fn"),
        ("--model-kwargs basis_type=Bessel", "unknown basis 'Bessel'"),
        ("--attn-lr -1", "between 0 and inf"),
        ("--karat-init-scale -1", "init_scale must be positive, not -1.0"),
        ("--model vit_micro_patch8_32 --blockwise", "cannot build vit_micro_patch8_32: it has no option universal"),
        ("--model kat_micro_patch8_32 --attn_lr 1", "--attn-lr is for models with"),
        ("--model kat_micro_patch8_32 --karat-resample nearest", "is for models with"),
        ("--mlp-basis fourier", "cannot build vit_micro_patch8_32_karat: it has no option mlp_basis"),
        ("--model vit_micro_patch8_32 --mlp-groups 4", "it has no option mlp_groups"),
        (
            "--model kat_micro_patch8_32 --mlp-grid 3",
            "mlp_grid is an option of FourierBasis or RadialBasis or SplineBasis, not of RationalBasis",
        ),
        (
            "--model kat_micro_patch8_32 --mlp-basis spline --mlp-degrees 5 4",
            "mlp_degrees is an option of RationalBasis, not of SplineBasis",
        ),
        ("--model kat_micro_patch8_32 --mlp-groups 5", "64 channels do not divide into 5 groups"),
        ("--model kat_micro_patch8_32 --mlp-basis x", "invalid choice"),
    ],
)
def test_flags_that_do_not_fit_together(flags, sentence, capfd, monkeypatch):
    monkeypatch.setattr(main, "run", lambda *_: pytest.fail("something was read or built"))
    try:
        code = call(*BASE, *flags.split())
    except SystemExit as end:
        code = end.code
    *usage, error = capfd.readouterr().err.splitlines()
    assert code == 2 and sentence in error and "error: " in error and len(usage) <= 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", ["", "--basis-type SplineBasis", "--basis-type WaveletBasis", "--basis-type RationalBasis --epochs 6"]
)
def test_digits_above_95_percent(flags, tmp_path):
    run = """--data-set DIGITS --epochs 20 --batch-size 50 --lr 3e-3 --unscale-lr --warmup-epochs 2 --sched-on-updates
        --eval-every 5 --no-aug --no-repeated-aug --mixup 0.2 --cutmix 0 --drop-path 0 --clip-grad 1 --num-workers 0"""
    assert call(*BASE, *run.split(), "--output-dir", tmp_path, *flags.split()) == 0
    assert log(tmp_path)[-1]["max_accuracy"] > 95
