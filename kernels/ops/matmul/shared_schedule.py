"""Which schedule for a product whose order is a tree: measured ones in a section of the GPU's table, or a rule."""
from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch

from ...op import Shape
from .order import shared_order
from .schedule import Schedule, gpu, measured, shared_memory

SECTION = "matmul_shared"  # of a table


def choose_shared(shape, dtype: torch.dtype, tokens: int, index: int = -1) -> Iterator[Schedule]:
    """Schedules for `tokens` rows on GPU `index` (-1: none), best first; as `choose` for an order in sequence."""
    n, k = Shape.parse(shape)["N"], Shape.parse(shape)["K"]
    found = (*measured(SECTION, n, k, dtype, tokens, index), *rule(n, k, dtype, tokens, index))
    return iter(dict.fromkeys(found))


def rule(n: int, k: int, dtype: torch.dtype, tokens: int, index: int = -1) -> Iterator[Schedule]:
    """Schedules for a shape that was not measured, from the one we expect to be fastest to one that runs anywhere."""
    (capability, sms), length = gpu(index), shared_order(n, k).length
    most = shared_memory(capability)
    for schedule in _guesses(n, dtype, tokens, capability, sms):
        if suits_leaves(schedule, length) and schedule.shared_bytes * dtype.itemsize // 2 <= most:
            yield schedule
    yield Schedule("pointer", 32, 32, 32, warps=4, stages=2)


def suits_leaves(schedule: Schedule, length: int) -> bool:
    """Whether a leaf is whole blocks of k, at least two of them where leaves follow each other."""
    return not length % schedule.block_k and (schedule.split or length >= 2 * schedule.block_k)


def _guesses(n, dtype, tokens, capability, sms) -> Iterator[Schedule]:
    if dtype == torch.float32:
        yield Schedule("pointer", 16 if tokens <= 16 else 32, 32, 32, warps=4, stages=3, split=tokens <= 64)
        return
    width = max(16, 1 << max(tokens - 1, 0).bit_length())
    if capability == (9, 0):
        yield from _on_hopper(n, tokens, width, sms)
    if width <= 64:
        rows = 16 if n < 4096 and width == 16 else 32
        for block_k in (256, 128, 64, 32):
            yield Schedule("pointer", width, rows, block_k, warps=4, stages=4, group=1, swap=True)
        return
    for block_k in (64, 32):
        if capability >= (9, 0):
            yield Schedule("tma", 64, 64, block_k, warps=4, stages=6)
        yield Schedule("pointer", 64, 64, block_k, warps=4, stages=3)


def _on_hopper(n, tokens, width, sms) -> Iterator[Schedule]:
    """The largest tile of which there are enough for every multiprocessor, or nearly."""
    if width <= 64:
        yield Schedule("hopper", width, 64, 128, warps=4, stages=8 if width < 64 else 6, group=1, swap=True,
                       persistent=True)
    elif -(-tokens // 128) * -(-n // 128) >= 0.9 * sms:
        yield Schedule("hopper", 128, 128, 64, warps=8, stages=5, persistent=True, store=True)
    elif -(-tokens // 64) * -(-n // 128) >= 0.9 * sms:
        yield Schedule("hopper", 64, 128, 64, warps=4, stages=8, persistent=True)
    else:
        yield Schedule("hopper", 64, 64, 128, warps=4, stages=6, persistent=True)
    yield Schedule("hopper", min(width, 64), 64, 64, warps=4, stages=8, swap=True, persistent=True)
    if width > 64:
        yield Schedule("hopper", 64, 64, 32, warps=4, stages=8, persistent=True)


def tested_shared(n: int, k: int, dtype: torch.dtype, gpus: Iterable[int] = (-1,)) -> list[Schedule]:
    """Schedules of every kind that can carry out the tree of (n, k), those that are chosen on `gpus` among them."""
    length = shared_order(n, k).length
    chosen = [s for tokens in (1 << i for i in range(18)) for index in gpus
              for s in choose_shared(Shape(N=n, K=k), dtype, tokens, index)]
    lines = _TESTED_FLOAT32 if dtype == torch.float32 else _TESTED
    tiles = [Schedule.parse(line) for line in lines.strip().splitlines()]
    every = tiles + [replace(s, swap=not s.swap) for s in tiles if s.kind == "pointer"]
    return [s for s in dict.fromkeys(chosen + every) if suits_leaves(s, length)
            and not (s.kind == "hopper" and s.split and k % length)]


_TESTED = """
pointer 16x16x16 warps=1 stages=2 group=8
pointer 16x128x32 warps=4 stages=3 group=8
pointer 64x64x64 warps=8 stages=3 group=2
pointer 32x64x32 warps=4 stages=3 group=8 split
pointer 64x32x32 warps=4 stages=3 group=8 split reduce
tma 64x64x64 warps=4 stages=6 group=8
tma 16x64x32 warps=4 stages=4 group=1 swap
tma 64x32x32 warps=4 stages=4 group=8 split
tma 64x32x64 warps=4 stages=4 group=8 swap split reduce
hopper 64x16x64 warps=4 stages=8 group=8 persistent
hopper 64x64x32 warps=4 stages=8 group=8 persistent
hopper 16x64x64 warps=4 stages=8 group=1 swap persistent
hopper 64x128x64 warps=4 stages=8 group=8 persistent
hopper 128x64x64 warps=8 stages=8 group=8 persistent store
hopper 128x128x64 warps=8 stages=5 group=8 persistent
hopper 128x128x64 warps=8 stages=5 group=8 persistent store
hopper 128x128x64 warps=8 stages=4 group=8 swap persistent store
hopper 128x128x64 warps=8 stages=4 group=8 split persistent reduce
"""
_TESTED_FLOAT32 = """
pointer 16x16x16 warps=4 stages=2 group=8
pointer 32x64x32 warps=4 stages=2 group=8
pointer 32x32x32 warps=4 stages=3 group=8 split
pointer 64x16x32 warps=4 stages=2 group=8 split reduce
"""
