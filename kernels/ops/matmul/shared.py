"""A product whose k is shared out among GPUs: what each of them adds up, and how the sums become the result.

The order is `shared_order` of the whole weight. Each of 1, 2, 4 or 8 GPUs has the columns of k of its leaves and sends
one float32 sum, of its own part of the tree; what is left of the tree joins them. So the result has the same bits
whatever the number of GPUs, and as `matmul.python(x, weight, bias, order)` gives on one.
"""
from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ...call import check_tensors
from .order import LEAVES, Tree, leaves

SHARES = (1, 2, 4, 8)


def share(order: Tree, k: int, gpus: int, rank: int) -> slice:
    """The columns of k that GPU `rank` of `gpus` has; where the last leaves are short or empty, it has fewer or none.

    Raises TypeError or ValueError for an order that is no tree, another number of GPUs, or a rank that there is not.
    """
    width = _leaves_each(order, gpus) * order.length
    if type(rank) is not int or not 0 <= rank < gpus:
        raise ValueError(f"rank must be a whole number from 0 to {gpus - 1}, got {rank!r}")
    return slice(min(rank * width, k), min((rank + 1) * width, k))


def shared_part(x_part, weight_part, order: Tree, gpus: int) -> torch.Tensor:
    """One GPU's part, the specification: x (..., K of its share), weight (N, the same) -> (..., N) float32.

    float32, float16 or bfloat16, both of one dtype; `order` is the whole weight's. No bias: `joined` adds it.
    No gradient flows. Raises TypeError or ValueError for anything else.
    """
    check_tensors(x_part=x_part, weight_part=weight_part)
    count = _leaves_each(order, gpus)
    if weight_part.dim() != 2 or weight_part.shape[1] > count * order.length:
        raise ValueError(f"weight_part must have two dimensions (N, K), K up to {count} leaves of {order.length}, got "
                         f"shape {tuple(weight_part.shape)}")
    if x_part.dim() == 0 or x_part.shape[-1] != weight_part.shape[1]:
        raise ValueError(f"x_part must have a last dimension of {weight_part.shape[1]}, the K of weight_part, got "
                         f"shape {tuple(x_part.shape)}")
    rows = x_part.detach().reshape(math.prod(x_part.shape[:-1]), x_part.shape[-1])
    return leaves(rows, weight_part.detach(), order.length, count).view(*x_part.shape[:-1], len(weight_part))


def joined(parts: Sequence[torch.Tensor], bias=None, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The result from every GPU's part, in their order: the rest of the tree, from +0 on, the bias, one rounding.

    1, 2, 4 or 8 parts (..., N) float32 of one shape, bias (N,) or None -> (..., N) in `dtype`. Raises TypeError or
    ValueError for anything else.
    """
    if len(parts) not in SHARES:
        raise ValueError(f"parts must be 1, 2, 4 or 8 tensors, one for each GPU, got {len(parts)}")
    first = parts[0]
    for i, part in enumerate(parts):
        if part.dtype != torch.float32 or part.shape != first.shape:
            raise ValueError(f"parts must be float32 of one shape, got {part.dtype} {tuple(part.shape)} at {i} and "
                             f"{first.dtype} {tuple(first.shape)} at 0")
    while len(parts) > 1:
        parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=True)]
    total = torch.zeros_like(first) + parts[0]
    return (total if bias is None else total + bias.float()).to(dtype)


def _leaves_each(order, gpus) -> int:
    """How many leaves one of so many GPUs has."""
    if not isinstance(order, Tree):
        raise TypeError(f"order must be a Tree, as shared_order(n, k) of the whole weight gives, got {order!r}")
    if gpus not in SHARES:
        raise ValueError(f"gpus must be 1, 2, 4 or 8, got {gpus!r}")
    return LEAVES // gpus
