"""What the warps of kind hopper do: one fills shared memory, groups of four make chains and finish tiles; in Gluon.

Annotations are not imported from __future__ here: Triton reads those of an aggregate as classes.
"""
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.language.core import _aggregate as aggregate

from .hopper_walk import abreast_of, first_rows, job, jobs, segment_of


@aggregate
class Program:
    """What the warps of one program share: the stages in shared memory, the product's sizes and the schedule."""

    a_tiles: gl.shared_memory_descriptor
    b_tiles: gl.shared_memory_descriptor
    more_tiles: gl.shared_memory_descriptor
    held: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    turn: gl.shared_memory_descriptor
    A: gl.tensor
    B: gl.tensor
    K: gl.tensor
    segments: gl.tensor
    length: gl.tensor
    ROWS: gl.constexpr
    B_TILE: gl.constexpr
    MORE: gl.constexpr
    BLOCK_K: gl.constexpr
    GROUP: gl.constexpr
    GROUPS: gl.constexpr
    STAGES: gl.constexpr
    SWAP: gl.constexpr
    CUT: gl.constexpr
    HALVES: gl.constexpr
    BIAS: gl.constexpr
    STORE: gl.constexpr
    PINGPONG: gl.constexpr
    SPLIT: gl.constexpr
    STREAM: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, shared, sizes, constants):
        shared_names = ("a_tiles", "b_tiles", "more_tiles", "held", "full", "empty", "turn")
        for name, value in zip(shared_names, shared, strict=True):
            setattr(self, name, value)
        for name, value in zip(("A", "B", "K", "segments", "length"), sizes, strict=True):
            setattr(self, name, value)
        constant_names = ("ROWS", "B_TILE", "MORE", "BLOCK_K", "GROUP", "GROUPS", "STAGES", "SWAP", "CUT", "HALVES",
                          "BIAS", "STORE", "PINGPONG", "SPLIT", "STREAM")
        for name, value in zip(constant_names, constants, strict=True):
            setattr(self, name, gl.constexpr(value))


