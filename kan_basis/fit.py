"""Fit the rational function of `kan_basis.rational` to any activation, its largest error as small as it can be (minimax).

    python -m kan_basis.fit --function gelu --degrees 5 4 --range -3 3

prints the coefficients and the largest error and draws target, fit and error; `--save NAME` adds a preset.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.polynomial.polynomial import polyval
from scipy.optimize import linprog
from scipy.special import erf, erfc, expit

PRESETS_PATH = Path(__file__).with_name("presets.json")
MAX_DENOMINATOR = (
    1e3  # of |b_j| L^j, L = largest |x|: without a bound the solver runs off to a ratio of two huge numbers
)

Activation = Callable[[np.ndarray], np.ndarray]

ACTIVATIONS: dict[str, Activation] = {
    "identity": lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "leaky_relu": lambda x: np.where(x < 0, 0.01 * x, x),
    "leaky_relu_0.1": lambda x: np.where(x < 0, 0.1 * x, x),
    "sigmoid": expit,
    "tanh": np.tanh,
    "softplus": lambda x: np.logaddexp(0, x),
    "swish": lambda x: x * expit(x),
    "silu": lambda x: x * expit(x),
    "mish": lambda x: x * np.tanh(np.logaddexp(0, x)),
    "gelu": lambda x: x * (1 + erf(x / np.sqrt(2))) / 2,
    "geglu": lambda x: x**2 * (1 + erf(x / np.sqrt(2))) / 2,
    "swishglu": lambda x: x**2 * expit(x),
    "erfc_softplus_squared": lambda x: erfc(np.logaddexp(0, x)) ** 2,
}

# They need arguments, or are no function of one number.
NOT_UNIVARIATE = {"GLU", "LogSoftmax", "MultiheadAttention", "Softmax", "Softmax2d", "Softmin", "Threshold"}


def get_activation(name: str) -> Activation:
    """Function of a float64 array: from ACTIVATIONS, else from torch.nn with its default arguments, in evaluation mode.

    Torch's activations go by class (LeakyReLU) or by function (leaky_relu); capitals and underscores do not matter.
    Raises: ValueError if the name is unknown; the message lists what exists.
    """
    if name in ACTIVATIONS:
        return ACTIVATIONS[name]

    import torch  # here, because the rest needs numpy and scipy only

    classes = {cls.lower(): cls for cls in sorted(torch.nn.modules.activation.__all__) if cls not in NOT_UNIVARIATE}
    key = name.lower().replace("_", "")
    if key not in classes:
        names = f"{', '.join(ACTIVATIONS)}, or from torch.nn {', '.join(classes.values())}"
        raise ValueError(f"unknown function {name!r}: choose {names}.")
    module = getattr(torch.nn, classes[key])().double().eval()
    return lambda x: module(torch.tensor(x, dtype=torch.float64)).detach().numpy()


def evaluate(x: np.ndarray, numerator: Sequence[float], denominator: Sequence[float]) -> np.ndarray:
    """F(x) = (a_0 + a_1 x + .. + a_m x^m) / (1 + |b_1| |x| + .. + |b_n| |x|^n) in float64: the formula of `kan_basis.rational`.

    Args: x, any shape; numerator a_0..a_m, (m + 1,); denominator b_1..b_n, (n,).
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
    """Best uniform approximation of f = `target` by F = P / Q, Q(x) = 1 + sum_j b_j |x|^j with 0 <= b_j <= MAX_DENOMINATOR / L^j.

    |F - f| <= t is the same as +-(P - f Q) <= t Q, which is linear in (a, b). With t the error so far, each round solves
        minimise s  subject to  +-(P(x_i) - f(x_i) Q(x_i)) - t Q(x_i) <= s Q_previous(x_i),  b >= 0
    until t stays. It is the global optimum over the x_i, and there is nothing random in it.

    Args:
        target: a name (see `get_activation`) or a function of a float64 array.
        degrees: (m, n) of P and Q.
        interval: (low, high), in units of x.
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
    x = np.union1d(x, [0.0] if low < 0 < high else [])  # |x| and many activations bend at 0
    f = np.asarray(target(x), dtype=np.float64)
    if f.shape != x.shape or not np.isfinite(f).all():
        raise ValueError(f"the target must give one finite value per point of [{low:g}, {high:g}].")

    # Unit scale for x and f: the solver's tolerances are absolute.
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
        if solution is None:  # out of digits: the best so far stands, with its own error
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
    """Name -> fields as JSON, one field a line so that diffs read well; the file is replaced in one step."""
    fields = {
        name: ",\n".join(f"    {json.dumps(k)}: {json.dumps(v)}" for k, v in preset.items())
        for name, preset in presets.items()
    }
    partial = Path(f"{path}.partial")
    partial.write_text(
        "{\n" + ",\n".join(f"  {json.dumps(name)}: {{\n{text}\n  }}" for name, text in fields.items()) + "\n}\n"
    )
    partial.replace(path)


def plot_fit(
    path: str | Path, name: str, numerator: np.ndarray, denominator: np.ndarray, interval: tuple[float, float]
) -> None:
    """Target and fit, and their difference, on the interval (shaded) and half its width beyond each end."""
    from matplotlib.figure import Figure

    (low, high), target = interval, get_activation(name)
    x = np.linspace(low - (high - low) / 2, high + (high - low) / 2, 4001)
    error = max_error(target, numerator, denominator, interval)
    figure = Figure(figsize=(7, 6), layout="constrained")
    top, bottom = figure.subplots(2, sharex=True, height_ratios=(2, 1))
    top.plot(x, target(x), color="black", linewidth=4, alpha=0.3, label=name)
    top.plot(x, evaluate(x, numerator, denominator), "--", label="P(x) / Q(x)")
    top.set(
        title=f"{name}: degrees {len(numerator) - 1} and {len(denominator)}, largest error {error:.2e}", ylabel="F(x)"
    )
    bottom.plot(x, evaluate(x, numerator, denominator) - target(x), color="tab:red")
    limit = 2.5 * error or 1e-15  # beyond the interval the curve leaves this panel
    bottom.set(xlabel="x", ylabel="P(x) / Q(x) - target", ylim=(-limit, limit), xlim=(x[0], x[-1]))
    for axes in (top, bottom):
        axes.axvspan(low, high, alpha=0.08, label=f"fitted on [{low:g}, {high:g}]")
        axes.grid(alpha=0.3)
    top.legend(loc="best")
    figure.align_ylabels()
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
                f"preset {args.save!r} exists already in {args.presets}: choose another name or pass --overwrite."
            )
        numerator, denominator, error = fit_rational(args.function, args.degrees, args.range)
    except ValueError as problem:
        parser.exit(2, f"{problem}\n")

    plot = args.plot.replace("<function>", args.function)
    plot_fit(plot, args.function, numerator, denominator, args.range)
    print(
        f"numerator {numerator.tolist()}\ndenominator {denominator.tolist()}\nmax error {error:.3e} on {args.range}\nplot {plot}"
    )
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
