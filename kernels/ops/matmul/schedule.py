"""Which schedule for which shape and token count. A schedule decides speed, never a bit.

A schedule is data: a kernel's kind, its tile and how it is walked, written as one line of text such as
``pointer 16x32x256 warps=4 stages=5 group=1 swap split``. Measured choices are in a GPU's table (kernels/tables.py);
what no table covers follows a rule.
"""
from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cache

import torch

from ... import tables
from ...op import dtype_name

_SWITCHES = {"pointer": ("swap", "split", "reduce", "copy"),
             "tma": ("swap", "split", "reduce", "persistent", "flatten", "store", "specialize", "copy"),
             "hopper": ("swap", "split", "reduce", "persistent", "store", "pingpong", "stream", "lockstep", "copy")}
KINDS = tuple(_SWITCHES)
SHARED = 227 * 1024  # bytes of shared memory that a block of sm_90 may use
_SHARED = {(8, 0): 163, (8, 6): 99, (8, 9): 99, (9, 0): 227, (10, 0): 227, (12, 0): 99}  # KiB a block may use
NARROW = 512  # weight rows, of a router or a head of few classes
_NEAR = 1.0  # how many doublings of N and K together a table's shape may be away


@dataclass(frozen=True)
class Schedule:
    """One way to carry out a matrix product's order.

    kind        pointer: any strides; tma: bulk copies, sm_90 and up; hopper: tma with loads in a warp of their own
    block_m/n/k tokens, weight rows and k of one tile
    warps, stages, group   warps a program, tiles of k in flight, token tiles that share a column of weights in L2
    swap        weight rows are the first side of the tensor core's product, so that few tokens pad little
    split       segments of k in programs of their own (in sequence in one program otherwise); the last to end adds
    reduce      a second kernel adds the segments of a split, on all multiprocessors
    persistent  programs walk tiles; flatten: the walk and the loop over k are one pipeline
    store       the result leaves by bulk copies as well (hopper: in whole lines, turned in shared memory)
    specialize  the compiler gives loads and products to different warps
    pingpong    hopper: each group of four warps has tiles of its own, and stores one while the other multiplies
    stream      hopper: the last tiles are shared out evenly; a chain that a program began is carried over to the next
    lockstep    stream: programs with the same weight rows share k alike, so that the rows come from memory once
    copy        x and the weight are first copied into rows for bulk copies, where theirs are none (copies.py)
    """

    kind: str = "pointer"
    block_m: int = 64
    block_n: int = 64
    block_k: int = 64
    warps: int = 4
    stages: int = 3
    group: int = 8
    swap: bool = False
    split: bool = False
    persistent: bool = False
    flatten: bool = False
    store: bool = False
    specialize: bool = False
    pingpong: bool = False
    reduce: bool = False
    stream: bool = False
    copy: bool = False
    lockstep: bool = False

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        for name, least in (("block_m", 1), ("block_n", 1), ("block_k", 16), ("warps", 1), ("stages", 1), ("group", 1)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")

        ignored = [f.name for f in fields(self) if f.type == "bool" and getattr(self, f.name)
                   and f.name not in _SWITCHES[self.kind]]
        if self.lockstep and not (self.stream and self.persistent):
            raise ValueError(f"lockstep is a way to stream, by persistent programs, got {self}")
        if ignored:
            raise ValueError(f"kind {self.kind} has no {', '.join(ignored)}; it has {', '.join(_SWITCHES[self.kind])}")

    def __str__(self):
        switches = [f.name for f in fields(self) if f.type == "bool" and getattr(self, f.name)]
        return " ".join([f"{self.kind} {self.block_m}x{self.block_n}x{self.block_k} warps={self.warps} "
                         f"stages={self.stages} group={self.group}", *switches])

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """The schedule that prints as `text`. Raises ValueError for any other text."""
        found = re.fullmatch(r"(\w+) (\d+)x(\d+)x(\d+) warps=(\d+) stages=(\d+) group=(\d+)((?: \w+)*)", str(text))
        switches = found[8].split() if found else []
        known = {f.name for f in fields(cls) if f.type == "bool"}
        if not found or not set(switches) <= known:
            raise ValueError("a schedule must read like 'pointer 16x32x256 warps=4 stages=5 group=1 swap', with "
                             f"switches among {', '.join(sorted(known))}; got {text!r}")
        return cls(found[1], *(int(n) for n in found.groups()[1:7]), **dict.fromkeys(switches, True))

    @property
    def shared_bytes(self) -> int:
        """What the tiles in flight take of a block's shared memory, for numbers of two bytes."""
        return 2 * self.stages * self.block_k * (self.block_m + self.block_n)

    @property
    def waiting_bytes(self) -> int:
        """Shared memory in which half of a tile's sums wait while the next segment fills the registers."""
        each = 64 * (192 if self.warps < 12 else 128)  # sums that four warps have room for, twice
        large = self.kind == "hopper" and self.block_m * self.block_n > each * (self.warps // 4)
        return 2 * self.block_m * self.block_n if large else 0


class Unsuitable(ValueError):
    """This schedule cannot carry out this product."""


def holds_odd(s: Schedule) -> bool:
    """Whether shared memory has room for the results of an odd N.

    Where the walk and the loop over k are one pipeline, a result passes through it while the next tiles arrive: half a
    tile at once, or all of one that is higher than wide if the rows of y begin at odd numbers.
    """
    whole = s.flatten and not s.swap and s.block_m > s.block_n
    return not whole or s.shared_bytes + 2 * s.block_m * s.block_n <= SHARED


def measured(section: str, n: int, k: int, dtype: torch.dtype, tokens: int, index: int, near: float = _NEAR
             ) -> Iterator[Schedule]:
    """Schedules that a section of the GPU's table has for (n, k), or for the nearest shapes within `near` doublings."""
    shapes = tables.of_gpu(index, Schedule.parse).get(section, {})
    shapes = shapes.get(dtype_name(dtype)) or (shapes.get("bfloat16", {}) if dtype == torch.float16 else {})

    def distance(sizes):
        return abs(math.log2(sizes[0] / n)) + abs(math.log2(sizes[1] / k))

    for sizes in sorted((s for s in shapes if distance(s) <= near), key=distance)[:2]:
        column = shapes[sizes]
        yield column[next((bound for bound in column if tokens <= bound), max(column))]


@cache
def gpu(index: int) -> tuple[tuple[int, int], int]:
    """The compute capability and the multiprocessors of GPU `index`; (0, 0) and 1 for none."""
    if index < 0:
        return (0, 0), 1
    return torch.cuda.get_device_capability(index), torch.cuda.get_device_properties(index).multi_processor_count


def shared_memory(capability: tuple[int, int]) -> int:
    """Bytes of shared memory that a block may use."""
    return 1024 * _SHARED.get(capability, 99)


def rule(n: int, k: int, dtype: torch.dtype, tokens: int, index: int = -1) -> Iterator[Schedule]:
    """Schedules for a shape that was not measured, from the one we expect to be fastest to one that runs anywhere."""
    capability, sms = gpu(index)
    shared = shared_memory(capability)
    for schedule in _guesses(n, dtype, tokens, capability >= (9, 0), sms):
        if schedule.shared_bytes * dtype.itemsize // 2 <= shared:
            yield schedule
    yield Schedule("pointer", 32, 32, 32, warps=4, stages=2)


def _guesses(n, dtype, tokens, tma, sms):
    if dtype == torch.float32:  # no tensor core: a product of small tiles, one fused multiply-add after the other
        if tokens > 64:
            yield Schedule("pointer", 64, 64, 16, warps=4, stages=3)
        yield Schedule("pointer", 16 if tokens <= 16 else 32, 32, 32, warps=4, stages=3, split=tokens <= 64)
        return
    width = max(16, 1 << max(tokens - 1, 0).bit_length())
    if width <= 64:
        rows = 16 if n < 4096 and width == 16 else 32 if n < 16384 else 64
        yield Schedule("pointer", width, rows, 256, warps=4, stages=4, group=1, swap=True, split=True)
        yield Schedule("pointer", width, rows, 128, warps=4, stages=4, group=1, swap=True, split=True)
        return
    if tma and n <= NARROW and tokens > 512:
        yield _narrow(n, tokens, sms)
    tiles = -(-tokens // 128) * -(-n // 128)
    if tma and tiles >= 4 * sms:
        yield Schedule("tma", 128, 256, 64, warps=8, stages=4, persistent=True, flatten=True)
    if tma and tiles >= sms // 2:
        yield Schedule("tma", 128, 128, 64, warps=8, stages=4, split=tiles < sms, reduce=tiles < sms)
    yield Schedule("pointer", 64, 64, 64, warps=4, stages=4, split=tiles < sms, reduce=tiles < sms)


def _narrow(n: int, tokens: int, sms: int) -> Schedule:
    """For few weight rows: low tiles as wide as they are, segments in sequence as soon as the tiles fill the GPU."""
    wide = max(16, min(1 << (n - 1).bit_length(), 128))
    few = -(-tokens // 64) * -(-n // wide) < 0.9 * sms
    return Schedule("tma", 64, wide, 64 if wide > 32 else 128, warps=4, stages=4, split=few, reduce=few)
