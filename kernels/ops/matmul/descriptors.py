"""Tensor descriptors of bulk copies: which tensors can have one, and those kept for launches."""
from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from ...launch import Step, Tiles
from .schedule import Unsuitable


def tiles_of(dtype: torch.dtype, shape: tuple, strides: tuple, block: tuple,
             layout: Callable = lambda descriptor: descriptor) -> Tiles:
    """Bulk copies of a matrix in tiles of `block`. Raises Unsuitable for strides that they cannot follow."""
    stride, step = strides
    if step != 1 or stride * dtype.itemsize % 16 or stride < shape[1]:
        raise Unsuitable(f"bulk copies need contiguous rows aligned to 16 bytes, got strides {strides}")
    return Tiles(dtype, shape, tuple(strides), block, layout)


class Descriptor:
    """What a launch reads of Triton's TensorDescriptor: it keeps no tensor alive and checks nothing."""

    __slots__ = ("data_ptr", "shape", "strides", "base")
    padding, round_f32_to_tf32 = "zero", False

    def __init__(self, pointer: int, tiles: Tiles):
        self.data_ptr, self.shape, self.strides, self.base = lambda: pointer, [*tiles.shape], [*tiles.strides], self


def leading(step: Step) -> list[tuple[str, Tiles | None]]:
    """(memory, tiles or None) of the step's first pointers, which are descriptors; y is "y" where it is stored so."""
    found = list(step.pointers.items())
    count = max(i for i, (_, kind) in enumerate(found) if isinstance(kind, Tiles)) + 1
    count += sum(1 for _, kind in found[count:] if kind is None)
    return [(step.named.get(name, name), kind) for name, kind in found[:count]]


def made_at(wanted: list[tuple[str, Tiles | None]], addresses: Mapping[str, int]) -> list[Descriptor | None]:
    """The descriptors of `leading` where the tensors lie now."""
    return [tiles and Descriptor(addresses[name], tiles) for name, tiles in wanted]
