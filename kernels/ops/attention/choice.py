"""Which schedule for which call. A schedule decides speed, never a bit."""
from __future__ import annotations

import numpy as np

from .form import Form
from .hopper_choice import hopper_shares
from .order import LEAF
from .schedule import HOPPER, SMALL_SPREAD, Schedule, is_hopper, is_small, suits_hopper
from .sequences import Sequences

SOME, FULL = 64, 128  # programs that keep half of a GPU's multiprocessors busy, and all of them


def choose(form: Form, sequences: Sequences, index: int = -1, bulk: bool = False) -> Schedule:
    """The schedule of choice on GPU `index` (-1: none), of two the one with more queries. `bulk`: addresses and leaves
    are such as Hopper's kernels take.
    """
    return shares(form, sequences, index, bulk)[0][0]


def shares(form: Form, sequences: Sequences, index: int = -1,
           bulk: bool = False) -> list[tuple[Schedule, np.ndarray | None]]:
    """(schedule, which sequences it does; None: all) for one launch, or two that write one result."""
    if not (bulk and is_hopper(index) and suits_hopper(form, "hopper")):
        return [(_plain(form, sequences, is_small(index)), None)]
    if suits_hopper(form):
        return hopper_shares(form, sequences)
    return [(HOPPER if _are_many(form, sequences) else _plain(form, sequences, False), None)]


def _are_many(form, sequences) -> bool:
    """Whether every sequence that has queries fills enough of a tile of 128, and there are tiles enough."""
    queries = sequences.queries[sequences.queries > 0]
    tiles = int((-(-queries * form.group // 64)).sum()) * form.kv_heads
    return len(queries) > 0 and queries.min() >= 16 and (tiles >= SOME or sequences.longest <= 2 * LEAF)


def _plain(form, sequences, small) -> Schedule:
    """Many rows in high tiles, few rows on many keys with a leaf a program."""
    rows, leaves = sequences.queries * form.group, -(-sequences.longest // LEAF)
    high = rows.max(initial=0) > 16

    def tiles(height):
        return int((-(-rows // height)).sum()) * form.kv_heads
    if small:
        return Schedule("walk", 64, 4, 1) if tiles(64) >= SOME or leaves <= 1 else SMALL_SPREAD
    if high and tiles(128) >= SOME:
        return Schedule("walk", 128, 8, 2)
    count = tiles(64 if high else 16)
    kind = "walk" if count >= FULL or leaves <= 1 else "spread"
    if high:
        return Schedule(kind, 64, 4, 2)
    return Schedule(kind, 16, 4, 2 if count > 4 * FULL else 3)
