"""The one place that touches CuPy: compiles kernels of this folder at run time and launches them on torch's current stream.

CuPy is imported at the first launch, never before: worker processes fork. Compiled kernels are kept on disk (CUPY_CACHE_DIR).
"""

import ctypes
import importlib.util
import struct
import threading
import warnings
from functools import cache
from pathlib import Path

import torch

FOLDER = Path(__file__).resolve().parent
OPTIONS = ("-std=c++17",)


@cache
def available() -> bool:
    """Whether kernels can be launched here: CuPy is installed."""
    return importlib.util.find_spec("cupy") is not None


@cache
def _new_enough(device: int) -> bool:
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        warnings.warn(
            "rational runs in plain PyTorch, several times slower than its CUDA kernels: they need a GPU of compute capability 8.0, and "
            f"{torch.cuda.get_device_name(device)} has {major}.{minor}",
            stacklevel=4,
        )
    return major >= 8


@torch.compiler.assume_constant_result
def runs_on(device: int | None) -> bool:
    """Whether a GPU has what the kernels are made of: compute capability 8.0, for cp.async. Where not, one warning. A fake tensor's GPU, on a machine
    without any, has it."""
    return not torch.cuda.is_available() or _new_enough(torch.cuda.current_device() if device is None else device)


@cache
def source(file: str) -> str:
    """The text of a .cu file with the headers of this folder in place of their #include lines: one text to compile and to cache."""
    lines = []
    for line in (FOLDER / file).read_text().splitlines():
        name = line.split('"')[1] if line.startswith('#include "') else None
        lines.append(source(name) if name else "" if line.strip() == "#pragma once" else line)
    return "\n".join(lines)


class _Arguments(threading.local):
    """Memory that a thread's calls put their arguments into, and what cuLaunchKernel must be given to find them there."""

    def __init__(self) -> None:
        self.bytes = bytearray(256)
        self.size = ctypes.c_size_t()
        start = (ctypes.c_char * len(self.bytes)).from_buffer(self.bytes)
        self.extra = (ctypes.c_void_p * 5)(
            1, ctypes.addressof(start), 2, ctypes.addressof(self.size), 0
        )  # buffer, its size, end
        self.address = ctypes.addressof(self.extra)
        self.devices: set[int] = set()  # whose context was made this thread's own


_arguments = _Arguments()


class Kernel:
    """A template instance such as 'k<float, 5>' of a .cu file, loaded on one device; call it as kernel(grid, threads, *arguments).

    types: those of the arguments in the letters of struct: P an address, q int64, i int32, f float32.
    """

    def __init__(self, file: str, name: str, types: str, shared_bytes: int, device: int) -> None:
        try:
            import cupy

            with torch.cuda.device(device), cupy.cuda.Device(device):
                function = cupy.RawModule(code=source(file), options=OPTIONS, name_expressions=(name,)).get_function(
                    name
                )
                if shared_bytes > 32 << 10:  # more than 48 KiB, static shared memory included, must be asked for
                    function.max_dynamic_shared_size_bytes = shared_bytes
                self.handle = function.kernel.ptr  # CuPy looks up the current device here
        except Exception as error:  # CuPy, NVRTC and the driver have many
            raise RuntimeError(
                f"the CUDA kernel {name} could not be compiled or loaded ({type(error).__name__}: {str(error).strip()[:300]}); "
                "KAN_KERNEL=torch goes without it, in plain PyTorch"
            ) from error
        self.function, self.shared_bytes, self.device, self.packing = (
            function,
            shared_bytes,
            device,
            struct.Struct(types),
        )
        self.launch, self.set_device = cupy.cuda.driver.launchKernel, cupy.cuda.runtime.setDevice

    def __call__(self, grid: int, threads: int, *arguments: int) -> None:
        memory = _arguments
        self.packing.pack_into(memory.bytes, 0, *arguments)
        memory.size.value = self.packing.size
        stream = torch._C._cuda_getCurrentRawStream(self.device)
        if torch._C._cuda_getDevice() == self.device:
            if (
                self.device not in memory.devices
            ):  # the driver, unlike the runtime, binds no context by itself, and this may be a thread's first call
                self.set_device(self.device)
                memory.devices.add(self.device)
            self.launch(self.handle, grid, 1, 1, threads, 1, 1, self.shared_bytes, stream, 0, memory.address)
        else:
            with torch.cuda.device(self.device):
                self.launch(self.handle, grid, 1, 1, threads, 1, 1, self.shared_bytes, stream, 0, memory.address)


@cache
def kernel(file: str, name: str, types: str, shared_bytes: int, device: int) -> Kernel:
    return Kernel(file, name, types, shared_bytes, device)


@cache
def multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _allocate(size: int) -> int:
    """Address of so many bytes on the current device. Raises: torch.OutOfMemoryError where torch's cache holds no free memory to give back."""
    from cupy.cuda import runtime

    try:
        return runtime.malloc(size)
    except runtime.CUDARuntimeError:
        torch.cuda.empty_cache()
    try:
        return runtime.malloc(size)
    except runtime.CUDARuntimeError as error:
        raise torch.OutOfMemoryError(
            f"CUDA out of memory: no {size} bytes for the partial sums of the rational function ({error})"
        ) from error


COUNTERS = 256  # at most, of a kernel
_workspaces: dict[tuple[int, int], tuple[int, int]] = {}


def workspace(device: int, floats: int) -> tuple[int, int, torch.Tensor | None]:
    """Addresses in device memory of COUNTERS zeros, which a kernel counts its finished blocks in and leaves at zero, and of room for `floats`
    partial sums; and the tensor that owns them, if any.

    Their own for each stream, because kernels of one stream follow each other, and not from torch's allocator, which may be filling the
    private pool of a CUDA graph at this moment; a captured graph, which may run anywhere, gets its own tensor.
    """
    if torch._C._cuda_getDevice() != device:
        with torch.cuda.device(device):
            return workspace(device, floats)
    if torch.cuda.is_current_stream_capturing():
        own = torch.zeros(COUNTERS + floats, dtype=torch.int32, device=f"cuda:{device}")
        return own.data_ptr(), own.data_ptr() + 4 * COUNTERS, own
    stream = torch._C._cuda_getCurrentRawStream(device)
    address, size = _workspaces.get((device, stream), (0, 0))
    if size < floats:
        from cupy.cuda import runtime

        size = max(2 * floats, 1 << 18)
        address = _allocate(
            4 * (COUNTERS + size)
        )  # 1 MiB or little more; kept for good, as earlier kernels may still write to a smaller one
        runtime.memsetAsync(address, 0, 4 * COUNTERS, stream)
        _workspaces[device, stream] = address, size
    return address, address + 4 * COUNTERS, None
