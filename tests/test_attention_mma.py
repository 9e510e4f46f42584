"""The tensor-core kernels of attention (attention.cuh) without a GPU.

They are compiled, the arithmetic of the features runs on the host, and grids are planned.
"""

import ctypes
import importlib.util
import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from cuda import attention_mma as mma
from cuda import launch
from kan_basis import make_basis

FUNCTIONS = {  # struct of attention_features.h, the basis, the number of features, low and step
    "Fourier": (make_basis("fourier", grid=4), 8, 0.0, 1.0),
    "Chebyshev": (make_basis("chebyshev", order=6), 7, 0.0, 1.0),
    "Radial": (make_basis("radial", grid=5, grid_range=(-2, 1)), 5, -2.0, 4 / 3),
    "Spline<1>": (make_basis("spline", grid=4, order=1, grid_range=(-1, 2)), 5, -1.0, 4 / 3),
    "Spline<3>": (make_basis("spline", grid=5, order=3, grid_range=(-2, 2)), 8, -2.0, 5 / 4),
    "Spline<5>": (make_basis("spline", grid=2, order=5, grid_range=(-2, 2)), 7, -2.0, 2 / 4),
}
BASES = {"Identity": lambda x: x, "Relu": F.relu, "Silu": F.silu, "Gelu": F.gelu, "Zero": lambda x: 0 * x}


def compile_for(architecture: int, file: str, names: list[str]) -> str:
    """The log of the assembler; raises the compiler's error."""
    pytest.importorskip("cupy")
    from cupy.cuda import nvrtc

    if architecture > max(80, *nvrtc.getSupportedArchs()):
        pytest.skip("this NVRTC does not know the architecture")
    folders = [
        Path(path, "include")
        for root in importlib.util.find_spec("nvidia").submodule_search_locations
        for path in Path(root).iterdir()
    ]
    headers = next(folder for folder in folders if (folder / "cuda_bf16.h").exists())
    program = nvrtc.createProgram(launch.source(file), file, (), ())
    for name in names:
        nvrtc.addNameExpression(program, name)
    options = [*launch.OPTIONS, f"-arch=sm_{architecture}", f"-I{headers}", "--ptxas-options=-v"]
    try:
        nvrtc.compileProgram(program, options)
    except nvrtc.NVRTCError:
        raise AssertionError(nvrtc.getProgramLog(program)) from None
    return nvrtc.getProgramLog(program)


def kernels(dtype="__nv_bfloat16", basis="Fourier", base="Zero", features=6, channels=64, exact="true"):
    function = f"{dtype}, {basis}, {base}, {features}, {channels}"
    return {
        "attention_forward.cu": [
            f"attention_pack_kernel<{dtype}, {basis}, {base}, {features}>",
            f"attention_forward_kernel<{function}, {exact}>",
        ],
        "attention_backward.cu": [
            f"attention_backward_values_kernel<{dtype}, {channels}>",
            f"attention_backward_query_kernel<{function}, {exact}>",
            f"attention_backward_key_kernel<{function}, {mma.KEY_WARPS}>",
            "attention_finish_kernel",
        ],
    }


@pytest.mark.parametrize("architecture", [80, 90, 100, 120])
def test_the_default_spills_little(architecture):
    """The loops over tokens have no spills; what a turn keeps may have some."""
    for file, names in kernels().items():
        log = compile_for(architecture, file, names)
        frames = [int(size) for size in re.findall(r"(\d+) bytes stack frame", log)]
        assert len(frames) == len(names) and max(frames) <= 128, log


