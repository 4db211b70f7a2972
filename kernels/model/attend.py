"""Attention as a forward calls it: `prepare(sequences)` once, then attend(q, k, v) in each layer.

q is (T, heads, head_dim); k and v are the cache's (requests, capacity, kv_heads, head_dim), in any strides.
`default` is PyTorch's; `tiled`, in tiled_attention.py, adds in an order that no batch changes, in float32 on a CPU.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
import torch.nn.functional as F

from ..ops.attention.sequences import Sequences

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def default(sequences: Sequences) -> Attend:
    """PyTorch's scaled_dot_product_attention: a call for neighbours of one length, and a mask only where it is needed.

    One query each on keys of several lengths is one call, whose mask hides what lies behind a sequence's keys.
    """
    calls = _calls(sequences)

    def attend(q, k, v):
        parts = [call(q, k, v) for call in calls]
        return parts[0] if len(parts) == 1 else torch.cat(parts)
    return attend


@dataclass(frozen=True)
class _Call:
    """One call: which tokens of q, which rows of the cache, how many queries and keys each, and what they see."""

    tokens: slice
    rows: slice | torch.Tensor
    queries: int
    keys: int
    mask: torch.Tensor | None = None

    def __call__(self, q, k, v):
        q, k, v = q[self.tokens], *(t[self.rows, : self.keys].transpose(1, 2) for t in (k, v))
        if self.queries == 1 and self.mask is not None:  # heads that share keys as queries: fewer kernels take both
            q = q.unflatten(1, (k.shape[1], -1))
            return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask).flatten(1, 2)
        q = q.unflatten(0, (-1, self.queries)).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, is_causal=self.queries == self.keys > 1,
                                           enable_gqa=q.shape[1] != k.shape[1])
        return y.transpose(1, 2).flatten(0, 1)


def _calls(sequences: Sequences) -> list[_Call]:
    queries, keys = sequences.queries.tolist(), sequences.keys.tolist()
    everything = slice(0, sequences.tokens)
    if set(queries) == {1} and len(set(keys)) > 1:
        position = sequences.put(sequences.keys - 1)[:, None, None, None]
        mask = torch.arange(sequences.longest, dtype=torch.int32, device=position.device) <= position
        return [_Call(everything, _rows(sequences, 0, len(keys)), 1, sequences.longest, mask)]
    calls, first = [], 0
    for (count, length), run in groupby(zip(queries, keys, strict=True)):
        last = first + len(list(run))
        begin = int(sequences.starts[first])
        calls.append(_Call(slice(begin, begin + count * (last - first)), _rows(sequences, first, last), count, length,
                           _mask(count, length, sequences.device)))
        first = last
    return calls


def _rows(sequences: Sequences, first: int, last: int) -> slice | torch.Tensor:
    """The rows of the cache that some sequences have: a slice, which copies nothing, where they are neighbours."""
    rows = sequences.place[first:last]
    if np.array_equal(rows, rows[0] + np.arange(len(rows))):
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return sequences.put(rows).long()


def _mask(queries: int, keys: int, device):
    """None where every query sees all keys, or is_causal says which; else each sees the keys up to its own."""
    if queries in (1, keys):
        return None
    if device.type == "cuda":
        from torch.nn.attention.bias import causal_lower_right  # takes seconds to import

        return causal_lower_right(queries, keys)
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
