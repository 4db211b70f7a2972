"""Causal attention in float32 whose rows no batch changes, at a CPU's speed: every product has one fixed shape.

Keys form blocks of 128 by their positions, and a query takes its blocks from the oldest to the newest. Rows (a query's
heads that share a key's head) go through in tiles of 32 of one sequence, four tiles of any sequences at a time; the
last ones are padded. A block then does, with m = -inf, l = 0 and acc = 0 before the first,

    s = q @ k.T * (1 / sqrt(D)), -inf where a key is not seen;  t = max(m, max(s));  p = exp(s - t);  f = exp(m - t)
    l = l * f + sum(p);  acc = acc * f + p @ v;  m = t

and the result is acc / l + 0. A block that a query does not see changes nothing: f = 1 and p = 0.

The order inside a product, a sum of 128 and an exponential is the library's, the same for a row in any batch if its
place in a tile, and the tile's among the four, do not matter to the library: *certified by test, not by construction*.
"""
from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from ..ops.attention.sequences import Sequences
from .attend import Attend

BLOCK, ROWS, TILES = 128, 32, 4
_NONE = float("-inf")


def tiled(sequences: Sequences) -> Attend:
    """Attention of these sequences as this file says, rounded once to q's dtype."""
    made: dict[int, tuple[list[_Tiles], torch.Tensor]] = {}

    def attend(q, k, v):
        group, width = q.shape[1] // k.shape[2], q.shape[2]
        if group not in made:
            made[group] = _tiles(sequences, k.shape[1], group)
        tiles, place = made[group]
        rows = q.float().unflatten(1, (-1, group)).transpose(1, 2).flatten(0, 1)
        rows = F.pad(rows, (0, 0, 0, 0, 0, 1))  # a padded row reads zeros
        k, v = k.flatten(0, 1), v.flatten(0, 1)
        done = torch.cat([some.attended(rows, k, v) for some in tiles])[place]
        return done.unflatten(0, (-1, group)).transpose(1, 2).reshape(len(q), -1, width).to(q.dtype)
    return attend


@dataclass(frozen=True)
class _Tiles:
    """TILES tiles: which rows they have, their positions, and where in the cache the keys lie that they may see.

    rows      (TILES, ROWS) of q's rows, in the order of tokens, then of heads that share a key's head
    position  (TILES, 1, ROWS, 1)
    slots     (TILES, blocks * BLOCK), 0 behind the last key; `behind` says where
    """

    rows: torch.Tensor
    position: torch.Tensor
    slots: torch.Tensor
    behind: torch.Tensor

    def attended(self, rows, k, v):
        """rows (T, Hkv, D) -> (TILES * ROWS, Hkv, D)."""
        q = rows[self.rows].transpose(1, 2).contiguous()
        scale = 1.0 / math.sqrt(q.shape[3])
        m = torch.full(q.shape[:3], _NONE, dtype=torch.float32, device=q.device)
        total, acc = torch.zeros_like(m), torch.zeros_like(q)
        for begin in range(0, self.slots.shape[1], BLOCK):
            keys, values = (self._block(t, slice(begin, begin + BLOCK)) for t in (k, v))
            key = torch.arange(begin, begin + BLOCK, dtype=torch.int64, device=q.device)
            s = torch.where(key <= self.position, q @ keys.transpose(2, 3) * scale, _NONE)
            top = torch.maximum(m, s.amax(3))
            p, f = torch.exp(s - top[..., None]), torch.exp(m - top)
            total, acc, m = total * f + p.sum(3), acc * f[..., None] + p @ values, top
        return (acc / total[..., None] + 0.0).transpose(1, 2).flatten(0, 1)

    def _block(self, t, some: slice):
        """(TILES, Hkv, BLOCK, D): a block of keys or values, zeros behind the last one."""
        block = t[self.slots[:, some]].float().masked_fill_(self.behind[:, some, None, None], 0.0)
        return block.transpose(1, 2).contiguous()


def _tiles(sequences: Sequences, size: int, group: int) -> tuple[list[_Tiles], torch.Tensor]:
    """All tiles, those with as many blocks together, and where among their rows each row of q is."""
    counts = (sequences.queries * group).tolist()
    lines = [(i, first) for i, count in enumerate(counts) for first in range(0, count, ROWS)]
    which, first = np.array(lines, dtype=np.int64).reshape(-1, 2).T
    count = np.minimum(sequences.queries[which] * group - first, ROWS)
    before = sequences.keys[which] - sequences.queries[which]
    blocks = (before + (first + count - 1) // group) // BLOCK + 1
    tiles, place = [], np.empty(sequences.tokens * group, dtype=np.int64)
    chosen = np.argsort(blocks, kind="stable")
    for begin in range(0, len(chosen), TILES):
        some = chosen[begin : begin + TILES]
        row = first[some, None] + np.arange(ROWS)
        real = np.arange(ROWS) < count[some, None]
        token_row = np.where(real, sequences.starts[which[some], None] * group + row, sequences.tokens * group)
        position = np.where(real, before[some, None] + row // group, 0)
        place[token_row[real]] = begin * ROWS + np.flatnonzero(real)
        slots = _slots(sequences, which[some], size, int(blocks[some].max()) * BLOCK)
        tiles.append(_on(sequences.device, token_row, position, slots, sequences.tokens * group))
    return tiles, torch.from_numpy(place).to(sequences.device)


def _slots(sequences: Sequences, which, size: int, length: int) -> np.ndarray:
    """(tiles, length): where the first keys of each tile's sequence lie, -1 behind its last one."""
    at = np.arange(length)
    if sequences.table is None:
        slots = sequences.place[which, None] * np.int64(size) + at
    else:
        pages = sequences.table[which].astype(np.int64)
        slots = pages[:, np.minimum(at // size, pages.shape[1] - 1)] * size + at % size
    return np.where(at < sequences.keys[which, None], slots, -1)


def _on(device, rows, position, slots, nothing: int) -> _Tiles:
    """Padded to TILES tiles, on the device."""
    more = ((0, TILES - len(rows)), (0, 0))
    rows, position, slots = (np.pad(array, more, constant_values=value)
                             for array, value in ((rows, nothing), (position, 0), (slots, -1)))
    rows, position, slots = (torch.from_numpy(array).to(device) for array in (rows, position, slots))
    return _Tiles(rows, position[:, None, :, None], slots.clamp(min=0), slots < 0)
