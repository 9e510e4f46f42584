"""Model names for timm's registry: `import models; timm.create_model("kat_tiny_patch16_224")`."""

from . import karat, kat, vit

__all__ = ["karat", "kat", "vit"]
