"""Files of every foreign layout, with the real names and shapes, against what their tensors imply; our layouts."""

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

import models  # noqa: F401
from arguments import _model_of, parse
from checkpoint import Checkpoint, CheckpointError, Progress, read
from checkpoint.fill import load_all, load_matching
from model_factory import build_model
from tests.data_helpers import random_weights
from tests.reference_vit import logits, npz_arrays, npz_logits

ROOT = Path(__file__).resolve().parent.parent
TRAINER_ARGS = dict(
    batch_size=128,
    lr=1e-3,
    opt="adamw",
    aa="rand-m9-mstd0.5",
    output_dir=Path("/checkpoint/1"),
    device="cuda",
    resume="",
    drop_path=0.1,
)


def layouts(kat: dict, deit: dict) -> dict[str, object]:
    """file name -> content as the trainers write it."""
    other = {name: torch.zeros_like(value) for name, value in kat.items()}
    state = {
        "state": {0: {"exp_avg": torch.zeros(3), "step": torch.tensor(1.0)}},
        "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.999), "params": [0]}],
    }
    flash = {
        name.replace("weight_numerator", "numerator_v").replace("weight_denominator", "denominator_v"): value
        for name, value in kat.items()
    }
    deit_args = argparse.Namespace(
        model="deit_tiny_patch16_224", input_size=224, data_set="IMNET", data_path="/imagenet", **TRAINER_ARGS
    )
    kat_args = argparse.Namespace(
        model="kat_tiny_swish_patch16_224",
        input_size=None,
        img_size=None,
        mean=[0.5, 0.5, 0.5],
        crop_pct=0.9,
        **TRAINER_ARGS,
    )
    return {
        "deit_tiny_patch16_224-a1311bcf.pth": {"model": deit},
        "deit_checkpoint.pth": {
            "model": deit,
            "optimizer": state,
            "lr_scheduler": {"t_initial": 300},
            "epoch": 7,
            "scaler": {"scale": 65536.0},
            "model_ema": {name: value + 1 for name, value in deit.items()},
            "args": deit_args,
        },
        "timm_model_best.pth.tar": {
            "epoch": 9,
            "arch": "kat_tiny_swish_patch16_224",
            "state_dict": {f"module.{n}": v for n, v in kat.items()},
            "optimizer": state,
            "version": 2,
            "args": kat_args,
            "amp_scaler": {},
            "metric": 74.5,
            "state_dict_ema": {f"_orig_mod.{n}": v for n, v in other.items()},
        },
        "kat_tiny_patch16_224_1f3ad3b2e69821f3d412f2924cf159a0e266f142d739cb68f68f796f5a0fe289.pth": kat,
        "flash_kat_tiny_swish_patch16_224.pth": {"state_dict": {f"module._orig_mod.{n}": v for n, v in flash.items()}},
        "kat_tiny_patch16_224.safetensors": kat,
    }


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Folder with a file in each layout, and the tensors of KAT-T and DeiT-T in them."""
    folder = tmp_path_factory.mktemp("files")
    kat, deit = random_weights("kat_tiny_patch16_224"), random_weights("deit_tiny_patch16_224")
    assert len(kat) == 200 and kat["blocks.0.mlp.act1.weight_denominator"].shape == (8, 4)
    for name, content in layouts(kat, deit).items():
        if name.endswith(".safetensors"):
            save_file(content, folder / name)
        else:
            torch.save(
                content, folder / name, _use_new_zipfile_serialization="a1311bcf" not in name
            )  # the oldest files are not zips
    return folder, kat, deit


def outputs_from(source, images) -> torch.Tensor:
    """Logits of the model that the file or its name says, filled with the raw weights of the file."""
    checkpoint = read(source)
    model = timm.create_model(_model_of(checkpoint)).eval()
    load_all(model, checkpoint.weights, source)
    with torch.no_grad():
        return model(images).double()


@pytest.mark.parametrize("name", layouts({}, {}))
def test_every_layout_gives_what_its_tensors_imply(files, name):
    folder, kat, deit = files
    torch.manual_seed(2)
    images = torch.randn(1, 3, 224, 224)
    expected = logits(deit if "deit" in name else kat, images, num_heads=3)
    assert expected.std() > 0.1
    torch.testing.assert_close(outputs_from(folder / name, images), expected, rtol=1e-5, atol=1e-5)


def test_what_a_foreign_checkpoint_says_about_its_model(files):
    folder, _, deit = files
    timms, flash = read(folder / "timm_model_best.pth.tar"), read(folder / "flash_kat_tiny_swish_patch16_224.pth")
    assert timms.foreign and timms.model == "kat_tiny_swish_patch16_224" and timms.model_options == {}
    assert timms.settings == {"opt": "adamw", "mean": [0.5] * 3, "eval_crop_ratio": 0.9, "input_size": 224}
    best = {"accuracy": 74.5, "weights": "EMA", "epoch": 9}
    assert timms.progress.epoch == 9 and timms.progress.best == best and timms.choose(None)[1] == "EMA"
    assert (
        flash.settings == {"input_size": 224} and flash.foreign and flash.progress is flash.ema is flash.model is None
    )
    assert _model_of(flash) == "flash_kat_tiny_swish_patch16_224"
    checkpoint = read(folder / "deit_checkpoint.pth")
    assert checkpoint.foreign and checkpoint.model == "deit_tiny_patch16_224" and checkpoint.progress.epoch == 7
    assert checkpoint.settings == {"input_size": 224, "opt": "adamw"}
    assert torch.equal(checkpoint.choose(True)[0]["norm.bias"], deit["norm.bias"] + 1)
    assert torch.equal(checkpoint.choose(False)[0]["norm.bias"], deit["norm.bias"])
    assert checkpoint.choose(None)[1] == "EMA"
    checkpoint.progress = Progress({}, 3, best={"epoch": 3, "weights": "raw"})
    assert checkpoint.choose(None)[1] == "raw"
    with pytest.raises(CheckpointError, match="no averaged weights"):
        Checkpoint("file", deit).choose(True)


@pytest.mark.parametrize("dim, heads, patch, grid, classes", [(192, 3, 16, 14, 21843), (64, 2, 8, 4, 10)])
def test_augreg_npz(tmp_path, dim, heads, patch, grid, classes):
    arrays = npz_arrays(dim, 12 if dim == 192 else 3, heads, patch, grid, classes)
    np.savez(tmp_path / "Ti_16.npz", **arrays, **{"pre_logits/bias": np.zeros(3, np.float32)})
    checkpoint = read(tmp_path / "Ti_16.npz")
    assert "pre_logits/bias" in checkpoint.weights  # listed later as left out
    images = torch.randn(1, 3, grid * patch, grid * patch)
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=grid * patch,
        patch_size=patch,
        embed_dim=dim,
        num_heads=heads,
        num_classes=classes,
        depth=12 if dim == 192 else 3,
    ).eval()
    lines = load_matching(model, checkpoint.weights, "Ti_16.npz")
    assert lines == [
        f"{len(model.state_dict())} of {len(model.state_dict())} tensors taken from Ti_16.npz",
        "  not in the model, left out: pre_logits/bias",
    ]
    with torch.no_grad():
        torch.testing.assert_close(model(images).double(), npz_logits(arrays, images), rtol=1e-5, atol=1e-5)


def test_what_a_file_says_about_its_model_cannot_make_timm_read_another(tmp_path, monkeypatch):
    import timm.models._factory

    monkeypatch.setattr(
        timm.models._factory, "load_checkpoint", lambda *args, **kwargs: pytest.fail("timm was made to read a file")
    )
    for option in (
        {"checkpoint_path": "second.bin"},
        {"pretrained": True},
        {"pretrained_cfg": {"url": "http://x"}},
        {"cache_dir": "/tmp"},
    ):
        ours = {
            "model": random_weights("kat_micro_patch8_32"),
            "versions": {},
            "args": {"model": "kat_micro_patch8_32", "model_options": option},
        }
        theirs = {
            "state_dict": ours["model"],
            "args": argparse.Namespace(model="kat_micro_patch8_32", model_kwargs=option),
        }
        earlier = {**ours, "args": {"model": "kat_micro_patch8_32", "model_kwargs": option}}
        for content in (ours, earlier, theirs):
            torch.save(content, tmp_path / "file.pth")
            with pytest.raises(CheckpointError, match=f"asks for the model option {next(iter(option))}"):
                read(tmp_path / "file.pth")


@pytest.mark.parametrize(
    "entry",
    [
        {"args": argparse.Namespace(lr=1)},
        {"args": {"mean": ["a", "b", "c"]}},
        {"args": {"model_kwargs": [1]}},
        {"args": {"model_options": [1]}},
        {"args": [1]},
        {"args": "kat"},
        {"args": {"model": 3}},
        {"args": {"input_size": "32"}},
        {"best": [1]},
        {"best": {"accuracy": "1", "weights": "raw", "epoch": 1}},
        {"best": {"accuracy": 1.5}},
        {"rng": {}},
        {"rng": [1]},
        {"scaler": 1.0},
        {"schedule": [1]},
        {"optimizer": "adamw"},
        {"updates": 1.5},
        {"epoch": -1},
        {"classes": [1, 2]},
        {"epoch": "3"},
    ],
)
def test_entries_of_another_type_are_damage(tmp_path, entry):
    torch.save({"model": {"w": torch.ones(1)}, "versions": {}, **entry}, tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match="an impossible value"):
        read(tmp_path / "file.pth")


def test_the_format_is_seen_in_the_file_not_in_its_name(tmp_path):
    state, arrays = random_weights("kat_micro_patch8_32"), npz_arrays(16, 1, 2, 4, 2, 3)
    save_file(state, tmp_path / "pytorch_model.bin")
    np.savez(tmp_path / "vit.npz", **arrays)
    (tmp_path / "vit.npz").rename(tmp_path / "vit")
    torch.save(state, tmp_path / "kat.safetensors.pth")
    for name in ("pytorch_model.bin", "kat.safetensors.pth"):
        assert torch.equal(read(tmp_path / name).weights["norm.bias"], state["norm.bias"])
    found = read(tmp_path / "vit")
    assert torch.equal(found.weights["head.bias"], torch.from_numpy(arrays["head/bias"]))
    assert found.settings["mean"] == [0.5] * 3  # AugReg's images


def test_harmless_neighbours_of_the_weights(tmp_path):
    state = random_weights("kat_micro_patch8_32")
    for neighbour in (
        {"metric": np.float64(74.5)},
        {"max_accuracy": np.float32(3), "epoch": 2},
        {"args": "kat"},
        {"args": [1]},
        {"args": argparse.Namespace(input_size=[], mean=0.5, crop_pct="x", model_kwargs="abc", img_size=-3, model=7)},
        {"args": argparse.Namespace(**dict.fromkeys(("model", "input_size", "mean", "opt", "arch"), torch.ones(2)))},
    ):
        torch.save({"state_dict": state, **neighbour}, tmp_path / "file.pth")
        assert read(tmp_path / "file.pth").settings == {"input_size": 32}
    torch.save({"net": state, "step": 1}, tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match="no entry 'model' or 'state_dict', but net, step"):
        read(tmp_path / "file.pth")
    for wrong in (
        state["norm.bias"].to_sparse(),
        state["norm.bias"].to("meta"),
        state["norm.bias"] * 1j,
        state["norm.bias"] * float("nan"),
    ):
        torch.save({**state, "norm.bias": wrong}, tmp_path / "file.pth")
        with pytest.raises(CheckpointError, match="norm.bias"):
            read(tmp_path / "file.pth")


@pytest.mark.parametrize("versions", [None, "2", 2, [1], {1: 2}])
@pytest.mark.parametrize("entry", ["args", "best", "rng", "scaler", "optimizer", "epoch", "classes", "model_ema"])
def test_a_file_that_happens_to_have_our_keys(tmp_path, versions, entry):
    """A file is ours if `versions` is a dictionary, and an entry of another type is then damage; others are foreign."""
    state = random_weights("kat_micro_patch8_32")
    for value in (3.5, "text", [1], (1, "2"), torch.ones(2), argparse.Namespace(lr=1), True):
        torch.save({"model": state, "versions": versions, entry: value}, tmp_path / "file.pth")
        damaged = isinstance(versions, dict) and (entry, value is True) != ("epoch", True)
        if damaged:
            with pytest.raises(CheckpointError, match=f"its entry '{entry}' has an impossible value"):
                read(tmp_path / "file.pth")
        else:
            found = read(tmp_path / "file.pth")
            assert (
                found.foreign is not isinstance(versions, dict) and found.progress is found.ema is found.model is None
            )
            assert torch.equal(found.weights["norm.bias"], state["norm.bias"])


EARLIER = {
    "operators": (
        "vit_micro_patch8_32_karat",
        {"grid": [2], "universal": True, "basis_not_trainable": True, "base_fn": "nn.SiLU", "project_l1": None},
        {"grid": 2, "universal": True, "basis_trainable": False, "base_fn": "nn.SiLU"},
    ),
    "two stages": (
        "vit_micro_patch8_32_karat",
        {
            "basis_type": "WaveletBasis",
            "depth": 2,
            "hidden_dim": [8],
            "modular_attn": None,
            "base_not_trainable": False,
        },
        {"basis_type": "wavelet", "karat_depth": 2, "hidden_dim": 8, "modular_attn": False},
    ),
    "one value for each block": (
        "vit_micro_patch8_32_karat",
        {"grid": [1, 2, 1, 2], "model_kwargs": {"mixed_head": True, "num_attention": 1}},
        {"grid": [1, 2, 1, 2], "mixed_head": True, "num_attention": 1},
    ),
    "activations": (
        "kat_micro_patch8_32",
        {"mlp_basis": "spline", "mlp_grid": 5, "mlp_grid_range": [-2.0, 2.0], "init": "variance_preserving"},
        {"mlp_basis": "spline", "mlp_grid": 5, "mlp_grid_range": (-2, 2), "weight_init": "variance_preserving"},
    ),
    "spellings of kat": (
        "kat_micro_patch8_32",
        {"model_kwargs": {"degrees": [3, 2], "num_groups": 4, "act_init": "gelu"}, "grid": None},
        {"degrees": (3, 2), "num_groups": 4, "act_init": "gelu"},
    ),
}


@pytest.mark.parametrize("case", EARLIER)
def test_the_earlier_layout_of_our_checkpoints(tmp_path, case):
    """The options of the model stood among the arguments, under the names of their flags."""
    name, arguments, options = EARLIER[case]
    state, images = random_weights(name, num_classes=10, **options), torch.randn(2, 3, 32, 32)
    expected = timm.create_model(name, num_classes=10, **options).eval()
    expected.load_state_dict(state)
    args = {"model": name, "input_size": 32, "model_kwargs": {}, "epochs": 7, **arguments}
    torch.save({"model": state, "versions": {}, "args": args}, tmp_path / "file.pth")
    for flag in ("--resume", "--finetune"):
        command = parse([*(["--eval"] if flag == "--resume" else []), flag, str(tmp_path / "file.pth")])
        model = build_model(command.args, 10, weights_follow=True).eval()
        load_all(model, (command.resumed or command.start).weights, "file")
        with torch.no_grad():
            assert torch.equal(model(images), expected(images))
        frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
        assert frozen == {n for n, p in expected.named_parameters() if not p.requires_grad}
        assert any("coefficients" in n for n in frozen) is (case == "operators")


def test_reading_imports_no_model():
    code = "import sys, checkpoint; print([m for m in sys.modules if m.split('.')[0] in ('models', 'kan_basis')])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
