"""Signals end a training in order."""

import os
import signal
import subprocess
import sys
import time

import pytest

import engine
import stopping
from tests.test_main import MICRO, ROOT, SMALL, assert_same_run, call

RUN = [*SMALL, "--epochs", "3", "--drop", "0.1", "--no-repeated-aug"]
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 138}


@pytest.mark.parametrize("number", CODES)
@pytest.mark.parametrize("when", ["step", "last step", "evaluation"])
def test_a_signal_ends_the_training_and_resuming_gives_the_straight_run(tmp_path, monkeypatch, capfd, number, when):
    assert call(*RUN, "--output-dir", tmp_path / "straight") == 0
    update, autocast, handler = engine._update, engine.autocast, signal.getsignal(number)
    updates = {"step": 7, "last step": 10, "evaluation": 10}[when]  # An epoch has five of them.
    with monkeypatch.context() as patch:

        def send(run, args):
            update(run, args)
            if run.updates == updates and when != "evaluation":
                os.kill(os.getpid(), number)
            send.updates = run.updates

        def send_in_evaluation(*args):
            if send.updates == updates and when == "evaluation" and not stopping.requested():
                os.kill(os.getpid(), number)
            return autocast(*args)

        send.updates = 0
        patch.setattr(engine, "_update", send)
        patch.setattr(engine, "autocast", send_in_evaluation)
        stopped = tmp_path / "stopped"
        assert call(*RUN, "--output-dir", stopped) == CODES[number]
    error = capfd.readouterr().err.splitlines()
    assert error[-1] == f"stopped by {number.name}; --resume auto continues after the last saved epoch"
    assert len(error) == 1 + (number == signal.SIGINT) and signal.getsignal(number) is handler
    assert send.updates == updates
    assert call("--resume", "auto", "--output-dir", stopped, "--device", "cpu") == 0
    trained_again = "epoch 2/3  step" in capfd.readouterr().out
    assert trained_again == (when == "step")
    assert_same_run(tmp_path / "straight", stopped)


def start(*command):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(
        [sys.executable, *map(str, command)], cwd=ROOT, env=environment, start_new_session=True, **pipes
    )


def end_with(process, folder, send):
    """Calls send(pid of rank 0) after the first epoch, and returns what the process then writes."""
    try:
        while not (folder / "checkpoint.pth").exists():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        send(int((folder / ".lock").read_text().split()[1]))
        return process.communicate(timeout=60)[1]
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("number", CODES)
def test_a_signal_to_all_processes_of_a_job_leaves_the_data_workers_at_work(tmp_path, number):
    process = start("main.py", *MICRO, "--num-workers", "2", "--epochs", "100", "--output-dir", tmp_path)
    error = end_with(process, tmp_path, lambda pid: os.killpg(process.pid, number))
    assert process.returncode == CODES[number] and "Traceback" not in error and "Error" not in error, error


def test_a_signal_to_one_of_two_processes_ends_both(tmp_path):
    flags = [*MICRO, "--no-repeated-aug", "--epochs", "100", "--print-freq", "3", "--output-dir", tmp_path]
    process = start("tests/processes.py", 2, *flags)
    error = end_with(process, tmp_path, lambda pid: os.kill(pid, signal.SIGTERM))
    assert process.returncode == 143 and error.count("stopped by SIGTERM") == 1, error
    assert "Traceback" not in error


def test_a_second_ctrl_c_ends_the_process_at_once():
    script = "import os, stopping\nwith stopping.orderly():\n for _ in 'ab': os.kill(os.getpid(), 2)\n print('alive')"
    environment = {k: v for k, v in os.environ.items() if k != "TORCHELASTIC_RUN_ID"}
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 130 and "alive" not in result.stdout
    assert result.stderr == "stopping after this step; press Ctrl-C again to stop at once\n"
