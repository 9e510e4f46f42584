import math

import pytest
import timm
import torch
from torch.nn import functional as F

import models  # noqa: F401
from kan_basis import BASES, GroupBasis, GroupRational, group, group_basis, make_basis
from kan_basis.basis import make_basis_for
from kan_basis.wavelet import WAVELETS
from models.kat import GRKANMlp, variance_gain

OPTIONS = {
    "fourier": dict(grid=2),
    "spline": dict(grid=3, order=2, grid_range=(-2, 2)),
    "wavelet": {},
    "rational": dict(version="B"),
    "chebyshev": dict(order=2),
    "radial": dict(grid=3, grid_range=(-2, 2)),
}
OTHERS = tuple(OPTIONS)
each_basis = pytest.mark.parametrize("name", OTHERS)


def basis(name):
    return make_basis(name, **OPTIONS[name])


def theta(name, groups, dtype=torch.float64):
    t = torch.randn(groups, basis(name).num_coefficients, dtype=dtype)
    if name == "wavelet":
        t[:, 2] = t[:, 2].abs() + 0.5
    return t.requires_grad_()


def literal(name, x, t):
    """phi(x) of one number and one row of coefficients, term by term."""
    if name == "fourier":
        G = len(t) // 2
        return sum(t[m - 1] * math.cos(m * x) + t[G + m - 1] * math.sin(m * x) for m in range(1, G + 1))
    if name == "chebyshev":
        return sum(c * math.cos(n * math.acos(math.tanh(x))) for n, c in enumerate(t))
    if name == "radial":
        return sum(c * math.exp(-(((x - centre) / 2) ** 2)) for c, centre in zip(t, (-2, 0, 2)))
    if name == "rational":
        a, b = t[:6], t[6:]
        return sum(c * x**i for i, c in enumerate(a)) / (1 + abs(sum(c * x**j for j, c in enumerate(b, 1))))
    if name == "wavelet":
        w, tau, s = t
        return w * WAVELETS["mexican_hat"](torch.tensor((x - tau) / s, dtype=torch.float64)).item()
    knots = [-2 + (i - 2) * 4 / 3 for i in range(3 + 2 * 2 + 1)]

    def bump(i, k):  # Cox-de Boor
        if k == 0:
            return float(knots[i] <= x < knots[i + 1])
        return (x - knots[i]) / (knots[i + k] - knots[i]) * bump(i, k - 1) + (knots[i + k + 1] - x) / (
            knots[i + k + 1] - knots[i + 1]
        ) * bump(i + 1, k - 1)

    return sum(c * bump(i, 2) for i, c in enumerate(t))


def test_every_basis_is_tested():
    assert set(OPTIONS) == set(BASES)


