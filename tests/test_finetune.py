"""--finetune, and bad files, as a user meets them: through main.py."""

import os
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

import main
import models  # noqa: F401
from checkpoint import Checkpoint
from models.published import model_in
from tests.data_helpers import random_weights
from tests.reference_vit import npz_arrays
from tests.test_checkpoint_read import Hostile
from tests.test_main import call, log

FLAGS = [
    "--data-set",
    "DIGITS",
    "--train-subset",
    "64",
    "--val-subset",
    "20",
    "--batch-size",
    "32",
    "--epochs",
    "1",
    "--no-repeated-aug",
    "--num-workers",
    "0",
    "--device",
    "cpu",
    "--warmup-epochs",
    "0",
]


def test_a_vit_trains_on_as_a_kat_and_its_raw_or_averaged_weights_are_taken(tmp_path, monkeypatch, capfd):
    raw, ema = (
        random_weights("vit_micro_patch8_32", num_classes=1000),
        random_weights("vit_micro_patch8_32", num_classes=1000),
    )
    ema = {name: value + 1 for name, value in ema.items()}
    torch.save(
        {"state_dict": raw, "state_dict_ema": ema, "epoch": 3, "arch": "vit_micro_patch8_32"}, tmp_path / "vit.pth.tar"
    )
    seen = []
    original = main.train
    monkeypatch.setattr(
        main,
        "train",
        lambda model, *rest: (
            seen.append({n: p.clone() for n, p in model.state_dict().items()}) or original(model, *rest)
        ),
    )
    for flags, expected, which in (([], ema, "EMA"), (["--no-use-ema"], raw, "raw")):
        assert (
            call(
                "--finetune",
                tmp_path / "vit.pth.tar",
                "--model",
                "kat_micro_patch8_32",
                "--input-size",
                "48",
                *flags,
                *FLAGS,
                "--output-dir",
                tmp_path / "out",
            )
            == 0
        )
        start = seen.pop()
        assert torch.equal(start["blocks.2.mlp.fc1.weight"], expected["blocks.2.mlp.fc1.weight"]) and start[
            "head.weight"
        ].shape == (10, 64)
        kat = timm.create_model("kat_micro_patch8_32")
        assert all(torch.equal(value, kat.state_dict()[name]) for name, value in start.items() if ".act" in name)
        output = capfd.readouterr().out
        assert f"54 of 72 tensors taken from {tmp_path / 'vit.pth.tar'} ({which} weights)" in output
        for line in (
            "resampled: pos_embed (1, 17, 64) -> (1, 37, 64)",
            "not loaded: head.weight (1000, 64) -> (10, 64), head.bias (1000,) -> (10,)",
            "keep their initial values: blocks.{0-3}.mlp.act1.weight_numerator, "
            "blocks.{0-3}.mlp.act1.weight_denominator, blocks.{0-3}.mlp.act2",
        ):
            assert line in output, line
    end = torch.load(tmp_path / "out" / "checkpoint.pth", weights_only=True)
    assert (
        not torch.equal(end["model"]["blocks.2.mlp.fc1.weight"], start["blocks.2.mlp.fc1.weight"])
        and end["args"]["finetune"]
    )
    # a requeued job: the same command with --resume auto starts, and then goes on
    again = [
        "--finetune",
        tmp_path / "vit.pth.tar",
        "--model",
        "kat_micro_patch8_32",
        *FLAGS,
        "--output-dir",
        tmp_path / "auto",
        "--resume",
        "auto",
    ]
    assert call(*again) == 0 and "tensors taken from" in capfd.readouterr().out
    assert call(*again, "--epochs", "2") == 0 and "tensors taken from" not in capfd.readouterr().out
    assert len(log(tmp_path / "auto")) == 2
    assert (
        call("--resume", "auto", "--output-dir", tmp_path / "auto", "--epochs", "2", "--device", "cpu") == 0
    )  # the file need not be there any more


@pytest.mark.slow
@pytest.mark.parametrize("size", [160, 288])
def test_tiny_trains_at_other_sizes(tmp_path, size):
    torch.save(random_weights("vit_tiny_patch16_224"), tmp_path / "vit_tiny_patch16_224.pth")
    assert (
        call(
            "--finetune",
            tmp_path / "vit_tiny_patch16_224.pth",
            "--model",
            "kat_tiny_gelu_patch16_224",
            "--input-size",
            size,
            *FLAGS,
            "--lr",
            "1e-2",
            "--train-subset",
            "20",
            "--batch-size",
            "10",
            "--epochs",
            "2",
            "--output-dir",
            tmp_path / "out",
        )
        == 0
    )
    first, second = log(tmp_path / "out")
    assert second["train_loss"] != first["train_loss"] and second["test_loss"] < 10


def test_npz_through_main(tmp_path, capfd):
    np.savez(tmp_path / "vit.npz", **npz_arrays(64, 4, 2, 8, 4, 1000))
    assert (
        call(
            "--initial-checkpoint", tmp_path / "vit.npz", "--model", "kat_micro_patch8_32", "--input-size", "32", *FLAGS
        )
        == 0
    )
    assert "54 of 72 tensors taken from" in capfd.readouterr().out


