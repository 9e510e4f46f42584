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
            disk = Disk(patch, 1, last)
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
        assert_same_run(tmp_path / "straight", folder)
        assert [json.loads(line)["epoch"] for line in open(folder / "log.txt")] == [0, 1, 2]
    assert last > 8  # Three files, each with its replacement and its synchronisation.
