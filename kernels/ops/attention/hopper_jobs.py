"""Which program of Hopper's attention kernel does which tile of which head, worked out on the host once a step.

A job is a tile of 128 positions of one sequence, for one head; it costs about as many blocks of keys as lie before it.
Jobs are dealt out in waves, one to each program: the longest first, and in each wave the longest to the program that
has least to do. Heads that share keys are neighbours. No bit depends on it.
"""
from __future__ import annotations

import numpy as np

from .sequences import Sequences

TILE = 128  # positions a tile
FIXED = 1.5  # what a job costs besides its blocks, in blocks


def jobs(sequences: Sequences, heads: int, programs: int, chosen: np.ndarray | None = None) -> np.ndarray:
    """(waves, programs, 4) int32: a line is what a program does in a wave.

    chosen  (B,) bool: the sequences to do, by default all

    The four numbers: the row of q where the tile's first position would be (it may be negative: positions before a
    sequence's first query are not its own), the place of its keys, the tile or -1 for no job, and packed the head (16
    bits), the first row of the tile with a query (8 bits) and the last one (8 bits). A program's jobs have no gaps.
    """
    tiles = _tiles(sequences, chosen)
    table = np.repeat(tiles, heads, axis=0)
    table[:, 3] |= np.tile(np.arange(heads), len(tiles))
    return deal(table, table[:, 2] + 1, programs, np.array([0, 0, -1, 0]))


def _tiles(sequences, chosen) -> np.ndarray:
    """One line a tile of every sequence, for head 0, the longest first."""
    queries, keys, start, place = sequences.queries, sequences.keys, sequences.starts, sequences.place
    before = keys - queries
    low = before // TILE
    done = queries > 0 if chosen is None else chosen & (queries > 0)
    count = np.where(done, (keys - 1) // TILE - low + 1, 0)
    which = np.repeat(np.arange(len(queries)), count)
    tile = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count) + low[which]
    first = np.maximum(before[which] - TILE * tile, 0)
    last = np.minimum(keys[which] - TILE * tile, TILE) - 1
    lines = np.stack([(start - before)[which] + TILE * tile, place[which], tile, first << 16 | last << 24], axis=1)
    return lines[np.argsort(-tile, kind="stable")]


def deal(lines: np.ndarray, cost: np.ndarray, programs: int, empty: np.ndarray) -> np.ndarray:
    """Jobs, the longest first -> (waves, programs, ..) int32, `empty` where a program has none.

    In each wave the longest job goes to the program that has least to do; one that would have more than any has so far
    waits for the next, as long as another can take it.
    """
    load = np.zeros(programs, dtype=np.float64)
    waves, done = [], 0  # of each wave, the number of each program's job
    while done < len(lines):
        fit = np.count_nonzero(load + cost[done] + FIXED <= load.max() + 1e-9)
        some = slice(done, done + (fit or programs))
        who = np.argsort(load, kind="stable")[: len(lines[some])]
        waves.append(np.full(programs, len(lines)))
        waves[-1][who] = np.arange(len(lines))[some]
        load[who] += cost[some] + FIXED
        done += len(who)
    number = _padded(_without_gaps(np.array(waves).reshape(-1, programs), len(lines)), len(lines))
    return np.concatenate([lines, empty[None]]).astype(np.int32)[number]


def short_between(table: np.ndarray, cost: np.ndarray) -> np.ndarray:
    """Each program's jobs in another order: those of at most a quarter of the longest's cost lie evenly between others.

    table, cost  (waves, programs, ..) and (waves, programs): 0 for none
    Memory is busy while long ones run and idle while short ones do: side by side each hides the other.
    """
    there, short = cost > 0, (cost > 0) & (cost <= cost.max(initial=0) / 4)
    long = there & ~short
    room = long.sum(0) / np.maximum(short.sum(0), 1)
    at = np.where(short, np.cumsum(short, axis=0) * room - room / 2 - 0.75, np.cumsum(long, axis=0) - 1)
    order = np.argsort(np.where(there, at, np.inf), axis=0, kind="stable")
    return np.take_along_axis(table, order[:, :, None], 0)


def _without_gaps(number: np.ndarray, none: int) -> np.ndarray:
    """Each program's jobs moved to the front, in their order; one wave at least."""
    there = number != none
    number = np.take_along_axis(number, np.argsort(~there, axis=0, kind="stable"), 0)
    return number[: there.sum(0).max(initial=0)] if there.any() else np.full((1, number.shape[1]), none)


def _padded(number: np.ndarray, none: int) -> np.ndarray:
    """Empty waves added, so that there are few different counts: code is made ready for each."""
    step = max(1, 1 << len(number).bit_length() >> 3)
    return np.concatenate([number, np.full((-len(number) % step, number.shape[1]), none)])
