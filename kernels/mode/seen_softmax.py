"""Softmax over keys of which some are hidden: a row begins at its first key that has a weight.

A mask hides keys by scores so low that their weights are 0. So padding on the left is zeros before a row's sum, and
what a batch pads would move the places of all that follows. Here such zeros come last, where they leave every bit.
"""
from __future__ import annotations

import torch

from ..ops.softmax import softmax
from .products import how

NOTHING = -104.0  # exp of this is 0 in float32


def may_be_scores(x: torch.Tensor, dim: int) -> bool:
    """Whether x may be a batch's scores for keys. Rows of a matrix, as logits are, have no padding on the left."""
    return x.dim() > 2 and -x.dim() <= dim < x.dim() and x.shape[dim] > 1


def seen_softmax(x: torch.Tensor, dim: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Softmax of x (..) over `dim`, in x's dtype or as float32, in the order of ops/softmax from that key on."""
    h = x if dtype is None else x.to(dtype)
    hidden = h - h.amax(dim, keepdim=True) < NOTHING
    if x.is_cpu and not hidden.any():  # a look would have a GPU's host wait
        return how(x, softmax)(x, dim, dtype)
    place = _places(hidden, dim)
    p = how(x, softmax)(x.gather(dim, place), dim, dtype)
    return torch.empty_like(p).scatter_(dim, place, p)


def from_first(x: torch.Tensor, hidden: torch.Tensor, dim: int) -> torch.Tensor:
    """x (..) with each row over `dim` turned, so that it begins where it is not hidden."""
    return x if x.is_cpu and not hidden.any() else x.gather(dim, _places(hidden, dim))


def _places(hidden: torch.Tensor, dim: int) -> torch.Tensor:
    """(..) int64: the places over `dim` from the first one that is not hidden, then those before it."""
    size, shape = hidden.shape[dim], [1] * hidden.dim()
    shape[dim] = size
    begin = (~hidden).to(torch.int8).argmax(dim, keepdim=True)
    place = torch.arange(size, dtype=torch.int64, device=hidden.device).view(shape)
    return place.add(begin).remainder_(size)
