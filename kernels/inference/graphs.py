"""Decode steps as CUDA graphs: all of a forward but attention, captured once for each of a few batch sizes.

A graph freezes its launches, and attention's follow the lengths of the sequences, which grow. So a capture is ended
where a layer calls attention and another one begins behind it: a forward of L layers is L + 1 graphs with L calls of
attention between them, made anew for the sequences of each step. Rows that a batch does not fill write to the cache's
last page, which is no request's, and are not read.
"""
from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch

from ..model.attend import Attend
from ..model.llama import Llama
from .pages import PagedCache


class DecodeGraphs:
    """Forwards of one token a request, captured when a batch of their size first comes."""

    def __init__(self, model: Llama, cache: PagedCache, most: int):
        self.model, self.cache = model, cache
        self.sizes = [size for size in (1, 2, 4, *range(8, most, 8)) if size < most] + [most]
        self.graphs: dict[int, _Graph] = {}
        self.pool = torch.cuda.graph_pool_handle()
        self.replays = 0

    def __call__(self, tokens: Sequence[int], counts: Sequence[int], prefixes: Sequence[int],
                 tables: Sequence[Sequence[int]]) -> torch.Tensor:
        """The logits (R, vocab_size) behind one token of each of R requests; overwritten by the next call."""
        size = next(size for size in self.sizes if size >= len(tokens))
        self.replays += 1
        return self._of(size)(tokens, self.cache.batch(counts, prefixes, tables))

    def capture(self) -> None:
        """Capture every size that is not captured yet."""
        for size in self.sizes:
            self._of(size)

    def _of(self, size: int) -> _Graph:
        if size not in self.graphs:
            self.graphs[size] = _Graph(self.model, self.cache, size, self.pool)
        return self.graphs[size]


class _Graph:
    """The pieces of a forward over `size` tokens, and what they read and write."""

    def __init__(self, model: Llama, cache: PagedCache, size: int, pool):
        self.cache, self.size, self.pool = cache, size, pool
        self.attention, self.between = model.ops.attention, []  # (queries, keys, values, where the result goes)
        self.pieces: list[torch.cuda.CUDAGraph] = []
        self.batch = cache.batch([1] * size, [0] * size, [[cache.pages]] * size)
        self.unused = self.batch.slots[:1].clone()
        self.given = torch.zeros(3, size, dtype=torch.int64, device=model.device)  # tokens, positions, slots
        self.given[2] = self.unused
        self.batch.positions, self.batch.slots = self.given[1], self.given[2]
        self._capture(model)

    def _capture(self, model: Llama) -> None:
        side = torch.cuda.Stream(model.device)
        side.wait_stream(torch.cuda.current_stream(model.device))
        with torch.cuda.stream(side):
            for _ in range(3):  # whatever compiles, loads or picks an algorithm does so before the capture
                model.forward(self.given[0], self.batch, self.cache)
            torch.cuda.synchronize(model.device)
            broken = copy.copy(model)
            broken.ops = replace(model.ops, attention=lambda sequences: self._between)
            self._begin()
            try:
                self.logits = broken.forward(self.given[0], self.batch, self.cache)
            finally:
                self.pieces[-1].capture_end()
        torch.cuda.current_stream(model.device).wait_stream(side)

    def _begin(self) -> None:
        self.pieces.append(torch.cuda.CUDAGraph())
        self.pieces[-1].capture_begin(pool=self.pool, capture_error_mode="thread_local")

    def _between(self, q, k, v):
        """Stands for attention while the forward is captured: ends one graph, and begins the next."""
        self.pieces[-1].capture_end()
        result = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
        self.between.append((q, k, v, result))
        self._begin()
        return result

    def __call__(self, tokens: Sequence[int], batch) -> torch.Tensor:
        count = len(tokens)
        ids = torch.tensor(tokens, dtype=torch.int64, device="cpu").pin_memory()
        self.given[0, :count].copy_(ids, non_blocking=True)
        self.given[1, :count], self.given[2, :count] = batch.positions, batch.slots
        self.given[1, count:], self.given[2, count:] = 0, self.unused
        attend: Attend = self.attention(batch.sequences)
        for piece, (q, k, v, result) in zip(self.pieces, self.between, strict=False):
            piece.replay()
            result[:count] = attend(q[:count], k, v)
        self.pieces[-1].replay()
        return self.logits[:count]
