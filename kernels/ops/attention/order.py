"""The order of causal attention, for one query of one head, and the specification that carries it out.

The query is at position i of its sequence and sees the keys j <= i; with a window w > 0, those with i - w < j <= i.
Every number is float32 unless said otherwise, every operation is rounded once, fma(a, b, c) is a * b + c rounded once.
D is the length of a key, scale = log2(e) / sqrt(D), rounded to float32.

Keys form blocks of 128 and leaves of 1024, by their positions: block b has 128 b to 128 b + 127. Leaves, and blocks in
a leaf, are taken from the newest to the oldest. A leaf begins with m = -inf, four sums l[0] to l[3] and D numbers acc,
all 0. A block then does

    1. s[j] = q . k[j], a chain over D as the tensor core adds (arithmetic/tensor_core.py), from 0; -inf if j is unseen
    2. t = max(m, max(s) * scale)
    3. p[j] = ex2(fma(s[j], scale, -t)) and f = ex2(m - t), ex2 as in arithmetic/ex2.py. Where t = -inf, 0 stands for it
    4. l[c] = fma(l[c], f, b[c]), where b[c] is the sum of lane c: of p[8 n + 2 c] and p[8 n + 2 c + 1], n = 0 to 15.
       n and n + 8 are added, then n and n + 4, n and n + 2, n and n + 1, both neighbours apart; last the neighbours
    5. acc = the chain over the block's 128 keys of p, rounded to q's dtype, and v, which begins at acc * f
    6. m = t

and the leaf ends with l = (l[0] + l[1]) + (l[2] + l[3]). Leaves that the query sees join M = -inf, L = 0 and A = 0:

    T = max(M, m), a = ex2(M - T), c = ex2(m - T), where 0 stands for a T of -inf
    L = fma(L, a, l * c),  A = fma(A, a, acc * c),  M = T

The result is A * (1 / L), rounded to q's dtype; 0 where M is -inf. lse = fma(M, ln 2, log(L)), the natural logarithm of
the sum of exp(q . k / sqrt(D)), log as in arithmetic/elementary.py; -inf where M is.

Why a batch cannot change it: every operation names one query, its position, and the keys that it sees. A block that it
does not see would change no bit: t = m, f = 1, and 0 is added (a chain has no -0). So a decode of one query, a prefill
of thousands and any chunk between have the same bits, wherever their keys lie.

What is not a number: a score that is NaN or +inf makes its row NaN. Values that a query may see must be finite, and so
must those between them in a block, for 0 x inf is NaN. Anything may lie behind a sequence's last key, and elsewhere.
Scores beyond 2**24 lose their meaning: t is rounded, fma(s, scale, -t) is not.

Method: Milakov and Gimelshein, Online normalizer calculation for softmax, arXiv 1805.02867; Dao, FlashAttention-2,
arXiv 2307.08691; leaves that join in one order, and lanes, are ours.
"""
from __future__ import annotations

import math
from ctypes import c_float

import torch

from ...arithmetic.elementary import LN2, fma, log
from ...arithmetic.ex2 import ex2
from ...arithmetic.tensor_core import HOPPER, Adder, chain
from ...call import check_tensors, refuse_dual
from .sequences import Sequences

BLOCK, LEAF = 128, 1024  # keys
WIDEST = 128  # D
_ROWS = 256  # queries x heads at once: chains like many, masked ones are wasted
_NONE = float("-inf")


def scale_of(width: int) -> float:
    """log2(e) / sqrt(D), rounded to float32."""
    return c_float(1.4426950408889634 / math.sqrt(width)).value


def check(q, k, v, sequences, window=0, lse=False) -> None:
    """Raise TypeError or ValueError for arguments that are no attention; see `specified`."""
    check_tensors(q=q, k=k, v=v)
    if q.dtype == torch.float32:
        raise TypeError("q must be bfloat16 or float16, which tensor cores multiply exactly, got torch.float32")
    if not isinstance(sequences, Sequences):
        raise TypeError(f"sequences must be Sequences, got {type(sequences).__name__}")
    if type(window) is not int:
        raise TypeError(f"window must be an integer, 0 for none, got {window!r}")
    if window < 0:
        raise ValueError(f"window must be at least 0, got {window}")
    if type(lse) is not bool:
        raise TypeError(f"lse must be True or False, got {lse!r}")
    _check_shapes(q, k, v)
    _check_sequences(q, k, sequences)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        refuse_dual("attention", name, tensor)


