"""Check torch, the GPUs, CuPy, the kernel cache and the kernels; doctor.sh runs it.

Prints one line for each check, with a remedy for each fault; exit status 0 if every check passes, else 1.
"""

import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def torch_build() -> str:
    import torch

    if torch.version.cuda is None:
        raise RuntimeError(
            f"torch {torch.__version__} is a build without CUDA, for the CPU alone: for a GPU, install torch from PyPI"
        )
    return f"torch {torch.__version__}, built for CUDA {torch.version.cuda}"


def gpu() -> str:
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError(
            "torch sees no GPU, and everything runs on the CPU; if there is a GPU, run nvidia-smi and update the driver"
        )
    built = [int(code.split("_")[1].rstrip("af")) for code in torch.cuda.get_arch_list()]
    found = []
    for index in range(torch.cuda.device_count()):
        name, (major, minor) = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
        found.append(f"{name} (compute capability {major}.{minor})")
        if not any(code // 10 <= major for code in built):
            raise RuntimeError(
                f"torch {torch.__version__} is not built for {found[-1]}: "
                "install a build that is (https://pytorch.org/get-started)"
            )
        if major < 8:
            raise RuntimeError(
                f"{found[-1]} cannot run the kernels, which need 8.0 (A100) or newer: "
                "set KAN_KERNEL=torch for plain PyTorch"
            )
    return ", ".join(found)


def cupy_build() -> str:
    import torch

    wanted = (torch.version.cuda or "13").split(".")[0]
    try:
        import cupy
    except ImportError as error:
        raise RuntimeError(f"CuPy cannot be imported ({error}): pip install cupy-cuda{wanted}x") from error
    major = str(cupy.cuda.runtime.runtimeGetVersion() // 1000)
    if major != wanted:
        raise RuntimeError(
            f"CuPy {cupy.__version__} is for CUDA {major}, but torch is for CUDA {wanted}: "
            f"pip uninstall cupy-cuda{major}x, pip install cupy-cuda{wanted}x"
        )
    return f"CuPy {cupy.__version__} for CUDA {major}"


def cache() -> str:
    folder = Path(os.environ.get("CUPY_CACHE_DIR") or Path.home() / ".cupy" / "kernel_cache")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise RuntimeError(
            f"{folder} is not writable ({error.strerror}), so that every process compiles the kernels again: "
            "set CUPY_CACHE_DIR to another folder"
        ) from error
    return f"compiled kernels are kept in {folder}"


def kernels() -> str:
    import torch

    from kan_basis.group_rational import preset_coefficients
    from kan_basis.kernels import use_kernel
    from kan_basis.rational import rational

    errors = []

    def gradients(dtype: torch.dtype, choice: str) -> list[torch.Tensor]:
        use_kernel(choice)
        live = [t.to(dtype).requires_grad_() for t in inputs]
        y = rational(*live)
        return [y, *torch.autograd.grad(y, live, torch.cos(3 * inputs[0]).to(dtype))]

    try:
        for index in range(torch.cuda.device_count()):
            coefficients = (torch.tensor([values]) for values in preset_coefficients("swish", (5, 4)))
            x = torch.linspace(-4, 4, 64 * 197 * 192).view(64, 197, 192)
            inputs = [t.cuda(index) for t in (x, *coefficients)]
            for want, got in zip(gradients(torch.float64, "torch"), gradients(torch.float32, "cuda")):
                errors.append(((got - want).norm() / want.norm()).item())
    except torch.OutOfMemoryError as error:
        raise RuntimeError(
            "a GPU has less than 100 MB of free memory: stop the processes that nvidia-smi lists"
        ) from error
    except Exception as error:
        raise RuntimeError(
            f"the rational kernel does not run ({error}): set KAN_KERNEL=torch for plain PyTorch"
        ) from error
    if not max(errors) < 1e-5:
        raise RuntimeError(
            f"the rational kernel computes wrong values here (relative error {max(errors):.1e}): "
            "set KAN_KERNEL=torch for plain PyTorch, and please report the error"
        )
    return f"the rational kernel compiles and runs; its largest relative error against float64 is {max(errors):.1e}"


def main() -> int:
    faults = 0
    checks = {"torch": torch_build, "GPU": gpu, "CuPy": cupy_build, "cache": cache, "kernels": kernels}
    for name, check in checks.items():
        if name == "kernels" and faults:
            print("--  kernels: not tried, because of the faults above")
            break
        try:
            print(f"ok  {name}: {check()}")
        except Exception as error:  # Any fault becomes a line of the report.
            faults += 1
            print(f"!!  {name}: {error if isinstance(error, RuntimeError) else f'{type(error).__name__}: {error}'}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
