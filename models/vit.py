"""The plain ViT of timm, the sizes that every family here shares, and a micro ViT for 32-pixel images.

The baselines vit_{tiny,small,base}_patch16_224 are timm's own names and are not registered again.
"""

import sys
from functools import partial

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, deit, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

from .resample import resample_operators

SIZES = {
    "tiny_patch16_224": dict(img_size=224, patch_size=16, embed_dim=192, depth=12, num_heads=3),
    "small_patch16_224": dict(img_size=224, patch_size=16, embed_dim=384, depth=12, num_heads=6),
    "base_patch16_224": dict(img_size=224, patch_size=16, embed_dim=768, depth=12, num_heads=12),
    "micro_patch4_32": dict(img_size=32, patch_size=4, embed_dim=64, depth=4, num_heads=2),
    "micro_patch8_32": dict(img_size=32, patch_size=8, embed_dim=64, depth=4, num_heads=2),
}


def model_cfg(img_size: int = 224, **kwargs) -> dict:
    """timm's description of weights and data: DeiT's evaluation (ImageNet statistics, crop 0.875, bicubic) unless overridden."""
    return {
        **dict(
            url="",
            num_classes=1000,
            input_size=(3, img_size, img_size),
            pool_size=None,
            crop_pct=0.875,
            interpolation="bicubic",
            fixed_input_size=True,
            mean=IMAGENET_DEFAULT_MEAN,
            std=IMAGENET_DEFAULT_STD,
            first_conv="patch_embed.proj",
            classifier="head",
        ),
        **kwargs,
    }


def build(
    model_cls: type[VisionTransformer], variant: str, pretrained: bool = False, out_indices=3, **kwargs
) -> VisionTransformer:
    """timm's builder: weights from the hub or a file, resampled patch and position embeddings and operators, features_only."""
    return build_model_with_cfg(
        model_cls,
        variant,
        pretrained,
        pretrained_filter_fn=lambda w, m: checkpoint_filter_fn(resample_operators(w, m), m),
        feature_cfg=dict(out_indices=out_indices, feature_cls="getter"),
        **kwargs,
    )


def register(name: str, make, doc: str) -> None:
    """Enter `make(pretrained, **kwargs)` into timm's registry under `name`, as an entry point of the module that defines `make`."""
    module = (make.func if isinstance(make, partial) else make).__module__

    def entrypoint(
        pretrained: bool = False, pretrained_cfg=None, pretrained_cfg_overlay=None, cache_dir=None, **kwargs
    ):
        builder = dict(
            pretrained_cfg=pretrained_cfg, pretrained_cfg_overlay=pretrained_cfg_overlay, cache_dir=cache_dir
        )
        return make(pretrained, **{k: v for k, v in builder.items() if v is not None}, **kwargs)

    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__doc__, entrypoint.__module__ = doc, module
    setattr(sys.modules[module], name, register_model(entrypoint))


def _vit(name: str, size: str, pretrained: bool = False, **kwargs) -> VisionTransformer:
    return build(VisionTransformer, name, pretrained, **{**SIZES[size], **kwargs})


_MICRO = [size for size in SIZES if "micro" in size]
default_cfgs = generate_default_cfgs({f"vit_{size}": model_cfg(32) for size in _MICRO})
for _size in _MICRO:
    register(f"vit_{_size}", partial(_vit, f"vit_{_size}", _size), "ViT for 32-pixel images that a CPU can train.")


def _deit3(timm_name: str, pretrained: bool = False, **kwargs) -> VisionTransformer:
    return getattr(deit, timm_name)(pretrained=pretrained, **kwargs)


for _name, _timm_name in (
    ("deit_small_patch16_LS", "deit3_small_patch16_224"),
    ("deit_base_patch16_LS", "deit3_base_patch16_224"),
    ("deit_large_patch16_LS", "deit3_large_patch16_224"),
    ("deit_huge_patch14_LS", "deit3_huge_patch14_224"),
):
    register(_name, partial(_deit3, _timm_name), f"DeiT III's own name of {_timm_name}.")
