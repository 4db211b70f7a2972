"""The gradient of an embedding's table: for each row, the sum of the gradients of the tokens that took it.

The order. A row's tokens stand in the order of the batch. Their gradients are added in float32, neighbours in pairs,
0+1, 2+3, ..., a last one without a partner going on as it is; again, until one is left; rounded once. A row that no
token took is +0.

Why no launch can change it: the tokens are sorted by a stable sort, and every addition is an elementwise one of two
numbers; nothing is added by atomics. It is the same code on a CPU and on a GPU.
"""
from __future__ import annotations

import torch

from ..call import check_tensors


def embedding_gradient(dy, tokens, rows: int, padding: int = -1) -> torch.Tensor:
    """dy (..., D) float32, float16 or bfloat16, tokens (...) integers below `rows` -> (rows, D) in dy's dtype.

    Tokens equal to `padding` add nothing. Raises TypeError or ValueError for anything else.
    """
    check_tensors(dy=dy)
    if tokens.is_floating_point() or dy.shape[:-1] != tokens.shape:
        raise ValueError(f"tokens must be integers of shape {tuple(dy.shape[:-1])}, one for each row of dy, got "
                         f"{tokens.dtype} {tuple(tokens.shape)}")
    found, order = torch.sort(tokens.reshape(-1), stable=True)
    found, order = found[found != padding], order[found != padding]
    sums = dy.reshape(-1, dy.shape[-1])[order].float()
    while len(found) and (again := found[1:] == found[:-1]).any():
        rank = _rank(again)
        even = (rank % 2 == 0).nonzero()[:, 0]
        after = (even + 1).clamp(max=len(found) - 1)
        paired = (after > even) & (found[after] == found[even])
        sums = torch.where(paired[:, None], sums[even] + sums[after], sums[even])
        found = found[even]
    table = torch.zeros(rows, dy.shape[-1], dtype=dy.dtype, device=dy.device)
    table[found] = sums.to(dy.dtype)
    return table


def _rank(again) -> torch.Tensor:
    """How many equal tokens stand before each, in a sorted list; `again` says where a token equals the one before."""
    place = torch.arange(len(again) + 1, dtype=torch.int64, device=again.device)
    first = torch.cat([torch.ones_like(again[:1]), ~again])
    return place - torch.where(first, place, 0).cummax(0)[0]
