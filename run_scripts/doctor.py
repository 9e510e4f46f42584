"""Checks torch, GPU, CuPy, kernel cache and kernels; one line each, with a remedy for each fault. Run by doctor.sh."""

import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def torch_build() -> str:
    import torch

    if torch.version.cuda is None:
        raise RuntimeError(
            f"torch {torch.__version__} is a build without CUDA: fine for the CPU; for a GPU, pip install torch from PyPI"
        )
    return f"torch {torch.__version__}, built for CUDA {torch.version.cuda}"


def gpu() -> str:
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError(
            "torch sees no GPU: everything runs on the CPU; if there is one, see what nvidia-smi says and update the driver"
        )
    built = [int(code.split("_")[1].rstrip("af")) for code in torch.cuda.get_arch_list()]
    found = []
    for index in range(torch.cuda.device_count()):
        name, (major, minor) = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
        found.append(f"{name} (compute capability {major}.{minor})")
        if not any(code // 10 <= major for code in built):
            raise RuntimeError(
                f"torch {torch.__version__} is not built for {found[-1]}: install one that is, see https://pytorch.org/get-started"
            )
        if major < 8:
            raise RuntimeError(
                f"{found[-1]} has no kernels, which need 8.0 (A100) or newer: KAN_KERNEL=torch computes in plain PyTorch"
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
            f"CuPy {cupy.__version__} is for CUDA {major}, torch for CUDA {wanted}: pip uninstall cupy-cuda{major}x, "
            f"pip install cupy-cuda{wanted}x"
        )
    return f"CuPy {cupy.__version__} for CUDA {major}"


def cache() -> str:
    folder = Path(os.environ.get("CUPY_CACHE_DIR") or Path.home() / ".cupy" / "kernel_cache")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise RuntimeError(
            f"{folder} cannot be written ({error.strerror}): kernels would be compiled anew in every process; set CUPY_CACHE_DIR"
        ) from error
    return f"compiled kernels are kept in {folder}"


def kernels() -> str:
    import torch

    from kan_basis.rational import preset_coefficients, rational, use_kernel

    errors = []

    def gradients(dtype: torch.dtype, choice: str) -> list[torch.Tensor]:
        use_kernel(choice)
        live = [t.to(dtype).requires_grad_() for t in inputs]
        y = rational(*live)
        return [y, *torch.autograd.grad(y, live, torch.cos(3 * inputs[0]).to(dtype))]

    try:
        for index in range(torch.cuda.device_count()):
            inputs = [
                torch.linspace(-4, 4, 64 * 197 * 192).view(64, 197, 192).to(f"cuda:{index}"),
                *(torch.tensor([v], device=f"cuda:{index}") for v in preset_coefficients("swish", (5, 4))),
            ]
            exact = gradients(torch.float64, "torch")
            errors += [
                ((got - want).norm() / want.norm()).item() for got, want in zip(gradients(torch.float32, "cuda"), exact)
            ]
    except torch.OutOfMemoryError as error:
        raise RuntimeError("a GPU has no memory left for 100 MB: end what nvidia-smi shows there") from error
    except Exception as error:
        raise RuntimeError(
            f"the rational kernel does not run ({error}): if torch itself runs there, KAN_KERNEL=torch goes without it"
        ) from error
    if not max(errors) < 1e-5:
        raise RuntimeError(
            f"the rational kernel is wrong here, relative error {max(errors):.1e}: use KAN_KERNEL=torch, and please report it"
        )
    return f"rational kernel compiled and run, largest relative error {max(errors):.1e} against float64"


def main() -> int:
    faults = 0
    for name, check in (
        ("torch", torch_build),
        ("GPU", gpu),
        ("CuPy", cupy_build),
        ("cache", cache),
        ("kernels", kernels),
    ):
        if name == "kernels" and faults:
            print("--  kernels: not tried before the above is mended")
            break
        try:
            print(f"ok  {name}: {check()}")
        except Exception as error:  # a doctor does not fall ill
            faults += 1
            print(f"!!  {name}: {error if isinstance(error, RuntimeError) else f'{type(error).__name__}: {error}'}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