@each_basis
@pytest.mark.parametrize("groups", [1, 3, 12])
def test_is_the_literal_formula(name, groups, monkeypatch):
    monkeypatch.setattr(group, "MAX_TERMS", 100)  # several chunks
    x, t = 2 * torch.randn(7, 12, dtype=torch.float64), theta(name, groups)
    got = group_basis(x, t, basis(name), "swish")
    rows = t.detach().tolist()
    want = [
        [v / (1 + math.exp(-v)) + literal(name, v, rows[c * groups // 12]) for c, v in enumerate(row)]
        for row in x.tolist()
    ]
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-11, atol=1e-11)


@each_basis
@pytest.mark.parametrize("target", group.TARGETS)
def test_starts_as_its_target_and_gets_a_gradient(name, target):
    act, x = GroupBasis(basis(name), 4, target), torch.randn(6, 8)
    exact = {"identity": x, "swish": F.silu(x)}.get(target, group.TARGETS[target](x))
    assert torch.equal(act(x), exact) and list(act.state_dict()) == ["weight_coefficients"]
    act(x).square().sum().backward()
    assert (act.weight_coefficients.grad.abs().sum(1) > 0).all()


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("dim", [-1, 1])
def test_gradcheck(name, dim, monkeypatch):
    monkeypatch.setattr(group, "MAX_TERMS", 40)
    x = torch.randn(2, 4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, t: group_basis(x, t, basis(name), "gelu", dim), (x, theta(name, 2)))


@each_basis
def test_channels_in_front_any_strides_and_sizes(name):
    act = GroupBasis(basis(name), 0, "swish", num_channels=6)
    with torch.no_grad():
        act.weight_coefficients.copy_(theta(name, 6, torch.float32))
    x = torch.randn(3, 5, 7, 6)
    first = GroupBasis(basis(name), 0, "swish", num_channels=6, channel_dim=1)
    first.load_state_dict(act.state_dict())
    torch.testing.assert_close(first(x.permute(0, 3, 1, 2)), act(x).permute(0, 3, 1, 2))
    torch.testing.assert_close(act(x[0, 0, 0]), act(x)[0, 0, 0])
    assert act(x[:0]).shape == (0, 5, 7, 6)
    act(x[:0].requires_grad_()).sum().backward()
    assert not act.weight_coefficients.grad.any()


@each_basis
def test_dtypes_and_autocast(name):
    act, x = GroupBasis(basis(name), 2, "swish"), torch.randn(64, 8)
    with torch.no_grad():
        act.weight_coefficients.copy_(theta(name, 2, torch.float32))
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        y = act(x.to(dtype))
        assert y.dtype is dtype
        torch.testing.assert_close(
            y, act.double()(x.to(dtype).double()).to(dtype), rtol=3 * torch.finfo(dtype).eps, atol=1e-5
        )
        act.float()
    with torch.autocast("cpu", torch.bfloat16):
        y = act(x.requires_grad_())
        assert (
            y.dtype is torch.bfloat16 and torch.equal(y, act(x.bfloat16())) and act(x.double()).dtype is torch.float64
        )
    y.sum().backward()
    assert x.grad.dtype is torch.float32 and act.weight_coefficients.grad.dtype is torch.float32


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """The largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = out if isinstance(out, (tuple, list)) else [out]
        self.elements = max([self.elements, *(t.numel() for t in tensors if isinstance(t, torch.Tensor))])
        return out


@each_basis
def test_only_x_is_kept_and_terms_exist_in_chunks(name, monkeypatch):
    monkeypatch.setattr(group, "MAX_TERMS", 4096)
    act, x, kept = GroupBasis(make_basis(name), 8, "swish"), torch.randn(64, 10, 32, requires_grad=True), {}

    def keep(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with Largest() as largest:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            y = act(x)
        y.sum().backward()
    assert sum(kept.values()) <= 4 * x.numel() + 4 * act.weight_coefficients.numel()
    assert largest.elements <= max(x.numel(), 2 * 4096)


@each_basis
def test_model(name):
    torch.manual_seed(1)
    given = {
        "mlp_grid": 2,
        "mlp_order": 2,
        "mlp_grid_range": [-4, 4],
        "mlp_wavelet": "dog",
        "mlp_degrees": [3, 2],
        "mlp_version": "B",
    }
    options = {option: value for option, value in given.items() if option in BASES[name].options("mlp")}
    model = timm.create_model(
        "kat_micro_patch8_32",
        num_classes=10,
        weight_init="variance_preserving",
        mlp_basis=name,
        num_groups=4,
        **options,
    )
    act = model.blocks[0].mlp.act2
    assert isinstance(act, GroupBasis) and act.weight_coefficients.shape[0] == 4 and act.basis.name == name
    assert options and all(
        getattr(act.basis, option.removeprefix("mlp_")) == (tuple(value) if isinstance(value, list) else value)
        for option, value in options.items()
    )
    images, labels, losses = torch.randn(16, 3, 32, 32), torch.arange(16) % 10, []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(4):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        for parameter_name, p in model.named_parameters():
            assert p.grad is not None and p.grad.isfinite().all(), parameter_name
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    # Every coefficient trains, translation and scale of a wavelet from the second step on.
    assert act.weight_coefficients.grad.abs().sum(0).all()


def test_other_names_and_the_published_default():
    karat = timm.create_model("kat_micro_patch8_32_karat", mlp_basis="FourierBasis", mlp_grid=1, grid=2)
    assert karat.blocks[0].mlp.act1.basis.grid == 1 and karat.blocks[0].attn.operator.layers[0].basis.grid == 2
    flash = timm.create_model("flash_kat_micro_gelu_patch8_32", mlp_basis="spline", den_groups=-1)
    assert flash.blocks[0].mlp.act2.weight_coefficients.shape == (256, 6) and flash.blocks[0].mlp.act2.target == "gelu"
    with torch.device("meta"):
        plain, named = (
            timm.create_model("kat_tiny_patch16_224"),
            timm.create_model("kat_tiny_patch16_224", mlp_basis="rational", mlp_degrees=[5, 4]),
        )
    assert len(plain.state_dict()) == 200 and plain.state_dict().keys() == named.state_dict().keys()
    assert isinstance(plain.blocks[0].mlp.act1, GroupRational)


@each_basis
def test_gain_and_variance(name):
    for target, gain in (("identity", 1.0), ("swish", 2.8178), ("gelu", 2.3568)):
        assert variance_gain(GroupBasis(basis(name), target=target)) == pytest.approx(gain, rel=0.01)
    act = GroupBasis(basis("fourier"), 2)
    with torch.no_grad():
        act.weight_coefficients[0, 0] = 1.0
    assert variance_gain(act) == pytest.approx(1 / (1 + (1 + math.exp(-2)) / 2), rel=1e-6)  # E[(x + cos x)^2]
    mlp = GRKANMlp(192, 768, basis=make_basis_for("mlp", name, {}))
    mlp.init_variance_preserving()
    assert mlp(torch.randn(2048, 192)).var().item() == pytest.approx(1.0, rel=0.1)


def test_compiles_without_a_break():
    act = GroupBasis(basis("spline"), 2, "swish")
    x = torch.randn(5, 4)
    assert torch.equal(torch.compile(act, backend="aot_eager", fullgraph=True)(x), act(x))


@pytest.mark.parametrize(
    "make, sentence",
    [
        (
            lambda: GroupBasis(basis("spline"), target="geglu"),
            "unknown target 'geglu' of the spline basis; there are: identity",
        ),
        (lambda: GroupBasis(basis("spline"), 0), "needs num_channels"),
        (lambda: GroupBasis(basis("spline"), 8, num_channels=12), "12 channels do not divide into 8 groups"),
        (
            lambda: GroupBasis(basis("spline"))(torch.zeros(2, 12)),
            "the 12 channels of x .* do not divide into 8 groups",
        ),
        (lambda: GroupBasis(basis("spline"), channel_dim=2)(torch.zeros(2, 8)), "channel_dim 2 does not exist"),
        (
            lambda: group_basis(torch.zeros(2, 8), torch.zeros(8, 3), basis("spline")),
            r"theta must have shape \(groups, 5\), not \(8, 3\)",
        ),
        (
            lambda: timm.create_model("kat_micro_patch8_32", mlp_basis="legendre"),
            "unknown basis 'legendre'; there are: chebyshev, fourier",
        ),
        (
            lambda: timm.create_model("kat_micro_patch8_32", mlp_basis="fourier", mlp_grid=0),
            "grid must be at least 1, not 0",
        ),
        (
            lambda: timm.create_model("kat_micro_patch8_32", mlp_basis="spline", act_init=("identity", "geglu")),
            "unknown target 'geglu'",
        ),
    ],
)
def test_errors_are_one_sentence(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()
    with pytest.raises(TypeError, match="x must be float32.* not torch.int64"):
        GroupBasis(basis("spline"))(torch.zeros(2, 8, dtype=torch.int64))
