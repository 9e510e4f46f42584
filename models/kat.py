"""Kolmogorov-Arnold Transformer: a ViT whose MLP activates with learned group-rational functions (GR-KAN).

    MLP(x) = fc2(dropout(F2(fc1(dropout(F1(x))))))      F1 starts as the identity, F2 as swish

Functions of any other basis may take the place of the rationals (`mlp_basis`); that is an option of this repository.
Everything else is timm's VisionTransformer. `kat_*` and `flash_kat_*` are one model with two spellings of its options.
Parameters have their published names (mlp.act1.weight_numerator (1, 6), mlp.act1.weight_denominator (8, 4), the same
for act2).
Source: Yang & Wang, Kolmogorov-Arnold Transformer, 2025 (arXiv:2409.10594); FlashKAT (arXiv:2505.13813).
"""

import copy
import math
from functools import partial

import torch
from timm.layers import to_2tuple
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Attention, VisionTransformer
from torch import Tensor, nn

from kan_basis.basis import Basis, make_basis_for, mean_square, option_names

from .published import PUBLISHED
from .timm_internals import init_weights_by_timm
from .vit import build, model_cfg, register

INITS = ("released", "variance_preserving")
# Options of the kat_* names by their short spelling, and of the flash_kat_* names by FlashKAT's, which says num_groups
# for the groups of the numerator, and m and n for the numbers of coefficients (m = degree + 1).
KAT_OPTIONS = {"degrees": "mlp_degrees", "num_groups": "mlp_groups", "numerator_groups": "mlp_numerator_groups"}
FLASH_KAT_OPTIONS = {"num_groups": "mlp_numerator_groups", "den_groups": "mlp_groups"}


class GRKANMlp(nn.Module):
    """Two linear layers, each behind a learned activation: group-rational functions, or functions of another basis.

    Args:
        in_features, hidden_features, out_features: channels; hidden and out default to in.
        norm_layer: normalisation before fc2 (scale_mlp_norm of timm), none by default.
        bias, drop: for (fc1, fc2), one value or a pair; dropout follows each activation.
        act_layer: accepted because timm's `mlp_layer` interface passes it, and not used.
        act_init: what the two activations start as: presets of rational functions, or targets of another basis.
        num_groups: functions in each activation; 0 or less: one per channel.
        basis: the family of the functions (default: rational functions of version A, as published).
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
        num_groups: int = 8,
        basis: Basis | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        hidden_features, out_features = hidden_features or in_features, out_features or in_features
        bias, drop = to_2tuple(bias), to_2tuple(drop)
        basis = basis or make_basis_for("mlp", "rational", {})
        self.act1 = basis.activation(num_groups, act_init[0], in_features, **dd)
        self.drop1 = nn.Dropout(drop[0])
        self.fc1 = nn.Linear(in_features, hidden_features, bias=bias[0], **dd)
        self.act2 = basis.activation(num_groups, act_init[1], hidden_features, **dd)
        self.drop2 = nn.Dropout(drop[1])
        self.norm = norm_layer(hidden_features, **dd) if norm_layer is not None else nn.Identity()
        self.fc2 = nn.Linear(hidden_features, out_features, bias=bias[1], **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(self.drop1(self.act1(x)))
        return self.fc2(self.norm(self.drop2(self.act2(x))))

    @torch.no_grad()
    def init_variance_preserving(self) -> None:
        """fc weights ~ N(0, alpha / fan_in), where alpha is the variance gain of the activation in front of each."""
        for act, fc in ((self.act1, self.fc1), (self.act2, self.fc2)):
            nn.init.normal_(fc.weight, std=math.sqrt(variance_gain(act) / fc.in_features))


def activations(model: nn.Module) -> dict[str, nn.Module]:
    """The learned activations of a model by name; each has the attribute `basis`."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, GRKANMlp):
            found |= {f"{name}.act1": module.act1, f"{name}.act2": module.act2}
    return found


