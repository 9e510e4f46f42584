import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linprog

from kan_basis import fit
from kan_basis.fit import MAX_DENOMINATOR, PRESETS_PATH, evaluate, fit_rational, get_activation, max_error
from kan_basis.rational import rational

PRESETS = json.loads(PRESETS_PATH.read_text())
REFITTED = ("gelu", "geglu", "swishglu", "erfc_softplus_squared")
X = torch.linspace(-3, 3, 100_001, dtype=torch.float64)

# Largest error of the published coefficients in the published formula, to the digits given.
PUBLISHED = {
    "identity": 0,
    "swish": 1.2e-6,
    "sigmoid": 2e-5,
    "tanh": 4e-5,
    "gelu_old": 4e-3,
    "leaky_relu": 0.030,
    "relu": 0.030,
    "leaky_relu_0.1": 0.028,
    "erfc_softplus_squared": 0.085,
    "geglu": 0.94,
    "gelu": 1.46,
    "swishglu": 1.71,
}

IN_TORCH = {
    "identity": lambda x: x,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "leaky_relu_0.1": lambda x: F.leaky_relu(x, 0.1),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "softplus": F.softplus,
    "swish": F.silu,
    "silu": F.silu,
    "mish": F.mish,
    "gelu": F.gelu,
    "geglu": lambda x: x * F.gelu(x),
    "swishglu": lambda x: x * F.silu(x),
    "erfc_softplus_squared": lambda x: torch.erfc(F.softplus(x)) ** 2,
}


def row(values):
    return torch.tensor(values, dtype=torch.float64)[None]


