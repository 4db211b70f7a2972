"""The sum of every GPU's part of a product, under an op's three names.

It is not among `kernels.OPS`: what walks over those calls each op in one process, and here every rank has to make the
same call at the same time. Its words are an op's otherwise.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ... import bits
from ...op import Shape, Work
from . import call, order, ranks
from .schedule import Schedule, choose, every
from .symmetric import WORKSPACES


@dataclass(frozen=True)
class AllReduce:
    """One sum over ranks. Every word takes (part, bias=None, dtype=None, group=None); each rank makes the same call.

    cuda      the default: torch.distributed's all_reduce, NCCL's on GPUs, gloo's on a CPU
    python    the specification: every part gathered, then added in the order
    triton    a schedule of choice, the specification's bits
    """

    cuda: Callable
    python: Callable
    triton: Callable
    name: str = "all_reduce"
    title: str = "Sum over GPUs"
    order: str = "one part a GPU, added in pairs: what is left of a tree of eight leaves of k"
    shapes: tuple[str, ...] = ("N=4096", "N=8192")

    @property
    def implementations(self) -> dict[str, Callable]:
        """Every contender by name."""
        return {"cuda": self.cuda, "python": self.python, "triton": self.triton}

    def run_schedule(self, schedule, *arguments, **named) -> torch.Tensor:
        """One given schedule, with the arguments, results and bits of the rest."""
        return call.run_schedule(schedule, *arguments, **named)

    def room(self, shape: tuple[int, ...], device, group=None) -> torch.Tensor:
        """Where a part may be made so that the next call need not copy it."""
        return call.room(shape, device, group)

    def schedules(self, device, group=None) -> list[Schedule]:
        """Every schedule that must give the same bits on these ranks."""
        return every(WORKSPACES.can(torch.device(device), group))

    def schedule(self, tokens: int, shape, device, group=None) -> str:
        """The one that `triton` picks."""
        device = torch.device(device)
        return str(choose(tokens * Shape.parse(shape, "N")["N"], ranks.size(group), WORKSPACES.can(device, group)))

    def inputs(self, tokens: int, shape, device="cpu", rank: int = 0, seed: int = 0) -> tuple[torch.Tensor]:
        """This rank's part (tokens, N) of numbers that are the same on every machine."""
        return (bits.portable(tokens, Shape.parse(shape, "N")["N"], torch.float32, device, seed + 1000 * rank),)

    def work(self, tokens: int, shape, dtype=torch.bfloat16) -> Work:
        """The least: a part read and a result written, on one GPU."""
        elements = tokens * Shape.parse(shape, "N")["N"]
        return Work(bytes=elements * (4 + dtype.itemsize), flops=elements)

    def __repr__(self):
        return f"<{self.name}: {self.title}>"


all_reduce = AllReduce(order.default, order.specified, call.scheduled)
