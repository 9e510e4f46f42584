import argparse
import os
import shutil

import pytest
import timm
import torch

import main
from arguments import parse
from checkpoint import CheckpointError, read
from checkpoint.read import BEST, LAST
from checkpoint.save import save
from model_factory import build_model
from tests.test_main import SMALL, call, log
from utils import UserError

OPTIMIZER = {"state": {}, "param_groups": []}


def test_save_and_load(tmp_path):
    state = {
        "model": {"w": torch.randn(3)},
        "versions": {},
        "optimizer": OPTIMIZER,
        "epoch": 4,
        "best": {"accuracy": 1.5, "weights": "raw", "epoch": 4},
        "rng": [{"python": (3, (1, 2), None)}],
    }
    save(tmp_path, state, is_best=True, keep_as="checkpoint-0005.pth")
    assert sorted(os.listdir(tmp_path)) == sorted([LAST, BEST, "checkpoint-0005.pth"])
    loaded = read(tmp_path / BEST)
    assert torch.equal(loaded.weights["w"], state["model"]["w"])
    assert loaded.progress.rng == state["rng"] and loaded.progress.best == state["best"]
    save(tmp_path, {**state, "epoch": 5}, is_best=False)
    assert read(tmp_path / LAST).progress.epoch == 5 and read(tmp_path / BEST).progress.epoch == 4


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("unexpected pos 64 vs 0"), KeyboardInterrupt()]
)
def test_a_write_that_fails_leaves_the_last_file_whole(tmp_path, monkeypatch, error):
    save(tmp_path, {"model": {}, "versions": {}, "optimizer": OPTIMIZER, "epoch": 1}, is_best=True)

    def half(state, file):
        file.write(b"half of it")
        raise error

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else CheckpointError):
        save(tmp_path, {"model": {}, "versions": {}, "optimizer": OPTIMIZER, "epoch": 2}, is_best=True)
    assert sorted(os.listdir(tmp_path)) == sorted([LAST, BEST])
    assert read(tmp_path / LAST).progress.epoch == read(tmp_path / BEST).progress.epoch == 1


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


RUN = [*SMALL, "--sched-on-updates", "--epochs", "4", "--no-repeated-aug"]


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """Folder of a training that was stopped after one epoch of eight batches of 20 images."""
    folder = tmp_path_factory.mktemp("started")
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 1)
        assert call(*RUN, "--batch-size", "20", "--output-dir", folder) == 130
    return folder


def stop_after(patch, epoch):
    train = main.train_one_epoch

    def stopped(training, loader, number, *rest):
        if number == epoch:
            raise KeyboardInterrupt
        return train(training, loader, number, *rest)

    patch.setattr(main, "train_one_epoch", stopped)


@pytest.mark.parametrize(
    "flags, steps",
    [(["--batch-size", "10"], 16), (["--batch-size", "20", "--grad-accum-steps", "2"], 4), (["--batch-size", "20"], 8)],
    ids=["smaller batches", "accumulated", "the same"],
)
def test_a_schedule_on_updates_goes_on_with_another_global_batch(started, tmp_path, monkeypatch, capfd, flags, steps):
    """As in a straight run with that batch: its rates in the log after each of the next epochs are the same."""
    shutil.copytree(started, tmp_path / "resumed")
    stop_after(monkeypatch, 3)
    capfd.readouterr()
    resume = ["--resume", tmp_path / "resumed" / LAST, "--output-dir", tmp_path / "resumed", "--device", "cpu"]
    assert call(*resume, *flags) == 130
    notes = [line for line in capfd.readouterr().out.splitlines() if "optimizer steps now" in line]
    sentence = f"note: an epoch has {steps} optimizer steps now and had 8; the schedule goes on from the same epoch"
    assert notes == ([] if steps == 8 else [sentence])
    assert call(*RUN, *flags, "--output-dir", tmp_path / "straight") == 130
    resumed, straight = ([entry["train_lr"] for entry in log(tmp_path / name)[1:]] for name in ("resumed", "straight"))
    assert len(resumed) == 2 and resumed == straight and resumed[0] != resumed[1]


ODD = {
    "args": [[1], "x"],
    "best": [1, {"accuracy": "x"}],
    "rng": [3, [{}], [{"python": 1}], [{"python": (3, (1,), None), "numpy": 1}]],
    "scaler": [[1]],
    "optimizer": ["x", {"state": [1]}, {"state": {}, "param_groups": [1]}],
    "epoch": ["1", -1, None],
    "evaluated": [3],
    "entry": [3, {"epoch": [1]}],
    "updates": [-1, "x"],
    "model": ["x", {}, {1: torch.ones(1)}],
    "model_ema": [{"x": torch.ones(1)}],
    "versions": [None, 3],
}


@pytest.mark.parametrize("entry", ODD)
def test_odd_entries_end_with_a_sentence_on_resume(started, tmp_path, capfd, entry):
    state = torch.load(started / LAST, weights_only=True)
    for value in ODD[entry]:
        torch.save({**state, entry: value}, tmp_path / "file.pth")
        code = call("--resume", tmp_path / "file.pth", "--device", "cpu", "--epochs", "1")
        error = capfd.readouterr().err
        assert code == 2 and error.startswith("error: ") and error.count("\n") == 1, (value, error)


def test_odd_arguments_end_with_a_sentence_on_resume(started):
    """Every argument of a checkpoint, replaced by values of other types: a sentence, or what a flag could give."""
    checkpoint = read(started / LAST)
    settings, refused = checkpoint.settings, set()
    for name in settings:
        for value in (-2.5, "x", True, ["x", 2], {"a": 1}, torch.ones(2)):
            checkpoint.settings = {**settings, name: value}
            try:
                args = parse(["--resume", "file", "--device", "cpu"], lambda _: checkpoint).args
            except UserError as error:
                refused.add(name)
                assert "\n" not in str(error)
            else:
                assert args.plain()[name] is not value or not isinstance(value, (dict, torch.Tensor))
    assert {"lr", "epochs", "opt", "mean", "amp", "mixup", "bce_loss", "aa", "data_set"} <= refused
    checkpoint.settings = settings
    for options in ({1: 2}, {"depth": "x"}, {"num_heads": [1]}, {"mlp_basis": 3}, {"mlp_grid": 2}):
        checkpoint.model_options = options
        with pytest.raises(UserError, match="cannot build kat_micro_patch8_32"):
            build_model(parse(["--resume", "file", "--device", "cpu"], lambda _: checkpoint).args, 10, True)
