"""A verify pass in PyTorch's ops: G windows of W tokens on R keys, whatever the load and the requests' lengths.

What pads a window, stands for a window, or lies behind a request's pages is in nobody's page, the cache's last one.
"""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from ..model.attend import Attend
from ..model.batch import Batch
from ..model.cache import check_fits
from ..model.llama import Llama
from ..ops.attention.sequences import Sequences
from .pages import PagedCache


class OneShape:
    """The one shape of an engine's verify passes.

    reach  R, the most tokens that a verified request may have; rounded up to whole pages

    Raises MemoryError, before anything is served, where a pass cannot fit.
    """

    def __init__(self, model: Llama, cache: PagedCache, group: int, window: int, reach: int):
        self.cache, self.group, self.window = cache, group, window
        self.pages, self.last = cache.needed(reach), model.config.context - 1
        check_fits(f"a verify pass of {group} windows of {window} tokens, each on {self.keys} keys,",
                   self._bytes(model), model.device)
        self.table = np.full((group, self.pages + cache.needed(window) + 1), cache.pages)

    @property
    def keys(self) -> int:
        return self.pages * self.cache.page_size

    def _bytes(self, model: Llama) -> int:
        """About what a pass takes beside weights and cache: widest layer, gathered keys and values, mask, logits."""
        c, tokens, size = model.config, self.group * self.window, model.dtype.itemsize
        widest = 3 * c.intermediate_size + 4 * c.hidden_size + (c.heads + 2 * c.kv_heads) * c.head_dim
        gathered = 2 * self.group * self.keys * c.kv_heads * c.head_dim
        return size * (tokens * widest + gathered) + tokens * (self.keys + c.vocab_size * (4 + size))

    def batch(self, begins: Sequence[int], pages: Sequence[Sequence[int]]) -> Batch:
        """The batch of at most G windows that begin there; dummies make up the group."""
        self.table[:] = self.cache.pages
        for row, held in zip(self.table, pages, strict=False):
            row[: len(held)] = held
        begin = np.array([*begins, *[0] * (self.group - len(begins))])
        at = begin[:, None] + np.arange(self.window)
        size = self.cache.page_size
        slots = np.take_along_axis(self.table, at // size, 1) * size + at % size
        counts = np.full(self.group, self.window)
        batch = Batch(Sequences(counts, counts + begin, self.cache.kv.device), slots.ravel(),
                      tuple(self.cache.kv.shape[1:3]), counts)
        batch.positions.clamp_(max=self.last)  # padding may lie behind the context's end
        return batch

    def attention(self, sequences: Sequences) -> Attend:
        """One call over R keys for each window of the last `batch`, those behind a query masked.

        A call that stopped at a window's own keys would add them in an order that their number decides.
        """
        table = sequences.put(self.table[:, : self.pages]).long()
        first = sequences.put(sequences.keys - sequences.queries)[:, None, None, None]
        query, key = (torch.arange(count, dtype=torch.int32, device=first.device) for count in (self.window, self.keys))
        mask = key <= first + query[:, None]

        def attend(q, k, v):
            q = q.unflatten(0, (-1, self.window)).transpose(1, 2)
            k, v = (t[table].flatten(1, 2).transpose(1, 2) for t in (k, v))
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
            return y.transpose(1, 2).flatten(0, 1)
        return attend
