"""Kolmogorov-Arnold attention: its definition, and its operators against it.

Without a GPU the tests named test_interpreted_* run the real operators in Triton's interpreter, in a process of their
own, because Triton reads TRITON_INTERPRET when it is imported.
"""

import copy
import importlib
import importlib.util
import inspect
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import timm
import torch
from karat_oracle import BASES, Largest, operator, randomised
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import models  # noqa: F401
from cuda import attention as launches
from cuda import attention_operator as operators
from cuda import launch
from kan_basis import FourierBasis, RationalBasis, attention, fourier_attention, kernels, make_basis
from models.operator import KArAtOperator

definition = importlib.import_module("kan_basis.attention")  # the module, not the function of that name
INTERPRETED = "cpu" in operators.DEVICES
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the process of test_operators_in_the_interpreter")
ROOT = Path(__file__).resolve().parent.parent
NAMES = ("dq", "dk", "dv", "dcoefficients", "dprojector", "dscale_base")
BASE = {"": None, "identity": nn.Identity(), "relu": nn.ReLU(), "silu": nn.SiLU(), "gelu": nn.GELU()}
LINEAR = ("fourier", "chebyshev", "radial", "spline")


def inputs(basis, shape=(2, 2, 5, 8), r=3, base="", dtype=torch.float32, device="cpu", size=1.0):
    """The arguments of `attention`; q, k and v are views of one (B, N, 3, h, d) tensor, as in a model.

    The sums over tokens have the size of 1, so that no gradient leaves the range of float16.
    """
    B, h, N, d = shape
    qkv = size * torch.randn(B, N, 3, h, d, device=device).to(dtype)
    c, w = torch.randn(h, r, N, basis.num_coefficients, device=device), torch.randn(h, N, r, device=device)
    c, w = c * (N * basis.num_coefficients) ** -0.5, w * N**-0.5
    s = torch.randn(h, r, N, device=device) * N**-0.5 if base else None
    return (*qkv.permute(2, 0, 3, 1, 4), c, w, s)


def results(tensors, basis, base="", grad=None, function=attention, scale=None) -> dict[str, torch.Tensor]:
    """The output and the gradients by name."""
    q, k, v, c, w, s = (None if t is None else t.detach().requires_grad_() for t in tensors)
    out = function(q, k, v, c, w, basis, scale, BASE[base], s)
    grad = torch.cos(torch.arange(out.numel(), device=out.device)).view(out.shape).to(out) if grad is None else grad
    live = [t for t in (q, k, v, c, w, s) if t is not None]
    return dict(zip(("out", *NAMES), (out.detach(), *torch.autograd.grad(out, live, grad))))


def exact(tensors, basis, base="", scale=None) -> dict[str, torch.Tensor]:
    """`results` of the definition in float64."""
    choice, kernels._choice = kernels._choice, "torch"
    try:
        return results([None if t is None else t.double() for t in tensors], basis, base, scale=scale)
    finally:
        kernels._choice = choice


def error(found: torch.Tensor, want: torch.Tensor) -> float:
    return ((found.double() - want).norm() / want.norm().clamp_min(1e-30)).item()


def literal(q, k, v, c, w, basis, scale=None, base_fn=None, s=None):
    """The definition without chunks."""
    x = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    z = torch.einsum("bhmnf,hrnf->bhmr", basis.features(x), c)
    if base_fn is not None:
        z = z + torch.einsum("bhmn,hrn->bhmr", base_fn(x), s)
    return torch.einsum("bhmr,hnr,bhnd->bhmd", z, w, v)


# ---- the definition


@pytest.mark.parametrize("base", BASE)
@pytest.mark.parametrize("name", LINEAR)
def test_the_definition_is_the_formula(name, base):
    basis = make_basis(name, **BASES[name])
    tensors = [None if t is None else t.double() for t in inputs(basis, base=base)]
    want = results(tensors, basis, base, function=literal, scale=0.7)
    for result, found in results(tensors, basis, base, scale=0.7).items():
        torch.testing.assert_close(found, want[result], rtol=1e-9, atol=1e-9, msg=result)


