"""Kolmogorov-Arnold attention (KArAt): attention whose softmax is replaced by learned univariate functions, and the *_karat names.

    O = sigma(A) V,    A = Q K^T / sqrt(d),    sigma(A_k) = W Phi(A_k)        (models/operator.py)

Everything else is timm's VisionTransformer, or KAT for the kat_*_karat names. An operator belongs to one block (blockwise: h L operators in
a model, parameters blocks.*.attn.operator.*) or to all blocks (universal: h operators, parameters karat.*).
Source: KArAt (arXiv:2503.10632); mixed heads and a choice of blocks are options of this repository.
"""

from functools import partial

import torch
from timm.models import generate_default_cfgs
from timm.models.vision_transformer import Attention, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import activation

from kan_basis import layer as kan
from kan_basis.basis import make_basis_of

from .kat import KAT
from .operator import KArAtOperator
from .vit import SIZES, build, model_cfg, register

_FP32_PRODUCTS = "dtype" in torch.ops.aten.bmm.overloads()  # torch.bmm(..., out_dtype=torch.float32), CUDA only
_NOT_ELEMENTWISE = {
    "MultiheadAttention",
    "GLU",
    "Softmin",
    "Softmax",
    "Softmax2d",
    "LogSoftmax",
    "Threshold",
    "RReLU",
}  # or random


class _Fp32Product(torch.autograd.Function):
    """a b^T of two half-precision batches of matrices, accumulated and returned in float32; gradients in the dtype of a and b."""

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return torch.bmm(a, b.mT, out_dtype=torch.float32)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        grad = grad.to(a.dtype)
        return torch.bmm(grad, b), torch.bmm(grad.mT, a)


