"""A training that is killed between any two file operations of a save, and resumed."""

import json
import os

import pytest
import torch

import main
from tests.test_main import SMALL, assert_same_run, call

RUN = [*SMALL, "--train-subset", "64", "--epochs", "3", "--save-every", "1"]
ACCURACIES = 10.0, 50.0, 20.0  # of the epochs: the save of the second one, which is the best, is killed


class Killed(BaseException):
    pass


class Disk:
    """Counts the file operations from the save of an epoch on. After the last one none happens, as after SIGKILL."""

    def __init__(self, patch, epoch, last):
        self.count, self.last = None, last
        save = main.save

        def counted_save(folder, state, *rest):
            if state["epoch"] == epoch:
                self.count = 0
            save(folder, state, *rest)

        patch.setattr(main, "save", counted_save)
        for name in ("replace", "link", "fsync", "unlink"):
            patch.setattr(os, name, self.counted(getattr(os, name)))

    def counted(self, operation):
        def call(*args, **kwargs):
            if self.count is not None:
                if self.count >= self.last:
                    raise Killed
                self.count += 1
            return operation(*args, **kwargs)

        return call


@pytest.fixture
def accuracies(monkeypatch):
    """Epochs with the accuracies above, without the time of evaluating."""
    evaluate_epoch, epochs = main.evaluate_epoch, []

    def remember(training, loader, epoch, *rest):
        epochs.append(epoch)
        return evaluate_epoch(training, loader, epoch, *rest)

    def evaluate(models, *args, **kwargs):
        result = {"acc1": ACCURACIES[epochs[-1]], "acc5": 60.0, "loss": 1.0, "images": 51}
        return dict.fromkeys(models, result)

    monkeypatch.setattr(main, "evaluate_epoch", remember)
    monkeypatch.setattr(main, "evaluate", evaluate)


def test_a_save_killed_anywhere_loses_neither_the_best_weights_nor_the_log(tmp_path, monkeypatch, accuracies, capfd):
    assert call(*RUN, "--output-dir", tmp_path / "straight") == 0
    for last in range(100):
        folder = tmp_path / f"killed_{last}"
        with monkeypatch.context() as patch:
            Disk(patch, 1, last)
            try:
                assert call(*RUN, "--output-dir", folder) == 0
            except Killed:
                pass
            else:
                break
        if last % 2:
            resume = ["--resume", folder / "checkpoint.pth", "--device", "cpu"]
        else:
            resume = ["--resume", "auto", "--device", "cpu"]
        capfd.readouterr()
        assert call(*resume, "--output-dir", folder) == 0
        assert "best top-1 50.00 % (EMA weights, epoch 2)" in capfd.readouterr().out
        best = torch.load(folder / "best_checkpoint.pth", weights_only=True)
        assert best["epoch"] == 1 and best["best"]["accuracy"] == 50, last
        assert {f"checkpoint-000{n}.pth" for n in (1, 2, 3)} <= set(os.listdir(folder))
        assert not [name for name in os.listdir(folder) if name.endswith(".tmp")]
        assert_same_run(tmp_path / "straight", folder)
        assert [json.loads(line)["epoch"] for line in open(folder / "log.txt")] == [0, 1, 2]
    assert last > 8  # Three files, each with its replacement and its synchronisation.


def test_a_failed_save_leaves_no_line_in_the_log(tmp_path, monkeypatch, capfd):
    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    assert call(*RUN, "--output-dir", tmp_path) == 2
    assert "cannot write a checkpoint" in capfd.readouterr().err and not (tmp_path / "log.txt").read_text()


def test_a_kill_before_the_line_of_the_log_loses_no_line(tmp_path, monkeypatch):
    assert call(*RUN, "--output-dir", tmp_path / "straight") == 0
    with monkeypatch.context() as patch:
        add = main.Records.add

        def killed(records, entry, speed):
            if entry["epoch"] == 1:
                raise KeyboardInterrupt
            add(records, entry, speed)

        patch.setattr(main.Records, "add", killed)
        assert call(*RUN, "--output-dir", tmp_path / "killed") == 130
    assert call("--resume", "auto", "--device", "cpu", "--output-dir", tmp_path / "killed") == 0
    assert_same_run(tmp_path / "straight", tmp_path / "killed")


@pytest.mark.parametrize(
    "damage", [b'{"epoch": 0, "trai}\n', b"\xff\x00\n", b'{"epoch": "x"}\n', b"[]\n\n", b"[" * 9999 + b"\n"]
)
def test_a_damaged_log_is_kept_under_another_name(tmp_path, capfd, damage):
    one_epoch = [*RUN, "--output-dir", tmp_path, "--epochs"]
    assert call(*one_epoch, "1") == 0
    good = (tmp_path / "log.txt").read_bytes()
    (tmp_path / "log.txt").write_bytes(damage + good)
    for name in (".notes.123.tmp", ".checkpoint.pth.tmp", ".checkpoint.pth.123.tmp", ".checkpoint-0001.pth.9.tmp"):
        (tmp_path / name).touch()
    capfd.readouterr()
    assert call(*one_epoch, "2", "--resume", "auto") == 0
    assert f"{tmp_path / 'log.txt'} is damaged: kept as log.txt.damaged-1" in capfd.readouterr().out
    assert (tmp_path / "log.txt.damaged-1").read_bytes() == damage + good
    lines = (tmp_path / "log.txt").read_bytes().splitlines(keepends=True)
    assert lines[0] == good and len(lines) == 2
    assert sorted(p.name for p in tmp_path.glob(".*.tmp")) == [".checkpoint.pth.tmp", ".notes.123.tmp"]


def test_sentences_about_resume_auto_name_the_file(tmp_path, capfd):
    torch.save({"model": {"w": torch.ones(1)}}, tmp_path / "checkpoint.pth")
    for flags in (["--model", "vit_micro_patch8_32"], []):
        assert call("--resume", "auto", "--output-dir", tmp_path, "--device", "cpu", *flags) == 2
        error = capfd.readouterr().err
        assert error.startswith(f"error: {tmp_path / 'checkpoint.pth'} does not"), error
