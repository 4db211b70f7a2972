"""Hopper's kernel of leaves: what fetches keys and values, and what a group of four warps does with its rows."""
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ...arithmetic.elementary import for_kernels
from .hopper_load import HALF, KEYS_READ, TURN, fetch
from .hopper_parts import (
    BLOCK,
    LN2,
    LOWEST,
    ROWS,
    bar,
    barrier,
    for_rows_of,
    join,
    log,
    reciprocal,
    rows_of,
    scores,
    seen,
    tile_layout,
    weighed,
)
from .hopper_tile import LEAF, advance
from .work import FIELDS as FIELDS_NUMBER

FIELDS = for_kernels(FIELDS_NUMBER)


@gluon.jit
def line_of(work_ptr, wave, waves):
    """This program's line of a wave, as in hopper_spread.dealt; no rows where it has none."""
    place, there = work_ptr + (wave * gl.num_programs(0) + gl.program_id(0)) * FIELDS, wave < waves
    rows = gl.load(place + 2, there, 0)
    return (gl.load(place, there, 0), gl.load(place + 1, there, 0), rows, gl.load(place + 3, there, 0),
            gl.load(place + 4, there, 0), gl.load(place + 5, there, 0), gl.load(place + 6, there, -1),
            gl.load(place + 7, there, 0))


