"""A call of certain sequences made ready: launches, tables, and memory of its own at each call."""
from __future__ import annotations

from operator import itemgetter

import torch

from ...launch import Step
from .sequences import Sequences
from .work import Work


def pointers(step: Step) -> itemgetter:
    """What picks the step's pointers, in order, from addresses by name."""
    return itemgetter(*(step.named.get(name, name) for name in step.pointers))


class Ready:
    """A call of certain sequences: its launches, and the addresses of the tables that they read."""

    __slots__ = ("launches", "scratch", "tiles", "leaves", "pages", "kept")

    def __init__(self, made, sequences: Sequences, work: Work, scratch: int):
        self.launches, self.scratch = made, scratch
        self.tiles = work.tiles.data_ptr()
        self.leaves = self.tiles if work.leaves is None else work.leaves.data_ptr()
        pages = work.tiles if sequences.table is None else sequences.put(sequences.table)
        self.pages = pages.data_ptr()
        self.kept = work, pages  # tensors live as long as their addresses are used

    def __call__(self, q, k, v, y, sums, device):
        low, known = q | k | v, {"q_ptr": q, "k_ptr": k, "v_ptr": v, "pages_ptr": self.pages, "work_ptr": self.tiles,
                                 "leaves_ptr": self.leaves, "o_ptr": y, "lse_ptr": sums}
        if self.scratch:
            part = torch.empty(self.scratch, dtype=torch.float32, device=device)
            known["part_ptr"] = part.data_ptr()
        for launch, taken in self.launches:
            launch(low, *taken(known))


class Both:
    """Two calls that do one's sequences between them."""

    __slots__ = ("one", "other")

    def __init__(self, one, other):
        self.one, self.other = one, other

    def __call__(self, *given):
        self.one(*given)
        self.other(*given)
