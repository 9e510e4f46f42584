"""tools/convert.py and tools/predict.py on real files with micro models."""

import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.models import load_checkpoint

import main as main_program
import models  # noqa: F401
from checkpoint import read
from checkpoint.fill import load_all
from model_factory import build_model, outputs_of

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(1, str(ROOT / "tools"))
import convert  # noqa: E402
import predict  # noqa: E402

KAT, VIT = "kat_micro_patch8_32", "vit_micro_patch8_32"
SMALL = {"depth": 2, "embed_dim": 32, "num_heads": 2}
CLASSES = ["ant", "bee", "cat", "dog"]
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(7))


def make(name=KAT, classes=4, **kwargs):
    """A model whose every tensor, rationals included, is away from where it starts."""
    model = timm.create_model(name, num_classes=classes, **{**SMALL, **kwargs}).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return model


def timm_file(path, model, name=KAT, **more):
    """As timm's and KAT's trainers save it: a Namespace, the names of DistributedDataParallel."""
    state = {f"module.{k}": v for k, v in model.state_dict().items()}
    torch.save(
        {
            "arch": name,
            "state_dict": state,
            "args": Namespace(model=name, img_size=None, model_kwargs=SMALL, mean=[0.5] * 3),
            "epoch": 3,
            **more,
        },
        path,
    )
    return path


def flash(state):
    return {
        k.replace("weight_numerator", "numerator_v").replace("weight_denominator", "denominator_v"): v
        for k, v in state.items()
    }


def call(tool, *arguments):
    return tool.main([str(a) for a in arguments])


def rebuilt(path):
    """The model of a converted file, as main.py --eval --resume builds it."""
    checkpoint = read(path)
    args = convert.describe(checkpoint, Namespace(model=None, use_ema=None))
    model = build_model(args, outputs_of(checkpoint, args.model), weights_follow=True)
    load_all(model, checkpoint.weights, path)
    return model, checkpoint


@torch.no_grad()
def assert_same_outputs(one, two, tolerance=1e-6):
    torch.testing.assert_close(one(IMAGES), two(IMAGES), rtol=0, atol=tolerance)


def assert_same_tensors(one, two):
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.parametrize("name", [KAT, VIT])
def test_timm_to_ours_keeps_model_and_images(tmp_path, name):
    model = make(name)
    assert call(convert, timm_file(tmp_path / "last.pth.tar", model, name), tmp_path / "ours.pth") == 0
    ours, checkpoint = rebuilt(tmp_path / "ours.pth")
    assert_same_outputs(ours, model)
    assert not checkpoint.foreign and checkpoint.model == name and checkpoint.model_options == SMALL
    assert checkpoint.settings["mean"] == [0.5] * 3 and checkpoint.settings["input_size"] == 32
    assert "timm" in torch.load(tmp_path / "ours.pth", weights_only=True)["versions"]


def test_main_evaluates_a_converted_file_without_being_told_the_model(tmp_path, capsys):
    assert call(convert, timm_file(tmp_path / "last.pth.tar", make(classes=10)), tmp_path / "ours.pth") == 0
    assert (
        main_program.main(
            [
                "--eval",
                "--resume",
                str(tmp_path / "ours.pth"),
                "--device",
                "cpu",
                "--num-workers",
                "0",
                "--val-subset",
                "20",
            ]
        )
        == 0
    )
    assert "kat_micro_patch8_32" in capsys.readouterr().out


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_round_trip_through_kat_is_bit_equal(tmp_path, suffix):
    model, name = make(), f"{KAT}{suffix}"
    assert call(convert, timm_file(tmp_path / "a.pth.tar", model), tmp_path / name, "--to", "kat") == 0
    bare = load_file(tmp_path / name) if suffix == ".safetensors" else torch.load(tmp_path / name, weights_only=True)
    assert_same_tensors(bare, model.state_dict())
    load_checkpoint(
        timm.create_model(KAT, num_classes=4, **SMALL), str(tmp_path / name), strict=True
    )  # as KAT's code does
    kwargs = [f"{k}={v}" for k, v in SMALL.items()]
    assert call(convert, tmp_path / name, tmp_path / "ours.pth", "--model-kwargs", *kwargs) == 0
    assert call(convert, tmp_path / "ours.pth", tmp_path / "again.pth", "--to", "kat") == 0
    assert_same_tensors(torch.load(tmp_path / "again.pth", weights_only=True), bare)


