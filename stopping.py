"""SIGINT, SIGTERM and SIGUSR1 stop a training in order: it finishes its step, and all processes stop together."""

import os
import signal
import time
from contextlib import contextmanager

SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1
_first = {"signal": 0, "time": 0.0}  # The state of a process, as its signal handlers are.


class Stopped(Exception):
    """A signal asked for the end of the training. `code` is the exit code: 128 + number of the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.code = 128 + number


def requested() -> int:
    """Number of the signal that this process has received, 0 for none."""
    return _first["signal"]


@contextmanager
def orderly():
    """Within this context the first signal is only noted. A second Ctrl-C ends the process at once."""
    _first["signal"] = 0
    before = {number: signal.signal(number, _note) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _first["signal"] = 0


def _note(number: int, frame) -> None:
    now = time.monotonic()
    if not _first["signal"]:
        _first.update(signal=number, time=now)
        if number == signal.SIGINT and os.environ.get("RANK", "0") == "0":
            os.write(2, b"stopping after this step; press Ctrl-C again to stop at once\n")
        return
    # torchrun passes a Ctrl-C on to processes that have received it from the terminal already.
    repeated = "TORCHELASTIC_RUN_ID" in os.environ and now - _first["time"] < 1
    if number == signal.SIGINT and not repeated:
        os._exit(130)


def outlive_signals(worker: int) -> None:
    """Data workers work on for the step that the training finishes, when a signal goes to all processes of a job."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(60))
