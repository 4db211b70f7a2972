"""Which schedule for which call. A schedule decides speed, never a bit."""
from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

import torch

from .form import Form
from .order import LEAF
from .sequences import Sequences

KINDS = ("walk", "spread", "hopper")
SOME, FULL = 64, 128  # programs that keep half of a GPU's multiprocessors busy, and all of them


@dataclass(frozen=True)
class Schedule:
    """One way to carry out the order of attention.

    kind    walk: a program takes its rows through all their leaves; spread: a leaf a program, a second launch joins;
            hopper: walk for many queries on sm_90, with copies in a warp of their own, in one form alone
    rows    of a tile: queries x heads that share a head of k
    warps, stages  warps a program, blocks of keys in flight
    parts   spread: so many programs a leaf, each with its share of v's columns, and all the scores
    """

    kind: str = "walk"
    rows: int = 16
    warps: int = 4
    stages: int = 2
    parts: int = 1

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        for name, allowed in (("rows", (16, 32, 64, 128)), ("warps", (1, 2, 4, 8)), ("stages", (1, 2, 3, 4)),
                              ("parts", (1, 2) if self.kind == "spread" else (1,))):
            value = getattr(self, name)
            if type(value) is not int or value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, got {value!r}")
        if self.kind == "hopper" and (self.rows, self.warps, self.stages) != (128, 8, 2):
            raise ValueError(f"a schedule of kind hopper is '{HOPPER}', got '{self}'")

    def __str__(self):
        return (f"{self.kind} {self.rows} warps={self.warps} stages={self.stages}"
                + (f" parts={self.parts}" if self.parts > 1 else ""))

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """The schedule that prints as `text`. Raises ValueError for any other text."""
        found = re.fullmatch(r"(\w+) (\d+) warps=(\d+) stages=(\d+)(?: parts=(\d+))?", str(text))
        if not found:
            raise ValueError(f"a schedule must read like 'spread 16 warps=4 stages=3', got {text!r}")
        kind, *numbers = found.groups()
        return cls(kind, *(int(n) for n in numbers if n is not None))


def choose(form: Form, sequences: Sequences, index: int = -1, bulk: bool = False) -> Schedule:
    """The schedule of choice on GPU `index` (-1: none), as measured on an H200: many rows in high tiles, few rows on
    many keys with a leaf a program. `bulk`: addresses and leaves are such as Hopper's kernel takes.
    """
    rows, leaves = sequences.queries * form.group, -(-sequences.longest // LEAF)
    high = rows.max(initial=0) > 16

    def tiles(height):
        return int((-(-rows // height)).sum()) * form.kv_heads
    if (bulk and high and is_hopper(index) and suits_hopper(form) and _are_many(sequences)
            and (tiles(64) >= SOME or leaves <= 2)):
        return HOPPER
    if _is_small(index):
        return Schedule("walk", 64, 4, 1) if tiles(64) >= SOME or leaves <= 1 else SMALL_SPREAD
    if high and tiles(128) >= SOME:
        return Schedule("walk", 128, 8, 2)
    count = tiles(64 if high else 16)
    kind = "walk" if count >= FULL or leaves <= 1 else "spread"
    if high:
        return Schedule(kind, 64, 4, 2)
    return Schedule(kind, 16, 4, 2 if count > 4 * FULL else 3)


HOPPER = Schedule("hopper", 128, 8, 2)
SMALL_SPREAD = Schedule("spread", 16, 4, 1)


@cache
def _is_small(index: int) -> bool:
    """Whether a block of GPU `index` may use less shared memory than data-centre GPUs give it: 99 KB, not 163."""
    return index >= 0 and torch.cuda.get_device_capability(index) in ((8, 6), (8, 7), (8, 9), (12, 0), (12, 1))


@cache
def is_hopper(index: int) -> bool:
    """Whether GPU `index` runs schedules of kind hopper."""
    return index >= 0 and torch.cuda.get_device_capability(index) == (9, 0)


def suits_hopper(form: Form) -> bool:
    """Whether Hopper's kernel can carry out such a call: 16-bit numbers in rows that bulk copies can follow, no window,
    no pages. The addresses of q, k and v must be multiples of 16 bytes besides.
    """
    return (form.dtype.itemsize == 2 and not form.window and not form.page and form.width % 8 == 0
            and all(stride > 0 and stride % 8 == 0 for stride in form.strides) and form.heads < 1 << 16)


def _are_many(sequences: Sequences) -> bool:
    """Whether every sequence that has queries fills enough of a tile of 128."""
    return int(sequences.queries[sequences.queries > 0].min(initial=128)) >= 16


def tested(index: int = -1) -> list[Schedule]:
    """Every schedule that tests hold to the specification's bits; all that `choose` can give are among them."""
    found = [*(Schedule(kind, rows, 4, stages) for kind in ("walk", "spread") for rows, stages in ((16, 3), (64, 2))),
             Schedule("walk", 16, 4, 2), Schedule("walk", 128, 8, 2), Schedule("walk", 64, 4, 1), SMALL_SPREAD,
             Schedule("spread", 16, 2, 2, parts=2)]
    return [*found, HOPPER] if is_hopper(index) else found
