"""What is timed for the model of time: tiles, weights and token counts; and a rough model that says what is worth it.

CHECKED weights are timed and never fitted: how well the model chooses is told on them.
"""
from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import cycle

import torch

from ...ops.matmul.cost import Rates, Tile
from ...ops.matmul.schedule import SHARED, Schedule
from ...ops.matmul.ways import variants

TILES = """
pointer 16x16x256 warps=2 stages=6 group=1 swap
pointer 16x32x128 warps=2 stages=6 group=1 swap
pointer 16x32x256 warps=4 stages=6 group=1 swap
pointer 16x32x512 warps=4 stages=4 group=1 swap
pointer 32x32x128 warps=2 stages=6 group=1 swap
pointer 32x32x256 warps=4 stages=4 group=1 swap
pointer 64x32x128 warps=4 stages=6 group=1 swap
pointer 64x64x64 warps=4 stages=4 group=8
pointer 128x128x64 warps=8 stages=3 group=8
tma 16x64x128 warps=4 stages=8 group=1 swap
tma 16x64x256 warps=4 stages=4 group=1 swap
tma 16x128x128 warps=4 stages=3 group=1 swap
tma 32x64x128 warps=4 stages=8 group=1 swap
tma 32x64x256 warps=4 stages=4 group=1 swap
tma 32x128x128 warps=4 stages=3 group=1 swap
tma 64x32x128 warps=4 stages=8 group=1
tma 64x32x128 warps=4 stages=6 group=8
tma 64x64x64 warps=4 stages=6 group=8
tma 64x64x128 warps=4 stages=6 group=1 swap
tma 64x64x128 warps=4 stages=6 group=8
tma 64x128x64 warps=4 stages=4 group=1 swap
tma 64x128x64 warps=4 stages=4 group=8
tma 64x128x128 warps=4 stages=4 group=1 swap
tma 128x64x64 warps=4 stages=6 group=1 swap
tma 128x64x64 warps=4 stages=8 group=8
tma 128x128x64 warps=8 stages=3 group=1 swap
tma 128x128x64 warps=8 stages=3 group=8
tma 128x128x64 warps=8 stages=6 group=8
tma 128x256x64 warps=8 stages=4 group=8 persistent flatten
tma 128x256x64 warps=8 stages=3 group=8 persistent flatten store
tma 256x128x64 warps=8 stages=4 group=16 persistent flatten
hopper 16x64x128 warps=4 stages=8 group=1 swap persistent
hopper 32x64x128 warps=4 stages=8 group=1 swap persistent
hopper 48x64x128 warps=4 stages=6 group=1 swap persistent
hopper 64x64x128 warps=4 stages=6 group=1 swap persistent
hopper 64x128x128 warps=8 stages=4 group=1 swap persistent
hopper 64x64x128 warps=4 stages=6 group=8 persistent
hopper 64x128x64 warps=4 stages=8 group=8 persistent
hopper 64x160x64 warps=4 stages=7 group=8 persistent
hopper 80x128x64 warps=8 stages=6 group=8 swap persistent
hopper 96x128x64 warps=8 stages=6 group=8 swap persistent
hopper 128x64x64 warps=4 stages=8 group=8 swap persistent
hopper 128x128x64 warps=8 stages=6 group=8 persistent
hopper 128x128x64 warps=8 stages=4 group=8 persistent store
hopper 128x128x64 warps=8 stages=6 group=8 swap persistent
hopper 128x128x64 warps=8 stages=4 group=8 swap persistent store
hopper 128x128x64 warps=8 stages=6 group=8 persistent pingpong
hopper 128x128x64 warps=8 stages=5 group=8 persistent store pingpong
hopper 128x160x64 warps=8 stages=6 group=8 persistent
hopper 128x160x64 warps=8 stages=5 group=8 persistent store
hopper 160x128x64 warps=8 stages=5 group=8 swap persistent store
hopper 128x192x64 warps=8 stages=4 group=8 persistent store
hopper 128x192x64 warps=12 stages=4 group=8 swap persistent store
hopper 192x128x64 warps=8 stages=4 group=8 swap persistent store
hopper 192x128x64 warps=12 stages=4 group=8 persistent store
hopper 128x256x64 warps=8 stages=4 group=8 persistent
hopper 128x256x64 warps=8 stages=3 group=8 persistent store
hopper 256x64x64 warps=8 stages=4 group=8 swap persistent store pingpong
hopper 256x128x64 warps=8 stages=4 group=8 persistent
hopper 256x128x64 warps=8 stages=4 group=8 swap persistent
"""
# Timed later, at the same points (cost_added.py). Results in whole lines, which shortens a tile's end; two groups in
# turn, where one tile's end hides behind the next tile's chain; large tiles, which read less of L2 a product. A tensor
# core's instruction of 16 or 32 columns waits for shared memory, so that 144 and 160 pay where tokens are so many.
ADDED = """
hopper 16x64x128 warps=4 stages=8 group=1 swap persistent store
hopper 32x64x128 warps=4 stages=8 group=1 swap persistent store
hopper 48x64x128 warps=4 stages=6 group=1 swap persistent store
hopper 64x64x128 warps=4 stages=6 group=1 swap persistent store
hopper 64x64x128 warps=4 stages=6 group=8 persistent store
hopper 64x96x64 warps=4 stages=10 group=8 persistent store
hopper 64x128x64 warps=4 stages=8 group=8 persistent store
hopper 64x160x64 warps=4 stages=7 group=8 persistent store
hopper 64x192x64 warps=4 stages=6 group=8 persistent store
hopper 80x128x64 warps=8 stages=6 group=8 swap persistent store
hopper 96x64x64 warps=4 stages=10 group=8 swap persistent store
hopper 96x128x64 warps=8 stages=6 group=8 swap persistent store
hopper 128x64x64 warps=4 stages=8 group=8 swap persistent store
hopper 144x128x64 warps=8 stages=6 group=8 swap persistent store
hopper 144x192x64 warps=12 stages=5 group=8 swap persistent store
hopper 144x256x64 warps=8 stages=4 group=8 swap persistent store
hopper 160x256x64 warps=8 stages=4 group=8 swap persistent store
hopper 192x64x64 warps=4 stages=6 group=8 swap persistent store
hopper 192x64x64 warps=12 stages=6 group=8 persistent store
hopper 192x192x64 warps=12 stages=4 group=8 persistent store
hopper 192x192x64 warps=12 stages=4 group=8 swap persistent store
hopper 192x256x64 warps=8 stages=3 group=8 swap persistent store
hopper 256x144x64 warps=8 stages=4 group=8 persistent store
hopper 256x160x64 warps=8 stages=4 group=8 persistent store
hopper 256x192x64 warps=8 stages=3 group=8 persistent store
hopper 64x128x64 warps=8 stages=8 group=16 persistent store pingpong
hopper 64x192x64 warps=8 stages=6 group=16 persistent store pingpong
hopper 64x256x64 warps=8 stages=4 group=16 persistent store pingpong
hopper 96x128x64 warps=8 stages=7 group=8 swap persistent store pingpong
hopper 128x96x64 warps=8 stages=7 group=8 persistent store pingpong
hopper 128x192x64 warps=8 stages=5 group=8 persistent store pingpong
hopper 192x64x64 warps=8 stages=6 group=8 swap persistent store pingpong
hopper 192x128x64 warps=8 stages=5 group=8 swap persistent store pingpong
"""
FLOAT32 = """
pointer 16x32x32 warps=4 stages=3 group=8
pointer 32x32x32 warps=4 stages=3 group=8
pointer 64x64x16 warps=4 stages=3 group=8
pointer 128x128x16 warps=8 stages=3 group=8
"""

