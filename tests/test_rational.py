import importlib
import re
import time
from pathlib import Path

import pytest
import timm
import torch
from oracle import rational_oracle

from kan_basis import GroupBasis, GroupRational, RationalBasis, rational
from kan_basis.group_rational import preset_coefficients, presets
from kan_basis.quotient import CHUNK

NAMES = ("output", "grad x", "grad numerator", "grad denominator")


def inputs(shape, rows=(1, 8), degrees=(5, 4), dtype=torch.float64, x_dtype=None):
    x = (2 * torch.randn(shape, dtype=torch.float64)).to(x_dtype or dtype)
    return (
        x.requires_grad_(),
        (0.5 * torch.randn(rows[0], degrees[0] + 1, dtype=dtype)).requires_grad_(),
        (0.5 * torch.randn(rows[1], degrees[1], dtype=dtype)).requires_grad_(),
    )


def results(fn, x, a, b, grad):
    y = fn(x, a, b)
    return (y, *torch.autograd.grad(y, (x, a, b), grad))


def assert_same(got, want, tolerance):
    for name, g, w in zip(NAMES, got, want):
        assert g.shape == w.shape, name
        error = (g.double() - w.double()).norm() / w.double().norm().clamp_min(1e-30)
        assert error <= tolerance, f"{name}: relative error {error:.2e} > {tolerance}"