@pytest.mark.parametrize("groups", [{}, {"num_groups": 2, "den_groups": 4}])
def test_flashkat_to_ours_and_back(tmp_path, groups):
    name = "flash_kat_micro_patch8_32"
    model = make(name, **groups)
    torch.save(flash(model.state_dict()), tmp_path / "flash.pth")
    kwargs = [f"{k}={v}" for k, v in {**SMALL, **groups}.items()]
    assert call(convert, tmp_path / "flash.pth", tmp_path / "ours.pth", "--model", name, "--model-kwargs", *kwargs) == 0
    assert_same_outputs(rebuilt(tmp_path / "ours.pth")[0], model, 0)
    assert call(convert, tmp_path / "ours.pth", tmp_path / "back.pth", "--to", "flashkat") == 0
    assert_same_tensors(torch.load(tmp_path / "back.pth", weights_only=True), flash(model.state_dict()))
    assert call(convert, tmp_path / "ours.pth", tmp_path / "kat.pth", "--to", "kat") == (2 if groups else 0)


def test_a_vit_becomes_a_kat_of_the_same_outputs(tmp_path, capsys):
    vit = make(VIT)
    assert (
        call(
            convert,
            timm_file(tmp_path / "vit.pth.tar", vit, VIT),
            tmp_path / "kat.pth",
            "--model",
            "kat_micro_gelu_patch8_32",
        )
        == 0
    )
    assert (
        "not in the file, keep their initial values: blocks.{0-1}.mlp.act1.weight_numerator" in capsys.readouterr().out
    )
    kat, checkpoint = rebuilt(tmp_path / "kat.pth")
    assert checkpoint.model == "kat_micro_gelu_patch8_32"
    assert_same_outputs(kat, vit, 1e-2)
    assert (kat(IMAGES) - vit(IMAGES)).abs().max() < 0.2 * vit(IMAGES).std()  # no weights in common: more than 1


def test_options_reshape_the_model(tmp_path):
    """A new classifier drops the names of the old one and starts alike every time; another image size resamples."""
    model = make()
    state = {
        "model": model.state_dict(),
        "model_ema": None,
        "args": {"model": KAT, "model_options": SMALL},
        "versions": {},
        "classes": CLASSES,
    }
    torch.save(state, tmp_path / "own.pth")
    for target in ("a.pth", "b.pth"):
        assert call(convert, tmp_path / "own.pth", tmp_path / target, "--nb-classes", 7, "--input-size", 64) == 0
    (ours, checkpoint), (again, _) = rebuilt(tmp_path / "a.pth"), rebuilt(tmp_path / "b.pth")
    assert ours.num_classes == 7 and ours.pos_embed.shape[1] == 65
    assert checkpoint.classes is None and checkpoint.settings["input_size"] == 64
    assert_same_tensors(ours.state_dict(), again.state_dict())
    assert torch.equal(ours.blocks[0].mlp.act2.weight_numerator, model.blocks[0].mlp.act2.weight_numerator)
    assert ours.head.weight.std() < 0.05 and not ours.head.bias.any()
    assert call(convert, tmp_path / "own.pth", tmp_path / "c.pth") == 0
    assert read(tmp_path / "c.pth").classes == CLASSES


def test_input_size_comes_from_the_position_embedding(tmp_path):
    model = make(img_size=48)
    torch.save(model.state_dict(), tmp_path / f"{KAT}.pth")
    assert (
        call(
            convert,
            tmp_path / f"{KAT}.pth",
            tmp_path / "ours.pth",
            "--model-kwargs",
            *(f"{k}={v}" for k, v in SMALL.items()),
        )
        == 0
    )
    ours, checkpoint = rebuilt(tmp_path / "ours.pth")
    assert checkpoint.settings["input_size"] == 48 and torch.equal(ours.pos_embed, model.pos_embed)


