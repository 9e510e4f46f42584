"""Every basis of the registry and every wavelet, against formulas written out for one number at a time."""

import math
from dataclasses import FrozenInstanceError, dataclass, fields

import numpy as np
import pytest
import torch
from scipy.interpolate import BSpline

import kan_basis
from kan_basis import (
    BASES,
    ChebyshevBasis,
    FourierBasis,
    RadialBasis,
    RationalBasis,
    SplineBasis,
    WaveletBasis,
    make_basis,
)
from kan_basis.basis import INITS, USES, Basis, make_basis_for, mean_square, option, option_names, register
from kan_basis.wavelet import MIN_SCALE, WAVELETS, register_wavelet

OPTIONS = {
    "fourier": [{}, {"grid": 1}, {"grid": 11}],
    "spline": [{}, {"grid": 1, "order": 1}, {"grid": 5, "order": 2, "grid_range": (-3, 2)}, {"grid": 4, "order": 0}],
    "rational": [{}, {"version": "A"}, {"degrees": (0, 1)}, {"degrees": (3, 6), "version": "A"}],
    "wavelet": [{"wavelet": name} for name in WAVELETS],
    "chebyshev": [{}, {"order": 1}, {"order": 7}],
    "radial": [{}, {"grid": 2}, {"grid": 5, "grid_range": (-1, 3)}],
}
EVERY = [make_basis(name, **options) for name in BASES if name in OPTIONS for options in OPTIONS[name]]
every = pytest.mark.parametrize("basis", EVERY, ids=repr)


def draw(basis, *shape, dtype=torch.float64):
    """Coefficients away from 0, where denominators bend, and a scale about 1."""
    theta = torch.randn(*shape, basis.num_coefficients, dtype=dtype)
    theta = theta + theta.sign() * 0.1
    if isinstance(basis, WaveletBasis):
        theta[..., 2] = (0.5 + torch.rand(shape, dtype=dtype)) * theta[..., 2].sign()
    return theta


def literal_nu(t):
    t = min(max(t, 0.0), 1.0)
    return t**4 * (35 - 84 * t + 70 * t**2 - 20 * t**3)


def literal_m(t):
    return 1.0 if t <= 0.5 else math.cos(math.pi / 2 * literal_nu(2 * t - 1)) if t < 1 else 0.0


LITERAL_WAVELETS = {
    "mexican_hat": lambda u: 2 / (math.pi**0.25 * math.sqrt(3)) * (u**2 - 1) * math.exp(-(u**2) / 2),
    "morlet": lambda u: math.cos(5 * u) * math.exp(-(u**2) / 2),
    "dog": lambda u: u * math.exp(-(u**2) / 2),
    "dog_wavkan": lambda u: -u * math.exp(-(u**2) / 2),
    "meyer": lambda u: math.sin(math.pi * abs(u)) * literal_m(literal_nu(abs(u))),
    "meyer_wavkan": lambda u: math.sin(math.pi * abs(u)) * literal_m(abs(u)),
    "shannon": lambda u: (
        (math.sin(u) / u if u else 1.0) * (0.54 + 0.46 * math.cos(math.pi * u / 8) if abs(u) <= 8 else 0.0)
    ),
}


def literal(basis, x, theta):
    """phi(x; theta) of two sequences of floats: x (S), theta (P)."""
    if isinstance(basis, FourierBasis):
        a, b = np.split(theta, 2)
        return [sum(a[m] * math.cos((m + 1) * v) + b[m] * math.sin((m + 1) * v) for m in range(basis.grid)) for v in x]
    if isinstance(basis, RationalBasis):
        (m, n), b = basis.degrees, theta[basis.degrees[0] + 1 :]

        def terms(v):
            return [b[j] * v ** (j + 1) for j in range(n)]

        q = {"A": lambda v: 1 + sum(map(abs, terms(v))), "B": lambda v: 1 + abs(sum(terms(v)))}[basis.version]
        return [sum(theta[i] * v**i for i in range(m + 1)) / q(v) for v in x]
    if isinstance(basis, ChebyshevBasis):
        angles = [math.acos(math.tanh(v)) for v in x]
        return [sum(c * math.cos(n * angle) for n, c in enumerate(theta)) for angle in angles]
    if isinstance(basis, RadialBasis):
        centres, h = np.linspace(*basis.grid_range, basis.grid, retstep=True)
        return [sum(t * math.exp(-(((v - c) / h) ** 2)) for t, c in zip(theta, centres)) for v in x]
    if isinstance(basis, WaveletBasis):
        return [theta[0] * LITERAL_WAVELETS[basis.wavelet]((v - theta[1]) / theta[2]) for v in x]
    (lo, hi), k = basis.grid_range, basis.order
    knots = lo + (hi - lo) / basis.grid * np.arange(-k, basis.grid + k + 1)
    return sum(
        c * np.nan_to_num(BSpline.basis_element(knots[i : i + k + 2], extrapolate=False)(x))
        for i, c in enumerate(theta)
    )


