"""Hopper's attention kernel: what a group of four warps does with its 64 rows of each tile."""
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

from .hopper_load import KEYS_READ, STAGES, TURN, job_of
from .hopper_parts import (
    BLOCK,
    LN2,
    LOWEST,
    ROWS,
    as_operand,
    bar,
    barrier,
    factors,
    for_rows_of,
    get,
    join,
    lane_sums,
    log,
    merged,
    put,
    reciprocal,
    rows_of,
    scaled,
    scores,
    seen,
    tile_layout,
    top_of,
    weighed,
    weights_of,
)

LEAF = gl.constexpr(8)  # blocks a leaf: part of the order


@gluon.jit
def _take_turn(NUMBER: gl.constexpr):
    bar("sync", TURN + NUMBER, "256", 4)


@gluon.jit
def _give_turn(NUMBER: gl.constexpr):
    bar("arrive", TURN + 1 - NUMBER, "256", 4)


@gluon.jit
def advance(q, k_tiles, v_tiles, k_full, v_full, more, step, scale, p, acc, m, sums, position, key,
            NUMBER: gl.constexpr, GROUPS: gl.constexpr, MASKED: gl.constexpr):
    """The next older block of a leaf: its scores are made, then the weights of the block before it meet their values
    while we make its own. more: that block is not its leaf's newest. MASKED: rows see keys up to their position, the
    block's first of which is `key`."""
    STAGES: gl.constexpr = k_tiles.shape[0]
    ALL: gl.constexpr = "288" if GROUPS == 2 else "160"
    stage = step % STAGES
    before = (step + STAGES - 1) % STAGES
    mbarrier.wait(k_full.index(stage), step // STAGES & 1)
    if GROUPS == 2:
        _take_turn(NUMBER)
    s = scores(q, k_tiles.index(stage))
    mbarrier.wait(v_full.index(before), (step - 1) // STAGES & 1)
    acc = warpgroup_mma(p, v_tiles.index(before), acc, use_acc=more, is_async=True)
    if GROUPS == 2:
        _give_turn(NUMBER)
    s = warpgroup_mma_wait(1, (s,))
    bar("arrive", KEYS_READ + stage, ALL, 4)
    if MASKED:
        s = seen(s, position, key)
    top = top_of(s, m, scale)
    alpha = gl.exp2(m - top)
    acc, p = warpgroup_mma_wait(0, (acc, p))  # before the exponentials, so that what follows fills their gaps
    bar("arrive", KEYS_READ + STAGES + before, ALL, 4)
    acc = acc * rows_of(alpha, acc)
    weights = weights_of(s, top, scale)
    block = lane_sums(weights)
    return as_operand(weights, k_tiles.dtype == gl.bfloat16), acc, top, scaled(sums, alpha, block)


@gluon.jit
def _close(q, k_tiles, v_tiles, held, k_full, v_full, more, step, scale, p, acc, m, sums, M, total, closed,
           NUMBER: gl.constexpr):
    """The newest block of an older leaf. The leaf before it ends: its last values are added first, and while the new
    scores are made it joins the newer leaves."""
    stage = step % STAGES
    before = (step + STAGES - 1) % STAGES
    mbarrier.wait(v_full.index(before), (step - 1) // STAGES & 1)
    mbarrier.wait(k_full.index(stage), step // STAGES & 1)
    _take_turn(NUMBER)
    acc = warpgroup_mma(p, v_tiles.index(before), acc, use_acc=more, is_async=True)
    s = scores(q, k_tiles.index(stage))
    _give_turn(NUMBER)
    M, a, c = factors(M, m)
    total = gl.fma(total, a, join(sums, m) * c)
    acc, p = warpgroup_mma_wait(1, (acc, p))
    bar("arrive", KEYS_READ + STAGES + before, "288", 4)
    both = acc
    if closed > 0:
        both = merged(get(held, acc), acc, a, c)
    put(held, both)
    s = warpgroup_mma_wait(0, (s,))
    bar("arrive", KEYS_READ + stage, "288", 4)
    p, m, sums = weighed(s, gl.full_like(m, LOWEST), scale, k_tiles.dtype == gl.bfloat16)
    return p, acc, m, sums, M, total, closed + 1


@gluon.jit
def _store(o_desc, o_ptr, lse_ptr, y, lse, staging, row, head, first, end, HEADS: gl.constexpr, WIDTH: gl.constexpr):
    """A group's tile of results; row: of q at the group's first position. Rows from `first` to `end` are real."""
    layout: gl.constexpr = y.type.layout
    rows = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    real = (rows >= first) & (rows < end)
    place = (row + rows).to(gl.int64) * HEADS + head
    if lse_ptr is not None:
        gl.store(lse_ptr + place, lse, real)
    if (first <= 0) & (end >= ROWS):
        staging.store(y)
        fence_async_shared()
        view = staging._reinterpret(o_desc.dtype, o_desc.block_shape, o_desc.layout)
        tma.async_copy_shared_to_global(o_desc, [row, head, 0], view)
    else:
        columns = gl.arange(0, y.shape[1], gl.SliceLayout(0, layout))
        gl.store(o_ptr + gl.expand_dims(place * WIDTH, 1) + gl.expand_dims(columns, 0), y,
                 gl.expand_dims(real, 1) & gl.expand_dims(columns < WIDTH, 0))


@gluon.jit
def consume(o_desc, o_ptr, lse_ptr, jobs_ptr, q_tiles, k_tiles, v_tiles, held, staging, q_full, q_empty, k_full,
            v_full, waves, scale, NUMBER: gl.constexpr, HEADS: gl.constexpr, WIDTH: gl.constexpr):
    """Group NUMBER's rows of each tile."""
    WIDE: gl.constexpr = q_tiles.shape[2]
    BF16: gl.constexpr = q_tiles.dtype == gl.bfloat16
    inner = NUMBER * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, tile_layout(BLOCK)))  # rows of the tile
    q, mine, out = q_tiles.index(NUMBER), held.index(NUMBER), staging.index(2 * NUMBER)
    step = 0
    lap = 0
    if NUMBER == 1:
        _give_turn(1)
    for stage in gl.static_range(STAGES):  # all tiles are free
        bar("arrive", KEYS_READ + stage, "288", 4)
        bar("arrive", KEYS_READ + STAGES + stage, "288", 4)
    row, _, tile, head, first, end = job_of(jobs_ptr, 0, waves)
    for wave in range(waves):
        if tile >= 0:
            mbarrier.wait(q_full.index(NUMBER), lap & 1)
            mbarrier.wait(k_full.index(step % STAGES), step // STAGES & 1)
            s = warpgroup_mma_wait(0, (scores(q, k_tiles.index(step % STAGES)),))
            tma.store_wait(0)  # the last tile's result has left shared memory
            barrier()
            bar("arrive", KEYS_READ + step % STAGES, "288", 4)
            acc = gl.zeros([ROWS, WIDE], gl.float32, tile_layout(WIDE))
            M = gl.full([ROWS], LOWEST, gl.float32, gl.SliceLayout(1, tile_layout(BLOCK)))
            total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, tile_layout(BLOCK)))
            closed = 0
            p, m, sums = weighed(seen(s, inner, 0), M, scale, BF16)
            step += 1
            for leaf in range(tile // LEAF + 1):
                low = (tile // LEAF - leaf) * LEAF  # this leaf's oldest block
                if leaf > 0:
                    p, acc, m, sums, M, total, closed = _close(
                        q, k_tiles, v_tiles, mine, k_full, v_full, low + LEAF < tile, step, scale, p, acc, m, sums, M,
                        total, closed, NUMBER)
                    step += 1
                start = gl.minimum(low + LEAF - 1, tile)
                for i in range(start - low):
                    p, acc, m, sums = advance(q, k_tiles, v_tiles, k_full, v_full, i > 0, step, scale, p, acc, m, sums,
                                              inner, 0, NUMBER, 2, False)
                    step += 1
            mbarrier.arrive(q_empty.index(NUMBER))
            next_row, _, next_tile, next_head, next_first, next_end = job_of(jobs_ptr, wave + 1, waves)
            before = (step + STAGES - 1) % STAGES
            mbarrier.wait(v_full.index(before), (step - 1) // STAGES & 1)
            acc = warpgroup_mma(p, v_tiles.index(before), acc, use_acc=tile > 0, is_async=True)
            part = join(sums, m)
            acc, p = warpgroup_mma_wait(0, (acc, p))
            bar("arrive", KEYS_READ + STAGES + before, "288", 4)
            if tile >= LEAF:
                m, a, c = factors(M, m)
                part = gl.fma(total, a, part * c)
                acc = merged(get(mine, acc), acc, a, c)
            y = (acc * rows_of(reciprocal(part), acc)).to(q_tiles.dtype)
            lse = gl.fma(m, gl.full_like(m, LN2), log(part)) if lse_ptr is not None else m
            barrier()  # every thread has read its sums
            _store(o_desc, o_ptr, lse_ptr, y, for_rows_of(lse, y), out, row + NUMBER * ROWS, head,
                   first - NUMBER * ROWS, end - NUMBER * ROWS, HEADS, WIDTH)
            lap += 1
            row, tile, head, first, end = next_row, next_tile, next_head, next_first, next_end
    tma.store_wait(0)
    if NUMBER == 0:
        _take_turn(0)  # no barrier is left half full
