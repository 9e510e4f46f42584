"""The private interfaces of torch that this package uses, each with a fallback, in this module alone.

They answer in nanoseconds what public functions answer in microseconds, or what no public function answers. Where a
version of torch lacks one, the fallback is slower but right: it is the public function, or it assumes the general case.
Read in torch 2.6, 2.11 and 2.15.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from operator import attrgetter

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad


def _private(name: str, fallback: Callable) -> Callable:
    """torch.<name>, or the fallback where this version of torch lacks it."""
    try:
        return attrgetter(name)(torch)
    except AttributeError:
        return fallback


# Whether autocast may be enabled for any device. The general case is that it may be.
any_autocast = _private("_C._is_any_autocast_enabled", lambda: True)
# Whether a tensor is a batch of tensors of is_grads_batched. The general case is that it is.
is_batch = _private("_C._functorch.is_legacy_batchedtensor", lambda t: True)
# Handle of the current stream of a device (an index), and index of the current device.
current_stream = _private("_C._cuda_getCurrentRawStream", lambda device: torch.cuda.current_stream(device).cuda_stream)
current_device = _private("_C._cuda_getDevice", torch.cuda.current_device)

# For `watched`. The general case is that there is a dispatch mode and a transform.
_dispatch_modes = _private("_C._len_torch_dispatch_stack", lambda: 1)
_transform = _private("_C._functorch.peek_interpreter_stack", lambda: True)
_tracing_state = _private("_C._get_tracing_state", lambda: torch.jit.is_tracing() or None)

_FLOAT32_PRODUCTS = "dtype" in torch.ops.aten.bmm.overloads()


def has_float32_product(a: Tensor) -> bool:
    """Whether torch.bmm(a, b, out_dtype=torch.float32) exists for this half-precision tensor."""
    return _FLOAT32_PRODUCTS and a.is_cuda and a.dtype in (torch.bfloat16, torch.float16)


def no_autocast(x: Tensor) -> AbstractContextManager:
    """Without autocast on the device of x. Meta tensors, which have none, are refused by torch.autocast."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def exporting() -> bool:
    """Whether torch.export traces; before torch 2.7, False.

    Up to torch 2.11 at least, torch.compiler.is_exporting() is also True where torch.compile traces.
    """
    return getattr(torch.compiler, "_is_exporting_flag", False)


def forward_mode() -> bool:
    """Whether forward-mode differentiation is active. The general case is that it is."""
    return getattr(forward_ad, "_current_level", 0) >= 0


def watched(*tensors: Tensor) -> bool:
    """Whether anything but autograd wants to see the operations on these tensors.

    That is a compiler, a tracer, a dispatch mode, a transform of torch.func or a subclass of Tensor. Without any of
    them a call may bypass the dispatcher, which takes more host time than the rest of the call.
    """
    if torch.compiler.is_compiling() or _dispatch_modes() > 0 or _tracing_state() is not None:
        return True
    for t in tensors:
        if type(t) is not Tensor and type(t) is not nn.Parameter:
            return True
    return _transform() is not None