def test_evaluation_at_another_size_and_on_some_of_the_classes(tmp_path, capfd):
    from torchvision.transforms.functional import to_pil_image

    for name in ("n01440764", "n01443537"):
        (tmp_path / "val" / name).mkdir(parents=True)
        to_pil_image(torch.rand(3, 40, 40)).save(tmp_path / "val" / name / "a.png")
    torch.save(random_weights("kat_micro_patch8_32"), tmp_path / "kat_micro_patch8_32-deadbeef.pth")
    evaluate = [
        "--eval",
        "--resume",
        tmp_path / "kat_micro_patch8_32-deadbeef.pth",
        "--num-workers",
        "0",
        "--device",
        "cpu",
    ]
    assert call(*evaluate, "--data-path", tmp_path, "--input-size", "64", "--result", tmp_path / "result.json") == 0
    assert (
        "the data have 2 of the model's 1000 classes" in capfd.readouterr().out
        and '"img_size": 64' in (tmp_path / "result.json").read_text()
    )
    assert call(*evaluate) == 2  # no data given: the digits
    assert "the model has 1000 outputs, the data 10 classes" in capfd.readouterr().err
    (tmp_path / "val" / "n01443537").rename(tmp_path / "val" / "fish")
    assert call(*evaluate, tmp_path, "--input-size", "32") == 0
    assert "counted as the first outputs" in capfd.readouterr().out
    assert call(*evaluate, tmp_path, "--input-size", "32", "--result", tmp_path / "missing" / "x.json") == 2
    assert "is a folder or in none" in capfd.readouterr().err


@pytest.mark.parametrize(
    "flag",
    [
        "--resume",
        "--finetune",
        "--eval --resume",
        "--distillation-type hard --teacher-model vit_micro_patch8_32 --teacher-path",
    ],
)
def test_bad_files_end_with_a_sentence(tmp_path, monkeypatch, capfd, flag):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {}, "x": Hostile()}, "hostile.pth")
    torch.save(random_weights("vit_micro_patch8_32", embed_dim=96), "other.pth")
    whole = Path("other.pth").read_bytes()
    Path("truncated.pth").write_bytes(whole[: len(whole) // 2])
    for name, sentence in (
        ("hostile.pth", "hostile.pth holds objects other than tensors"),
        ("truncated.pth", "truncated.pth is not a checkpoint or is damaged"),
        ("other.pth", "the model"),
        ("missing.pth", "there is no checkpoint missing.pth"),
        ("http://127.0.0.1:9/x.pth", "could not be downloaded"),
    ):
        assert (
            call(
                *flag.split(),
                name,
                "--model",
                "kat_micro_patch8_32",
                "--input-size",
                "32",
                "--nb-classes",
                "1000",
                *FLAGS,
            )
            == 2
        ), name
        error = capfd.readouterr().err
        assert error.startswith("error: ") and sentence in error and error.count("\n") == 1, error
    assert not os.path.exists("hostile_code_ran")


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--finetune", "a.pth", "--resume", "b.pth"], "--finetune and --resume FILE do not go together"),
        (["--eval", "--finetune", "a.pth"], "--eval needs --resume"),
        (["--eval", "--pretrained", "--finetune", "a.pth"], "--eval needs --resume"),
        (["--eval", "--pretrained", "--result", "/tmp"], "--result /tmp is a folder"),
        (["--use-ema"], "--use-ema chooses weights"),
        (["--result"], "--result belongs to --eval"),
        (["DIR", "--data-path", "OTHER"], "two places"),
        (["--cosub", "--distillation-type", "hard", "--teacher-path", "x"], "do not go together"),
        (["--distributed"], "torchrun"),
        (["--world-size", "4"], "1 process"),
        (["--attn-only", "--model", "resnet10t", "--device", "cpu", "--data-set", "DIGITS"], "needs a transformer"),
        (
            ["--nb-classes", "3", "--model", "kat_micro_patch8_32", "--input-size", "32", "--device", "cpu"],
            "--nb-classes 3 are too few: the data have 10",
        ),
    ],
)
def test_flags_that_do_not_fit_together(flags, sentence, capfd, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert call(*flags) == 2
    error = capfd.readouterr().err
    assert error.startswith("error: ") and sentence in error and error.count("\n") == 1, error


def test_data_folder_anywhere_on_the_command_line(tmp_path):
    from arguments import parse

    for argv in (
        [str(tmp_path), "-b", "4"],
        ["-b", "4", str(tmp_path)],
        ["--amp", "--epochs", "3", str(tmp_path), "-b", "4"],
        ["-b", "4", "--amp", str(tmp_path)],
    ):
        args = parse(argv).args
        assert (args.data_set, args.data_path, args.unscale_lr, args.batch_size, args.timm_style) == (
            "IMNET",
            str(tmp_path),
            True,
            4,
            True,
        )
        assert (args.warmup_lr, args.min_lr, args.train_interpolation, args.repeated_aug, args.decay_rational) == (
            1e-5,
            0.0,
            "random",
            False,
            True,
        )
    args = parse([str(tmp_path), "--no-unscale-lr", "--data-set", "CIFAR10", "--repeated-aug"]).args
    assert (args.data_set, args.unscale_lr, args.repeated_aug) == ("CIFAR10", False, True)
    assert parse(["--data-path", str(tmp_path)]).args.data_set == "IMNET" and parse([]).args.data_set == "DIGITS"
    settings = {"data_set": "CIFAR10", "data_path": "/old", "unscale_lr": True}
    kept = Checkpoint("x", {}, model="kat_tiny_patch16_224", settings=settings)
    args = parse(["--eval", "--resume", "x", "--data-path", str(tmp_path)], lambda _: kept).args
    assert (args.data_set, args.data_path) == ("CIFAR10", str(tmp_path))
    assert parse(["--eval", "--resume", "x", str(tmp_path)], lambda _: kept).args.data_set == "IMNET"


def test_hub_models_are_named_before_they_are_fetched(monkeypatch, capfd):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert call("--eval", "--resume", "hf_hub:no/such", "--device", "cpu") == 2
    assert capfd.readouterr().err.startswith("error: hf_hub:no/such could not be loaded from the hub")
    assert model_in("hf_hub:adamdad/kat_tiny_patch16_224") == "kat_tiny_patch16_224"
