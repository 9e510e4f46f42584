"""The flags of Kolmogorov-Arnold attention and MLPs: what they build, what they refuse, and how they train and resume."""

import json
import re

import pytest
import timm
import torch
from torch import nn

import engine
import main
from arguments import parse
from groups import GradNorms, kind, optimizer_groups
from kan_basis import BASES
from kan_options import model_of, model_options
from losses import DistillationLoss
from models.build import build_model, freeze_all_but_attention
from models.load import load_matching
from tests.test_main import call, log
from utils import UserError

NAME = "vit_micro_patch8_32_karat"
BASE = ["--model", NAME, "--input-size", "32", "--device", "cpu"]
TRAIN = [
    *BASE,
    "--num-workers",
    "0",
    "--batch-size",
    "20",
    "--train-subset",
    "40",
    "--val-subset",
    "20",
    "--warmup-epochs",
    "0",
    "--model-kwargs",
    "depth=2",
    "embed_dim=32",
]


def built(command, model=NAME):
    args, _ = parse(["--model", model, "--input-size", "32", *command.split()], lambda args: None)
    return build_model(args, 10)


def operators(model):
    return [block.attn.shared[0] if block.attn.shared else block.attn.operator for block in model.blocks]


def first(model):
    return operators(model)[0]


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
    assert model_options(parse(BASE, lambda args: None)[0]) == {}


