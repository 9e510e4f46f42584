"""Shared by the benchmarks: times by CUDA events, the copy bandwidth, and rows that name GPU, versions and commit."""

import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import utils  # noqa: E402


def times(function, milliseconds: int = 100) -> dict[str, float]:
    """Median, 20 % and 80 % quantile of the time of a call in ms; the L2 cache is cleared between calls."""
    from triton.testing import do_bench

    quantiles = do_bench(function, warmup=milliseconds // 4, rep=milliseconds, quantiles=[0.5, 0.2, 0.8])
    return dict(zip(("ms", "ms 20 %", "ms 80 %"), quantiles))


def copy_bandwidth() -> float:
    """Bytes read and written by a device-to-device copy of 2 GiB, in GB/s."""
    source = torch.empty(1 << 31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / times(lambda: target.copy_(source), 300)["ms"] / 1e6


def report(rows: list[dict], path: str | None) -> None:
    """Print rows as a table, and append them with GPU, versions and commit to a file of JSON lines."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    rows_in_full = [dict.fromkeys(columns, "") | row for row in rows]
    cells = [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows_in_full]
    widths = [max(map(len, column)) for column in zip(columns, *cells)]
    for line in (columns, *cells):
        print("  ".join(map(str.rjust, line, widths)))
    if path:
        with open(path, "a") as file:
            file.writelines(json.dumps({**row, **utils.versions()}) + "\n" for row in rows)
