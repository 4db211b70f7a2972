"""One sequence's attention computed in seven ways, a leaf of it by hand, and the exponential unit's errors.

Plain functions that return results and print nothing; notebook 05 draws them with chart.py.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ... import bits
from ...arithmetic.elementary import fma
from ...arithmetic.ex2 import FRACTION_BITS, PLACES, ex2
from ...arithmetic.tensor_core import chain
from ...ops.attention.order import BLOCK, lane_sums, scale_of
from ...ops.attention.sequences import Sequences

CELLS = 512  # of an octave, in unit_errors


@dataclass(frozen=True)
class Way:
    """One way to compute a sequence's attention.

    spans   (begin, end) of the positions that each call computes, one call after another
    given   so many positions at the front were computed for another request, and their keys are shared
    result  (n, H, D)
    note    what else is special about it, in a few words
    """

    name: str
    spans: tuple[tuple[int, int], ...]
    result: torch.Tensor
    given: int = 0
    note: str = ""

    @property
    def digest(self) -> str:
        return bits.digest(self.result)


def seven_ways(call: Callable, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, prompt: int, chunks: Sequence[int],
               page: int = 16) -> list[Way]:
    """One sequence, q (n, H, D) and k, v (1, n, Hkv, D), through `call`, which takes (q, k, v, sequences).

    prompt  positions before the first token that is decoded alone; chunks: positions of the first calls of a chunked
    prefill, the rest is its last call; page: keys a page. Where no key of a sequence lies, there is NaN.
    ValueError unless 1 <= prompt < n and the chunks, each at least 1, leave a rest.
    """
    n = len(q)
    if not 1 <= prompt < n:
        raise ValueError(f"prompt must be from 1 to {n - 1}, got {prompt}")
    if min(chunks, default=0) < 1 or sum(chunks) >= n:
        raise ValueError(f"chunks must be at least 1 and leave a rest of {n} positions, got {tuple(chunks)}")
    cuts = [0, *torch.tensor(chunks, dtype=torch.int64, device="cpu").cumsum(0).tolist(), n]
    whole, stops = ((0, n),), [prompt, *range(prompt + 1, n + 1)]
    return [Way("whole prefill", whole, _in_turn(call, q, k, v, whole)),
            _way("chunked prefill", call, q, k, v, list(zip(cuts[:-1], cuts[1:], strict=True))),
            _way("prefill, then decode", call, q, k, v, list(zip([0, *stops[:-1]], stops, strict=True))),
            Way("in shuffled pages", whole, _paged(call, q, k, v, page), note=f"keys in pages of {page}, in no order"),
            Way("among strangers", whole, _among(call, q, k, v, False), note="third of four requests in the call"),
            Way("in reverse order", whole, _among(call, q, k, v, True), note="second of the same four requests"),
            _after_a_hit(call, q, k, v, prompt, page)]


def _way(name, call, q, k, v, spans) -> Way:
    return Way(name, tuple(spans), _in_turn(call, q, k, v, spans))


def _in_turn(call, q, k, v, spans) -> torch.Tensor:
    return torch.cat([call(q[begin:end], k, v, Sequences([end - begin], [end], q.device)) for begin, end in spans])


def _in_pages(x, page, spare: int = 3):
    """x (1, n, Hkv, D) scattered over pages (P, page, Hkv, D), `spare` of which hold NaN, and the list of its pages."""
    count = -(-x.shape[1] // page)
    order = bits.hashed(torch.arange(count + spare, dtype=torch.int64, device="cpu"), 5).argsort()[:count]
    padded = torch.nn.functional.pad(x[0], (0, 0, 0, 0, 0, count * page - x.shape[1]), value=float("nan"))
    pages = x.new_full((count + spare, page, *x.shape[2:]), float("nan"))
    pages[order.to(x.device)] = padded.unflatten(0, (count, page))
    return pages, order.tolist()


def _paged(call, q, k, v, page) -> torch.Tensor:
    """All positions, the keys in pages that lie in no order."""
    (keys, where), (values, _) = (_in_pages(x, page) for x in (k, v))
    return call(q, keys, values, Sequences([len(q)], [len(q)], q.device, pages=[where], page_size=page))


def _after_a_hit(call, q, k, v, prompt, page) -> Way:
    """Another request began alike: its pages are kept, and only the positions behind them are computed."""
    n, kept = len(q), prompt // page * page
    (keys, where), (values, _) = (_in_pages(x, page) for x in (k, v))
    theirs = Sequences([kept], [kept], q.device, pages=[where[: kept // page]], page_size=page)
    ours = Sequences([n - kept], [n], q.device, pages=[where], page_size=page)
    result = torch.cat([call(q[:kept], keys, values, theirs), call(q[kept:], keys, values, ours)])
    return Way("after a prefix-cache hit", ((kept, n),), result, kept)


def _among(call, q, k, v, reverse: bool) -> torch.Tensor:
    """The sequence third of four requests: a decode and a prefill before it, a chunk behind it; or all in reverse."""
    n, counts, keys = len(q), [1, -(-len(q) // 3), len(q), 3], [len(q), -(-len(q) // 3), len(q), len(q) // 2 + 3]
    queries, caches = [], []
    for i, (count, length) in enumerate(zip(counts, keys, strict=True)):
        ours = i == 2
        queries.append(q if ours else _numbers(q[:1].expand(count, -1, -1), i))
        caches.append([x[0] if ours else _numbers(x[0, :1].expand(length, -1, -1), 10 * i + j)
                       for j, x in enumerate((k, v))])
    order = [3, 2, 1, 0] if reverse else [0, 1, 2, 3]
    most = max(keys)
    k, v = (torch.stack([torch.nn.functional.pad(caches[i][j], (0, 0, 0, 0, 0, most - keys[i]), value=float("nan"))
                         for i in order]) for j in (0, 1))
    y = call(torch.cat([queries[i] for i in order]), k, v,
             Sequences([counts[i] for i in order], [keys[i] for i in order], q.device))
    start = sum(counts[i] for i in order[: order.index(2)])
    return y[start : start + n]


def _numbers(like, seed):
    """Somebody else's numbers, in this shape."""
    return bits.portable(len(like), like[0].numel(), like.dtype, like.device, seed=100 + seed, scale=1).view(like.shape)


