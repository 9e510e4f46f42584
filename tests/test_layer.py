import math

import pytest
import torch
from karat_oracle import BASES, Largest, basis, literal_sums, randomised
from torch import nn

from kan_basis import BASES as REGISTRY
from kan_basis import edges, make_basis
from kan_basis import layer as kan
from kan_basis.layer import KANLayer, in_chunks
from kan_basis.simplex import project_l1


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(kan, "MAX_FEATURES", 40)
    monkeypatch.setattr(edges, "MAX_EDGES", 20)


def layer_and_input(name, base_fn=None, N=5, r=3, h=2, B=2, M=2, **kwargs):
    layer = randomised(KANLayer(N, r, basis(name), h, base_fn, **kwargs))
    return layer, torch.randn(B, h, M, N, dtype=torch.float64, requires_grad=True)


def test_every_basis_is_tested():
    assert set(BASES) == set(REGISTRY)


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("base_fn", [None, nn.SiLU()])
@pytest.mark.parametrize("name", BASES)
def test_layer_is_the_literal_sum(name, base_fn, chunked, request):
    if chunked:
        request.getfixturevalue("small_chunks")
    layer, x = layer_and_input(name, base_fn)
    out = layer(x)
    assert out.shape == (2, 2, 2, 3) and out.dtype == torch.float64
    expected = torch.tensor(
        [[[literal_sums(layer, h, x[b, h, m]) for m in range(2)] for h in range(2)] for b in range(2)],
        dtype=torch.float64,
    )
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("base_fn", [None, nn.PReLU()])
@pytest.mark.parametrize("name", BASES)
def test_gradients(name, base_fn, small_chunks):
    layer, x = layer_and_input(name, base_fn, N=3, r=2)
    parameters = [p for p in layer.parameters() if p.requires_grad]
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *parameters))


@pytest.mark.parametrize(
    "name, options, r",
    [
        ("fourier", dict(grid=3), 12),
        ("fourier", dict(grid=11), 12),
        ("spline", dict(grid=5), 12),
        ("wavelet", {}, 12),
        ("rational", {}, 12),
        ("rational", {}, 24),
    ],
)
def test_nothing_of_rows_x_outputs_x_inputs(name, options, r, monkeypatch):
    monkeypatch.setattr(kan, "MAX_FEATURES", 20_000)
    monkeypatch.setattr(edges, "MAX_EDGES", 2_000)
    layer, x = (
        KANLayer(24, r, make_basis(name, **options), 2, nn.SiLU()),
        torch.randn(16, 2, 24, 24, requires_grad=True),
    )
    with Largest() as largest:
        layer(x).square().sum().backward()
    assert x.grad.isfinite().all() and layer.coefficients.grad.isfinite().all()
    assert largest.elements <= max(x.numel(), layer.coefficients.numel(), 60_000) < 16 * 2 * 24 * r * 24 / 3


def test_one_output_at_a_time_where_a_row_is_too_large(monkeypatch):
    monkeypatch.setattr(edges, "MAX_EDGES", 3)
    layer, x = layer_and_input("rational")
    out = layer(x)
    monkeypatch.undo()
    torch.testing.assert_close(out, layer(x), rtol=1e-12, atol=1e-12)


def test_parameters_and_freezing():
    layer = KANLayer(7, 4, make_basis("fourier", grid=3), num_heads=2)
    assert sum(p.numel() for p in layer.parameters()) == 2 * 7 * 4 * (6 + 2)
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {"coefficients", "scale_basis"}
    assert layer.scale_base.eq(1).all() and layer.scale_basis.eq(1).all()
    frozen = KANLayer(7, 4, basis("fourier"), base_fn=nn.PReLU(), base_trainable=False)
    assert {n for n, p in frozen.named_parameters() if p.requires_grad} == {"coefficients", "scale_basis"}
    base_only = KANLayer(7, 4, basis("fourier"), base_fn=nn.PReLU(), basis_trainable=False)
    assert {n for n, p in base_only.named_parameters() if p.requires_grad} == {"scale_base", "base_fn.weight"}


