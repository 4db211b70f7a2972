"""Hopper's attention kernels: one warp that fetches tiles of queries, keys and values, ahead of the groups.

Named barriers say that a tile has been read by all groups: one a stage from KEYS_READ on, then as many for values;
TURN, one a group, are the groups' own.
"""
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from .hopper_parts import BLOCK, ROWS, bar

STAGES = gl.constexpr(2)  # tiles of keys, and of values, in shared memory
TURN, KEYS_READ = gl.constexpr(8), gl.constexpr(10)  # the first of each
HALF = gl.constexpr(64)  # columns of 16 bits that one copy can place: a row of 128 bytes
NOWHERE = gl.constexpr(1 << 30)  # a row of no cache: a copy from there reads nothing and gives zeros


@gluon.jit
def job_of(jobs_ptr, wave, waves):
    """This program's job of a wave: (row of q at the tile's first position, sequence, tile or -1 for none, head, first
    row and end of the rows that are the sequence's queries). Rows before and behind are a neighbour's."""
    place = jobs_ptr + (wave * gl.num_programs(0) + gl.program_id(0)) * 4
    there = wave < waves
    rows = gl.load(place + 3, there, 0)
    return (gl.load(place, there, 0), gl.load(place + 1, there, 0), gl.load(place + 2, there, -1), rows & 0xFFFF,
            rows >> 16 & 0x7F, (rows >> 24) + 1)


@gluon.jit
def copy(desc, place, full, tile):
    """Fill a tile; the descriptor's block has dimensions of size 1 between."""
    view = tile._reinterpret(desc.dtype, desc.block_shape, desc.layout)
    tma.async_copy_global_to_shared(desc, place, full, view)


@gluon.jit
def fetch(desc, pages_ptr, place, block, head, end, full, tile, table_width, PAGE: gl.constexpr):
    """A block's keys or values into a tile, in pieces that lie in one page each, 64 columns at a time. Pieces from
    position `end` on, if there is one, are zeros."""
    PIECE: gl.constexpr = desc.block_shape[1]
    PIECES: gl.constexpr = BLOCK // PIECE
    HALVES: gl.constexpr = tile.shape[1] // HALF
    parts = tile._reinterpret(desc.dtype, [HALVES * PIECES, 1, PIECE, 1, HALF], desc.layout)
    for n in gl.static_range(PIECES):
        key = block * BLOCK + n * PIECE
        at, row = place, key
        if PAGE > 0:
            at = gl.load(pages_ptr + place * table_width + key // PAGE, key // PAGE < table_width, 0)
            row = key % PAGE
        if end is not None and n > 0:
            row = gl.where(key < end, row, NOWHERE)
        for half in gl.static_range(HALVES):
            tma.async_copy_global_to_shared(desc, [at, row, head, half * HALF], full, parts.index(half * PIECES + n))


@gluon.jit
def fetch_values(desc, pages_ptr, place, block, head, end, full, raw, cleared, tile, table_width,
                 PAGE: gl.constexpr):
    """As `fetch`; values from position `end` on may be anything, and become 0. Returns how many blocks had some."""
    SIZE: gl.constexpr = 2 * BLOCK * tile.shape[1]
    if end < (block + 1) * BLOCK:
        mbarrier.expect(raw, SIZE)
        fetch(desc, pages_ptr, place, block, head, None, raw, tile, table_width, PAGE)
        mbarrier.wait(raw, cleared & 1)
        _clear(tile, end - block * BLOCK)
        mbarrier.arrive(full)
        cleared += 1
    else:
        mbarrier.expect(full, SIZE)
        fetch(desc, pages_ptr, place, block, head, None, full, tile, table_width, PAGE)
    return cleared


@gluon.jit
def _clear(tile, first):
    """Zero a tile's rows from `first` on, by one warp: a weight of zero times NaN is NaN."""
    layout: gl.constexpr = gl.BlockedLayout([2], [32], [1], [0])
    HALVES: gl.constexpr = tile.shape[1] // 64  # rows of 128 bytes lie in sequence, columns 0 to 63 first
    lines = tile._reinterpret(tile.dtype, [HALVES * BLOCK, 64], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    for row in range(first, BLOCK):
        for half in gl.static_range(HALVES):
            lines.index(half * BLOCK + row).store(gl.zeros([64], tile.dtype, layout))
    fence_async_shared()


@gluon.jit
def produce(q_desc, k_desc, v_desc, pages_ptr, jobs_ptr, q_tiles, k_tiles, v_tiles, q_full, q_empty, k_full, v_full,
            v_raw, waves, table_width, GROUP: gl.constexpr, PAGE: gl.constexpr):
    """Fill tiles as they become free, job after job, each from its newest block to its oldest."""
    WIDE: gl.constexpr = q_tiles.shape[2]
    step = 0
    lap = 0
    cleared = 0
    row, place, tile, head, _, end = job_of(jobs_ptr, 0, waves)
    for wave in range(waves):
        if tile >= 0:
            for i in range(tile + 1):
                j = tile - i
                stage = step % STAGES
                if i == 0:
                    mbarrier.wait(q_empty.index(0), (lap + 1) & 1)
                    mbarrier.expect(q_full.index(0), 2 * ROWS * WIDE)
                    copy(q_desc, [row, head, 0], q_full.index(0), q_tiles.index(0))
                bar("sync", KEYS_READ + stage, "288", 1)
                mbarrier.expect(k_full.index(stage), 2 * BLOCK * WIDE)
                fetch(k_desc, pages_ptr, place, j, head // GROUP, None, k_full.index(stage),
                      k_tiles.index(stage), table_width, PAGE)
                if i == 0:
                    mbarrier.wait(q_empty.index(1), (lap + 1) & 1)
                    mbarrier.expect(q_full.index(1), 2 * ROWS * WIDE)
                    copy(q_desc, [row + ROWS, head, 0], q_full.index(1), q_tiles.index(1))
                bar("sync", KEYS_READ + STAGES + stage, "288", 1)
                cleared = fetch_values(v_desc, pages_ptr, place, j, head // GROUP, tile * BLOCK + end,
                                       v_full.index(stage), v_raw, cleared, v_tiles.index(stage), table_width, PAGE)
                step += 1
            lap += 1
            row, place, tile, head, _, end = job_of(jobs_ptr, wave + 1, waves)
    for stage in gl.static_range(STAGES):  # no barrier is left half full
        bar("sync", KEYS_READ + stage, "288", 1)
        bar("sync", KEYS_READ + STAGES + stage, "288", 1)
