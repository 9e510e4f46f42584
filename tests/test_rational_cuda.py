"""The CUDA kernels of the rational function.

Without a GPU they are compiled, their arithmetic runs on the host, and fake tensors stand for those on a GPU.
"""

import ctypes
import importlib.util
import math
import shutil
import subprocess
import types
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cuda import launch
from cuda import rational as kernel
from kan_basis import GroupRational, kernels, rational
from kan_basis.group_rational import preset_coefficients
from kan_basis.quotient import Rational, evaluate
from tests.test_rational import NAMES, results

definition = importlib.import_module("kan_basis.rational")  # the module, not the function of that name in the package
gpu = pytest.mark.gpu
CASES = {  # shape, channel dimension, rows of numerator and denominator
    "kat": ((64, 197, 768), -1, 1, 8),
    "shared": ((3, 5, 768), -1, 8, 1),
    "one": ((2, 3, 64), -1, 1, 1),
    "channels": ((7, 33, 24), -1, 24, 24),
    "other rows": ((7, 33, 24), -1, 3, 8),
    "tail": ((1, 8), -1, 1, 8),
    "scalar": ((131072 + 16, 1), -1, 1, 1),
    "odd": ((4, 100, 1000), -1, 1, 8),
    "many": ((4, 10, 1000), -1, 1000, 1),
    "images": ((8, 64, 56, 56), 1, 8, 8),
    "odd images": ((2, 64, 17, 19), 1, 1, 8),
    "many of images": ((2, 1000, 9, 9), 1, 1, 1000),
    "segments": ((2, 37, 64, 64), 1, 1, 37),
    "vector": ((512,), -1, 1, 8),
    "one for each of 3072": ((64, 197, 3072), -1, 3072, 3072),
    "one numerator for 3072": ((3, 50, 3072), -1, 1, 3072),
    "one denominator for 4096": ((40, 9, 4096), -1, 4096, 1),
    "one for each of 4095": ((2, 9, 4095), -1, 4095, 4095),
    "images of 3072 channels": ((2, 3072, 7, 7), 1, 1, 3072),
    "small images of 4000 channels": ((3, 4000, 3, 3), 1, 4000, 1),
}


def instances() -> list[str]:
    """Template instances: degrees 5 and 4 in all types and layouts, 8/8 and 3/2 in float."""
    names = []
    for kind, (threads, blocks, stages) in kernel.CONFIG.items():
        for name in kernel.TYPES.values():
            for layout in ("true, false", "true, true", "false, false", "false, true"):
                for m, n in ((5, 4), *(((8, 8), (3, 2)) if name == "float" and layout == "true, false" else ())):
                    depth = stages - (kind == "backward" and m + n > 11)
                    names.append(f"rational_{kind}_kernel<{name}, {m}, {n}, {layout}, {threads}, {blocks}, {depth}>")
    return names


ARCHITECTURES = (80, 90, 100, 120)


