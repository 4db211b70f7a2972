"""Attention as PyTorch and other libraries do it, to be measured beside ours; none promises the order of its sums."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial, wraps

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...runtime import Unavailable
from . import order
from .schedule import Schedule
from .sequences import Sequences

BACKENDS = {"sdpa_flash": SDPBackend.FLASH_ATTENTION, "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
            "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION}


def sdpa(q, k, v, sequences: Sequences, window: int = 0, lse: bool = False, backend: SDPBackend | None = None):
    """The default: scaled_dot_product_attention, called as well as PyTorch allows. It has no lse: Unavailable.

    Sequences of one length are one call, without an explicit mask where none is needed; one query each on keys of
    many lengths is one call with a mask; of others, neighbours of one length are a call. Pages are gathered first.
    """
    order.check(q, k, v, sequences, window, lse)
    if lse:
        raise Unavailable("scaled_dot_product_attention does not return lse: call it with lse=False")
    queries, keys = set(sequences.queries.tolist()), set(sequences.keys.tolist())
    with sdpa_kernel(backend) if backend else nullcontext():
        if not sequences.tokens or keys == {0}:
            return torch.zeros_like(q)
        if len(queries) == len(keys) == 1 and sequences.pages is None:
            return _together(q, _slots(sequences, k), _slots(sequences, v), queries.pop(), keys.pop(), window)
        if queries == {1} and sequences.pages is None:
            return _padded(q, _slots(sequences, k), _slots(sequences, v), sequences, window)
        table = None if sequences.pages is None else sequences.put(sequences.table)
        parts = [_together(q[begin:end], _lying(k, place, table, most), _lying(v, place, table, most), count, most,
                           window) for begin, end, place, count, most in _alike(sequences)]
        return torch.cat(parts) if len(parts) > 1 else parts[0]


def _alike(sequences) -> Iterator[tuple[int, int, slice, int, int]]:
    """Neighbours with as many queries and keys, and their rows of k side by side: (first query, the one behind the
    last, rows of k or of the table of pages, queries and keys of each)."""
    some = np.flatnonzero(sequences.queries)
    queries, keys, ends = sequences.queries[some], sequences.keys[some], (sequences.starts + sequences.queries)[some]
    place = some if sequences.pages is not None else sequences.place[some]
    breaks = (np.diff(queries) != 0) | (np.diff(keys) != 0) | (np.diff(place) != 1)
    for run in np.split(np.arange(len(some)), np.flatnonzero(breaks) + 1):
        first, last = run[0], run[-1]
        yield (int(ends[first] - queries[first]), int(ends[last]), slice(int(place[first]), int(place[last]) + 1),
               int(queries[first]), int(keys[first]))


def _lying(cache, place: slice, table, keys: int):
    """Some rows of a cache, or with a table what lies in these rows' pages: (rows, at least `keys`, Hkv, D)."""
    return cache[place] if table is None else cache[table[place, : -(-keys // cache.shape[1])]].flatten(1, 2)


def _slots(sequences, cache):
    """The rows of a cache that sequences have, without a copy where they are its own."""
    same = len(cache) == len(sequences) and np.array_equal(sequences.place, np.arange(len(sequences)))
    return cache if same else cache[torch.from_numpy(sequences.place.astype(np.int64)).to(cache.device)]


def _together(q, k, v, queries: int, keys: int, window: int):
    """Sequences of one length: q (B * queries, H, D), k and v (B, at least `keys`, Hkv, D)."""
    from torch.nn.attention.bias import causal_lower_right  # takes seconds to import

    mask, causal = None, False
    if window and window < keys:
        mask = _mask(torch.arange(keys - queries, keys, dtype=torch.int64, device=q.device), keys, window)
    elif queries == keys > 1:
        causal = True
    elif queries > 1:
        mask = causal_lower_right(queries, keys)
    return _call(q.unflatten(0, (-1, queries)), k[:, :keys], v[:, :keys], mask, causal)


def _padded(q, k, v, sequences, window):
    """One query each: a row of the mask hides what lies behind a sequence's keys."""
    position = sequences.put(sequences.keys - 1).long()
    mask = _mask(position, sequences.longest, window)[:, None, None, :]
    return _call(q[:, None], k[:, : sequences.longest], v[:, : sequences.longest], mask, False)


def _mask(position, keys: int, window: int):
    key = torch.arange(keys, dtype=torch.int64, device=position.device)
    seen = key <= position[:, None]
    return seen & (key > position[:, None] - window) if window else seen


def _call(q, k, v, mask, causal):
    """q (B, n, H, D), k and v (B, m, Hkv, D) -> (B * n, H, D)."""
    y = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), attn_mask=mask, is_causal=causal,
                                       enable_gqa=q.shape[2] != k.shape[2])
    return y.transpose(1, 2).flatten(0, 1)


FROZEN = Schedule("walk", 128, 8, 2)


def extras(call) -> dict[str, Callable]:
    """Contenders by name: one schedule for all calls, each of SDPA's backends, and FlashAttention-3."""
    def frozen(q, k, v, sequences, window=0, lse=False):
        """Batch invariance as it is usually had: one schedule, one program for all of a row's keys."""
        return call.run_schedule(FROZEN, q, k, v, sequences, window, lse)

    backends = {name: partial(sdpa, backend=backend) for name, backend in BACKENDS.items()}
    return {"frozen": frozen, **backends, "flash_attention_3": _told_of_pages(flash_attention_3)}


def _told_of_pages(function: Callable) -> Callable:
    """`function`, which says in words of ours if its build takes no keys in pages: that is known from a call alone."""
    @wraps(function)
    def call(*given, **named):
        try:
            return function(*given, **named)
        except RuntimeError as error:
            if "not support paged KV" not in str(error):
                raise
        raise Unavailable(f"{function.__name__}: this build of the package takes no keys in pages")
    return call


def flash_attention_3(q, k, v, sequences: Sequences, window: int = 0, lse: bool = False):
    """FlashAttention-3 (package fa3-fwd) with splits of its own choice, one launch for sequences of any lengths.

    Raises Unavailable with a window or lse, and where the package is not installed or does not run.
    """
    try:
        from fa3_fwd_interface import flash_attn_func, flash_attn_with_kvcache
    except (ImportError, RuntimeError, OSError) as error:
        raise Unavailable(f"flash_attention_3: {error}") from None
    order.check(q, k, v, sequences, window, lse)
    queries, keys = set(sequences.queries.tolist()), set(sequences.keys.tolist())
    if lse or window:
        raise Unavailable("flash_attention_3 is called without window and lse")
    if sequences.pages is None and len(queries) == len(keys) == 1:
        k, v = (_slots(sequences, cache)[:, : max(keys)] for cache in (k, v))
        return flash_attn_func(q.unflatten(0, (-1, max(queries))), k, v, causal=True, num_splits=0).flatten(0, 1)
    where = {"cache_batch_idx": sequences.put(sequences.place)} if sequences.pages is None else \
        {"page_table": sequences.put(sequences.table)}
    return flash_attn_with_kvcache(
        q, k, v, cache_seqlens=sequences.put(sequences.keys), max_seqlen_q=max(queries, default=0), causal=True,
        cu_seqlens_q=sequences.put(np.append(sequences.starts, sequences.tokens)), num_splits=0, **where)
