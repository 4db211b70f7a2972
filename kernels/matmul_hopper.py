"""The matrix product's chain on Hopper with loads in a warp of their own, written in Gluon.

One warp copies tiles of x and of the weight into shared memory, ahead of one, two or three groups of four warps that
each walk k in order into one accumulator. So several tensor core instructions are always in flight, a tile may be 192
rows high, and two groups may take turns, so that one stores its tile while the other multiplies: what plain Triton
cannot write, and products of 128 to 1024 tokens want.
kernels/matmul.py imports this file when a schedule of kind `hopper` runs, on sm_90.
"""
from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_wait


@gluon.jit
def _place(tile, A, B, A_TILE: gl.constexpr, B_TILE: gl.constexpr, GROUP: gl.constexpr):
    """Tile number -> first row of the high side, first row of the wide side, GROUP high tiles together."""
    a_tiles = gl.cdiv(A, A_TILE)
    width = GROUP * gl.cdiv(B, B_TILE)
    first = tile // width * GROUP
    size = gl.minimum(a_tiles - first, GROUP)
    return (first + tile % width % size) * A_TILE, tile % width // size * B_TILE


@gluon.jit
def _produce(a_desc, b_desc, a_tiles, b_tiles, full, empty, A, B, K, ROWS: gl.constexpr, B_TILE: gl.constexpr,
             BLOCK_K: gl.constexpr, GROUP: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr):
    """Keep every stage of shared memory filled, tile after tile."""
    steps = gl.cdiv(K, BLOCK_K)
    step = 0
    jobs = gl.cdiv(A, ROWS * GROUPS) * gl.cdiv(B, B_TILE)
    for tile in range(gl.program_id(0), jobs, gl.num_programs(0)):
        a0, b0 = _place(tile, A, B, ROWS * GROUPS, B_TILE, GROUP)
        for k in range(steps):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), (step // STAGES + 1) & 1)
            ready = full.index(stage)
            mbarrier.expect(ready, 2 * BLOCK_K * (ROWS * GROUPS + B_TILE))
            for c in gl.static_range(GROUPS):
                tma.async_copy_global_to_shared(a_desc, [a0 + c * ROWS, k * BLOCK_K], ready,
                                                a_tiles.index(stage * GROUPS + c))
            tma.async_copy_global_to_shared(b_desc, [b0, k * BLOCK_K], ready, b_tiles.index(stage))
            step += 1


@gluon.jit
def _chain(a_tiles, b_tiles, full, empty, turn, start, end, step, NUMBER: gl.constexpr, ROWS: gl.constexpr,
           B_TILE: gl.constexpr, BLOCK_K: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr,
           PINGPONG: gl.constexpr, layout: gl.constexpr):
    """The chain over k from start to end, two products in flight; and the number of the next step."""
    chain = gl.zeros([ROWS, B_TILE], gl.float32, layout)
    for k in range(start, end, BLOCK_K):
        stage = step % STAGES
        mbarrier.wait(full.index(stage), step // STAGES & 1)
        a = a_tiles.index(stage * GROUPS + NUMBER % GROUPS)
        b = b_tiles.index(stage).permute((1, 0))
        chain = warpgroup_mma(a, b, chain, use_acc=k > start, is_async=True)
        chain = warpgroup_mma_wait(1, (chain,))
        if k > start:  # the last step's product has been made, so its tiles may be overwritten
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES))
        step += 1
    if PINGPONG:  # no load of ours is waited for any more: the other group's tile is next
        mbarrier.arrive(turn.index(1 - NUMBER))
    chain = warpgroup_mma_wait(0, (chain,))
    mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES))
    return chain, step


@gluon.jit
def _store(y, y_ptr, a0, b0, A, B, ROWS: gl.constexpr, B_TILE: gl.constexpr, SWAP: gl.constexpr,
           layout: gl.constexpr):
    a_rows = a0 + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    b_rows = b0 + gl.arange(0, B_TILE, gl.SliceLayout(0, layout))
    if SWAP:
        place = a_rows[:, None] + b_rows.to(gl.int64)[None, :] * A
    else:
        place = a_rows.to(gl.int64)[:, None] * B + b_rows[None, :]
    gl.store(y_ptr + place, y, (a_rows < A)[:, None] & (b_rows < B)[None, :])