def unit_errors(sign: int, cells: int = CELLS) -> torch.Tensor:
    """(cells, 3): least, mean and greatest error of ex2 in ulps, over all 2**23 places from 0 to `sign`, in cells.

    An ulp is the distance of two float32 numbers where the exact result lies. ValueError for a sign other than 1 or -1
    or cells that do not divide 2**23.
    """
    if sign not in (1, -1):
        raise ValueError(f"sign must be 1 or -1, got {sign!r}")
    if cells < 1 or PLACES % cells:
        raise ValueError(f"cells must divide 2**{FRACTION_BITS}, got {cells}")
    step, found = PLACES // cells, []
    for start in range(0, PLACES, step):
        x = sign * torch.arange(start, start + step, dtype=torch.float64, device="cpu") / PLACES
        exact = torch.exp2(x)
        error = (ex2(x.float()).double() - exact) * 2.0 ** (FRACTION_BITS + (sign < 0))
        found.append(torch.stack([error.min(), error.mean(), error.max()]))
    return torch.stack(found)


def leaf_by_hand(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q (R, D), and the keys and values (n, D) of one leaf, all of them seen -> m (R,), l (R,) and acc (R, D).

    ops/attention/order.py written out, a block at a time, for bfloat16 or float16.
    """
    m = torch.full((len(q),), float("-inf"), dtype=torch.float32, device=q.device)
    lanes, acc = (torch.zeros(len(q), width, dtype=torch.float32, device=q.device) for width in (4, q.shape[1]))
    for begin in reversed(range(0, len(k), BLOCK)):
        keys, values = k[begin : begin + BLOCK], v[begin : begin + BLOCK]
        s = chain(q, keys)
        t = torch.maximum(m, s.amax(1) * scale_of(q.shape[1]))
        p = ex2(fma(s, scale_of(q.shape[1]), -t[:, None]))
        f = ex2(m - t)[:, None]
        lanes = fma(lanes, f, lane_sums(torch.nn.functional.pad(p, (0, BLOCK - len(keys)))))
        acc = chain(p.to(q.dtype), values.T, start=acc * f)
        m = t
    return m, (lanes[:, 0] + lanes[:, 1]) + (lanes[:, 2] + lanes[:, 3]), acc