def attention_scores(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Q K^T scale: (B, h, M, d), (B, h, N, d) -> (B, h, M, N), float32 or float64 also under autocast and for half-precision Q and K."""
    if query.is_cuda and _FP32_PRODUCTS and query.dtype == key.dtype and query.dtype in (torch.bfloat16, torch.float16):
        scores = _Fp32Product.apply(query.flatten(0, 1), key.flatten(0, 1))
        return scores.unflatten(0, query.shape[:2]) * scale
    dtype = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        return query.to(dtype) @ key.to(dtype).transpose(-1, -2) * scale


class KArAtAttention(Attention):
    """timm's attention whose first heads apply an operator instead of the softmax; all softmax until `set_operator`.

    For the backward pass only Q, K and V are kept: scores and features are computed again, in chunks of the batch.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.register_module("operator", None)
        self.shared: tuple[
            KArAtOperator, ...
        ] = ()  # the model's own: in a tuple it is hidden from this module's parameters, not from deepcopy

    def set_operator(self, operator: KArAtOperator, num_karat_heads: int | None = None, shared: bool = False) -> None:
        """Let the first `num_karat_heads` heads (default: all) apply `operator`; `shared`: it is registered elsewhere in the model.

        Raises: ValueError if the numbers of heads do not fit.
        """
        heads = self.num_heads if num_karat_heads is None else num_karat_heads
        if heads > self.num_heads or heads != operator.num_heads:
            raise ValueError(
                f"an operator of {operator.num_heads} heads does not fit {heads} of {self.num_heads} attention heads"
            )
        if shared:
            self.shared = (operator,)
        else:
            self.operator = operator

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, **options) -> Tensor:
        """(B, N, C) -> (B, N, C). Raises: ValueError for a mask, or for another number of tokens than the operator's."""
        operator = self.shared[0] if self.shared else self.operator
        if operator is None:
            return super().forward(x, attn_mask=attn_mask, **options)
        if attn_mask is not None or any(options.values()):
            raise ValueError("Kolmogorov-Arnold attention takes no mask")
        B, N, _ = x.shape
        if N != operator.num_tokens:
            raise ValueError(
                f"Kolmogorov-Arnold attention was built for {operator.num_tokens} tokens, not {N}: "
                "build the model for this image size and resample its weights"
            )
        gate = getattr(self, "gate", None)
        q, k, v = (
            self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        )  # (B, h, N, d)
        q, k = self.q_norm(q), self.k_norm(k)
        h = operator.num_heads
        heads = [self.apply_operator(operator, q[:, :h], k[:, :h], v[:, :h])]
        if h < self.num_heads:
            heads.append(
                F.scaled_dot_product_attention(
                    q[:, h:], k[:, h:], v[:, h:], dropout_p=self.attn_drop.p if self.training else 0.0
                )
            )
        out = torch.cat([head.to(v.dtype) for head in heads], 1) if len(heads) > 1 else heads[0]
        out = self.norm(out.transpose(1, 2).flatten(2))
        return self.proj_drop(self.proj(out if gate is None else out * gate(x).sigmoid()))

    def apply_operator(self, operator: KArAtOperator, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """sigma(Q K^T / sqrt(d)) V: three times (B, h, N, d) -> (B, h, N, d)."""
        dropout = self.attn_drop.p if self.training else 0.0

        def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return operator.attend(attention_scores(q, k, self.scale), v, dropout)

        rows = operator.num_heads * operator.num_tokens  # of one image
        return kan.in_chunks(
            core,
            query,
            key,
            value,
            size=kan.rows_of_chunk(rows * operator.features_per_row),
            dim=0,
            keep_rng=dropout > 0,
        )


class KArAtMixin:
    """What KArAt adds to a timm vision transformer: KArAtAttention in its `attn_layer` slot and the operators.

    Args (besides timm's):
        basis_type: a basis of the registry, "FourierBasis" or "fourier".
        grid, order, grid_range, wavelet_type, rational_order, rational_version: options of the bases; a basis takes those it knows.
        base_fn: b, the name of an element-wise class of torch.nn ("nn.SiLU", "Identity"), or "ZeroModule" for b = 0.
        hidden_dim, karat_depth, modular_attn, modular_mode, project_l1, output_scale: see KArAtOperator.
        karat_init, karat_init_scale: its init and init_scale.
        mixed_head, num_attention: only the first `num_attention` heads, half of them by default, are KArAt; the others stay softmax.
        universal: one operator for all blocks instead of one for each.
        karat_blocks: blocks with KArAt, "0-3,11" or a list, default all; the others stay softmax.
        basis_trainable, base_trainable: see KANLayer.
        grid and hidden_dim may be lists with one entry per KArAt block, unless universal.
    Raises: ValueError for options that do not fit.
    """

    def __init__(
        self,
        *args,
        basis_type: str = "FourierBasis",
        grid: int | list[int] = 3,
        order: int = 3,
        grid_range: tuple[float, float] = (-1, 1),
        wavelet_type: str = "mexican_hat",
        rational_order: tuple[int, int] = (5, 4),
        rational_version: str = "B",
        base_fn: str = "ZeroModule",
        hidden_dim: int | list[int] = 12,
        karat_depth: int = 2,
        num_attention: int | None = None,
        mixed_head: bool = False,
        universal: bool = False,
        modular_attn: bool = True,
        modular_mode: str = "phi1_w2",
        project_l1: bool = False,
        basis_trainable: bool = True,
        base_trainable: bool = True,
        karat_blocks: str | list[int] | None = None,
        karat_init: str = "published",
        karat_init_scale: float = 1.0,
        output_scale: str = "1",
        **kwargs,
    ) -> None:
        if kwargs.get("patch_drop_rate") or kwargs.get("dynamic_img_size"):
            raise ValueError(
                "an operator is tied to its number of tokens: patch_drop_rate and dynamic_img_size cannot change it"
            )
        super().__init__(*args, **{**kwargs, "attn_layer": KArAtAttention})
        blocks = parse_blocks(karat_blocks, len(self.blocks))
        total = self.blocks[0].attn.num_heads
        heads = _karat_heads(total, num_attention, mixed_head)
        grids, ranks = (
            _per_block(name, value, len(blocks), universal)
            for name, value in (("grid", grid), ("hidden_dim", hidden_dim))
        )

        def operator(grid: int, hidden_dim: int) -> KArAtOperator:
            basis = make_basis_of(
                basis_type,
                grid=grid,
                order=order,
                grid_range=tuple(grid_range),
                wavelet=wavelet_type,
                degrees=tuple(rational_order),
                version=rational_version,
            )
            return KArAtOperator(
                self.patch_embed.num_patches + self.num_prefix_tokens,
                heads,
                basis,
                hidden_dim,
                karat_depth,
                modular_attn,
                modular_mode,
                base_function(base_fn),
                project_l1,
                karat_init,
                karat_init_scale,
                output_scale,
                base_trainable,
                basis_trainable,
                device=kwargs.get("device"),
                dtype=kwargs.get("dtype"),
            )

        if universal:
            self.karat = operator(grids[0], ranks[0])
        for block, block_grid, rank in zip(blocks, grids, ranks):
            own = self.karat if universal else operator(block_grid, rank)
            self.blocks[block].attn.set_operator(own, heads, shared=universal)

    def set_input_size(self, *args, **kwargs) -> None:
        raise ValueError(
            "an operator is tied to its number of tokens: build the model with img_size and load the weights, which are resampled then"
        )


class KArAtViT(KArAtMixin, VisionTransformer):
    """timm's VisionTransformer with Kolmogorov-Arnold attention."""


class KArAtKAT(KArAtMixin, KAT):
    """KAT with Kolmogorov-Arnold attention.

    `weight_init` defaults to timm's, KAT's own without its mimetic attention: that is made for the softmax, and its scores of standard
    deviation 2 send a Fourier operator through whole periods from the start; a micro model then does not learn.
    """

    def __init__(self, *args, weight_init: str = "", **kwargs) -> None:
        super().__init__(*args, weight_init=weight_init, **kwargs)


def base_function(name: str) -> nn.Module | None:
    """b by name, looked up among torch's activations and never evaluated; None for the zero function.

    Raises: ValueError for anything else.
    """
    key = name.removeprefix("nn.")
    if key == "ZeroModule":
        return None
    if key == "Identity":
        return nn.Identity()
    if key not in activation.__all__ or key in _NOT_ELEMENTWISE:
        choices = sorted(set(activation.__all__) - _NOT_ELEMENTWISE)
        raise ValueError(f"unknown base_fn '{name}'; there are: ZeroModule, Identity, {', '.join(choices)}")
    return getattr(activation, key)()


def parse_blocks(blocks: str | list[int] | None, depth: int) -> list[int]:
    """Block numbers from 0, ascending: "0-3,11" -> [0, 1, 2, 3, 11]; None -> all. Raises: ValueError for blocks that are not in the model."""
    if blocks is None:
        return list(range(depth))
    try:
        parts = (
            [part.partition("-") for part in blocks.split(",")]
            if isinstance(blocks, str)
            else [(b, "", "") for b in blocks]
        )
        ranges = [(int(first), int(last if dash else first)) for first, dash, last in parts]
    except (ValueError, TypeError) as error:
        raise ValueError(f"karat_blocks must be like '0-3,11' or a list of numbers, not {blocks!r}") from error
    if any(first > last for first, last in ranges):
        raise ValueError(f"karat_blocks {blocks!r} has a range that runs backwards")
    if not ranges or any(first < 0 or last >= depth for first, last in ranges):
        raise ValueError(f"karat_blocks {blocks!r} must name blocks from 0 to {depth - 1}")
    return sorted({block for first, last in ranges for block in range(first, last + 1)})


def _karat_heads(total: int, num_attention: int | None, mixed_head: bool) -> int:
    if not mixed_head:
        if num_attention is not None:
            raise ValueError("num_attention needs mixed_head")
        return total
    heads = max(1, total // 2) if num_attention is None else num_attention
    if not 1 <= heads <= total:
        raise ValueError(f"num_attention must be from 1 to {total}, the number of heads, not {heads}")
    return heads


def _per_block(name: str, value: int | list[int], count: int, universal: bool) -> list[int]:
    if not isinstance(value, (list, tuple)):
        return [value] * count
    if universal:
        raise ValueError(f"{name} must be one value for a universal operator, not a list")
    if len(value) != count:
        raise ValueError(f"{name} must have one entry for each of the {count} KArAt blocks, not {len(value)}")
    return list(value)


def _karat(
    model_cls: type[VisionTransformer], name: str, size: str, pretrained: bool = False, **kwargs
) -> VisionTransformer:
    return build(model_cls, name, pretrained, **{**SIZES[size], **kwargs})


_NAMES = {
    f"{family}_{size}_karat": (cls, size) for family, cls in (("vit", KArAtViT), ("kat", KArAtKAT)) for size in SIZES
}
default_cfgs = generate_default_cfgs({name: model_cfg(SIZES[size]["img_size"]) for name, (_, size) in _NAMES.items()})
for _name, (_cls, _size) in _NAMES.items():
    register(_name, partial(_karat, _cls, _name, _size), f"{_cls.__name__}: Kolmogorov-Arnold attention.")
