"""Attention as a forward calls it: `prepare(sequences)` once, then attend(q, k, v) in each layer.

q is (T, heads, head_dim); k and v are the cache's (requests, capacity, kv_heads, head_dim), in any strides, or, where
the sequences have pages, (pages, page_size, kv_heads, head_dim).
`default` is PyTorch's; `tiled`, in tiled_attention.py, adds in an order that no batch changes, in float32 on a CPU.
"""
from __future__ import annotations

import inspect
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

    One query each on keys of several lengths is one call, whose mask hides what lies behind a sequence's keys. Keys in
    pages are gathered first; on a GPU varlen_attn reads them where they lie, in one call without a mask, if it can.
    """
    calls, varlen = _calls(sequences), _varlen(sequences) if _reads_pages(sequences) else None

    def attend(q, k, v):
        if varlen is not None and q.dtype != torch.float32:
            return varlen(q, k, v)
        parts = [call(q, k, v) for call in calls]
        return parts[0] if len(parts) == 1 else torch.cat(parts)
    return attend


@dataclass(frozen=True)
class _Call:
    """One call: which tokens of q, which rows of the cache, how many queries and keys each, and what they see.

    rows are (n,) of a cache of requests, or (n, pages) of a cache of pages.
    """

    tokens: slice
    rows: slice | torch.Tensor
    queries: int
    keys: int
    mask: torch.Tensor | None = None

    def __call__(self, q, k, v):
        q, k, v = q[self.tokens], *(self._seen(t).transpose(1, 2) for t in (k, v))
        if self.queries == 1 and self.mask is not None:  # heads that share keys as queries: fewer kernels take both
            q = q.unflatten(1, (k.shape[1], -1))
            return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask).flatten(1, 2)
        q = q.unflatten(0, (-1, self.queries)).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, is_causal=self.queries == self.keys > 1,
                                           enable_gqa=q.shape[1] != k.shape[1])
        return y.transpose(1, 2).flatten(0, 1)

    def _seen(self, cache):
        """(n, keys, kv_heads, head_dim)."""
        if isinstance(self.rows, slice) or self.rows.dim() == 1:
            return cache[self.rows, : self.keys]
        return cache[self.rows].flatten(1, 2)[:, : self.keys]


def _calls(sequences: Sequences) -> list[_Call]:
    queries, keys = sequences.queries.tolist(), sequences.keys.tolist()
    calls, first = [], 0
    for count, run in groupby(zip(queries, keys, strict=True), lambda pair: 1 if pair[0] == 1 else pair):
        lengths = [length for _, length in run]
        last, longest = first + len(lengths), max(lengths)
        size = 1 if count == 1 else count[0]
        begin = int(sequences.starts[first])
        mask = _up_to(sequences, first, last, longest) if len(set(lengths)) > 1 else \
            _mask(size, longest, sequences.device)
        calls.append(_Call(slice(begin, begin + size * len(lengths)), _rows(sequences, first, last, longest), size,
                           longest, mask))
        first = last
    return calls


def _rows(sequences: Sequences, first: int, last: int, longest: int) -> slice | torch.Tensor:
    """The rows of the cache that some sequences have: a slice, which copies nothing, where they are neighbours."""
    if sequences.table is not None:
        return sequences.put(sequences.table[first:last, : -(-longest // sequences.page_size)]).long()
    rows = sequences.place[first:last]
    if np.array_equal(rows, rows[0] + np.arange(len(rows))):
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return sequences.put(rows).long()


def _up_to(sequences: Sequences, first: int, last: int, longest: int):
    """One query each: the keys up to its own, of those in the longest sequence."""
    position = sequences.put(sequences.keys[first:last] - 1)[:, None, None, None]
    return torch.arange(longest, dtype=torch.int32, device=position.device) <= position


def _mask(queries: int, keys: int, device):
    """None where every query sees all keys, or is_causal says which; else each sees the keys up to its own."""
    if queries in (1, keys):
        return None
    if device.type == "cuda":
        from torch.nn.attention.bias import causal_lower_right  # takes seconds to import

        return causal_lower_right(queries, keys)
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def _reads_pages(sequences: Sequences) -> bool:
    """Whether PyTorch's varlen_attn takes pages, and these: of a multiple of 256 tokens, as FlashAttention-2 asks."""
    if sequences.device.type != "cuda" or sequences.pages is None or sequences.page_size % 256:
        return False
    return "block_table" in inspect.signature(_varlen_attn()).parameters


def _varlen_attn():
    from torch.nn.attention.varlen import varlen_attn  # takes seconds to import, and torch 2.9 has none

    return varlen_attn


def _varlen(sequences: Sequences) -> Attend:
    """One call for any mix of queries; the last of a sequence's queries sees all of its keys."""
    ends, keys = (sequences.put(array) for array in (np.append(sequences.starts, sequences.tokens), sequences.keys))
    table, most, call = sequences.put(sequences.table), int(sequences.queries.max()), _varlen_attn()

    def attend(q, k, v):
        return call(q, k, v, ends, None, most, sequences.longest, window_size=(-1, 0), seqused_k=keys,
                    block_table=table, enable_gqa=q.shape[1] != k.shape[2])
    return attend