def test_fourier_attention():
    tensors = inputs(FourierBasis(2))[:5]
    assert torch.equal(fourier_attention(*tensors), attention(*tensors, FourierBasis(2)))
    with pytest.raises(ValueError, match="must end in 2 G, not in 3"):
        fourier_attention(*tensors[:3], tensors[3][..., :3], tensors[4])


def test_dtypes_of_the_definition():
    basis = FourierBasis(2)
    q, k, v, c, w, _ = inputs(basis)
    want = attention(q, k, v, c, w, basis)
    assert attention(q.half(), k.bfloat16(), v.half(), c, w, basis).dtype == torch.float32
    found = attention(*(t.bfloat16() for t in (q, k, v)), c, w, basis)
    assert found.dtype == torch.bfloat16 and error(found, want.double()) < 0.05
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attention(q, k, v, c, w, basis), attention(*(t.bfloat16() for t in (q, k, v)), c, w, basis))
        assert attention(*(t.double() for t in (q, k, v, c, w)), basis).dtype == torch.float64


@pytest.mark.parametrize(
    "change, kind, message",
    [
        (dict(query=torch.zeros(2, 2, 5, 7)), ValueError, "must have one shape"),
        (dict(value=torch.zeros(2, 2, 6, 8)), ValueError, "must have one shape"),
        (dict(query=torch.zeros(2, 2, 5, 8, dtype=torch.int32)), TypeError, "query must be float32"),
        (dict(key=torch.zeros(2, 2, 5, 8, device="meta")), ValueError, "query is on cpu but key is on meta"),
        (dict(coefficients=torch.zeros(2, 3, 5, 5)), ValueError, r"coefficients must have shape \(2, r, 5, 4\)"),
        (dict(coefficients=torch.zeros(2, 0, 5, 4)), ValueError, r"coefficients must have shape \(2, r, 5, 4\)"),
        (dict(coefficients=torch.zeros(5, 4)), ValueError, "coefficients must have shape"),
        (dict(projector=torch.zeros(2, 5, 4)), ValueError, r"projector must have shape \(2, 5, 3\)"),
        (dict(base_fn=nn.SiLU()), ValueError, "must be given together"),
        (dict(scale_base=torch.zeros(2, 3, 5)), ValueError, "must be given together"),
        (dict(base_fn=nn.SiLU(), scale_base=torch.zeros(2, 3, 4)), ValueError, "scale_base must have shape"),
        (dict(basis=make_basis("rational")), ValueError, "the rational basis is not linear"),
    ],
    ids=str,
)
def test_arguments_that_do_not_fit(change, kind, message):
    names = ("query", "key", "value", "coefficients", "projector")
    fitting = dict(zip(names, inputs(FourierBasis(2)))) | dict(basis=FourierBasis(2))
    attention(**fitting)
    with pytest.raises(kind, match=f"attention: .*{message}"):
        attention(**fitting | change)


