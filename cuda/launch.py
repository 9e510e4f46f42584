"""Compilation and launches of the kernels in this folder, on torch's current stream: the one module that uses CuPy.

CuPy is imported at the first launch, never before, because worker processes fork. Compiled kernels are kept on disk
(CUPY_CACHE_DIR).
"""

import ctypes
import importlib.util
import struct
import threading
from functools import cache
from importlib import metadata
from pathlib import Path

import torch

# kan_basis imports the modules of this folder in turn; they may use one another inside functions only.
from kan_basis import torch_internals

FOLDER = Path(__file__).resolve().parent
OPTIONS = ("-std=c++17",)
OLDEST_TRITON = (3, 3)


@cache
def available() -> bool:
    """Whether CuPy is installed."""
    return importlib.util.find_spec("cupy") is not None


@cache
def _triton() -> str:
    if torch.version.hip:
        return "they are written for GPUs of NVIDIA"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    try:
        version = metadata.version("triton")
    except metadata.PackageNotFoundError:  # a build of Triton under another name; the import decides
        return ""
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TRITON:
        return f"they need Triton {'.'.join(map(str, OLDEST_TRITON))}, and {version} is installed"
    return ""


@torch.compiler.assume_constant_result
def no_triton() -> str:
    """Why kernels in Triton do not run on this machine, "" if they do."""
    return _triton()


@cache
def multiprocessors(device: int) -> int:
    """Multiprocessors of a GPU; a few for the device -1, the CPU, on which Triton interprets kernels in tests."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device >= 0 else 4


@cache
def _shared_memory(device: int) -> int:
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


@torch.compiler.assume_constant_result
def shared_memory(device: int | None) -> int:
    """Bytes of shared memory that a block may have; on a machine without a GPU there is no limit."""
    if not torch.cuda.is_available():
        return 1 << 30
    return _shared_memory(torch.cuda.current_device() if device is None else device)


@cache
def _too_old(device: int) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    if major >= 8:
        return ""
    name = torch.cuda.get_device_name(device)
    return f"they need a GPU of compute capability 8.0, and {name} has {major}.{minor}"


@torch.compiler.assume_constant_result
def refusal(device: int | None) -> str:
    """Why the kernels do not run on a GPU, "" if they do: they need compute capability 8.0, for cp.async.

    On a machine without a GPU the device is that of a fake tensor, on which they do.
    """
    if not torch.cuda.is_available():
        return ""
    return _too_old(torch.cuda.current_device() if device is None else device)


@cache
def source(file: str) -> str:
    """The text of a .cu file, with the headers of this folder in place of their #include lines."""
    lines = []
    for line in (FOLDER / file).read_text().splitlines():
        name = line.split('"')[1] if line.startswith('#include "') else None
        lines.append(source(name) if name else "" if line.strip() == "#pragma once" else line)
    return "\n".join(lines)


class _Arguments(threading.local):
    """Memory of a thread for the arguments of its launches, and the description of it that cuLaunchKernel takes."""

    def __init__(self) -> None:
        self.bytes = bytearray(256)
        self.size = ctypes.c_size_t()
        start = (ctypes.c_char * len(self.bytes)).from_buffer(self.bytes)
        # CU_LAUNCH_PARAM_BUFFER_POINTER, CU_LAUNCH_PARAM_BUFFER_SIZE, CU_LAUNCH_PARAM_END
        self.extra = (ctypes.c_void_p * 5)(1, ctypes.addressof(start), 2, ctypes.addressof(self.size), 0)
        self.address = ctypes.addressof(self.extra)
        # Devices whose context is bound to this thread.
        self.devices: set[int] = set()


_arguments = _Arguments()