def _check_shapes(q, k, v):
    if q.dim() != 3:
        raise ValueError(f"q must have shape (T, H, D), got {tuple(q.shape)}")
    heads, width = q.shape[1:]
    if not 1 <= width <= WIDEST or heads < 1:
        raise ValueError(f"q must have at least one head of 1 to {WIDEST} numbers, got shape {tuple(q.shape)}")
    if k.dim() != 4 or k.shape[3] != width:
        raise ValueError(f"k must have shape (B, C, Hkv, {width}) or, in pages, (P, page_size, Hkv, {width}), "
                         f"got {tuple(k.shape)}")
    if v.shape != k.shape:
        raise ValueError(f"v must have k's shape {tuple(k.shape)}, got {tuple(v.shape)}")
    if not k.shape[2] or heads % k.shape[2]:
        raise ValueError(f"q must have a multiple of k's {k.shape[2]} heads, got {heads}")


def _check_sequences(q, k, sequences):
    if sequences.device != q.device:
        raise ValueError(f"sequences must be on q's device {q.device}, got {sequences.device}")
    if sequences.tokens != q.shape[0]:
        raise ValueError(f"q must hold the {sequences.tokens} queries of sequences, got {q.shape[0]}")
    if sequences.pages is not None:
        if k.shape[1] != sequences.page_size:
            raise ValueError(f"k must have pages of {sequences.page_size} keys, got shape {tuple(k.shape)}")
    elif sequences.slots is None and k.shape[0] != len(sequences):
        raise ValueError(f"k must have a row for each of {len(sequences)} sequences, got shape {tuple(k.shape)}")
    elif sequences.longest > k.shape[1]:
        raise ValueError(f"keys must fit in k, which holds {k.shape[1]} a row, got {sequences.longest}")
    if sequences.highest >= k.shape[0]:
        what = "slots" if sequences.pages is None else "pages"
        raise ValueError(f"{what} must be below k's {k.shape[0]}, got {sequences.highest}")


def specified(q, k, v, sequences: Sequences, window: int = 0, lse: bool = False, adder: Adder = HOPPER,
              leaf: int = LEAF):
    """The specification: q (T, H, D), k and v as `sequences` says -> (T, H, D), with `lse` also (T, H) float32.

    bfloat16 or float16, D from 1 to 128, H a multiple of k's heads. `adder` is the tensor core's, `leaf` a multiple of
    128. Raises TypeError or ValueError for anything else, RuntimeError where a gradient is asked for.
    """
    check(q, k, v, sequences, window, lse)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise RuntimeError("attention.python has no backward yet: call it under torch.no_grad()")
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    sums = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    group = q.shape[1] // k.shape[2]
    for i in range(len(sequences)):
        count, start = int(sequences.queries[i]), int(sequences.starts[i])
        if not count:
            continue
        keys, values = (sequences.keys_of(i, cache) for cache in (k, v))
        first = int(sequences.keys[i]) - count
        position = torch.arange(first, first + count, dtype=torch.int64, device=q.device).repeat_interleave(group)
        tokens = slice(start, start + count)
        for head in range(k.shape[2]):
            heads = slice(head * group, head * group + group)
            rows = q[tokens, heads].reshape(count * group, -1)
            found = [_rows(rows[r : r + _ROWS], keys[:, head], values[:, head], position[r : r + _ROWS], window, adder,
                           leaf) for r in range(0, len(rows), _ROWS)]
            out[tokens, heads] = torch.cat([y for y, _ in found]).view(count, group, -1)
            sums[tokens, heads] = torch.cat([e for _, e in found]).view(count, group)
    return (out, sums) if lse else out


