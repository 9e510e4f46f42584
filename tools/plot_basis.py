"""Draw the functions that each basis starts from, with the published initialisation on the left and the scaled one.

    python tools/plot_basis.py --out bases.png

There is one panel for each basis, or for each value of its option that has choices, such as the wavelet.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import argparse
from dataclasses import fields

import torch
from matplotlib.figure import Figure  # draws files without a display, whatever backend is set

from kan_basis import BASES
from kan_basis.basis import INITS, Basis, choices_of

COLUMNS = 2  # panels side by side
HIGHEST = 6.0  # |phi| shown: steep rational functions leave the panel


def get_args_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        "plot_basis.py", description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument(
        "--out",
        default="bases.png",
        metavar="FILE",
        help="picture to write; the ending chooses the format (png, pdf, svg)",
    )
    p.add_argument("--draws", type=int, default=4, metavar="N", help="functions in each panel")
    p.add_argument("--seed", type=int, default=0, help="seed of the functions, the same for every panel")
    p.add_argument("--fan-in", type=int, default=1, metavar="N", help="functions summed up, for the scaled init")
    p.add_argument("--range", type=float, nargs=2, default=[-4.0, 4.0], metavar=("LOW", "HIGH"), help="interval of x")
    return p


def panels() -> dict[str, Basis]:
    """Title -> basis with its default options, one for each value of an option that has choices."""
    bases = {}
    for name, cls in BASES.items():
        choices = [(f.name, value) for f in fields(cls) for value in choices_of(f)]
        bases |= {f"{name} {value}": cls(**{option: value}) for option, value in choices} or {name: cls()}
    return bases


@torch.no_grad()
def curves(basis: Basis, init: str, draws: int, seed: int, fan_in: int, x: torch.Tensor) -> torch.Tensor:
    """phi(x) of freshly drawn functions: (points,) -> (draws, points). The random state of the caller is kept."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        theta = basis.reset_(torch.empty(draws, 1, basis.num_coefficients, dtype=x.dtype), init, fan_in)
    return basis(x, theta)


def plot(draws: int, seed: int, fan_in: int, interval: tuple[float, float]) -> Figure:
    x = torch.linspace(*interval, 1001, dtype=torch.float64)
    bases = panels()
    rows = -(-len(bases) // COLUMNS)
    figure = Figure(figsize=(6.5 * COLUMNS, 0.6 + 1.9 * rows), layout="constrained")
    figure.suptitle(f"{draws} functions φ(x) of each basis as training starts; scaled for a sum of {fan_in}")
    for cell, (title, basis) in zip(figure.subfigures(rows, COLUMNS, squeeze=False).flat, bases.items()):
        cell.suptitle(title, fontweight="bold", fontsize="medium")
        y = {init: curves(basis, init, draws, seed, fan_in, x) for init in INITS}
        limit = min(1.1 * max(t.abs().max().item() for t in y.values()), HIGHEST)
        for axes, init in zip(cell.subplots(1, len(INITS), sharey=True), INITS):
            axes.plot(x, y[init].T, linewidth=1.2)
            axes.set_title(init, loc="left", fontsize="medium")
            axes.set(xlim=interval, ylim=(-limit, limit))
            axes.axhline(0, color="black", linewidth=0.5)
            axes.grid(alpha=0.3)
    return figure


def main(argv: list[str] | None = None) -> int:
    parser = get_args_parser()
    args = parser.parse_args(argv)
    low, high = args.range
    if args.draws < 1 or args.fan_in < 1:
        parser.error(f"--draws and --fan-in must be at least 1, not {args.draws} and {args.fan_in}")
    if not -torch.inf < low < high < torch.inf:
        parser.error(f"--range must be finite and increasing, not {low:g} {high:g}")
    try:
        plot(args.draws, args.seed, args.fan_in, (low, high)).savefig(args.out, dpi=110)
    except (OSError, ValueError) as error:  # no such folder, no such format
        parser.error(f"--out {args.out} cannot be written ({error})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