@pytest.mark.parametrize("name", BASES)
def test_mlp_basis(name):
    model = built(f"--mlp-basis {name} --mlp-groups 4", "kat_micro_patch8_32")
    shape = {"rational": (4, 4), "fourier": (4, 6), "spline": (4, 6), "wavelet": (4, 3)}[name]
    assert shape in [tuple(p.shape) for n, p in model.named_parameters() if kind(n) == "kan"]


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
        ("--order 2", "--order is for --basis-type SplineBasis, not FourierBasis"),
        ("--grid-range -1 1 --basis_type WaveletBasis", "--grid-range is for"),
        ("--basis_type WaveletBasis --grid 3", "--grid is for --basis-type FourierBasis or"),
        ("--basis_type RationalBasis --grid 3", "not RationalBasis"),
        ("--wavelet_type dog", "--wavelet-type is for --basis-type WaveletBasis"),
        ("--rational_order 3 2", "--rational-order is for --basis-type RationalBasis"),
        ("--rational-version A", "--rational-version is for"),
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
        ("--basis-type Chebyshev", "invalid choice"),
        ("--wavelet_type haar --basis_type WaveletBasis", "invalid choice"),
        ("--base_fn os.system", "unknown base_fn"),
        ("--model-kwargs basis_type=Chebyshev", "unknown basis 'Chebyshev'"),
        ("--attn-lr -1", "between 0 and inf"),
        ("--karat-init-scale -1", "between 0 and inf"),
        ("--model vit_micro_patch8_32 --blockwise", "--blockwise is for models with Kolmogorov-Arnold attention"),
        ("--model kat_micro_patch8_32 --attn_lr 1", "--attn-lr is for models with"),
        ("--model kat_micro_patch8_32 --karat-resample nearest", "is for models with"),
        ("--mlp-basis fourier", "--mlp-basis is for models with a KAN MLP"),
        ("--model vit_micro_patch8_32 --mlp-groups 4", "--mlp-groups is for models"),
        ("--model kat_micro_patch8_32 --mlp-grid 3", "--mlp-grid is for --mlp-basis fourier or spline, not rational"),
        (
            "--model kat_micro_patch8_32 --mlp-basis spline --mlp-degrees 5 4",
            "--mlp-degrees is for --mlp-basis rational",
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


def test_training_with_its_own_rate_and_logged_norms_and_resumed_without_flags(tmp_path, capfd):
    flags = [
        "--universal",
        "--grid",
        "2",
        "--basis-type",
        "SplineBasis",
        "--modular-attn",
        "--modular-mode",
        "w1_phi2",
        "--base-fn",
        "nn.SiLU",
        "--attn-lr",
        "1e-2",
        "--lr",
        "1e-3",
        "--clip-grad",
        "1e-3",
        "--log-grad-norms",
    ]
    assert call(*TRAIN, *flags, "--epochs", "1", "--output-dir", tmp_path) == 0
    out = capfd.readouterr().out
    assert "of the operators 0.000390625" in out and "grad norms karat" in out
    entry = log(tmp_path)[0]
    norms = {key: value for key, value in entry.items() if key.startswith("grad_norm_")}
    assert list(norms) == [f"grad_norm_{kind}" for kind in ("karat", "head", "attention", "mlp", "embed_norm")] and all(
        v > 1e-3 for v in norms.values()
    )
    state = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    assert [name for name in state["model"] if "project_in" in name] == ["karat.project_in"]
    assert [group.get("lr_scale", 1.0) for group in state["optimizer"]["param_groups"]] == [
        1.0,
        1.0,
        pytest.approx(10),
        pytest.approx(10),
    ]
    assert {group["initial_lr"] for group in state["optimizer"]["param_groups"]} == {1e-3 * 20 / 512}
    assert call("--eval", "--resume", tmp_path / "checkpoint.pth", "--device", "cpu") == 0
    assert f"Acc@1 {entry['test_acc1']:.3f}" in capfd.readouterr().out
    assert call("--resume", "auto", "--output-dir", tmp_path, "--epochs", "2", "--device", "cpu") == 0
    assert [set(e) for e in log(tmp_path)] == [set(entry)] * 2 and json.loads((tmp_path / "args.json").read_text())[
        "args"
    ]["universal"] is True
    assert call("--resume", "auto", "--output-dir", tmp_path, "--epochs", "3", "--blockwise", "--device", "cpu") == 2
    assert call("--eval", "--resume", tmp_path / "checkpoint.pth", "--base-fn", "nn.ReLU", "--device", "cpu") == 2
    error = capfd.readouterr().err
    assert (
        "trained with --universal, not --blockwise: drop the flag" in error
        and "trained with --base-fn nn.SiLU, not --base-fn nn.ReLU" in error
    )
    assert (
        call("--finetune", tmp_path / "checkpoint.pth", "--epochs", "0", "--device", "cpu") == 0
    )  # the model of the file, options and all
    assert "start anew" not in capfd.readouterr().out


@pytest.mark.parametrize("schedule, ratio", [("cosine", 0.0), ("cosine", 0.1), ("plateau", 3.0), ("none", 0.1)])
def test_rate_of_the_operators_keeps_its_proportion(schedule, ratio, tmp_path, monkeypatch):
    """Also where both reach --min-lr; at 0 they stay as they are."""
    seen, start, update = [], {}, engine._update

    def watched(run, args):
        named = [(name, p) for name, p in run.model.named_parameters() if kind(name) == "karat" and p.requires_grad]
        start.update({} if start else {name: (p, p.detach().clone()) for name, p in named})
        update(run, args)
        seen.append([group["lr"] for group in run.optimizer.param_groups])

    monkeypatch.setattr(engine, "_update", watched)
    assert (
        call(
            *TRAIN,
            "--epochs",
            "4",
            "--warmup-epochs",
            "1",
            "--sched",
            schedule,
            "--lr",
            "1e-2",
            "--unscale-lr",
            "--min-lr",
            "1e-3",
            "--attn-lr",
            str(0.01 * ratio),
            "--output-dir",
            tmp_path,
        )
        == 0
    )
    assert len({rates[0] for rates in seen}) == {"cosine": 4, "plateau": 2, "none": 1}[schedule]
    for main_rate, _, *own in seen:
        assert own and own == pytest.approx([main_rate * ratio] * len(own))
    assert {torch.equal(p, before) for p, before in start.values()} == {ratio == 0}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Checkpoints of one epoch: of the published model, and of one with options that leave no trace in the shapes."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("plain", "options", "spline")}
    for name, flags in (
        ("plain", ()),
        ("options", ("--base-fn", "nn.SiLU", "--project-l1")),
        ("spline", ("--basis-type", "SplineBasis", "--order", "2")),
    ):
        assert call(*TRAIN, *flags, "--epochs", "1", "--no-model-ema", "--output-dir", folders[name]) == 0
    return {name: folder / "checkpoint.pth" for name, folder in folders.items()}


def test_flags_that_repeat_what_the_checkpoint_is(trained, capfd):
    for flags in (
        "--blockwise",
        "--grid 3",
        "--modular-attn --modular-mode phi1_w2 --depth 2",
        "--model-kwargs depth=2 embed_dim=32 hidden_dim=12",
    ):
        assert call("--eval", "--resume", trained["plain"], "--device", "cpu", *flags.split()) == 0, flags
    for name, flags, sentence in (
        ("plain", "--grid 4", "without --grid 4"),
        ("plain", "--universal", "without --universal"),
        ("plain", "--depth 2", "without --depth 2"),
        ("plain", "--model-kwargs project_l1=True", "without --model-kwargs project_l1=True"),
        ("spline", "--basis-type FourierBasis", "with --basis-type SplineBasis, not --basis-type FourierBasis"),
    ):
        assert call("--eval", "--resume", trained[name], "--device", "cpu", *flags.split()) == 2
        assert f"the checkpoint was trained {sentence}: drop the flag" in capfd.readouterr().err


def test_finetuning_takes_the_options_of_the_file(trained, capfd):
    still = (*TRAIN[2:], "--epochs", "1", "--lr", "0", "--warmup-lr", "0", "--min-lr", "0", "--no-model-ema")
    assert call("--eval", "--resume", trained["options"], "--device", "cpu") == 0
    want = re.search(r"Acc@1 .*", capfd.readouterr().out)[0]
    for model in ((), ("--model", NAME)):
        assert call(*model, *still, "--finetune", trained["options"]) == 0
        out = capfd.readouterr().out
        assert want in out and "unlike" not in out
    assert call("--model", NAME.replace("vit", "kat"), *still, "--finetune", trained["options"]) == 0
    assert (
        f"unlike this model, that of {trained['options']} was trained with --base-fn nn.SiLU; with --project-l1\n"
        in capfd.readouterr().out
    )
    assert (
        call(*still, "--finetune", trained["spline"], "--basis-type", "FourierBasis") == 0
    )  # its --order goes with its basis
    out = capfd.readouterr().out
    assert (
        "with --basis-type SplineBasis, not --basis-type FourierBasis; with --order 2" in out
        and "of another basis, not loaded: blocks.{0-1}.attn" in out
    )


@pytest.mark.parametrize(
    "theirs, own",
    [
        ("", "--basis-type SplineBasis"),
        ("--basis-type SplineBasis", "--grid 3"),
        ("", "--basis-type SplineBasis --universal"),
        ("", "--grid 4"),
        ("--basis-type WaveletBasis", "--basis-type WaveletBasis --wavelet-type dog"),
        ("--basis-type RationalBasis", "--basis-type RationalBasis --rational-version A"),
        ("--basis-type RationalBasis", "--basis-type RationalBasis --rational-order 4 5"),
        ("--basis-type SplineBasis", "--basis-type SplineBasis --grid-range -2 2"),
        ("--basis-type SplineBasis", "--basis-type SplineBasis --grid 4 --order 2"),
        ("--mlp-basis fourier", "--mlp-basis spline"),
        ("--mlp-basis spline", "--mlp-basis spline --mlp-grid-range -2 2"),
        ("--mlp-basis wavelet", "--mlp-basis wavelet --mlp-wavelet dog"),
    ],
)
@pytest.mark.parametrize("size", [32, 48])
def test_functions_of_another_basis_start_anew(theirs, own, size):
    name = "kat_micro_patch8_32_karat"
    universal = " --universal" if "--universal" in own else ""
    settings, _ = parse(["--model", name, "--input-size", "32", *(theirs + universal).split()], lambda args: None)
    state = {key: value + 1 for key, value in build_model(settings, 10).state_dict().items()}
    model = built(f"{own} --input-size {size}", name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    lines = load_matching(model, state, "file", trained=model_of(settings.plain()))
    anew = "mlp.act" if "mlp" in own else "karat." if universal else "operator."
    assert {key for key, value in model.state_dict().items() if torch.equal(value, before[key])} == {
        key for key in before if anew in key
    }
    listed = next(line for line in lines if "of another basis, not loaded" in line)
    assert all(
        word in listed
        for word in (("act1", "act2") if "mlp" in own else ("project_out", "coefficients", "scale_basis"))
    )
    same = built(f"{theirs}{universal} --input-size {size}", name)
    assert "another basis" not in "".join(load_matching(same, state, "file", trained=model_of(settings.plain())))


def test_blocks_of_another_grid_start_anew_and_the_others_are_taken():
    settings, _ = parse([*BASE, "--basis-type", "SplineBasis", "--grid", "1", "2", "3", "4"], lambda args: None)
    state = {key: value + 1 for key, value in build_model(settings, 10).state_dict().items()}
    model = built("--basis-type SplineBasis --grid 1 3 2 4")
    lines = load_matching(model, state, "file", trained=model_of(settings.plain()))
    assert [
        torch.equal(op.project_out, state[f"blocks.{i}.attn.operator.project_out"])
        for i, op in enumerate(operators(model))
    ] == [True, False, False, True]
    assert "of another basis, not loaded: blocks.{1-2}.attn.operator.project_out" in "".join(lines)


@pytest.mark.parametrize(
    "theirs, given, expected",
    [
        (
            "--modular-attn --modular-mode w1_phi2 --hidden-dim 9",
            "--depth 2",
            dict(depth=2, modular_attn=None, modular_mode=None, hidden_dim=[9]),
        ),
        (
            "--modular-attn --modular-mode w1_phi2",
            "--depth 3 --modular-attn",
            dict(depth=3, modular_attn=True, modular_mode="w1_phi2"),
        ),
        (
            "--modular-attn --modular-mode phi1_w2 --hidden-dim 12",
            "--depth 1",
            dict(depth=1, modular_attn=None, modular_mode=None, hidden_dim=None),
        ),
        (
            "--modular-attn --modular-mode phi1_w2 --hidden-dim 12",
            "--model-kwargs karat_depth=1",
            dict(depth=None, modular_attn=None, hidden_dim=None, model_kwargs={"karat_depth": 1}),
        ),
        ("--grid 1 2 3 4 --hidden-dim 4 5 6 7", "--depth 1 --grid 3", dict(depth=1, grid=[3], hidden_dim=None)),
        ("--depth 1", "--hidden-dim 4", dict(depth=None, hidden_dim=[4])),
        ("--depth 1", "--modular-attn", dict(depth=None, modular_attn=True)),
        (
            "--basis-not-trainable --project-l1 --mixed-head --num-attention 1",
            "--model-kwargs basis_trainable=True mixed_head=False",
            dict(
                basis_not_trainable=None,
                mixed_head=None,
                num_attention=None,
                project_l1=True,
                model_kwargs={"basis_trainable": True, "mixed_head": False},
            ),
        ),
        ("--universal", "--blockwise", dict(universal=False)),
        ("--universal", "--model-kwargs universal=False", dict(universal=None)),
        ("--basis-type SplineBasis --order 2", "--model-kwargs basis_type=fourier", dict(basis_type=None, order=None)),
        ("--model-kwargs grid=4 depth=2", "--grid 5", dict(grid=[5], model_kwargs={"depth": 2})),
        (
            "--model-kwargs basis_type=SplineBasis order=2 depth=2",
            "--basis-type WaveletBasis",
            dict(basis_type="WaveletBasis", model_kwargs={"depth": 2}),
        ),
        (
            "--model-kwargs depth=2",
            "--model-kwargs drop_path_rate=0.1",
            dict(model_kwargs={"depth": 2, "drop_path_rate": 0.1}),
        ),
    ],
)
def test_what_is_given_replaces_the_options_of_the_file_and_what_they_contradict(theirs, given, expected):
    settings = parse([*BASE, *theirs.split()], lambda args: None)[0].plain()
    args, _ = parse(["--finetune", "x", *given.split()], lambda args: {"args": settings, "finetune": True})
    assert {option: getattr(args, option) for option in expected} == expected
    build_model(args, 10)
    own = args.plain()
    again, _ = parse(
        ["--finetune", "x", "--resume", "auto", "--output-dir", "y", *given.split()], lambda args: {"args": own}
    )
    assert {option: getattr(again, option) for option in expected} == expected


@pytest.mark.parametrize(
    "theirs, given, sentence",
    [
        (
            "--grid 1 2 3 4 --hidden-dim 4 5 6 7",
            "--finetune x --universal",
            "cannot build vit_micro_patch8_32_karat: grid must be one value for a universal "
            "operator, not a list; the checkpoint has --grid 1 2 3 4 and --hidden-dim 4 5 6 7: give another --grid and --hidden-dim",
        ),
        (
            "--grid 1 2 3 4 --hidden-dim 4 5 6 7",
            "--finetune x --universal --grid 3",
            "hidden_dim must be one value for a universal operator, not a list; the "
            "checkpoint has --hidden-dim 4 5 6 7: give another --hidden-dim",
        ),
        (
            "--hidden-dim 4 5 6 7",
            "--finetune x --karat-blocks 0-1",
            "KArAt blocks, not 4; the checkpoint has --hidden-dim 4 5 6 7: give another --hidden-dim",
        ),
        (
            "--hidden-dim 4 5 6 7",
            "--finetune x --grid 1 2",
            "cannot build vit_micro_patch8_32_karat: grid must have one entry for each of the 4 KArAt blocks, not 2",
        ),
        (
            "--universal",
            "--eval --resume x --model vit_micro_patch8_32",
            "the checkpoint is of vit_micro_patch8_32_karat, not vit_micro_patch8_32: drop --model",
        ),
        (
            "",
            "--eval --resume x --model kat_micro_patch8_32",
            "the checkpoint is of vit_micro_patch8_32_karat, not kat_micro_patch8_32: drop --model",
        ),
    ],
)
def test_sentences_say_what_is_of_the_checkpoint(theirs, given, sentence):
    settings = parse([*BASE, *theirs.split()], lambda args: None)[0].plain()
    with pytest.raises(UserError) as error:
        parse(given.split(), lambda args: {"args": settings, "finetune": bool(args.finetune)})
    assert str(error.value).endswith(sentence)


def test_a_teacher_has_the_options_of_its_file_and_the_size_of_the_student(trained, monkeypatch):
    taught = []
    monkeypatch.setattr(
        main,
        "DistillationLoss",
        lambda criterion, teacher, *rest: taught.append(teacher) or DistillationLoss(criterion, teacher, *rest),
    )
    for named in ((), ("--teacher-model", NAME)):
        assert (
            call(
                *TRAIN,
                "--model",
                "vit_micro_patch8_32",
                "--input-size",
                "48",
                "--epochs",
                "1",
                "--distillation-type",
                "hard",
                *named,
                "--teacher-path",
                trained["options"],
            )
            == 0
        )
        assert (
            isinstance(first(taught[-1]).layers[0].base_fn, nn.SiLU)
            and first(taught[-1]).project_l1
            and first(taught[-1]).num_tokens == 37
        )


def test_a_checkpoint_needs_no_preset_that_was_fitted_elsewhere(tmp_path, capfd):
    small = (
        "--model",
        "kat_micro_patch8_32_karat",
        *TRAIN[2:],
        "act_init=gelu",
        "--no-model-ema",
        "--output-dir",
        tmp_path,
    )
    assert call(*small, "--epochs", "1") == 0
    result = re.search(r"Acc@1 .*", capfd.readouterr().out)[0]
    state = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    state["args"]["model_kwargs"]["act_init"] = "saved_on_another_machine"
    torch.save(state, tmp_path / "checkpoint.pth")
    assert call("--eval", "--resume", tmp_path / "checkpoint.pth", "--device", "cpu") == 0
    assert result in capfd.readouterr().out
    assert call("--resume", "auto", "--output-dir", tmp_path, "--epochs", "2", "--device", "cpu") == 0
    assert call("--finetune", tmp_path / "checkpoint.pth", "--epochs", "0", "--device", "cpu") == 0
    assert (
        call(*small[:-4], "act_init=saved_on_another_machine", "--epochs", "0") == 2
        and "unknown rational preset" in capfd.readouterr().err
    )
    with pytest.raises(ValueError, match="a KAT has no act_layer"):
        timm.create_model("kat_micro_patch8_32", act_layer="gelu")


def test_groups_of_the_optimizer_and_kinds_of_parameters():
    model = timm.create_model("kat_micro_patch8_32_karat", num_classes=10, output_scale="learned")
    names = {id(p): name for name, p in model.named_parameters()}
    plain, decayed, own, own_decayed = optimizer_groups(model, 0.1, False, karat_lr_scale=0.5)
    assert [group["weight_decay"] for group in (plain, decayed, own, own_decayed)] == [0, 0.1, 0, 0.1]
    assert [group.get("lr_scale") for group in (plain, decayed, own, own_decayed)] == [None, None, 0.5, 0.5]
    assert {names[id(p)].split("operator.")[1] for p in own["params"]} == {
        "output_scale",
        "layers.0.coefficients",
        "layers.0.scale_basis",
    }
    assert {names[id(p)].split("operator.")[1] for p in own_decayed["params"]} == {"project_out"}
    assert not [
        names[id(p)]
        for p in decayed["params"]
        if kind(names[id(p)]) in ("karat", "kan", "embed_norm") and "proj.weight" not in names[id(p)]
    ]
    every = {
        names[id(p)] for group in optimizer_groups(model, 0.1, True) if group["weight_decay"] for p in group["params"]
    }
    assert {"blocks.0.attn.operator.layers.0.coefficients", "blocks.0.mlp.act1.weight_numerator"} <= every
    groups = {}
    for name, p in model.named_parameters():
        groups.setdefault(kind(name), set()).add(name)
    assert list(groups) == ["embed_norm", "attention", "karat", "kan", "mlp", "head"]
    assert {name.split(".", 2)[-1] for name in groups["attention"]} == {
        f"attn.{layer}.{what}" for layer in ("qkv", "proj") for what in ("weight", "bias")
    }


def test_gradient_norms_against_their_statement():
    model = timm.create_model("kat_micro_patch8_32_karat", num_classes=10)
    norms = GradNorms(model)
    for _ in range(2):
        model.zero_grad()
        model(torch.randn(2, 3, 32, 32)).square().sum().backward()
        norms.update()
    expected = {}
    for name, p in model.named_parameters():
        if p.grad is not None:
            expected[kind(name)] = expected.get(kind(name), 0) + p.grad.double().square().sum().item()
    assert norms.last() == {key: pytest.approx(value**0.5, rel=1e-5) for key, value in expected.items()}
    mean = norms.mean()
    model.head.weight.grad.fill_(float("inf"))
    norms.update()
    assert norms.last()["head"] == float("inf") and norms.mean() == mean
    norms.reset()
    assert set(norms.mean().values()) == {0.0}


@pytest.mark.parametrize("universal", [False, True])
def test_attn_only_trains_operators(universal):
    model = timm.create_model(NAME, universal=universal)
    freeze_all_but_attention(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(
        name.endswith("scale_base") or name in trained for name, _ in model.named_parameters() if kind(name) == "karat"
    )
    assert (
        not any(name.endswith("scale_base") or ".mlp." in name for name in trained)
        and {"pos_embed", "head.weight"} <= trained
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", ["", "--basis-type SplineBasis", "--basis-type WaveletBasis", "--basis-type RationalBasis --epochs 6"]
)
def test_digits_above_95_percent(flags, tmp_path):
    assert (
        call(
            *BASE,
            "--data-set",
            "DIGITS",
            "--epochs",
            "20",
            "--batch-size",
            "50",
            "--lr",
            "3e-3",
            "--unscale-lr",
            "--warmup-epochs",
            "2",
            "--sched-on-updates",
            "--eval-every",
            "5",
            "--no-aug",
            "--no-repeated-aug",
            "--mixup",
            "0.2",
            "--cutmix",
            "0",
            "--drop-path",
            "0",
            "--clip-grad",
            "1",
            "--num-workers",
            "0",
            "--output-dir",
            tmp_path,
            *flags.split(),
        )
        == 0
    )
    assert log(tmp_path)[-1]["max_accuracy"] > 95
