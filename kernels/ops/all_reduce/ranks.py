"""What ranks of torch.distributed send each other, and what is said when one of them does not answer.

`group` is a process group, or None for all ranks. A group of one sends nothing.
"""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist


class Lost(RuntimeError):
    """A rank ended, or did not come in time, while the others waited for it."""


def joined_in() -> bool:
    """Whether this process belongs to ranks."""
    return dist.is_available() and dist.is_initialized()


def size(group=None) -> int:
    """How many ranks there are. RuntimeError where this process is none of any."""
    if not joined_in():
        raise RuntimeError("this process is no rank: start it by torchrun, and join the others with "
                           "kernels.model.parallel.join()")
    if (count := dist.get_world_size(group)) < 1:
        raise RuntimeError("this process is no rank of the group")
    return count


def number(group=None) -> int:
    """This process's rank in the group."""
    return dist.get_rank(group)


def gathered(tensor: torch.Tensor, group=None) -> list[torch.Tensor]:
    """Every rank's tensor, in the order of ranks; all of one shape and dtype."""
    count, tensor = size(group), tensor.contiguous()
    if count == 1:
        return [tensor]
    flat = torch.empty((count, *tensor.shape), dtype=tensor.dtype, device=tensor.device)
    with _told("all_gather", group):
        _all_gather(flat.view(-1), tensor.view(-1), group=group)
    return list(flat.unbind())


def exchanged(pieces: torch.Tensor, group=None) -> torch.Tensor:
    """(ranks, ...) -> (ranks, ...): piece i goes to rank i, and what comes back is rank i's piece for us."""
    if size(group) == 1:
        return pieces
    got = torch.empty_like(pieces, memory_format=torch.contiguous_format)
    with _told("all_to_all", group):
        dist.all_to_all_single(got, pieces.contiguous(), group=group)
    return got


def summed(tensor: torch.Tensor, group=None) -> torch.Tensor:
    """The library's own sum of every rank's contiguous tensor, in place, in the order that it likes."""
    if size(group) > 1:
        with _told("all_reduce", group):
            dist.all_reduce(tensor, group=group)
    return tensor


def told_objects(value, group=None) -> list:
    """Every rank's picklable value, in the order of ranks: for what is said once, at the start."""
    if size(group) == 1:
        return [value]
    values = [None] * size(group)
    with _told("all_gather", group):
        dist.all_gather_object(values, value, group=group)
    return values


def _all_gather(out, tensor, group):
    """Its name before and after torch 2.13."""
    getattr(dist, "all_gather_single", dist.all_gather_into_tensor)(out, tensor, group=group)


@contextmanager
def _told(what: str, group) -> Iterator[None]:
    """Say by rank what a backend says of sockets."""
    try:
        yield
    except RuntimeError as error:
        text = str(error).strip()
        lines = text.splitlines()
        raise Lost(f"rank {number(group)} of {size(group)} was in {what}, and another rank ended or did not come in "
                   f"time ({lines[-1].strip() if lines else type(error).__name__})") from error
