"""The matrix product's chain on Hopper with loads in a warp of their own, written in Gluon.

One warp copies tiles of x and of the weight into shared memory, ahead of one, two or three groups of four warps that
each walk k in order into one accumulator. So several tensor core instructions are always in flight, and a tile may be
192 rows high or 160 wide. Two groups may take turns, so that one stores its tile while the other multiplies; and where
tiles do not divide evenly among the multiprocessors, a program hands a chain it began on to the next. Plain Triton
cannot write these, and products of 128 tokens and more want them.
kernels/ops/matmul/plan.py imports this file when a schedule of kind `hopper` runs, on sm_90.
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
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # its name before and after Triton 3.7


@gluon.jit
def _place(tile, A, B, A_TILE: gl.constexpr, B_TILE: gl.constexpr, GROUP: gl.constexpr):
    """Tile number -> first row of the high side, first row of the wide side, GROUP high tiles together."""
    a_tiles = gl.cdiv(A, A_TILE)
    width = GROUP * gl.cdiv(B, B_TILE)
    first = tile // width * GROUP
    size = gl.minimum(a_tiles - first, GROUP)
    return (first + tile % width % size) * A_TILE, tile % width // size * B_TILE


@gluon.jit
def _jobs(units, STREAM: gl.constexpr):
    """How many jobs this program has, some of them perhaps empty."""
    if STREAM:
        jobs = gl.maximum(units // gl.num_programs(0) - 1, 0) + 4
    else:
        jobs = gl.cdiv(units - gl.program_id(0), gl.num_programs(0))
    return jobs


@gluon.jit
def _job(number, units, steps, STREAM: gl.constexpr):
    """Job number -> (unit, first step, end) of this program; a unit is one chain of a tile, `steps` long.

    With STREAM the last one or two units a program are shared out evenly, cut where a share ends. A program begins
    with the leading steps of the unit that its share ends in, and ends with the closing steps of the unit that its
    share begins in: whoever has those waits for nothing, because the leading ones were made first.
    """
    program = gl.program_id(0)
    programs = gl.num_programs(0)
    if STREAM:
        waves = gl.maximum(units // programs - 1, 0)
        rest = units - waves * programs
        begin = program * rest * steps // programs
        end = (program + 1) * rest * steps // programs
        if number == 0:  # leading steps, to be handed on
            unit = waves * programs + end // steps
            first = 0
            last = end % steps
        elif number <= waves:  # whole units
            unit = program + (number - 1) * programs
            first = 0
            last = steps
        elif number <= waves + 2:  # the whole units within our share: none, one, or two where it ends with a unit
            whole = gl.cdiv(begin, steps) + number - waves - 1
            unit = waves * programs + whole
            first = 0
            last = gl.where((whole + 1) * steps <= end, steps, 0)
        else:  # closing steps, taken over
            unit = waves * programs + begin // steps
            first = begin % steps
            last = gl.where(first > 0, steps, 0)
    else:
        unit = program + number * programs
        first = 0
        last = steps
    return unit, first, last


@gluon.jit
def _produce(a_desc, b_desc, more_desc, a_tiles, b_tiles, more_tiles, full, empty, A, B, K, segments, length,
             ROWS: gl.constexpr, B_TILE: gl.constexpr, MORE: gl.constexpr, BLOCK_K: gl.constexpr, GROUP: gl.constexpr,
             GROUPS: gl.constexpr, STAGES: gl.constexpr, SPLIT: gl.constexpr, STREAM: gl.constexpr):
    """Keep every stage of shared memory filled, job after job."""
    steps = gl.cdiv(length if SPLIT else K, BLOCK_K)
    parts = segments if SPLIT else 1
    units = gl.cdiv(A, ROWS * GROUPS) * gl.cdiv(B, B_TILE + MORE) * parts
    step = 0
    for number in range(_jobs(units, STREAM)):
        unit, first, last = _job(number, units, steps, STREAM)
        a0, b0 = _place(unit // parts, A, B, ROWS * GROUPS, B_TILE + MORE, GROUP)
        base = unit % parts * length
        for k in range(first, last):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), (step // STAGES + 1) & 1)
            ready = full.index(stage)
            mbarrier.expect(ready, 2 * BLOCK_K * (ROWS * GROUPS + B_TILE + MORE))
            for c in gl.static_range(GROUPS):
                tma.async_copy_global_to_shared(a_desc, [a0 + c * ROWS, base + k * BLOCK_K], ready,
                                                a_tiles.index(stage * GROUPS + c))
            tma.async_copy_global_to_shared(b_desc, [b0, base + k * BLOCK_K], ready, b_tiles.index(stage))
            if MORE:
                tma.async_copy_global_to_shared(more_desc, [b0 + B_TILE, base + k * BLOCK_K], ready,
                                                more_tiles.index(stage))
            step += 1


@gluon.jit
def _chain(chain, more, first, last, step, a_tiles, b_tiles, more_tiles, full, empty, turn, NUMBER: gl.constexpr,
           MORE: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr, PINGPONG: gl.constexpr):
    """Steps first to last of a tile's chains, two products in flight: the chains, and the number of the next step.

    Step 0 begins a chain and reads nothing of `chain`. `more` are the chains of MORE further columns.
    """
    for k in range(first, last):
        stage = step % STAGES
        mbarrier.wait(full.index(stage), step // STAGES & 1)
        a = a_tiles.index(stage * GROUPS + NUMBER % GROUPS)
        chain = warpgroup_mma(a, b_tiles.index(stage).permute((1, 0)), chain, use_acc=k > 0, is_async=True)
        if MORE:
            more = warpgroup_mma(a, more_tiles.index(stage).permute((1, 0)), more, use_acc=k > 0, is_async=True)
            chain, more = warpgroup_mma_wait(2, (chain, more))
        else:
            chain = warpgroup_mma_wait(1, (chain,))
        if k > first:  # the last step's product has been made, so its tiles may be overwritten
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES))
        step += 1
    if PINGPONG:  # no load of ours is waited for any more: the other group's tile is next
        mbarrier.arrive(turn.index(1 - NUMBER))
    if MORE:
        chain, more = warpgroup_mma_wait(0, (chain, more))
    else:
        chain = warpgroup_mma_wait(0, (chain,))
    mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES))
    return chain, more, step


@gluon.jit
def _store(y, y_ptr, a0, b0, A, B, ROWS: gl.constexpr, B_TILE: gl.constexpr, SWAP: gl.constexpr):
    layout: gl.constexpr = y.type.layout
    a_rows = a0 + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    b_rows = b0 + gl.arange(0, B_TILE, gl.SliceLayout(0, layout))
    if SWAP:
        place = a_rows[:, None] + b_rows.to(gl.int64)[None, :] * A
    else:
        place = a_rows.to(gl.int64)[:, None] * B + b_rows[None, :]
    gl.store(y_ptr + place, y, (a_rows < A)[:, None] & (b_rows < B)[None, :])


@gluon.jit
def _finish(total, staging, y_ptr, bias_ptr, a0, b0, A, B, ROWS: gl.constexpr, B_TILE: gl.constexpr,
            SWAP: gl.constexpr, BIAS: gl.constexpr, STORE: gl.constexpr, STAGED: gl.constexpr):
    """The bias, one rounding, the store; with STAGED it is turned in `staging`, shared memory that is ours."""
    layout: gl.constexpr = total.type.layout
    if BIAS:
        if SWAP:
            a_rows = a0 + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
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
        if STAGED:
            lines = staging._reinterpret(y.dtype, [ROWS, B_TILE], gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))
            lines.store(y)
            y = lines.load(out)
        else:
            y = gl.convert_layout(y, out)
        _store(y, y_ptr, a0, b0, A, B, ROWS, B_TILE, SWAP)
    else:
        _store(y, y_ptr, a0, b0, A, B, ROWS, B_TILE, SWAP)


@gluon.constexpr_function
def _layout(wide):
    """Which thread of four warps holds what of a tile of sums."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, wide, 16])


