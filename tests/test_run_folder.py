"""The output folder under runs that are killed, and under two runs at a time."""

import errno
import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

import run_folder
from tests.test_main import MICRO, ROOT, SMALL, call, processes


@pytest.fixture
def start():
    """Starts main.py in a process of its own, which ends with the test at the latest."""
    started = []

    def run(*flags):
        command = [sys.executable, str(ROOT / "main.py"), *map(str, flags)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        started.append(subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.wait()


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)


@pytest.mark.parametrize("count", [1, 2])
def test_a_folder_belongs_to_one_run_until_its_process_ends(tmp_path, start, capfd, count):
    """Also with data workers, which outlive a killed process for seconds."""
    first = start(*MICRO, "--num-workers", "1", "--epochs", "100", "--output-dir", tmp_path)
    wait_for(tmp_path / "checkpoint.pth", first)
    capfd.readouterr()
    second = [*SMALL, "--epochs", "1", "--no-repeated-aug", "--output-dir", tmp_path]
    refused = processes(count, *second)
    sentence = f"error: process {first.pid} on {socket.gethostname()} is training into the output folder {tmp_path}"
    assert refused.returncode == 2 and refused.stderr.count(sentence) == count, refused.stderr
    assert not (tmp_path / "earlier-1").exists()
    assert call("--eval", "--resume", "auto", "--output-dir", tmp_path, "--device", "cpu", "--num-workers", "0") == 0
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert call(*second) == 0 and (tmp_path / "earlier-1" / "checkpoint.pth").exists()


def test_a_file_system_without_locks_gets_a_warning(tmp_path, monkeypatch, capfd):
    def refuse(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    run_folder.RunFolder(tmp_path / "out").close()
    assert re.fullmatch(r"note: the file system of \S+ has no locks: .*\n", capfd.readouterr().out)
