"""Schedules of attention: what one may be, where it runs, and all that are tested. None decides a bit."""
from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

import torch

from .form import Form

KINDS = ("walk", "spread", "blocks", "hopper", "hopper_spread")
PARTS = {"spread": (1, 2), "blocks": (1, 2, 4, 8)}
ON_HOPPER = {"hopper": ((128, 8, 2),), "hopper_spread": ((64, 4, 3), (128, 8, 3))}  # rows, warps, stages


@dataclass(frozen=True)
class Schedule:
    """One way to carry out the order of attention.

    kind    walk: a program takes its rows through all their leaves; spread: a leaf a program, a second launch joins;
            blocks: a launch for scores, one for leaves, one that joins;
            hopper, hopper_spread: walk and spread on sm_90, with copies in a warp of their own
    rows    of a tile: queries x heads that share a head of k
    warps, stages  warps a program, blocks of keys in flight; blocks: programs that make a block's scores
    parts   spread, blocks: so many programs a leaf, each with its share of v's columns, and all the scores
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
                              ("parts", PARTS.get(self.kind, (1,)))):
            value = getattr(self, name)
            if type(value) is not int or value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, got {value!r}")
        if self.kind in ON_HOPPER and (self.rows, self.warps, self.stages) not in ON_HOPPER[self.kind]:
            raise ValueError(f"a schedule of kind {self.kind} has rows, warps and stages of one of "
                             f"{ON_HOPPER[self.kind]}, got '{self}'")

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


BLOCKS = Schedule("blocks", 16, 4, 1, parts=8)
SMALL_SPREAD = Schedule("spread", 16, 4, 1)
HOPPER, HOPPER_FEW, HOPPER_MANY = (Schedule(kind, *sizes) for kind, known in ON_HOPPER.items() for sizes in known)


@cache
def is_small(index: int) -> bool:
    """Whether a block of GPU `index` may use less shared memory than data-centre GPUs give it: 99 KB, not 163."""
    return index >= 0 and torch.cuda.get_device_capability(index) in ((8, 6), (8, 7), (8, 9), (12, 0), (12, 1))


@cache
def is_hopper(index: int) -> bool:
    """Whether GPU `index` runs schedules of kind hopper."""
    return index >= 0 and torch.cuda.get_device_capability(index) == (9, 0)


def suits_hopper(form: Form, kind: str = "hopper_spread") -> bool:
    """Whether Hopper's kernels can carry out such a call: 16-bit numbers in rows that bulk copies can follow, no
    window, pages that make up blocks of keys. The addresses of q, k and v must be multiples of 16 bytes besides.
    """
    return (form.dtype.itemsize == 2 and not form.window and form.width % 8 == 0
            and all(stride > 0 and stride % 8 == 0 for stride in form.strides) and form.heads < 1 << 16
            and (form.page == 0 or form.page >= 16 and form.page & form.page - 1 == 0)
            and (kind == "hopper" or 64 % form.group == 0))


def tested(index: int = -1) -> list[Schedule]:
    """Every schedule that tests hold to the specification's bits; all that `choose` can give are among them."""
    found = [*(Schedule(kind, rows, 4, stages) for kind in ("walk", "spread") for rows, stages in ((16, 3), (64, 2))),
             Schedule("walk", 16, 4, 2), Schedule("walk", 128, 8, 2), Schedule("walk", 64, 4, 1), SMALL_SPREAD,
             Schedule("spread", 16, 2, 2, parts=2), BLOCKS]
    return [*found, HOPPER, HOPPER_FEW, HOPPER_MANY] if is_hopper(index) else found