@gluon.jit
def newest_block(row, rows, first, leaf, HEIGHT: gl.constexpr, GROUP: gl.constexpr):
    """The newest block of a leaf that the rows of a tile see."""
    newest = first + (gl.minimum(row + HEIGHT, rows) - 1) // GROUP
    return gl.minimum(leaf * LEAF + LEAF - 1, newest // BLOCK)


@gluon.jit
def _fetch_queries(q_desc, q_tiles, q_full, q_empty, token, row, head, lap, GROUP: gl.constexpr,
                   QUERIES: gl.constexpr):
    """A tile of queries, of which there are QUERIES in turn: a part for each group of warps."""
    GROUPS: gl.constexpr = q_tiles.shape[0] // QUERIES
    HIGH: gl.constexpr = q_tiles.shape[1]
    WIDE: gl.constexpr = q_tiles.shape[2]
    for group in gl.static_range(GROUPS):
        at = lap % QUERIES * GROUPS + group
        mbarrier.wait(q_empty.index(at), (lap // QUERIES + 1) & 1)
        mbarrier.expect(q_full.index(at), 2 * HIGH * WIDE)
        parts = q_tiles.index(at)._reinterpret(q_desc.dtype, [WIDE // HALF] + q_desc.block_shape, q_desc.layout)
        for half in gl.static_range(WIDE // HALF):
            tma.async_copy_global_to_shared(q_desc, [token + (row + group * HIGH) // GROUP, head, 0, half * HALF],
                                            q_full.index(at), parts.index(half))


@gluon.jit
def produce(q_desc, k_desc, v_desc, pages_ptr, work_ptr, q_tiles, k_tiles, v_tiles, q_full, q_empty, k_full,
            v_full, waves, table_width, KV_HEADS: gl.constexpr, GROUP: gl.constexpr, PAGE: gl.constexpr,
            QUERIES: gl.constexpr, PDL: gl.constexpr):
    """Fill tiles as they become free, leaf after leaf, each from its newest block to its oldest."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    GROUPS: gl.constexpr = q_tiles.shape[0] // QUERIES
    HIGH: gl.constexpr = q_tiles.shape[1]
    STAGES: gl.constexpr = k_tiles.shape[0]
    WIDE: gl.constexpr = k_tiles.shape[2]
    ALL: gl.constexpr = "288" if GROUPS == 2 else "160"
    step = 0
    lap = 0
    for wave in range(waves):
        token, row, rows, first, length, place, leaf, slot = line_of(work_ptr, wave, waves)
        if rows > row:
            head = slot % KV_HEADS
            last = newest_block(row, rows, first, leaf, GROUPS * HIGH, GROUP)
            for j in range(last - leaf * LEAF + 1):
                stage = step % STAGES
                if j == 0:
                    _fetch_queries(q_desc, q_tiles, q_full, q_empty, token, row, head, lap, GROUP, QUERIES)
                bar("sync", KEYS_READ + stage, ALL, 1)
                mbarrier.expect(k_full.index(stage), 2 * BLOCK * WIDE)
                fetch(k_desc, pages_ptr, place, last - j, head, length, k_full.index(stage),
                      k_tiles.index(stage), table_width, PAGE)
                bar("sync", KEYS_READ + STAGES + stage, ALL, 1)
                mbarrier.expect(v_full.index(stage), 2 * BLOCK * WIDE)
                fetch(v_desc, pages_ptr, place, last - j, head, length, v_full.index(stage),
                      v_tiles.index(stage), table_width, PAGE)
                step += 1
            lap += 1
    for stage in gl.static_range(STAGES):  # no barrier is left half full
        bar("sync", KEYS_READ + stage, ALL, 1)
        bar("sync", KEYS_READ + STAGES + stage, ALL, 1)


@gluon.jit
def _clear(tile, first):
    """Zero a tile's rows from `first` on, by a group of warps: a weight of zero times NaN is NaN.

    Each group does so before it reads them, and need not know of the other, which writes the same.
    """
    for power in gl.static_range(7):
        first = _clear_if_odd(tile, first, 1 << power)
    fence_async_shared()
    barrier()


@gluon.jit
def _clear_if_odd(tile, first, MANY: gl.constexpr):
    """Zero MANY rows if `first` is an odd multiple of them; the row behind them. Few stores: barriers lie between."""
    if first & MANY:
        HALVES: gl.constexpr = tile.shape[1] // HALF  # rows of 128 bytes lie in sequence, columns 0 to 63 first
        parts = tile._reinterpret(tile.dtype, [HALVES * BLOCK // MANY, MANY * HALF],
                                  gl.SwizzledSharedLayout(1, 1, 1, [0]))
        zeros = gl.zeros([MANY * HALF], tile.dtype, gl.BlockedLayout([8], [32], [4], [0]))
        for half in gl.static_range(HALVES):
            parts.index((half * BLOCK + first) // MANY).store(zeros)
        first += MANY
    return first


@gluon.jit
def consume(o_ptr, lse_ptr, part_ptr, work_ptr, q_tiles, k_tiles, v_tiles, q_full, q_empty, k_full, v_full, waves,
            count, height, scale, NUMBER: gl.constexpr, KV_HEADS: gl.constexpr, GROUP: gl.constexpr,
            WIDTH: gl.constexpr, QUERIES: gl.constexpr, PDL: gl.constexpr):
    """Group NUMBER's rows of each leaf."""
    if PDL:
        gdc_wait()
    GROUPS: gl.constexpr = q_tiles.shape[0] // QUERIES
    WIDE: gl.constexpr = q_tiles.shape[2]
    STAGES: gl.constexpr = k_tiles.shape[0]
    BF16: gl.constexpr = q_tiles.dtype == gl.bfloat16
    ALL: gl.constexpr = "288" if GROUPS == 2 else "160"
    inner = NUMBER * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, tile_layout(BLOCK)))  # rows of the tile
    step = 0
    lap = 0
    if NUMBER == 1:
        bar("arrive", TURN, "256", 4)
    for stage in gl.static_range(STAGES):  # all tiles are free
        bar("arrive", KEYS_READ + stage, ALL, 4)
        bar("arrive", KEYS_READ + STAGES + stage, ALL, 4)
    token, row, rows, first, length, _, leaf, slot = line_of(work_ptr, 0, waves)
    for wave in range(waves):
        if rows > row:
            last = newest_block(row, rows, first, leaf, GROUPS * ROWS, GROUP)
            blocks = last - leaf * LEAF + 1
            position = first + (row + inner) // GROUP
            turn = lap % QUERIES * GROUPS + NUMBER
            q = q_tiles.index(turn)
            mbarrier.wait(q_full.index(turn), lap // QUERIES & 1)
            mbarrier.wait(k_full.index(step % STAGES), step // STAGES & 1)
            s = warpgroup_mma_wait(0, (scores(q, k_tiles.index(step % STAGES)),))
            bar("arrive", KEYS_READ + step % STAGES, ALL, 4)
            acc = gl.zeros([ROWS, WIDE], gl.float32, tile_layout(WIDE))
            m = gl.full([ROWS], LOWEST, gl.float32, gl.SliceLayout(1, tile_layout(BLOCK)))
            p, m, sums = weighed(seen(s, position, last * BLOCK), m, scale, BF16)
            if length < (last + 1) * BLOCK:  # values behind the last key may be anything
                mbarrier.wait(v_full.index(step % STAGES), step // STAGES & 1)
                _clear(v_tiles.index(step % STAGES), length - last * BLOCK)
            step += 1
            if blocks > 1:  # a tile's rows may lie on either side of a block's edge
                p, acc, m, sums = advance(q, k_tiles, v_tiles, k_full, v_full, False, step, scale, p, acc, m, sums,
                                          position, (last - 1) * BLOCK, NUMBER, GROUPS, True)
                step += 1
            for _ in range(blocks - 2):
                p, acc, m, sums = advance(q, k_tiles, v_tiles, k_full, v_full, True, step, scale, p, acc, m, sums,
                                          position, 0, NUMBER, GROUPS, False)
                step += 1
            mbarrier.arrive(q_empty.index(turn))
            next_line = line_of(work_ptr, wave + 1, waves)
            before = (step + STAGES - 1) % STAGES
            mbarrier.wait(v_full.index(before), (step - 1) // STAGES & 1)
            acc = warpgroup_mma(p, v_tiles.index(before), acc, use_acc=blocks > 1, is_async=True)
            total = join(sums, m)
            acc, p = warpgroup_mma_wait(0, (acc, p))
            bar("arrive", KEYS_READ + STAGES + before, ALL, 4)
            real = row + inner < rows
            if part_ptr is None:
                at = (token + (row + inner) // GROUP).to(gl.int64) * (KV_HEADS * GROUP) \
                    + slot % KV_HEADS * GROUP + (row + inner) % GROUP
                _result(o_ptr, lse_ptr, acc, m, total, at, real, WIDTH)
            else:
                _left(part_ptr, acc, m, total, slot.to(gl.int64) * height + inner, real, count)
            lap += 1
            token, row, rows, first, length, _, leaf, slot = next_line
        else:
            token, row, rows, first, length, _, leaf, slot = line_of(work_ptr, wave + 1, waves)
    if (NUMBER == 0) & (GROUPS == 2):
        bar("sync", TURN, "256", 4)  # no barrier is left half full


@gluon.jit
def _left(part_ptr, acc, m, total, at, real, count):
    """A leaf's three for the launch that joins."""
    WIDE: gl.constexpr = acc.shape[1]
    columns = gl.arange(0, WIDE, gl.SliceLayout(0, acc.type.layout))
    gl.store(part_ptr + gl.expand_dims(for_rows_of(at, acc) * WIDE, 1) + gl.expand_dims(columns, 0), acc,
             gl.expand_dims(for_rows_of(real, acc), 1))
    m_ptr = part_ptr + count.to(gl.int64) * WIDE
    gl.store(m_ptr + at, gl.where(m == LOWEST, float("-inf"), m), real)
    gl.store(m_ptr + count + at, total, real)


@gluon.jit
def _result(o_ptr, lse_ptr, acc, m, total, at, real, WIDTH: gl.constexpr):
    """The end of rows whose only leaf this is."""
    columns = gl.arange(0, acc.shape[1], gl.SliceLayout(0, acc.type.layout))
    y = (acc * rows_of(reciprocal(total), acc)).to(o_ptr.dtype.element_ty)
    gl.store(o_ptr + gl.expand_dims(for_rows_of(at, acc) * WIDTH, 1) + gl.expand_dims(columns, 0), y,
             gl.expand_dims(for_rows_of(real, acc), 1) & gl.expand_dims(columns < WIDTH, 0))
    if lse_ptr is not None:
        gl.store(lse_ptr + at, gl.fma(m, gl.full_like(m, LN2), log(total)), real)