@gluon.jit
def produce(p, a_desc, b_desc, more_desc):
    """Keep every stage of shared memory filled, job after job."""
    steps = gl.cdiv(p.length if p.SPLIT else p.K, p.BLOCK_K)
    parts = p.segments if p.SPLIT else 1
    units = gl.cdiv(p.A, p.ROWS * p.GROUPS) * gl.cdiv(p.B, p.B_TILE + p.MORE) * parts
    abreast = abreast_of(p)
    step = 0
    for number in range(jobs(units, abreast, p.STREAM)):
        unit, first, last = job(number, units, steps, abreast, p.STREAM)
        a0, b0 = first_rows(p, unit, parts)
        base = segment_of(p, unit, parts) * p.length
        for k in range(first, last):
            stage = step % p.STAGES
            mbarrier.wait(p.empty.index(stage), (step // p.STAGES + 1) & 1)
            ready = p.full.index(stage)
            mbarrier.expect(ready, 2 * p.BLOCK_K * (p.ROWS * p.GROUPS + p.B_TILE + p.MORE))
            for c in gl.static_range(p.GROUPS):
                tma.async_copy_global_to_shared(a_desc, [a0 + c * p.ROWS, base + k * p.BLOCK_K], ready,
                                                p.a_tiles.index(stage * p.GROUPS + c))
            tma.async_copy_global_to_shared(b_desc, [b0, base + k * p.BLOCK_K], ready, p.b_tiles.index(stage))
            if p.MORE:
                tma.async_copy_global_to_shared(more_desc, [b0 + p.B_TILE, base + k * p.BLOCK_K], ready,
                                                p.more_tiles.index(stage))
            step += 1


@gluon.jit
def chain_of(p, chain, more, first, last, step, NUMBER: gl.constexpr, PINGPONG: gl.constexpr):
    """Steps first to last of a tile's chains, two products in flight: the chains, and the number of the next step.

    Step 0 begins a chain and reads nothing of `chain`. `more` are the chains of MORE further columns.
    """
    for k in range(first, last):
        stage = step % p.STAGES
        mbarrier.wait(p.full.index(stage), step // p.STAGES & 1)
        a = p.a_tiles.index(stage * p.GROUPS + NUMBER % p.GROUPS)
        chain = warpgroup_mma(a, p.b_tiles.index(stage).permute((1, 0)), chain, use_acc=k > 0, is_async=True)
        if p.MORE:
            more = warpgroup_mma(a, p.more_tiles.index(stage).permute((1, 0)), more, use_acc=k > 0, is_async=True)
            chain, more = warpgroup_mma_wait(2, (chain, more))
        else:
            chain = warpgroup_mma_wait(1, (chain,))
        if k > first:  # the last step's product has been made, so its tiles may be overwritten
            mbarrier.arrive(p.empty.index((step + p.STAGES - 1) % p.STAGES))
        step += 1
    if PINGPONG:  # no load of ours is waited for any more: the other group's tile is next
        mbarrier.arrive(p.turn.index(1 - NUMBER))
    if p.MORE:
        chain, more = warpgroup_mma_wait(0, (chain, more))
    else:
        chain = warpgroup_mma_wait(0, (chain,))
    mbarrier.arrive(p.empty.index((step + p.STAGES - 1) % p.STAGES))
    return chain, more, step


@gluon.jit
def store(p, y, y_ptr, a0, b0, WIDE: gl.constexpr):
    """A tile of y, or of a segment's sums, with its first row of the high and of the wide side."""
    layout: gl.constexpr = y.type.layout
    a_rows = a0 + gl.arange(0, p.ROWS, gl.SliceLayout(1, layout))
    b_rows = b0 + gl.arange(0, WIDE, gl.SliceLayout(0, layout))
    if p.SWAP:
        place = a_rows[:, None] + b_rows.to(gl.int64)[None, :] * p.A
    else:
        place = a_rows.to(gl.int64)[:, None] * p.B + b_rows[None, :]
    gl.store(y_ptr + place, y, (a_rows < p.A)[:, None] & (b_rows < p.B)[None, :])


@gluon.jit
def finish(p, total, staging, y_ptr, bias_ptr, a0, b0, WIDE: gl.constexpr, STAGED: gl.constexpr):
    """The bias, one rounding, the store; with STAGED it is turned in `staging`, shared memory that is ours."""
    layout: gl.constexpr = total.type.layout
    if p.BIAS:
        if p.SWAP:
            a_rows = a0 + gl.arange(0, p.ROWS, gl.SliceLayout(1, layout))
            total += gl.load(bias_ptr + a_rows, a_rows < p.A, 0.0).to(gl.float32)[:, None]
        else:
            b_rows = b0 + gl.arange(0, WIDE, gl.SliceLayout(0, layout))
            total += gl.load(bias_ptr + b_rows, b_rows < p.B, 0.0).to(gl.float32)[None, :]
    y = total.to(y_ptr.dtype.element_ty)
    if p.STORE:
        LINE: gl.constexpr = 32 if WIDE > 128 else WIDE // 8
        turned: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, 4], [0, 1])
        straight: gl.constexpr = gl.BlockedLayout([1, 8], [32 // LINE, LINE], [4, 1], [1, 0])
        out: gl.constexpr = turned if p.SWAP else straight
        if STAGED:
            lines = staging._reinterpret(y.dtype, [p.ROWS, WIDE], gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))
            lines.store(y)
            y = lines.load(out)
        else:
            y = gl.convert_layout(y, out)
        store(p, y, y_ptr, a0, b0, WIDE)
    else:
        store(p, y, y_ptr, a0, b0, WIDE)


@gluon.constexpr_function
def layout_of(wide):
    """Which thread of four warps holds what of a tile of sums."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, wide, 16])


@gluon.jit
def nothing(ROWS: gl.constexpr, WIDE: gl.constexpr):
    """A tile of zeros, or for no columns just 0."""
    if WIDE:
        zeros = gl.zeros([ROWS, WIDE], gl.float32, layout_of(WIDE))
    else:
        zeros = 0
    return zeros


@gluon.jit
def halves(tile, ROWS: gl.constexpr, WIDE: gl.constexpr):
    """The first and the last half of a tile's columns; each thread keeps what it holds."""
    first, last = gl.split(tile.reshape([ROWS, 2, WIDE // 2]).permute((0, 2, 1)))
    layout: gl.constexpr = layout_of(WIDE // 2)
    return gl.convert_layout(first, layout, assert_trivial=True), gl.convert_layout(last, layout, assert_trivial=True)


@gluon.jit
def slot_of(pointer, ROWS: gl.constexpr, WIDE: gl.constexpr):
    """Where in memory a tile of sums waits: what the 32 threads of a warp store at once lies side by side.

    A thread holds pairs of columns, of rows that are 8 apart; 4 threads share 8 columns, 8 groups of 4 the rows.
    """
    if WIDE:
        layout: gl.constexpr = layout_of(WIDE)
        row = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
        column = gl.arange(0, WIDE, gl.SliceLayout(0, layout))
        rows = row // 64 * (64 * WIDE) + row // 8 % 2 * 256 + row % 64 // 16 * 64 + row % 8 * 8
        slot = pointer + rows[:, None] + (column // 8 * 512 + column % 8)[None, :]
    else:
        slot = pointer
    return slot
