"""The output folder of a run: only one process trains into it at a time, and an earlier run in it is kept aside."""

import errno
import fcntl
import itertools
import json
import os
import re
import socket
from pathlib import Path

from utils import UserError, write_atomically

RUN_FILES = ("checkpoint.pth", "best_checkpoint.pth", "log.txt", "speed.txt", "args.json", "curves.png")
LOCK = ".lock"
# The temporary files of utils.write_atomically and of checkpoint/save.py, which only a killed process leaves.
TEMPORARY = re.compile(rf"\.({'|'.join(map(re.escape, RUN_FILES))}|checkpoint-\d+\.pth)\.\d+\.tmp")


class RunFolder:
    """An output folder that this process holds until `close`; it is made where it does not exist.

    The operating system releases the lock when the process ends, however it ends. It is a POSIX lock: data workers,
    which are forked from this process and may outlive it for seconds, do not share it.
    Raises: UserError if the folder cannot be made or written, or another process trains into it.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.is_locked = path, True
        try:
            path.mkdir(parents=True, exist_ok=True)
            self.lock = open(path / LOCK, "a+")
        except OSError as error:
            raise _cannot_write(path, error) from error
        try:
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                self.lock.seek(0)
                holder = self.lock.read().strip() or "another process"
                self.lock.close()
                raise UserError(
                    f"{holder} is training into the output folder {path}: choose another --output-dir or end that run"
                ) from error
            self.is_locked = False
            print(f"note: the file system of {path} has no locks: only one run may write there at a time", flush=True)
            return
        self.lock.truncate(0)
        self.lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self.lock.flush()

    def close(self) -> None:
        self.lock.close()

    def prepare(self, about: dict, fresh: bool) -> None:
        """Write args.json; a fresh run first moves the files of an earlier run into a folder earlier-N.

        Temporary files of a killed run are removed, if the lock says that no run in the folder lives.
        """
        folder = self.path
        try:
            for path in folder.glob(".*.tmp") if self.is_locked else ():
                if TEMPORARY.fullmatch(path.name):
                    path.unlink()
            left = [path for name in (*RUN_FILES, "checkpoint-*.pth") for path in folder.glob(name)]
            if left and fresh:
                names = (folder / f"earlier-{n}" for n in itertools.count(1))
                aside = next(name for name in names if not name.exists())
                aside.mkdir()
                for path in left:
                    path.rename(aside / path.name)
                print(f"{folder} held an earlier run: moved to {aside} (to continue a run: --resume auto)", flush=True)
            write_atomically(folder / "args.json", lambda file: file.write(json.dumps(about, indent=1).encode()))
        except OSError as error:
            raise _cannot_write(folder, error) from error


def _cannot_write(folder: Path, error: OSError) -> UserError:
    return UserError(f"cannot write into the output folder {folder}: {error.strerror}")
