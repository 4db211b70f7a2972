"""Attention's specification for a batch of decode steps on a CPU: the order of ops/attention/order.py, to the bit.

There a sequence with one query is some hundred operations on a handful of numbers. Here up to four such sequences
share them: a chain is computed of all their queries and all their keys, and each query keeps those of its own
sequence. That wastes products and saves calls. Blocks and leaves behind a sequence's last key are zeros that nobody
sees, and change no bit, as order.py says. Sequences with more queries go to the specification as it is.
"""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from ..arithmetic.elementary import fma
from ..arithmetic.ex2 import ex2
from ..arithmetic.tensor_core import chain
from ..ops.attention.op import attention_prefill
from ..ops.attention.order import BLOCK, LEAF, lane_sums, scale_of
from ..ops.attention.sequences import Sequences
from .attend import Attend
from .threads import on_cores

FEW, TOGETHER = 8, 4  # rows of a sequence (queries x heads that share a key's head); sequences
STEP = 16  # products of a chain's step: more zeros would only take time
_NONE = float("-inf")


def specified(sequences: Sequences) -> Attend:
    """Attention of these sequences with the bits of attention_prefill.python."""
    made: dict[int, tuple] = {}

    def attend(q, k, v):
        group = q.shape[1] // k.shape[2]
        if group not in made:
            made[group] = _shares(sequences, group)
        others, tokens, few = made[group]
        if not few:
            return attention_prefill.python(q, k, v, sequences)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        if len(tokens):
            out[tokens] = attention_prefill.python(q[tokens], k, v, others)
        on_cores(lambda some: some.into(out, q, k, v), few)
        return out
    return attend


def _shares(sequences: Sequences, group: int) -> tuple[Sequences, torch.Tensor, list[_Together]]:
    """The sequences with many rows and their tokens, and those with few, as long ones and of as many queries."""
    small = (sequences.queries * group <= FEW) & (sequences.queries > 0)
    many, tokens = np.flatnonzero(~small), np.repeat(~small, sequences.queries)
    pages = None if sequences.pages is None else [sequences.pages[i] for i in many]
    others = Sequences(sequences.queries[many], sequences.keys[many], sequences.device, pages, sequences.page_size,
                       sequences.place[many] if pages is None else None)
    order = sorted(np.flatnonzero(small).tolist(), key=lambda i: (sequences.queries[i], sequences.keys[i]))
    few = []
    for i in order:
        if few and len(few[-1]) < TOGETHER and sequences.queries[few[-1][0]] == sequences.queries[i]:
            few[-1].append(i)
        else:
            few.append([i])
    return others, torch.from_numpy(np.flatnonzero(tokens)), [_Together(sequences, rows) for rows in few]


@dataclass(frozen=True)
class _Together:
    """Sequences with as many queries each that share their chains."""

    sequences: Sequences
    rows: list[int]

    def into(self, out, q, k, v) -> None:
        """Write their results into out (T, H, D)."""
        s, keys = self.sequences, self.sequences.keys[self.rows]
        count, group = int(s.queries[self.rows[0]]), q.shape[1] // k.shape[2]
        tokens = torch.from_numpy((s.starts[self.rows, None] + np.arange(count)).flatten())
        first = torch.from_numpy(keys - count)[:, None] + torch.arange(count * group, dtype=torch.int64,
                                                                       device="cpu") // group
        length = -(-int(keys.max()) // STEP) * STEP
        keys, values = (torch.stack([F.pad(part, (0, 0, 0, 0, 0, length - len(part)))
                                     for part in (s.keys_of(i, cache) for i in self.rows)]) for cache in (k, v))
        for head in range(k.shape[2]):
            heads = slice(head * group, head * group + group)
            some = q[tokens, heads].unflatten(0, (-1, count)).flatten(1, 2)
            y = _attended(some, keys[:, :, head], values[:, :, head], first)
            out[tokens, heads] = y.unflatten(1, (count, group)).flatten(0, 1)


def _attended(q, k, v, position):
    """q (S, R, D), k and v (S, keys, D), position (S, R) -> (S, R, D)."""
    top = torch.full(q.shape[:2], _NONE, dtype=torch.float32, device=q.device)
    total, acc = torch.zeros_like(top), torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    for begin in reversed(range(0, k.shape[1], LEAF)):
        leaf = slice(begin, begin + LEAF)
        m, part, values = _leaf(q, k[:, leaf], v[:, leaf], position - begin)
        new = torch.maximum(top, m)
        safe = torch.where(new == _NONE, 0.0, new)
        a, c = ex2(top - safe), ex2(m - safe)
        sees = position >= begin
        total = torch.where(sees, fma(total, a, part * c), total)
        acc = torch.where(sees[..., None], fma(acc, a[..., None].expand_as(acc), values * c[..., None]), acc)
        top = torch.where(sees, new, top)
    return (acc * (1.0 / total)[..., None]).to(q.dtype)


def _leaf(q, k, v, position):
    """(m, l, acc) of one leaf's keys, positions counted from its first."""
    s = _own(chain(k.flatten(0, 1), q.flatten(0, 1)).t(), len(q))
    key = torch.arange(s.shape[2], dtype=torch.int64, device=q.device)
    s = torch.where(key <= position[..., None], s, _NONE)
    s = F.pad(s, (0, -s.shape[2] % BLOCK), value=_NONE).unflatten(2, (-1, BLOCK))
    top = torch.cummax((s.amax(3) * scale_of(q.shape[2])).flip(2), 2)[0].flip(2)
    before, safe = F.pad(top[..., 1:], (0, 1), value=_NONE), torch.where(top == _NONE, 0.0, top)
    p, f = ex2(fma(s, scale_of(q.shape[2]), -safe[..., None])), ex2(before - safe)
    lanes, weights, acc = lane_sums(p), p.to(q.dtype), torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    sums = torch.zeros_like(lanes[:, :, 0])
    for b in reversed(range(p.shape[2])):
        sums = fma(sums, f[:, :, b, None].expand_as(sums), lanes[:, :, b])
        values = v[:, b * BLOCK : (b + 1) * BLOCK].transpose(1, 2).flatten(0, 1)
        start = (acc * f[:, :, b, None]).flatten(0, 1).repeat(1, len(q))
        acc = _own(chain(weights[:, :, b, : values.shape[1]].flatten(0, 1), values, start=start), len(q))
    return top[..., 0], (sums[..., 0] + sums[..., 1]) + (sums[..., 2] + sums[..., 3]), acc


def _own(every, count: int):
    """(S * R, S * n) -> (S, R, n): what each of `count` sequences' rows has of its own sequence."""
    return every.unflatten(0, (count, -1)).unflatten(2, (count, -1)).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
