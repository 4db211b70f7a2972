"""Schedules worth timing for a product whose order is a tree, the one that several GPUs can share."""
from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch

from ... import runtime
from ...op import Shape
from ...ops.matmul.op import matmul as op
from ...ops.matmul.order import LEAVES, shared_order
from ...ops.matmul.schedule import Schedule, Unsuitable
from ...ops.matmul.shared_schedule import choose_shared, suits_leaves
from .candidates import fitting, tiles


def shared_candidates(n: int, k: int, tokens: int, dtype=torch.bfloat16, tma: bool = True) -> list[Schedule]:
    """Tiles that are worth timing for an order in sequence, of those that a tree can have, and what is chosen today.

    `tma`: the GPU has bulk copies. Needs Triton, whose kernels say what they can carry out.
    """
    given = op.inputs(tokens, Shape(N=n, K=k, gpus=LEAVES), dtype, "meta")
    index = runtime.current_device() if runtime.HAS_GPU else -1
    today = [s for s in choose_shared(Shape(N=n, K=k), dtype, tokens, index) if tma or s.kind == "pointer"]
    found = fitting([*_ways(tiles(n, tokens, dtype, tma), n, k, tokens), *today], dtype)
    return [s for s in found if suits_leaves(s, shared_order(n, k).length) and _suits(s, given)]


def _ways(found: Iterable[Schedule], n: int, k: int, tokens: int) -> Iterator[Schedule]:
    """Each tile with its leaves in sequence and, for few tokens, side by side; a block of k that divides a leaf."""
    length = shared_order(n, k).length
    for tile in found:
        blocks = (b for b in (tile.block_k, 128, 64, 32) if b <= tile.block_k and not length % b)
        s = replace(tile, block_k=next(blocks, tile.block_k), pingpong=False, stream=False, specialize=False)
        if s.kind != "hopper":
            s = replace(s, persistent=False, flatten=False, store=False)
        yield s
        if tokens <= 128 and s.kind != "hopper":
            yield replace(s, split=True)
        if 64 < tokens <= 2048 and not s.store:
            yield replace(s, split=True, reduce=True)


def _suits(schedule: Schedule, given: tuple) -> bool:
    try:
        return bool(op.call.launches(schedule, *given))
    except Unsuitable:
        return False
