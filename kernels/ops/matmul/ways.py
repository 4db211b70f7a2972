"""The ways to carry out a product that a model of time weighs (cost.py): which there are, and which suit a form.

All is written for numbers as for arrays of them, so that one pass weighs every schedule.
"""
from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch

from .order import order
from .schedule import SHARED, Schedule, holds_odd

# How much longer pointers take, in a tile's own measure, for rows at multiples of so many numbers (units.py): fitted to
# cost_times.csv. Below 4 a load brings less than 8 bytes; nothing was fitted to multiples of 2, which count as odd.
_UNEVEN = {16: 0.0, 8: 0.5, 4: 0.7, 2: 1.9, 1: 1.9}


class Form(NamedTuple):
    """What of a call decides its time: y (tokens, n) = x (tokens, k) @ weight (n, k).T, k cut into segments.

    size    bytes of a number
    bulk    whether rows begin at multiples of 16 bytes, so that bulk copies can read them
    uneven  how much pointers are slowed down because k is no multiple of 16, see `unevenness`
    sms     the GPU's multiprocessors
    copied  bytes that are read and written before bulk copies can read rows
    """

    n: Any
    k: Any
    tokens: Any
    segments: Any
    length: Any
    size: Any = 2
    bulk: Any = True
    uneven: Any = 0.0
    sms: Any = 132
    copied: Any = 0

    @classmethod
    def of(cls, n: int, k: int, tokens: int, dtype: torch.dtype, sms: int = 132) -> Form:
        """The form of contiguous x and weight, in the order that (n, k) has."""
        return cls(n, k, tokens, *order(n, k), dtype.itemsize, k * dtype.itemsize % 16 == 0, unevenness(k), sms)

    def on_copies(self, of_x: bool = True, of_weight: bool = True) -> Form:
        """The form whose rows are copied first, so that bulk copies can read them (copies.py)."""
        rows = self.tokens * of_x + self.n * of_weight
        return self._replace(bulk=True, copied=2 * self.size * self.k * rows)


def unevenness(*numbers: int) -> float:
    """Of rows of so many numbers, or so many apart: 0 where all are multiples of 16, and pointers read 16 bytes."""
    return _UNEVEN[math.gcd(16, *numbers)]


class Sizes(NamedTuple):
    """What of a schedule decides its time, and which orders it can carry out: one chain, or segments in sequence.

    stores    by bulk copies, which want rows of y to begin at multiples of 16 bytes
    odd       whether there is room for the results of an odd N
    lockstep  stream: programs with the same weight rows share k alike
    """

    m: Any
    n: Any
    k: Any
    pointer: Any
    hopper: Any
    split: Any
    reduce: Any
    stream: Any
    sequence: Any
    stores: Any
    odd: Any = True
    lockstep: Any = False

    @classmethod
    def of(cls, s: Schedule) -> Sizes:
        wide = s.block_m if s.swap else s.block_n
        half = s.waiting_bytes  # of the sums waits, must have room, and be half of a power of two
        sequence = not (s.split or s.stream or s.pingpong) and (
            not half or not wide & (wide - 1) and s.shared_bytes + half <= SHARED)
        return cls(s.block_m, s.block_n, s.block_k, s.kind == "pointer", s.kind == "hopper", s.split, s.reduce,
                   s.stream, sequence, s.store and s.kind == "tma", holds_odd(s), s.lockstep)


def variants(tile: Schedule) -> Iterator[Schedule]:
    """Every schedule with this tile: segments in sequence, side by side, or chains handed on."""
    yield tile
    hopper, large = tile.kind == "hopper", tile.block_m * tile.block_n >= 128 * 128
    if hopper and large and not tile.pingpong:
        yield replace(tile, stream=True)
        yield replace(tile, stream=True, lockstep=True)
    if tile.pingpong or tile.store or tile.persistent and not hopper:
        return
    if not hopper and not large:
        yield replace(tile, split=True)
    yield replace(tile, split=True, reduce=True)


def units(s: Sizes, form: Form) -> Any:
    """How many chains programs walk: tiles, or segments of tiles."""
    return -(-form.tokens // s.m) * -(-form.n // s.n) * np.where(s.split, form.segments, 1)


def lanes(s: Sizes, form: Form) -> Any:
    """Programs for each tile of tokens, where these walk the weight rows in lockstep."""
    return np.maximum(form.sms // -(-form.tokens // s.m), 1)


def suits(s: Sizes, form: Form) -> Any:
    """Whether schedules can carry out a form, and are worth a thought: a tile is not mostly empty."""
    chains = units(s, form)
    idle = (chains > form.sms) & (chains % form.sms > 0)  # at the end, without chains handed on
    side_by_side = np.where(s.reduce, form.tokens > 64, form.tokens <= 128) & (~s.hopper | (form.k % form.length == 0))
    in_sequence = s.sequence & (form.length >= 2 * s.k)
    cut = (form.length % s.k == 0) & np.where(s.split, side_by_side, in_sequence)
    rows = (s.pointer | form.bulk) & (~s.stores | (form.n * form.size % 16 == 0))
    rows = rows & (s.odd | (form.n % 2 == 0))
    abreast = -(-form.tokens // s.m)
    together = (abreast > 1) & (abreast <= form.sms)
    return (rows & (s.m < 2 * np.maximum(form.tokens, 16)) & (~s.stream | idle) & (together | ~s.lockstep)
            & np.where(form.segments == 1, ~s.split, cut))


def columns(rows: Iterable[tuple]) -> Iterator[np.ndarray]:
    """Each field of many tuples as an array."""
    return map(np.array, zip(*rows, strict=True))
