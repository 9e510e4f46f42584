"""Vision transformers written out in float64 on raw arrays: what the tensors of a checkpoint imply."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.oracle import rational_oracle


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight + bias


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, N, heads, d) each -> (B, N, heads, d)."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)


def _activation(w: dict, block: str, place: int, x: Tensor) -> Tensor:
    for numerator, denominator in (("weight_numerator", "weight_denominator"), ("numerator_v", "denominator_v")):
        if f"{block}mlp.act{place}.{numerator}" in w:
            return rational_oracle(
                x, w[f"{block}mlp.act{place}.{numerator}"], w[f"{block}mlp.act{place}.{denominator}"]
            )
    return x if place == 1 else F.gelu(x)


def logits(weights: dict[str, Tensor], images: Tensor, num_heads: int) -> Tensor:
    """Outputs of a timm-style ViT, DeiT, KAT or FlashKAT; with a distillation token, the mean of both heads."""
    w, x = {name: value.double() for name, value in weights.items()}, images.double()
    patch = w["patch_embed.proj.weight"].shape[-1]
    x = (
        F.unfold(x, patch, stride=patch).transpose(1, 2) @ w["patch_embed.proj.weight"].flatten(1).T
        + w["patch_embed.proj.bias"]
    )
    first = [w[name].expand(len(x), -1, -1) for name in ("cls_token", "dist_token") if name in w]
    x = torch.cat([*first, x], 1) + w["pos_embed"]
    for i in range(sum(name.endswith(".attn.qkv.weight") for name in w)):
        b = f"blocks.{i}."

        def linear(name: str, x: Tensor, b: str = b) -> Tensor:
            return x @ w[f"{b}{name}.weight"].T + w[f"{b}{name}.bias"]

        qkv = linear("attn.qkv", _layer_norm(x, w[b + "norm1.weight"], w[b + "norm1.bias"])).unflatten(
            -1, (3, num_heads, -1)
        )
        x = x + linear("attn.proj", _attention(*qkv.unbind(2)).flatten(2))
        h = _activation(w, b, 1, _layer_norm(x, w[b + "norm2.weight"], w[b + "norm2.bias"]))
        x = x + linear("mlp.fc2", _activation(w, b, 2, linear("mlp.fc1", h)))
    x = _layer_norm(x, w["norm.weight"], w["norm.bias"])
    heads = [
        x[:, place] @ w[f"{name}.weight"].T + w[f"{name}.bias"]
        for place, name in enumerate(("head", "head_dist"))
        if f"{name}.weight" in w
    ]
    return sum(heads) / len(heads)


def npz_arrays(
    dim: int, depth: int, heads: int, patch: int, grid: int, classes: int, seed: int = 0
) -> dict[str, np.ndarray]:
    """Random arrays with the names and shapes of AugReg's files."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return rng.normal(0, 0.5 / max(1, shape[0]) ** 0.5, shape).astype(np.float32)

    arrays = {
        "cls": draw(1, 1, dim),
        "embedding/kernel": 0.1 * draw(patch, patch, 3, dim),
        "embedding/bias": draw(dim),
        "head/kernel": draw(dim, classes),
        "head/bias": draw(classes),
        "Transformer/posembed_input/pos_embedding": draw(1, grid**2 + 1, dim),
        "Transformer/encoder_norm/scale": 1 + draw(dim),
        "Transformer/encoder_norm/bias": draw(dim),
    }
    for i in range(depth):
        b = f"Transformer/encoderblock_{i}/"
        for norm in ("LayerNorm_0", "LayerNorm_2"):
            arrays |= {f"{b}{norm}/scale": 1 + draw(dim), f"{b}{norm}/bias": draw(dim)}
        for name in ("query", "key", "value"):
            arrays |= {
                f"{b}MultiHeadDotProductAttention_1/{name}/kernel": draw(dim, heads, dim // heads),
                f"{b}MultiHeadDotProductAttention_1/{name}/bias": draw(heads, dim // heads),
            }
        arrays |= {
            f"{b}MultiHeadDotProductAttention_1/out/kernel": draw(heads, dim // heads, dim),
            f"{b}MultiHeadDotProductAttention_1/out/bias": draw(dim),
            f"{b}MlpBlock_3/Dense_0/kernel": draw(dim, 4 * dim),
            f"{b}MlpBlock_3/Dense_0/bias": draw(4 * dim),
            f"{b}MlpBlock_3/Dense_1/kernel": draw(4 * dim, dim),
            f"{b}MlpBlock_3/Dense_1/bias": draw(dim),
        }
    return arrays


def npz_logits(arrays: dict[str, np.ndarray], images: Tensor) -> Tensor:
    """Classifier outputs of the ViT that the arrays of an AugReg file describe."""
    w, x = {name: torch.from_numpy(value).double() for name, value in arrays.items()}, images.double()
    patch = w["embedding/kernel"].shape[0]
    B, _, height, width = x.shape
    x = x.reshape(B, 3, height // patch, patch, width // patch, patch)
    x = torch.einsum("bchpwq,pqcd->bhwd", x, w["embedding/kernel"]).flatten(1, 2) + w["embedding/bias"]
    x = torch.cat([w["cls"].expand(B, -1, -1), x], 1) + w["Transformer/posembed_input/pos_embedding"]
    for i in range(sum(name.endswith("/Dense_0/kernel") for name in w)):
        b, attention = f"Transformer/encoderblock_{i}/", f"Transformer/encoderblock_{i}/MultiHeadDotProductAttention_1/"
        h = _layer_norm(x, w[b + "LayerNorm_0/scale"], w[b + "LayerNorm_0/bias"])
        qkv = [
            torch.einsum("bnd,dhe->bnhe", h, w[f"{attention}{name}/kernel"]) + w[f"{attention}{name}/bias"]
            for name in ("query", "key", "value")
        ]
        x = x + torch.einsum("bnhe,hed->bnd", _attention(*qkv), w[attention + "out/kernel"]) + w[attention + "out/bias"]
        h = _layer_norm(x, w[b + "LayerNorm_2/scale"], w[b + "LayerNorm_2/bias"])
        h = F.gelu(h @ w[b + "MlpBlock_3/Dense_0/kernel"] + w[b + "MlpBlock_3/Dense_0/bias"])
        x = x + h @ w[b + "MlpBlock_3/Dense_1/kernel"] + w[b + "MlpBlock_3/Dense_1/bias"]
    return (
        _layer_norm(x[:, 0], w["Transformer/encoder_norm/scale"], w["Transformer/encoder_norm/bias"]) @ w["head/kernel"]
        + w["head/bias"]
    )
