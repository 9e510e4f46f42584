"""The promises of the README that need minutes: the quickstart, and real photographs on a CPU."""

import json
import os
import re
import subprocess
import time
from pathlib import Path

import pytest

import main
from tests.data_helpers import photographs

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.alone
def test_quickstart_reaches_97_percent_and_evaluates_to_the_same_figure(tmp_path):
    result = subprocess.run(
        ["bash", str(ROOT / "run_scripts" / "quickstart.sh")],
        env={**os.environ, "OUT": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    best, weights = re.search(r"best top-1 ([\d.]+) % \((\w+) weights", result.stdout).groups()
    evaluated = re.findall(r"^top-1 ([\d.]+) % \((\w+) weights\)$", result.stdout, re.MULTILINE)
    assert evaluated == [(best, weights)] and float(best) >= 97
    for name in ("best_checkpoint.pth", "log.txt", "curves.png"):
        assert str(tmp_path / name) in result.stdout and (tmp_path / name).stat().st_size > 0
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 40
    assert sum(json.loads(line)["train_seconds"] for line in (tmp_path / "speed.txt").read_text().splitlines()) <= 180


@pytest.mark.slow
def test_micro_kat_on_2000_photographs(tmp_path):
    """35 % top-1 on the 10,000 validation images of CIFAR-10 after 3 minutes of training on 2,000, on two cores."""
    photographs(tmp_path)
    start = time.monotonic()
    assert (
        main.main(
            [
                "--model",
                "kat_micro_patch4_32",
                "--data-set",
                "IMNET",
                "--data-path",
                str(tmp_path),
                "--train-subset",
                "2000",
                "--input-size",
                "32",
                "--batch-size",
                "50",
                "--epochs",
                "11",
                "--lr",
                "2e-3",
                "--unscale-lr",
                "--warmup-epochs",
                "2",
                "--sched-on-updates",
                "--no-repeated-aug",
                "--aa",
                "none",
                "--color-jitter",
                "0",
                "--reprob",
                "0",
                "--mixup",
                "0",
                "--cutmix",
                "0",
                "--drop-path",
                "0",
                "--num-workers",
                "0",
                "--eval-every",
                "11",
                "--check-images",
                "off",
                "--device",
                "cpu",
                "--output-dir",
                str(tmp_path / "out"),
            ]
        )
        == 0
    )
    seconds = time.monotonic() - start
    entries = [json.loads(line) for line in (tmp_path / "out" / "log.txt").read_text().splitlines()]
    assert entries[-1]["max_accuracy"] >= 35 and seconds <= 180
