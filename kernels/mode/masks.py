"""Which keys each query of a scaled_dot_product_attention sees, and the sequences that this makes.

Attention has an order by positions (ops/attention/order.py), counted from a sequence's first key. So a mask is read
for what it says: each query sees neighbouring keys, all queries of a sequence from the same first key on (or a window
of the last few), as causal masks, padding on the left, padding on the right and a cache's free end do. Other masks
have no order here.
"""
from __future__ import annotations

import itertools
import threading
import weakref
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
import torch

from ..ops.attention.sequences import Sequences
from .switch import Unsupported

_TOGETHER = 64  # queries that see nothing, in one sequence: more would take the time of as many keys


@dataclass(frozen=True, eq=False)
class Seen:
    """What queries see. A run is neighbouring queries of which each sees one key more than the one before it.

    batch, queries, keys  of the call
    device                where it is
    starts                of each element of the batch its first key
    runs                  (element, first query, count, how many keys the last one's sequence has, from `starts` on)
    window                how many keys a query sees at most; 0 for all
    """

    batch: int
    queries: int
    keys: int
    device: torch.device
    starts: tuple[int, ...]
    runs: tuple[tuple[int, int, int, int], ...]
    window: int = 0
    _places: dict[int, torch.Tensor] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def sequences(self) -> Sequences:
        """A sequence for each run and, so that every query is in one, for `_blind` ones too, on `shifted` keys."""
        runs = sorted((*self.runs, *self._blind))
        element, _, count, keys = zip(*runs, strict=True) if runs else ((), (), (), ())
        return Sequences(count, keys, self.device, slots=element)

    @cached_property
    def _blind(self) -> list[tuple[int, int, int, int]]:
        """Runs of the queries that see nothing, as if they saw keys: `empty` says whose results are to be put right."""
        runs = []
        for b, seeing in enumerate(self._seeing if self.keys else ()):
            places = np.flatnonzero(~seeing)
            for run in np.split(places, np.flatnonzero(np.diff(places) != 1) + 1):
                step = min(_TOGETHER, self.keys)
                runs += [(b, int(part[0]), len(part), len(part)) for part in
                         (run[i : i + step] for i in range(0, len(run), step))]
        return runs

    @cached_property
    def _seeing(self) -> np.ndarray:
        found = np.zeros((self.batch, self.queries), dtype=bool)
        for b, first, count, _ in self.runs:
            found[b, first : first + count] = True
        return found

    @cached_property
    def empty(self) -> torch.Tensor | None:
        """(batch, 1, queries, 1) True for queries that see nothing; None if there are none."""
        hidden = ~self._seeing[:, None, :, None]
        return torch.from_numpy(hidden).to(self.device) if hidden.any() else None

    def hidden(self, element: int) -> torch.Tensor:
        """(queries, keys behind the start) True where a query of this element does not see a key."""
        last = torch.full((self.queries, 1), -1, dtype=torch.int64, device="cpu")
        for b, first, count, keys in self.runs:
            if b == element:
                last[first : first + count, 0] = torch.arange(keys - count, keys, dtype=torch.int64, device="cpu")
        key = torch.arange(self.keys - self.starts[element], dtype=torch.int64, device="cpu")
        hidden = key > last
        if self.window:
            hidden |= key <= last - self.window
        return hidden.to(self.device)

    def shifted(self, cache: torch.Tensor) -> torch.Tensor:
        """Keys or values (batch, KV, keys, D) with each element's first one in place 0, and its last one repeated.

        It is one launch for tensors that lie as (batch, KV, keys, D) or as (batch, keys, KV, D) does.
        """
        if not any(self.starts):
            return cache
        by_key = cache.transpose(1, 2)
        if by_key.is_contiguous():
            found = by_key.view(-1, by_key[0, 0].numel()).index_select(0, self._moved(1))
            return found.view(by_key.shape).transpose(1, 2)
        rows = cache.reshape(-1, cache.shape[3]).index_select(0, self._moved(cache.shape[1]))
        return rows.view(cache.shape)

    def _moved(self, heads: int) -> torch.Tensor:
        """Rows (batch * heads * keys) of a cache -> the row from which each is taken."""
        if heads not in self._places:
            key = np.arange(self.keys) + np.array(self.starts)[:, None, None]
            head = np.arange(self.batch * heads).reshape(self.batch, heads, 1)
            places = head * self.keys + np.minimum(key, self.keys - 1)
            self._places[heads] = torch.from_numpy(places.ravel()).to(self.device)
        return self._places[heads]


@dataclass(frozen=True)
class Read:
    """A mask that was read before, as a compiled graph hands it on: what it says stands beside it."""

    seen: Seen
    mask: torch.Tensor


READ: dict[int, Seen] = {}  # what compiled graphs have read, by a number, which they can carry
_NUMBERS, KEPT, _LOCK = itertools.count(1), 16, threading.Lock()


def number_of(mask: torch.Tensor, batch: int, queries: int, keys: int) -> int:
    """Read a mask -> the number under which READ has what it says; 0 for one without an order.

    A CUDA graph may have written to a mask unseen, so its numbers are compared each time.
    """
    try:
        seen = of_mask(mask, batch, queries, keys, mask.device, compare=True)
    except Unsupported:
        return 0  # attention is given the mask too, and refuses it by name
    with _LOCK:
        for number, known in READ.items():
            if known is seen:
                return number
        number = next(_NUMBERS)
        READ[number] = seen
        for old in list(READ)[:-KEPT]:
            del READ[old]
    return number


