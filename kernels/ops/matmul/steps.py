"""Which launches carry out a schedule of a product, and what memory they share."""
from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch

from ...launch import Step
from . import copies, pointer, tma, units
from . import tree as trees
from .leaves import join_kernel
from .order import is_tree
from .product import Product
from .schedule import Schedule, Unsuitable
from .tiles import reduce_kernel

REDUCED = 1024  # numbers of y that a program of the second kernel adds up


class Memory(NamedTuple):
    """What a call needs besides x, the weight and y: float32 numbers, and counters that are zero."""

    floats: int
    counters: int


def kind_of(schedule: Schedule, product: Product) -> ModuleType:
    """The file of a schedule's kind: its kernel, what it suits, its memory and its launch.

    A tree has files of its own; where a second kernel adds, the first one leaves segments and knows no tree.
    """
    joins = _joins(schedule, product)
    if schedule.kind == "hopper":  # written in Gluon, which is there if Triton is
        from . import hopper, hopper_tree

        return hopper_tree if joins else hopper
    return trees if joins else {"pointer": pointer, "tma": tma}[schedule.kind]


def _joins(schedule: Schedule, product: Product) -> bool:
    """Whether the kernel itself joins the leaves of a tree."""
    return is_tree(product.order) and not schedule.reduce


def steps(schedule: Schedule, product: Product) -> list[Step]:
    """One launch, or one that copies before it, or one that adds segments behind it.

    Raises Unsuitable if the schedule does not suit the product.
    """
    s = product.carried_out(schedule)
    kind, read = kind_of(s, product), copies.copied(product) if s.copy else product
    kind.suits(s, read)
    found = kind.step(s, read)
    if not _joins(s, read):
        found = units.told(found, read)
    first = [copies.step(product), copies.reading(found, product)] if s.copy else [found]
    return [*first, _reduce(product)] if s.reduce else first


def memory(schedule: Schedule, product: Product) -> Memory:
    """What `schedule`, as `Product.carried_out` gives it, needs. Raises Unsuitable where that cannot be counted."""
    s, size = schedule, product.m * product.n * product.order.segments
    if s.reduce and size >= 2**31:
        raise Unsuitable(f"too many sums for a second kernel to count, got {s}")
    floats, counters = kind_of(s, product).memory(s, product)
    return Memory(floats + (size if s.reduce else 0), counters)


def _reduce(product: Product) -> Step:
    size = product.m * product.n
    tree = is_tree(product.order)
    segments = {} if tree else {"SEGMENTS": product.order.segments}
    return Step(join_kernel if tree else reduce_kernel, -(-size // REDUCED),
                {"partial_ptr": torch.float32, "bias_ptr": product.dtype, "y_ptr": product.dtype},
                {"size": size, "N": product.n}, {**segments, "BLOCK": REDUCED, "BIAS": product.bias}, {})
