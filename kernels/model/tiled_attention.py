"""Causal attention in float32 whose rows no batch changes, at a CPU's speed: every product has one fixed shape.

Keys form blocks of 128 by their positions, and a query takes its blocks from the oldest to the newest; rows (a query's
heads that share a key's head) go through in tiles of 128, the last one padded. A block then does, with m = -inf,
l = 0 and acc = 0 before the first,

    s = q @ k.T * (1 / sqrt(D)), -inf where a key is not seen;  t = max(m, max(s));  p = exp(s - t);  f = exp(m - t)
    l = l * f + sum(p);  acc = acc * f + p @ v;  m = t

and the result is acc / l + 0. A block that a query does not see changes nothing: f = 1 and p = 0.

The order inside a product, a sum of 128 and an exponential is the library's, the same for a row in any batch if its
place in a tile does not matter to the library: *certified by test, not by construction*.
"""
from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from ..ops.attention.sequences import Sequences
from .attend import Attend

BLOCK, ROWS = 128, 128
_NONE = float("-inf")


def tiled(sequences: Sequences) -> Attend:
    """Attention of these sequences as this file says, rounded once to q's dtype."""
    def attend(q, k, v):
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        for i, (start, count) in enumerate(zip(sequences.starts.tolist(), sequences.queries.tolist(), strict=True)):
            keys, values = (sequences.keys_of(i, cache).float().transpose(0, 1) for cache in (k, v))
            out[start : start + count] = _one(q[start : start + count].float(), keys, values)
        return out
    return attend


def _one(q, k, v):
    """One sequence: q (n, H, D), k and v (Hkv, keys, D) float32 -> (n, H, D)."""
    count, heads, width = q.shape
    group, first = heads // len(k), k.shape[1] - count
    rows = q.view(count, len(k), group, width).transpose(0, 1).reshape(len(k), count * group, width)
    position = first + torch.arange(count * group, dtype=torch.int64, device=q.device) // group
    parts = [_tile(tile, at, k, v) for tile, at in zip(rows.split(ROWS, 1), position.split(ROWS), strict=True)]
    return torch.cat(parts, 1).view(len(k), count, group, width).transpose(0, 1).reshape(count, heads, width)


def _tile(q, position, k, v):
    """Up to ROWS rows of each key's head: q (Hkv, R, D), their positions ascending -> (Hkv, R, D)."""
    real, scale = q.shape[1], 1.0 / math.sqrt(q.shape[2])
    q, position = F.pad(q, (0, 0, 0, ROWS - real)), F.pad(position, (0, ROWS - real))
    m = torch.full(q.shape[:2], _NONE, dtype=torch.float32, device=q.device)
    total, acc = torch.zeros_like(m), torch.zeros_like(q)
    for begin in range(0, int(position[real - 1]) + 1, BLOCK):
        keys, values = (_block(t, begin) for t in (k, v))
        key = torch.arange(begin, begin + BLOCK, dtype=torch.int64, device=q.device)
        s = torch.where(key <= position[:, None], q @ keys.transpose(1, 2) * scale, _NONE)
        top = torch.maximum(m, s.amax(2))
        p, f = torch.exp(s - top[..., None]), torch.exp(m - top)
        total, acc, m = total * f + p.sum(2), acc * f[..., None] + p @ values, top
    return (acc / total[..., None] + 0.0)[:, :real]


def _block(t, begin: int):
    """A block of keys or values, zeros behind the last one."""
    block = t[:, begin : begin + BLOCK]
    return F.pad(block, (0, 0, 0, BLOCK - block.shape[1])).contiguous()
