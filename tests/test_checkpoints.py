import os
import pickle

import pytest
import torch

import checkpoints
import weights
from checkpoints import BEST, LAST, CheckpointError


def test_save_and_load(tmp_path):
    state = {"model": {"w": torch.randn(3)}, "versions": {}, "epoch": 4, "best": {"accuracy": 1.5}, "rng": [{"python": (3, (1, 2), None)}]}
    checkpoints.save(tmp_path, state, is_best=True, keep_as="checkpoint-0005.pth")
    assert sorted(os.listdir(tmp_path)) == sorted([LAST, BEST, "checkpoint-0005.pth"])
    loaded = weights.read(tmp_path / BEST)
    assert torch.equal(loaded["model"]["w"], state["model"]["w"]) and loaded["rng"] == state["rng"]
    checkpoints.save(tmp_path, {**state, "epoch": 5}, is_best=False)
    assert weights.read(tmp_path / LAST)["epoch"] == 5 and weights.read(tmp_path / BEST)["epoch"] == 4


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("unexpected pos 64 vs 0"), KeyboardInterrupt()])
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
    for found, sentence in (({"weight": torch.ones(3, 2)}, "bias is missing"), ({**model.state_dict(), "x": torch.ones(1)}, "x is unknown"),
                              ({"weight": torch.ones(4, 2), "bias": torch.ones(3)}, r"weight has shape \(4, 2\) instead of \(3, 2\)")):
        with pytest.raises(CheckpointError, match=sentence):
            weights.load(model, found, "file")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters()))


def test_find(tmp_path):
    assert checkpoints.find("", "") is None and checkpoints.find("auto", str(tmp_path)) is None
    (tmp_path / LAST).touch()
    assert checkpoints.find("auto", str(tmp_path)) == tmp_path / LAST
    assert str(checkpoints.find("a/b.pth", "")) == "a/b.pth"
