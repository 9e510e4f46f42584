"""Distributed set-up, seeds, meters, and the records of a run (log.txt, speed.txt, curves.png, Weights & Biases)."""

import dataclasses
import itertools
import json
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import time
from datetime import timedelta
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

RUN_FILES = ("checkpoint.pth", "best_checkpoint.pth", "log.txt", "speed.txt", "args.json", "curves.png")


class UserError(Exception):
    """Something the user can mend: one sentence, printed without a traceback; the process exits with code 2."""


def first_line(error: Exception) -> str:
    if size := re.search(r"tried to allocate (\d+) bytes", str(error)):  # of torch's allocator on the CPU
        return f"a tensor of {int(size[1]) / 2**30:,.0f} GiB does not fit into memory"
    if isinstance(error, KeyError):  # its text is the key alone
        return f"unknown {error}"
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@dataclasses.dataclass(frozen=True)
class World:
    """This process among all: rank 0..world_size - 1 and its device."""

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
    """Join the process group that torchrun describes in the environment (RANK, LOCAL_RANK, WORLD_SIZE), or stay alone."""
    rank, world_size, local_rank = (
        int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
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
    except (RuntimeError, ValueError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {device} is no device of this machine: cuda, cuda:N or cpu") from error
    if world_size > 1 and not dist.is_initialized():
        try:
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                dist_url,
                timeout=timedelta(minutes=30),
                rank=rank,
                world_size=world_size,
            )
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"the {world_size} processes cannot meet at --dist-url {dist_url}: {first_line(error)}"
            ) from error
    return World(rank, world_size, device)


def default_amp(device: torch.device) -> str:
    """bf16 on a GPU that computes in it, fp16 on an older one, off on the CPU."""
    if device.type != "cuda":
        return "off"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)  # all CUDA devices too


def set_deterministic() -> None:
    """Kernels whose results repeat to the bit; an operation without such a kernel raises."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = (
        False  # a second write of every tensor, for what reads memory that nobody wrote
    )


def rng_state(device: torch.device) -> dict:
    """States of all random generators of this process as plain types and tensors."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_rng_state(state: dict, device: torch.device) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)


@cache
def versions() -> dict[str, str]:
    """What a result depends on: packages, GPU, commit of this repository."""
    import timm
    import torchvision

    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "numpy": np.__version__,
    }
    if torch.cuda.is_available():
        found |= {"cuda": torch.version.cuda, "gpu": torch.cuda.get_device_name()}
    commit = (
        subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True
        )
        if shutil.which("git")
        else None
    )
    if commit and commit.returncode == 0:
        found["commit"] = commit.stdout.strip()
    return {k: str(v) for k, v in found.items()}


def write_atomically(path: Path, write) -> None:
    """Call `write(file)` on a temporary file beside `path`, flush it to the disk, rename it: `path` is old or new, never half."""
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
    """Print a result as timm's validate.py does, --result and then JSON as the last lines, or write the JSON to a file."""
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


class Records:
    """Files of a run in its output folder, written by rank 0 alone; with no folder, only what W&B gets.

    `start_epoch` above 0 goes on with the run in the folder: what it logged from that epoch on is dropped and run again.
    log.txt: one JSON object an epoch, the same for two runs of the same seed; speed.txt: their times; args.json: arguments,
    command, versions; curves.png: loss and accuracy over the epochs.
    """

    def __init__(
        self, folder: Path | None, start_epoch: int, args: dict, run_name: str = "", run_id: str = "", project: str = ""
    ) -> None:
        self.folder = folder
        self.entries, self.plotted = [], time.monotonic()
        if self.folder:
            _prepare_folder(
                self.folder, {"args": args, "command": sys.argv, "versions": versions()}, fresh=start_epoch == 0
            )
            self.entries = [e for e in _read_lines(self.folder / "log.txt") if e["epoch"] < start_epoch]
            speed = [e for e in _read_lines(self.folder / "speed.txt") if e["epoch"] < start_epoch]
            for name, entries in (
                ("log.txt", self.entries),
                ("speed.txt", speed),
            ):  # what came after the checkpoint is run again
                lines = "".join(json.dumps(e) + "\n" for e in entries)
                write_atomically(self.folder / name, lambda f: f.write(lines.encode()))
        state = random.getstate()  # which W&B may draw from
        self.wandb = start_wandb(run_name, run_id, project, args, self.folder) if run_name else None
        random.setstate(state)

    def add(self, entry: dict, speed: dict) -> None:
        self.entries.append(entry)
        if self.folder:
            for name, values in (("log.txt", entry), ("speed.txt", {"epoch": entry["epoch"], **speed})):
                with open(self.folder / name, "a") as file:
                    file.write(json.dumps(values) + "\n")
        self._tell_wandb("log", {**entry, **speed}, step=entry["epoch"])

    def plot(self, at_most_every: float = 0.0) -> None:
        if self.folder and self.entries and time.monotonic() - self.plotted >= at_most_every:
            plot_curves(self.entries, self.folder / "curves.png")
            self.plotted = time.monotonic()

    def close(self) -> None:
        self.plot()
        self._tell_wandb("finish")

    def _tell_wandb(self, method: str, *args, **kwargs) -> None:
        if self.wandb:
            try:
                getattr(self.wandb, method)(*args, **kwargs)
            except Exception as error:  # whatever goes wrong there, training goes on
                print(
                    f"Weights & Biases {method} failed ({type(error).__name__}: {error}); going on without it.",
                    flush=True,
                )
                self.wandb = None


