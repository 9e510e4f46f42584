import argparse
import os

import pytest
import timm
import torch

import checkpoints
import main
import weights
from checkpoints import BEST, LAST, CheckpointError
from models.load import load_all


def test_save_and_load(tmp_path):
    state = {
        "model": {"w": torch.randn(3)},
        "versions": {},
        "epoch": 4,
        "best": {"accuracy": 1.5},
        "rng": [{"python": (3, (1, 2), None)}],
    }
    checkpoints.save(tmp_path, state, is_best=True, keep_as="checkpoint-0005.pth")
    assert sorted(os.listdir(tmp_path)) == sorted([LAST, BEST, "checkpoint-0005.pth"])
    loaded = weights.read(tmp_path / BEST)
    assert torch.equal(loaded["model"]["w"], state["model"]["w"]) and loaded["rng"] == state["rng"]
    checkpoints.save(tmp_path, {**state, "epoch": 5}, is_best=False)
    assert weights.read(tmp_path / LAST)["epoch"] == 5 and weights.read(tmp_path / BEST)["epoch"] == 4


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("unexpected pos 64 vs 0"), KeyboardInterrupt()]
)
def test_a_write_that_fails_leaves_the_last_file_whole(tmp_path, monkeypatch, error):
    checkpoints.save(tmp_path, {"model": {}, "versions": {}, "epoch": 1}, is_best=True)

    def half(state, file):
        file.write(b"half of it")
        raise error

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else CheckpointError):
        checkpoints.save(tmp_path, {"model": {}, "versions": {}, "epoch": 2}, is_best=True)
    assert sorted(os.listdir(tmp_path)) == sorted([LAST, BEST])
    assert weights.read(tmp_path / LAST)["epoch"] == weights.read(tmp_path / BEST)["epoch"] == 1


def test_weights_of_another_model_are_refused_whole():
    model, before = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
    model.load_state_dict(before.state_dict())
    for found, sentence in (
        ({"weight": torch.ones(3, 2)}, "bias is missing"),
        ({**model.state_dict(), "x": torch.ones(1)}, "x is unknown"),
        ({"weight": torch.ones(4, 2), "bias": torch.ones(3)}, r"weight has shape \(4, 2\) instead of \(3, 2\)"),
    ):
        with pytest.raises(CheckpointError, match=sentence):
            load_all(model, found, "file")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters()))


def test_find(tmp_path):
    assert checkpoints.find("", "") is None and checkpoints.find("auto", str(tmp_path)) is None
    (tmp_path / LAST).touch()
    assert checkpoints.find("auto", str(tmp_path)) == tmp_path / LAST
    assert str(checkpoints.find("a/b.pth", "")) == "a/b.pth"


@pytest.mark.parametrize("trainer", ["timm", "deit"])
def test_a_training_of_another_trainer_goes_on(tmp_path, monkeypatch, trainer, capfd):
    """Its parameters are numbered in the order of KAT's published module: fc1, act1, act2, fc2."""
    torch.manual_seed(0)
    model = timm.create_model("kat_micro_patch8_32", num_classes=10)
    ranks = {"norm1": 0, "attn": 1, "norm2": 2, "fc1": 3, "act1": 4, "act2": 5, "fc2": 6}
    names = sorted(
        dict(model.named_parameters()),
        key=lambda n: (
            n.startswith(("norm", "head")),
            "blocks" in n and int(n.split(".")[1]) + 1,
            next((r for key, r in ranks.items() if "blocks" in n and key in n), 0),
        ),
    )
    own = dict(model.named_parameters())
    plain = [n for n in names if own[n].ndim == 1 or n in ("cls_token", "pos_embed")]
    groups = [
        {"params": [own[n] for n in plain], "weight_decay": 0.0},
        {"params": [own[n] for n in names if n not in plain], "weight_decay": 0.05},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    for _ in range(3):
        model(torch.randn(4, 3, 32, 32)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    weights_of = {n: own[n].detach().clone() for n in names}
    settings = argparse.Namespace(
        model="kat_micro_patch8_32", input_size=32 if trainer == "deit" else (3, 32, 32), opt="adamw", lr=1e-3
    )
    content = {"optimizer": optimizer.state_dict(), "epoch": 4, "args": settings}
    content |= (
        {"model": weights_of, "model_ema": weights_of, "lr_scheduler": {}}
        if trainer == "deit"
        else {
            "state_dict": {f"module.{n}": v for n, v in weights_of.items()},
            "arch": "kat_micro_patch8_32",
            "metric": 12.5,
            "version": 2,
        }
    )
    torch.save(content, tmp_path / "theirs.pth")
    seen = []

    def stop(training, *rest):
        seen.append((training, rest[1]))
        raise KeyboardInterrupt

    monkeypatch.setattr(main, "train_one_epoch", stop)
    flags = [
        "--resume",
        str(tmp_path / "theirs.pth"),
        "--data-set",
        "DIGITS",
        "--train-subset",
        "96",
        "--batch-size",
        "32",
        "--no-repeated-aug",
        "--num-workers",
        "0",
        "--device",
        "cpu",
        "--epochs",
        "9",
    ]
    assert main.main([*flags, "--decay-rational"]) == 130
    ((training, epoch),) = seen
    assert (
        epoch == 4 + 1 and training.updates == 15 and training.best["accuracy"] == (12.5 if trainer == "timm" else -1)
    )
    for name, p in training.model.named_parameters():
        assert torch.equal(p, weights_of[name])
        for key, value in optimizer.state[own[name]].items():
            assert torch.equal(training.optimizer.state[p][key], value), (name, key)
    assert main.main(flags) == 130  # here without decay of the coefficients: other groups, the same states
    assert all(
        torch.equal(seen[1][0].optimizer.state[p]["exp_avg"], optimizer.state[own[n]]["exp_avg"])
        for n, p in seen[1][0].model.named_parameters()
    )
    capfd.readouterr()
    del content["optimizer"]["param_groups"][0]["params"][0]
    torch.save(content, tmp_path / "theirs.pth")
    assert main.main(flags) == 2 and main.main([*flags, "--opt", "sgd"]) == 2
    errors = capfd.readouterr().err.splitlines()
    assert "which are not those of kat_micro_patch8_32" in errors[0] and "was trained with --opt adamw" in errors[1]
