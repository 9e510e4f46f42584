"""Kolmogorov-Arnold Transformer: a ViT whose MLP activates with learned group-rational functions (GR-KAN).

    MLP(x) = fc2(dropout(F2(fc1(dropout(F1(x))))))      F1 starts as the identity, F2 as swish

Functions of any other basis may take the place of the rationals (`mlp_basis`); that is an option of this repository.
Everything else is timm's VisionTransformer. `kat_*` and `flash_kat_*` are one model with two spellings of its options; parameter
names are the published ones (mlp.act1.weight_numerator (1, 6), mlp.act1.weight_denominator (8, 4), the same for act2).
Source: Yang & Wang, Kolmogorov-Arnold Transformer, 2025 (arXiv:2409.10594); FlashKAT (arXiv:2505.13813).
"""

import math
from functools import partial

import torch
from timm.layers import to_2tuple
from timm.models import generate_default_cfgs
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Attention, VisionTransformer
from torch import Tensor, nn

from kan_basis import GroupBasis, GroupRational, group_basis, rational
from kan_basis.basis import Basis, make_basis_of

from .vit import SIZES, build, model_cfg, register

INITS = ("released", "variance_preserving")
_RELEASES = "https://github.com/Adamdad/kat/releases/download/checkpoint/"
# the published files; each name ends in the sha256 of its file (KAT's README exchanges the first two links)
PUBLISHED = {
    ("tiny", "scratch"): _RELEASES
    + "kat_tiny_patch16_224_1f3ad3b2e69821f3d412f2924cf159a0e266f142d739cb68f68f796f5a0fe289.pth",
    ("small", "scratch"): _RELEASES
    + "kat_small_patch16_224_32487885cf13d2c14e461c9016fac8ad43f7c769171f132530941e930aeb5fe2.pth",
    ("base", "scratch"): _RELEASES
    + "kat_base_patch16_224_abff874d925d756d15cde97303f772a3460ddbd44b9c53fb9ce5cf15be230fb6.pth",
    ("tiny", "vitft"): _RELEASES
    + "kat_tiny_patch16_224-finetune_64f124d003803e4a7e1aba1ba23500ace359b544e8a5f0110993f25052e402fb.pth",
    ("small", "vitft"): _RELEASES
    + "kat_small_patch_224-finetune_3ae087a4c28e2993468eb377d5151350c52c80b2a70cc48ceec63d1328ba58e0.pth",
    ("base", "vitft"): "https://huggingface.co/adamdad/kat_pretained/resolve/main/"
    "kat_base_patch16_224-finetune_440bf1ead9dd8ecab642078cfb60ae542f1fa33ca65517260501e02c011e38f2.pth",
}


