"""The one place that touches CuPy: devices, threads, memory, and what else is called cuda."""

import contextlib
import sys
import threading
import types
import warnings

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
    assert launch.Kernel("rational.cu", "k", "PPPPqiiiii", 64 << 10, 1).handle == 1001 and set(asked) == {1}


def test_an_old_gpu_is_said_once_and_seen_by_a_compiler(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5) if device == 6 else (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    launch._new_enough.cache_clear()
    with warnings.catch_warnings(record=True):
        compiled = torch.compile(lambda x: x + launch.runs_on(6), fullgraph=True, backend="aot_eager")
        assert bool(compiled(torch.zeros(1))) is not torch.cuda.is_available()  # without any GPU it is a fake tensor's
    launch._new_enough.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.warns(UserWarning, match="need a GPU of compute capability 8.0, and Tesla T4 has 7.5"):
        assert not launch.runs_on(6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 7)
        assert not launch.runs_on(6) and launch.runs_on(7) and launch.runs_on(None)
    launch._new_enough.cache_clear()


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
def test_a_thread_whose_first_call_this_is():
    """Everything is cached but the thread has no CUDA context yet."""
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
