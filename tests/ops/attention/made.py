"""Sequences of attention's tests: their tensors, paged or not, with NaN and Inf wherever no key lies."""
import torch
from common import HERE, INF, NAN

from kernels.ops.attention import Sequences
from kernels.ops.attention.inputs import numbers


def one(keys, heads=2, kv_heads=1, width=64, dtype=torch.bfloat16, seed=0, device=HERE):
    """q, k and v (keys, heads, width) of one sequence, a query at each position."""
    return (numbers(keys, heads, width, dtype, device, seed, 7, -1),
            *(numbers(keys, kv_heads, width, dtype, device, seed + i, step) for i, step in ((1, 5), (2, 0))))


def cached(parts, lengths, capacity=0):
    """Contiguous (B, C, Hkv, D) of each sequence's keys or values, and behind them NaN and Inf in turn."""
    rows = max([capacity, *lengths])
    cache = parts[0].new_empty(len(parts), rows, *parts[0].shape[1:])
    cache[:, ::2], cache[:, 1::2] = NAN, INF
    for row, part, length in zip(cache, parts, lengths, strict=True):
        row[:length] = part[:length]
    return cache


def paged(parts, lengths, size, order):
    """(P, size, Hkv, D) and each sequence's pages, drawn from the page numbers `order`; NaN and Inf elsewhere."""
    free = iter(order)
    pages = [[next(free) for _ in range(-(-length // size))] for length in lengths]
    cache = parts[0].new_empty(len(order), size, *parts[0].shape[1:])
    cache[:, ::2], cache[:, 1::2] = NAN, INF
    for part, length, own in zip(parts, lengths, pages, strict=True):
        place = torch.arange(length)
        cache[torch.tensor(own, dtype=torch.int64)[place // size], place % size] = part[:length]
    return cache, pages


def batch(whole, spans, page_size=None, capacity=0, seed=0):
    """(q, k, v, sequences) of pieces of sequences: whole[i] is `one` of them, spans[i] its queries' (begin, end)."""
    q = torch.cat([w[0][a:b] for w, (a, b) in zip(whole, spans, strict=True)])
    lengths, queries = [b for _, b in spans], [b - a for a, b in spans]
    keys, values = ([w[i] for w in whole] for i in (1, 2))
    if page_size is None:
        return (q, cached(keys, lengths, capacity), cached(values, lengths, capacity),
                Sequences(queries, lengths, q.device))
    count = sum(-(-length // page_size) for length in lengths) + 2
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    k, pages = paged(keys, lengths, page_size, order)
    v, _ = paged(values, lengths, page_size, order)
    return q, k, v, Sequences(queries, lengths, q.device, pages, page_size)
