"""Which tokens a forward takes: of which requests, how many, behind how many; said on the host, once for all layers."""
from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from ..ops.attention.sequences import Sequences


class Batch:
    """The requests of one forward, whose new tokens lie one after another. A cache's `batch` makes it.

    sequences  each request's new tokens (its queries) and its tokens with those in the cache (its keys)
    positions  (T,) int64 on the device: each token's position in its request
    slots      (T,) int64 on the device: where the cache keeps each token
    last       index of the tokens whose logits="last" are: the last one of each request, or as many as `wanted` says
    room       (requests, capacity) of the cache that the slots are of, or (pages, page_size)

    A CUDA graph that was captured with a batch reads its tensors: hold it as long as the graph.
    """

    def __init__(self, sequences: Sequences, slots: np.ndarray, room: tuple[int, int],
                 wanted: Iterable[int] | None = None):
        self.sequences, self.room = sequences, room
        counts = sequences.queries
        behind = np.repeat(sequences.keys - counts - sequences.starts, counts)
        both = sequences.put(np.stack([np.arange(sequences.tokens) + behind, slots])).long()
        self.positions, self.slots = both.unbind()
        self.last = _last(sequences) if wanted is None else _last_few(sequences, np.array(wanted))

    @property
    def tokens(self) -> int:
        """T, the new tokens of all requests."""
        return self.sequences.tokens

    def __len__(self):
        return len(self.sequences)

    def __repr__(self):
        return f"<Batch: {len(self)} requests, {self.tokens} tokens, on {self.sequences.device}>"


def _last(sequences: Sequences) -> slice | torch.Tensor:
    """A slice where all requests have as many tokens, which copies nothing."""
    counts = sequences.queries
    if (counts == counts[0]).all():
        return slice(int(counts[0]) - 1, None, int(counts[0]))
    return sequences.put(sequences.starts + counts - 1).long()


def _last_few(sequences: Sequences, wanted: np.ndarray) -> slice | torch.Tensor:
    """The last wanted[i] tokens of request i, none where it is 0."""
    if (wanted == 1).all():
        return _last(sequences)
    ends = sequences.starts + sequences.queries
    behind = np.repeat(ends - np.cumsum(wanted), wanted)
    return sequences.put(behind + np.arange(wanted.sum())).long()
