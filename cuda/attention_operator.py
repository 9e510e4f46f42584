"""The operators kan::attention and kan::attention_backward: their checks, fake kernels and derivatives.

attention.py launches the kernels. kan_basis/attention.py has the definition and the function that users call. With the
environment variable TRITON_INTERPRET=1 the operators also take tensors on the CPU, slowly, for tests.
"""

import os
from typing import NamedTuple

import torch
from torch import Tensor

from kan_basis import torch_internals

from . import attention, launch

# Device types of the tensors that the operators take, and their names in torch's dispatcher.
DEVICES = {"cuda": "CUDA"} | ({"cpu": "CPU"} if os.environ.get("TRITON_INTERPRET") == "1" else {})


class Function(NamedTuple):
    """The arguments of the operators that are not tensors."""

    scale: float
    basis: str
    order: int
    low: float
    step: float
    base: str


def refusal(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    rank: int,
    features: int,
    basis: str,
    order: int,
    base: str,
) -> str:
    """Why the kernels do not take q, k and v of this shape (B, h, N, d) on a device, "" if they do."""
    reason = attention.refusal(shape, dtype, rank, features, basis, order, base)
    if reason or device.type != "cuda":
        return reason
    large = attention.too_large(shape[-1], rank, features, dtype.itemsize, device.index)
    return launch.refusal(device.index) or large


def _saved_shapes(shape: tuple[int, ...], rank: int, features: int) -> tuple[tuple[int, ...], ...]:
    """Shapes of z, W^T V and the packed coefficients."""
    (B, h, N, d), R = shape, attention._block(rank)
    padded = (N + attention.ROWS - 1) // attention.ROWS * attention.ROWS
    return (B, h, N, R), (B, h, R, d), (h, 2 * features + 1, padded, R)