# N, K; none is a weight of a model in unseen.py
FITTED = ((4352, 3840), (1152, 7680), (18432, 4608), (384, 6144), (2560, 6400), (8704, 2176), (4608, 12288),
          (896, 3328), (6656, 4224), (2304, 2304), (128, 4096), (10240, 6912), (3200, 3200), (1536, 2688),
          (24576, 7168), (5376, 2816), (640, 1280), (8192, 1280), (2304, 9216), (65536, 3072), (1792, 4480),
          (13312, 3328), (3840, 7936), (256, 2304), (1280, 8192), (8704, 10752), (1000, 1016), (2048, 4608),
          (40960, 2048), (64, 2048), (4104, 2056), (7168, 8192), (1024, 16384))
CHECKED = ((2048, 8192), (1664, 5120), (7680, 3840), (3584, 9728), (11264, 5632), (320, 3072), (4736, 1792))
POINTERS_ALONE = ((1024, 1001), (2052, 4100))  # bulk copies cannot read these
POINTERS_LATER = ((3072, 2562),)  # nor these, whose k is a multiple of 2 alone
TOKENS = ((1, 7, 16), (20, 28, 32), (40, 48, 64), (72, 96, 100, 128), (140, 176, 200), (256, 300), (384, 448, 512),
          (640, 700, 1000), (1024, 1400, 1700), (2048, 2600), (3500, 4096))