def _prepare_folder(folder: Path, about: dict, fresh: bool) -> None:
    """Make the folder and its args.json; a fresh run moves what an earlier one left there into a folder earlier-N, so that nothing is overwritten.

    Raises: UserError if the folder cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        left = [folder / name for name in RUN_FILES if (folder / name).exists()] if fresh else []
        left += sorted(folder.glob("checkpoint-*.pth")) if fresh else []
        if left:
            aside = next(folder / f"earlier-{n}" for n in itertools.count(1) if not (folder / f"earlier-{n}").exists())
            aside.mkdir()
            for path in left:
                path.rename(aside / path.name)
            print(f"{folder} held an earlier run: moved to {aside} (to go on with a run: --resume auto)", flush=True)
        write_atomically(folder / "args.json", lambda file: file.write(json.dumps(about, indent=1).encode()))
    except OSError as error:
        raise UserError(f"cannot write into the output folder {folder}: {error.strerror}") from error


def _read_lines(path: Path) -> list[dict]:
    """JSON objects of a file, one a line; a last line cut short by a crash is dropped."""
    entries = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return entries


def start_wandb(run_name: str, run_id: str, project: str, args: dict, folder: Path | None):
    """A Weights & Biases run; without the package none, without network or login an offline one, each said in one line."""
    try:
        import wandb
    except ImportError:
        print("wandb is not installed (pip install wandb): this run is logged to its output folder only.", flush=True)
        return None
    options = dict(
        project=project,
        name=run_name,
        id=run_id or None,
        resume="allow" if run_id else None,
        config=args,
        dir=str(folder) if folder else None,
    )
    modes = [os.environ["WANDB_MODE"]] if os.environ.get("WANDB_MODE") else ["online", "offline"]
    for mode in modes:
        try:
            if mode == "online" and not (os.environ.get("WANDB_API_KEY") or wandb.api.api_key):
                raise RuntimeError("no login")
            return wandb.init(mode=mode, settings=wandb.Settings(init_timeout=30), **options)
        except Exception as error:  # whatever goes wrong there, training goes on
            print(
                f"Weights & Biases {mode} failed ({type(error).__name__}: {error}); "
                f"{'logging offline (wandb sync uploads it)' if mode != modes[-1] else 'going on without it'}.",
                flush=True,
            )
    return None


def plot_curves(entries: list[dict], path: Path) -> None:
    """Training and validation loss, and top-1 accuracy of raw and EMA weights, against the epoch."""
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed (pip install matplotlib): no curves.png.", flush=True)
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (loss, accuracy) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, names in (
        (
            loss,
            (("train_loss", "train (augmented)"), ("test_loss", "validation"), ("test_ema_loss", "validation, EMA")),
        ),
        (accuracy, (("test_acc1", "raw weights"), ("test_ema_acc1", "EMA weights"))),
    ):
        for key, label in names:
            points = [(e["epoch"] + 1, e[key]) for e in entries if e.get(key) is not None]
            if points:
                axis.plot(*zip(*points), marker="." if len(points) < 40 else None, label=label)
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.3)
        axis.xaxis.get_major_locator().set_params(integer=True)
        if axis.lines:
            axis.legend()
    loss.set_ylabel("loss per image")
    accuracy.set_ylabel("validation top-1 (%)")
    best = max((e for e in entries if e.get("max_accuracy") is not None), key=lambda e: e["epoch"], default=None)
    if best:
        accuracy.set_title(
            f"best {best['max_accuracy']:.2f} % ({best['max_accuracy_weights']}, epoch {best['max_accuracy_epoch'] + 1})"
        )
    write_atomically(path, lambda f: figure.savefig(f, format="png", dpi=120))
    plt.close(figure)
