"""What this repository uses of timm beyond its public interface, in one place; read in timm 1.0.31."""

from collections.abc import Callable

from einops import rearrange
from timm.data.auto_augment import AugmentOp
from timm.data.transforms import RandomResizedCropAndInterpolation
from timm.models.vision_transformer import Attention, VisionTransformer
from torch import Tensor
from torchvision.transforms import Compose


def split_heads(attention: Attention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The first half of Attention.forward: (B, N, C) -> Q, K and V, (B, h, N, d) each."""
    q, k, v = rearrange(attention.qkv(x), "B N (three h d) -> three B h N d", three=3, h=attention.num_heads)
    return attention.q_norm(q), attention.k_norm(k), v


def merge_heads(attention: Attention, x: Tensor, heads: Tensor) -> Tensor:
    """The second half of Attention.forward for the input x (B, N, C): (B, h, N, d) -> (B, N, C)."""
    out = attention.norm(rearrange(heads, "B h N d -> B N (h d)"))
    if attention.gate is not None:
        out = out * attention.gate(x).sigmoid()
    return attention.proj_drop(attention.proj(out))


def init_weights_by_timm(model: VisionTransformer) -> None:
    """Initialise a model that was built with weight_init="skip" as timm does by default, trunc_normal(std=0.02)."""
    model.weight_init_mode = ""
    model.init_weights()


def replace_crop(transform: Compose, steps: list[Callable]) -> None:
    """Replace the random resized crop, the first step of a training transform, by other steps."""
    if not isinstance(transform.transforms[0], RandomResizedCropAndInterpolation):
        raise RuntimeError("the first step of timm's training transform is not a random resized crop: use timm 1.0.31")
    transform.transforms[:1] = steps


def replace_operation(transform: Compose, name: str, function: Callable) -> None:
    """Replace the function of the operations whose name begins with `name` in all policies.

    RandAugment and AugMix have a list `ops`, AutoAugment a list `policy` of such lists.
    """
    for step in transform.transforms:
        for op in [*getattr(step, "ops", ()), *(op for ops in getattr(step, "policy", ()) for op in ops)]:
            if isinstance(op, AugmentOp) and op.name.startswith(name):
                op.aug_fn = function