@lru_cache(64)
def without_mask(batch: int, queries: int, keys: int, causal: bool, device: torch.device) -> Seen:
    """All keys, or as is_causal says: query i sees key i and those before it."""
    if causal:
        together = min(queries, keys)
        runs = [(0, together, together), *((i, 1, keys) for i in range(together, queries))]
    else:
        runs = [(i, 1, keys) for i in range(queries)]
    return Seen(batch, queries, keys, device, (0,) * batch,
                tuple((b, *run) for b in range(batch) for run in runs if keys))


# what torch 2.10, for one, writes for False in a boolean mask before it calls cuDNN; rounded, in bfloat16, to -65536
FOR_CUDNN = -65504.0
COPIED = 1 << 22  # numbers of a mask that is kept, to be compared with the next ones
LAST = 4  # masks that are kept: a forward may have one of all keys and one of a window, in turn
_LAST: list[_Last] = []


class _Last(NamedTuple):
    """A mask that was read: layers share it, or each gets one like it."""

    mask: weakref.ref
    version: int | None
    copy: torch.Tensor | None
    sizes: tuple
    seen: Seen

    def is_alike(self, mask: torch.Tensor) -> bool:
        """Whether a mask has the same numbers: one wait for the GPU, where reading it takes several."""
        kinds = [(t.dtype, t.device, t.layout, t.shape) for t in (self.copy, mask) if t is not None]
        return len(kinds) == 2 and kinds[0] == kinds[1] and torch.equal(self.copy, mask)


def of_mask(mask: torch.Tensor, batch: int, queries: int, keys: int, device: torch.device,
            compare: bool = False) -> Seen:
    """What a mask says. Raises Unsupported for one that is not of the kind above.

    On a GPU the same tensor is not read again unless PyTorch knows that it was written to, or `compare` is set: what a
    captured graph or a kernel of one's own writes there is not seen.
    """
    version = None if mask.is_inference() else mask._version
    sizes = batch, queries, keys, device
    known = [last for last in tuple(_LAST) if last.sizes == sizes]
    if mask.is_cuda and not compare and version is not None:
        for last in known:
            if last.mask() is mask and last.version == version:
                return last.seen
    for last in known:
        if last.is_alike(mask):  # PyTorch makes each layer a mask of its own, of the one that it was given
            return last.seen
    copy = mask.detach().clone() if mask.numel() <= COPIED else None
    seen = _read(mask if copy is None else copy, *sizes)  # the copy, or another thread could write in between
    _LAST[:] = [_Last(weakref.ref(mask), version, copy, sizes, seen), *_LAST[: LAST - 1]]
    return seen


def _read(mask, batch, queries, keys, device) -> Seen:
    if mask.layout != torch.strided or mask.dim() < 2:
        raise Unsupported(f"has an order for masks of two dimensions and more, and attn_mask has {mask.dim()}")
    shown = _shown(mask)
    try:
        while shown.dim() < 4:
            shown = shown[None]
        if shown.shape[1] > 1 and not (shown == shown[:, :1]).all():
            raise Unsupported("has an order for masks that are the same for all heads, and attn_mask is not")
        numbers = _counted(shown[:, 0].expand(-1, -1, keys)).expand(3, batch, queries)
    except RuntimeError:
        raise Unsupported(f"has an order for masks that fit ({batch}, heads, {queries}, {keys}), and attn_mask has "
                          f"shape {tuple(mask.shape)}") from None
    return _sequences(*numbers.cpu().numpy(), keys, device)


def _counted(table: torch.Tensor) -> torch.Tensor:
    """(B, Q, K) of switches -> (3, B, Q): how many keys each query sees, its first one, and the one behind its last."""
    if not table.shape[2]:
        return torch.zeros((3, *table.shape[:2]), dtype=torch.int64, device=table.device)
    ones = table.to(torch.uint8)
    return torch.stack((ones.sum(2), ones.argmax(2), table.shape[2] - ones.flip(2).argmax(2)))


def _shown(mask) -> torch.Tensor:
    if mask.dtype == torch.bool:
        return mask
    shown = mask == 0
    hidden = mask <= torch.finfo(mask.dtype).min
    if mask.dtype in (torch.bfloat16, torch.float16):  # cuDNN takes no others
        hidden |= mask == torch.tensor(FOR_CUDNN, dtype=mask.dtype, device="cpu").item()
    other = (~(shown | hidden)).nonzero()
    if len(other):
        place = tuple(other[0].tolist())
        raise Unsupported("has an order for masks that show or hide keys, and attn_mask is dense: it adds other "
                          f"numbers, such as {mask[place].item():g} at {list(place)}")
    return shown


def _sequences(count: np.ndarray, first: np.ndarray, last: np.ndarray, keys: int, device) -> Seen:
    batch, queries = count.shape
    end = first + count
    some = count > 0
    gaps = some & (last != end)
    starts = [int(first[b][some[b]].min(initial=keys)) for b in range(batch)]
    start = np.array(starts).reshape(-1, 1)
    window = 0 if (first == start)[some].all() else int(count.max(initial=0))
    if gaps.any() or window and (first != np.maximum(start, end - window))[some].any():
        raise Unsupported("has an order for masks in which each query sees neighbouring keys up to one place, and "
                          "attn_mask is dense in another way")
    runs = []
    for b in range(batch):
        here = np.flatnonzero(some[b])
        cuts = np.flatnonzero((np.diff(here) != 1) | (np.diff(end[b][here]) != 1)) + 1
        runs += [(b, int(run[0]), len(run), int(end[b][run[-1]]) - starts[b])
                 for run in np.split(here, cuts) if len(run)]
    return Seen(batch, queries, keys, device, tuple(0 if s == keys else s for s in starts), tuple(runs), window)
