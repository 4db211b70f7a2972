"""Which program of Hopper's attention kernel does which tile of which head, worked out on the host once a step.

A job is a tile of 128 positions of one sequence, for one head; it costs about as many blocks of keys as lie before it.
Jobs are dealt out in waves, one to each program: the longest first, and in each wave the longest to the program that
has least to do. Heads that share keys are neighbours. No bit depends on it.
"""
from __future__ import annotations

import numpy as np

TILE = 128  # positions a tile
FIXED = 1.5  # what a job costs besides its blocks, in blocks


def jobs(queries: np.ndarray, keys: np.ndarray, place: np.ndarray, heads: int, programs: int) -> np.ndarray:
    """(waves, programs, 4) int32: a line is what a program does in a wave.

    queries, keys  how many each sequence has; the queries are at its last positions
    place          which row of k each sequence is

    The four numbers: the row of q where the tile's first position would be (it may be negative: positions before a
    sequence's first query are not its own), the place of its keys, the tile or -1 for no job, and packed the head (16
    bits), the first row of the tile with a query (8 bits) and the last one (8 bits). A program's jobs have no gaps.
    """
    tiles = _tiles(queries, keys, place)
    table = np.repeat(tiles, heads, axis=0)
    table[:, 3] |= np.tile(np.arange(heads), len(tiles))
    return _deal(table.astype(np.int32), programs)


def _tiles(queries, keys, place) -> np.ndarray:
    """One line a tile of every sequence, for head 0, the longest first."""
    before = keys - queries
    low = before // TILE
    count = np.where(queries > 0, (keys - 1) // TILE - low + 1, 0)
    which = np.repeat(np.arange(len(queries)), count)
    tile = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count) + low[which]
    start = np.cumsum(queries) - queries
    first = np.maximum(before[which] - TILE * tile, 0)
    last = np.minimum(keys[which] - TILE * tile, TILE) - 1
    lines = np.stack([(start - before)[which] + TILE * tile, place[which], tile, first << 16 | last << 24], axis=1)
    return lines[np.argsort(-tile, kind="stable")]


def _deal(table: np.ndarray, programs: int) -> np.ndarray:
    """Jobs, the longest first -> (waves, programs, 4)."""
    waves = _padded(max(-(-len(table) // programs), 1))
    dealt = np.zeros((waves, programs, 4), dtype=np.int32)
    dealt[:, :, 2] = -1
    load = np.zeros(programs, dtype=np.float64)
    for wave in range(-(-len(table) // programs)):
        some = table[wave * programs : (wave + 1) * programs]
        who = np.argsort(load, kind="stable")[: len(some)]
        dealt[wave, who] = some
        load[who] += some[:, 2] + 1 + FIXED
    return dealt


def _padded(waves: int) -> int:
    """Empty waves added, so that there are few different counts: code is made ready for each."""
    step = max(1, 1 << waves.bit_length() >> 3)
    return -(-waves // step) * step