class GRKANMlp(nn.Module):
    """Two linear layers, each behind a group-rational function, or behind functions of another basis.

    Args:
        in_features, hidden_features, out_features: channels; hidden and out default to in.
        norm_layer: normalisation before fc2 (timm's scale_mlp_norm), none by default.
        bias, drop: for (fc1, fc2), one value or a pair; dropout follows each rational.
        act_layer: accepted for timm's `mlp_layer` interface and not used: the activations are the learned functions.
        act_init: presets that the two rationals start from, or targets of the two functions of another basis (GroupBasis).
        num_groups: functions in each activation; 0 or less: one per channel.
        degrees, numerator_groups: of rationals, see GroupRational.
        mlp_basis: "rational", or another basis of the registry.
        mlp_grid, mlp_order, mlp_grid_range, mlp_wavelet: options of the other bases; a basis takes those it knows.
    Shape: (..., in_features) -> (..., out_features).
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer=None,
        norm_layer=None,
        bias=True,
        drop=0.0,
        act_init: tuple[str, str] = ("identity", "swish"),
        degrees: tuple[int, int] = (5, 4),
        num_groups: int = 8,
        numerator_groups: int = 1,
        mlp_basis: str = "rational",
        mlp_grid: int = 3,
        mlp_order: int = 3,
        mlp_grid_range: tuple[float, float] = (-3.0, 3.0),
        mlp_wavelet: str = "mexican_hat",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        hidden_features, out_features = hidden_features or in_features, out_features or in_features
        bias, drop = to_2tuple(bias), to_2tuple(drop)
        basis = _mlp_basis(
            mlp_basis, grid=mlp_grid, order=mlp_order, grid_range=tuple(mlp_grid_range), wavelet=mlp_wavelet
        )

        def act(init: str, num_channels: int) -> nn.Module:
            if basis is None:
                return GroupRational(num_groups, init, degrees, numerator_groups, num_channels, **dd)
            return GroupBasis(basis, num_groups, init, num_channels, **dd)

        self.act1 = act(act_init[0], in_features)
        self.drop1 = nn.Dropout(drop[0])
        self.fc1 = nn.Linear(in_features, hidden_features, bias=bias[0], **dd)
        self.act2 = act(act_init[1], hidden_features)
        self.drop2 = nn.Dropout(drop[1])
        self.norm = norm_layer(hidden_features, **dd) if norm_layer is not None else nn.Identity()
        self.fc2 = nn.Linear(hidden_features, out_features, bias=bias[1], **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(self.drop1(self.act1(x)))
        return self.fc2(self.norm(self.drop2(self.act2(x))))

    @torch.no_grad()
    def init_variance_preserving(self) -> None:
        """fc weights ~ N(0, alpha / fan_in), alpha the variance gain of the function in front of each."""
        for act, fc in ((self.act1, self.fc1), (self.act2, self.fc2)):
            nn.init.normal_(fc.weight, std=math.sqrt(variance_gain(act) / fc.in_features))


def _mlp_basis(name: str, **options) -> Basis | None:
    """None for rationals, whose activation is GroupRational."""
    return None if name.removesuffix("Basis").lower() == "rational" else make_basis_of(name, **options)


def variance_gain(act: GroupRational | GroupBasis) -> float:
    """alpha = 1 / E[F(x)^2] for x ~ N(0, 1), of the first function, by quadrature: 1 for the identity, 2.8178 for swish."""
    x = torch.linspace(-8, 8, 4001, dtype=torch.float64)[:, None]
    density = torch.exp(-x * x / 2)
    first = [weight[:1].detach().double().cpu() for weight in act.parameters()]
    y = group_basis(x, *first, act.basis, act.target) if isinstance(act, GroupBasis) else rational(x, *first)
    return (density.sum() / (density * y * y).sum()).item()


class KATMixin:
    """What KAT adds to a timm vision transformer: the GR-KAN MLP in its `mlp_layer` slot and the two initialisations.

    Args (besides timm's):
        act_init: preset of the second function, or the pair (first, second).
        degrees, num_groups, numerator_groups, mlp_basis, mlp_grid, mlp_order, mlp_grid_range, mlp_wavelet: see GRKANMlp.
        weight_init: "released": linear layers from trunc_normal(std=0.02) and mimetic attention, what the published weights were
            trained from; "variance_preserving": what the paper describes, fc1 and fc2 scaled by the gains of their rationals
            instead; or one of timm's ("", "jax", "jax_nlhb", "moco", "skip").
    """

    def __init__(
        self,
        *args,
        act_init: str | tuple[str, str] = "swish",
        degrees: tuple[int, int] = (5, 4),
        num_groups: int = 8,
        numerator_groups: int = 1,
        mlp_basis: str = "rational",
        mlp_grid: int = 3,
        mlp_order: int = 3,
        mlp_grid_range: tuple[float, float] = (-3.0, 3.0),
        mlp_wavelet: str = "mexican_hat",
        weight_init: str = "released",
        **kwargs,
    ) -> None:
        if weight_init not in (*INITS, "", "jax", "jax_nlhb", "moco", "skip", "reset"):
            raise ValueError(
                f"unknown weight_init '{weight_init}'; there are: {', '.join(INITS)} and timm's jax, jax_nlhb, moco, skip"
            )
        if kwargs.get("act_layer") is not None:
            raise ValueError(
                "a KAT has no act_layer: its activations are learned; act_init, or a name such as kat_tiny_gelu_*, says what they start from"
            )
        pair = ("identity", act_init) if isinstance(act_init, str) else tuple(act_init)
        kwargs.setdefault(
            "mlp_layer",
            partial(
                GRKANMlp,
                act_init=pair,
                degrees=tuple(degrees),
                num_groups=num_groups,
                numerator_groups=numerator_groups,
                mlp_basis=mlp_basis,
                mlp_grid=mlp_grid,
                mlp_order=mlp_order,
                mlp_grid_range=mlp_grid_range,
                mlp_wavelet=mlp_wavelet,
            ),
        )
        super().__init__(*args, weight_init="skip" if weight_init in INITS else weight_init, **kwargs)
        self.kat_init = weight_init if weight_init in INITS else ""
        if self.kat_init:
            self.weight_init_mode = ""  # timm's trunc_normal(std=0.02), on which init_weights builds
            self.init_weights()

    def init_weights(self, mode: str = "", **kwargs) -> None:
        super().init_weights(mode, **kwargs)
        kat_init = getattr(self, "kat_init", "")
        if mode or not kat_init or self.patch_embed.proj.weight.is_meta:
            return
        for module in self.modules():
            if isinstance(module, Attention):
                init_mimetic_attention(module, released=kat_init == "released")
            elif isinstance(module, GRKANMlp) and kat_init == "variance_preserving":
                module.init_variance_preserving()


class KAT(KATMixin, VisionTransformer):
    """timm's VisionTransformer with GR-KAN MLPs."""


class DistilledKAT(KATMixin, VisionTransformerDistilled):
    """KAT with DeiT's distillation token and second head."""


@torch.no_grad()
def init_mimetic_attention(attn: Attention, released: bool = False) -> None:
    """Mimetic initialisation: per head W_q^T W_k ~ 0.7 Z + 0.7 I, and W_proj W_v ~ 0.4 Z - 0.4 I, Var Z = 1 / D, split by SVD.

    `released`: as the published KAT code does it, with uniform instead of normal Z, and W_v and W_proj exchanged.
    Source: Trockman & Kolter 2023 (arXiv:2305.09828).
    """
    D, d = attn.qkv.in_features, attn.head_dim
    if attn.qkv.out_features != 3 * D:
        return  # heads of another width than D / num_heads: not defined there

    def factors(alpha: float, beta: float) -> tuple[Tensor, Tensor]:
        z = torch.empty(D, D).uniform_(-math.sqrt(3), math.sqrt(3)) if released else torch.randn(D, D)
        u, s, vh = torch.linalg.svd(alpha / math.sqrt(D) * z + beta * torch.eye(D))
        return u * s.sqrt(), s.sqrt()[:, None] * vh

    query, key, value = attn.qkv.weight.chunk(3)
    for h in range(attn.num_heads):
        left, right = factors(0.7, 0.7)
        query[h * d : (h + 1) * d] = left[:, :d].T
        key[h * d : (h + 1) * d] = right[:d]
    left, right = factors(0.4, -0.4)
    value.copy_(left if released else right)
    attn.proj.weight.copy_(right if released else left)


def _kat(
    name: str, size: str, act: str, pretrained: bool = False, distilled: bool = False, **kwargs
) -> VisionTransformer:
    return build(DistilledKAT if distilled else KAT, name, pretrained, **{**SIZES[size], "act_init": act, **kwargs})


def _flash_kat(
    name: str,
    size: str,
    act: str,
    pretrained: bool = False,
    m: int = 6,
    n: int = 4,
    num_groups: int = 1,
    den_groups: int = 8,
    **kwargs,
) -> VisionTransformer:
    # FlashKAT's options count coefficients (m = degree + 1) and name the numerator's groups `num_groups`
    return _kat(
        name,
        size,
        act,
        pretrained,
        **{"degrees": (m - 1, n), "num_groups": den_groups, "numerator_groups": num_groups, **kwargs},
    )


def _cfgs(name: str, size: str, act: str) -> dict:
    if act != "swish" or "micro" in size:
        return {name: model_cfg(SIZES[size]["img_size"])}
    hub = f"adamdad/kat_{size}"  # the published weights, from scratch (the default) and fine-tuned from a ViT
    return {
        f"{name}.{tag}": model_cfg(hf_hub_id=hub_id, url=PUBLISHED[size.split("_")[0], tag])
        for tag, hub_id in (("scratch", hub), ("vitft", f"{hub}.vitft"))
    }


def _names() -> dict[str, tuple]:
    """name -> (constructor, size, preset of the second rational)."""
    names = {}
    for size in SIZES:
        head, tail = size.split("_", 1)
        for suffix, act in (("", "swish"), ("_swish", "swish"), ("_gelu", "gelu")):
            names[f"kat_{head}{suffix}_{tail}"] = _kat, size, act
            names[f"flash_kat_{head}{suffix}_{tail}"] = _flash_kat, size, act
    return names


default_cfgs = generate_default_cfgs(
    {tag: cfg for name, (_, size, act) in _names().items() for tag, cfg in _cfgs(name, size, act).items()}
)
for _name, (_make, _size, _act) in _names().items():
    register(_name, partial(_make, _name, _size, _act), f"KAT; the second rational starts as {_act}.")
for _size in SIZES:
    _name = "kat_{}_distilled_{}".format(*_size.split("_", 1))
    default_cfgs.update(
        generate_default_cfgs({_name: model_cfg(SIZES[_size]["img_size"], classifier=("head", "head_dist"))})
    )
    register(_name, partial(_kat, _name, _size, "swish", distilled=True), "KAT with DeiT's distillation token.")