@pytest.mark.parametrize("rows", [(1, 8), (8, 1), (1, 1), (4, 8), (24, 24), (1, 24), (3, 8)])
@pytest.mark.parametrize("degrees", [(5, 4), (3, 2), (0, 1), (2, 6), (8, 8)])
def test_agrees_with_oracle(rows, degrees):
    x, a, b = inputs((3, 5, 24), rows, degrees)
    grad = torch.randn_like(x)

    def oracle(x, a, b):
        # Its numbers of groups must divide each other: both are repeated to one row per channel.
        return rational_oracle(x, *(t.repeat_interleave(24 // t.shape[0], 0) for t in (a, b)))

    assert_same(results(rational, x, a, b, grad), results(oracle, x, a, b, grad), 1e-12)


@pytest.mark.parametrize("rows", [(1, 2), (6, 3)])
@pytest.mark.parametrize("dim", [-1, 1])
def test_gradcheck(rows, dim):
    x, a, b = inputs((2, 6, 6), rows)
    assert torch.autograd.gradcheck(lambda x, a, b: rational(x, a, b, dim), (x, a, b))


@pytest.mark.parametrize(
    "shape", [(0, 16), (1, 16), (16,), (7, 3, 16), (131072 + 16, 1), (CHUNK // 16 * 2 + 3, 16), (2, 0, 16)]
)
def test_sizes(shape):
    rows = (1, 1) if shape[-1] == 1 else (1, 8)
    x, a, b = inputs(shape, rows, dtype=torch.float32)
    grad = torch.randn_like(x)
    got = results(rational, x, a, b, grad)
    want = results(rational_oracle, *(t.detach().double().requires_grad_() for t in (x, a, b)), grad.double())
    assert_same(got, want, 1e-6)
    assert all(g.dtype is torch.float32 for g in got)


@pytest.mark.parametrize("view", ["slice", "transpose", "expanded", "permuted"])
def test_any_strides_and_gradients(view):
    x, a, b = inputs((6, 8, 16), dtype=torch.float64)
    base = torch.randn(12, 8, 32, dtype=torch.float64)
    x = {
        "slice": base[::2, :, 5:21],
        "transpose": torch.randn(8, 6, 16, dtype=torch.float64).transpose(0, 1),
        "expanded": base[:1, :, :16].expand(6, 8, 16),
        "permuted": torch.randn(16, 6, 8, dtype=torch.float64).permute(1, 2, 0),
    }[view]
    x = x.detach().requires_grad_()
    grad = torch.randn(16, dtype=torch.float64).expand(6, 8, 16)  # stride 0
    assert not (x.is_contiguous() and grad.is_contiguous())
    assert_same(results(rational, x, a, b, grad), results(rational_oracle, x, a, b, grad), 1e-12)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_channels_first(memory_format):
    x, a, b = inputs((2, 16, 5, 3))
    x = x.detach().contiguous(memory_format=memory_format).requires_grad_()
    grad = torch.randn_like(x)
    first = results(lambda x, a, b: rational(x, a, b, channel_dim=1), x, a, b, grad)
    last = results(lambda x, a, b: rational_oracle(x.movedim(1, -1), a, b).movedim(-1, 1), x, a, b, grad)
    assert_same(first, last, 1e-12)


def test_odd_powers_for_negative_x_and_gradient_at_zero_denominator():
    x = torch.tensor([[-2.0]], dtype=torch.float64, requires_grad=True)
    a = torch.tensor([[0.5, -1.0, 2.0]], dtype=torch.float64)
    b = torch.tensor([[-3.0, 0.25]], dtype=torch.float64)
    # P = 0.5 + 2 + 8, Q = 1 + 3*2 + 0.25*4, by hand
    assert rational(x, a, b).item() == pytest.approx(10.5 / 8, rel=1e-14)
    zero = torch.zeros(1, 4, requires_grad=True)
    rational(torch.randn(64, 1), torch.tensor([[0.0, 1, 0, 0, 0, 0]]), zero).square().sum().backward()
    assert (zero.grad.abs() > 0).all()
    for zero in (0.0, -0.0):
        at_zero = torch.full((1, 1), zero, requires_grad=True)  # R/Q - S P/Q^2 with S = +|b_1|: 2 - 4 * 3
        rational(at_zero, torch.tensor([[3.0, 2.0]]), torch.tensor([[-4.0]])).backward()
        assert at_zero.grad.item() == -10


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_storage_is_computed_in_float32(dtype):
    x, a, b = inputs((64, 32), dtype=torch.float32, x_dtype=dtype)
    a, b = (t.detach().mul(0.3).requires_grad_() for t in (a, b))
    grad = torch.randn(64, 32).to(dtype)
    got = results(rational, x, a, b, grad)
    exact = results(rational_oracle, *(t.detach().double().requires_grad_() for t in (x, a, b)), grad.double())
    plain = results(rational_oracle, *(t.detach().to(dtype).requires_grad_() for t in (x, a, b)), grad)
    assert [t.dtype for t in got] == [dtype, dtype, torch.float32, torch.float32]
    for name, g, e, p in zip(NAMES, got, exact, plain):
        assert (g.double() - e).norm() <= 2 * (p.double() - e).norm(), name
    assert (got[0].double() - exact[0]).norm() / exact[0].norm() < (2e-3 if dtype is torch.float16 else 5e-3)


def test_float32_accuracy_of_coefficient_gradients():
    x, a, b = inputs((64, 197, 96), dtype=torch.float32)
    grad = torch.randn_like(x)
    want = results(rational_oracle, *(t.detach().double().requires_grad_() for t in (x, a, b)), grad.double())
    assert_same(results(rational, x, a, b, grad), want, 2e-6)


def test_saves_only_x_and_coefficients():
    x, a, b = inputs((4, 16), dtype=torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        rational(x, a, b)
    assert {t.data_ptr() for t in saved} == {x.data_ptr(), a.data_ptr(), b.data_ptr()}


def test_autocast_casts_the_input_as_linear_does():
    layer, x = GroupRational(), torch.randn(2, 16)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert y.dtype is torch.bfloat16
        assert layer(x.double()).dtype is torch.float64
    assert torch.equal(y, layer(x.bfloat16()))


def test_two_runs_are_equal_to_the_bit_and_no_second_derivative():
    x, a, b = inputs((1000, 768), dtype=torch.float32)
    first, second = (results(rational, x, a, b, torch.ones_like(x)) for _ in range(2))
    assert all(torch.equal(f, s) for f, s in zip(first, second))
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(rational(x, a, b).sum(), x, create_graph=True)


def test_wrong_input_gets_a_sentence():
    x, a, b = torch.randn(2, 12), torch.randn(1, 6), torch.randn(8, 4)
    with pytest.raises(ValueError, match=r"12 channels of x \(2, 12\).*8 groups of denominator \(8, 4\)"):
        rational(x, a, b)
    with pytest.raises(ValueError, match="numerator must have shape"):
        rational(x, a[0], b)
    with pytest.raises(TypeError, match="float32, float16, bfloat16 or float64, not torch.int64"):
        rational(torch.arange(12), a, b)
    with pytest.raises(ValueError, match="channel_dim 2"):
        rational(x, a, b, channel_dim=2)
    with pytest.raises(ValueError, match="unknown rational preset 'swis'.*swish"):
        GroupRational(mode="swis")
    with pytest.raises(ValueError, match="needs num_channels"):
        GroupRational(num_groups=0)
    with pytest.raises(ValueError, match="degrees"):
        GroupRational(degrees=(5, 0))


@pytest.mark.parametrize("degrees", [(5, 4), (7, 5), (3, 2)])
def test_module_starts_from_its_preset(degrees):
    layer = GroupRational(num_groups=4, mode="swish", degrees=degrees).double()
    assert {k: tuple(v.shape) for k, v in layer.named_parameters()} == {
        "weight_numerator": (1, degrees[0] + 1),
        "weight_denominator": (4, degrees[1]),
    }
    x = torch.linspace(-3, 3, 4001, dtype=torch.float64)
    error = (layer(x[:, None].expand(-1, 8)) - torch.nn.functional.silu(x)[:, None]).abs().max()
    assert error < (2e-6 if degrees >= (5, 4) else 2e-2)


def test_published_coefficients_are_exact():
    assert preset_coefficients("identity", (5, 4)) == ([0, 1, 0, 0, 0, 0], [0, 0, 0, 0])
    a, b = preset_coefficients("swish", (5, 4))
    assert a[5] == 0.0002751961022402342 and b[0] == -4.111554955950634e-06
    assert {"gelu", "published_gelu"} <= set(presets())


def test_one_function_per_channel():
    layer = GroupRational(num_groups=0, numerator_groups=-1, num_channels=6)
    assert layer.weight_numerator.shape == (6, 6) and layer.weight_denominator.shape == (6, 4)


def test_a_basis_makes_its_activation():
    layer = RationalBasis((3, 2), "A", 2).activation(4, "swish", 8, dtype=torch.float64)
    assert isinstance(layer, GroupRational) and layer.basis == RationalBasis((3, 2), "A", 2)
    assert [tuple(p.shape) for p in layer.parameters()] == [(2, 4), (4, 2)]
    assert next(layer.parameters()).dtype is torch.float64
    layer = RationalBasis((3, 2)).activation(4, "gelu", 8)
    assert isinstance(layer, GroupBasis) and layer.weight_coefficients.shape == (4, 6)
    x = torch.randn(5, 8)
    torch.testing.assert_close(layer(x), torch.nn.functional.gelu(x))


def test_a_basis_describes_itself():
    basis = RationalBasis([5, 4])
    assert basis == RationalBasis() and (basis.num_coefficients, basis.flops) == (10, 21)
    assert basis.formula == "(sum over i = 0..5 of a_i x^i) / (1 + |sum over j = 1..4 of b_j x^j|)"
    assert RationalBasis((2, 1), "A").formula.endswith("(1 + sum over j = 1..1 of |b_j| |x|^j)")
    for options, message in (
        (dict(degrees=(5, 0)), r"degrees must be \(m >= 0, n >= 1\), not \(5, 0\)"),
        (dict(degrees=(-1, 4)), r"degrees must be \(m >= 0, n >= 1\), not \(-1, 4\)"),
        (dict(degrees=(5,)), "degrees must be 2 integers"),
        (dict(version="C"), "unknown version 'C'; there are: A, B"),
    ):
        with pytest.raises(ValueError, match=message):
            RationalBasis(**options)


def test_one_module_has_the_private_interfaces_of_torch():
    folders = Path(importlib.import_module("kan_basis").__file__).parent, importlib.import_module("cuda.launch").FOLDER
    files = [path for folder in folders for path in folder.glob("*.py")]
    private = re.compile(r"torch\._|\b_C\b|forward_ad\._")
    assert [path.stem for path in files if private.search(path.read_text())] == ["torch_internals"]


def timed(fn, runs):
    fn()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        fn()
        times.append(time.perf_counter() - start)
    return min(times)


@pytest.mark.alone
def test_compiled_agrees_exports_and_both_are_fast():
    """At least 4 times as fast as the oracle, 12 times if compiled: both passes, [8, 197, 768] float32 on the CPU."""
    layer = GroupRational()
    x = torch.randn(8, 197, 768, requires_grad=True)
    grad = torch.randn_like(x)
    a, b = layer.weight_numerator, layer.weight_denominator
    compiled = torch.compile(rational, fullgraph=True)
    eager = results(rational, x, a, b, grad)
    assert_same(results(compiled, x, a, b, grad), eager, 2e-6)
    oracle_time = timed(lambda: results(rational_oracle, x, a, b, grad), 3)
    assert oracle_time / timed(lambda: results(rational, x, a, b, grad), 8) >= 4
    assert oracle_time / timed(lambda: results(compiled, x, a, b, grad), 8) >= 12
    exported = torch.export.export(layer, (x.detach()[:2],)).module()
    assert torch.equal(exported(x.detach()[:2]), layer(x.detach()[:2]))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 5e-3), (torch.float16, 1e-3)]
)
def test_on_cuda(dtype, tolerance):
    x, a, b = inputs((3, 130, 96), dtype=torch.float32 if dtype is not torch.float64 else dtype, x_dtype=dtype)
    grad = torch.randn(3, 96, 130).to(dtype).transpose(1, 2)
    want = results(rational_oracle, *(t.detach().double().requires_grad_() for t in (x, a, b)), grad.double())
    got = results(rational, *(t.detach().cuda().requires_grad_() for t in (x, a, b)), grad.cuda())
    assert_same([g.cpu() for g in got], want, tolerance)
    assert got[0].dtype is dtype


def test_shapes_on_the_meta_device():
    assert GroupRational(device="meta")(torch.empty(2, 3, 16, device="meta")).shape == (2, 3, 16)


@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.parametrize("name", ["layer", "kat_micro_patch8_32", "vit_micro_patch8_32_karat"])
def test_onnx_export(name, dynamo, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    if name != "layer":
        import models  # noqa: F401  enters the names
    layer, x = (
        (GroupRational(8), torch.randn(2, 5, 96))
        if name == "layer"
        else (timm.create_model(name, num_classes=10), torch.randn(2, 3, 32, 32))
    )
    torch.onnx.export(layer.eval(), (x,), str(tmp_path / "layer.onnx"), dynamo=dynamo)
    session = runtime.InferenceSession(str(tmp_path / "layer.onnx"))
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), layer(x).detach(), rtol=1e-5, atol=2e-6)


def test_an_exported_definition_trains_denominators_that_start_at_zero():
    x, layer = torch.randn(4, 96), GroupRational(8, "identity", num_channels=96)
    x[:, ::7] = 0
    program = torch.export.export(layer, (x,), strict=False).module()
    want, found = (
        torch.autograd.grad(model(x).square().sum(), [model.weight_numerator, model.weight_denominator])
        for model in (layer, program)
    )
    for p, q in zip(want, found):
        torch.testing.assert_close(q, p)
    assert want[1].abs().min() > 0


def test_several_gradients_at_once():
    x = torch.randn(4, 96, requires_grad=True)
    y, directions = GroupRational(8, num_channels=96)(x), torch.randn(3, 4, 96)
    (batch,) = torch.autograd.grad(y, x, directions, is_grads_batched=True, retain_graph=True)
    for grad, direction in zip(batch, directions):
        torch.testing.assert_close(grad, torch.autograd.grad(y, x, direction, retain_graph=True)[0])
