"""A function of many rows in chunks that are computed again in the backward pass."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kan_basis.torch_internals import exporting


def in_chunks(function: Callable[..., Tensor], *tensors: Tensor, size: int, dim: int, keep_rng: bool = False) -> Tensor:
    """function(*tensors) in chunks of at most `size` along `dim`, concatenated along `dim`.

    Only the tensors are kept for the backward pass, which computes the function again. With `keep_rng` a function that
    draws random numbers draws the same ones again. An exported program has one chunk, because its batch is not known.
    """
    if exporting():
        return function(*tensors)
    count = max(1, math.ceil(tensors[0].shape[dim] / max(1, size)))
    chunks = zip(*(t.chunk(count, dim) for t in tensors))
    if torch.is_grad_enabled():
        results = [checkpoint(function, *chunk, use_reentrant=False, preserve_rng_state=keep_rng) for chunk in chunks]
    else:
        results = [function(*chunk) for chunk in chunks]
    return results[0] if len(results) == 1 else torch.cat(results, dim)
