"""Which tile of rows, and which leaf of its keys, a program takes: tables that the host writes and kernels read."""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from .sequences import Sequences

FIELDS = 8  # numbers a line


@dataclass(frozen=True)
class Work:
    """Lines of FIELDS int32 numbers on the device.

    tiles   token, row, rows, first, length, place, newest, slot: rows row, row + 1, .. of the `rows` queries x heads
            (of one kv head) of the sequence whose first query is q[token], at position `first`; `length` keys; `place`
            is its row of the cache or of the table of pages; the tile's newest leaf; and where its partial results
            begin, one a leaf, the newest first
    oldest  int32, each tile's oldest leaf
    leaves  the same lines for each leaf of each tile, with the leaf in the place of `newest` and its own slot
    most    the most real rows of a tile
    real    how many tiles there are; `tiles` may hold empty ones behind them
    lines   the lines of leaves on the host, the longest first, and `seen`: how many keys each sees
    leaf    keys a leaf
    """

    tiles: torch.Tensor
    leaves: torch.Tensor | None
    slots: int
    most: int
    leaf: int
    real: int
    lines: np.ndarray
    seen: np.ndarray


def work_of(sequences: Sequences, rows: int, group: int, window: int, spread: bool, leaf: int,
            chosen: np.ndarray | None = None) -> Work:
    """The lines for tiles of `rows` rows, of `group` heads a query; with `spread` those of leaves too.

    chosen  (B,) bool: the sequences to do, by default all
    """
    lines, oldest = _tiles(sequences, rows, group, window, leaf, chosen)
    most = int(np.minimum(lines[:, 2] - lines[:, 1], rows).max(initial=0))
    counts = lines[:, 6] - oldest + 1
    if not spread:
        lines[:, 7] = oldest
        lines = lines[np.argsort(-counts, kind="stable")]  # the longest first
        return Work(sequences.put(_padded(lines)), None, 0, most, leaf, len(lines), lines, counts)
    lines[:, 7] = np.cumsum(counts) - counts
    every = np.repeat(lines, counts, axis=0)
    every[:, 7] = np.arange(len(every))
    every[:, 6] -= every[:, 7] - np.repeat(lines[:, 7], counts)
    seen = _keys(every, rows, group, leaf)
    order = np.argsort(-seen, kind="stable")
    every, seen = every[order], seen[order]
    return Work(sequences.put(_padded(lines)), sequences.put(_padded(every)), len(every), most, leaf, len(lines),
                every, seen)


def _tiles(sequences, rows, group, window, leaf, chosen) -> tuple[np.ndarray, np.ndarray]:
    queries, keys = sequences.queries, sequences.keys
    count = -(-queries * group // rows) * (1 if chosen is None else chosen)
    which = np.repeat(np.arange(len(queries)), count)
    row = (np.arange(len(which)) - np.repeat(np.cumsum(count) - count, count)) * rows
    total, first = queries[which] * group, keys[which] - queries[which]
    least, most = first + row // group, first + (np.minimum(row + rows, total) - 1) // group
    oldest = np.maximum(least - window + 1, 0) // leaf if window else np.zeros_like(least)
    lines = np.stack([sequences.starts[which], row, total, first, keys[which], sequences.place[which], most // leaf,
                      np.zeros_like(row)], axis=1)
    return lines, oldest


def _keys(every, rows, group, leaf) -> np.ndarray:
    """How many of its leaf's keys each line sees, up to its newest row."""
    newest = every[:, 3] + (np.minimum(every[:, 1] + rows, every[:, 2]) - 1) // group
    return np.minimum((every[:, 6] + 1) * leaf, newest + 1) - every[:, 6] * leaf


def _padded(lines: np.ndarray) -> np.ndarray:
    """Lines of no rows added, so that there are few different counts: a kernel is made ready for each."""
    step = max(1, 1 << max(len(lines), 1).bit_length() >> 5)
    empty = np.zeros((-len(lines) % step, FIELDS), dtype=np.int64)
    empty[:, 6], empty[:, 7] = -1, 0
    return np.concatenate([lines, empty])
