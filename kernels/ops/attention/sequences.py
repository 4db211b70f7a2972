"""Which queries and keys belong together in one call: made once a step, used by all layers."""
from __future__ import annotations

import itertools
from collections.abc import Iterable
from functools import cached_property
from hashlib import blake2b
from weakref import WeakValueDictionary

import numpy as np
import torch

_NUMBERS = itertools.count(1)
_LIVE: WeakValueDictionary[int, Sequences] = WeakValueDictionary()
_LARGEST = 2**31 - 1
_MOST = 64  # tables kept


class _Kept:
    """The last few tables on devices, each with the stream that may read it."""

    tables: dict[tuple, tuple[torch.Tensor, int]] = {}


class Sequences:
    """Sequences of keys, whose last ones have queries.

    queries    how many queries each sequence has; in q (T, H, D) they lie one after another, T = sum(queries)
    keys       how many keys each has: its query r is at position keys - queries + r and sees keys up to that
    device     where q, k and v are
    pages      None: k, v are (B, C, Hkv, D), and sequence i is k[i, :keys[i]]. Else k, v are (P, page_size, Hkv, D)
               and position j of sequence i lies in page pages[i][j // page_size], at j % page_size. Sequences may
               share pages; pages beyond a sequence's keys are allowed and not read
    page_size  keys a page, where there are pages
    slots      without pages: sequence i is k[slots[i]], by default k[i]; several may share one

    Zero sequences, and sequences without queries, are allowed. Raises TypeError or ValueError that names the argument.
    `sequences[rows]` takes some of them, by a slice, a list or an index tensor.
    """

    def __init__(self, queries: Iterable[int], keys: Iterable[int], device=None,
                 pages: Iterable[Iterable[int]] | None = None, page_size: int | None = None,
                 slots: Iterable[int] | None = None):
        self.queries, self.keys = _integers("queries", queries), _integers("keys", keys)
        self.device = torch.empty(0, dtype=torch.int32, device=device or "cpu").device  # with its index
        self.page_size = _page_size(pages, page_size)
        self.pages = None if pages is None else tuple(_integers(f"pages[{i}]", p) for i, p in enumerate(pages))
        self.slots = None if slots is None else _integers("slots", slots)
        self._check()
        self.tokens = int(self.queries.sum())
        self.ready: dict = {}  # what calls of one form need, made at the first of them
        number = next(_NUMBERS)
        _LIVE[number] = self
        self.handle = torch.tensor([number], dtype=torch.int64, device="cpu")  # stands for self in torch.compile

    def _check(self):
        count = len(self.queries)
        for name, given in (("keys", self.keys), ("pages", self.pages), ("slots", self.slots)):
            if given is not None and len(given) != count:
                raise ValueError(f"{name} must have one entry for each of the {count} sequences, got {len(given)}")
        if self.slots is not None and self.pages is not None:
            raise ValueError("slots and pages cannot both be given: pages say where keys lie")
        short = np.flatnonzero(self.keys < self.queries)
        if len(short):
            i = short[0]
            raise ValueError(f"keys must be at least the queries, whose own keys are among them: sequence {i} has "
                             f"{self.keys[i]} keys and {self.queries[i]} queries")
        if self.queries.sum() > _LARGEST:
            raise ValueError(f"queries must be fewer than 2**31 in all, got {self.queries.sum()}")
        if self.pages:
            self._check_pages(-(-self.keys // self.page_size))

    def _check_pages(self, needed: np.ndarray):
        """Of all sequences at once: an engine makes such sequences for each of its steps."""
        given = np.array([len(page) for page in self.pages])
        for i in np.flatnonzero(given < needed)[:1]:
            raise ValueError(f"pages[{i}] must hold the sequence's keys, which need {needed[i]}, got {given[i]}")
        column = np.arange(self.table.shape[1], dtype=np.int32)
        used = np.where(column < needed[:, None], self.table, -1 - column)
        used.sort(axis=1)
        for i in np.flatnonzero((used[:, 1:] == used[:, :-1]).any(1))[:1]:
            raise ValueError(f"pages[{i}] names a page twice: {self.pages[i][: needed[i]].tolist()}")

    @classmethod
    def of(cls, handle: torch.Tensor) -> Sequences:
        """The sequences whose `handle` this is. Raises ValueError if there are none, or no more."""
        found = _LIVE.get(int(handle)) if isinstance(handle, torch.Tensor) and handle.numel() == 1 else None
        if found is None:
            raise ValueError(f"sequences must be Sequences that are still held, got {handle!r}")
        return found

    def __len__(self):
        return len(self.queries)

    def __getitem__(self, rows) -> Sequences:
        """Some sequences, in a new order or repeated. Without pages or slots k and v must be indexed as well."""
        chosen = chosen_rows(rows, len(self))
        return Sequences(self.queries[chosen], self.keys[chosen], self.device,
                         None if self.pages is None else [self.pages[i] for i in chosen], self.page_size,
                         None if self.slots is None else self.slots[chosen])

    def to(self, device) -> Sequences:
        """The same sequences for another device."""
        return Sequences(self.queries, self.keys, device, self.pages, self.page_size, self.slots)

    @cached_property
    def longest(self) -> int:
        """The most keys that a sequence has."""
        return int(self.keys.max(initial=0))

    @cached_property
    def highest(self) -> int:
        """The highest page that keys lie in, or slot; -1 if there are none."""
        if self.pages is None:
            return int(self.slots.max(initial=-1)) if self.slots is not None else len(self) - 1
        used = -(-self.keys // self.page_size)
        return max((int(p[:n].max()) for p, n in zip(self.pages, used, strict=True) if n), default=-1)

    @cached_property
    def place(self) -> np.ndarray:
        """(B,) int32: each sequence's row of k, or of the table of pages."""
        return np.arange(len(self), dtype=np.int32) if self.slots is None else self.slots.astype(np.int32)

    @cached_property
    def starts(self) -> np.ndarray:
        """(B,) int64: each sequence's first query in q."""
        return np.cumsum(self.queries) - self.queries

    @cached_property
    def table(self) -> np.ndarray | None:
        """(B, most pages) int32: the pages of each sequence, 0 where it has none; None without pages."""
        if self.pages is None:
            return None
        rows = np.zeros((len(self), max((len(p) for p in self.pages), default=0)), dtype=np.int32)
        for row, page in zip(rows, self.pages, strict=True):
            row[: len(page)] = page
        return rows

    def put(self, array: np.ndarray) -> torch.Tensor:
        """An array as int32 on the device, for the current stream; equal ones share memory.

        Raises RuntimeError while a graph is captured, unless it is there already.
        """
        array = np.ascontiguousarray(array, dtype=np.int32)
        stream = torch.cuda.current_stream(self.device).cuda_stream if self.device.type == "cuda" else 0
        capturing = stream and torch.cuda.is_current_stream_capturing()
        key = self.device, array.shape, blake2b(array.tobytes()).digest()
        found, home = _Kept.tables.get(key, (None, 0))
        if found is None or home != stream and not capturing:  # a capture waits for all that was before it
            if capturing:
                raise RuntimeError("these sequences' tables are not on the GPU yet: call attention with them once "
                                   "before a graph is captured")
            if len(_Kept.tables) >= _MOST:
                _Kept.tables.pop(next(iter(_Kept.tables)))
            _Kept.tables[key] = found, _ = _copied(array, self.device), stream
        return found

    def keys_of(self, i: int, cache: torch.Tensor) -> torch.Tensor:
        """(keys, Hkv, D): sequence i's keys or values, gathered from a cache."""
        count = int(self.keys[i])
        if self.pages is None:
            return cache[int(self.place[i]), :count]
        used = torch.from_numpy(self.pages[i][: -(-count // self.page_size)].copy()).to(cache.device)
        return cache[used].flatten(0, 1)[:count]

    def __repr__(self):
        kind = "contiguous" if self.pages is None else f"pages of {self.page_size}"
        return f"<Sequences: {len(self)}, {self.tokens} queries, up to {self.longest} keys, {kind}, on {self.device}>"


def _copied(array: np.ndarray, device: torch.device) -> torch.Tensor:
    made = torch.from_numpy(array.copy())
    return made.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else made.to(device)


def chosen_rows(rows, count: int) -> np.ndarray:
    """A slice, list, integer tensor or tensor of switches as row numbers from 0. Raises IndexError beyond `count`."""
    if isinstance(rows, slice):
        return np.arange(count)[rows]
    rows = rows.detach().cpu().numpy() if isinstance(rows, torch.Tensor) else np.asarray(rows)
    if rows.size == 0:
        rows = rows.astype(np.int64)
    if rows.ndim != 1 or rows.dtype.kind not in "iub":
        raise IndexError(f"rows must be a slice or one dimension of integers, got {rows!r}")
    return np.arange(count)[rows]


def _integers(name: str, values) -> np.ndarray:
    """Integers of at least 0 as int64. TypeError or ValueError otherwise; True is no integer."""
    if isinstance(values, np.ndarray) and values.ndim == 1 and values.dtype.kind in "iu":
        found = values.astype(np.int64)
    else:
        values = list(values.tolist() if isinstance(values, torch.Tensor) else values) \
            if isinstance(values, Iterable) and not isinstance(values, (str, bytes)) else None
        if values is None or not all(type(v) is int or isinstance(v, np.integer) for v in values):
            raise TypeError(f"{name} must be integers, got {values!r}")
        if any(not -2**62 < v < 2**62 for v in values):
            raise ValueError(f"{name} must be less than 2**31, got {values!r}")
        found = np.array(values, dtype=np.int64)
    if len(found) and (found.min() < 0 or found.max() > _LARGEST):
        raise ValueError(f"{name} must be from 0 to 2**31 - 1, got {found[(found < 0) | (found > _LARGEST)][0]}")
    found.setflags(write=False)
    return found


def _page_size(pages, size) -> int | None:
    if pages is None:
        if size is not None:
            raise ValueError(f"page_size must be None where there are no pages, got {size!r}")
        return None
    if type(size) is not int:
        raise TypeError(f"page_size must be an integer where there are pages, got {size!r}")
    if size < 1:
        raise ValueError(f"page_size must be at least 1, got {size}")
    return size
