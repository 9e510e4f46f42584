"""The plain ViT of timm, the sizes that every family here shares, and a micro ViT for 32-pixel images.

The baselines vit_{tiny,small,base}_patch16_224 are timm's own names and are not registered again.
"""

import sys
from collections.abc import Callable
from functools import partial

from timm.models import build_model_with_cfg, deit, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import nn

from .resample import resample_operators

SIZES = {
    "tiny_patch16_224": dict(img_size=224, patch_size=16, embed_dim=192, depth=12, num_heads=3),
    "small_patch16_224": dict(img_size=224, patch_size=16, embed_dim=384, depth=12, num_heads=6),
    "base_patch16_224": dict(img_size=224, patch_size=16, embed_dim=768, depth=12, num_heads=12),
    "micro_patch4_32": dict(img_size=32, patch_size=4, embed_dim=64, depth=4, num_heads=2),
    "micro_patch8_32": dict(img_size=32, patch_size=8, embed_dim=64, depth=4, num_heads=2),
}


def model_cfg(size: str, **kwargs) -> dict:
    """What timm knows of weights and data. Its defaults are DeiT's: ImageNet statistics, crop 0.875, bicubic."""
    pixels = SIZES[size]["img_size"]
    cfg = dict(input_size=(3, pixels, pixels), fixed_input_size=True, first_conv="patch_embed.proj", classifier="head")
    return {**cfg, **kwargs}


def build(
    model_cls: type[VisionTransformer], name: str, size: str, pretrained: bool = False, out_indices=3, **kwargs
) -> VisionTransformer:
    """timm's builder, which also resamples embeddings and operators of pretrained weights to the size of the model."""
    return build_model_with_cfg(
        model_cls,
        name,
        pretrained,
        pretrained_filter_fn=lambda w, m: checkpoint_filter_fn(resample_operators(w, m), m),
        feature_cfg=dict(out_indices=out_indices, feature_cls="getter"),
        **{**SIZES[size], **kwargs},
    )


def register(module: str, name: str, doc: str, make: Callable[..., nn.Module], cfgs: dict[str, dict]) -> None:
    """Enter `make` into timm's registry under `name`, in `module`, with timm's descriptions of its weights by tag."""

    def entrypoint(pretrained: bool = False, **kwargs):
        return make(pretrained=pretrained, **kwargs)

    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__doc__, entrypoint.__module__ = doc, module
    attributes = vars(sys.modules[module])
    described = generate_default_cfgs({f"{name}.{tag}": cfg for tag, cfg in cfgs.items()})
    attributes.setdefault("default_cfgs", {}).update(described)
    attributes[name] = register_model(entrypoint)


for _size in ("micro_patch4_32", "micro_patch8_32"):
    _make = partial(build, VisionTransformer, f"vit_{_size}", _size)
    register(__name__, f"vit_{_size}", "ViT for 32-pixel images that a CPU can train.", _make, {"": model_cfg(_size)})
for _model in ("small_patch16", "base_patch16", "large_patch16", "huge_patch14"):
    _timm_name = f"deit3_{_model}_224"
    register(__name__, f"deit_{_model}_LS", f"DeiT III's own name of {_timm_name}.", getattr(deit, _timm_name), {})
