"""Kolmogorov-Arnold attention (KArAt): learned univariate functions instead of the softmax, and the *_karat names.

    O = sigma(A) V,    A = Q K^T / sqrt(d),    sigma(A_k) = W Phi(A_k)        (models/operator.py)

Everything else is timm's VisionTransformer, or KAT for the kat_*_karat names. An operator belongs to one block
(blockwise: h L operators in a model, parameters blocks.*.attn.operator.*) or to all blocks (universal: h operators,
parameters karat.*).
Source: KArAt (arXiv:2503.10632); mixed heads and a choice of blocks are options of this repository.
"""

from functools import partial

import torch
from timm.models.vision_transformer import Attention, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import activation

from kan_basis import layer as kan
from kan_basis.attention import attention_scores
from kan_basis.basis import BASES, make_basis_for, option_names

from .kat import KAT
from .operator import KArAtOperator
from .timm_internals import merge_heads, split_heads
from .vit import build, model_cfg, register

# They mix the elements of a row, need arguments or draw random numbers.
_NOT_ELEMENTWISE = {
    "MultiheadAttention",
    "GLU",
    "Softmin",
    "Softmax",
    "Softmax2d",
    "LogSoftmax",
    "Threshold",
    "RReLU",
}


class KArAtAttention(Attention):
    """timm's attention whose first heads apply an operator instead of the softmax; all softmax until `set_operator`.

    Of what grows with N^2 nothing is kept for the backward pass, which computes scores and features again.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.register_module("operator", None)
        # The operator that the model shares among its blocks. The tuple hides it from the parameters of this module,
        # but not from deepcopy.
        self.shared: tuple[KArAtOperator, ...] = ()

    def set_operator(self, operator: KArAtOperator, num_karat_heads: int | None = None, shared: bool = False) -> None:
        """Let the first `num_karat_heads` heads (default: all) apply `operator`.

        With `shared` the operator is registered elsewhere in the model.
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
        """(B, N, C) -> (B, N, C).

        Raises: ValueError for a mask, or if N is not the number of tokens of the operator.
        """
        operator = self.shared[0] if self.shared else self.operator
        if operator is None:
            return super().forward(x, attn_mask=attn_mask, **options)
        if attn_mask is not None or any(options.values()):
            raise ValueError("Kolmogorov-Arnold attention takes no mask")
        if x.shape[1] != operator.num_tokens:
            raise ValueError(
                f"Kolmogorov-Arnold attention was built for {operator.num_tokens} tokens, not {x.shape[1]}: "
                "build the model for this image size and resample its weights"
            )
        q, k, v = split_heads(self, x)
        h = operator.num_heads
        heads = [self.apply_operator(operator, q[:, :h], k[:, :h], v[:, :h])]
        if h < self.num_heads:
            dropout = self.attn_drop.p if self.training else 0.0
            heads.append(F.scaled_dot_product_attention(q[:, h:], k[:, h:], v[:, h:], dropout_p=dropout))
        out = torch.cat([head.to(v.dtype) for head in heads], 1) if len(heads) > 1 else heads[0]
        return merge_heads(self, x, out)

    def apply_operator(self, operator: KArAtOperator, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """sigma(Q K^T / sqrt(d)) V: three times (B, h, N, d) -> (B, h, N, d)."""
        dropout = self.attn_drop.p if self.training else 0.0
        if operator.direct and not dropout:
            return operator.attend_directly(query, key, value, self.scale)
        out = operator.attend_by_kernel(query, key, value, self.scale, dropout)
        if out is not None:
            return out

        def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return operator.attend(attention_scores(q, k, self.scale), v, dropout)

        rows = operator.num_heads * operator.num_tokens  # for one image
        size = kan.rows_of_chunk(rows * operator.features_per_row)
        return kan.in_chunks(core, query, key, value, size=size, dim=0, keep_rng=dropout > 0)


class KArAtMixin:
    """What KArAt adds to a timm vision transformer: KArAtAttention in its `attn_layer` slot, and the operators.

    Args (besides timm's):
        basis_type: a basis of the registry, "FourierBasis" or "fourier". The options of the basis, such as grid, are
            keyword arguments too (kan_basis).
        base_fn: b, the name of an element-wise class of torch.nn ("nn.SiLU", "Identity"), or "ZeroModule" for b = 0.
        hidden_dim, karat_depth, modular_attn, modular_mode, project_l1, output_scale: see KArAtOperator.
        karat_init, karat_init_scale: init and init_scale of KArAtOperator.
        mixed_head: only the first `num_attention` heads (default: half of them) have an operator; the others keep the
            softmax.
        universal: one operator for all blocks instead of one for each block.
        karat_blocks: blocks with an operator, "0-3,11" or a list (default: all); the others keep the softmax.
        basis_trainable, base_trainable: see KANLayer.
    hidden_dim and the options of the basis may be lists with one value for each block that has an operator, unless
    `universal` is set.
    Raises: ValueError for options that do not fit.
    """

    def __init__(
        self,
        *args,
        basis_type: str = "fourier",
        base_fn: str = "ZeroModule",
        hidden_dim: int | list[int] = 12,
        karat_depth: int = 2,
        modular_attn: bool = True,
        modular_mode: str = "phi1_w2",
        mixed_head: bool = False,
        num_attention: int | None = None,
        universal: bool = False,
        karat_blocks: str | list[int] | None = None,
        project_l1: bool = False,
        output_scale: str = "1",
        karat_init: str = "published",
        karat_init_scale: float = 1.0,
        basis_trainable: bool = True,
        base_trainable: bool = True,
        **kwargs,
    ) -> None:
        if kwargs.get("patch_drop_rate") or kwargs.get("dynamic_img_size"):
            raise ValueError(
                "an operator is tied to its number of tokens: patch_drop_rate and dynamic_img_size cannot change it"
            )
        basis_options = {name: kwargs.pop(name) for name in list(kwargs) if name in option_names("attention")}
        super().__init__(*args, **{**kwargs, "attn_layer": KArAtAttention})
        blocks = parse_blocks(karat_blocks, len(self.blocks))
        heads = _karat_heads(self.blocks[0].attn.num_heads, num_attention, mixed_head)
        fields = [item for cls in BASES.values() for item in cls.options("attention").items()]
        tuples = {name for name, f in fields if isinstance(f.default, tuple)}
        options = _options_of_blocks({**basis_options, "hidden_dim": hidden_dim}, tuples, len(blocks), universal)

        def operator(hidden_dim: int, **options) -> KArAtOperator:
            return KArAtOperator(
                self.patch_embed.num_patches + self.num_prefix_tokens,
                heads,
                make_basis_for("attention", basis_type, options),
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
            self.karat = operator(**options[0])
        for block, of_block in zip(blocks, options):
            sigma = self.karat if universal else operator(**of_block)
            self.blocks[block].attn.set_operator(sigma, heads, shared=universal)

    def set_input_size(self, *args, **kwargs) -> None:
        raise ValueError(
            "an operator is tied to its number of tokens: build the model with img_size and load the weights, which "
            "are then resampled"
        )


class KArAtViT(KArAtMixin, VisionTransformer):
    """timm's VisionTransformer with Kolmogorov-Arnold attention."""


class KArAtKAT(KArAtMixin, KAT):
    """KAT with Kolmogorov-Arnold attention.

    `weight_init` defaults to timm's, which is KAT's without mimetic attention. Mimetic attention is made for the
    softmax: its scores have standard deviation 2 and send a Fourier operator through whole periods from the start, so
    that a micro model does not learn.
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
    """Block numbers from 0, ascending: "0-3,11" -> [0, 1, 2, 3, 11]; None -> all.

    Raises: ValueError for blocks that are not in the model.
    """
    if blocks is None:
        return list(range(depth))
    try:
        names = blocks.split(",") if isinstance(blocks, str) else map(str, blocks)
        ranges = [[int(end) for end in name.split("-", 1)] for name in names]
    except (ValueError, TypeError) as error:
        raise ValueError(f"karat_blocks must be like '0-3,11' or a list of numbers, not {blocks!r}") from error
    if any(ends[0] > ends[-1] for ends in ranges):
        raise ValueError(f"karat_blocks {blocks!r} has a range that runs backwards")
    if not ranges or any(ends[-1] >= depth for ends in ranges):
        raise ValueError(f"karat_blocks {blocks!r} must name blocks from 0 to {depth - 1}")
    return sorted({number for ends in ranges for number in range(ends[0], ends[-1] + 1)})


def _karat_heads(total: int, num_attention: int | None, mixed_head: bool) -> int:
    if not mixed_head:
        if num_attention is not None:
            raise ValueError("num_attention needs mixed_head")
        return total
    heads = max(1, total // 2) if num_attention is None else num_attention
    if not 1 <= heads <= total:
        raise ValueError(f"num_attention must be from 1 to {total}, the number of heads, not {heads}")
    return heads


def _options_of_blocks(options: dict, tuples: set[str], count: int, universal: bool) -> list[dict]:
    """The options of every block that has an operator. A list has one value for each, unless the option is a tuple."""
    listed = [name for name, value in options.items() if isinstance(value, (list, tuple)) and name not in tuples]
    for name in listed:
        if universal:
            raise ValueError(f"{name} must be one value for a universal operator, not a list")
        if len(options[name]) != count:
            raise ValueError(
                f"{name} must have one entry for each of the {count} KArAt blocks, not {len(options[name])}"
            )
    return [{name: v[i] if name in listed else v for name, v in options.items()} for i in range(count)]


NAMES = """
vit_tiny_patch16_224_karat kat_tiny_patch16_224_karat
vit_small_patch16_224_karat kat_small_patch16_224_karat
vit_base_patch16_224_karat kat_base_patch16_224_karat
vit_micro_patch4_32_karat kat_micro_patch4_32_karat
vit_micro_patch8_32_karat kat_micro_patch8_32_karat
""".split()
for _name in NAMES:
    _cls, _size = KArAtViT if _name.startswith("vit_") else KArAtKAT, _name[4:-6]
    _make = partial(build, _cls, _name, _size)
    register(__name__, _name, f"{_cls.__name__}: Kolmogorov-Arnold attention.", _make, {"": model_cfg(_size)})
