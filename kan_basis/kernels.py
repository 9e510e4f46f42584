"""What computes a function on a GPU for which there are kernels: the kernels, or its definition in plain PyTorch.

    auto   the kernels where they can run; where they cannot, plain PyTorch and a warning that says why
    cuda   the kernels; where they cannot run, an error that says why
    torch  plain PyTorch

Configurations that no kernel is written for, such as attention with an l1 projection, are plain PyTorch in any case.

The choice concerns tensors on a GPU. Tensors on the CPU are always computed by the definition, whatever the choice: a
model may be built and checked on the CPU before it moves to the GPU. The environment variable KAN_KERNEL sets the
choice of a process.
"""

import importlib
import importlib.util
import os
import sys
import warnings
from pathlib import Path

import torch

KERNELS = ("auto", "cuda", "torch")
# The folder cuda/ of a checkout lies beside kan_basis/. An installation and torch.hub have its files as kan_cuda.
PACKAGES = ["kan_cuda"]
if "kan_cuda" not in sys.modules and Path(__file__).parents[1].joinpath("cuda", "rational.cu").exists():
    PACKAGES.insert(0, "cuda")

kernel, launch, edges, attention, missing = None, None, None, None, ""
for package in PACKAGES:
    try:  # registers the operators; CuPy and Triton are imported at the first launch
        kernel, launch, edges, attention = (
            importlib.import_module(f"{package}.{name}")
            for name in ("rational", "launch", "edges", "attention_operator")
        )
        missing = "" if importlib.util.find_spec("cupy") else "CuPy is not installed (pip install cupy-cuda13x)"
        break
    except ImportError as error:  # such as another package of that name
        missing = missing or f"the package {package} of the kernels cannot be imported ({error})"

_choice = os.environ.get("KAN_KERNEL", "auto")
if _choice not in KERNELS:
    warnings.warn(f"KAN_KERNEL={_choice} is none of {', '.join(KERNELS)}; auto is used", stacklevel=2)
    _choice = "auto"


class KernelRefusal(ValueError):
    """The kernels were chosen, but they do not take a tensor."""


def use_kernel(choice: str) -> None:
    """Choose what computes the functions that have kernels: auto, cuda or torch (see above).

    Raises: ValueError for another choice, or for cuda where no kernel can run.
    """
    global _choice
    if choice not in KERNELS:
        raise ValueError(f"unknown kernel '{choice}'; there are: {', '.join(KERNELS)}")
    if choice == "cuda" and (missing or not torch.cuda.is_available()):
        raise ValueError(f"the CUDA kernels cannot run here: {missing or 'there is no CUDA GPU'}")
    _choice = choice


def refusal(shape, dtype, device, a_shape, b_shape, dim: int) -> str:
    """Why the kernels do not take x and coefficients of these shapes on a GPU, "" if they do."""
    return missing or kernel.refusal(shape, dtype, a_shape, b_shape, dim) or launch.refusal(device.index)


def takes_attention(device: torch.device) -> bool:
    """Whether the operators of attention are meant for tensors on this device."""
    return device.type in (("cuda",) if attention is None else attention.DEVICES)


def path(refused: str, watched: bool, what: str = "rational") -> str:
    """How to compute a function of tensors on a GPU.

    Args:
        refused: why the kernels do not take the tensors, "" if they do.
        watched: whether the call must go through torch's dispatcher.
        what: name of the function, for messages.
    Returns: "kernel"; "operator", which is the kernel behind the dispatcher; or "definition".
    Raises: ValueError where the kernels were chosen and do not take the tensors.
    """
    if _choice == "torch" or watched and torch.onnx.is_in_onnx_export():
        return "definition"
    if not refused:
        return "operator" if watched else "kernel"
    if _choice == "cuda":
        raise KernelRefusal(f"the kernel 'cuda' was chosen, but the CUDA kernels cannot run: {refused}")
    _warn_once(what, refused)
    return "definition"


_warned: set[tuple[str, str]] = set()


@torch.compiler.assume_constant_result  # otherwise a compiler traces warnings.warn
def _warn_once(what: str, reason: str) -> bool:
    if (what, reason) not in _warned:
        _warned.add((what, reason))
        message = f"{what} runs in plain PyTorch, several times slower than its kernels: {reason}"
        warnings.warn(message, stacklevel=4)
    return True