@torch.no_grad()
def variance_gain(activation: nn.Module) -> float:
    """alpha = 1 / E[F(x)^2] for x ~ N(0, 1), by quadrature, where F is the function of the first channel.

    1 for the identity, 2.8178 for swish.
    """
    exact = copy.deepcopy(activation).double().cpu()
    groups = math.lcm(*(p.shape[0] for p in exact.parameters()))
    return 1 / mean_square(lambda x: exact(x[:, None].expand(-1, groups))[:, 0])


class KATMixin:
    """What KAT adds to a timm vision transformer: the GR-KAN MLP in its `mlp_layer` slot, and two initialisations.

    Args (besides timm's):
        act_init: what the second activation starts as, or the pair (first, second); default swish.
        mlp_basis: a basis of the registry, "rational" as published, or another one. The options of the basis are
            keyword arguments too, with mlp_ in front of their names: mlp_degrees, mlp_grid, ...
        mlp_groups: functions in each activation; 0 or less: one per channel.
        weight_init: "released": linear layers from trunc_normal(std=0.02) and mimetic attention, from which the
            published weights were trained; "variance_preserving", which the paper describes: fc1 and fc2 are scaled by
            the gains of their activations; or an initialisation of timm ("", "jax", "jax_nlhb", "moco", "skip").
    Raises: ValueError for options that do not fit.
    """

    kat_init = ""  # one of INITS, unless timm initialises alone

    def __init__(
        self,
        *args,
        act_init: str | tuple[str, str] | None = None,
        mlp_basis: str = "rational",
        mlp_groups: int = 8,
        weight_init: str = "released",
        **kwargs,
    ) -> None:
        if weight_init not in (*INITS, "", "jax", "jax_nlhb", "moco", "skip", "reset"):
            names = f"{', '.join(INITS)} and timm's jax, jax_nlhb, moco, skip"
            raise ValueError(f"unknown weight_init '{weight_init}'; there are: {names}")
        if kwargs.get("act_layer") is not None:
            raise ValueError(
                "a KAT has no act_layer: its activations are learned; act_init, or a name such as kat_tiny_gelu_*, "
                "says what they start from"
            )
        act_init = act_init or "swish"
        pair = ("identity", act_init) if isinstance(act_init, str) else tuple(act_init)
        options = {name: kwargs.pop(name) for name in list(kwargs) if name in option_names("mlp")}
        basis = make_basis_for("mlp", mlp_basis, options)
        kwargs.setdefault("mlp_layer", partial(GRKANMlp, act_init=pair, num_groups=mlp_groups, basis=basis))
        super().__init__(*args, weight_init="skip" if weight_init in INITS else weight_init, **kwargs)
        if weight_init in INITS:
            self.kat_init = weight_init
            init_weights_by_timm(self)

    def init_weights(self, mode: str = "", **kwargs) -> None:
        super().init_weights(mode, **kwargs)
        if mode or not self.kat_init or self.patch_embed.proj.weight.is_meta:
            return
        for module in self.modules():
            if isinstance(module, Attention):
                init_mimetic_attention(module, released=self.kat_init == "released")
            elif isinstance(module, GRKANMlp) and self.kat_init == "variance_preserving":
                module.init_variance_preserving()


class KAT(KATMixin, VisionTransformer):
    """timm's VisionTransformer with GR-KAN MLPs."""


class DistilledKAT(KATMixin, VisionTransformerDistilled):
    """KAT with DeiT's distillation token and second head."""


@torch.no_grad()
def init_mimetic_attention(attn: Attention, released: bool = False) -> None:
    """Mimetic initialisation, by SVD: W_q^T W_k ~ 0.7 Z + 0.7 I per head, W_proj W_v ~ 0.4 Z - 0.4 I, Var Z = 1 / D.

    With `released`, Z is uniform instead of normal, and W_v and W_proj are swapped, as in the published code of KAT.
    Source: Trockman & Kolter 2023 (arXiv:2305.09828).
    """
    D, d = attn.qkv.in_features, attn.head_dim
    if attn.qkv.out_features != 3 * D:
        return  # it is not defined for heads of another width than D / num_heads

    def factors(alpha: float, beta: float) -> tuple[Tensor, Tensor]:
        z = torch.empty(D, D).uniform_(-math.sqrt(3), math.sqrt(3)) if released else torch.randn(D, D)
        u, s, vh = torch.linalg.svd(alpha / math.sqrt(D) * z + beta * torch.eye(D))
        return u * s.sqrt(), s.sqrt()[:, None] * vh

    query, key, value = attn.qkv.weight.chunk(3)
    for q, k in zip(query.split(d), key.split(d)):
        left, right = factors(0.7, 0.7)
        q.copy_(left[:, :d].T)
        k.copy_(right[:d])
    left, right = factors(0.4, -0.4)
    value.copy_(left if released else right)
    attn.proj.weight.copy_(right if released else left)