def test_every_basis_of_the_registry_is_tested():
    assert {type(basis) for basis in EVERY} == {cls for cls in BASES.values() if cls.__module__.startswith("kan_basis")}
    assert LITERAL_WAVELETS.keys() == WAVELETS.keys()
    assert all(getattr(kan_basis, name) for name in kan_basis.__all__)


@every
def test_agrees_with_the_formula(basis):
    x = torch.cat([2 * torch.randn(60, dtype=torch.float64), torch.linspace(-9, 9, 37, dtype=torch.float64) + 0.013])
    for theta in draw(basis, 3):
        want = np.array(literal(basis, x.numpy(), theta.numpy()))
        got = basis(x, theta).numpy()
        assert np.abs(got - want).max() <= 1e-12 * max(1, np.abs(want).max())


@every
def test_gradcheck_in_x_and_theta_twice(basis):
    x = (1.3 * torch.randn(4, dtype=torch.float64)).requires_grad_()
    theta = draw(basis, 2, 1).requires_grad_()
    assert torch.autograd.gradcheck(basis, (x, theta))
    if not (isinstance(basis, SplineBasis) and basis.order == 0):
        assert torch.autograd.gradgradcheck(basis, (x, theta))


@every
def test_edge_wise_is_every_pair_of_function_and_number(basis):
    heads, rank, n = 2, 3, 5
    x, theta = torch.randn(4, heads, 1, n, dtype=torch.float64), draw(basis, heads, rank, n)
    y = basis(x, theta)
    assert y.shape == (4, heads, rank, n)
    for b, h, r, q in [(0, 0, 0, 0), (3, 1, 2, 4), (2, 1, 0, 3)]:
        torch.testing.assert_close(y[b, h, r, q], basis(x[b, h, 0, q], theta[h, r, q]), rtol=0, atol=1e-13)
    assert basis(torch.empty(0, 1), theta[0, 0]).shape == (0, n)


@every
def test_features_are_the_linear_bases(basis):
    x, theta = torch.randn(3, 4), draw(basis, 4, dtype=torch.float32)
    if basis.linear:
        features = basis.features(x)
        assert features.shape == (3, 4, basis.num_coefficients)
        torch.testing.assert_close(basis(x, theta), torch.einsum("...p,...p->...", features, theta.expand_as(features)))
    else:
        with pytest.raises(TypeError, match="not linear in its coefficients"):
            basis.features(x)


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_is_computed_in_float32(basis, dtype):
    x, theta = torch.randn(50, 8).to(dtype), draw(basis, 8, dtype=torch.float32).to(dtype)
    y = basis(x, theta)
    assert y.dtype is dtype and basis(x, theta.float()).dtype is torch.float32
    exact = basis(x.double(), theta.double())
    assert exact.dtype is torch.float64
    error = (basis(x, theta.float()).double() - exact).abs().max() / exact.abs().max()
    # With constant pieces float32 may put a point into the next cell.
    if not (isinstance(basis, SplineBasis) and basis.order == 0):
        assert error < 3e-6
    assert torch.equal(y, basis(x.float(), theta.float()).to(dtype))


@pytest.mark.parametrize("basis", [make_basis(name) for name in OPTIONS] + [WaveletBasis("shannon")], ids=repr)
def test_one_graph_and_shapes_on_the_meta_device(basis):
    x, theta = torch.randn(6, 1, requires_grad=True), draw(basis, 3, dtype=torch.float32).requires_grad_()
    y = basis(x, theta)
    compiled = torch.compile(basis.__call__, fullgraph=True, backend="aot_eager")(x, theta)
    torch.testing.assert_close(compiled, y)
    for got, want in zip(*(torch.autograd.grad(t.sum(), (x, theta)) for t in (compiled, y))):
        torch.testing.assert_close(got, want)
    assert basis(x.to("meta"), theta.to("meta")).shape == (6, 3)


