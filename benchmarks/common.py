"""What every benchmark needs: times by CUDA events, the copy bandwidth of the same run, rows with everything they depend on."""

import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import utils  # noqa: E402


def times(function, milliseconds: int = 100) -> tuple[float, float, float]:
    """Median, 20 % and 80 % of the time of a call, ms; the L2 cache is cleared between calls."""
    from triton.testing import do_bench

    return tuple(do_bench(function, warmup=milliseconds // 4, rep=milliseconds, quantiles=[0.5, 0.2, 0.8]))


def copy_bandwidth() -> float:
    """Bytes read and written by a device-to-device copy of 2 GiB, GB/s."""
    source = torch.empty(1 << 31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / times(lambda: target.copy_(source), 300)[0] / 1e6


def report(rows: list[dict], path: str | None) -> None:
    """Print rows as a table; append them, with GPU, versions and commit, as JSON lines to a file."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [
        [f"{row.get(c, ''):.4g}" if isinstance(row.get(c), float) else str(row.get(c, "")) for c in columns]
        for row in rows
    ]
    widths = [max(len(c), *(len(line[i]) for line in cells)) for i, c in enumerate(columns)]
    for line in (columns, *cells):
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths)))
    if path:
        with open(path, "a") as file:
            file.writelines(json.dumps({**row, **utils.versions()}) + "\n" for row in rows)