def _rows(q, k, v, position, window, adder, leaf):
    """Some rows (R, D) of one head, their positions ascending -> results (R, D) and lse (R,)."""
    scale, (m, total, acc) = scale_of(q.shape[1]), _nothing(q)
    oldest = (position - window + 1).clamp(min=0) if window else torch.zeros_like(position)
    for number in range(int(position[-1]) // leaf, int(oldest[0]) // leaf - 1, -1):
        begin = max(number * leaf, int(oldest[0]) // BLOCK * BLOCK)
        end = min((number + 1) * leaf, int(position[-1]) + 1)
        sees = (position >= begin) & (oldest < end)
        joined = _join(m, total, acc, *_leaf(q, k[begin:end], v[begin:end], position - begin, oldest - begin, scale,
                                             adder))
        m, total, acc = (torch.where(sees.view(-1, *[1] * (new.dim() - 1)), new, old)
                         for new, old in zip(joined, (m, total, acc), strict=True))
    y = torch.where((m == _NONE)[:, None], 0.0, acc * (1.0 / total)[:, None])
    return y.to(q.dtype), fma(m, LN2, log(total))


def _nothing(q):
    """What joins as if it were not there: the largest number, the sum, the weighted values."""
    top = torch.full(q.shape[:1], _NONE, dtype=torch.float32, device=q.device)
    return top, torch.zeros_like(top), torch.zeros(q.shape, dtype=torch.float32, device=q.device)


def _join(top, total, acc, m, part, values):
    """Another leaf's three behind those of newer ones."""
    new = torch.maximum(top, m)
    safe = torch.where(new == _NONE, 0.0, new)
    a, c = ex2(top - safe), ex2(m - safe)
    return new, fma(total, a, part * c), fma(acc, a[:, None], values * c[:, None])


def _leaf(q, k, v, position, oldest, scale, adder):
    """(m, l, acc) of one leaf's keys, positions counted from the first: the scores first, then block after block."""
    p, f, top = _weights(_scores(q, k, position, oldest, adder), scale)
    lanes, weights, acc = lane_sums(p), p.to(q.dtype), torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    sums = torch.zeros(len(q), 4, dtype=torch.float32, device=q.device)
    for b in reversed(range(p.shape[1])):
        values = v[b * BLOCK : (b + 1) * BLOCK]
        sums = fma(sums, f[:, b, None], lanes[:, b])
        acc = chain(weights[:, b, : len(values)], values.t(), adder, start=acc * f[:, b, None])
    return top[:, 0], (sums[:, 0] + sums[:, 1]) + (sums[:, 2] + sums[:, 3]), acc


def _scores(q, k, position, oldest, adder):
    """(R, blocks, 128): the chains of q and k, -inf where a key is not seen or not there."""
    s = chain(k, q, adder).t()  # factors commute, and a long first side is faster
    s = torch.nn.functional.pad(s, (0, -len(k) % BLOCK), value=_NONE)
    key = torch.arange(s.shape[1], dtype=torch.int64, device=q.device)
    seen = (key <= position[:, None]) & (key >= oldest[:, None])
    return torch.where(seen, s, _NONE).unflatten(1, (-1, BLOCK))


def _weights(s, scale):
    """p (R, blocks, 128), f and t (R, blocks) of all blocks at once: their maxima run from the last to the first."""
    top = torch.cummax((s.amax(2) * scale).flip(1), 1)[0].flip(1)
    before = torch.nn.functional.pad(top[:, 1:], (0, 1), value=_NONE)
    safe = torch.where(top == _NONE, 0.0, top)
    return ex2(fma(s, scale, -safe[..., None])), ex2(before - safe), top


def lane_sums(p: torch.Tensor) -> torch.Tensor:
    """(..., 128) -> (..., 4): the sums of the four lanes, as this file says."""
    x = p.unflatten(-1, (16, 4, 2))
    for half in (8, 4, 2, 1):
        x = x[..., :half, :, :] + x[..., half:, :, :]
    return x[..., 0, :, 0] + x[..., 0, :, 1]
