"""A Kolmogorov-Arnold layer: one learnable univariate function for each pair of an input and an output, in many heads.

    out_p = sum_q phi_pq(x_q),    phi_pq(x) = scale_base_pq b(x) + scale_basis_pq basis(x; theta_pq)

A basis that is linear in its coefficients takes one matrix product of its features with (scale_basis theta). Any other
basis is evaluated edge by edge, see kan_basis/edges.py.
"""

import copy
import math
from collections.abc import Callable
from functools import partial

import torch
from einops import rearrange
from torch import Tensor, nn

from kan_basis.basis import Basis, at_least_float32, check_init, check_positive, mean_square
from kan_basis.chunks import exporting, in_chunks
from kan_basis.edges import edges

# Elements of the features that one chunk of rows builds: 256 MiB. With smaller chunks a GPU waits for the launches.
MAX_FEATURES = 1 << 26


def rows_of_chunk(features: int, limit: int | None = None) -> int:
    """Rows in one chunk of at most `limit` features (default: MAX_FEATURES), if each row has this number of them.

    A compiler gets all rows in one chunk: it needs few buffers and would unroll the chunks.
    """
    return 1 << 40 if torch.compiler.is_compiling() else (limit or MAX_FEATURES) // max(1, features)


def apply_functions(
    x: Tensor,
    sums: Callable[[Tensor], Tensor],
    base_fn: nn.Module | None = None,
    scale_base: Tensor | None = None,
) -> Tensor:
    """sums(x) + the sums of scale_base b(x): (B, h, M, N) -> (B, h, M, r).

    Args:
        sums: (h, rows, N) -> (h, rows, r), in float32 at least.
        base_fn, scale_base: b, an element-wise module or None, and its factors, (h, r, N).
    """
    B, h, M, N = x.shape
    x = at_least_float32(x)
    rows = x.transpose(0, 1).reshape(h, B * M, N)
    out = sums(rows)
    if base_fn is not None:
        out = out + torch.bmm(apply_base(base_fn, rows).to(x.dtype), scale_base.to(x.dtype).transpose(-1, -2))
    return out.reshape(h, B, M, out.shape[-1]).transpose(0, 1)


def apply_base(base_fn: nn.Module, x: Tensor) -> Tensor:
    """b(x) in the dtype of x, whatever the dtype of its parameters."""
    parameters = {name: p.to(x.dtype) for name, p in base_fn.named_parameters()}
    return torch.func.functional_call(base_fn, parameters, (x,)) if parameters else base_fn(x)


def linear_sums(rows: Tensor, basis: Basis, coefficients: Tensor) -> Tensor:
    """Sums of functions of a linear basis: (h, rows, N), (h, r, N, P) -> (h, rows, r)."""
    # P stands in front of N, so that the features are written and read in whole rows.
    weight = rearrange(coefficients.to(rows.dtype), "h r n p -> h (p n) r")

    def product(x: Tensor) -> Tensor:
        return torch.bmm(basis.features(x, -2).flatten(2), weight)

    size = rows_of_chunk(rows.shape[0] * rows.shape[2] * basis.working_set)
    return product(rows) if exporting() or rows.shape[1] <= size else in_chunks(product, rows, size=size, dim=1)