def test_raw_and_averaged_weights(tmp_path):
    raw, ema = make(), make()
    source = timm_file(tmp_path / "a.pth.tar", raw, state_dict_ema=ema.state_dict())
    for options, chosen in (([], ema), (["--use-ema"], ema), (["--no-use-ema"], raw)):
        assert call(convert, source, tmp_path / "ours.pth", "--force", *options) == 0
        assert_same_outputs(rebuilt(tmp_path / "ours.pth")[0], chosen, 0)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["a.pth.tar", "there.pth"], "there.pth exists already"),
        (["a.pth.tar", "a.pth.tar", "--force"], "the same file"),
        (["none.pth", "out.pth"], "there is no checkpoint"),
        (["bare.pth", "out.pth"], "name it with --model"),
        (["a.pth.tar", "no/out.pth"], "there is no folder no"),
        (["a.pth.tar", "out.npz"], ".npz is read, not written"),
        (["a.pth.tar", "out.pth", "--use-ema"], "no averaged weights"),
        (["a.pth.tar", "out.pth", "--model", "kat_mikro"], "unknown model"),
        (["a.pth.tar", "out.pth", "--model-kwargs", "depth"], "KEY=VALUE"),
        (
            ["a.pth.tar", "out.pth", "--model-kwargs", "depth=2", "embed_dim=32", "num_heads=2", "num_groups=4"],
            "has shape (8, 4) and the model (4, 4)",
        ),
        (["a.pth.tar", "out.pth", "--to", "kat", "--model", VIT], "no rational functions"),
        (
            [
                "bare.pth",
                "out.pth",
                "--to",
                "flashkat",
                "--model",
                "kat_micro_distilled_patch8_32",
                "--model-kwargs",
                "depth=2",
                "embed_dim=32",
                "num_heads=2",
            ],
            "distillation token",
        ),
        (
            [
                "bare.pth",
                "out.pth",
                "--to",
                "kat",
                "--model",
                "kat_micro_patch8_32_karat",
                "--model-kwargs",
                "depth=2",
                "embed_dim=32",
                "num_heads=2",
            ],
            "there is Kolmogorov-Arnold attention",
        ),
    ],
)
def test_what_cannot_be_converted_is_one_sentence(tmp_path, monkeypatch, capsys, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    model = make()
    timm_file(tmp_path / "a.pth.tar", model)
    torch.save(model.state_dict(), "bare.pth")
    Path("there.pth").write_bytes(b"precious")
    assert call(convert, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and sentence in error
    assert (
        Path("there.pth").read_bytes() == b"precious"
        and not list(tmp_path.glob("out*"))
        and not list(tmp_path.glob(".*"))
    )


def png(path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(path)
    return path


def forced(path, index, outputs=4, **more):
    """A checkpoint of ours whose bias chooses class `index`, and then the next ones."""
    model = make(classes=outputs)
    with torch.no_grad():
        model.head.bias.copy_(-20.0 * ((torch.arange(outputs) - index) % outputs))
    torch.save(
        {
            "model": model.state_dict(),
            "args": {"model": KAT, "input_size": 32, "model_options": SMALL},
            "versions": {},
            **more,
        },
        path,
    )
    return path


def test_names_come_from_the_file_else_the_checkpoint_else_imagenet_else_numbers(tmp_path, capsys):
    (tmp_path / "names.txt").write_text("one\ntwo\nthree\nfour\n")
    own, image = forced(tmp_path / "own.pth", 2, classes=CLASSES), png(tmp_path / "a.png")
    wnids = forced(tmp_path / "wnids.pth", 1, 2, classes=["dog", "n01440764"])
    for checkpoint, options, lines in (
        (own, ["--classes", tmp_path / "names.txt"], ["three", "four", "one", "two"]),
        (own, ["--topk", 1], ["cat"]),
        (wnids, [], ["tench, Tinca tinca", "dog"]),
        (
            forced(tmp_path / "imagenet.pth", 1, 1000),
            ["--topk", 2],
            ["goldfish, Carassius auratus", "great white shark"],
        ),
        (forced(tmp_path / "bare.pth", 3), ["--topk", 2], ["class 3", "class 0"]),
    ):
        assert call(predict, image, "--checkpoint", checkpoint, "--device", "cpu", *options) == 0
        path, *printed = capsys.readouterr().out.strip().splitlines()
        assert path == str(image) and len(printed) == len(lines) and printed[0].startswith(" 100.00 %")
        assert all(f"%  {name}" in line for name, line in zip(lines, printed))


def test_probabilities_are_those_of_main_s_transforms(tmp_path, capsys):
    """Resized whole to 32 pixels, normalised by the checkpoint's mean and deviation."""
    model = make()
    args = {
        "model": KAT,
        "input_size": 32,
        "model_options": SMALL,
        "mean": [0.1, 0.2, 0.3],
        "std": [0.5, 0.6, 0.7],
        "interpolation": "bilinear",
    }
    torch.save({"model": model.state_dict(), "args": args, "versions": {}}, tmp_path / "own.pth")
    image = (
        np.array(Image.open(png(tmp_path / "a.png")).resize((32, 32), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
        / 255
    )
    x = (torch.tensor(image) - torch.tensor(args["mean"])[:, None, None]) / torch.tensor(args["std"])[:, None, None]
    expected = 100 * model(x[None].float())[0].softmax(-1)
    assert call(predict, tmp_path / "a.png", "--checkpoint", tmp_path / "own.pth", "--device", "cpu") == 0
    for line in capsys.readouterr().out.strip().splitlines()[1:]:
        percent, name = line.split(" %  class ")
        assert float(percent) == pytest.approx(expected[int(name)].item(), abs=0.0051)


def test_images_that_cannot_be_read_do_not_stop_the_others(tmp_path, capsys):
    (tmp_path / "broken.png").write_bytes(png(tmp_path / "a.png").read_bytes()[:200])
    assert (
        call(
            predict,
            tmp_path / "none.png",
            tmp_path / "broken.png",
            tmp_path / "a.png",
            "--device",
            "cpu",
            "--checkpoint",
            forced(tmp_path / "own.pth", 0),
        )
        == 2
    )
    out, err = capsys.readouterr()
    assert f"{tmp_path / 'a.png'}\n 100.00 %  class 0" in out and "broken" not in out
    assert err.count("error: ") == err.count("\n") == 2 and "none.png" in err and "broken.png" in err


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["--checkpoint", "none.pth"], "there is no checkpoint none.pth"),
        (["--checkpoint", "bare.pth"], "name it with --model"),
        (["--checkpoint", "own.pth", "--topk", 0], "--topk must be at least 1"),
        (["--checkpoint", "own.pth", "--use-ema"], "no averaged weights"),
        (["--checkpoint", "own.pth", "--classes", "none.txt"], "none.txt cannot be read"),
        (["--checkpoint", "own.pth", "--classes", "few.txt"], "has 1 names, the model 4 outputs"),
        (["--checkpoint", "own.pth", "--model", VIT], ": drop --model"),
        (["--checkpoint", "own.pth", "--device", "abacus"], "is no device"),
        (["--checkpoint", "headless.pth"], "head.weight is missing"),
    ],
)
def test_what_cannot_be_predicted_is_one_sentence(tmp_path, monkeypatch, capsys, options, sentence):
    monkeypatch.chdir(tmp_path)
    checkpoint = torch.load(forced(tmp_path / "own.pth", 0), weights_only=True)
    torch.save(checkpoint["model"], "bare.pth")
    checkpoint["model"] = {k: v for k, v in checkpoint["model"].items() if "head" not in k}
    torch.save(checkpoint, "headless.pth")
    Path("few.txt").write_text("one\n")
    assert call(predict, png(tmp_path / "a.png"), *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and sentence in error


def test_both_run_from_any_folder(tmp_path):
    timm_file(tmp_path / "a.pth.tar", make())
    forced(tmp_path / "own.pth", 2)
    png(tmp_path / "a.png")
    arguments = {
        "convert": ["a.pth.tar", "ours.pth"],
        "predict": ["a.png", "none.png", "--checkpoint", "own.pth", "--device", "cpu"],
    }
    running = {
        tool: subprocess.Popen(
            [sys.executable, str(ROOT / f"tools/{tool}.py"), *rest],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for tool, rest in arguments.items()
    }
    done = {tool: (*process.communicate(timeout=120), process.returncode) for tool, process in running.items()}
    out, err, rc = done["convert"]
    assert (
        (rc, err) == (0, "")
        and out.startswith("40 of 40 tensors taken from a.pth.tar (raw weights)\n")
        and (tmp_path / "ours.pth").is_file()
    )
    out, err, rc = done["predict"]
    assert (
        rc == 2
        and "a.png\n 100.00 %  class 2\n" in out
        and err.startswith("error: none.png cannot be read")
        and err.count("\n") == 1
    )