@pytest.fixture(scope="module")
def compiled():
    """Future of (log, bytes) for each architecture, two at a time."""
    pytest.importorskip("cupy")
    from cupy.cuda import nvrtc

    folders = [
        Path(path, "include")
        for root in importlib.util.find_spec("nvidia").submodule_search_locations
        for path in Path(root).iterdir()
    ]
    headers = next(folder for folder in folders if (folder / "cuda_bf16.h").exists())

    def compile(architecture):
        if architecture > max(80, *nvrtc.getSupportedArchs()):
            return "this NVRTC does not know it", None
        program = nvrtc.createProgram(launch.source("rational.cu"), "rational.cu", (), ())
        for name in instances():
            nvrtc.addNameExpression(program, name)
        try:
            nvrtc.compileProgram(
                program, [*launch.OPTIONS, f"-arch=sm_{architecture}", f"-I{headers}", "--ptxas-options=-v"]
            )
        except nvrtc.NVRTCError:
            return nvrtc.getProgramLog(program), 0
        return nvrtc.getProgramLog(program), len(nvrtc.getCUBIN(program))

    with ThreadPoolExecutor(2) as pool:
        yield {architecture: pool.submit(compile, architecture) for architecture in ARCHITECTURES}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiles_without_local_memory(architecture, compiled):
    log, size = compiled[architecture].result()
    if size is None:
        pytest.skip(log)
    assert size > 1000 and log.count("spill stores") == len(instances()), log
    assert log.count("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads") == len(instances()), log


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """The arithmetic of the kernels, compiled for the host: f(kind, degrees, ...)."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("host")
    text = '#include "rational_math.h"\n'
    for m, n in ((5, 4), (8, 8), (3, 2), (0, 1)):
        text += f"""extern "C" void run_{m}_{n}(int count, const float* g, const float* x, const float* a,
                                                const float* b, float* y, float* dx, float* sums) {{
            Coefficients<{m}, {n}> c; c.load(a, b);
            for (int i = 0; i < count; i++) y[i] = rational_forward(dx[i] = x[i], c);
            int i = 0;
            for (; i + 8 <= count; i += 8) rational_backward<8>(g + i, dx + i, c, sums);
            for (; i < count; i++) rational_backward<1>(g + i, dx + i, c, sums); }}\n"""
    (folder / "host.cpp").write_text(text)
    options = ("-O2", "-std=c++17", "-ffp-contract=off", "-Wno-unknown-pragmas", "-shared", "-fPIC")
    files = (f"-I{launch.FOLDER}", "-o", str(folder / "host.so"), str(folder / "host.cpp"))
    subprocess.run([compiler, *options, *files], check=True)
    return ctypes.CDLL(str(folder / "host.so"))


@pytest.mark.parametrize("degrees", [(5, 4), (8, 8), (3, 2), (0, 1)])
def test_arithmetic_on_the_host(host, degrees):
    x = torch.cat([2 * torch.randn(4096), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 30.0, -30.0])])
    g, a, b = torch.randn_like(x), 0.3 * torch.randn(degrees[0] + 1), 0.3 * torch.randn(degrees[1])
    y, dx, sums = torch.empty_like(x), torch.empty_like(x), torch.zeros(sum(degrees) + 1)
    getattr(host, "run_{}_{}".format(*degrees))(
        len(x), *(ctypes.c_void_p(t.data_ptr()) for t in (g, x, a, b, y, dx, sums))
    )
    xd, ad, bd = (t.double().requires_grad_() for t in (x[:, None], a[None], b.abs()[None]))
    yd, dxd, da, db = results(rational, xd, ad, bd, g.double()[:, None])
    for name, got, want in (
        ("y", y, yd[:, 0]),
        ("dx", dx, dxd[:, 0]),
        ("da", sums[: degrees[0] + 1], da[0]),
        ("db", sums[degrees[0] + 1 :], db[0]),
    ):
        assert (got - want).norm() <= 2e-6 * want.norm(), name
    zero = x == 0  # sign(0) = +1 for 0 and -0
    expected = g[zero] * ((a[1] if degrees[0] else 0.0) - a[0] * b[0].abs())
    torch.testing.assert_close(dx[zero], expected, rtol=1e-6, atol=1e-7)


def test_plans_cover_every_vector_once():
    wide = [
        ((64, 31713), 1, 1, 1023),
        ((64, 961, 25), 1, 1, 961),
        ((64, 1021, 15), 1, 1021, 1),
        ((64, 4095), 1, 1, 819),
        ((1, 3069), 1, 1, 1023),
        ((1024, 1013, 3), 1, 1, 1013),
        ((64, 4096, 16), 1, 1, 4096),
        ((64, 3584), 1, 1, 3584),
        ((1024, 1536), 1, 1536, 1),
    ]
    for shape, dim, a_rows, b_rows in (*CASES.values(), *wide):
        for size in (2, 4):
            for aligned in (True, False):
                for kind in ("forward", "backward"):
                    plan = kernel.plan(kind, shape, dim % len(shape), a_rows, b_rows, size, aligned, 132)
                    vectors, segments, grid, rows, outer, groups, length, tile = plan
                    threads, period, total = kernel.CONFIG[kind][0], groups * length, outer * groups * length
                    assert rows <= 4096 and rows * groups < 1 << 20  # little to sum up
                    team = kernel.team_size(rows, groups)
                    assert 0 <= rows <= team * (launch.COUNTERS - 1) and team <= 512
                    assert outer * groups * length * (16 // size if vectors else 1) == torch.Size(shape).numel()
                    if segments:
                        assert grid % groups == 0 and rows == (grid // groups if kind == "backward" else 0)
                    elif tile:  # whole blocks to a row or whole rows to a block
                        span = max(threads, period)
                        assert kind == "forward" and (threads % period == 0 or period % threads == 0)
                        assert (
                            grid % (span // threads) == 0
                            and 0 <= grid // (span // threads) * tile * span - total < tile * span
                        )
                    else:  # a thread meets one function only
                        assert grid * threads % period == 0 and rows == (grid if kind == "backward" else 0)


@pytest.mark.parametrize(
    "change",
    [
        dict(shape=(4, 97)),
        dict(dtype=torch.float64),
        dict(a_device=torch.device("cpu")),
        dict(b_device=torch.device("cuda:0")),
        dict(a_shape=(6,)),
        dict(b_shape=(8, 9)),
        dict(dim=2),
        dict(shape=(3, 96, 1 << 30), dim=1),
        dict(b_shape=(0, 4)),
    ],
    ids=str,
)
def test_operators_refuse_what_they_were_not_made_for(change):
    fitting = dict(
        shape=(4, 96),
        dtype=torch.bfloat16,
        device=torch.device("cuda:1"),
        a_shape=(1, 6),
        a_device=torch.device("cuda:1"),
        b_shape=(8, 4),
        b_device=torch.device("cuda:1"),
        dim=1,
    )
    kernel._check(*fitting.values())
    with pytest.raises(ValueError, match="kan::rational cannot take x .*channels in dimension"):
        kernel._check(*(fitting | change).values())


@pytest.fixture
def operators_on_the_cpu(monkeypatch):
    """The definition in the place of the kernels, where a compiler or an exporter calls the operators."""

    def backward(grad, x, a, b, dim):
        saved = types.SimpleNamespace(saved_tensors=(x, a, b), dim=dim, path="definition", needs_input_grad=(True,) * 3)
        return Rational.backward(saved, grad)[:3]

    library, check = torch.library.Library("kan", "IMPL"), definition._check
    library.impl("rational", evaluate, "CPU")
    library.impl("rational_backward", torch.no_grad()(backward), "CPU")

    def refusal(*args):
        check(*args)
        return kernel.refusal(args[0], args[1], args[3], args[6], args[9])

    monkeypatch.setattr(definition, "_check", refusal)
    yield
    library._destroy()


def test_traced_for_any_batch(operators_on_the_cpu):
    layer, x = GroupRational(8, num_channels=96), torch.randn(5, 7, 96)
    with torch.no_grad():
        for dim in (torch.export.Dim("batch"), torch.export.Dim("batch", min=2, max=4096)):
            exported = torch.export.export(layer, (x,), dynamic_shapes=({0: dim},))
            assert "kan.rational" in str(exported.graph)
            torch.testing.assert_close(exported.module()(x[:3]), evaluate(x[:3], *layer.parameters(), 2))
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in (5, 3):
        live = x[:size].clone().requires_grad_()
        found = torch.autograd.grad(compiled(live).square().sum(), (live, *layer.parameters()))
        y = Rational.apply(live, *layer.parameters(), 2, "definition")
        for got, want in zip(found, torch.autograd.grad(y.square().sum(), (live, *layer.parameters()))):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_an_exported_program_trains_as_the_layer_does(operators_on_the_cpu):
    x, layers = (
        torch.randn(5, 96),
        torch.nn.Sequential(torch.nn.Linear(96, 96), GroupRational(8, "identity"), torch.nn.Linear(96, 2)),
    )
    program = torch.export.export(layers, (x,)).module()
    assert "kan.rational" in str(program.graph)
    want, found = (
        dict(
            zip(dict(model.named_parameters()), torch.autograd.grad(model(x).square().sum(), list(model.parameters())))
        )
        for model in (layers, program)
    )
    for name in want:
        torch.testing.assert_close(found[name], want[name], msg=name)
    live = x.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(
            torch.ops.kan.rational(live, *(p.detach() for p in layers[1].parameters()), 1).sum(),
            live,
            create_graph=True,
        )


def inputs(shape, dim, a_rows, b_rows, dtype, degrees=(5, 4)):
    x, g = (2 * torch.randn(shape, device="cuda")).to(dtype), torch.randn(shape, device="cuda").to(dtype)
    return (
        x,
        0.3 * torch.randn(a_rows, degrees[0] + 1, device="cuda"),
        0.3 * torch.randn(b_rows, degrees[1], device="cuda"),
        g,
    )


def gradients(x, a, b, g, dim, choice="cuda"):
    before = kernels._choice
    kernels.use_kernel(choice)
    try:
        return results(
            lambda x, a, b: rational(x, a, b, dim), *(t.detach().clone().requires_grad_() for t in (x, a, b)), g
        )
    finally:
        kernels.use_kernel(before)


def poison():
    """What torch hands out next as uninitialised memory holds NaN."""
    torch.full((1 << 26,), float("nan"), device="cuda")


def assert_as_exact_as_torch(x, a, b, g, dim):
    exact = gradients(x.double(), a.double(), b.double(), g.double(), dim, "torch")
    plain = gradients(x, a, b, g, dim, "torch")
    poison()
    for name, got, own, want in zip(NAMES, gradients(x, a, b, g, dim), plain, exact):
        assert got.dtype == own.dtype and got.shape == own.shape, name
        error, allowed = ((t.double() - want).norm() / want.norm().clamp_min(1e-30) for t in (got, own))
        # sums of few terms of both signs have no digits to compare: 1e-6 of the sum is what float32 terms leave
        assert error <= 2 * allowed + (3e-7 if name in NAMES[:2] else 3e-6), (name, error.item(), allowed.item())


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_the_definition(case, dtype):
    shape, dim, a_rows, b_rows = CASES[case]
    x, a, b, g = inputs(shape, dim, a_rows, b_rows, dtype)
    x.view(-1)[:2] = torch.tensor([0.0, -0.0])
    assert_as_exact_as_torch(x, a, b, g, dim)
    one, two = gradients(x, a, b, g, dim), gradients(x, a, b, g, dim)
    assert all(torch.equal(p, q) for p, q in zip(one, two))


@gpu
@pytest.mark.parametrize("degrees", [(8, 8), (3, 2), (0, 1), (2, 6)])
@pytest.mark.parametrize("case", [((9, 7, 48), -1, 2, 3), ((3, 7, 3072), -1, 3072, 1)], ids=["few", "3072"])
def test_degrees(degrees, case):
    assert_as_exact_as_torch(*inputs(*case, torch.float32, degrees), case[1])


@gpu
def test_coefficient_gradients_are_exact():
    x, a, b, g = inputs((64, 197, 768), -1, 1, 8, torch.float32)
    a[:], b[:] = (torch.tensor(v, device="cuda") for v in preset_coefficients("swish", (5, 4)))
    exact = gradients(x.double(), a.double(), b.double(), g.double(), -1, "torch")
    for got, want in zip(gradients(x, a, b, g, -1)[2:], exact[2:]):
        assert (got - want).norm() <= 3e-7 * want.norm()


@gpu
def test_strides_and_offsets():
    x, a, b, g = inputs((6, 10, 48), -1, 1, 8, torch.bfloat16)
    views = {
        "slice": x[:, 2:7],
        "step": x[::2],
        "transpose": x.transpose(0, 1),
        "misaligned": x.view(-1)[1:481].view(10, 48),
        "expanded": x[:, :1].expand(6, 10, 48),
    }
    for view in views.values():
        for grad in (torch.randn_like(view), torch.ones((), device="cuda", dtype=view.dtype).expand(view.shape)):
            assert_as_exact_as_torch(view, a, b, grad, -1)
    assert rational(x[:0], a, b).shape == (0, 10, 48)
    assert all(t.isfinite().all() for t in gradients(x[:0], a, b, x[:0], -1))


@gpu
@pytest.mark.parametrize("case", ["shared", "odd", "odd images", "segments", "one numerator for 3072"])
def test_nothing_is_written_outside(case, monkeypatch):
    """Every output lies between guards: empty_like and the workspace are replaced by rooms in a larger tensor."""
    shape, dim, a_rows, b_rows = CASES[case]
    x, a, b, g = inputs(shape, dim, a_rows, b_rows, torch.bfloat16)
    want, guarded = gradients(x, a, b, g, dim), []

    def room(count, dtype):
        size = math.ceil(count * dtype.itemsize / 16) * 16 // dtype.itemsize  # what follows is 16-byte aligned too
        whole = torch.full((64 + size + 64,), 7.0, device="cuda").to(dtype)
        guarded.append((whole, count))
        return whole[64 : 64 + count]

    def workspace(device, floats):
        counters, partials = torch.zeros(launch.COUNTERS, dtype=torch.int32, device="cuda"), room(floats, torch.float32)
        return counters.data_ptr(), partials.data_ptr(), counters

    monkeypatch.setattr(torch, "empty_like", lambda t: room(t.numel(), t.dtype).view(t.shape))
    monkeypatch.setattr(launch, "workspace", workspace)
    found = kernel.forward(x, a, b, dim % x.ndim), *kernel.backward(g, x, a, b, dim % x.ndim)
    monkeypatch.undo()
    assert len(guarded) == 5 and all(torch.equal(p, q) for p, q in zip(found, want))
    for whole, count in guarded:
        assert (whole[:64] == 7).all() and (whole[64 + count :] == 7).all()


@gpu
def test_checkpointing_ddp_workers_and_dispatch_modes(tmp_path):
    layer = GroupRational(8, num_channels=96).cuda()
    x = torch.randn(4, 50, 96, device="cuda", requires_grad=True)
    inputs_ = (x, *layer.parameters())
    want = torch.autograd.grad(layer(x).square().sum(), inputs_)
    for reentrant in (True, False):
        layer.zero_grad(), setattr(x, "grad", None)
        torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
        assert all(torch.equal(t.grad, q) for t, q in zip(inputs_, want))
    torch.distributed.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        layer.zero_grad()
        torch.nn.parallel.DistributedDataParallel(layer)(x.detach()).square().sum().backward()
        assert all(torch.equal(p.grad, q) for p, q in zip(layer.parameters(), want[1:]))
    finally:
        torch.distributed.destroy_process_group()
    data = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(torch.arange(32.0)), batch_size=8, num_workers=2, multiprocessing_context="fork"
    )
    assert torch.cat([batch for (batch,) in data]).sum() == 496 and torch.equal(layer(x), layer(x.detach().clone()))
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    with Watch():
        found = torch.autograd.grad(layer(x).square().sum(), inputs_)
    assert {"kan.rational.default", "kan.rational_backward.default"} <= set(seen) and all(
        torch.equal(p, q) for p, q in zip(found, want)
    )


@gpu
def test_streams_graphs_autocast_compile_and_export():
    layer = GroupRational(8, num_channels=96).cuda()
    x = torch.randn(4, 50, 96, device="cuda")
    want = layer(x)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        busy = torch.randn(4096, 4096, device="cuda")
        for _ in range(20):
            busy = busy @ busy * 1e-3
        late = torch.where(busy.sum().isnan(), x, x) * 1  # known only after the products
        got = layer(late)
    torch.cuda.current_stream().wait_stream(side)
    assert torch.equal(got, want)
    coefficients = layer.weight_numerator, layer.weight_denominator
    live = x.clone().requires_grad_()
    eager = torch.autograd.grad(layer(live).square().sum(), (live, *coefficients))
    graphed = torch.cuda.make_graphed_callables(
        GroupRational(8, num_channels=96).cuda(), (torch.zeros_like(x).requires_grad_(),)
    )
    for _ in range(3):
        again = x.clone().requires_grad_()
        found = torch.autograd.grad(
            graphed(again).square().sum(), (again, graphed.weight_numerator, graphed.weight_denominator)
        )
        assert all(torch.equal(p, q) for p, q in zip(found, eager))
    with torch.autocast("cuda", torch.bfloat16):
        assert layer(x).dtype is torch.bfloat16 and torch.equal(layer(x), layer(x.bfloat16()))
    for mode in ("default", "reduce-overhead"):
        torch.compiler.reset()
        compiled = torch.compile(layer, fullgraph=True, mode=mode)
        for _ in range(3):
            live = x.clone().requires_grad_()
            found = torch.autograd.grad(compiled(live).square().sum(), (live, *coefficients))
            assert all(torch.equal(p, q) for p, q in zip(found, eager)), mode
    exported = torch.export.export(layer.eval(), (x,))
    assert "kan.rational" in str(exported.graph) and torch.equal(exported.module()(x), want)
    dynamic = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    assert torch.equal(dynamic.module()(x[:3]), want[:3])
    live = x.clone().requires_grad_()
    directions = torch.randn(3, *x.shape, device="cuda")
    (batched,) = torch.autograd.grad(layer(live), live, directions, is_grads_batched=True)
    assert all(torch.equal(own, torch.autograd.grad(layer(live), live, g)[0]) for own, g in zip(batched, directions))
    with pytest.raises(ValueError, match="kan::rational cannot take x"):
        torch.ops.kan.rational(x[..., :95], *(c.detach() for c in coefficients), 2)
    torch.library.opcheck(
        torch.ops.kan.rational.default,
        (x, *(c.detach() for c in coefficients), 2),
        test_utils=("test_schema", "test_faketensor"),
    )
    torch.library.opcheck(
        torch.ops.kan.rational_backward.default,
        (x, x, *(c.detach() for c in coefficients), 2),
        test_utils=("test_schema", "test_faketensor"),
    )


@gpu
def test_forward_mode_derivatives_are_refused():
    layer, x = GroupRational(8, num_channels=96).cuda().requires_grad_(False), torch.randn(4, 96, device="cuda")
    with torch.autograd.forward_ad.dual_level(), pytest.raises((NotImplementedError, RuntimeError)):
        layer(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))


@gpu
def test_second_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    layer, x = GroupRational(8, num_channels=96), torch.randn(4, 96)
    assert torch.equal(layer.to("cuda:1")(x.to("cuda:1")).cpu(), layer.to("cuda:0")(x.to("cuda:0")).cpu())


@pytest.fixture
def choose(monkeypatch):
    """Chooses a kernel, also where it cannot run; warnings come again."""
    kernels._warned.clear()
    definition._check_once.cache_clear()
    yield lambda choice: monkeypatch.setattr(kernels, "_choice", choice)
    definition._check_once.cache_clear()


def fake_inputs(shape=(2, 16), dim=-1, a_shape=(1, 6), b_shape=(8, 4), dtype=torch.float32):
    with FakeTensorMode():
        tensors = [
            torch.empty(s, device="cuda", dtype=t) for s, t in ((shape, dtype), (a_shape, None), (b_shape, None))
        ]
    return *tensors, dim


def assert_falls_back(choose, reason, x, a, b, dim):
    """cuda raises, auto warns once, torch computes in silence."""
    choose("cuda")
    with pytest.raises(ValueError, match=f"the kernel 'cuda' was chosen, but the CUDA kernels cannot run: .*{reason}"):
        rational(x, a, b, dim)
    choose("auto")
    with pytest.warns(UserWarning, match=f"plain PyTorch, several times slower than its kernels: .*{reason}"):
        y = rational(x, a, b, dim)
    assert (y.shape, y.dtype, y.device.type) == (x.shape, x.dtype, "cuda")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rational(x, a, b, dim)
        kernels._warned.clear()
        choose("torch")
        rational(x, a, b, dim)


REFUSED = {
    "not float64": dict(dtype=torch.float64),
    "degrees up to 8": dict(a_shape=(1, 10)),
    "up to 4096 different functions": dict(shape=(2, 4160), a_shape=(4160, 6), b_shape=(1, 4)),
    "less than 16 GiB": dict(shape=(1 << 17, 1 << 15)),
    "less than 2.31 elements": dict(shape=(1, 16, 1 << 28), dim=1, dtype=torch.bfloat16),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_tensors_that_the_kernels_do_not_take(reason, choose):
    assert_falls_back(choose, reason, *fake_inputs(**REFUSED[reason]))


def test_kernels_that_are_missing(choose, monkeypatch):
    monkeypatch.setattr(kernels, "missing", "CuPy is not installed")
    assert_falls_back(choose, "CuPy is not installed", *fake_inputs())
    with pytest.raises(ValueError, match="cannot run here: CuPy is not installed"):
        kernels.use_kernel("cuda")


def test_a_gpu_that_is_too_old(choose, monkeypatch):
    monkeypatch.setattr(launch, "refusal", lambda device: "they need a GPU of compute capability 8.0")
    assert_falls_back(choose, "compute capability 8.0", *fake_inputs())


def test_a_compiler_sees_the_warning_as_a_constant(choose, monkeypatch):
    monkeypatch.setattr(definition, "_check", lambda *args: "a reason")
    choose("auto")
    layer, x = GroupRational(8, num_channels=96), torch.randn(5, 96)
    with pytest.warns(UserWarning, match="its kernels: a reason"):
        y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(y, evaluate(x, *(p.detach() for p in layer.parameters()), 1))


def test_the_kernels_take_fake_tensors_and_leave_the_cpu_alone(choose):
    x, a, b, dim = fake_inputs((3, 5, 4096), a_shape=(4096, 6), b_shape=(4096, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for choice in ("auto", "cuda"):
            choose(choice)
            assert rational(x, a, b, dim).shape == x.shape
            layer = GroupRational(8, num_channels=16).double()
            y = torch.randn(2, 16, dtype=torch.float64)
            assert torch.equal(layer(y), evaluate(y, *(p.detach() for p in layer.parameters()), 1))


@gpu
def test_choice_of_the_kernel(choose, monkeypatch):
    x, a, b, _ = inputs((2, 16), -1, 1, 8, torch.float32)
    calls = []
    monkeypatch.setattr(kernel, "forward", lambda *args: calls.append(1) or x)
    for choice, count in (("auto", 1), ("cuda", 2), ("torch", 2)):
        choose(choice)
        rational(x, a, b)
        assert len(calls) == count
    assert_falls_back(choose, "not float64", x.double(), a, b, -1)


def test_an_unknown_kernel():
    with pytest.raises(ValueError, match="unknown kernel 'gpu'"):
        kernels.use_kernel("gpu")