@every
def test_scaled_init_sums_to_variance_1(basis):
    theta = torch.empty(40000, 5, basis.num_coefficients)
    assert basis.reset_(theta, "scaled", fan_in=5) is theta
    y = basis(torch.randn(40000, 5), theta).sum(-1)
    assert y.square().mean().item() == pytest.approx(1, abs=0.1 if isinstance(basis, RationalBasis) else 0.04)
    assert y.mean().abs() < 0.03


@every
def test_published_init_is_a_normal_of_the_published_deviation(basis):
    theta = torch.full((20000, basis.num_coefficients), math.nan)
    basis.reset_(theta, fan_in=9)
    deviations = {"chebyshev": 1 / (9 * basis.num_coefficients), "radial": 0.1}
    theta /= deviations.get(basis.name, 1.0)
    drawn = theta[:, :1] if isinstance(basis, WaveletBasis) else theta
    if isinstance(basis, WaveletBasis):
        assert not theta[:, 1].any() and (theta[:, 2] == 1).all()
    assert (drawn.mean(0).abs() < 0.03).all() and ((drawn.std(0) - 1).abs() < 0.03).all()


@every
def test_wrong_coefficients_and_inits_get_a_sentence(basis):
    theta = torch.randn(4, basis.num_coefficients + 1)
    with pytest.raises(
        ValueError, match=rf"theta must have {basis.num_coefficients} coefficients .* not \(4, {theta.shape[1]}\)"
    ):
        basis(torch.randn(4), theta)
    with pytest.raises(ValueError, match="unknown init 'xavier'; there are: published, scaled"):
        basis.reset_(theta[:, 1:], "xavier")
    for init in INITS:
        with pytest.raises(ValueError, match="fan_in must be at least 1"):
            basis.reset_(theta[:, 1:], init, 0)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("fourier", {"grid": 0}, "grid must be at least 1"),
        ("spline", {"grid": 0}, "grid must be at least 1"),
        ("spline", {"order": -1}, "order must be at least 0"),
        ("spline", {"grid_range": (1, -1)}, "finite and increasing"),
        ("spline", {"grid_range": (0, math.inf)}, "finite and increasing"),
        ("rational", {"degrees": (5, 0)}, "degrees must be"),
        ("rational", {"degrees": (-1, 4)}, "degrees must be"),
        ("rational", {"degrees": (5,)}, "degrees must be"),
        ("rational", {"version": "C"}, "unknown version 'C'; there are: A, B"),
        ("wavelet", {"wavelet": "haar"}, "unknown wavelet 'haar'; there are: .*mexican_hat"),
        ("chebyshev", {"order": 0}, "order must be at least 1"),
        ("radial", {"grid": 1}, "grid must be at least 2"),
        ("radial", {"grid_range": (2, 2)}, "finite and increasing"),
        ("radial", {"grid_range": (0, 1, 2)}, "grid_range must be 2 numbers"),
        ("legendre", {}, "unknown basis 'legendre'.*fourier"),
    ],
)
def test_bad_options_get_a_sentence(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_basis(name, **options)
    with pytest.raises(ValueError, match=r"functions that x ~ N\(0, 1\) reaches"):
        SplineBasis(3, 3, (50, 60)).reset_(torch.empty(6), "scaled")


def test_registries_refuse_a_second_owner_of_a_name():
    with pytest.raises(ValueError, match="there is a basis 'fourier' already: FourierBasis"):
        register("fourier")(type("Other", (Basis,), {}))
    assert BASES["fourier"] is FourierBasis and isinstance(make_basis("FourierBasis", grid=2), FourierBasis)

    def dog(u):
        return u

    with pytest.raises(ValueError, match="there is a wavelet 'dog' already"):
        register_wavelet(dog)


@pytest.mark.parametrize("use", USES)
def test_options_of_a_model_make_the_basis(use):
    prefix = "mlp_" if use == "mlp" else ""
    assert make_basis_for(use, "SplineBasis", {f"{prefix}grid": 5}).grid == 5
    assert make_basis_for(use, "spline", {}).grid_range == ((-3, 3) if use == "mlp" else (-1, 1))
    assert make_basis_for(use, "rational", {}).version == ("A" if use == "mlp" else "B")
    name = "mlp_wavelet" if use == "mlp" else "wavelet_type"
    assert make_basis_for(use, "wavelet", {name: "dog"}) == WaveletBasis("dog")
    with pytest.raises(
        ValueError, match=f"{prefix}order is an option of ChebyshevBasis or SplineBasis, not of Fourier"
    ):
        make_basis_for(use, "fourier", {f"{prefix}order": 3})
    assert {f"{prefix}grid", f"{prefix}order", f"{prefix}grid_range", name} < option_names(use)
    assert ("mlp_numerator_groups" in option_names(use)) == (use == "mlp")


def test_an_option_has_one_type_in_all_bases():
    @dataclass(frozen=True)
    class Odd(Basis):
        grid: float = option(0.5, "no number of cells")

    with pytest.raises(TypeError, match="an option has no min"):
        option(1, "a misspelt keyword", min=1)
    with pytest.raises(ValueError, match="option grid of the odd basis has another type"):
        register("odd")(Odd)
    assert "odd" not in BASES


@every
def test_a_basis_is_described_by_its_options(basis):
    options = {f.name: getattr(basis, f.name) for f in fields(basis)}
    twin = make_basis(basis.name, **options)
    assert twin == basis and hash(twin) == hash(basis) and repr(twin) == repr(basis) and twin is not basis
    assert all(other == basis or repr(other) != repr(basis) for other in EVERY)
    assert basis.flops >= 1 and basis.formula and all(f.metadata["help"] for f in fields(basis))
    with pytest.raises(FrozenInstanceError):
        basis.grid = 1


@every
def test_the_zero_function_is_zero_and_trains(basis):
    theta = basis.zero_(torch.full((3, basis.num_coefficients), math.nan)).requires_grad_()
    y = basis(torch.randn(50, 1), theta)
    assert not y.any()
    (grad,) = torch.autograd.grad((y - 1).square().sum(), theta)
    assert grad.isfinite().all() and grad.abs().sum(-1).all()


def test_fourier_in_float32_far_from_zero():
    basis = FourierBasis(11)
    x = torch.linspace(-100, 100, 4001)
    assert (basis.features(x).double() - basis.features(x.double())).abs().max() < 2e-6


@pytest.mark.parametrize("order", range(6))
@pytest.mark.parametrize("grid, grid_range", [(1, (-1, 1)), (3, (-1.1, 0.7)), (7, (2.3, 5.9))])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_splines_sum_to_1_on_the_closed_range_and_end(grid, grid_range, order, dtype, tolerance):
    basis = SplineBasis(grid, order, grid_range)
    (lo, hi), beyond = basis.grid_range, order * (basis.grid_range[1] - basis.grid_range[0]) / grid
    x = torch.cat([torch.linspace(lo, hi, 10 * grid + 1, dtype=dtype), torch.tensor([lo, hi], dtype=dtype)])
    features = basis.features(x)
    assert (features.sum(-1) - 1).abs().max() <= tolerance and features.min() >= -tolerance
    assert ((features > tolerance).sum(-1) <= order + 1).all()
    assert not basis.features(torch.tensor([lo - beyond - 1e-3, hi + beyond + 1e-3, -1e30, 1e30], dtype=dtype)).any()


def test_fit_recovers_curves():
    basis = SplineBasis(5, 3, (-2, 2))
    theta = torch.randn(2, 3, basis.num_coefficients, dtype=torch.float64)
    x = torch.linspace(-2, 2, 50, dtype=torch.float64)
    torch.testing.assert_close(basis.fit(x, basis(x, theta.unsqueeze(-2))), theta, rtol=0, atol=1e-11)
    samples = 4 * torch.rand(2, 3, 60, dtype=torch.float64) - 2  # other samples for each curve
    torch.testing.assert_close(basis.fit(samples, basis(samples, theta.unsqueeze(-2))), theta, rtol=0, atol=1e-8)
    assert basis.fit(x.float(), x.sin().float()).dtype is torch.float32
    # Nothing is known above 0, so the smallest solution is taken.
    assert (SplineBasis(20, 3, (-2, 2)).fit(x[x < 0], x[x < 0].sin()).abs() < 2).all()
    with pytest.raises(ValueError, match="fit needs x"):
        basis.fit(x, x[1:])


@pytest.mark.parametrize(
    "new, tolerance",
    [
        (SplineBasis(6, 3, (-1, 1)), 1e-12),
        (SplineBasis(15, 3, (-5, 5)), 1e-12),
        (SplineBasis(3, 3, (0, 1)), 1e-12),
        (SplineBasis(60, 3, (-1.3, 1.1)), 1e-3),
        (SplineBasis(40, 4, (-1.0, 1.0)), 2e-2),
    ],
)
def test_refit_keeps_the_function(new, tolerance):
    """Exact if the new knots contain the old ones: 15 cells on [-5, 5] have all the knots of 3 cells on [-1, 1]."""
    old = SplineBasis(3, 3, (-1, 1))
    theta = torch.randn(4, old.num_coefficients, dtype=torch.float64)
    refitted = old.refit(theta, new)
    assert refitted.shape == (4, new.num_coefficients)
    x = torch.linspace(*new.grid_range, 777, dtype=torch.float64)
    assert (new(x, refitted.unsqueeze(-2)) - old(x, theta.unsqueeze(-2))).abs().max() <= tolerance


def test_grid_update_covers_the_samples():
    old, x = SplineBasis(4, 2), 3 * torch.randn(10, 100) + 1
    new = old.update_grid(x)
    lo, hi = new.grid_range
    assert (new.grid, new.order) == (4, 2) and lo < x.min() and x.max() < hi and old.grid_range == (-1, 1)
    assert hi - lo == pytest.approx(1.02 * (x.max() - x.min()).item())
    torch.testing.assert_close(new.features(x).sum(-1), torch.ones(10, 100))
    inner = old.update_grid(x, margin=0, quantile=0.05).grid_range
    assert 0.9 <= ((x >= inner[0]) & (x <= inner[1])).float().mean() < 0.91
    assert old.update_grid(torch.full((5,), 7.0)).grid_range == (6, 8)
    for samples, options in (
        (torch.empty(0), {}),
        (torch.tensor([0, math.nan]), {}),
        (x, {"quantile": 0.5}),
        (x, {"margin": -1}),
    ):
        with pytest.raises(ValueError, match="update_grid needs"):
            old.update_grid(samples, **options)


@pytest.mark.parametrize("name", WAVELETS)
def test_wavelets_are_functions_of_x_and_survive_a_scale_of_0(name):
    basis = WaveletBasis(name)
    x = torch.tensor([-1e30, -3.0, -1e-3, 0.0, 1e-3, 3.0, 1e30])
    together = basis(x, torch.tensor([1.0, 0, 1]))
    assert torch.equal(together, torch.stack([basis(v, torch.tensor([1.0, 0, 1])) for v in x]))
    assert together[0] == 0 and together[-1] == 0
    for s in (0.0, -0.0, 1e-20, -1e-20, MIN_SCALE / 2):
        x.requires_grad_()
        theta = torch.tensor([1.0, 0, s], requires_grad=True)
        y = basis(x, theta)
        assert torch.equal(y, basis(x, torch.tensor([1.0, 0, -MIN_SCALE if s < 0 else MIN_SCALE])))
        assert all(g.isfinite().all() for g in torch.autograd.grad(y.square().sum(), (x, theta)))
    theta = torch.tensor([1.0, 0, 1e-3], requires_grad=True)  # not stuck: the gradient of s passes
    assert torch.autograd.grad(basis(torch.tensor(0.006), theta), theta)[0][2] != 0


def test_shannon_gradient_in_float32_near_zero():
    x = torch.logspace(-8, 0.5, 200).requires_grad_()
    exact = x.detach().double().requires_grad_()
    got, want = (torch.autograd.grad(WAVELETS["shannon"](t).sum(), t)[0] for t in (x, exact))
    assert (got.double() - want).abs().max() < 3e-6
    assert mean_square(WAVELETS["dog"]) == pytest.approx(3**-1.5, rel=1e-12)  # E[x^2 exp(-x^2)]


@pytest.mark.parametrize("version", ["A", "B"])
def test_a_rational_denominator_that_starts_at_0_trains(version):
    basis = RationalBasis(version=version)
    theta = torch.zeros(10, requires_grad=True)
    with torch.no_grad():
        theta[1] = 1
    (grad,) = torch.autograd.grad(basis(torch.rand(64) + 0.5, theta).sum(), theta)
    assert (grad[6:] < 0).all()


def test_rational_version_a_is_the_function_of_kat():
    x, theta, results = torch.randn(40, 6, dtype=torch.float64), torch.randn(6, 10, dtype=torch.float64), []
    x[:2] = torch.tensor([[0.0], [-0.0]])
    for f in (RationalBasis(version="A"), lambda x, theta: kan_basis.rational(x, theta[:, :6], theta[:, 6:])):
        inputs = [t.clone().requires_grad_() for t in (x, theta)]
        y = f(*inputs)
        results.append((y, *torch.autograd.grad(y.square().sum(), inputs)))
    for got, want in zip(*results):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