def _empty(q: Tensor, rank: int, features: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tensors like the results of `forward`."""
    return attention.heads_last(q), *(q.new_empty(shape) for shape in _saved_shapes(q.shape, rank, features))


def _empty_gradients(q: Tensor, packed: Tensor, rank: int) -> tuple[Tensor, ...]:
    """Tensors like the results of `backward`."""
    h, N, dtype = q.shape[1], q.shape[2], torch.float32
    sums = q.new_empty(h, packed.shape[1] // 2, N, rank, dtype=dtype), q.new_empty(h, N, rank, dtype=dtype)
    return *(attention.heads_last(q) for _ in range(3)), *sums


def forward(q: Tensor, k: Tensor, v: Tensor, coefficients: Tensor, projector: Tensor, *function) -> tuple[Tensor, ...]:
    """The result, and what the backward pass needs besides q, k and v: z, W^T V and the packed coefficients.

    Args:
        q, k, v: (B, h, N, d) of one dtype, any strides.
        coefficients: (h, F, N, r), any strides; the factors of a base function are the last feature.
        projector: (h, N, r), any strides.
        function: see Function.
    """
    if q.numel() == 0:
        return _empty(q, projector.shape[-1], coefficients.shape[1])
    if q.is_cuda and torch_internals.current_device() != q.get_device():
        with torch.cuda.device(q.device):
            return attention.forward(q, k, v, coefficients, projector, *function)
    return attention.forward(q, k, v, coefficients, projector, *function)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, z: Tensor, values: Tensor, packed: Tensor, rank: int, *function
) -> tuple[Tensor, ...]:
    """The gradients of q, k, v, coefficients and projector; the last two are contiguous and float32."""
    if q.numel() == 0:
        *gradients, d_coefficients, d_projector = _empty_gradients(q, packed, rank)
        return *gradients, d_coefficients.zero_(), d_projector.zero_()
    if q.is_cuda and torch_internals.current_device() != q.get_device():
        with torch.cuda.device(q.device):
            return backward(grad, q, k, v, z, values, packed, rank, *function)
    return attention.backward(grad, q, k, v, z, values, packed, rank, *function)


library = torch.library.Library("kan", "FRAGMENT")
_function = "float scale, str basis, int order, float low, float step, str base"
library.define(
    f"attention(Tensor q, Tensor k, Tensor v, Tensor coefficients, Tensor projector, {_function})"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
library.define(
    "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor z, Tensor values, Tensor packed, int rank, "
    f"{_function}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _check(fit: bool, q: Tensor, others: dict[str, Tensor], rank: int, features: int, function: Function) -> None:
    """The operators' arguments, which may come from another caller. Raises: ValueError."""
    reason = "shapes, dtypes or devices do not fit together"
    if fit and all(t.device == q.device for t in others.values()):
        names = function.basis, function.order, function.base
        reason = refusal(q.shape, q.dtype, q.device, rank, features, *names)
    if reason:
        shapes = ", ".join(f"{name} {tuple(t.shape)} {t.dtype} on {t.device}" for name, t in others.items())
        raise ValueError(
            f"kan::attention cannot take q {tuple(q.shape)} {q.dtype} on {q.device} with {shapes}: {reason}"
        )


def _forward_operator(
    q: Tensor, k: Tensor, v: Tensor, coefficients: Tensor, projector: Tensor, *function
) -> tuple[Tensor, ...]:
    fit = (
        q.shape == k.shape == v.shape
        and q.dtype == k.dtype == v.dtype
        and (q.ndim, coefficients.ndim, projector.ndim) == (4, 4, 3)
        and coefficients[:, 0].shape == projector.shape
        and projector.shape[:2] == q.shape[1:3]
        and 0 not in (*q.shape[1:], projector.shape[2])
    )
    others = dict(k=k, v=v, coefficients=coefficients, projector=projector)
    features = coefficients.shape[1] if fit else 0
    _check(fit, q, others, projector.shape[-1], features, Function(*function))
    return forward(q, k, v, coefficients, projector, *function)


def _backward_operator(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, z: Tensor, values: Tensor, packed: Tensor, rank: int, *function
) -> tuple[Tensor, ...]:
    saved, features = (z, values, packed), packed.shape[1] // 2 if packed.ndim == 4 else 0
    fit = (
        grad.shape == q.shape == k.shape == v.shape
        and q.ndim == 4
        and features > 0
        and all(t.is_contiguous() and t.data_ptr() % 16 == 0 for t in saved)
        and all(t.dtype == q.dtype for t in (k, v, *saved))
        and tuple(tuple(t.shape) for t in saved) == _saved_shapes(tuple(q.shape), rank, features)
    )
    others = dict(grad=grad, k=k, v=v, z=z, values=values, packed=packed)
    _check(fit, q, others, rank, features, Function(*function))
    return backward(grad, q, k, v, z, values, packed, rank, *function)


for _key in DEVICES.values():
    library.impl("attention", _forward_operator, _key)
    library.impl("attention_backward", _backward_operator, _key)


@torch.library.register_fake("kan::attention", lib=library)
def _(q, k, v, coefficients, projector, *function):
    return _empty(q, projector.shape[-1], coefficients.shape[1])


@torch.library.register_fake("kan::attention_backward", lib=library)
def _(grad, q, k, v, z, values, packed, rank, *function):
    return _empty_gradients(q, packed, rank)


def _save(ctx, inputs, output) -> None:
    q, k, v, coefficients, projector, *ctx.function = inputs
    ctx.rank, ctx.dtypes = projector.shape[-1], (coefficients.dtype, projector.dtype)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output[1:])


def _differentiate(ctx, grad: Tensor | None, *_, run=torch.ops.kan.attention_backward):
    from kan_basis.quotient import refuse_second_derivatives  # here, because kan_basis imports this module

    refuse_second_derivatives("Kolmogorov-Arnold attention")
    nothing = [None] * len(Function._fields)
    if grad is None:
        return *(None for _ in range(5)), *nothing
    *gradients, d_coefficients, d_projector = run(grad, *ctx.saved_tensors, ctx.rank, *ctx.function)
    of_coefficients, of_projector = ctx.dtypes
    return *gradients, d_coefficients.to(of_coefficients), d_projector.to(of_projector), *nothing


torch.library.register_autograd("kan::attention", _differentiate, setup_context=_save, lib=library)


class Attention(torch.autograd.Function):
    """kan::attention without the cost of torch's dispatcher; only the first result has a gradient."""

    @staticmethod
    def forward(ctx, *inputs) -> Tensor:
        output = forward(*inputs)
        _save(ctx, inputs, output)
        return output[0]

    @staticmethod
    def backward(ctx, grad: Tensor | None):
        behind_dispatcher = grad is None or torch_internals.watched(grad) or torch_internals.is_batch(grad)
        return _differentiate(ctx, grad, run=torch.ops.kan.attention_backward if behind_dispatcher else backward)
