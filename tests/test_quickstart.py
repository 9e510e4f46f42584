"""Runs of minutes on a CPU: the quickstart of the README, and crops of real photographs."""

import json
import os
import re
import subprocess
import time
from pathlib import Path

import pytest

import main
from tests.data_helpers import photographs
from tests.test_setup import Project

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


def test_quickstart_removes_nothing(tmp_path):
    """main.py moves an earlier run aside."""
    project = Project(tmp_path)
    project.require("pytest>=8")
    (project.root / "main.py").write_text(
        "import sys\nfrom pathlib import Path\n"
        "if '--eval' in sys.argv:\n    print('top-1 97.50 %')\n    sys.exit()\n"
        "out = Path(sys.argv[sys.argv.index('--output-dir') + 1])\n"
        "assert {'mine.pth', 'checkpoint.pth'} <= {p.name for p in out.iterdir()}\n"
        "assert sys.argv[-2:] == ['--epochs', '1']\n"
        "for name in ('checkpoint.pth', 'best_checkpoint.pth', 'log.txt', 'curves.png'):\n    (out / name).touch()\n"
    )
    out = project.root / "my runs"
    out.mkdir()
    (out / "mine.pth").touch()
    (out / "checkpoint.pth").touch()
    for _ in range(2):
        run = project.run("quickstart.sh", "--epochs", "1", OUT="my runs")
        assert run.returncode == 0, run.stdout + run.stderr
        assert "top-1 97.50 %" in run.stdout and "my runs/best_checkpoint.pth" in run.stdout


@pytest.mark.slow
def test_micro_kat_on_2000_photographs(tmp_path):
    """80 % top-1 on 1,000 validation images of ten classes after 3 minutes of training on 2,000, on two cores."""
    photographs(tmp_path, train=200, validation=100)
    start = time.monotonic()
    flags = f"--data-path {tmp_path} --output-dir {tmp_path}/out --train-subset 2000 --device cpu --num-workers 0"
    flags += " --model kat_micro_patch4_32 --data-set IMNET --input-size 32 --batch-size 50 --epochs 11 --eval-every 11"
    flags += (
        " --lr 2e-3 --unscale-lr --warmup-epochs 2 --sched-on-updates --check-images off --no-repeated-aug --aa none"
    )
    flags += " --color-jitter 0 --reprob 0 --mixup 0 --cutmix 0 --drop-path 0"
    assert main.main(flags.split()) == 0
    seconds = time.monotonic() - start
    entries = [json.loads(line) for line in (tmp_path / "out" / "log.txt").read_text().splitlines()]
    assert entries[-1]["max_accuracy"] >= 80 and seconds <= 180