@pytest.mark.parametrize("base_fn", [None, nn.SiLU(), nn.PReLU()], ids=str)
@pytest.mark.parametrize("mode", ["phi1_w2", "w1_phi2"])
@pytest.mark.parametrize("name", LINEAR)
def test_the_direct_order_is_sigma_of_the_scores_times_v(name, mode, base_fn):
    op = operator(name, mode=mode, base_fn=base_fn, output_scale="learned")
    q, k, v = (torch.randn(3, 2, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    live = {"q": q, "k": k, "v": v, **{name: p for name, p in op.named_parameters() if p.requires_grad}}
    assert op.direct and len(live) > 6
    outs = op.attend_directly(q, k, v, 0.5), op(q @ k.mT * 0.5) @ v
    torch.testing.assert_close(*outs, rtol=1e-9, atol=1e-9)
    found, want = (torch.autograd.grad(out.square().sum(), list(live.values())) for out in outs)
    for key, f, w in zip(live, found, want):
        torch.testing.assert_close(f, w, rtol=1e-8, atol=1e-8, msg=key)


def test_configurations_that_are_not_direct():
    for options in (dict(depth=3), dict(depth=1), dict(modular=False), dict(project_l1=True), dict(name="rational")):
        assert not operator(**options).direct


def test_phi_after_the_projection_is_as_exact_as_before_and_linear_in_memory():
    N, h, d = 160, 2, 16
    op = randomised(KArAtOperator(N, h, FourierBasis(3), 4, mode="w1_phi2")).float()
    q, k, v = (torch.randn(2, h, N, d, requires_grad=True) for _ in range(3))
    with torch.no_grad():
        before = op.attend(definition.attention_scores(q, k, d**-0.5), v)
        want = copy.deepcopy(op).double()((q.double() @ k.double().mT) * d**-0.5) @ v.double()
    with Largest() as largest:
        out = op.attend_directly(q, k, v, d**-0.5)
        out.square().sum().backward()
    assert error(out, want) <= 2 * error(before, want) + 1e-7
    assert largest.elements < 2 * h * N * N / 2
    with torch.autocast("cpu", torch.bfloat16):
        half = op.attend_directly(*(t.bfloat16() for t in (q, k, v)), d**-0.5)
    assert half.dtype == torch.bfloat16 and error(half, want) < 0.1


# ---- which tensors the kernels take


@pytest.fixture
def choose(monkeypatch):
    """Chooses a kernel, also where it cannot run; Triton counts as installed, and warnings come again."""
    kernels._warned.clear()
    monkeypatch.setattr(launch, "_triton", lambda: "")
    definition._refusal_once.cache_clear()
    yield lambda choice: monkeypatch.setattr(kernels, "_choice", choice)
    definition._refusal_once.cache_clear()


def fake(basis=None, base_fn=None, shape=(2, 2, 37, 16), r=5, dtype=torch.bfloat16):
    """The arguments of `attention`, as fake tensors on a GPU."""
    (_, h, N, _), basis = shape, basis or FourierBasis(3)
    with FakeTensorMode():
        c, w, s = (
            torch.empty(size, device="cuda") for size in ((h, r, N, basis.num_coefficients), (h, N, r), (h, r, N))
        )
        q = torch.empty(shape, device="cuda", dtype=dtype)
    return q, q, q, c, w, basis, None, base_fn, s if base_fn else None


def run_fake(arguments):
    with arguments[0].fake_mode:
        return attention(*arguments)


class Doubled(FourierBasis):
    """Another basis, whose features are not those of the kernels."""

    def features(self, x, dim=-1):
        return 2 * super().features(x, dim)


REFUSED = {
    "not float64": dict(dtype=torch.float64),
    "heads of up to 128 channels, not 129": dict(shape=(1, 1, 3, 129)),
    "rank of up to 64, not 65": dict(r=65),
    "up to 64 features, not 66": dict(basis=FourierBasis(33)),
    "splines of order 1 to 5, not 0": dict(basis=make_basis("spline", order=0)),
    "splines of order 1 to 5, not 6": dict(basis=make_basis("spline", order=6)),
    "do not know the basis fourier": dict(basis=Doubled(3)),
    "base function, of the class Softplus": dict(base_fn=nn.Softplus()),
    "base function, of the class GELU": dict(base_fn=nn.GELU(approximate="tanh")),
}


def assert_falls_back(choose, reason, arguments):
    """cuda raises, auto warns once, torch computes in silence."""
    choose("cuda")
    with pytest.raises(ValueError, match=f"the kernel 'cuda' was chosen, but the CUDA kernels cannot run: .*{reason}"):
        run_fake(arguments)
    choose("auto")
    with pytest.warns(UserWarning, match=f"Kolmogorov-Arnold attention runs in plain PyTorch, .*{reason}"):
        out = run_fake(arguments)
    assert out.shape == arguments[0].shape and out.dtype == arguments[0].dtype and out.device.type == "cuda"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run_fake(arguments)
        kernels._warned.clear()
        choose("torch")
        run_fake(arguments)


@pytest.mark.parametrize("reason", REFUSED)
def test_tensors_that_the_kernels_do_not_take(reason, choose):
    assert_falls_back(choose, reason, fake(**REFUSED[reason]))


def test_kernels_that_are_missing(choose, monkeypatch):
    monkeypatch.setattr(launch, "_triton", lambda: "Triton is not installed")
    assert_falls_back(choose, "Triton is not installed", fake())


def test_results_of_fake_tensors(choose):
    """Memory order (B, N, h, d), for each of the bases and base functions that the kernels know."""
    choose("cuda")
    for name in LINEAR:
        for base_fn in BASE.values():
            arguments = fake(make_basis(name), base_fn)
            out = run_fake(arguments)
            assert out.stride() == (37 * 32, 16, 32, 1) and out.dtype == torch.bfloat16
    assert run_fake(fake(shape=(0, 2, 37, 16))).shape == (0, 2, 37, 16)


@pytest.mark.parametrize(
    "change", [dict(N=4), dict(r=2), dict(dtype=torch.float64), dict(d=0), dict(device="meta")], ids=str
)
def test_operators_refuse_what_they_were_not_made_for(change):
    given = dict(N=5, r=3, d=8, dtype=torch.float32, device="cpu") | change
    q = torch.empty(2, 2, 5, given["d"], dtype=given["dtype"])
    c = torch.empty(2, 4, given["N"], 3, device=given["device"])
    with pytest.raises(ValueError, match="kan::attention cannot take q"):
        operators._forward_operator(q, q, q, c, torch.empty(2, 5, given["r"]), 1.0, "fourier", 0, 0.0, 1.0, "")


# ---- the operators in Triton's interpreter


def test_operators_in_the_interpreter():
    if INTERPRETED or launch.no_triton():
        pytest.skip(launch.no_triton() or "this process interprets them")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "test_interpreted", __file__]
    env = os.environ | {"TRITON_INTERPRET": "1", "KAN_KERNEL": "cuda"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    count = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0 and count and int(count[1]) >= len(CASES) + 7, done.stdout[-8000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout and "failed" not in done.stdout, done.stdout[-2000:]


CASES = {  # basis, its options, base function, (B, h, N, d), r, deviation of q and k
    "fourier": ("fourier", dict(grid=3), "", (2, 2, 37, 16), 12, 1.0),
    "large scores": ("fourier", dict(grid=3), "", (1, 2, 37, 16), 12, 5.0),
    "groups of features": ("fourier", dict(grid=11), "identity", (1, 1, 37, 16), 5, 1.0),
    "one token": ("fourier", dict(grid=1), "gelu", (2, 1, 1, 64), 1, 1.0),
    "several blocks": ("fourier", dict(grid=1), "silu", (1, 1, 70, 24), 20, 1.0),
    "parts of the batch": ("fourier", dict(grid=1), "", (8, 4, 2, 16), 1, 1.0),
    "chebyshev": ("chebyshev", dict(order=3), "identity", (3, 2, 2, 16), 5, 1.0),
    "chebyshev groups": ("chebyshev", dict(order=9), "relu", (1, 1, 37, 24), 5, 1.0),
    "radial": ("radial", dict(grid=4, grid_range=(-1, 2)), "", (1, 2, 37, 16), 12, 1.0),
    "radial groups": ("radial", dict(grid=8), "silu", (1, 1, 37, 16), 1, 5.0),
    "spline": ("spline", dict(grid=3, order=3), "silu", (1, 2, 37, 16), 12, 1.0),
    "spline of order 1": ("spline", dict(grid=4, order=1), "", (1, 1, 37, 16), 5, 5.0),
    "spline of order 2": ("spline", dict(grid=2, order=2), "gelu", (1, 1, 2, 64), 20, 1.0),
    "spline of order 5": ("spline", dict(grid=1, order=5, grid_range=(-3, 3)), "relu", (1, 1, 37, 16), 5, 1.0),
}


@interpreted
@pytest.mark.parametrize("case", CASES)
def test_interpreted_operator_is_the_definition(case, monkeypatch):
    name, options, base, shape, r, size = CASES[case]
    basis = make_basis(name, **options)
    tensors = inputs(basis, shape, r, base, size=size)
    found = results(tensors, basis, base)
    monkeypatch.delitem(operators.DEVICES, "cpu")
    plain, want = results(tensors, basis, base), exact(tensors, basis, base)
    if case == "large scores":
        assert (tensors[0] @ tensors[1].mT).abs().max() * shape[-1] ** -0.5 > 80
    assert set(found) == set(want) and len(found) == 6 + bool(base)
    for result in want:
        assert found[result].dtype == torch.float32 and found[result].shape == want[result].shape
        # A sum of values of both signs that nearly cancel has few digits in any arithmetic.
        assert error(found[result], want[result]) <= 3 * error(plain[result], want[result]) + 1e-6, result


@interpreted
def test_interpreted_operator_writes_all_results_and_nothing_else(monkeypatch):
    """Every tensor that is allocated lies between guards, and holds NaN at first."""
    basis, guarded = FourierBasis(2), []
    tensors = inputs(basis, (2, 2, 37, 24), 5, "silu")
    want = results(tensors, basis, "silu")

    def room(shape, dtype):
        count = torch.Size(shape).numel()
        whole = torch.full((count + 128,), 7.0, dtype=dtype)
        whole[64 : 64 + count] = float("nan")
        guarded.append(whole)
        return whole[64 : 64 + count].view(shape)

    def new_empty(self, *shape, dtype=None, **_):
        return room(shape[0] if isinstance(shape[0], (tuple, torch.Size)) else shape, dtype or self.dtype)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", lambda *shape, dtype=None, **_: room(shape, dtype))
        patch.setattr(torch, "empty_like", lambda t, **_: room(t.shape, t.dtype))
        patch.setattr(torch.Tensor, "new_empty", new_empty)
        found = results(tensors, basis, "silu")
    assert len(guarded) >= 9
    for whole in guarded:
        assert (whole[:64] == 7).all() and (whole[-64:] == 7).all()
    for result in want:
        assert torch.equal(found[result], want[result]), result


@interpreted
@pytest.mark.parametrize("options", [{}, dict(mixed_head=True, universal=True, output_scale="sqrt", karat_blocks="0")])
def test_interpreted_model_is_the_definition(options, monkeypatch):
    model = timm.create_model("vit_micro_patch8_32_karat", num_classes=10, depth=1, embed_dim=32, grid=1, **options)
    images, calls = torch.randn(1, 3, 32, 32), []
    forward = launches.forward
    monkeypatch.setattr(launches, "forward", lambda *args: calls.append(args) or forward(*args))

    def gradients(run, images=images):
        run.zero_grad()
        out = run(images)
        out.square().sum().backward()
        return {"out": out.detach(), **{n: p.grad for n, p in run.named_parameters() if p.requires_grad}}

    found = gradients(model)
    assert len(calls) == 1
    again = copy.deepcopy(model)
    again.set_grad_checkpointing(True)
    compiled = copy.deepcopy(model)
    compiled.forward = torch.compile(compiled.forward, backend="aot_eager", fullgraph=True)
    others = {"checkpoint": gradients(again), "compiled": gradients(compiled)}
    monkeypatch.delitem(operators.DEVICES, "cpu")
    want = gradients(copy.deepcopy(model).double(), images.double())
    assert len(calls) >= 3
    for name in want:
        assert error(found[name], want[name]) < 1e-5, name
        for kind, other in others.items():
            torch.testing.assert_close(other[name], found[name], rtol=1e-5, atol=1e-6, msg=f"{kind} {name}")


def operator_arguments(device, dtype=torch.float32, grid=2, shape=(2, 2, 5, 16), r=3):
    """The arguments of kan::attention."""
    q, k, v, c, w, _ = inputs(FourierBasis(grid), shape, r, dtype=dtype, device=device)
    live = [t.detach().requires_grad_() for t in (q, k, v, c.permute(0, 3, 2, 1), w)]
    return (*live, shape[-1] ** -0.5, "fourier", 0, 0.0, 1.0, "")


def check_operator(device, dtype=torch.float32) -> None:
    """Schema, strides of the fake kernels, registration and compiled derivatives."""
    arguments = operator_arguments(device, dtype)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.kan.attention.default, arguments, test_utils=tests)
    with torch.no_grad():
        out, *saved = torch.ops.kan.attention(*arguments)
        plain = [t.detach() for t in arguments[:3]]
        backward = (torch.randn_like(out), *plain, *saved, 3, *arguments[5:])
        torch.library.opcheck(torch.ops.kan.attention_backward.default, backward, test_utils=tests[:2])


@interpreted
def test_interpreted_operators_keep_their_contract():
    check_operator("cpu")
    arguments = operator_arguments("cpu")
    with pytest.raises(RuntimeError, match="attention is differentiable once"):
        torch.autograd.grad(torch.ops.kan.attention(*arguments)[0].sum(), arguments[0], create_graph=True)
    tensors, basis = inputs(FourierBasis(2)), FourierBasis(2)
    live = [t.detach().requires_grad_() for t in tensors[:5]]
    with pytest.raises(RuntimeError, match="attention is differentiable once"):
        torch.autograd.grad(attention(*live, basis).sum(), live, create_graph=True)
    with pytest.raises(ValueError, match="kan::attention cannot take q"):
        torch.ops.kan.attention(arguments[0], arguments[1], arguments[2][..., :8], *arguments[3:])


@interpreted
def test_interpreted_paths_agree():
    """Autograd function, operator behind the dispatcher, compiled, checkpointed, without gradients, several at once."""
    basis = FourierBasis(2)
    tensors = inputs(basis, (2, 2, 5, 16), 3)
    want = results(tensors, basis)

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        seen = set()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.seen.add(str(function))
            return function(*args, **(kwargs or {}))

    with Watch():
        watched = results(tensors, basis)
    assert {"kan.attention.default", "kan.attention_backward.default"} <= Watch.seen
    others = {"watched": watched}
    run = torch.compile(attention, fullgraph=True, backend="aot_eager", dynamic=True)
    others["compiled"] = results(tensors, basis, function=run)
    others["checkpoint"] = results(
        tensors, basis, function=lambda *arguments: checkpoint(attention, *arguments, use_reentrant=False)
    )
    for kind, found in others.items():
        for name in want:
            assert torch.equal(found[name], want[name]), (kind, name)
    with torch.no_grad():
        assert torch.equal(attention(*tensors[:5], basis), want["out"])
    live = [t.detach().requires_grad_() for t in tensors[:5]]
    directions = torch.randn(2, *want["out"].shape)
    batched = torch.autograd.grad(attention(*live, basis), live, directions, is_grads_batched=True)
    for index, direction in enumerate(directions):
        for own, expected in zip(batched, torch.autograd.grad(attention(*live, basis), live, direction)):
            assert torch.equal(own[index], expected)
    with torch.autograd.forward_ad.dual_level(), pytest.raises((NotImplementedError, RuntimeError)):
        attention(torch.autograd.forward_ad.make_dual(tensors[0], tensors[1]), *tensors[1:5], basis)


@interpreted
def test_interpreted_dtypes_and_empty_batches():
    basis = FourierBasis(2)
    tensors = inputs(basis)
    half = [t.bfloat16() for t in tensors[3:5]]  # coefficients of another type; operands are float32
    found = results((*tensors[:3], *half, None), basis)
    want = results((*tensors[:3], *(t.float() for t in half), None), basis)
    assert {found["dcoefficients"].dtype, found["dprojector"].dtype} == {torch.bfloat16}
    assert torch.equal(found["out"], want["out"]) and error(found["dprojector"], want["dprojector"].double()) < 0.01
    empty = results((*(t[:0] for t in tensors[:3]), *tensors[3:]), basis)
    assert empty["out"].shape == (0, 2, 5, 8) and not empty["dcoefficients"].any() and not empty["dprojector"].any()


@interpreted
def test_interpreted_export_takes_the_definition(monkeypatch):
    model = timm.create_model("vit_micro_patch8_32_karat", num_classes=10, depth=1, embed_dim=32, grid=1).eval()
    images = torch.randn(3, 3, 32, 32)
    exported = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    assert "kan.attention" not in str(exported.graph)
    torch.testing.assert_close(exported.module()(images), model(images), rtol=1e-4, atol=1e-4)


# ---- the kernels, compiled without a GPU

FUNCTION = dict(P=6, F=6, ORDER=0, BASIS="fourier", BASE="", FAST=True, D=64, R=16, BLOCK_D=64)
LAUNCHED = {
    "pack_kernel": dict(BLOCK=launches.ROWS, num_warps=2),
    "project_kernel": dict(BLOCK=launches.ROWS, num_warps=4),
    "forward_kernel": launches.FORWARD[0],
    "backward_query_kernel": launches.BACKWARD_QUERY[0],
    "backward_key_kernel": dict(FIRST=0, COUNT=6, **launches.BACKWARD_KEY[0]),
}


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("architecture", (80, 90, 100, 120))
def test_compiles_without_local_memory(architecture, tmp_path, monkeypatch):
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from cuda import attention_kernels

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        pytest.skip("Triton has no cuobjdump here")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    floats = {"A", "W", "PARTS", "SUMS"}
    for name, constants in LAUNCHED.items():
        kernel = getattr(attention_kernels, name)
        parameters = list(inspect.signature(kernel.fn).parameters)
        constants = FUNCTION | constants
        signature = {p: "fp32" if p in ("scale", "low", "step") else "i32" for p in parameters}
        signature |= {p: "*fp32" if p in floats else "*bf16" for p in parameters if p.isupper()}
        signature |= {p: "i32" for p in ("N", "PADDED", "H", "B") if p in parameters}
        signature |= {p: "constexpr" for p in parameters if p in constants}
        source = ASTSource(
            kernel, signature, {(parameters.index(p),): constants[p] for p in parameters if p in constants}
        )
        options = {key: constants[key] for key in ("num_warps", "num_stages") if key in constants}
        compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
        file = tmp_path / f"{name}.cubin"
        file.write_bytes(compiled.asm["cubin"])
        usage = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True).stdout
        registers, stack = (int(re.search(rf"{what}:(\d+)", usage)[1]) for what in ("REG", "STACK"))
        assert 0 < registers <= 255 and compiled.metadata.shared <= 99 << 10, (name, usage)
        # backward_key keeps the sums of all features, and its registers do not suffice.
        assert stack <= (1280 if name == "backward_key_kernel" else 0), (name, usage)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("dtype, d, rank, grid", [("fp32", 64, 32, 3), ("bf16", 64, 12, 11), ("bf16", 128, 33, 4)])
def test_configurations_fit_in_the_shared_memory_of_small_gpus(dtype, d, rank, grid, tmp_path, monkeypatch):
    """99 KiB. As on a GPU, addresses and strides are multiples of 16."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from cuda import attention_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(launch, "shared_memory", lambda device: 99 << 10)
    q = torch.empty(1, 1, 70, d, dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
    assert launches.too_large(d, rank, 2 * grid, q.element_size(), 0) == ""
    sizes = launches.Shapes(q, rank, 2 * grid, "fourier", 0, "")
    fixed = sizes.function | {name: sizes.sizes[name] for name in ("D", "R", "BLOCK_D")} | dict(FAST=dtype != "fp32")
    for kernel, configs in (
        (attention_kernels.forward_kernel, launches.FORWARD),
        (attention_kernels.backward_query_kernel, launches.BACKWARD_QUERY),
        (attention_kernels.backward_key_kernel, launches.BACKWARD_KEY),
    ):
        config = launches._fitting(configs, q, sizes)
        constants = fixed | {k: v for k, v in config.items() if k.startswith("BLOCK")}
        if kernel is attention_kernels.backward_key_kernel:
            constants |= dict(FIRST=0, COUNT=min(launches.MAX_SUMS, 2 * grid))
        names = kernel.arg_names
        signature = {p: "constexpr" if p in constants else "i32" for p in names}
        signature |= {p: f"*{dtype}" for p in names if p.isupper() and p not in (*constants, "N", "PADDED", "H", "B")}
        signature |= {p: "*fp32" for p in names if p in ("PARTS", "SUMS")}
        signature |= {p: "fp32" for p in names if p in ("scale", "low", "step")}
        hints = {(i,): [["tt.divisibility", 16]] for i, p in enumerate(names) if p[0] == "s" or signature[p][0] == "*"}
        hints = {key: hint for key, hint in hints.items() if signature[names[key[0]]] not in ("fp32", "constexpr")}
        source = ASTSource(kernel, signature, {(names.index(p),): v for p, v in constants.items()}, hints)
        options = dict(num_warps=config["num_warps"], num_stages=config["num_stages"])
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        assert compiled.metadata.shared <= 99 << 10, (kernel.fn.__name__, config, compiled.metadata.shared)


def test_what_fits_nowhere_is_refused(monkeypatch):
    monkeypatch.setattr(launch, "shared_memory", lambda device: 99 << 10)
    reason = launches.too_large(128, 64, 64, 4, 0)
    assert re.fullmatch(r"64 features of rank 64 need \d+ KiB of shared memory", reason)


def test_a_subclass_with_another_function_has_no_kernel():
    class Other(FourierBasis):
        def features(self, x, dim=-1):
            return 2 * super().features(x, dim)

    class Mixin:
        def features(self, x, dim=-1):
            return FourierBasis.features(self, x, dim)

    class Mixed(Mixin, FourierBasis):
        pass

    class Same(FourierBasis):
        pass

    class Quotient(RationalBasis):
        def __call__(self, x, theta):
            return 2 * super().__call__(x, theta)

    assert Other().kernel is Mixed().kernel is Quotient().edge_function is None
    assert Same().kernel == FourierBasis().kernel and RationalBasis().edge_function == ("rational_B", 5, 4)


def test_a_missing_package_of_kernels_is_named(choose, monkeypatch):
    monkeypatch.setattr(kernels, "attention", None)
    monkeypatch.setattr(kernels, "missing", "the package is not there")
    choose("cuda")
    with pytest.raises(ValueError, match="the package is not there"):
        attention(*fake()[:5], FourierBasis(3))


def test_meta_tensors():
    tensors = [None if t is None else t.to("meta") for t in inputs(FourierBasis(2))[:5]]
    assert attention(*tensors, FourierBasis(2)).shape == (2, 2, 5, 8)


@interpreted
def test_interpreted_splines_at_knots_have_the_slopes_of_half_open_cells():
    basis = make_basis("spline", grid=4, order=1, grid_range=(-2, 2))
    q, k, v, c, w, _ = inputs(basis, (1, 2, 5, 16), 3)
    want, found = (function((0 * q, k, v, c, w, None), basis) for function in (exact, results))
    assert all(error(found[name], want[name]) < 1e-5 for name in want)
