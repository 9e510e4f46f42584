"""The options of a model: what --resume and --eval keep and refuse, what --finetune updates, what a teacher has."""

import re

import pytest
import timm
import torch
from torch import nn

import training
from arguments import parse
from checkpoint import Checkpoint, read
from checkpoint.fill import load_matching
from kan_basis import BASES
from losses import DistillationLoss
from model_factory import build_model, on_meta
from tests.kan_helpers import BASE, NAME, TRAIN, built, first, operators
from tests.test_main import call
from utils import UserError


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


def checkpoint_of_arguments(args) -> Checkpoint:
    """A checkpoint of a training with these arguments, without weights."""
    settings = args.plain()
    return Checkpoint(
        "x", {}, model=settings.pop("model"), model_options=settings.pop("model_options"), settings=settings
    )


def checkpoint_of(command: str) -> Checkpoint:
    return checkpoint_of_arguments(parse([*BASE, *command.split()]).args)


def test_flags_that_repeat_what_the_checkpoint_is(trained, capfd):
    for flags in (
        "--blockwise",
        "--grid 3",
        "--modular-attn --modular-mode phi1_w2 --depth 2",
        "--model-kwargs depth=2 embed_dim=32 hidden_dim=12",
    ):
        assert call("--eval", "--resume", trained["plain"], "--device", "cpu", *flags.split()) == 0, flags
    for name, flags, sentence in (
        ("plain", "--grid 4", "has grid=3, not 4"),
        ("plain", "--universal", "has universal=False, not True"),
        ("plain", "--depth 2", "has modular_attn=True, not False"),
        ("plain", "--model-kwargs project_l1=True", "has project_l1=False, not True"),
        ("spline", "--basis-type FourierBasis", "has basis_type=SplineBasis, not FourierBasis"),
    ):
        assert call("--eval", "--resume", trained[name], "--device", "cpu", *flags.split()) == 2
        assert f"the model of the checkpoint {sentence}: drop that option" in capfd.readouterr().err


def test_finetuning_takes_the_options_of_the_file(trained, capfd):
    still = (*TRAIN[2:], "--epochs", "1", "--lr", "0", "--warmup-lr", "0", "--min-lr", "0", "--no-model-ema")
    assert call("--eval", "--resume", trained["options"], "--device", "cpu") == 0
    want = re.search(r"Acc@1 .*", capfd.readouterr().out)[0]
    for model in ((), ("--model", NAME)):
        assert call(*model, *still, "--finetune", trained["options"]) == 0
        out = capfd.readouterr().out
        assert want in out and "unlike" not in out
    assert call("--model", NAME.replace("vit", "kat"), *still, "--finetune", trained["options"]) == 0
    note = f"unlike this model, that of {trained['options']} has base_fn=nn.SiLU, project_l1=True\n"
    assert note in capfd.readouterr().out
    # The option --order of the file goes with its basis.
    assert call(*still, "--finetune", trained["spline"], "--basis-type", "FourierBasis") == 0
    out = capfd.readouterr().out
    assert f"that of {trained['spline']} has basis_type=SplineBasis, order=2\n" in out
    assert "of another basis, not loaded: blocks.{0-1}.attn" in out


