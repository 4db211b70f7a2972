"""The KV cache in pages: a request's tokens lie in any pages, and requests that begin alike share those that are full.

A full page is known by its tokens and by the number of the known page before it. That pair is the key of a dictionary,
which compares keys as well as their hashes: two beginnings whose hashes are equal never share a page.

A page is free, held by one or more requests, or idle: known, and held by none. Idle pages wait for the next request
that begins so, and are taken, the one used longest ago first, when no page is free.
"""
from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from ..model.batch import Batch
from ..model.cache import check_fits
from ..ops.attention.sequences import Sequences

ROOT = 0  # the number before a request's first page


class PagedCache:
    """Keys and values of every layer in `pages` pages of `page_size` tokens; models take it in place of a KVCache.

    kv is (layers, pages + 1, page_size, 2 * kv_heads, head_dim). The last page is no request's: unused rows of a CUDA
    graph write there. No address and no shape changes while a model runs.

    sharing  whether full pages are kept for requests that begin alike

    Raises TypeError or ValueError that names the argument, MemoryError, before anything is allocated, if it cannot fit.
    """

    def __init__(self, model, pages: int, page_size: int, sharing: bool = True):
        for name, value in (("pages", pages), ("page_size", page_size)):
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        c = model.config
        shape = (c.layers, pages + 1, page_size, 2 * c.kv_heads, c.head_dim)
        size = torch.Size(shape).numel() * model.dtype.itemsize
        check_fits(f"a KV cache of {pages} pages of {page_size} tokens for {c.name}", size, model.device)
        self.kv = torch.zeros(shape, dtype=model.dtype, device=model.device)
        self.pages, self.page_size, self.sharing = pages, page_size, sharing
        self.free = list(range(pages))[::-1]
        self.holders = [0] * pages
        self.idle: OrderedDict[int, None] = OrderedDict()  # the one used longest ago first
        self.known: dict[tuple[int, tuple[int, ...]], int] = {}
        self.named: dict[int, tuple[int, tuple[int, int | tuple[int, ...]]]] = {}  # page -> its number and its key
        self.numbers = ROOT
        self.evictions = 0

    @property
    def spare(self) -> int:
        """Pages that can be taken: free ones and idle ones."""
        return len(self.free) + len(self.idle)

    def needed(self, tokens: int) -> int:
        """How many pages so many tokens lie in."""
        return -(-tokens // self.page_size)

    def take(self, count: int) -> list[int]:
        """`count` pages, now held once each. Raises RuntimeError if there are not so many: look at `spare` first."""
        if count > self.spare:
            raise RuntimeError(f"{count} pages were asked for and {self.spare} are spare")
        return [self._take() for _ in range(count)]

    def _take(self) -> int:
        if self.free:
            page = self.free.pop()
        else:
            page, _ = self.idle.popitem(last=False)
            self._forget(page)
            self.evictions += 1
        self.holders[page] = 1
        return page

    def find(self, tokens: Sequence[int]) -> list[int]:
        """The known pages that hold the beginning of these tokens; not yet held. One token at least is left over."""
        found: list[int] = []
        number, size = ROOT, self.page_size
        for begin in range(0, len(tokens) - size, size):
            page = self.known.get((number, tuple(tokens[begin : begin + size])))
            if page is None:
                break
            found.append(page)
            number = self.named[page][0]
        return found

    def hold(self, pages: Iterable[int]) -> None:
        """One more request has these pages."""
        for page in pages:
            self.idle.pop(page, None)
            self.holders[page] += 1

    def keep(self, number: int, tokens: Sequence[int], page: int) -> int:
        """Make a full page known, which lies behind the known page with this number; returns the page's own number.

        If such a page is known already, the number is that page's, and this page stays its request's alone.
        """
        key = (number, tuple(tokens))
        if not self.sharing:
            return ROOT
        if key not in self.known:
            self.numbers += 1
            self.known[key], self.named[page] = page, (self.numbers, key)
        return self.named[self.known[key]][0]

    def number(self, page: int) -> int:
        """The number of a known page."""
        return self.named[page][0]

    def release(self, pages: Sequence[int], spoiled: bool = False) -> None:
        """A request gives its pages back; the last of them is the first to be taken again.

        spoiled  the request's numbers are none (NaN): what it alone holds is forgotten and set to 0, for a masked
                 value must be 0 x 0 and never 0 x NaN
        """
        for page in reversed(pages):
            self.holders[page] -= 1
            if self.holders[page]:
                continue
            if spoiled:
                self._forget(page)
                self.kv[:, page] = 0
            if page in self.named:
                self.idle[page] = None
            else:
                self.free.append(page)

    def forget(self) -> None:
        """Idle pages are free: the next request that begins as an earlier one did finds nothing of it."""
        for page in self.idle:
            self._forget(page)
            self.free.append(page)
        self.idle.clear()

    def _forget(self, page: int) -> None:
        if page in self.named:
            del self.known[self.named.pop(page)[1]]

    def batch(self, counts: Sequence[int], prefixes: Sequence[int], tables: Sequence[Sequence[int]],
              wanted: Sequence[int] | None = None) -> Batch:
        """The batch in which request i adds counts[i] tokens behind the prefixes[i] that its pages tables[i] hold.

        wanted  of how many of its last tokens each request wants logits; by default of its last one
        """
        new, held = np.array(counts), np.array(prefixes)
        rows = [np.array(table, dtype=np.int64) for table in tables]
        sequences = Sequences(new, new + held, self.kv.device, rows, self.page_size)
        slots = [self._slots(table, begin, count) for table, begin, count in zip(rows, prefixes, counts, strict=True)]
        return Batch(sequences, np.concatenate(slots), tuple(self.kv.shape[1:3]), wanted)

    def _slots(self, table, begin: int, count: int) -> np.ndarray:
        position = np.arange(begin, begin + count)
        return table[position // self.page_size] * self.page_size + position % self.page_size

    def check(self, held: Iterable[Sequence[int]] = ()) -> None:
        """Count every page. `held` are the pages of each request that has some.

        Raises RuntimeError that names a page that is lost, held by fewer or more than it says, or in two places.
        """
        wanted = Counter(page for pages in held for page in pages)
        free = Counter(self.free)
        for page in range(self.pages):
            places = free[page] + (page in self.idle) + (wanted[page] > 0)
            if self.holders[page] != wanted[page] or places != 1:
                raise RuntimeError(f"page {page} is held by {wanted[page]} requests and counts {self.holders[page]}; "
                                   f"it is {free[page]} times free and {int(page in self.idle)} times idle")
        if {page: key for key, page in self.known.items()} != {page: key for page, (_, key) in self.named.items()}:
            raise RuntimeError("the known pages and their names do not belong together")
        if not set(self.idle) <= set(self.named):
            raise RuntimeError("a page that is not known is idle")

    def __repr__(self):
        return (f"<PagedCache: {self.pages} pages of {self.page_size} tokens, {len(self.free)} free, "
                f"{len(self.idle)} idle, on {self.kv.device}>")
