"""Fits rational functions of version A (kan_basis.rational) to any activation, with the smallest largest error.

    python -m kan_basis.fit --function gelu --degrees 5 4 --range -3 3

This prints the coefficients and the largest error, and plots target, fit and error. `--save NAME` adds a preset.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.polynomial.polynomial import polyval
from scipy.optimize import linprog
from scipy.special import erf, erfc, expit

from kan_basis.group_rational import PRESETS_PATH

# Bound of |b_j| L^j, where L is the largest |x|. Without it the solver may find a quotient of two huge numbers.
MAX_DENOMINATOR = 1e3

Activation = Callable[[np.ndarray], np.ndarray]

# Those that torch.nn has not, at least not by this name.
ACTIVATIONS: dict[str, Activation] = {
    "identity": lambda x: x,
    "leaky_relu_0.1": lambda x: np.where(x < 0, 0.1 * x, x),
    "swish": lambda x: x * expit(x),
    "geglu": lambda x: x**2 * (1 + erf(x / np.sqrt(2))) / 2,
    "swishglu": lambda x: x**2 * expit(x),
    "erfc_softplus_squared": lambda x: erfc(np.logaddexp(0, x)) ** 2,
}

# These need arguments, or are not functions of one number.
NOT_UNIVARIATE = {"GLU", "LogSoftmax", "MultiheadAttention", "Softmax", "Softmax2d", "Softmin", "Threshold"}


def get_activation(name: str) -> Activation:
    """A function of a float64 array: from ACTIVATIONS, else from torch.nn with default arguments, in evaluation mode.

    Activations of torch have the name of the class (LeakyReLU) or of the function (leaky_relu); case and underscores
    do not matter.
    Raises: ValueError for an unknown name.
    """
    if name in ACTIVATIONS:
        return ACTIVATIONS[name]
    classes = {cls.lower(): cls for cls in sorted(torch.nn.modules.activation.__all__) if cls not in NOT_UNIVARIATE}
    key = name.lower().replace("_", "")
    if key not in classes:
        raise ValueError(
            f"unknown function {name!r}: choose {', '.join(ACTIVATIONS)}, or from torch.nn, such as gelu for GELU, "
            f"{', '.join(classes.values())}."
        )
    module = getattr(torch.nn, classes[key])().double().eval()
    return lambda x: module(torch.tensor(x, dtype=torch.float64)).detach().numpy()


def evaluate(x: np.ndarray, numerator: Sequence[float], denominator: Sequence[float]) -> np.ndarray:
    """F(x) = (a_0 + a_1 x + .. + a_m x^m) / (1 + |b_1| |x| + .. + |b_n| |x|^n) in float64.

    Args:
        x: any shape.
        numerator: a_0..a_m, (m + 1,).
        denominator: b_1..b_n, (n,).
    Raises: ValueError if the coefficients are not one-dimensional or the numerator is empty.
    """
    x, a, b = (np.asarray(value, dtype=np.float64) for value in (x, numerator, denominator))
    if a.ndim != 1 or b.ndim != 1 or a.size == 0:
        raise ValueError(f"numerator and denominator must have shapes (m + 1,) and (n,), got {a.shape} and {b.shape}.")
    return polyval(x, a) / polyval(np.abs(x), np.append(1.0, np.abs(b)))


def max_error(
    target: Activation, numerator: Sequence[float], denominator: Sequence[float], interval=(-3.0, 3.0)
) -> float:
    """Largest |F(x) - target(x)| at 100001 equally spaced points of the interval."""
    x = np.linspace(*interval, 100_001)
    return float(np.abs(evaluate(x, numerator, denominator) - target(x)).max())


def fit_rational(
    target: str | Activation, degrees: tuple[int, int] = (5, 4), interval: tuple[float, float] = (-3.0, 3.0)
) -> tuple[np.ndarray, np.ndarray, float]:
    """Best uniform approximation of f = `target` by F = P / Q, Q(x) = 1 + sum_j b_j |x|^j, 0 <= b_j L^j <= 1000.

    |F - f| <= t is equivalent to +-(P - f Q) <= t Q, which is linear in (a, b). With t the error so far, each round
    solves
        minimise s  subject to  +-(P(x_i) - f(x_i) Q(x_i)) - t Q(x_i) <= s Q_previous(x_i),  b >= 0
    until t no longer decreases. The result is the global optimum over the x_i and involves no random numbers.

    Args:
        target: a name (see `get_activation`) or a function of a float64 array.
        degrees: (m, n) of P and Q.
        interval: (low, high), in units of x; L is the largest |x|.
    Returns: numerator (m + 1,), denominator (n,), largest error on the interval.
    Raises: ValueError for impossible degrees or interval, or a target that is not finite on the interval.
    Source: differential correction, Barrodale, Powell & Roberts 1972.
    """
    target = get_activation(target) if isinstance(target, str) else target
    (m, n), (low, high) = degrees, interval
    if min(m, n) < 0 or not -np.inf < low < high < np.inf:
        raise ValueError(
            f"degrees must be >= 0 and the interval finite and increasing, got {m}, {n} and [{low:g}, {high:g}]."
        )

    x = (low + high) / 2 - (high - low) / 2 * np.cos(np.linspace(0, np.pi, 401))  # dense at both ends
    x = np.union1d(x, [0.0] if low < 0 < high else [])  # where |x| and many activations have a kink
    f = np.asarray(target(x), dtype=np.float64)
    if f.shape != x.shape or not np.isfinite(f).all():
        raise ValueError(f"the target must give one finite value per point of [{low:g}, {high:g}].")

    # x and f are scaled to 1, because the tolerances of the solver are absolute.
    x_scale, f_scale = max(abs(low), abs(high)), np.abs(f).max() or 1.0
    u, f = x / x_scale, f / f_scale
    P = np.vander(u, m + 1, increasing=True)  # (points, m + 1)
    Q = np.vander(np.abs(u), n + 1, increasing=True)[:, 1:]  # (points, n)

    a, b, q = np.linalg.lstsq(P, f, rcond=None)[0], np.zeros(n), np.ones_like(u)
    t = np.abs(P @ a - f).max()
    bounds = [(None, None)] * (m + 1) + [(0, MAX_DENOMINATOR)] * n + [(None, None)]
    tolerances = {"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}
    for _ in range(100):
        rows = np.block([[P, -(f + t)[:, None] * Q, -q[:, None]], [-P, (f - t)[:, None] * Q, -q[:, None]]])
        solution = linprog(np.eye(m + n + 2)[-1], rows, np.append(t + f, t - f), bounds=bounds, options=tolerances).x
        if solution is None:  # the solver has run out of digits: the best solution so far is kept
            break
        q = 1 + Q @ solution[m + 1 : -1]
        error = np.abs(P @ solution[: m + 1] / q - f).max()
        if error < t:
            a, b = solution[: m + 1], solution[m + 1 : -1]
        t, gain = min(error, t), t - error
        if gain <= 1e-7 * t or t < 1e-12:
            break

    a, b = (np.where(np.abs(c) < 1e-12, 0.0, c) for c in (a, b))  # solver noise
    numerator, denominator = f_scale * a / x_scale ** np.arange(m + 1), b / x_scale ** np.arange(1, n + 1)
    return numerator, denominator, max_error(target, numerator, denominator, interval)


def save_presets(presets: dict[str, dict], path: str | Path) -> None:
    """Write presets as JSON, one field per line so that diffs are readable. The file is replaced in one step."""
    texts = []
    for name, preset in presets.items():
        fields = ",\n".join(f"    {json.dumps(key)}: {json.dumps(value)}" for key, value in preset.items())
        texts.append(f"  {json.dumps(name)}: {{\n{fields}\n  }}")
    partial = Path(f"{path}.partial")
    partial.write_text("{\n" + ",\n".join(texts) + "\n}\n")
    partial.replace(path)


def plot_fit(
    path: str, name: str, numerator: np.ndarray, denominator: np.ndarray, error: float, interval: tuple[float, float]
) -> None:
    """Plot target and fit, and their difference, on the interval (shaded) and half its width beyond each end."""
    from matplotlib.figure import Figure

    low, high = interval
    x = np.linspace(low - (high - low) / 2, high + (high - low) / 2, 4001)
    target, fit = get_activation(name)(x), evaluate(x, numerator, denominator)
    figure = Figure(figsize=(7, 6), layout="constrained")
    top, bottom = figure.subplots(2, sharex=True, height_ratios=(2, 1))
    top.plot(x, target, color="black", linewidth=4, alpha=0.3, label=name)
    top.plot(x, fit, "--", label="P(x) / Q(x)")
    top.set(
        title=f"{name}: degrees {len(numerator) - 1} and {len(denominator)}, largest error {error:.2e}", ylabel="F(x)"
    )
    bottom.plot(x, fit - target, color="tab:red")
    limit = 2.5 * error or 1e-15  # beyond the interval the curve may leave this panel
    bottom.set(xlabel="x", ylabel="P(x) / Q(x) - target", ylim=(-limit, limit), xlim=(x[0], x[-1]))
    for axes in (top, bottom):
        axes.axvspan(low, high, alpha=0.08, label=f"fitted on [{low:g}, {high:g}]")
        axes.grid(alpha=0.3)
    top.legend()
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--function", required=True, metavar="NAME", help=", ".join(ACTIVATIONS) + ", or any activation of torch.nn"
    )
    parser.add_argument("--degrees", type=int, nargs=2, default=[5, 4], metavar=("M", "N"), help="degrees of P and Q")
    parser.add_argument(
        "--range", type=float, nargs=2, default=[-3.0, 3.0], metavar=("LOW", "HIGH"), help="interval of the fit"
    )
    parser.add_argument("--plot", default="fit_<function>.png", metavar="PATH", help="picture of target, fit and error")
    parser.add_argument("--save", metavar="NAME", help="write the fit as a preset of this name")
    parser.add_argument("--presets", type=Path, default=PRESETS_PATH, metavar="PATH", help="JSON file for --save")
    parser.add_argument("--overwrite", action="store_true", help="let --save replace a preset")
    args = parser.parse_args()

    try:
        presets = json.loads(args.presets.read_text()) if args.presets.exists() else {}
        if args.save in presets and not args.overwrite:
            raise ValueError(
                f"preset {args.save!r} already exists in {args.presets}: choose another name or pass --overwrite."
            )
        numerator, denominator, error = fit_rational(args.function, args.degrees, args.range)
    except ValueError as problem:
        parser.exit(2, f"{problem}\n")

    plot = args.plot.replace("<function>", args.function)
    plot_fit(plot, args.function, numerator, denominator, error, args.range)
    print(f"numerator {numerator.tolist()}\ndenominator {denominator.tolist()}")
    print(f"max error {error:.3e} on {args.range}\nplot {plot}")
    if args.save:
        presets[args.save] = {
            "numerator": numerator.tolist(),
            "denominator": denominator.tolist(),
            "interval": args.range,
            "target": args.function,
            "max_error": error,
            "source": "fitted",
        }
        save_presets(presets, args.presets)
        print(f"preset {args.save} in {args.presets}")


if __name__ == "__main__":
    main()
