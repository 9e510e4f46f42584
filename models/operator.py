"""sigma of Kolmogorov-Arnold attention, which replaces the softmax, for all heads in one batched tensor.

    sigma(A_k) = W Phi(A_k)      A_k: row k of A = Q K^T / sqrt(d), (N, N);  Phi: r x N functions;  W: (N, r), no bias

There is no softmax and no normalisation. N is the number of tokens, to which the parameters are tied;
models/resample.py changes it.
Source: KArAt (arXiv:2503.10632).
"""

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kan_basis.attention import attention, attention_scores, combine
from kan_basis.basis import Basis, check_positive
from kan_basis.chunks import in_chunks
from kan_basis.edges import edge_attention, has_kernel
from kan_basis.layer import KANLayer, rows_of_chunk
from kan_basis.simplex import project_l1

MODES = ("phi1_w2", "w1_phi2")
OUTPUT_SCALES = ("1", "sqrt", "learned")


class KArAtOperator(nn.Module):
    """sigma: rows of scores to rows of attention weights.

    Args:
        num_tokens, num_heads: N, h.
        basis: the family of functions.
        hidden_dim: r.
        depth: number of stages. 1: Phi with N x N functions. 2: W and Phi in the order of `mode`, or without `modular`
            Phi2(Phi1(A)). More: further r x r layers between them.
        modular: one of the stages is the projection W: `project_out` (h, N, r) or `project_in` (h, r, N).
        mode: "phi1_w2", W Phi(A), or "w1_phi2", Phi(W A); it has no effect unless modular.
        base_fn: b of the functions, None for 0; every layer has a copy of it.
        project_l1: project each row of the result on the probability simplex.
        init: "published": W as in nn.Linear, the functions as the basis says. "scaled": sigma(A) V has about the
            variance of V for scores ~ N(0, 1). For this W, or without project_out the last functions, start smaller by
            the factor 1 / sqrt(N) than what keeps the variance of one function.
        init_scale: factor of sigma at the start, in the scales of the last layer of functions.
        output_scale: factor of sigma, in front of the l1 projection: "1"; "sqrt", 1 / sqrt(N), kept in the state, so
            that weights that are resampled keep it; or "learned", one factor for each head, which starts at 1.
    Raises: ValueError for options that do not fit.
    """

    def __init__(
        self,
        num_tokens: int,
        num_heads: int,
        basis: Basis,
        hidden_dim: int = 12,
        depth: int = 2,
        modular: bool = True,
        mode: str = "phi1_w2",
        base_fn: nn.Module | None = None,
        project_l1: bool = False,
        init: str = "published",
        init_scale: float = 1.0,
        output_scale: str = "1",
        base_trainable: bool = True,
        basis_trainable: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        check_positive(num_tokens=num_tokens, num_heads=num_heads, hidden_dim=hidden_dim, depth=depth)
        if mode not in MODES:
            raise ValueError(f"unknown mode '{mode}'; there are: {', '.join(MODES)}")
        if output_scale not in OUTPUT_SCALES:
            raise ValueError(f"unknown output_scale '{output_scale}'; there are: {', '.join(OUTPUT_SCALES)}")
        self.num_tokens, self.num_heads, self.project_l1, self.init = num_tokens, num_heads, project_l1, init
        if not 0 < init_scale < math.inf:
            raise ValueError(f"init_scale must be positive, not {init_scale}")
        N, r, dd = num_tokens, hidden_dim, dict(device=device, dtype=dtype)
        modular = modular and depth > 1
        first, last = modular and mode == "w1_phi2", modular and mode == "phi1_w2"  # where W stands
        self.project_in = nn.Parameter(torch.empty(num_heads, r, N, **dd)) if first else None
        self.project_out = nn.Parameter(torch.empty(num_heads, N, r, **dd)) if last else None
        widths = [N, *[r] * (depth - 1), N][first : depth + 1 - last]
        scales = [1.0] * (len(widths) - 2) + [init_scale if last or init == "published" else init_scale / math.sqrt(N)]
        self.layers = nn.ModuleList(
            KANLayer(n, m, basis, num_heads, copy.deepcopy(base_fn), init, scale, base_trainable, basis_trainable, **dd)
            for n, m, scale in zip(widths, widths[1:], scales)
        )
        if output_scale == "learned":
            self.output_scale = nn.Parameter(torch.empty(num_heads, 1, 1, **dd))
        else:
            self.register_buffer("output_scale", torch.empty(1, 1, 1, **dd) if output_scale == "sqrt" else None)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """W and the output scale; the layers reset themselves."""
        for weight, summed in ((self.project_in, 1), (self.project_out, self.num_tokens)):
            if weight is not None:
                fan_in = weight.shape[-1]
                if self.init == "scaled":
                    weight.normal_(std=1 / math.sqrt(fan_in * summed))
                else:
                    weight.uniform_(-1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))
        if self.output_scale is not None:
            learned = isinstance(self.output_scale, nn.Parameter)
            self.output_scale.fill_(1 if learned else 1 / math.sqrt(self.num_tokens))

    @property
    def features_per_row(self) -> int:
        """Elements of the largest tensor for one row of scores, without what a layer divides into chunks by itself."""
        sizes = (f.in_features * (f.basis.working_set if f.basis.linear else 1) for f in self.layers)
        return max(self.num_tokens, *sizes)

    def functions(self, scores: Tensor) -> Tensor:
        """All stages up to the last layer of functions: (B, h, M, N) -> (B, h, M, r or N).

        Only the products of that layer follow autocast.
        """
        with torch.autocast(scores.device.type, enabled=False):
            if self.project_in is not None:
                scores = scores @ self.project_in.to(scores.dtype).transpose(-1, -2)
            for layer in self.layers[:-1]:
                scores = layer(scores)
        return self.layers[-1](scores)

    def forward(self, scores: Tensor) -> Tensor:
        """sigma of each row: (B, h, M, N) -> (B, h, M, N)."""
        sigma = self.functions(scores)
        if self.project_out is not None:
            sigma = sigma @ self.project_out.to(sigma.dtype).transpose(-1, -2)
        if self.output_scale is not None:
            sigma = sigma * self.output_scale
        return project_l1(sigma) if self.project_l1 else sigma

    def attend(self, scores: Tensor, value: Tensor, dropout: float = 0.0) -> Tensor:
        """sigma(A) V: (B, h, M, N), (B, h, N, d) -> (B, h, M, d).

        It is computed as Phi(A) (W^T V) if there is no operation between W and V.
        """
        if self.project_out is None or self.project_l1 or dropout:
            return F.dropout(self(scores), dropout).to(value.dtype) @ value
        return combine(self.functions(scores), self._scaled(self.project_out), value)

    def attend_by_kernel(
        self, query: Tensor, key: Tensor, value: Tensor, score_scale: float, dropout: float = 0.0
    ) -> Tensor | None:
        """sigma(Q K^T score_scale) V by the kernels of `edge_attention`, None where they do not compute it.

        They compute one layer of functions without a base function, of a basis that is not linear in its coefficients,
        with no operation between W and V.
        """
        layer = self.layers[0]
        if self.project_out is None or self.project_l1 or dropout or len(self.layers) > 1 or layer.base_fn is not None:
            return None
        if not query.is_cuda or query.dtype is not key.dtype or not has_kernel(query, layer.coefficients, layer.basis):
            return None
        z = edge_attention(query, key, layer.coefficients, score_scale, layer.basis, layer.scale_basis)
        return combine(z, self._scaled(self.project_out), value)

    @property
    def direct(self) -> bool:
        """Whether sigma(A) V needs neither A nor sigma(A) as a whole: see `attend_directly`."""
        modular = len(self.layers) == 1 and (self.project_in is not None or self.project_out is not None)
        return modular and self.layers[0].basis.linear and not self.project_l1

    def attend_directly(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """sigma(scale Q K^T) V of an operator that is `direct`: three times (B, h, N, d) -> (B, h, N, d).

        phi1_w2: Phi(A) (W^T V) by kan_basis.attention. w1_phi2: W A_k = scale (W K) Q_k, and the functions are linear
        in their coefficients C, so that Phi(W A) V = features(scale Q (W K)^T) (C^T V) takes memory linear in N.
        """
        (layer,) = self.layers
        if self.project_out is not None:
            return attention(
                query,
                key,
                value,
                layer.scaled_coefficients,
                self._scaled(self.project_out),
                layer.basis,
                scale,
                layer.base_fn,
                None if layer.base_fn is None else layer.scale_base,
            )

        def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with torch.autocast(q.device.type, enabled=False):
                dtype = torch.promote_types(k.dtype, torch.float32)
                keys = torch.einsum("hrn,bhnd->bhrd", self.project_in.to(dtype), k.to(dtype))
            out = layer.apply_to(attention_scores(q, keys, scale), v)
            return self._scaled(out)

        size = rows_of_chunk(self.num_heads * self.num_tokens * layer.in_features * (layer.basis.working_set + 1))
        return in_chunks(core, query, key, value, size=size, dim=0)

    def _scaled(self, t: Tensor) -> Tensor:
        """t (h, ...) or (B, h, ...) times the output scale."""
        return t if self.output_scale is None else t * self.output_scale.to(t.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_tokens} tokens, num_heads={self.num_heads}, project_l1={self.project_l1}"