class Kernel:
    """A template instance of a .cu file, such as 'k<float, 5>', loaded on one device.

    It is called as kernel(grid, threads, *arguments). `types` are the types of the arguments in the letters of struct:
    P an address, q int64, i int32, f float32.
    Raises: RuntimeError if the kernel cannot be compiled or loaded.
    """

    def __init__(self, file: str, name: str, types: str, shared_bytes: int, device: int) -> None:
        try:
            import cupy
        except ImportError as error:
            raise _failure(name, error) from error
        try:
            with torch.cuda.device(device), cupy.cuda.Device(device):
                module = cupy.RawModule(code=source(file), options=OPTIONS, name_expressions=(name,))
                function = module.get_function(name)
                # More than 48 KiB, static shared memory included, must be asked for. Kernel objects of other sizes
                # have the same function, hence the most that there is.
                if shared_bytes > 32 << 10:
                    function.max_dynamic_shared_size_bytes = shared_memory(device) - function.shared_size_bytes
                # CuPy looks up the current device at this attribute.
                self.handle = function.kernel.ptr
        except (cupy.cuda.compiler.CompileException, RuntimeError, OSError) as error:  # the driver raises RuntimeErrors
            raise _failure(name, error) from error
        self.function, self.shared_bytes, self.device = function, shared_bytes, device
        self.packing = struct.Struct(types)
        self.launch, self.set_device = cupy.cuda.driver.launchKernel, cupy.cuda.runtime.setDevice

    def __call__(self, grid: int, threads: int, *arguments: int) -> None:
        if torch_internals.current_device() != self.device:
            with torch.cuda.device(self.device):
                return self(grid, threads, *arguments)
        memory = _arguments
        self.packing.pack_into(memory.bytes, 0, *arguments)
        memory.size.value = self.packing.size
        # The driver, unlike the runtime, binds no context by itself, and a thread's first call may be this one.
        if self.device not in memory.devices:
            self.set_device(self.device)
            memory.devices.add(self.device)
        stream = torch_internals.current_stream(self.device)
        self.launch(self.handle, grid, 1, 1, threads, 1, 1, self.shared_bytes, stream, 0, memory.address)


def _failure(name: str, error: Exception) -> RuntimeError:
    return RuntimeError(
        f"the CUDA kernel {name} could not be compiled or loaded "
        f"({type(error).__name__}: {str(error).strip()[:300]}); KAN_KERNEL=torch computes in plain PyTorch instead"
    )


kernel = cache(Kernel)


def _allocate(size: int) -> int:
    """Address of `size` new bytes on the current device.

    Raises: torch.OutOfMemoryError if they are not there even after torch has given its unused memory back.
    """
    from cupy.cuda import runtime

    for last in (False, True):
        try:
            return runtime.malloc(size)
        except runtime.CUDARuntimeError as error:
            if last:
                raise torch.OutOfMemoryError(
                    f"CUDA out of memory: no {size} bytes for the partial sums of the rational function ({error})"
                ) from error
            torch.cuda.empty_cache()


COUNTERS = 256  # of a kernel, at most
_workspaces: dict[tuple[int, int], tuple[int, int]] = {}


def workspace(device: int, floats: int) -> tuple[int, int, torch.Tensor | None]:
    """Addresses of a kernel's counters and partial sums in device memory, and the tensor that holds them, if any.

    The COUNTERS counters of finished blocks are 0, and the kernel leaves them at 0. The partial sums are `floats`.
    Each stream has its workspace, because the kernels of one stream follow each other. It is not from torch's
    allocator, which may be filling the private pool of a CUDA graph. A graph that is being captured may run on any
    stream later and therefore gets a tensor for itself.
    """
    if torch_internals.current_device() != device:
        with torch.cuda.device(device):
            return workspace(device, floats)
    if torch.cuda.is_current_stream_capturing():
        memory = torch.zeros(COUNTERS + floats, dtype=torch.int32, device=f"cuda:{device}")
        return memory.data_ptr(), memory.data_ptr() + 4 * COUNTERS, memory
    stream = torch_internals.current_stream(device)
    address, size = _workspaces.get((device, stream), (0, 0))
    if size < floats:
        from cupy.cuda import runtime

        # 1 MiB, or twice what is needed now. It is never freed: earlier kernels may still write to a smaller one.
        size = max(2 * floats, 1 << 18)
        address = _allocate(4 * (COUNTERS + size))
        runtime.memsetAsync(address, 0, 4 * COUNTERS, stream)
        _workspaces[device, stream] = address, size
    return address, address + 4 * COUNTERS, None
