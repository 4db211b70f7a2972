"""How parts meet: which GPU adds what, and by which path numbers travel. It decides speed, never a bit.

gather    every rank gets all parts from the library's all-gather, and adds all of them. Any device
scatter   a rank gets its own rows of all parts (all-to-all), adds them, and the rounded rows are gathered. Any device
one_shot  every GPU reads all parts where they lie, in symmetric memory, and adds all of them: two barriers, one kernel
two_shot  every GPU reads its own rows of all parts there, and stores the rounded rows in every GPU's memory
push      every GPU stores the rows of its part where they are added, and the rounded rows in every GPU's memory

Few tokens are a matter of latency, and want one_shot; many are a matter of bytes, and want each sum made once. The
numbers below were read from two H200s (token_sweep.csv has what they give).
"""
from __future__ import annotations

import re
from dataclasses import dataclass

KINDS = ("gather", "scatter", "one_shot", "two_shot", "push")
SYMMETRIC = KINDS[2:]
ONE_SHOT_BYTES = 2 << 20  # that a GPU may read of the others, at most, before it is better to add each row once
PUSH_BYTES = 32 << 20  # of a part: from here on stores, which nobody waits for, are faster than reads


@dataclass(frozen=True)
class Schedule:
    """How parts meet, and the adding kernel's numbers a program and warps."""

    kind: str = "gather"
    block: int = 1024
    warps: int = 4

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        for name, least in (("block", 16), ("warps", 1)):
            value = getattr(self, name)
            if type(value) is not int or value < least or value & (value - 1):
                raise ValueError(f"{name} must be a power of two of at least {least}, got {value!r}")

    def __str__(self):
        return f"{self.kind} block={self.block} warps={self.warps}"

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """The schedule that prints as `text`. Raises ValueError for any other text."""
        found = re.fullmatch(r"(\w+) block=(\d+) warps=(\d+)", str(text))
        if not found:
            raise ValueError(f"a schedule must read like 'one_shot block=1024 warps=4', got {text!r}")
        return cls(found[1], int(found[2]), int(found[3]))


def choose(elements: int, gpus: int, symmetric: bool) -> Schedule:
    """The schedule for parts of so many numbers; `symmetric`: whether GPUs read each other's memory."""
    few = 4 * elements * (gpus - 1) <= ONE_SHOT_BYTES
    if symmetric:
        kind = "one_shot" if few else "push" if 4 * elements >= PUSH_BYTES else "two_shot"
        return Schedule(kind, 512, 4)  # four numbers a thread: more of them at once read other GPUs 1.5 times as slowly
    return Schedule("gather" if few else "scatter", 512 if few else 2048, 4)


def every(symmetric: bool) -> list[Schedule]:
    """Every schedule that the tests hold to the specification's bits."""
    kinds = KINDS if symmetric else KINDS[:2]
    return [Schedule(kind, block, warps) for kind in kinds for block, warps in ((128, 1), (1024, 4))]
