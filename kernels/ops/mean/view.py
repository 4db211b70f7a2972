"""How the kernels of sum and mean read x.

Which inputs are read in place: those whose numbers, taken in order of falling stride, are (outer, reduced, inner)
with one stride each, and contiguous in the last. Contiguous tensors with neighbouring reduced dimensions are of this
kind, and so are their transposes and columns of wider ones. Others are permuted into rows and copied first.
"""
from __future__ import annotations

from itertools import pairwise
from math import prod
from typing import NamedTuple


class View(NamedTuple):
    """x as (outer, length, inner), read at outer_stride, stride and 1; after a copy in this order, if one is given."""

    outer: int
    length: int
    inner: int
    outer_stride: int
    stride: int
    order: tuple[int, ...] | None = None


def view_of(x, dims) -> View:
    """How the kernels read x, which is not empty."""
    order = sorted((i for i in range(x.dim()) if x.shape[i] > 1), key=lambda i: -x.stride(i))
    kept, reduced = [i for i in order if i not in dims], [i for i in order if i in dims]
    first = order.index(reduced[0]) if reduced else len(order)
    outer, inner = kept[:first], kept[first:]
    if order == outer + reduced + inner and kept == sorted(kept) and reduced == sorted(reduced):
        strides = [_stride(x, group) for group in (outer, reduced, inner)]
        if None not in strides and (strides[2] if inner else strides[1]) == 1:
            return View(*(prod(x.shape[i] for i in group) for group in (outer, reduced, inner)), *strides[:2])
    kept = [i for i in range(x.dim()) if i not in dims]
    outer, length = prod(x.shape[i] for i in kept), prod(x.shape[i] for i in dims)
    return View(outer, length, 1, length, 1, (*kept, *dims))


def _stride(x, dims) -> int | None:
    """The one stride that walks these dimensions in order; None if there is none, 1 for no dimension."""
    for i, after in pairwise(dims):
        if x.stride(i) != x.stride(after) * x.shape[after]:
            return None
    return x.stride(dims[-1]) if dims else 1
