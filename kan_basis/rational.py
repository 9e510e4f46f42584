"""Rational functions without poles (safe Pade activation units), in plain PyTorch.

    F(x) = P(x) / Q(x),   P(x) = a_0 + a_1 x + ... + a_m x^m
    version A: Q(x) = 1 + |b_1| |x| + ... + |b_n| |x|^n      one absolute value for each term: KAT and FlashKAT
    version B: Q(x) = 1 + |b_1 x + ... + b_n x^n|            KArAt

Q >= 1 for every x. |t| has the derivative +1 at t = 0, in x and in b, so that a denominator that starts at 0 trains.

The definition is in kan_basis.quotient. `RationalBasis` has a set of coefficients for each function. In `rational` the
channels of a group share a function of version A; on a GPU it runs in CUDA kernels (kan_basis.kernels), which are
tested against the definition.
Source: Molina et al. 2020 (arXiv:1907.06732), versions A and B; groups of channels: Yang & Wang 2025
(arXiv:2409.10594), sec. 4; KArAt: Maity et al. 2025 (arXiv:2503.10632).
"""

import math
from dataclasses import dataclass
from functools import cache, lru_cache

import torch
from torch import Tensor, nn

from kan_basis import kernels, torch_internals
from kan_basis.basis import Basis, check_init, mean_square, option, register
from kan_basis.quotient import Rational, evaluate, quotient

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@register("rational")
@dataclass(frozen=True)
class RationalBasis(Basis):
    """P / Q with theta = [a_0..a_m, b_1..b_n], P = m + 1 + n coefficients; not linear in them.

    Raises: ValueError for impossible degrees.
    """

    degrees: tuple[int, int] = option(
        (5, 4), "degrees of numerator and denominator", metavar=("M", "N"), attention_name="rational_order"
    )
    version: str = option(
        "B",
        "denominator: A, 1 + |b1| |x| + ..; B, 1 + |b1 x + ..|",
        choices=lambda: ["A", "B"],
        attention_name="rational_version",
        mlp_default="A",
    )
    numerator_groups: int = option(
        1, "groups of channels that share a numerator; 0 or less: one numerator per channel", mlp_only=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.degrees[0] < 0 or self.degrees[1] < 1:
            raise ValueError(f"degrees must be (m >= 0, n >= 1), not {self.degrees}")

    @property
    def num_coefficients(self) -> int:
        return sum(self.degrees) + 1

    @property
    def flops(self) -> int:
        return 2 * sum(self.degrees) + 3

    @property
    def formula(self) -> str:
        m, n = self.degrees
        q = {"A": f"sum over j = 1..{n} of |b_j| |x|^j", "B": f"|sum over j = 1..{n} of b_j x^j|"}[self.version]
        return f"(sum over i = 0..{m} of a_i x^i) / (1 + {q})"

    @property
    def edge_function(self) -> tuple[str, int, int]:
        return f"rational_{self.version}", *self.degrees

    def scaled(self, theta: Tensor, scale: Tensor) -> Tensor:
        a, b = theta.tensor_split([self.degrees[0] + 1], -1)
        return torch.cat([a * scale.unsqueeze(-1), b], -1)

    def __call__(self, x: Tensor, theta: Tensor) -> Tensor:
        self.check(theta)
        dtype = torch.promote_types(x.dtype, theta.dtype)
        x, theta = (t.to(torch.promote_types(dtype, torch.float32)) for t in (x, theta))
        a, b = theta.movedim(-1, 0).tensor_split([self.degrees[0] + 1])
        return quotient(x, a, b, self.version).to(dtype)

    @torch.no_grad()
    def reset_(self, theta: Tensor, init: str = "published", fan_in: int = 1) -> Tensor:
        """All coefficients N(0, 1) (published), or each divided by the root mean square of its power of x (scaled).

        scaled: b_j ~ N(0, 1 / E[x^2j]) and a_i ~ N(0, 1 / (fan_in M E[x^2i])), where E[x^2i] = (2i - 1)!!. No power
        dominates then. M = E[sum_i x^2i / E[x^2i] / Q(x)^2], finite because Q >= 1, makes the variance 1.
        """
        check_init(init, fan_in)
        theta.normal_()
        if init == "scaled":
            m, n = self.degrees
            scale = 1 / math.sqrt(fan_in * _second_moment(m, n, self.version))
            scales = [scale * _unit_scale(i) for i in range(m + 1)] + [_unit_scale(j) for j in range(1, n + 1)]
            theta *= theta.new_tensor(scales)
        return theta

    def activation(self, num_groups: int, target: str, num_channels: int | None = None, **factory) -> nn.Module:
        """Version A: a GroupRational that starts from the preset `target`. Version B: as every other basis."""
        if self.version == "B":
            return super().activation(num_groups, target, num_channels, **factory)
        from kan_basis.group_rational import GroupRational

        return GroupRational(num_groups, target, self.degrees, self.numerator_groups, num_channels, **factory)


def _unit_scale(power: int) -> float:
    """1 / sqrt(E[x^(2 power)]) for x ~ N(0, 1)."""
    return 1 / math.sqrt(math.prod(range(1, 2 * power, 2)))


@cache
def _second_moment(m: int, n: int, version: str) -> float:
    """M of `RationalBasis.reset_`: over x by quadrature, over b by the mean of fixed draws."""
    generator = torch.Generator("cpu").manual_seed(0)
    b = torch.randn(4096, n, dtype=torch.float64, device="cpu", generator=generator).T
    b = b * b.new_tensor([[_unit_scale(j)] for j in range(1, n + 1)])

    def f(x: Tensor) -> Tensor:
        x = x.unsqueeze(-1)
        energy = sum((x**i * _unit_scale(i)) ** 2 for i in range(m + 1))
        return quotient(x, energy.sqrt()[None], b, version)

    return mean_square(f, points=401)


def rational(x: Tensor, numerator: Tensor, denominator: Tensor, channel_dim: int = -1) -> Tensor:
    """Rational functions P(x) / Q(x) of version A, Q(x) = 1 + sum_j |b_j| |x|^j, shared by groups of channels.

    The channels are split into contiguous groups, and the channels of a group share one function. The numerator and the
    denominator have each a number of groups, from 1 (all channels share it) to C (one for each channel).

    Gradients, in closed form, with R = P' and S = dQ/dx = sign(x) (|b_1| + 2 |b_2| |x| + ... + n |b_n| |x|^(n-1)):
    dF/dx = R/Q - S P/Q^2,  dF/da_i = x^i / Q,  dF/db_j = -sign(b_j) |x|^j P/Q^2, where sign(0) = +1.
    Only x and the coefficients are kept for the backward pass. There are no second derivatives, and the transforms of
    torch.func are not supported. |x|^m and |x|^n must not overflow: |x| < 1e7 in float32 with the degrees 5 and 4.

    Args:
        x: any shape with C channels along `channel_dim`, any strides, float32 / float16 / bfloat16 / float64.
        numerator: a_0..a_m, (groups, m + 1), groups divides C.
        denominator: b_1..b_n, (groups, n), groups divides C.
        channel_dim: -1 for channels last, 1 for (B, C, H, W).
    Returns: shape and dtype of x, computed in float32 (float64 for float64). Under autocast x is first cast to the
        autocast dtype, as torch.nn.functional.linear does. Gradients of coefficients have the coefficients' dtype.
    Raises: TypeError if a tensor is not floating point; ValueError if shapes or devices do not fit together, or if the
        kernels were chosen (kan_basis.kernels) and do not take these tensors.
    """
    watched = torch_internals.watched(x, numerator, denominator)
    refused = (_check if watched else _check_once)(
        x.shape,
        x.dtype,
        x.device,
        numerator.shape,
        numerator.dtype,
        numerator.device,
        denominator.shape,
        denominator.dtype,
        denominator.device,
        channel_dim,
    )
    # The first question answers most calls and takes a fifth of the time.
    if (
        torch_internals.any_autocast()
        and not x.is_meta
        and x.dtype is not torch.float64
        and torch.is_autocast_enabled(x.device.type)
    ):
        dtype = torch.get_autocast_dtype(x.device.type)
        x = x if x.dtype is dtype else x.to(dtype)
    dim, path = channel_dim % x.ndim, "definition" if refused is None else kernels.path(refused, watched)
    # An operator would drop the tangents of forward mode; the autograd function below refuses them.
    if path == "operator" and (torch.compiler.is_compiling() or not torch_internals.forward_mode()):
        return torch.ops.kan.rational(x, numerator, denominator, dim)
    if (
        path == "kernel"
        and not (torch.is_grad_enabled() and (x.requires_grad or numerator.requires_grad or denominator.requires_grad))
        and not torch_internals.forward_mode()
    ):
        return kernels.kernel.forward(x, numerator, denominator, dim)  # the same without the cost of autograd
    if watched and torch.onnx.is_in_onnx_export():
        return evaluate(x, numerator, denominator, dim)
    return Rational.apply(x, numerator, denominator, dim, path)


def _check(shape, dtype, device, a_shape, a_dtype, a_device, b_shape, b_dtype, b_device, dim: int) -> str | None:
    """Why the kernels do not take these arguments, "" if they do, None for tensors that are not on a GPU.

    Raises: see `rational`.
    """
    for name, t_dtype, t_device in (
        ("x", dtype, device),
        ("numerator", a_dtype, a_device),
        ("denominator", b_dtype, b_device),
    ):
        if t_dtype not in FLOAT_DTYPES:
            raise TypeError(f"rational: {name} must be float32, float16, bfloat16 or float64, not {t_dtype}")
        if t_device != device:
            raise ValueError(f"rational: x is on {device} but {name} is on {t_device}")
    if not -len(shape) <= dim < len(shape):
        raise ValueError(f"rational: channel_dim {dim} does not exist in x of shape {tuple(shape)}")
    for name, t_shape, minimum in (("numerator", a_shape, "m + 1 >= 1"), ("denominator", b_shape, "n >= 1")):
        if len(t_shape) != 2 or 0 in t_shape:
            raise ValueError(f"rational: {name} must have shape (groups, {minimum}), not {tuple(t_shape)}")
        if shape[dim] % t_shape[0]:
            raise ValueError(
                f"rational: the {shape[dim]} channels of x {tuple(shape)} (dimension {dim}) "
                f"do not divide into the {t_shape[0]} groups of {name} {tuple(t_shape)}"
            )
    return kernels.refusal(shape, dtype, device, a_shape, b_shape, dim) if device.type == "cuda" else None


# For sizes that are plain numbers; those of a compiler are not.
_check_once = lru_cache(maxsize=4096)(_check)
