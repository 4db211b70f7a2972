"""Whether a cell fits in the memory of all ranks: found out before any of them waits for another, and said by all."""
from __future__ import annotations

import copy
import dataclasses
import gc
from collections.abc import Callable
from typing import TypeVar, cast

import torch
import torch.nn.functional as F

from ...model.parallel import Ranks, Sharded
from ...ops.all_reduce import ranks as words

T = TypeVar("T")


def together(work: Callable[[], T], ranks: Ranks, what) -> T:
    """work()'s result, once every rank has its own. MemoryError on all of them that names the first without room."""
    found: T | None = None
    lacking = ""
    try:
        found = work()
    except (MemoryError, RuntimeError) as error:
        if not (lacking := _lacking(error)):
            raise
    if lacking:
        emptied()
    every = words.told_objects(lacking, ranks.group)
    for rank, why in enumerate(every):
        if why:
            raise MemoryError(f"{what} does not fit on rank {rank} of {ranks.size}: {why}")
    return cast(T, found)


def _lacking(error: BaseException | None) -> str:
    """What is said of memory by an error, or by one that it hides, as the end of a capture does; '' for others."""
    while error is not None:
        if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
            return (str(error).strip().splitlines() or [type(error).__name__])[0]
        error = error.__context__
    return ""


def alone(model: Sharded) -> Sharded:
    """The same piece, whose products wait for nobody: other numbers in as much memory, for a rehearsal."""
    other, size, shared = copy.copy(model), model.ranks.size, [_no_numbers(model)]

    def linear(x, weight, _):
        y = F.linear(x, weight)
        if weight is model.head:  # gathered, then side by side
            return torch.cat(list(y.new_empty((size, *y.shape))), -1)
        if weight.shape[0] == model.config.hidden_size and shared[0].numel() < 4 * y.numel():
            shared[0] = _no_numbers(model)  # frees the last; parts and results, each up to twice as large as asked for
            shared[0] = y.new_empty(4 * y.numel(), dtype=torch.float32)
        return y
    other.ops = dataclasses.replace(model.ops, linear=linear)
    return other


def _no_numbers(model: Sharded) -> torch.Tensor:
    return torch.empty(0, dtype=torch.float32, device=model.device)


def emptied() -> None:
    """Give back what is not in use: a graph's memory is not another's."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
