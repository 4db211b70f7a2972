"""Which sequences of a call go through which kernel on Hopper: estimates of their times, as measured on an H200."""
from __future__ import annotations

import numpy as np

from .form import Form
from .order import BLOCK, LEAF
from .schedule import BLOCKS, HOPPER, HOPPER_FEW, HOPPER_MANY, Schedule
from .sequences import Sequences

PROGRAMS = 132
TRIED = 16, 64, 128, 256, 512, 1 << 31  # the fewest queries of a sequence that walks
BLOCK_US = {64: 1.0, 128: 1.5}  # a block of 128 keys for so many rows
JOB_US = {64: 3.5, 128: 3.5}  # what a tile, or a leaf of one, costs besides
SECOND_US = 3.0  # another launch
ROW_US = 2 * 128 * 4 / 3e6  # a row of partial results, written and read again
BLOCKS_MOST = 16  # leaves x heads of k, of few rows each, up to which a few short launches take less time
ONE_LAUNCH_KEYS = 640  # but for so few keys: one launch takes 3.6 us and 0.0077 a key, short ones 8.3 and 0.001
LONG_WALK = Schedule("walk", 16, 4, 2)  # for memory that is busy anyway, without partial results


def hopper_shares(form: Form, sequences: Sequences) -> list[tuple[Schedule, np.ndarray]]:
    """(schedule, which sequences it does), the one with more queries first."""
    queries, keys = sequences.queries, sequences.keys
    if _is_long_decode(form, queries, keys):
        return [(LONG_WALK, None)]
    if (queries * form.group).max(initial=0) <= 16 and _leaves(queries, keys) * form.kv_heads <= BLOCKS_MOST:
        return [(HOPPER_FEW if keys[queries > 0].max(initial=0) <= ONE_LAUNCH_KEYS else BLOCKS, None)]
    least, rows = _quickest(queries[queries > 0], keys[queries > 0], form)
    spread = HOPPER_FEW if rows == 64 else HOPPER_MANY
    found = [(schedule, chosen & (queries > 0)) for schedule, chosen in ((HOPPER, queries >= least),
                                                                         (spread, queries < least))]
    found = [(schedule, chosen) for schedule, chosen in found if chosen.any()]
    return sorted(found, key=lambda share: -queries[share[1]].sum()) or [(spread, queries > 0)]


def _leaves(queries, keys) -> int:
    return int((-(-keys // LEAF))[queries > 0].sum())


def _is_long_decode(form, queries, keys) -> bool:
    """Few rows each, of many sequences of about one length: a program for each keeps all of memory busy.

    With a second leaf, of one key even, it takes 0.95 to 1.00 of hopper_spread's time.
    """
    rows = queries * form.group
    return bool(form.page == 0 and len(keys) and rows.min() > 0 and rows.max() <= 16 and keys.min() > LEAF
                and len(keys) * form.kv_heads >= 2 * PROGRAMS - 8 and keys.max() <= 1.2 * keys.mean())


def _quickest(queries, keys, form) -> tuple[int, int]:
    """The fewest queries of a sequence that walks, and rows of a tile of the others'."""
    walks = queries >= np.array(TRIED)[:, None]
    walk = _walk_us(queries, keys, form, walks)
    spread = {rows: _spread_us(queries, keys, form, ~walks, rows) for rows in (64, 128)}
    _, least, rows = min((walk[i] + spread[rows][i], least, rows) for i, least in enumerate(TRIED) for rows in spread)
    return least, rows


def _walk_us(queries, keys, form, chosen) -> np.ndarray:
    """Tiles of 128 positions, a head each, each through all blocks before it; for each row of `chosen` sequences."""
    tiles = (keys - 1) // BLOCK - (keys - queries) // BLOCK + 1
    longest = (keys - 1) // BLOCK + 1
    blocks = tiles * longest - tiles * (tiles - 1) // 2
    shared = form.heads * (chosen @ (blocks * BLOCK_US[128] + tiles * JOB_US[128])) / PROGRAMS
    alone = (chosen * longest).max(1, initial=0) * BLOCK_US[128] + JOB_US[128]
    return np.where(chosen.any(1), SECOND_US + np.maximum(shared, alone), 0.0)


def _spread_us(queries, keys, form, chosen, rows) -> np.ndarray:
    """Tiles of so many rows, of a head of k each, a leaf at a time; for each row of `chosen` sequences."""
    tiles = -(-queries * form.group // rows) * form.kv_heads
    blocks, leaves = -(-keys // BLOCK), -(-keys // LEAF)
    shared = chosen @ (tiles * (blocks * BLOCK_US[rows] + leaves * JOB_US[rows])) / PROGRAMS
    longest = np.minimum((chosen * keys).max(1, initial=0), LEAF) // BLOCK
    alone = longest * BLOCK_US[rows] + JOB_US[rows]
    joined = chosen @ (queries * form.heads * leaves) * ROW_US
    return np.where(chosen.any(1), 2 * SECOND_US + np.maximum(shared, alone) + joined, 0.0)
