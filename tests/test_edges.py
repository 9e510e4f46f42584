"""Sums of functions edge by edge: the definition, the kernels in Triton, and which of them computes what.

Without a GPU the kernels run in Triton's interpreter and are compiled, each in a process of its own: Triton reads
TRITON_INTERPRET when it is imported.
"""

import copy
import importlib.util
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import edges_cases as cases
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cuda import edges as kernel
from cuda import launch
from kan_basis import BASES, edges, kernels, make_basis
from kan_basis.layer import KANLayer
from kan_basis.wavelet import WAVELETS, register_wavelet
from models.karat import KArAtAttention, attention_scores
from models.operator import KArAtOperator

gpu = pytest.mark.gpu
BASIS = make_basis("rational")


@pytest.fixture(scope="module")
def results():
    """What the checks of both processes found; they run at the same time."""
    if not importlib.util.find_spec("triton"):
        pytest.skip("Triton is not installed")
    script = Path(cases.__file__)
    processes = [
        subprocess.Popen(
            [sys.executable, script, task],
            stdout=subprocess.PIPE,
            env={**os.environ, "TRITON_INTERPRET": str(int(task == "interpret")), "OMP_NUM_THREADS": "1"},
        )
        for task in ("interpret", "compile")
    ]
    outputs = [process.communicate()[0] for process in processes]
    assert not any(process.returncode for process in processes)
    return {name: reason for output in outputs for name, reason in json.loads(output).items()}


@pytest.mark.parametrize("name", cases.checks())
def test_interpreted(name, results):
    assert results[name] == ""


@pytest.mark.parametrize("architecture", cases.ARCHITECTURES)
@pytest.mark.parametrize("name", [phi[0] for phi in cases.COMPILED])
def test_compiled_without_spills(name, architecture, results):
    assert results[f"{name} sm_{architecture}"] == ""


@gpu
@pytest.mark.parametrize("name", cases.checks())
def test_on_the_gpu(name):
    cases.checks("cuda")[name]()


def test_every_basis_that_is_not_linear_has_kernels():
    for name, cls in BASES.items():
        basis = cls()
        if not basis.linear:
            assert basis.edge_function[0] in kernel.FUNCTIONS, name
    builtin = {name for name, psi in WAVELETS.items() if psi.__module__ == "kan_basis.wavelet"}
    assert builtin == set(cases.WAVELETS) == set(kernel.FUNCTIONS[2:])
    assert {phi[0] for phi in cases.FUNCTIONS} == set(kernel.FUNCTIONS)


@pytest.mark.parametrize("name", BASES)
def test_scaled_coefficients_are_a_scaled_function(name):
    basis = make_basis(name)
    theta, scale, x = (torch.randn(*s, dtype=torch.float64) for s in ((3, basis.num_coefficients), (3,), (7, 1)))
    torch.testing.assert_close(basis(x, basis.scaled(theta, scale)), scale * basis(x, theta))


@pytest.mark.parametrize("name", ["rational", "wavelet"])
@pytest.mark.parametrize("limit", [1 << 22, 50])
def test_definition(name, limit, monkeypatch):
    """Both functions, in chunks and at once, against the literal sums; with and without factors."""
    monkeypatch.setattr(edges, "MAX_EDGES", limit)
    basis = make_basis(name)
    q, k = (torch.randn(3, 2, n, 4, dtype=torch.float64, requires_grad=True) for n in (6, 5))
    theta = cases.theta_of(basis, 2, 3, 5).double().requires_grad_()
    scale = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    x = q @ k.mT * 0.7
    for factors in (None, scale):
        scaled = theta if factors is None else basis.scaled(theta, factors)
        expected = cases.sums(basis, x, scaled)
        rows = edges.edges(x.transpose(0, 1).flatten(1, 2), theta, basis, factors)
        torch.testing.assert_close(rows.unflatten(1, (3, 6)).transpose(0, 1), expected)
        z = edges.edge_attention(q, k, theta, 0.7, basis, factors)
        torch.testing.assert_close(z, expected)
        inputs = [t for t in (q, k, theta, factors) if t is not None]
        g = torch.randn_like(z)
        found, wanted = (torch.autograd.grad(t, inputs, g, retain_graph=True) for t in (z, expected))
        for a, b in zip(found, wanted):
            torch.testing.assert_close(a, b)
    half = edges.edge_attention(q.bfloat16(), k.bfloat16(), theta.float(), 0.7, basis)
    assert half.dtype is torch.float32
    assert cases.error(half, cases.sums(basis, q.bfloat16().double() @ k.bfloat16().double().mT * 0.7, theta)) < 1e-4