@pytest.mark.parametrize("name", PRESETS)
def test_preset_error_is_the_recorded_one(name):
    preset = PRESETS[name]
    assert list(preset["interval"]) == [-3, 3]
    y = rational(X[:, None], row(preset["numerator"]), row(preset["denominator"]))[:, 0]
    error = (y - IN_TORCH[preset["target"]](X)).abs().max().item()
    assert error == pytest.approx(preset["max_error"], rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_coefficients(name):
    preset = PRESETS[f"published_{name}"]
    assert preset["max_error"] == pytest.approx(PUBLISHED[name], rel=0.1 if PUBLISHED[name] < 0.01 else 0.01)
    assert preset["source"].startswith("published")
    if name not in REFITTED:
        assert PRESETS[name] == preset


def test_presets_are_complete():
    assert {"silu", "mish", *PUBLISHED} | {f"published_{name}" for name in PUBLISHED} == set(PRESETS)
    assert [PRESETS["silu"][key] for key in ("numerator", "denominator")] == [
        PRESETS["swish"][key] for key in ("numerator", "denominator")
    ]


@pytest.mark.parametrize("name", [*REFITTED, "mish"])
def test_refitted_preset_is_accurate_and_tame(name):
    preset = PRESETS[name]
    assert preset["source"] == "fitted" and preset["target"] == name
    assert preset["max_error"] <= 5e-3
    assert max(map(abs, preset["numerator"] + preset["denominator"])) <= 1
    target = get_activation(name)
    assert max_error(target, preset["numerator"], preset["denominator"], (-6, 6)) <= 0.03 * max(
        1, target(np.array(6.0))
    )
    assert fit_rational(name)[2] == pytest.approx(preset["max_error"], rel=1e-3)


@pytest.mark.parametrize("name", IN_TORCH)
def test_registry_agrees_with_torch(name):
    x = 3 * X
    torch.testing.assert_close(
        torch.from_numpy(get_activation(name)(x.numpy())), IN_TORCH[name](x), rtol=1e-10, atol=1e-14
    )


@pytest.mark.parametrize(
    "name, function", [("elu", F.elu), ("ELU", F.elu), ("hardswish", F.hardswish), ("Log_Sigmoid", F.logsigmoid)]
)
def test_activations_of_torch(name, function):
    np.testing.assert_allclose(get_activation(name)(X.numpy()), function(X).numpy())


@pytest.mark.parametrize("name", ["softmax", "threshold", "conv2d", "__class__", "os.system", ""])
def test_unknown_names_raise(name):
    with pytest.raises(ValueError, match="unknown function .*gelu.*ELU"):
        get_activation(name)


def test_fit_of_gelu_by_degrees():
    numerator, denominator, error = fit_rational(lambda x: F.gelu(torch.from_numpy(x)).numpy())
    assert numerator.shape == (6,) and denominator.shape == (4,) and (denominator >= 0).all()
    assert error <= 5e-3
    numerator, denominator, coarse = fit_rational("gelu", degrees=(3, 2))
    assert numerator.shape == (4,) and denominator.shape == (2,)
    assert error < coarse < 0.05
    assert coarse == pytest.approx(np.abs(evaluate(X.numpy(), numerator, denominator) - F.gelu(X).numpy()).max())


@pytest.mark.parametrize("name", ["gelu", "geglu", "relu", "erfc_softplus_squared"])
def test_no_coefficients_do_better(name):
    """+-(P - f Q) <= t Q, b >= 0 has a solution for t just above the error of the fit, and none just below it."""
    _, _, error = fit_rational(name)
    x = np.linspace(-3, 3, 301)
    f = get_activation(name)(x)
    p = (x[:, None] / 3) ** np.arange(6)
    q = (np.abs(x[:, None]) / 3) ** np.arange(1, 5)

    def solver_status(t):
        rows = np.block([[p, -(f + t)[:, None] * q], [-p, (f - t)[:, None] * q]]) / error
        bounds = [(None, None)] * 6 + [(0, MAX_DENOMINATOR)] * 4
        return linprog(np.zeros(10), rows, np.concatenate([f + t, t - f]) / error, bounds=bounds).status

    assert solver_status(1.01 * error) == 0  # solved
    assert solver_status(0.99 * error) == 2  # infeasible


@pytest.mark.parametrize(
    "degrees, interval", [((5, 0), (-3, 3)), ((0, 0), (-1, 1)), ((2, 6), (-3, 3)), ((5, 4), (0, 10)), ((5, 4), (-8, 2))]
)
def test_other_degrees_and_intervals(degrees, interval):
    numerator, denominator, error = fit_rational("swish", degrees, interval)
    assert (len(numerator), len(denominator)) == (degrees[0] + 1, degrees[1])
    x = torch.linspace(*interval, 1001, dtype=torch.float64)
    assert np.abs(evaluate(x.numpy(), numerator, denominator) - F.silu(x).numpy()).max() <= error * (1 + 1e-9) < 1


def test_polynomials_come_back():
    numerator, denominator, error = fit_rational(lambda x: 1000 * x**3 - 2, degrees=(3, 0))
    np.testing.assert_allclose(numerator, [-2, 0, 0, 1000], atol=1e-8)
    assert error <= 1e-8 and denominator.shape == (0,)


@pytest.mark.parametrize(
    "target, options, message",
    [
        ("gelu", {"degrees": (-1, 4)}, "degrees"),
        ("gelu", {"interval": (3, -3)}, "interval"),
        ("gelu", {"interval": (0, float("nan"))}, "interval"),
        ("gelu", {"interval": (0, float("inf"))}, "interval"),
        (lambda x: 1 / x, {}, "finite"),
        (lambda x: 1.0, {}, "one finite value per point"),
    ],
)
def test_bad_input_raises(target, options, message):
    with np.errstate(divide="ignore"), pytest.raises(ValueError, match=message):
        fit_rational(target, **options)


@pytest.mark.parametrize("numerator, denominator", [([], [1.0]), ([[1.0]], [1.0]), ([1.0], 2.0)])
def test_evaluate_checks_its_coefficients(numerator, denominator):
    with pytest.raises(ValueError, match="shapes"):
        evaluate(X.numpy(), numerator, denominator)


@pytest.mark.parametrize("degrees", [(5, 4), (3, 2), (0, 1)])
def test_evaluate_is_the_rational_function(degrees):
    x = 5 * torch.randn(4, 50, 1, dtype=torch.float64)
    numerator, denominator = torch.randn(degrees[0] + 1).double(), torch.randn(degrees[1]).double()
    want = rational(x, numerator[None], denominator[None])
    np.testing.assert_allclose(evaluate(x.numpy(), numerator, denominator), want.numpy(), rtol=1e-12, atol=1e-12)


def test_command_line(tmp_path):
    command = "-m kan_basis.fit --function mish --degrees 5 4 --range -3 3 --presets mine.json --save my_mish"
    env = os.environ | {"PYTHONPATH": str(PRESETS_PATH.parents[1])}
    result = subprocess.run([sys.executable, *command.split()], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "fit_mish.png").read_bytes().startswith(b"\x89PNG")
    saved = json.loads((tmp_path / "mine.json").read_text())["my_mish"]
    assert saved.keys() == PRESETS["mish"].keys()
    assert saved["max_error"] == pytest.approx(PRESETS["mish"]["max_error"], rel=1e-3)
    assert f"numerator {saved['numerator']}" in result.stdout and f"denominator {saved['denominator']}" in result.stdout
    assert f"max error {saved['max_error']:.3e} on [-3.0, 3.0]" in result.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"fit_mish.png", "mine.json"}


def main(monkeypatch, *arguments):
    """Runs the command in this process and returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["fit", *arguments])
    try:
        fit.main()
    except SystemExit as stop:
        return stop.code
    return 0


def test_unknown_function_on_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(monkeypatch, "--function", "no_such_function", "--save", "x", "--presets", "mine.json") == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "'no_such_function'" in err and "gelu" in err
    assert not list(tmp_path.iterdir())


def test_save_replaces_a_preset_only_when_told(tmp_path, monkeypatch, capsys):
    presets, plot = tmp_path / "mine.json", tmp_path / "plot.png"
    presets.write_text(json.dumps({"a": {"numerator": [1.0]}, "b": {"numerator": [2.0]}}))
    command = ("--function", "tanh", "--presets", str(presets), "--plot", str(plot), "--save", "a")
    assert main(monkeypatch, *command) == 2
    assert "--overwrite" in capsys.readouterr().err and not plot.exists()
    assert main(monkeypatch, *command, "--overwrite") == 0
    saved = json.loads(presets.read_text())
    assert saved["a"]["target"] == "tanh" and saved["b"] == {"numerator": [2.0]} and plot.exists()
