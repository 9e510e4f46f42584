"""Model names for timm's registry: `import models; timm.create_model("kat_tiny_patch16_224")`."""
from models import kat, vit

__all__ = ["kat", "vit"]