def points() -> Iterator[tuple[str, int, int, int]]:
    """(dtype, n, k, tokens) in the order of timing: what is fitted and what is checked turn by turn."""
    turns = [cycle(counts) for counts in TOKENS]
    weights, checked = list(FITTED), list(CHECKED)
    while weights or checked:
        for n, k in [*weights[:5], *checked[:1]]:
            yield from (("bfloat16", n, k, next(turn)) for turn in turns)
        del weights[:5], checked[:1]
    for n, k in POINTERS_ALONE:
        yield from (("bfloat16", n, k, next(turn)) for turn in turns[:9])
    for n, k in ((2560, 2304), (640, 1280), (1152, 4480), (2048, 1792)):
        yield from (("float32", n, k, next(turn)) for turn in turns[:-2])
    for n, k in POINTERS_LATER:
        yield from (("bfloat16", n, k, next(turn)) for turn in turns[:9])


# the rough model

ROUGH = Rates(memory=4.2e6, l2=5.5e6, carry=1.5, wait=0.3, join=1.0, more=2.0, cut=0.2, apart=1.3)


def rough_tiles(dtype: torch.dtype) -> dict[Schedule, Tile]:
    """The tiles for a dtype, and what their quantities may be."""
    lines = FLOAT32 if dtype == torch.float32 else TILES + ADDED
    return {s: rough(s) for s in map(Schedule.parse, filter(None, lines.split("\n")))}


@cache
def added() -> frozenset[Schedule]:
    """Every schedule that came later: with a tile of ADDED, or in lockstep."""
    ways = {line: list(variants(Schedule.parse(line))) for line in filter(None, (TILES + ADDED).split("\n"))}
    return frozenset(s for line, found in ways.items() for s in found if s.lockstep or line in ADDED.split("\n"))


def rough(s: Schedule) -> Tile:
    """What a tile's quantities may be, on a GPU of 6 TFLOP/s a multiprocessor (float32, whose tiles have k <= 32: 0.3).
    """
    area, tflops = s.block_m * s.block_n, 0.3 if s.block_k <= 32 else 6.0
    shared = 2e-6 * area * s.block_k / tflops
    held = 1 if s.persistent else max(1, min(SHARED // (s.shared_bytes + 2048), 65536 // (32 * s.warps * 64 + area)))
    end = 0.3 if s.pingpong else 0.6 if s.store else 1.0  # how much of a tile's end is waited for
    return Tile(3.0, 0.7 + 1.5e-4 * end * area, max(shared, 0.1 + 5e-4 * s.block_k), shared, 1.0, 3.0, held)