@pytest.mark.parametrize("basis", FUNCTIONS)
@pytest.mark.parametrize("base", ["Zero", "Gelu"])
def test_other_functions_compile(basis, base):
    features = min(FUNCTIONS[basis][1] + (base != "Zero"), mma.MAX_FEATURES)
    for file, names in kernels("__half", basis, base, features, 32, "false").items():
        assert "Compiling entry function" in compile_for(90, file, names)


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder, text = tmp_path_factory.mktemp("host"), '#include "attention_features.h"\n'
    for i, (name, (_, count, low, step)) in enumerate(FUNCTIONS.items()):
        text += f"""extern "C" void basis{i}(int count, const float* x, float* value, float* slope) {{
            for (int i = 0; i < count; i++) {{
                {name} state; state.start(x[i], {low}f, {step}f);
                for (int f = 0; f < {count}; f++) {{
                    const int at = i * {count} + f;
                    value[at] = state.value(f), slope[at] = state.derivative(f) * {name}::factor(f);
                    state.advance(f); }} }} }}\n"""
    for name in BASES:
        text += f"""extern "C" void base{name}(int count, const float* x, float* value, float* slope) {{
            for (int i = 0; i < count; i++) value[i] = {name}::value(x[i]), slope[i] = {name}::derivative(x[i]); }}\n"""
    (folder / "host.cpp").write_text(text)
    options = ("-O2", "-std=c++17", "-Wno-unknown-pragmas", "-shared", "-fPIC", f"-I{launch.FOLDER}")
    subprocess.run([compiler, *options, "-o", str(folder / "host.so"), str(folder / "host.cpp")], check=True)
    return ctypes.CDLL(str(folder / "host.so"))


def on_the_host(function, x, count):
    value, slope = torch.empty(len(x), count), torch.empty(len(x), count)
    function(len(x), *(ctypes.c_void_p(t.data_ptr()) for t in (x, value, slope)))
    return value, slope


@pytest.mark.parametrize("name", FUNCTIONS)
def test_features_and_their_derivatives_on_the_host(host, name):
    basis, count, *_ = FUNCTIONS[name]
    x = torch.cat([2 * torch.randn(1024), torch.tensor([0.0, 30.0, -30.0, 1e-4])])
    value, slope = on_the_host(getattr(host, f"basis{list(FUNCTIONS).index(name)}"), x, count)
    # The kernels' order is cos x, sin x, cos 2x, ...
    order = [f // 2 + f % 2 * 4 for f in range(8)] if name == "Fourier" else list(range(count))
    exact = x.double().requires_grad_()
    features = basis.features(exact)[:, order]
    slopes = torch.stack([torch.autograd.grad(f.sum(), exact, retain_graph=True)[0] for f in features.unbind(1)], 1)
    torch.testing.assert_close(value, features.float(), rtol=1e-4, atol=3e-5)
    scale = basis.grid / (basis.grid_range[1] - basis.grid_range[0]) if name.startswith("Spline") else 1.0
    torch.testing.assert_close(slope, slopes.float(), rtol=1e-4, atol=1e-4 * max(1, scale))


@pytest.mark.parametrize("name", BASES)
def test_base_functions_on_the_host(host, name):
    x = torch.cat([3 * torch.randn(1024), torch.tensor([20.0, -20.0])])
    value, slope = on_the_host(getattr(host, f"base{name}"), x, 1)
    exact = x.double().requires_grad_()
    want = BASES[name](exact)
    torch.testing.assert_close(value[:, 0], want.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(slope[:, 0], torch.autograd.grad(want.sum(), exact)[0].float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shared", [99, 163, 227])
def test_grids_hold_every_row_once(shared, monkeypatch):
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(launch, "shared_memory", lambda device: shared << 10)
    for B, h, N in ((128, 3, 197), (1, 1, 1), (7, 12, 50), (128, 12, 197), (3, 200, 65), (2, 5, 272)):
        mma.grids.cache_clear()
        grids = mma.grids(B, h, N, 64, 6, 0)
        if grids is None:
            assert shared == 99 and N > 197
            continue
        for grid, warps in zip(grids, (20, 16)):
            assert grid.blocks % h == 0 and grid.blocks > 0 and grid.shared <= shared << 10
            assert 1 <= grid.groups <= 15 and grid.warps * grid.groups <= warps
            rows = math.ceil(math.ceil(N / grid.row_blocks) / 16) * 16
            assert rows * grid.row_blocks >= N
            # As in struct Group: `first` and `stride` of each group of each block of head 0.
            of_head = grid.blocks // h
            turns = sorted(
                turn
                for block in range(of_head)
                for index in range(grid.groups)
                for turn in range(block + index * of_head, B * grid.row_blocks, of_head * grid.groups)
            )
            assert turns == list(range(B * grid.row_blocks))
    mma.grids.cache_clear()