@gluon.jit
def _consume(a_tiles, b_tiles, full, empty, turn, y_ptr, bias_ptr, A, B, K, length, NUMBER: gl.constexpr,
             ROWS: gl.constexpr, B_TILE: gl.constexpr, BLOCK_K: gl.constexpr, GROUP: gl.constexpr,
             GROUPS: gl.constexpr, STAGES: gl.constexpr, SWAP: gl.constexpr, CUT: gl.constexpr, BIAS: gl.constexpr,
             STORE: gl.constexpr, PINGPONG: gl.constexpr):
    """Group NUMBER's rows of each tile, or with PINGPONG all rows of every second tile: the segments' chains in
    sequence, the bias, one rounding, the store."""
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1],
                                                     instr_shape=[16, B_TILE, 16])
    TURNS: gl.constexpr = 2 if PINGPONG else 1
    steps = gl.cdiv(K, BLOCK_K)
    step = (NUMBER if PINGPONG else 0) * steps
    lap = 0
    jobs = gl.cdiv(A, ROWS * GROUPS) * gl.cdiv(B, B_TILE)
    for tile in range(gl.program_id(0) + (NUMBER if PINGPONG else 0) * gl.num_programs(0), jobs,
                      TURNS * gl.num_programs(0)):
        a0, b0 = _place(tile, A, B, ROWS * GROUPS, B_TILE, GROUP)
        if PINGPONG:  # a stage's phase tells our step from one two laps before only if all between have been made
            mbarrier.wait(turn.index(NUMBER), (lap + 1 - NUMBER) & 1)
            lap += 1
        total = gl.zeros([ROWS, B_TILE], gl.float32, layout)
        if CUT:
            for start in range(0, K, length):
                chain, step = _chain(a_tiles, b_tiles, full, empty, turn, start, gl.minimum(start + length, K), step,
                                     NUMBER, ROWS, B_TILE, BLOCK_K, GROUPS, STAGES, PINGPONG, layout)
                total += chain
        else:
            chain, step = _chain(a_tiles, b_tiles, full, empty, turn, 0, K, step, NUMBER, ROWS, B_TILE, BLOCK_K,
                                 GROUPS, STAGES, PINGPONG, layout)
            total += chain
        step += (TURNS - 1) * steps
        first = a0 + NUMBER % GROUPS * ROWS
        if BIAS:
            if SWAP:
                a_rows = first + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
                total += gl.load(bias_ptr + a_rows, a_rows < A, 0.0).to(gl.float32)[:, None]
            else:
                b_rows = b0 + gl.arange(0, B_TILE, gl.SliceLayout(0, layout))
                total += gl.load(bias_ptr + b_rows, b_rows < B, 0.0).to(gl.float32)[None, :]
        y = total.to(y_ptr.dtype.element_ty)
        if STORE:
            WIDE: gl.constexpr = 32 if B_TILE > 128 else B_TILE // 8
            turned: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, 4], [0, 1])
            straight: gl.constexpr = gl.BlockedLayout([1, 8], [32 // WIDE, WIDE], [4, 1], [1, 0])
            out: gl.constexpr = turned if SWAP else straight
            _store(gl.convert_layout(y, out), y_ptr, first, b0, A, B, ROWS, B_TILE, SWAP, out)
        else:
            _store(y, y_ptr, first, b0, A, B, ROWS, B_TILE, SWAP, layout)


@gluon.jit(do_not_specialize=["M"])
def kernel(a_desc, b_desc, y_ptr, bias_ptr, M, N, K, length,
           ROWS: gl.constexpr, B_TILE: gl.constexpr, BLOCK_K: gl.constexpr, GROUP: gl.constexpr,
           CONSUMERS: gl.constexpr, STAGES: gl.constexpr, SWAP: gl.constexpr, CUT: gl.constexpr,
           BIAS: gl.constexpr, STORE: gl.constexpr, PINGPONG: gl.constexpr, REGISTERS: gl.constexpr,
           PDL: gl.constexpr):
    """The high side a (rows shared out among the CONSUMERS) is x, or with SWAP the weight; the wide side b is the
    other. Programs walk tiles; launched with 4 warps, which are the first consumer. With PINGPONG a tile has one
    consumer, and the two take turns: one stores while the other multiplies."""
    if PDL:
        gdc_wait()
    GROUPS: gl.constexpr = 1 if PINGPONG else CONSUMERS
    A = N if SWAP else M
    B = M if SWAP else N
    a_tiles = gl.allocate_shared_memory(a_desc.dtype, [STAGES * GROUPS, ROWS, BLOCK_K], a_desc.layout)
    b_tiles = gl.allocate_shared_memory(b_desc.dtype, [STAGES, B_TILE, BLOCK_K], b_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turn = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=GROUPS)
    for number in gl.static_range(2):
        mbarrier.init(turn.index(number), count=1)
    fence_async_shared()
    if CONSUMERS == 1:
        gl.warp_specialize([
            (_consume, (a_tiles, b_tiles, full, empty, turn, y_ptr, bias_ptr, A, B, K, length, 0, ROWS, B_TILE,
                        BLOCK_K, GROUP, GROUPS, STAGES, SWAP, CUT, BIAS, STORE, PINGPONG)),
            (_produce, (a_desc, b_desc, a_tiles, b_tiles, full, empty, A, B, K, ROWS, B_TILE, BLOCK_K, GROUP,
                        GROUPS, STAGES)),
        ], [1], [24])
    elif CONSUMERS == 2:
        gl.warp_specialize([
            (_consume, (a_tiles, b_tiles, full, empty, turn, y_ptr, bias_ptr, A, B, K, length, 0, ROWS, B_TILE,
                        BLOCK_K, GROUP, GROUPS, STAGES, SWAP, CUT, BIAS, STORE, PINGPONG)),
            (_consume, (a_tiles, b_tiles, full, empty, turn, y_ptr, bias_ptr, A, B, K, length, 1, ROWS, B_TILE,
                        BLOCK_K, GROUP, GROUPS, STAGES, SWAP, CUT, BIAS, STORE, PINGPONG)),
            (_produce, (a_desc, b_desc, a_tiles, b_tiles, full, empty, A, B, K, ROWS, B_TILE, BLOCK_K, GROUP,
                        GROUPS, STAGES)),
        ], [4, 1], [REGISTERS, 24])
    else:
        gl.warp_specialize([
            (_consume, (a_tiles, b_tiles, full, empty, turn, y_ptr, bias_ptr, A, B, K, length, 0, ROWS, B_TILE,
                        BLOCK_K, GROUP, GROUPS, STAGES, SWAP, CUT, BIAS, STORE, PINGPONG)),
            (_consume, (a_tiles, b_tiles, full, empty, turn, y_ptr, bias_ptr, A, B, K, length, 1, ROWS, B_TILE,
                        BLOCK_K, GROUP, GROUPS, STAGES, SWAP, CUT, BIAS, STORE, PINGPONG)),
            (_consume, (a_tiles, b_tiles, full, empty, turn, y_ptr, bias_ptr, A, B, K, length, 2, ROWS, B_TILE,
                        BLOCK_K, GROUP, GROUPS, STAGES, SWAP, CUT, BIAS, STORE, PINGPONG)),
            (_produce, (a_desc, b_desc, a_tiles, b_tiles, full, empty, A, B, K, ROWS, B_TILE, BLOCK_K, GROUP,
                        GROUPS, STAGES)),
        ], [4, 4, 1], [REGISTERS, REGISTERS, 24])


def with_layout(descriptor) -> TensorDescriptor:
    """A plain descriptor of a matrix as Gluon wants it: with the layout of its tiles in shared memory."""
    block = list(descriptor.block_shape)
    dtype = gl.bfloat16 if descriptor.base.dtype == torch.bfloat16 else gl.float16
    layout = gl.NVMMASharedLayout.get_default_for(block, dtype)
    return TensorDescriptor(descriptor.base, descriptor.shape, descriptor.strides, block, layout)
