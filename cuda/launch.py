"""The one place that touches CuPy: compiles kernels of this folder at run time and launches them on torch's current stream.

CuPy is imported at the first launch, never before: worker processes fork. Compiled kernels are kept on disk (CUPY_CACHE_DIR).
"""
import ctypes
import importlib.util
from functools import lru_cache
from pathlib import Path

import torch

FOLDER = Path(__file__).resolve().parent
OPTIONS = ("-std=c++17",)


@lru_cache(maxsize=None)
def available() -> bool:
    """Whether kernels can be launched here: CuPy is installed."""
    return importlib.util.find_spec("cupy") is not None


@lru_cache(maxsize=None)
def source(file: str) -> str:
    """The text of a .cu file with the headers of this folder in place of their #include lines: one text to compile and to cache."""
    lines = []
    for line in (FOLDER / file).read_text().splitlines():
        name = line.split('"')[1] if line.startswith('#include "') else None
        lines.append(source(name) if name else "" if line.strip() == "#pragma once" else line)
    return "\n".join(lines)


class Kernel:
    """A template instance such as 'k<float, 5>' of a .cu file, loaded on one device.

    Calls pass tensors' addresses, then int64, then int32 arguments, which the kernel must take in this order.
    """

    def __init__(self, file: str, name: str, shared_bytes: int, device: int) -> None:
        try:
            import cupy
            with torch.cuda.device(device), cupy.cuda.Device(device):
                function = cupy.RawModule(code=source(file), options=OPTIONS, name_expressions=(name,)).get_function(name)
                if shared_bytes > 32 << 10:  # more than 48 KiB, static shared memory included, must be asked for
                    function.max_dynamic_shared_size_bytes = shared_bytes
        except Exception as error:  # CuPy, NVRTC and the driver have many
            raise RuntimeError(f"the CUDA kernel {name} could not be compiled or loaded ({type(error).__name__}: {str(error).strip()[:300]}); "
                               "KAN_KERNEL=torch goes without it, in plain PyTorch") from error
        self.function, self.shared_bytes, self.device = function, shared_bytes, device
        self.handle, self.launch = function.kernel.ptr, cupy.cuda.driver.launchKernel

    def __call__(self, grid: int, threads: int, addresses: tuple[int, ...], longs: tuple[int, ...] = (), ints: tuple[int, ...] = ()) -> None:
        values = (*map(ctypes.c_void_p, addresses), *map(ctypes.c_longlong, longs), *map(ctypes.c_int, ints))
        parameters = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        stream = torch._C._cuda_getCurrentRawStream(self.device)
        if torch.cuda.current_device() == self.device:
            self.launch(self.handle, grid, 1, 1, threads, 1, 1, self.shared_bytes, stream, ctypes.addressof(parameters), 0)
        else:
            with torch.cuda.device(self.device):
                self.launch(self.handle, grid, 1, 1, threads, 1, 1, self.shared_bytes, stream, ctypes.addressof(parameters), 0)


@lru_cache(maxsize=None)
def kernel(file: str, name: str, shared_bytes: int, device: int) -> Kernel:
    return Kernel(file, name, shared_bytes, device)


@lru_cache(maxsize=None)
def multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


_counters: dict[tuple[int, int], tuple[int, int]] = {}


def counters(device: torch.device, count: int) -> tuple[int, torch.Tensor | None]:
    """Address of zeros in device memory that a kernel counts its finished blocks in and leaves at zero, and the tensor that owns them, if any.

    Their own for each stream, because kernels of one stream follow each other, and not from torch's allocator, which may be filling the
    private pool of a CUDA graph at this moment; a captured graph, which may run anywhere, gets its own tensor.
    """
    if torch.cuda.is_current_stream_capturing():
        own = torch.zeros(count, dtype=torch.int32, device=device)
        return own.data_ptr(), own
    stream = torch._C._cuda_getCurrentRawStream(device.index)
    address, size = _counters.get((device.index, stream), (0, 0))
    if size < count:
        from cupy.cuda import runtime
        size = max(count, 1024)
        with torch.cuda.device(device):
            address = runtime.malloc(4 * size)  # a few KiB, kept for good
            runtime.memsetAsync(address, 0, 4 * size, stream)
        _counters[device.index, stream] = address, size
    return address, None
