"""Schedules of the matrix product that are worth timing for a weight and a number of tokens."""
from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from itertools import product

import torch

from ...ops.matmul.order import order
from ...ops.matmul.schedule import SHARED, Schedule
from ...ops.matmul.ways import Sizes


def candidates(n: int, k: int, tokens: int, dtype=torch.bfloat16, tma: bool = True) -> list[Schedule]:
    """Schedules worth timing for this many tokens, few enough to time in a second. `tma`: the GPU has bulk copies."""
    return fitting(_by_order(tiles(n, tokens, dtype, tma), n, k, tokens), dtype)


def tiles(n: int, tokens: int, dtype: torch.dtype, tma: bool = True) -> list[Schedule]:
    """The tiles among them, whatever the order: segments in sequence."""
    if dtype == torch.float32:
        return list(_float32(tokens))
    few_tiles = min(max(tokens * n // 4096, 65), tokens)  # a narrow weight is cut up as a wide one for fewer tokens
    found = [Schedule.parse(line) for line in dict.fromkeys(_worth_timing(tokens) + _worth_timing(few_tiles))]
    if 16 < tokens <= 32:
        found = [replace(s, block_m=32) for s in found]
    return [s for s in found if tma or s.kind == "pointer"]


def fitting(found: Iterable[Schedule], dtype: torch.dtype) -> list[Schedule]:
    """Each schedule once, of those whose tiles have room in shared memory."""
    return list(dict.fromkeys(s for s in found if s.shared_bytes * dtype.itemsize // 2 <= SHARED))


def _by_order(found, n, k, tokens):
    """The schedules that can carry out the order of (n, k); where it cuts k, also with segments side by side."""
    cut, length = order(n, k)
    if cut == 1:
        shared = [replace(s, stream=True) for s in found if s.kind == "hopper" and _uneven(s, n, tokens)]
        shared += [replace(s, lockstep=True) for s in shared if _together(s, n, tokens)]
        return [s for s in (*found, *shared) if s.block_k <= k]
    found = [s for s in found if not (s.pingpong or length % s.block_k)]
    parallel = [s for s in found if not (s.persistent or s.store)] if tokens <= 2048 else []
    by_last = [replace(s, split=True) for s in parallel] if tokens <= 128 else []
    by_kernel = [replace(s, split=True, reduce=True) for s in parallel] if tokens > 64 else []
    sequential = [s if s.shared_bytes + s.waiting_bytes <= SHARED else replace(s, stages=s.stages - 1) for s in found
                  if s.persistent or tokens > 256 or n >= 2048]
    for s in found if 64 < tokens <= 2048 and k % length == 0 else ():
        if s.kind == "hopper" and not s.store:
            by_kernel.append(replace(s, split=True, reduce=True, stream=_uneven(s, n, tokens, cut)))
    return [*by_last, *by_kernel, *(s for s in sequential if Sizes.of(s).sequence)]


def _uneven(s, n, tokens, cut=1, sms=132) -> bool:
    """Whether whole tiles leave some of `sms` multiprocessors idle at the end, and chains carried over would not."""
    units = -(-tokens // s.block_m) * -(-n // s.block_n) * cut
    return not s.pingpong and units > sms and units % sms > 0


def _together(s, n, tokens, sms=132) -> bool:
    """Whether large tiles can be shared out in lockstep: each tile of tokens has as many programs, all with a chain."""
    abreast = -(-tokens // s.block_m)
    return s.block_m * s.block_n >= 128 * 192 and 1 < abreast <= sms and sms // abreast <= -(-n // s.block_n)


# One list for token counts up to a bound. On an H200 one schedule of each list was within 2 % of the best of hundreds
# at every shape tried; the others are its neighbours, for other shapes and GPUs, and kinds not among those hundreds.
_UP_TO_32 = """
pointer 16x16x256 warps=2 stages=6 group=1 swap
pointer 16x32x128 warps=2 stages=4 group=1 swap
pointer 16x32x128 warps=2 stages=6 group=1 swap
pointer 16x32x256 warps=4 stages=4 group=1 swap
pointer 16x32x256 warps=4 stages=6 group=1 swap
pointer 16x32x512 warps=4 stages=4 group=1 swap
tma 16x64x128 warps=4 stages=6 group=1 swap
tma 16x64x128 warps=4 stages=8 group=1 swap
tma 16x64x256 warps=4 stages=4 group=1 swap
tma 16x128x128 warps=4 stages=3 group=1 swap
hopper 16x64x128 warps=4 stages=8 group=1 swap persistent
hopper 16x64x128 warps=4 stages=8 group=1 swap persistent store
"""
_UP_TO_64 = """
pointer 64x16x256 warps=4 stages=3 group=1 swap
pointer 64x32x128 warps=4 stages=6 group=1 swap
pointer 64x32x256 warps=4 stages=4 group=1 swap
tma 64x64x64 warps=4 stages=8 group=1 swap
tma 64x64x128 warps=4 stages=4 group=1 swap
tma 64x64x128 warps=4 stages=6 group=1 swap
tma 64x64x256 warps=4 stages=3 group=1 swap
tma 64x128x64 warps=4 stages=4 group=1 swap
tma 64x128x128 warps=4 stages=3 group=1 swap
tma 64x128x128 warps=4 stages=4 group=1 swap
tma 64x32x128 warps=4 stages=8 group=1
hopper 64x64x128 warps=4 stages=6 group=1 swap persistent
hopper 64x128x128 warps=8 stages=4 group=1 swap persistent
hopper 64x64x128 warps=4 stages=6 group=1 swap persistent store
"""
_UP_TO_128 = """
pointer 64x64x64 warps=4 stages=4 group=8
tma 64x32x128 warps=4 stages=6 group=8
tma 128x32x64 warps=4 stages=8 group=8
tma 64x64x64 warps=4 stages=6 group=8
tma 64x64x64 warps=4 stages=8 group=8
tma 64x64x64 warps=4 stages=12 group=8
tma 64x64x128 warps=4 stages=4 group=8
tma 64x64x128 warps=4 stages=6 group=8
tma 64x128x64 warps=4 stages=6 group=8
tma 128x64x64 warps=4 stages=6 group=8
tma 128x64x64 warps=4 stages=8 group=8
tma 128x64x64 warps=4 stages=6 group=1 swap
tma 128x128x64 warps=8 stages=3 group=1 swap
tma 128x128x64 warps=8 stages=6 group=8
hopper 64x64x128 warps=4 stages=6 group=8 persistent
hopper 64x64x128 warps=4 stages=8 group=8 persistent
hopper 128x64x64 warps=8 stages=8 group=8 persistent
hopper 128x64x128 warps=8 stages=4 group=8 persistent
hopper 64x128x64 warps=8 stages=8 group=8 swap persistent
hopper 128x128x64 warps=8 stages=6 group=8 persistent
hopper 64x128x64 warps=4 stages=8 group=8 persistent
hopper 128x64x64 warps=4 stages=8 group=8 swap persistent
hopper 128x48x64 warps=8 stages=8 group=8 persistent
hopper 64x64x128 warps=4 stages=6 group=8 persistent store
hopper 64x96x64 warps=4 stages=10 group=8 persistent store
hopper 64x128x64 warps=4 stages=8 group=8 persistent store
hopper 128x64x64 warps=4 stages=8 group=8 swap persistent store
"""
_UP_TO_256 = """
tma 64x64x64 warps=4 stages=4 group=8
tma 64x64x64 warps=4 stages=6 group=8
tma 64x128x64 warps=4 stages=4 group=8
tma 64x128x64 warps=4 stages=6 group=8
tma 128x64x64 warps=4 stages=6 group=8
tma 128x128x64 warps=8 stages=3 group=8
tma 128x128x64 warps=8 stages=6 group=8
tma 128x256x64 warps=8 stages=4 group=8 persistent flatten
hopper 128x64x64 warps=8 stages=8 group=8 persistent
hopper 64x128x64 warps=8 stages=8 group=8 swap persistent
hopper 128x128x64 warps=8 stages=6 group=8 persistent
hopper 128x128x64 warps=8 stages=6 group=8 swap persistent
hopper 128x128x64 warps=8 stages=6 group=8 persistent pingpong
hopper 128x192x64 warps=12 stages=4 group=8 swap persistent store
hopper 128x256x64 warps=8 stages=4 group=8 persistent
hopper 64x128x64 warps=4 stages=8 group=8 persistent
hopper 128x64x64 warps=4 stages=8 group=8 swap persistent
hopper 64x80x64 warps=4 stages=8 group=8 persistent
hopper 128x96x64 warps=8 stages=6 group=8 persistent
hopper 64x128x64 warps=4 stages=8 group=8 persistent store
hopper 96x128x64 warps=8 stages=6 group=8 swap persistent store
hopper 192x64x64 warps=12 stages=6 group=8 persistent store
hopper 192x192x64 warps=12 stages=4 group=8 swap persistent store
hopper 192x256x64 warps=8 stages=3 group=8 swap persistent store
hopper 64x128x64 warps=8 stages=8 group=16 persistent store pingpong
hopper 64x256x64 warps=8 stages=4 group=16 persistent store pingpong
"""
_UP_TO_1024 = """
tma 64x128x64 warps=4 stages=6 group=8
tma 128x64x64 warps=4 stages=6 group=8
tma 128x128x64 warps=8 stages=3 group=8
tma 128x128x64 warps=8 stages=6 group=8
tma 128x256x64 warps=8 stages=4 group=8 persistent flatten
tma 128x256x64 warps=8 stages=3 group=8 persistent flatten store
hopper 128x64x64 warps=8 stages=6 group=8 persistent
hopper 64x128x64 warps=8 stages=6 group=8 swap persistent
hopper 128x128x64 warps=8 stages=6 group=8 persistent
hopper 128x128x64 warps=8 stages=6 group=8 swap persistent
hopper 128x128x64 warps=8 stages=4 group=8 swap persistent store
hopper 128x128x64 warps=8 stages=5 group=8 persistent store pingpong
hopper 256x64x64 warps=8 stages=4 group=8 swap persistent store pingpong
hopper 192x128x64 warps=12 stages=4 group=8 persistent store
hopper 128x192x64 warps=12 stages=4 group=8 swap persistent store
hopper 128x256x64 warps=8 stages=4 group=8 persistent
hopper 256x128x64 warps=8 stages=4 group=8 swap persistent
hopper 256x128x64 warps=8 stages=4 group=8 persistent
hopper 128x256x64 warps=8 stages=3 group=8 persistent store
hopper 64x128x64 warps=4 stages=8 group=8 persistent
hopper 128x64x64 warps=4 stages=8 group=8 swap persistent
hopper 64x160x64 warps=4 stages=7 group=8 persistent
hopper 128x160x64 warps=8 stages=6 group=8 persistent
hopper 128x192x64 warps=8 stages=4 group=8 persistent store
hopper 64x128x64 warps=4 stages=8 group=8 persistent store
hopper 144x128x64 warps=8 stages=6 group=8 swap persistent store
hopper 144x192x64 warps=12 stages=5 group=8 swap persistent store
hopper 144x256x64 warps=8 stages=4 group=8 swap persistent store
hopper 160x256x64 warps=8 stages=4 group=8 swap persistent store
hopper 192x192x64 warps=12 stages=4 group=8 persistent store
hopper 192x192x64 warps=12 stages=4 group=8 swap persistent store
hopper 192x256x64 warps=8 stages=3 group=8 swap persistent store
hopper 256x192x64 warps=8 stages=3 group=8 persistent store
hopper 64x192x64 warps=8 stages=6 group=16 persistent store pingpong
hopper 64x256x64 warps=8 stages=4 group=16 persistent store pingpong
hopper 128x96x64 warps=8 stages=7 group=8 persistent store pingpong
hopper 128x192x64 warps=8 stages=5 group=8 persistent store pingpong
hopper 192x128x64 warps=8 stages=5 group=8 swap persistent store pingpong
"""
_MORE = """
tma 128x256x64 warps=8 stages=4 group=8 persistent flatten
tma 128x256x64 warps=8 stages=4 group=16 persistent flatten
tma 128x256x64 warps=8 stages=3 group=8 persistent flatten store
tma 128x256x64 warps=8 stages=3 group=16 persistent flatten store
tma 256x128x64 warps=8 stages=4 group=16 persistent flatten
hopper 128x128x64 warps=8 stages=6 group=8 persistent
hopper 128x128x64 warps=8 stages=6 group=8 swap persistent
hopper 128x128x64 warps=8 stages=4 group=8 persistent store
hopper 128x128x64 warps=8 stages=5 group=8 persistent store pingpong
hopper 192x128x64 warps=12 stages=4 group=8 persistent store
hopper 128x192x64 warps=12 stages=4 group=8 swap persistent store
hopper 128x256x64 warps=8 stages=4 group=8 persistent
hopper 256x128x64 warps=8 stages=4 group=8 swap persistent
hopper 256x128x64 warps=8 stages=4 group=8 persistent
hopper 128x256x64 warps=8 stages=3 group=8 persistent store
hopper 128x160x64 warps=8 stages=6 group=8 persistent
hopper 128x160x64 warps=8 stages=5 group=8 persistent store
hopper 128x192x64 warps=8 stages=4 group=8 persistent store
hopper 192x192x64 warps=12 stages=4 group=8 persistent store
hopper 192x192x64 warps=12 stages=4 group=8 swap persistent store
hopper 192x256x64 warps=8 stages=3 group=8 swap persistent store
hopper 256x160x64 warps=8 stages=4 group=8 persistent store
hopper 256x192x64 warps=8 stages=3 group=8 persistent store
hopper 128x192x64 warps=8 stages=5 group=8 persistent store pingpong
hopper 192x128x64 warps=8 stages=5 group=8 swap persistent store pingpong
"""
_WORTH_TIMING = tuple((bound, text.split("\n")[1:-1]) for bound, text in (
    (32, _UP_TO_32), (64, _UP_TO_64), (128, _UP_TO_128), (256, _UP_TO_256), (1024, _UP_TO_1024), (math.inf, _MORE)))


def _worth_timing(tokens) -> list[str]:
    return next(lines for bound, lines in _WORTH_TIMING if tokens <= bound)


def _float32(tokens):
    sizes = ((16, 32), (16, 64), (32, 32)) if tokens <= 64 else ((64, 64), (64, 128), (128, 128), (32, 64))
    for (m, n), block_k, warps, stages in product(sizes, (16, 32), (4, 8), (2, 3) if tokens <= 64 else (3,)):
        yield Schedule("pointer", m, n, block_k, warps, stages)
