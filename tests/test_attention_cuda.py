"""The operators of Kolmogorov-Arnold attention on a GPU, against the definition in float64."""

import random

import pytest
import timm
import torch
from torch.utils.checkpoint import checkpoint

import models  # noqa: F401
from cuda import attention as launches
from kan_basis import FourierBasis, attention, kernels, make_basis
from kan_basis.layer import KANLayer
from tests.test_attention import BASE, LINEAR, check_operator, error, exact, inputs, results

pytestmark = pytest.mark.gpu
BOUNDS = {  # largest relative errors of the output and of a gradient
    torch.float32: (2e-5, 1e-4),
    torch.float16: (5e-3, 1e-2),
    torch.bfloat16: (5e-3, 1e-2),
}


@pytest.fixture(autouse=True)
def kernels_only(monkeypatch):
    """Where a kernel does not run, a test fails."""
    monkeypatch.setattr(kernels, "_choice", "cuda")


def on_gpu(*args, **kwargs):
    return inputs(*args, device="cuda", **kwargs)


def poison() -> None:
    """What torch hands out next as uninitialised memory holds NaN."""
    for count in (1 << 26, 1 << 22, 1 << 18):
        torch.full((count,), float("nan"), device="cuda")
        torch.full((count // 256,), float("nan"), device="cuda")  # of the pool of small blocks


def assert_exact(tensors, basis, base, scale=None, case="") -> None:
    dtype, want = tensors[0].dtype, exact(tensors, basis, base, scale)
    poison()
    found = results(tensors, basis, base, scale=scale)
    again = results(tensors, basis, base, scale=scale)
    plain = None
    for name in want:
        assert found[name].isfinite().all() and torch.equal(found[name], again[name]), (case, name)
        allowed = BOUNDS[dtype][name != "out"]
        if error(found[name], want[name]) > allowed:  # a sum that nearly cancels has few digits in any arithmetic
            kernels._choice = "torch"
            plain = plain or results(tensors, basis, base, scale=scale)
            kernels._choice = "cuda"
            allowed = max(allowed, 3 * error(plain[name], want[name]))
        assert error(found[name], want[name]) <= allowed, (case, name, error(found[name], want[name]), allowed)


@pytest.mark.parametrize("tokens", [197, 1025])
@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_errors(dtype, name, tokens):
    for base in ("", "silu"):
        basis = make_basis(name)
        tensors, bound = on_gpu(basis, (4, 3, tokens, 64), 12, base, dtype=dtype), BOUNDS[dtype]
        want = exact(tensors, basis, base)
        poison()
        found = results(tensors, basis, base)
        errors = {result: error(found[result], want[result]) for result in want}
        assert all(e <= bound[result != "out"] for result, e in errors.items()), errors
        assert all(found[result].dtype == t.dtype for result, t in zip(("dq", "dk", "dv", "dcoefficients"), tensors))


def random_basis(draw: random.Random):
    name = draw.choice(LINEAR)
    if name == "fourier":
        return make_basis(name, grid=draw.choice([1, 2, 3, 4, 5, 11, 20]))
    if name == "chebyshev":
        return make_basis(name, order=draw.choice([1, 2, 3, 5, 9]))
    lo = draw.uniform(-3, 0)
    grid_range = (lo, lo + draw.uniform(0.5, 4))
    if name == "radial":
        return make_basis(name, grid=draw.choice([2, 3, 5, 8, 17]), grid_range=grid_range)
    return make_basis(name, grid=draw.choice([1, 2, 3, 6]), order=draw.randint(1, 5), grid_range=grid_range)


def strided(draw: random.Random, t: torch.Tensor) -> torch.Tensor:
    """t with other strides: as it is, contiguous, a part of wider rows, or transposed in memory."""
    kind = draw.randrange(5)
    if kind == 0:
        return t.contiguous()
    if kind == 1:  # rows that do not begin at multiples of 16 bytes
        return torch.nn.functional.pad(t, (draw.randint(0, 3), draw.randint(1, 3))).narrow(-1, 0, t.shape[-1])
    if kind == 2:
        return t.mT.contiguous().mT
    if kind == 3:
        return t.repeat_interleave(2, 0)[::2]
    return t


@pytest.mark.parametrize("part", range(40))
def test_400_random_configurations(part):
    draw = random.Random(part)
    for case in range(10 * part, 10 * part + 10):
        basis, base, dtype = random_basis(draw), draw.choice(list(BASE)), draw.choice(list(BOUNDS))
        N = draw.choice([1, 2, 3, 15, 16, 17, 31, 37, 63, 64, 65, 70, 113, 128, 196, 197, 257, 300])
        d = draw.choice([1, 3, 8, 16, 24, 32, 40, 48, 64, 64, 72, 80, 96, 127, 128])
        r = draw.choice([1, 2, 5, 8, 12, 12, 16, 17, 20, 32, 33, 64])
        shape = draw.choice([1, 2, 3, 9, 17]), draw.choice([1, 2, 3, 5]), N, d
        torch.manual_seed(case)
        tensors = on_gpu(basis, shape, r, base, dtype=dtype, size=draw.choice([0.3, 1.0, 2.0]))
        tensors = [None if t is None else strided(draw, t) for t in tensors]
        scale = draw.choice([None, 0.2 * d**-0.5])
        assert_exact(tensors, basis, base, scale, (case, basis, base, dtype, shape, r))


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_large_scores(dtype):
    basis = FourierBasis(3)
    tensors = on_gpu(basis, (2, 3, 197, 64), 12, dtype=dtype, size=5.0)
    assert (tensors[0].float() @ tensors[1].float().mT).abs().max() / 8 > 100
    assert_exact(tensors, basis, "")


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_gradients_with_any_strides(dtype):
    basis = FourierBasis(3)
    tensors = on_gpu(basis, (2, 3, 197, 64), 12, dtype=dtype)
    dense = torch.randn(2, 3, 197, 64, device="cuda", dtype=dtype)
    one = torch.ones((), device="cuda", dtype=dtype).expand(dense.shape)
    padded = torch.nn.functional.pad(dense, (1, 2))[..., 1:-2]
    for grad in (dense, dense.transpose(1, 2).contiguous().transpose(1, 2), dense.mT.contiguous().mT, one, padded):
        found, want = (results(tensors, basis, grad=g) for g in (grad, grad.contiguous()))
        for name in want:  # which kernel runs may depend on the strides
            assert error(found[name], want[name].double()) < BOUNDS[dtype][1], name


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_memory_is_linear_in_the_tokens(dtype):
    peaks, basis = [], FourierBasis(3)
    for N in (1024, 2048):
        tensors = on_gpu(basis, (1, 4, N, 64), 12, dtype=dtype)
        for _ in range(2):
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            results(tensors, basis)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < 2.2 * peaks[0] and peaks[1] < 4 * 2048 * 2048 * 4


def test_streams_graphs_and_compilation():
    basis = FourierBasis(3)
    tensors = on_gpu(basis, (3, 3, 197, 64), 12, dtype=torch.bfloat16)[:5]
    want = results((*tensors, None), basis)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        busy = torch.randn(4096, 4096, device="cuda")
        for _ in range(20):
            busy = busy @ busy * 1e-3
        late = [torch.where(busy.sum().isnan(), t, t) * 1 for t in tensors]  # known only after the products
        found = results((*late, None), basis)
    torch.cuda.current_stream().wait_stream(side)
    assert all(torch.equal(found[name], want[name]) for name in want)

    live = [t.detach().clone().requires_grad_() for t in tensors]
    grad = torch.cos(torch.arange(want["out"].numel(), device="cuda")).view(want["out"].shape).bfloat16()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention(*live, basis)
        gradients = torch.autograd.grad(out, live, grad)
    for _ in range(3):
        for t in (out, *gradients):
            t.detach().fill_(float("nan"))
        graph.replay()
        assert all(torch.equal(got, want[name]) for name, got in zip(want, (out, *gradients)))

    for mode in ("default", "reduce-overhead"):
        torch.compiler.reset()
        compiled = torch.compile(attention, fullgraph=True, mode=mode)
        for _ in range(3):
            found = results((*tensors, None), basis, function=compiled)
            assert all(torch.equal(found[name], want[name]) for name in want), mode
    check_operator("cuda")
    check_operator("cuda", torch.bfloat16)


def test_autocast_checkpoint_and_empty_batches():
    basis = FourierBasis(3)
    tensors = on_gpu(basis, (2, 3, 37, 64), 12)
    half = [t.bfloat16() for t in tensors[:3]]
    with torch.autocast("cuda", torch.bfloat16):
        out = attention(*tensors[:5], basis)
    assert out.dtype is torch.bfloat16 and torch.equal(out, attention(*half, *tensors[3:5], basis))
    want = results(tensors, basis)
    found = results(tensors, basis, function=lambda *a: checkpoint(attention, *a, use_reentrant=False))
    assert all(torch.equal(found[name], want[name]) for name in want)
    empty = results((*(t[:0] for t in tensors[:3]), *tensors[3:]), basis)
    assert empty["out"].shape == (0, 3, 37, 64) and not empty["dcoefficients"].any() and not empty["dprojector"].any()
    assert out.transpose(1, 2).is_contiguous()
    live = [t.detach().requires_grad_() for t in tensors[:5]]
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(attention(*live, basis).sum(), live, create_graph=True)


def test_more_heads_of_images_than_a_dimension_of_a_grid():
    basis = FourierBasis(1)
    tensors = on_gpu(basis, (8200, 8, 3, 8), 2)
    found, want = results(tensors, basis), exact(tensors, basis)
    assert all(error(found[name], want[name]) < 1e-4 for name in want)


def test_second_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    basis = FourierBasis(3)
    for dtype in BOUNDS:
        tensors = on_gpu(basis, (2, 3, 37, 64), 12, dtype=dtype)[:5]
        first = results((*tensors, None), basis)
        second = results((*(t.to("cuda:1") for t in tensors), None), basis)
        assert all(torch.equal(second[name].cpu(), first[name].cpu()) for name in first)


@pytest.mark.parametrize(
    "options",
    [{}, dict(universal=True, output_scale="learned"), dict(mixed_head=True, basis_type="spline", base_fn="nn.SiLU")],
    ids=str,
)
def test_models_with_kernels_and_without(options, monkeypatch):
    calls, forward = [], launches.forward
    monkeypatch.setattr(launches, "forward", lambda *args: calls.append(1) or forward(*args))
    images, found = torch.randn(4, 3, 224, 224, device="cuda"), {}
    model = timm.create_model("vit_tiny_patch16_224_karat", depth=2, karat_init="scaled", **options).cuda()
    for choice in ("torch", "cuda"):
        monkeypatch.setattr(kernels, "_choice", choice)
        assert not calls
        model.zero_grad()
        out = model(images)
        out.square().mean().backward()
        found[choice] = {"out": out.detach()} | {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert len(calls) == 2
    for name, want in found["torch"].items():
        assert error(found["cuda"][name], want.double()) < 1e-3 or want.norm() < 1e-6, name
    compiled = torch.compile(model, fullgraph=not options.get("mixed_head"))
    with torch.autocast("cuda", torch.bfloat16):
        outs = model(images), compiled(images)
    assert error(outs[1], outs[0].double()) < 0.05 and error(outs[0], found["torch"]["out"].double()) < 0.1


def test_scores_never_wait_for_the_host():
    """A call neither synchronises nor copies the coefficients in front of the kernels."""
    layer, (q, k, v, _, w, _) = KANLayer(37, 5, FourierBasis(2), 2).cuda(), on_gpu(FourierBasis(2), (2, 2, 37, 16), 5)
    attention(q, k, v, layer.scaled_coefficients, w, layer.basis).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        attention(q, k, v, layer.scaled_coefficients, w, layer.basis).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
