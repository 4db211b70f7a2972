"""What the queries of a scaled_dot_product_attention see, and the sequences that this makes of keys and queries."""
from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import numpy as np
import torch

from ..ops.attention.sequences import Sequences

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
        step = min(_TOGETHER, self.keys)
        return [(b, first + i, min(step, count - i), min(step, count - i)) for b, first, count in
                (neighbours(~self._seeing) if step else ()) for i in range(0, count, step)]

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


def neighbours(there: np.ndarray, follows: np.ndarray | None = None) -> list[tuple[int, int, int]]:
    """(row, first column, count) of each run of columns that are `there` (B, Q), and that `follow` the one before."""
    begins = there.copy()
    begins[:, 1:] &= ~(there[:, :-1] if follows is None else there[:, :-1] & follows[:, 1:])
    row, first = np.nonzero(begins)
    number = np.cumsum(there).reshape(there.shape)[row, first]
    count = np.diff(number, append=np.count_nonzero(there) + 1)
    return list(zip(row.tolist(), first.tolist(), count.tolist(), strict=True))


@dataclass(frozen=True)
class Read:
    """A mask that was read before, as a compiled graph hands it on: what it says stands beside it."""

    seen: Seen
    mask: torch.Tensor


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