def test_errors():
    x, theta = torch.zeros(2, 3, 5), torch.zeros(2, 4, 5, 10)
    with pytest.raises(ValueError, match=r"theta must be \(2, r, 5, P\)"):
        edges.edges(x, theta[:, :, :4], BASIS)
    with pytest.raises(ValueError, match="theta must have 10 coefficients"):
        edges.edges(x, theta[..., :9], BASIS)
    q = torch.zeros(1, 2, 3, 8)
    with pytest.raises(ValueError, match=r"theta must be \(2, r, 3, P\)"):
        edges.edge_attention(q, q, theta, 1.0, BASIS)
    with pytest.raises(ValueError, match="shapes, types or devices do not fit"):
        kernel._edges(x.double(), theta, *BASIS.edge_function)
    with pytest.raises(ValueError, match="shapes, types or devices do not fit"):
        kernel._edges(x, theta, "sine", 5, 4)


@pytest.fixture
def choose(monkeypatch):
    """Chooses kernels or definition; Triton counts as installed, and warnings come again."""
    kernels._warned.clear()
    monkeypatch.setattr(launch, "_triton", lambda: "")
    yield lambda choice: monkeypatch.setattr(kernels, "_choice", choice)


def fake(*shapes, dtype=torch.float32):
    with FakeTensorMode():
        return [torch.empty(shape, device="cuda", dtype=dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fake_tensors_take_the_operators(dtype, choose):
    """A GPU is needed for their backward pass; the operators of the backward pass run."""
    choose("cuda")
    phi = BASIS.edge_function
    with FakeTensorMode():
        x, theta, g = (torch.empty(*s, device="cuda") for s in ((7, 2, 5), (2, 3, 5, 10), (2, 7, 3)))
        x = x.transpose(0, 1).requires_grad_()
        z = edges.edges(x, theta, BASIS)
        assert z.shape == (2, 7, 3) and z.device.type == "cuda" and "edges" in type(z.grad_fn).__name__
        dx, dtheta = torch.ops.kan.edges_backward(g, x, theta, *phi)
        assert dx.shape == x.shape and dx.is_contiguous() and dtheta.shape == theta.shape

        q, k = (torch.empty(4, n, 2, 8, device="cuda", dtype=dtype).transpose(1, 2) for n in (6, 5))
        z = edges.edge_attention(q.requires_grad_(), k, theta, 0.1, BASIS, torch.empty(2, 3, 5, device="cuda"))
        assert z.dtype is torch.float32 and z.shape == (4, 2, 6, 3) and "edge_attention" in type(z.grad_fn).__name__
        found = torch.ops.kan.edge_attention_backward(torch.empty_like(z), q, k, theta, 0.1, *phi)
        for gradient, t in zip(found, (q, k, theta)):
            assert gradient.shape == t.shape and gradient.dtype is t.dtype and gradient.is_contiguous()


class Calls(torch.utils._python_dispatch.TorchDispatchMode):
    """Names of the operators of the kernels that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "kan":
            self.names.add(func._opname)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "options, base_fn, dropout, expected, linear",
    [
        ({}, None, 0.0, {"edge_attention"}, {"attention"}),
        ({"output_scale": "learned"}, None, 0.0, {"edge_attention"}, {"attention"}),
        ({}, torch.nn.SiLU(), 0.0, {"edges"}, {"attention"}),
        ({}, None, 0.5, {"edges"}, set()),
        ({"project_l1": True}, None, 0.0, {"edges"}, set()),
        ({"mode": "w1_phi2"}, None, 0.0, {"edges"}, set()),
        ({"depth": 3}, None, 0.0, {"edges"}, set()),
        ({"depth": 1}, None, 0.0, {"edges"}, set()),
        ({"modular": False}, None, 0.0, {"edges"}, set()),
    ],
)
@pytest.mark.parametrize("name", ["rational", "wavelet", "fourier"])
def test_which_attention_takes_which_operator(name, options, base_fn, dropout, expected, linear, choose):
    choose("cuda")
    with FakeTensorMode(), Calls() as calls:
        operator = KArAtOperator(5, 2, make_basis(name), 3, base_fn=base_fn, device="cuda", **options)
        attention = KArAtAttention(16, 2, attn_drop=dropout)
        attention.set_operator(operator)
        q, k, v = (torch.empty(4, 2, 5, 8, device="cuda", dtype=torch.bfloat16) for _ in "qkv")
        assert attention.apply_operator(operator, q, k, v).shape == v.shape
    assert calls.names == (linear if name == "fourier" else expected)


@pytest.mark.parametrize(
    "reason, basis, dtype",
    [
        ("not float64", BASIS, torch.float64),
        ("degrees up to 8", make_basis("rational", degrees=(9, 4)), torch.float32),
    ],
)
def test_what_the_kernels_refuse(reason, basis, dtype, choose):
    """cuda raises, auto warns once, torch computes in silence."""
    q, theta = fake((2, 2, 5, 4), (2, 3, 5, basis.num_coefficients), dtype=dtype)
    choose("cuda")
    with pytest.raises(ValueError, match=f"the CUDA kernels cannot run: .*{reason}"):
        edges.edge_attention(q, q, theta, 1.0, basis)
    choose("auto")
    with pytest.warns(UserWarning, match=f"an edge function runs in plain PyTorch, .*{reason}"):
        assert edges.edge_attention(q, q, theta, 1.0, basis).shape == (2, 2, 5, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        edges.edge_attention(q, q, theta, 1.0, basis)
        kernels._warned.clear()
        choose("torch")
        edges.edge_attention(q, q, theta, 1.0, basis)


def test_functions_from_outside_have_the_definition(choose, monkeypatch):
    monkeypatch.setattr(sys.modules["kan_basis.wavelet"], "WAVELETS", dict(WAVELETS))

    def box(u):
        return torch.where(u.abs() < 1, 1.0, 0.0)

    register_wavelet(box)
    choose("cuda")
    with FakeTensorMode(), Calls() as calls:
        x, theta = torch.empty(2, 7, 5, device="cuda"), torch.empty(2, 3, 5, 3, device="cuda")
        assert edges.edges(x, theta, make_basis("wavelet", wavelet="box")).shape == (2, 7, 3)
    assert not calls.names


@pytest.mark.parametrize(
    "version, reason", [("3.2.0", "they need Triton 3.3, and 3.2.0 is installed"), ("3.10.1+git", "")]
)
def test_version_of_triton(version, reason, monkeypatch):
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(launch.metadata, "version", lambda name: version)
    assert launch._triton.__wrapped__() == reason


def test_without_triton(monkeypatch):
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: None)
    assert launch._triton.__wrapped__() == "Triton is not installed"


def test_the_choice_does_not_break_a_graph():
    q, theta = torch.randn(2, 2, 5, 4), cases.theta_of(BASIS, 2, 3, 5)
    kernels._warned.clear()

    def chosen(q, theta):
        return edges.has_kernel(q, theta, BASIS), q + 1

    compiled = torch.compile(chosen, fullgraph=True, backend="eager")
    assert compiled(q, theta)[0] == chosen(q, theta)[0] == (launch.no_triton() == "")


SIZES = [(8, 3, 197, 197, 12, 64), (2, 2, 1025, 1025, 12, 64), (5, 4, 50, 50, 7, 32)]  # B, h, M, N, r, d


@gpu
@pytest.mark.parametrize("phi", [("rational_B", 5, 4), ("rational_A", 5, 4), ("mexican_hat", 0, 0), ("morlet", 0, 0)])
@pytest.mark.parametrize("size", SIZES)
def test_attention_of_real_sizes(size, phi):
    B, h, M, N, r, d = size
    for dtype in (torch.bfloat16, torch.float32):
        cases.check_attention(phi, dtype, "cuda", B, h, M, N, r, d, images=3)


@gpu
@pytest.mark.parametrize("seed", range(40))
def test_random_cases(seed):
    rng = torch.Generator().manual_seed(seed)

    def number(low, high):
        return int(torch.randint(low, high + 1, (), generator=rng))

    phi = cases.FUNCTIONS[number(0, len(cases.FUNCTIONS) - 1)]
    if phi[0].startswith("rational"):
        phi = phi[0], number(0, 8), number(1, 8)
    shape = number(1, 9), number(1, 5), number(1, 70), number(1, 70), number(1, 17)
    cases.check_kernels(phi, shape, (torch.float32, torch.bfloat16, torch.float16)[number(0, 2)], "cuda", True)
    B, h, M, N, r = shape
    cases.check_attention(phi, torch.float32, "cuda", B, h, M, N, r, 8 * number(1, 8), number(1, B))


def attention_on_the_gpu(name="rational", N=50, h=3, r=12, d=32):
    torch.manual_seed(0)
    operator = KArAtOperator(N, h, make_basis(name), r, init="scaled")
    operator.layers[0].coefficients.data = cases.theta_of(make_basis(name), h, r, N, calm=True)
    attention = KArAtAttention(h * d, h)
    attention.set_operator(operator)
    return attention.cuda(), torch.randn(6, N, h * d, device="cuda")


def gradients(function, module, x, g):
    x = x.clone().requires_grad_()
    out = function(x)
    return out.detach(), *torch.autograd.grad(out, [x, *(p for p in module.parameters() if p.requires_grad)], g)


@gpu
@pytest.mark.parametrize("name", ["rational", "wavelet"])
def test_a_module_with_kernels_is_the_module_without(name, monkeypatch):
    module, x = attention_on_the_gpu(name)
    g = torch.randn_like(x)
    with Calls() as calls:
        found = gradients(module, module, x, g)
    assert calls.names == {"edge_attention", "edge_attention_backward"}
    monkeypatch.setattr(kernels, "_choice", "torch")
    expected = gradients(module, module, x, g)
    for a, b in zip(found, expected):
        assert cases.error(a, b.double()) < 1e-3
    layer = KANLayer(50, 12, make_basis(name), 3, torch.nn.SiLU())
    layer.coefficients.data = cases.theta_of(layer.basis, 3, 12, 50, calm=True)
    layer.cuda()
    scores, g = torch.randn(4, 3, 50, 50, device="cuda"), torch.randn(4, 3, 50, 12, device="cuda")
    expected = gradients(layer, layer, scores, g)
    monkeypatch.setattr(kernels, "_choice", "cuda")
    for a, b in zip(gradients(layer, layer, scores, g), expected):
        assert cases.error(a, b.double()) < 1e-4


@gpu
@pytest.mark.parametrize("autocast", [False, True])
def test_compile_and_graphs(autocast):
    module, x = attention_on_the_gpu()
    g = torch.randn_like(x)

    def run(function):
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            return gradients(function, module, x, g.bfloat16() if autocast else g)

    expected = run(module)
    assert all(torch.equal(a, b) for a, b in zip(run(module), expected))
    for mode in ("default", "reduce-overhead"):
        torch.compiler.reset()
        compiled = torch.compile(module, fullgraph=True, mode=mode)
        for _ in range(3):
            for a, b in zip(run(compiled), expected):
                assert cases.error(a, b.double()) < (2e-2 if autocast else 1e-4)
    if not autocast:
        exported = torch.export.export(module.eval(), (x,))
        assert "kan." not in str(exported.graph)  # the definition, which runs everywhere
        assert cases.error(exported.module()(x), expected[0].double()) < 1e-3
        graph, static = torch.cuda.CUDAGraph(), x.clone()
        with torch.no_grad(), torch.cuda.graph(graph):
            out = module(static)
        static.copy_(x.flip(0))
        graph.replay()
        assert torch.equal(out, module(static))
        graphed = torch.cuda.make_graphed_callables(copy.deepcopy(module), (x.clone().requires_grad_(),))
        for a, b in zip(gradients(graphed, graphed, x, g), expected):
            assert cases.error(a, b.double()) < 1e-5


@gpu
def test_operators_have_right_schemas_and_fakes():
    theta = cases.theta_of(BASIS, 2, 5, 9, "cuda")
    x, g = torch.randn(2, 7, 9, device="cuda"), torch.randn(2, 7, 5, device="cuda")
    q = torch.randn(3, 9, 2, 16, device="cuda").transpose(1, 2)
    ga = torch.randn(3, 2, 9, 5, device="cuda")
    phi, ops = BASIS.edge_function, torch.ops.kan
    for operator, arguments in (
        (ops.edges, (x, theta)),
        (ops.edges_backward, (g, x, theta)),
        (ops.edge_attention, (q, q, theta, 0.3)),
        (ops.edge_attention_backward, (ga, q, q, theta, 0.3)),
    ):
        torch.library.opcheck(operator.default, (*arguments, *phi), test_utils=("test_schema", "test_faketensor"))
    with pytest.raises(RuntimeError, match="differentiable once"):
        live = x.clone().requires_grad_()
        torch.autograd.grad(ops.edges(live, theta, *phi).sum(), live, create_graph=True)
    empty = edges.edge_attention(q[:0], q[:0], theta, 0.3, BASIS)
    assert empty.shape == (0, 2, 9, 5)


@gpu
def test_scores_of_one_chunk_exist_at_a_time(monkeypatch):
    B, h, N, d = 512, 3, 197, 16
    monkeypatch.setattr(kernel, "CHUNK", 4 * h * N * N * 16)
    q, k = (torch.randn(B, h, N, d, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in "qk")
    theta = cases.theta_of(BASIS, h, 12, N, "cuda").requires_grad_()
    edges.edge_attention(q, k, theta, 0.25, BASIS).sum().backward()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    edges.edge_attention(q, k, theta, 0.25, BASIS).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 4 * B * h * N * N / 2  # half of the scores
    scores = attention_scores(q[:2], k[:2], 0.25).detach()
    expected = edges.edges(scores.transpose(0, 1).flatten(1, 2), theta, BASIS).unflatten(1, (2, N)).transpose(0, 1)
    assert cases.error(edges.edge_attention(q[:2], k[:2], theta, 0.25, BASIS), expected.double()) < 2e-5