def _respelled(options: dict, names: dict[str, str]) -> dict:
    """Options under the names of KATMixin. Raises: ValueError if one option is given under two names."""
    for name, respelled in names.items():
        if name in options and respelled in options:
            raise ValueError(f"{name} and {respelled} are the same option: give one of them")
    return {names.get(name, name): value for name, value in options.items()}


def _kat(model_cls: type[KATMixin], name: str, size: str, act: str, **kwargs) -> KATMixin:
    return build(model_cls, name, size, **{"act_init": act, **_respelled(kwargs, KAT_OPTIONS)})


def _flash_kat(*args, **kwargs) -> KATMixin:
    if kwargs.keys() & {"m", "n"}:
        if kwargs.keys() & {"degrees", "mlp_degrees"}:
            raise ValueError("m and n say the degrees too: give one of them")
        kwargs["degrees"] = (kwargs.pop("m", 6) - 1, kwargs.pop("n", 4))
    return _kat(*args, **_respelled(kwargs, FLASH_KAT_OPTIONS))


NAMES = """
kat_tiny_patch16_224 kat_tiny_swish_patch16_224 kat_tiny_gelu_patch16_224 kat_tiny_distilled_patch16_224
kat_small_patch16_224 kat_small_swish_patch16_224 kat_small_gelu_patch16_224 kat_small_distilled_patch16_224
kat_base_patch16_224 kat_base_swish_patch16_224 kat_base_gelu_patch16_224 kat_base_distilled_patch16_224
kat_micro_patch4_32 kat_micro_swish_patch4_32 kat_micro_gelu_patch4_32 kat_micro_distilled_patch4_32
kat_micro_patch8_32 kat_micro_swish_patch8_32 kat_micro_gelu_patch8_32 kat_micro_distilled_patch8_32
flash_kat_tiny_patch16_224 flash_kat_tiny_swish_patch16_224 flash_kat_tiny_gelu_patch16_224
flash_kat_small_patch16_224 flash_kat_small_swish_patch16_224 flash_kat_small_gelu_patch16_224
flash_kat_base_patch16_224 flash_kat_base_swish_patch16_224 flash_kat_base_gelu_patch16_224
flash_kat_micro_patch4_32 flash_kat_micro_swish_patch4_32 flash_kat_micro_gelu_patch4_32
flash_kat_micro_patch8_32 flash_kat_micro_swish_patch8_32 flash_kat_micro_gelu_patch8_32
""".split()


def _register(name: str) -> None:
    """Register one of NAMES. The published weights are from scratch (the default) or from a ViT."""
    head, *variant, patch, pixels = name.removeprefix("flash_").split("_")[1:]
    size, act = f"{head}_{patch}_{pixels}", "gelu" if "gelu" in variant else "swish"
    model_cls, doc, cfgs = KAT, f"KAT; act2 starts as {act}.", {"": model_cfg(size)}
    if "distilled" in variant:
        model_cls, doc = DistilledKAT, f"KAT with a distillation token; act2 starts as {act}."
        cfgs = {"": model_cfg(size, classifier=("head", "head_dist"))}
    elif act == "swish" and (head, "scratch") in PUBLISHED:
        hub_ids = {"scratch": f"adamdad/kat_{size}", "vitft": f"adamdad/kat_{size}.vitft"}
        cfgs = {tag: model_cfg(size, hf_hub_id=id, url=PUBLISHED[head, tag]) for tag, id in hub_ids.items()}
    make = _flash_kat if name.startswith("flash_") else _kat
    register(__name__, name, doc, partial(make, model_cls, name, size, act), cfgs)


for _name in NAMES:
    _register(_name)
