"""An evaluation that fails keeps the epoch that was trained before it."""

import json

import pytest
import torch
from PIL import Image

import main
from tests.test_main import SMALL, assert_same_run, call, processes

RUN = [*SMALL, "--epochs", "2", "--drop", "0.1", "--no-repeated-aug", "--log-grad-norms"]


@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.parametrize("error", [main.UserError("an image"), RuntimeError("a bug"), KeyboardInterrupt()])
def test_a_resumed_run_begins_with_the_failed_evaluation(tmp_path, monkeypatch, capfd, epoch, error):
    assert call(*RUN, "--sched", "plateau", "--output-dir", tmp_path / "straight") == 0
    evaluate_epoch = main.evaluate_epoch

    def fail(training, loader, number, *rest):
        if number == epoch:
            torch.rand(1)
            raise error
        return evaluate_epoch(training, loader, number, *rest)

    failed = tmp_path / "failed"
    with monkeypatch.context() as patch:
        patch.setattr(main, "evaluate_epoch", fail)
        flags = [*RUN, "--sched", "plateau", "--output-dir", failed]
        if isinstance(error, RuntimeError):
            with pytest.raises(RuntimeError, match="a bug"):
                call(*flags)
        else:
            assert call(*flags) == (2 if isinstance(error, main.UserError) else 130)
    assert f"epoch {epoch + 1} is saved" in capfd.readouterr().out
    assert len((failed / "log.txt").read_text().splitlines()) == epoch
    train, trained = main.train_one_epoch, []

    def remember(training, loader, number, *rest):
        trained.append(number)
        return train(training, loader, number, *rest)

    monkeypatch.setattr(main, "train_one_epoch", remember)
    assert call("--resume", "auto", "--output-dir", failed, "--device", "cpu") == 0
    assert trained == ([1] if epoch == 0 else [])
    assert not (failed / "earlier-1").exists()
    assert_same_run(tmp_path / "straight", failed)


def test_a_corrupt_image_stops_all_processes_with_its_sentence(tmp_path):
    """Only the second of two processes meets it; both stop, and the first one saves."""
    for split in ("train", "val"):
        for label in ("a", "b"):
            (tmp_path / split / label).mkdir(parents=True)
    for i in range(8):
        for path in (tmp_path / "train" / "ab"[i % 2], tmp_path / "val" / "ab"[i // 4]):
            Image.new("RGB", (32, 32), (30 * i, 0, 99)).save(path / f"{i}.png")
    (tmp_path / "val" / "b" / "6.png").write_bytes(b"no image")
    index = [flag for flag in RUN if flag not in ("--train-subset", "160", "--val-subset", "51")]
    flags = [
        *index,
        "--data-set",
        "IMNET",
        "--data-path",
        tmp_path,
        "--batch-size",
        "4",
        "--check-images",
        "off",
        "--output-dir",
    ]
    result = processes(2, *flags, tmp_path / "out")
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("6.png cannot be read as an image") == 2, result.stderr
    state = torch.load(tmp_path / "out" / "checkpoint.pth", weights_only=True)
    assert (state["epoch"], state["evaluated"]) == (0, False)
    Image.new("RGB", (32, 32)).save(tmp_path / "val" / "b" / "6.png")
    result = processes(2, "--resume", "auto", "--device", "cpu", "--num-workers", "0", "--output-dir", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert [json.loads(line)["epoch"] for line in open(tmp_path / "out" / "log.txt")] == [0, 1]