@pytest.mark.parametrize(
    "of_file, given",
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
def test_functions_of_another_basis_keep_their_initial_values(of_file, given, size):
    name = "kat_micro_patch8_32_karat"
    universal = " --universal" if "--universal" in given else ""
    args = parse(["--model", name, "--input-size", "32", *(of_file + universal).split()]).args
    trained = on_meta(name, args.model_options, 32)
    state = {key: value + 1 for key, value in build_model(args, 10).state_dict().items()}
    model = built(f"{given} --input-size {size}", name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    lines = load_matching(model, state, "file", trained=trained)
    kept = "mlp.act" if "mlp" in given else "karat." if universal else "operator."
    assert {key for key, value in model.state_dict().items() if torch.equal(value, before[key])} == {
        key for key in before if kept in key
    }
    listed = next(line for line in lines if "of another basis, not loaded" in line)
    words = ("act1", "act2") if "mlp" in given else ("project_out", "coefficients", "scale_basis")
    assert all(word in listed for word in words)
    same = built(f"{of_file}{universal} --input-size {size}", name)
    assert "another basis" not in "".join(load_matching(same, state, "file", trained=trained))


def test_blocks_of_another_grid_keep_their_initial_values_and_the_others_are_taken():
    args = parse([*BASE, "--basis-type", "SplineBasis", "--grid", "1", "2", "3", "4"]).args
    state = {key: value + 1 for key, value in build_model(args, 10).state_dict().items()}
    model = built("--basis-type SplineBasis --grid 1 3 2 4")
    lines = load_matching(model, state, "file", trained=on_meta(NAME, args.model_options, 32))
    assert [
        torch.equal(op.project_out, state[f"blocks.{i}.attn.operator.project_out"])
        for i, op in enumerate(operators(model))
    ] == [True, False, False, True]
    assert "of another basis, not loaded: blocks.{1-2}.attn.operator.project_out" in "".join(lines)


W1_PHI2 = "--modular-attn --modular-mode w1_phi2"
PHI1_W2 = "--modular-attn --modular-mode phi1_w2"
NO_MIXING = "--model-kwargs basis_trainable=True mixed_head=False"


@pytest.mark.parametrize(
    "of_file, given, expected",
    [
        (
            W1_PHI2 + " --hidden-dim 9",
            "--depth 2",
            dict(karat_depth=2, modular_attn=False, modular_mode="w1_phi2", hidden_dim=9),
        ),
        (W1_PHI2, "--depth 3 --modular-attn", dict(karat_depth=3, modular_attn=True, modular_mode="w1_phi2")),
        (
            PHI1_W2 + " --hidden-dim 12",
            "--depth 1",
            dict(karat_depth=1, modular_attn=False, modular_mode="phi1_w2", hidden_dim=12),
        ),
        (
            PHI1_W2 + " --hidden-dim 12",
            "--model-kwargs karat_depth=1",
            dict(karat_depth=1, modular_attn=True, modular_mode="phi1_w2", hidden_dim=12),
        ),
        (
            "--grid 1 2 3 4 --hidden-dim 4 5 6 7",
            "--depth 1 --grid 3",
            dict(karat_depth=1, modular_attn=False, grid=3, hidden_dim=[4, 5, 6, 7]),
        ),
        ("--depth 1", "--depth 2 --hidden-dim 4", dict(karat_depth=2, modular_attn=False, hidden_dim=4)),
        ("--depth 1", "--hidden-dim 4 --model-kwargs karat_depth=None", dict(modular_attn=False, hidden_dim=4)),
        ("--depth 1", "--modular-attn --depth 2", dict(karat_depth=2, modular_attn=True)),
        ("--depth 1", "--modular-attn --model-kwargs karat_depth=None", dict(modular_attn=True)),
        (
            "--basis-not-trainable --project-l1 --mixed-head --num-attention 1",
            NO_MIXING + " num_attention=None",
            dict(basis_trainable=True, mixed_head=False, project_l1=True),
        ),
        ("--universal", "--blockwise", dict(universal=False)),
        ("--universal", "--model-kwargs universal=False", dict(universal=False)),
        ("--basis-type SplineBasis --order 2", "--model-kwargs basis_type=fourier", dict(basis_type="fourier")),
        ("--basis-type SplineBasis --order 2", "--model-kwargs basis_type=None", dict()),
        ("--model-kwargs grid=4 depth=2", "--grid 5", dict(grid=5, depth=2)),
        (
            "--model-kwargs basis_type=SplineBasis order=2 depth=2",
            "--basis-type WaveletBasis",
            dict(basis_type="WaveletBasis", depth=2),
        ),
        ("--model-kwargs depth=2", "--model-kwargs drop_path_rate=0.1", dict(depth=2, drop_path_rate=0.1)),
        (
            "--grid 1 2 3 4 --hidden-dim 4 5 6 7",
            "--universal --model-kwargs grid=None hidden_dim=None",
            dict(universal=True),
        ),
    ],
)
def test_finetuning_updates_the_options_of_the_file_once(of_file, given, expected, tmp_path):
    """What is given holds, the options of a basis go with their basis, all others stay; also when that is resumed."""
    file = checkpoint_of(of_file)
    args = parse(["--finetune", "x", *given.split()], lambda source: file).args
    assert args.model_options == expected
    model = build_model(args, 10)
    (tmp_path / "checkpoint.pth").touch()
    saved = checkpoint_of_arguments(args)
    command = ["--finetune", "x", "--resume", "auto", "--output-dir", str(tmp_path), *given.split()]
    again = parse(command, lambda source: saved).args
    assert again.model_options == expected
    assert repr(build_model(again, 10)) == repr(model)


@pytest.mark.parametrize(
    "of_file, given, sentence",
    [
        ("--depth 1", "--hidden-dim 4", "--hidden-dim is the width between two stages: --depth 1 has one"),
        (
            "--depth 1",
            "--modular-attn",
            "--depth 1 and --modular-attn do not go together: one stage leaves no place for a projection",
        ),
        (
            "--basis-not-trainable --project-l1 --mixed-head --num-attention 1",
            NO_MIXING,
            f"cannot build {NAME}: num_attention needs mixed_head",
        ),
    ],
)
def test_finetuning_refuses_options_that_the_file_contradicts(of_file, given, sentence):
    """The cases above show how a user gets out of it."""
    file = checkpoint_of(of_file)
    with pytest.raises(UserError) as error:
        parse(["--finetune", "x", *given.split()], lambda source: file)
    assert str(error.value) == sentence


@pytest.mark.parametrize(
    "of_file, given, sentence",
    [
        (
            "--grid 1 2 3 4 --hidden-dim 4 5 6 7",
            "--finetune x --universal",
            "cannot build vit_micro_patch8_32_karat: grid must be one value for a universal operator, not a list",
        ),
        (
            "--grid 1 2 3 4 --hidden-dim 4 5 6 7",
            "--finetune x --universal --grid 3",
            "hidden_dim must be one value for a universal operator, not a list",
        ),
        (
            "--hidden-dim 4 5 6 7",
            "--finetune x --karat-blocks 0-1",
            "hidden_dim must have one entry for each of the 2 KArAt blocks, not 4",
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
        (
            "--model kat_micro_patch8_32 --model-kwargs num_groups=4",
            "--resume x --mlp-groups 8",
            "num_groups and mlp_groups are the same option: give one of them",
        ),
        (
            "",
            "--resume x --model-kwargs basis_type=Bessel",
            "unknown basis 'Bessel'; there are: " + ", ".join(sorted(BASES)),
        ),
    ],
)
def test_sentences_say_what_does_not_fit_the_checkpoint(of_file, given, sentence):
    file = checkpoint_of(of_file)
    with pytest.raises(UserError) as error:
        parse(given.split(), lambda source: file)
    assert str(error.value).endswith(sentence)


def test_options_of_a_vit_of_timm_stay_when_its_training_is_resumed(tmp_path, capfd):
    run = """--model vit_tiny_patch16_224 --input-size 32 --num-workers 0 --train-subset 20 --val-subset 10
        --batch-size 10 --warmup-epochs 0 --device cpu --output-dir"""
    options = ("--model-kwargs", "depth=1", "embed_dim=24", "act_layer=relu")
    assert call(*run.split(), tmp_path, "--epochs", "1", *options) == 0
    resume = ("--resume", "auto", "--output-dir", tmp_path, "--epochs", "2", "--device", "cpu")
    capfd.readouterr()
    assert call(*resume, "--model-kwargs", "proj_drop_rate=0.1") == 2
    sentence = "the model of the checkpoint was built without proj_drop_rate=0.1: drop that option"
    assert sentence in capfd.readouterr().err
    assert call(*resume, "--model-kwargs", "act_layer=gelu") == 2
    assert "the model of the checkpoint has act_layer=relu, not gelu: drop that option" in capfd.readouterr().err
    assert call(*resume) == 0
    checkpoint = read(tmp_path / "checkpoint.pth")
    assert checkpoint.progress.epoch == 1
    assert checkpoint.model_options == {"depth": 1, "embed_dim": 24, "act_layer": "relu"}
    args = parse([str(a) for a in resume]).args
    assert isinstance(build_model(args, 10).blocks[0].mlp.act, nn.ReLU)


def test_options_of_timm_that_no_checkpoint_may_set_are_not_kept(tmp_path):
    """They say where the weights of --pretrained come from; a resumed training takes them again, or goes without."""
    folder = ("--output-dir", tmp_path)
    options = ("pretrained_cfg_overlay={'num_classes': 10}", "scriptable=True")
    assert call(*TRAIN, *options, *folder, "--epochs", "1") == 0
    assert read(tmp_path / "checkpoint.pth").model_options == {"depth": 2, "embed_dim": 32}
    assert call("--resume", "auto", *folder, "--epochs", "1", "--device", "cpu") == 0
    assert call(*TRAIN, *options, *folder, "--resume", "auto", "--epochs", "1") == 0


def test_a_teacher_has_the_options_of_its_file_and_the_size_of_the_student(trained, monkeypatch):
    taught = []
    monkeypatch.setattr(
        training,
        "DistillationLoss",
        lambda criterion, teacher, *rest: taught.append(teacher) or DistillationLoss(criterion, teacher, *rest),
    )
    for named in ((), ("--teacher-model", NAME)):
        flags = ("--model", "vit_micro_patch8_32", "--input-size", "48", "--epochs", "1", "--distillation-type", "hard")
        assert call(*TRAIN, *flags, *named, "--teacher-path", trained["options"]) == 0
        assert (
            isinstance(first(taught[-1]).layers[0].base_fn, nn.SiLU)
            and first(taught[-1]).project_l1
            and first(taught[-1]).num_tokens == 37
        )


def test_a_checkpoint_needs_no_preset_that_was_fitted_elsewhere(tmp_path, capfd):
    small = ("--model", "kat_micro_patch8_32_karat", *TRAIN[2:])
    flags = ("--no-model-ema", "--output-dir", tmp_path)
    assert call(*small, "act_init=gelu", *flags, "--epochs", "1") == 0
    result = re.search(r"Acc@1 .*", capfd.readouterr().out)[0]
    state = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    state["args"]["model_options"]["act_init"] = "saved_on_another_machine"
    torch.save(state, tmp_path / "checkpoint.pth")
    assert call("--eval", "--resume", tmp_path / "checkpoint.pth", "--device", "cpu") == 0
    assert result in capfd.readouterr().out
    assert call("--resume", "auto", "--output-dir", tmp_path, "--epochs", "2", "--device", "cpu") == 0
    assert call("--finetune", tmp_path / "checkpoint.pth", "--epochs", "0", "--device", "cpu") == 0
    assert call(*small, "act_init=saved_on_another_machine", "--epochs", "0") == 2
    assert "unknown rational preset" in capfd.readouterr().err
    with pytest.raises(ValueError, match="a KAT has no act_layer"):
        timm.create_model("kat_micro_patch8_32", act_layer="gelu")