@pytest.mark.parametrize("name", BASES)
def test_scaled_init_has_variance_one(name):
    outputs = torch.cat([KANLayer(64, 32, basis(name), 4, init="scaled")(torch.randn(16, 4, 8, 64)) for _ in range(4)])
    assert outputs.square().mean().item() == pytest.approx(1, rel=0.35)
    with_base = torch.cat(
        [KANLayer(64, 32, basis(name), 4, nn.ReLU(), init="scaled")(torch.randn(16, 4, 8, 64)) for _ in range(4)]
    )
    assert with_base.square().mean().item() == pytest.approx(1, rel=0.35)  # without regard to what ReLU is on average
    half = KANLayer(6, 4, basis(name), init_scale=0.5)
    assert half.scale_basis.eq(0.5).all() and half.scale_base.eq(0.5).all()


@pytest.mark.parametrize("name", BASES)
def test_dtypes(name):
    layer, x = KANLayer(5, 3, basis(name), 2), torch.randn(2, 2, 4, 5)
    assert layer(x).dtype == torch.float32
    torch.testing.assert_close(layer(x.bfloat16()), layer(x.bfloat16().float()))
    assert layer.double()(x.double()).dtype == torch.float64
    assert layer.float()(x[:0]).shape == (0, 2, 4, 3)
    with_base = KANLayer(5, 3, basis(name), 2, nn.PReLU())
    torch.testing.assert_close(
        with_base.bfloat16()(x.bfloat16()), with_base.float()(x.bfloat16()), rtol=0.02, atol=0.1
    )  # b's parameter in bfloat16


def test_features_see_float32_under_autocast(monkeypatch):
    layer, seen = KANLayer(5, 3, basis("fourier"), 2), []
    features = type(layer.basis).features
    monkeypatch.setattr(
        type(layer.basis), "features", lambda self, x, *dim: seen.append(x.dtype) or features(self, x, *dim)
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(2, 2, 4, 5)).dtype == torch.bfloat16
    assert seen == [torch.float32]


def test_errors():
    with pytest.raises(ValueError, match="unknown init 'normal'"):
        KANLayer(3, 3, basis("fourier"), init="normal")
    with pytest.raises(ValueError, match="out_features must be at least 1"):
        KANLayer(3, 0, basis("fourier"))
    with pytest.raises(ValueError, match="expected 1 heads of 3 inputs, not 2 of 3"):
        KANLayer(3, 3, basis("fourier"))(torch.zeros(1, 2, 4, 3))


def test_chunks_draw_the_same_random_numbers_again():
    x, draws = torch.ones(6, 2, requires_grad=True), []

    def noisy(part):
        draws.append(torch.rand_like(part))
        return (part * draws[-1]).square()

    in_chunks(noisy, x, size=4, dim=0, keep_rng=True).sum().backward()
    assert [len(d) for d in draws] == [3, 3, 3, 3]  # of about one length, each a second time in the backward pass
    assert {d.sum().item() for d in draws[:2]} == {d.sum().item() for d in draws[2:]}


def naive_projection(row):
    """max(x - tau, 0) with tau by bisection on the sum."""
    low, high = min(row) - 1, max(row)
    for _ in range(200):
        tau = (low + high) / 2
        low, high = (tau, high) if math.fsum(max(v - tau, 0) for v in row) > 1 else (low, tau)
    return [max(v - tau, 0) for v in row]


@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
def test_l1_projection(scale):
    x = torch.randn(3, 4, 17, dtype=torch.float64) * scale
    y = project_l1(x)
    expected = torch.tensor([[naive_projection(row.tolist()) for row in rows] for rows in x], dtype=torch.float64)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(project_l1(y), y)
    assert torch.autograd.gradcheck(project_l1, (torch.randn(5, 7, dtype=torch.float64, requires_grad=True),))


def test_l1_projection_in_float32():
    x = torch.randn(64, 197) + 1e4
    with torch.autocast("cpu", torch.bfloat16):
        y = project_l1(x)
    assert y.dtype == torch.float32 and (y >= 0).all()
    torch.testing.assert_close(y.sum(-1), torch.ones(64), rtol=1e-5, atol=0)
    assert project_l1(x.bfloat16()).dtype == torch.float32
    ties = torch.zeros(1, 4, requires_grad=True)
    torch.testing.assert_close(project_l1(ties), torch.full((1, 4), 0.25))
    assert project_l1(torch.full((1, 4), math.nan)).isnan().all()
    assert project_l1(torch.tensor([-math.inf, 0.0, 2.0])).tolist() == [0, 0, 1]
