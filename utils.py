"""Distributed set-up, errors for the user, seeds and random states, versions, atomic files."""

import dataclasses
import json
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import traceback
from datetime import timedelta
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist


class UserError(Exception):
    """A fault that the user can fix: one sentence, printed without a traceback; the process exits with code 2."""


def report(error: UserError) -> None:
    """Print the sentence, after its traceback where the environment has KAN_DEBUG=1."""
    if os.environ.get("KAN_DEBUG") == "1":
        traceback.print_exception(error)
    sys.stderr.write(f"error: {error}\n")


def first_line(error: Exception) -> str:
    """One line for the user from an exception of a library."""
    if size := re.search(r"tried to allocate (\d+) bytes", str(error)):  # torch's allocator on the CPU
        return f"a tensor of {int(size[1]) / 2**30:,.0f} GiB does not fit into memory"
    if isinstance(error, KeyError):  # The text of a KeyError is the key alone.
        return f"unknown {error}"
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@dataclasses.dataclass(frozen=True)
class World:
    """Rank (0..world_size - 1) and device of this process."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def log(self, *message, sep: str = " ") -> None:
        if self.is_main:
            print(*message, sep=sep, flush=True)

    def all_sum(self, *values: float) -> list[float]:
        """Element-wise sums over all processes, in float64."""
        totals = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.world_size > 1:
            dist.all_reduce(totals)
        return totals.tolist()

    def gather(self, value) -> list:
        """The value of every rank, on every rank."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values


def init_world(device: str, dist_url: str = "env://") -> World:
    """Join the process group that torchrun describes by RANK, LOCAL_RANK and WORLD_SIZE; without them, one process."""
    rank, local_rank = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if device.startswith("cuda") and not torch.cuda.is_available():
        device = "cpu"
        if rank == 0:
            print("No CUDA GPU here: running on the CPU.", flush=True)
    if device == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"process {local_rank} of this machine has no GPU: there are {torch.cuda.device_count()}; "
                "lower --nproc_per_node or pass --device cpu"
            )
        device = f"cuda:{local_rank}"
    try:
        device = torch.device(device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:  # unknown name; no such device; no such backend
        raise UserError(f"--device {device} is no device of this machine: cuda, cuda:N or cpu") from error
    if world_size > 1 and not dist.is_initialized():
        try:
            backend = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, dist_url, timedelta(minutes=30), world_size, rank)
        except (RuntimeError, ValueError) as error:
            reason = first_line(error)
            raise UserError(f"the {world_size} processes cannot meet at --dist-url {dist_url}: {reason}") from error
    return World(rank, world_size, device)


def default_amp(device: torch.device) -> str:
    """bf16 on a GPU that supports it, fp16 on an older one, off on the CPU."""
    if device.type != "cuda":
        return "off"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)  # all CUDA devices too


def set_deterministic() -> None:
    """Use only kernels whose results repeat to the bit; an operation without such a kernel raises."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # Filling would write every tensor twice, and no operation here reads memory before it is written.
    torch.utils.deterministic.fill_uninitialized_memory = False


def rng_state(device: torch.device) -> dict:
    """States of the random generators of this process, as plain types and tensors."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_rng_state(state: dict, device: torch.device) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)


@cache
def versions() -> dict[str, str]:
    """Versions that a result depends on: packages, GPU, commit of this repository."""
    import timm
    import torchvision

    found = {
        "python": platform.python_version(),
        **{package.__name__: package.__version__ for package in (torch, torchvision, timm, np)},
    }
    if torch.cuda.is_available():
        found |= {"cuda": torch.version.cuda, "gpu": torch.cuda.get_device_name()}
    if shutil.which("git"):
        describe = ["git", "describe", "--always", "--dirty"]
        commit = subprocess.run(describe, cwd=Path(__file__).parent, capture_output=True, text=True)
        if commit.returncode == 0:
            found["commit"] = commit.stdout.strip()
    return {k: str(v) for k, v in found.items()}


def write_atomically(path: Path, write) -> None:
    """Call `write(file)` on a temporary file, flush it to the disk, rename it to `path`, which is never incomplete."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)


def write_result(target: str, result: dict) -> None:
    """Write a result as JSON into the file `target`, or for "-" print --result and the JSON, as timm's validate.py."""
    text = json.dumps(result, indent=4)
    if target == "-":
        print(f"--result\n{text}", flush=True)
        return
    try:
        write_atomically(Path(target), lambda file: file.write(text.encode() + b"\n"))
    except OSError as error:
        raise UserError(f"cannot write the result to {target}: {error.strerror}") from error


def sync_directory(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
