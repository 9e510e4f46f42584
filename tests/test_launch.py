"""Launches with CuPy: devices, threads, memory, and the other packages called cuda."""

import contextlib
import os
import subprocess
import sys
import threading
import types

import pytest
import torch

from cuda import launch
from kan_basis import GroupRational


def test_a_kernel_for_a_device_that_is_not_the_current_one(monkeypatch):
    """CuPy loads a kernel on, and returns the handle of, the device that is current when its attribute is read."""
    current, asked = [0], []

    @contextlib.contextmanager
    def on(device):
        current.append(device)
        yield
        current.pop()

    class Function:
        shared_size_bytes = 1024

        @property
        def kernel(self):
            asked.append(current[-1])
            return types.SimpleNamespace(ptr=1000 + current[-1])

    cuda = types.SimpleNamespace(
        Device=on, driver=types.SimpleNamespace(launchKernel=None), runtime=types.SimpleNamespace(setDevice=None)
    )
    module = types.SimpleNamespace(get_function=lambda name: Function())
    monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace(cuda=cuda, RawModule=lambda **options: module))
    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(launch, "shared_memory", lambda device: 227 << 10)
    kernel = launch.Kernel("rational.cu", "k", "PPPPqiiiii", 64 << 10, 1)
    assert kernel.handle == 1001 and set(asked) == {1}
    assert kernel.function.max_dynamic_shared_size_bytes == 226 << 10


def test_the_reason_against_an_old_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5) if device == 6 else (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    launch._too_old.cache_clear()
    compiled = torch.compile(lambda x: x + (launch.refusal(6) == ""), fullgraph=True, backend="aot_eager")
    # Without any GPU the device is that of a fake tensor.
    assert bool(compiled(torch.zeros(1))) is not torch.cuda.is_available()
    launch._too_old.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 7)
    assert launch.refusal(6) == "they need a GPU of compute capability 8.0, and Tesla T4 has 7.5"
    assert launch.refusal(7) == launch.refusal(None) == ""
    launch._too_old.cache_clear()


@pytest.mark.parametrize("failures", [0, 1, 2])
def test_memory_that_torch_keeps_is_given_back_once(failures, monkeypatch):
    class Refused(Exception):
        pass

    left, emptied = [Refused("out of memory")] * failures, []

    def malloc(size):
        if left:
            raise left.pop()
        return 4096

    cuda = types.SimpleNamespace(runtime=types.SimpleNamespace(malloc=malloc, CUDARuntimeError=Refused))
    monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace(cuda=cuda))
    monkeypatch.setitem(sys.modules, "cupy.cuda", cuda)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    with pytest.raises(torch.OutOfMemoryError, match="no 1024 bytes") if failures == 2 else contextlib.nullcontext():
        assert launch._allocate(1024) == 4096
    assert len(emptied) == min(failures, 1)


@pytest.mark.gpu
def test_the_first_call_of_a_thread():
    """Everything is cached, but the thread has no CUDA context yet."""
    layer, x = GroupRational(8, num_channels=96).cuda(), torch.randn(4, 96, device="cuda")
    with torch.no_grad():
        want, found = layer(x), []
        torch.cuda.synchronize()

        def run():
            with torch.no_grad():
                found.append(layer(x))

        for _ in range(2):
            thread = threading.Thread(target=run)
            thread.start(), thread.join()
    assert len(found) == 2 and all(torch.equal(y, want) for y in found)


def test_the_package_cuda_stays_open_for_others():
    """CuPy imports cuda.pathfinder and torch cuda.bindings: a cuda/__init__.py here would hide both."""
    assert not (launch.FOLDER / "__init__.py").exists()
    pytest.importorskip("cupy")
    import cuda.pathfinder  # noqa: F401


def python(code, path):
    """Runs code with the folder `path` before the other modules."""
    command = [sys.executable, "-c", code]
    result = subprocess.run(
        command, cwd=path, env=os.environ | {"PYTHONPATH": str(path)}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


def test_a_package_called_cuda_that_hides_the_kernels(tmp_path):
    (tmp_path / "cuda").mkdir()
    (tmp_path / "cuda" / "__init__.py").touch()
    code = f"""if True:
        import sys; sys.path.insert(1, {str(launch.FOLDER.parent)!r})
        import torch
        from kan_basis import GroupRational, kernels
        assert kernels.kernel is None
        assert kernels.missing.startswith("the package cuda of the kernels cannot be imported (No module named 'cuda.")
        assert GroupRational()(torch.ones(2, 8)).shape == (2, 8)
    """
    python(code, tmp_path)


def test_an_installation_has_the_kernels_as_kan_cuda(tmp_path):
    """Beside a package called cuda that is not ours."""
    for name, folder in (("kan_basis", "kan_basis"), ("kan_cuda", "cuda")):
        (tmp_path / name).symlink_to(launch.FOLDER.parent / folder)
    (tmp_path / "cuda").mkdir()
    (tmp_path / "cuda" / "rational.py").write_text("raise AssertionError")
    code = """if True:
        import torch
        import kan_cuda.rational
        from kan_basis import kernels
        assert kernels.kernel is kan_cuda.rational and kernels.launch is kan_cuda.launch
        assert torch.ops.kan.rational.default and kan_cuda.launch.source("rational.cu")
    """
    python(code, tmp_path)