@gluon.jit
def _nothing(ROWS: gl.constexpr, WIDE: gl.constexpr):
    """A tile of zeros, or for no columns just 0."""
    if WIDE:
        zeros = gl.zeros([ROWS, WIDE], gl.float32, _layout(WIDE))
    else:
        zeros = 0
    return zeros


@gluon.jit
def _halves(tile, ROWS: gl.constexpr, WIDE: gl.constexpr):
    """The first and the last half of a tile's columns; each thread keeps what it holds."""
    first, last = gl.split(tile.reshape([ROWS, 2, WIDE // 2]).permute((0, 2, 1)))
    layout: gl.constexpr = _layout(WIDE // 2)
    return gl.convert_layout(first, layout, assert_trivial=True), gl.convert_layout(last, layout, assert_trivial=True)


@gluon.jit
def _slot(pointer, ROWS: gl.constexpr, WIDE: gl.constexpr):
    """Where in memory a tile of sums waits: what the 32 threads of a warp store at once lies side by side.

    A thread holds pairs of columns, of rows that are 8 apart; 4 threads share 8 columns, 8 groups of 4 the rows.
    """
    if WIDE:
        layout: gl.constexpr = _layout(WIDE)
        row = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
        column = gl.arange(0, WIDE, gl.SliceLayout(0, layout))
        rows = row // 64 * (64 * WIDE) + row // 8 % 2 * 256 + row % 64 // 16 * 64 + row % 8 * 8
        slot = pointer + rows[:, None] + (column // 8 * 512 + column % 8)[None, :]
    else:
        slot = pointer
    return slot


@gluon.jit
def _consume(a_tiles, b_tiles, more_tiles, held, full, empty, turn, y_ptr, bias_ptr, work_ptr, flag_ptr, A, B, K,
             segments, length, NUMBER: gl.constexpr, ROWS: gl.constexpr, B_TILE: gl.constexpr, MORE: gl.constexpr,
             BLOCK_K: gl.constexpr, GROUP: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr,
             SWAP: gl.constexpr, CUT: gl.constexpr, HALVES: gl.constexpr, BIAS: gl.constexpr, STORE: gl.constexpr,
             PINGPONG: gl.constexpr, SPLIT: gl.constexpr, STREAM: gl.constexpr):
    """Group NUMBER's rows of each tile, or with PINGPONG all rows of every second tile."""
    FIRST: gl.constexpr = NUMBER if PINGPONG else 0
    TURNS: gl.constexpr = 2 if PINGPONG else 1
    SIZE: gl.constexpr = ROWS * (B_TILE + MORE)
    sums = held.index(NUMBER)
    steps = gl.cdiv(length if SPLIT else K, BLOCK_K)
    parts = segments if SPLIT else 1
    units = gl.cdiv(A, ROWS * GROUPS) * gl.cdiv(B, B_TILE + MORE) * parts
    mine = gl.program_id(0) * GROUPS + NUMBER % GROUPS
    slot = _slot(work_ptr + mine * SIZE, ROWS, B_TILE)
    more_slot = _slot(work_ptr + mine * SIZE + ROWS * B_TILE, ROWS, MORE)
    step = FIRST * steps
    lap = 0
    for number in range(FIRST, _jobs(units, STREAM), TURNS):
        unit, first, last = _job(number, units, steps, STREAM)
        if last > first:
            a0, b0 = _place(unit // parts, A, B, ROWS * GROUPS, B_TILE + MORE, GROUP)
            a0 += NUMBER % GROUPS * ROWS
            if PINGPONG:  # a stage's phase tells our step from one two laps before only if all between have been made
                mbarrier.wait(turn.index(NUMBER), (lap + 1 - NUMBER) & 1)
                lap += 1
            chain = _nothing(ROWS, B_TILE)
            more = _nothing(ROWS, MORE)
            total = _nothing(ROWS, B_TILE // 2 if HALVES else B_TILE)
            more_total = _nothing(ROWS, MORE)
            if STREAM:  # noqa: SIM102 - the second condition is run-time
                if first > 0:  # what the program before us began
                    while gl.atomic_cas(flag_ptr + mine - GROUPS, 1, 0, sem="acquire") == 0:
                        pass
                    barrier()
                    chain = gl.load(slot - GROUPS * SIZE, cache_modifier=".cg")
                    if MORE:
                        more = gl.load(more_slot - GROUPS * SIZE, cache_modifier=".cg")
            if CUT and not SPLIT:  # segments in sequence
                each = length // BLOCK_K
                for start in range(0, steps, each):
                    chain, more, step = _chain(chain, more, 0, gl.minimum(each, steps - start), step, a_tiles, b_tiles,
                                               more_tiles, full, empty, turn, NUMBER, MORE, GROUPS, STAGES, False)
                    if HALVES:
                        chain_a, chain_b = _halves(chain, ROWS, B_TILE)
                        total += chain_a
                        if start > 0:
                            chain_b += sums.load(chain_b.type.layout)
                        sums.store(chain_b)
                    else:
                        total += chain
                        more_total += more
            else:
                chain, more, step = _chain(chain, more, first, last, step, a_tiles, b_tiles, more_tiles, full, empty,
                                           turn, NUMBER, MORE, GROUPS, STAGES, PINGPONG)
                step += (TURNS - 1) * steps
            if last < steps:
                gl.store(slot, chain)
                if MORE:
                    gl.store(more_slot, more)
                barrier()  # every thread's numbers are stored before one thread says so
                gl.atomic_xchg(flag_ptr + mine, 1, sem="release")
            elif SPLIT:
                handed = gl.num_programs(0) * GROUPS * SIZE if STREAM else 0
                part_ptr = work_ptr + handed + (unit % parts).to(gl.int64) * A * B
                _store(chain, part_ptr, a0, b0, A, B, ROWS, B_TILE, SWAP)
                if MORE:
                    _store(more, part_ptr, a0, b0 + B_TILE, A, B, ROWS, MORE, SWAP)
            else:
                if not CUT:
                    total += chain
                    more_total += more
                if HALVES:
                    rest = _nothing(ROWS, B_TILE // 2) + sums.load(total.type.layout)
                    _finish(total, sums, y_ptr, bias_ptr, a0, b0, A, B, ROWS, B_TILE // 2, SWAP, BIAS, STORE, not SWAP)
                    _finish(rest, sums, y_ptr, bias_ptr, a0, b0 + B_TILE // 2, A, B, ROWS, B_TILE // 2, SWAP, BIAS,
                            STORE, not SWAP)
                else:
                    _finish(total, sums, y_ptr, bias_ptr, a0, b0, A, B, ROWS, B_TILE, SWAP, BIAS, STORE, False)
                if MORE:
                    _finish(more_total, sums, y_ptr, bias_ptr, a0, b0 + B_TILE, A, B, ROWS, MORE, SWAP, BIAS, STORE,
                            False)


@gluon.jit(do_not_specialize=["M"])
def kernel(a_desc, b_desc, more_desc, y_ptr, bias_ptr, work_ptr, flag_ptr, M, N, K, segments, length,
           ROWS: gl.constexpr, B_TILE: gl.constexpr, MORE: gl.constexpr, BLOCK_K: gl.constexpr, GROUP: gl.constexpr,
           CONSUMERS: gl.constexpr, STAGES: gl.constexpr, SWAP: gl.constexpr, CUT: gl.constexpr,
           HALVES: gl.constexpr, BIAS: gl.constexpr, STORE: gl.constexpr, PINGPONG: gl.constexpr,
           SPLIT: gl.constexpr, STREAM: gl.constexpr, REGISTERS: gl.constexpr, PDL: gl.constexpr):
    """The high side a (rows shared out among the CONSUMERS) is x, or with SWAP the weight; the wide side b is the
    other. Programs walk tiles; launched with 4 warps, which are the first consumer. With PINGPONG a tile has one
    consumer, and the two take turns: one stores while the other multiplies. With CUT a tile's segments follow each
    other; with HALVES half of their sum waits in shared memory, because the registers have no room for a second tile.
    With SPLIT the chains of a tile's segments are left for a second kernel to add. The wide side has B_TILE and MORE
    columns, two powers of 2 (or one, and 0), because a tensor core's instruction may be 160 wide and Triton's tensors
    may not.

    work_ptr: with STREAM a tile of float32 for each group of each program; with SPLIT, (segments, M, N) behind them."""
    if PDL:
        gdc_wait()
        if SPLIT:
            gdc_launch_dependents()
    GROUPS: gl.constexpr = 1 if PINGPONG else CONSUMERS
    A = N if SWAP else M
    B = M if SWAP else N
    a_tiles = gl.allocate_shared_memory(a_desc.dtype, [STAGES * GROUPS, ROWS, BLOCK_K], a_desc.layout)
    b_tiles = gl.allocate_shared_memory(b_desc.dtype, [STAGES, B_TILE, BLOCK_K], b_desc.layout)
    if MORE:
        more_tiles = gl.allocate_shared_memory(b_desc.dtype, [STAGES, MORE, BLOCK_K], more_desc.layout)
    else:
        more_tiles = b_tiles
    if HALVES:
        held = gl.allocate_shared_memory(gl.float32, [CONSUMERS, ROWS, B_TILE // 2],
                                         gl.SwizzledSharedLayout(8, 1, 4, [1, 0]))
    else:
        held = a_tiles
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
            (_consume, (a_tiles, b_tiles, more_tiles, held, full, empty, turn, y_ptr, bias_ptr, work_ptr, flag_ptr, A,
                        B, K, segments, length, 0, ROWS, B_TILE, MORE, BLOCK_K, GROUP, GROUPS, STAGES, SWAP, CUT,
                        HALVES, BIAS, STORE, PINGPONG, SPLIT, STREAM)),
            (_produce, (a_desc, b_desc, more_desc, a_tiles, b_tiles, more_tiles, full, empty, A, B, K, segments,
                        length, ROWS, B_TILE, MORE, BLOCK_K, GROUP, GROUPS, STAGES, SPLIT, STREAM)),
        ], [1], [24])
    elif CONSUMERS == 2:
        gl.warp_specialize([
            (_consume, (a_tiles, b_tiles, more_tiles, held, full, empty, turn, y_ptr, bias_ptr, work_ptr, flag_ptr, A,
                        B, K, segments, length, 0, ROWS, B_TILE, MORE, BLOCK_K, GROUP, GROUPS, STAGES, SWAP, CUT,
                        HALVES, BIAS, STORE, PINGPONG, SPLIT, STREAM)),
            (_consume, (a_tiles, b_tiles, more_tiles, held, full, empty, turn, y_ptr, bias_ptr, work_ptr, flag_ptr, A,
                        B, K, segments, length, 1, ROWS, B_TILE, MORE, BLOCK_K, GROUP, GROUPS, STAGES, SWAP, CUT,
                        HALVES, BIAS, STORE, PINGPONG, SPLIT, STREAM)),
            (_produce, (a_desc, b_desc, more_desc, a_tiles, b_tiles, more_tiles, full, empty, A, B, K, segments,
                        length, ROWS, B_TILE, MORE, BLOCK_K, GROUP, GROUPS, STAGES, SPLIT, STREAM)),
        ], [4, 1], [REGISTERS, 24])
    else:
        gl.warp_specialize([
            (_consume, (a_tiles, b_tiles, more_tiles, held, full, empty, turn, y_ptr, bias_ptr, work_ptr, flag_ptr, A,
                        B, K, segments, length, 0, ROWS, B_TILE, MORE, BLOCK_K, GROUP, GROUPS, STAGES, SWAP, CUT,
                        HALVES, BIAS, STORE, PINGPONG, SPLIT, STREAM)),
            (_consume, (a_tiles, b_tiles, more_tiles, held, full, empty, turn, y_ptr, bias_ptr, work_ptr, flag_ptr, A,
                        B, K, segments, length, 1, ROWS, B_TILE, MORE, BLOCK_K, GROUP, GROUPS, STAGES, SWAP, CUT,
                        HALVES, BIAS, STORE, PINGPONG, SPLIT, STREAM)),
            (_consume, (a_tiles, b_tiles, more_tiles, held, full, empty, turn, y_ptr, bias_ptr, work_ptr, flag_ptr, A,
                        B, K, segments, length, 2, ROWS, B_TILE, MORE, BLOCK_K, GROUP, GROUPS, STAGES, SWAP, CUT,
                        HALVES, BIAS, STORE, PINGPONG, SPLIT, STREAM)),
            (_produce, (a_desc, b_desc, more_desc, a_tiles, b_tiles, more_tiles, full, empty, A, B, K, segments,
                        length, ROWS, B_TILE, MORE, BLOCK_K, GROUP, GROUPS, STAGES, SPLIT, STREAM)),
        ], [4, 4, 1], [REGISTERS, REGISTERS, 24])


def with_layout(descriptor) -> TensorDescriptor:
    """A plain descriptor of a matrix as Gluon wants it: with the layout of its tiles in shared memory."""
    block = list(descriptor.block_shape)
    dtype = gl.bfloat16 if descriptor.base.dtype == torch.bfloat16 else gl.float16
    layout = gl.NVMMASharedLayout.get_default_for(block, dtype)
    return TensorDescriptor(descriptor.base, descriptor.shape, descriptor.strides, block, layout)