class KANLayer(nn.Module):
    """Sums of learnable univariate functions of the inputs, for h heads in one batched tensor.

    Args:
        in_features, out_features: N inputs, r outputs.
        basis: the family of functions, P coefficients each.
        base_fn: b, an element-wise module, or None for b = 0. Then `scale_base` still exists, as in the published
            parameter counts, and is frozen, because its gradient is 0.
        init: "published", the initialisation of the basis, with scale_base = 1; "scaled", out_p has variance 1 for
            x ~ N(0, 1). With a base function, b contributes half of the variance by scale_base ~ N(0, 1 / (2 N
            E[b^2])), because equal scales would add up the mean of b.
        init_scale: factor of both scales, hence of the outputs, at the start.
        base_trainable: False freezes scale_base and the parameters of b.
        basis_trainable: False freezes coefficients and scale_basis.
    Parameters: coefficients (h, r, N, P), scale_base (h, r, N), scale_basis (h, r, N): N r (P + 2) for each head.
    Shape: (B, h, M, N) -> (B, h, M, r). Under autocast the features are computed in float32 or float64, the products in
        the autocast dtype.
    Raises: ValueError for sizes below 1, an unknown init, or inputs with another number of heads or another width.
    Source: Kolmogorov-Arnold attention (arXiv:2503.10632).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        basis: Basis,
        num_heads: int = 1,
        base_fn: nn.Module | None = None,
        init: str = "published",
        init_scale: float = 1.0,
        base_trainable: bool = True,
        basis_trainable: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        check_positive(in_features=in_features, out_features=out_features, num_heads=num_heads)
        check_init(init)
        self.in_features, self.out_features, self.num_heads = in_features, out_features, num_heads
        self.basis, self.base_fn, self.init, self.init_scale = basis, base_fn, init, init_scale
        shape = num_heads, out_features, in_features
        dd = dict(device=device, dtype=dtype)
        self.coefficients = nn.Parameter(
            torch.empty(*shape, basis.num_coefficients, **dd), requires_grad=basis_trainable
        )
        self.scale_base = nn.Parameter(torch.empty(shape, **dd), requires_grad=base_trainable and base_fn is not None)
        self.scale_basis = nn.Parameter(torch.empty(shape, **dd), requires_grad=basis_trainable)
        if base_fn is not None:
            base_fn.requires_grad_(base_trainable)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if self.coefficients.is_meta:
            return
        fan_in = self.in_features * (1 if self.base_fn is None else 2)
        self.basis.reset_(self.coefficients, self.init, fan_in)
        self.scale_basis.fill_(self.init_scale)
        if self.init == "scaled" and self.base_fn is not None:
            energy = mean_square(copy.deepcopy(self.base_fn).to("cpu", torch.float64))
            self.scale_base.normal_(std=self.init_scale / math.sqrt(fan_in * energy) if energy else 0.0)
        else:
            self.scale_base.fill_(self.init_scale)

    @property
    def scaled_coefficients(self) -> Tensor:
        """scale_basis theta, (h, r, N, P): the coefficients of a linear basis."""
        return self.scale_basis[..., None] * self.coefficients

    def forward(self, x: Tensor) -> Tensor:
        h, N = x.shape[1], x.shape[3]
        if (h, N) != (self.num_heads, self.in_features):
            raise ValueError(f"expected {self.num_heads} heads of {self.in_features} inputs, not {h} of {N}")
        sums = partial(edges, theta=self.coefficients, basis=self.basis, scale=self.scale_basis)
        if self.basis.linear:
            sums = partial(linear_sums, basis=self.basis, coefficients=self.scaled_coefficients)
        return apply_functions(x, sums, self.base_fn, self.scale_base)

    def apply_to(self, x: Tensor, value: Tensor) -> Tensor:
        """self(x) V without self(x), for a linear basis: (B, h, M, N), (B, h, r, d) -> (B, h, M, d).

        It is features(x) (scale_basis theta)^T V, with b(x) as one more feature.
        """
        x, coefficients = at_least_float32(x), self.scaled_coefficients
        features = self.basis.features(x, -2)  # (B, h, M, P, N)
        if self.base_fn is not None:
            features = torch.cat([features, apply_base(self.base_fn, x).to(x.dtype).unsqueeze(-2)], -2)
            coefficients = torch.cat([coefficients, self.scale_base[..., None]], -1)
        values = torch.einsum("hrnp,bhrd->bhpnd", coefficients.to(x.dtype), value.to(x.dtype)).flatten(2, 3)
        return (features.flatten(-2) @ values).to(value.dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.basis!r}, num_heads={self.num_heads}"
