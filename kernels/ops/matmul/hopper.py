"""The matrix product's chain on Hopper with loads in a warp of their own, written in Gluon.

One warp copies tiles of x and of the weight into shared memory, ahead of one, two or three groups of four warps that
each walk k in order into one accumulator. So several tensor core instructions are always in flight, and a tile may be
192 rows high or 160 wide. Two groups may take turns, so that one stores its tile while the other multiplies; and where
tiles do not divide evenly among the multiprocessors, a program carries a chain it began over to the next. Plain Triton
cannot write these, and products of 128 tokens and more want them.
steps.py imports this file when a schedule of kind `hopper` runs, on sm_90.

Annotations are not imported from __future__ here: Triton reads those of an aggregate as classes.
"""
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
from triton.language.core import _aggregate as aggregate
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ...launch import Step
from .descriptors import tiles_of
from .product import Product
from .schedule import SHARED, Schedule, Unsuitable

barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # its name before and after Triton 3.7


def suits(schedule: Schedule, product: Product) -> None:
    """Raise Unsuitable for tiles and switches that the kernel cannot carry out."""
    s = schedule
    rows, wide, more, _ = _sides(s)
    high = s.block_n if s.swap else s.block_m
    if (product.dtype == torch.float32 or s.warps not in (4, 8, 12) or high not in (rows, rows * (s.warps // 4))
            or rows not in (64, 128) or not 16 <= wide + more <= 256 or more & (more - 1) or 0 < more < 16):
        raise Unsuitable("schedules of kind hopper take 16-bit numbers, have 4, 8 or 12 warps with 64 or 128 rows for "
                         f"each four, and up to 256 columns, a sum of two powers of 2, got {s}")
    if s.pingpong and (s.warps != 8 or rows * (wide + more) > 128 * 128 or product.cut or s.stream):
        raise Unsuitable(f"two groups of four warps that take turns walk one chain of a tile up to 128x128, got {s}")
    if s.split and not s.reduce:  # where the last segment ends early, bulk copies bring zeros
        raise Unsuitable(f"kind hopper splits into segments, which a second kernel adds, got {s}")
    if s.stream and product.cut and not s.split:
        raise Unsuitable(f"a chain is carried over where segments have programs of their own, got {s}")
    held = _waiting(s, product)
    if held and (more or rows * wide > 64 * 256 or s.shared_bytes + held > SHARED):
        raise Unsuitable(f"there is no room for the sums while the next segment is made, got {s}")


def memory(schedule: Schedule, product: Product) -> tuple[int, int]:
    """(float32 numbers, counters) with which programs carry chains over."""
    if not schedule.stream:
        return 0, 0
    programs = product.programs(schedule)
    return programs * schedule.block_m * schedule.block_n, programs * schedule.warps // 4


def step(s: Schedule, product: Product) -> Step:
    """The launch of a schedule. Raises Unsuitable for strides that bulk copies cannot read."""
    p = product
    rows, most, more, consumers = _sides(s)
    sides = {"x": ((p.m, p.k), p.x_strides), "weight": ((p.n, p.k), p.weight_strides)}
    high, wide = ("weight", "x") if s.swap else ("x", "weight")
    a, b, rest = (size and tiles_of(p.dtype, *sides[side], (size, s.block_k), with_layout) or None
                  for side, size in ((high, rows), (wide, most), (wide, more)))
    return Step(kernel, p.programs(s),
                {"a_desc": a, "b_desc": b, "more_desc": rest, "y_ptr": p.dtype, "bias_ptr": p.dtype,
                 "work_ptr": torch.float32, "flag_ptr": torch.int32},
                {**p.sizes, **p.segments},
                {"ROWS": rows, "B_TILE": most, "MORE": more, "BLOCK_K": s.block_k, "GROUP": s.group,
                 "CONSUMERS": consumers, "STAGES": s.stages, "SWAP": s.swap, "CUT": p.cut,
                 "HALVES": _waiting(s, p) > 0, "BIAS": p.bias, "STORE": s.store, "PINGPONG": s.pingpong,
                 "SPLIT": s.split, "STREAM": s.stream, "REGISTERS": 160 if consumers == 3 else 232},
                {"num_warps": 4},
                {"a_desc": high, "b_desc": wide, "more_desc": wide})


def _sides(s: Schedule) -> tuple[int, int, int, int]:
    """(rows a consumer, columns as their largest power of 2, the rest of them, consumers)."""
    consumers = s.warps // 4
    high, wide = (s.block_n, s.block_m) if s.swap else (s.block_m, s.block_n)
    most = 1 << wide.bit_length() - 1
    return high if s.pingpong else high // max(consumers, 1), most, wide - most, consumers


def _waiting(s: Schedule, product: Product) -> int:
    """Bytes of shared memory in which half of the sums wait, if segments follow each other."""
    return s.waiting_bytes if product.cut and not s.split else 0


def with_layout(descriptor) -> TensorDescriptor:
    """A plain descriptor of a matrix as Gluon wants it: with the layout of its tiles in shared memory."""
    block = list(descriptor.block_shape)
    dtype = gl.bfloat16 if descriptor.base.dtype == torch.bfloat16 else gl.float16
    layout = gl.NVMMASharedLayout.get_default_for(block, dtype)
    return TensorDescriptor(descriptor.base, descriptor.shape, descriptor.strides, block, layout)


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
        if number == 0:  # leading steps, which the next program takes over
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
def _produce(p, a_desc, b_desc, more_desc):
    """Keep every stage of shared memory filled, job after job."""
    steps = gl.cdiv(p.length if p.SPLIT else p.K, p.BLOCK_K)
    parts = p.segments if p.SPLIT else 1
    units = gl.cdiv(p.A, p.ROWS * p.GROUPS) * gl.cdiv(p.B, p.B_TILE + p.MORE) * parts
    step = 0
    for number in range(_jobs(units, p.STREAM)):
        unit, first, last = _job(number, units, steps, p.STREAM)
        a0, b0 = _place(unit // parts, p.A, p.B, p.ROWS * p.GROUPS, p.B_TILE + p.MORE, p.GROUP)
        base = unit % parts * p.length
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
def _chain(p, chain, more, first, last, step, NUMBER: gl.constexpr, PINGPONG: gl.constexpr):
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
def _store(p, y, y_ptr, a0, b0, WIDE: gl.constexpr):
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
def _finish(p, total, staging, y_ptr, bias_ptr, a0, b0, WIDE: gl.constexpr, STAGED: gl.constexpr):
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
        _store(p, y, y_ptr, a0, b0, WIDE)
    else:
        _store(p, y, y_ptr, a0, b0, WIDE)


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
def _consume(p, y_ptr, bias_ptr, work_ptr, flag_ptr, NUMBER: gl.constexpr):
    """Group NUMBER's rows of each tile, or with PINGPONG all rows of every second tile."""
    FIRST: gl.constexpr = NUMBER if p.PINGPONG else 0
    TURNS: gl.constexpr = 2 if p.PINGPONG else 1
    SIZE: gl.constexpr = p.ROWS * (p.B_TILE + p.MORE)
    sums = p.held.index(NUMBER)
    steps = gl.cdiv(p.length if p.SPLIT else p.K, p.BLOCK_K)
    parts = p.segments if p.SPLIT else 1
    units = gl.cdiv(p.A, p.ROWS * p.GROUPS) * gl.cdiv(p.B, p.B_TILE + p.MORE) * parts
    mine = gl.program_id(0) * p.GROUPS + NUMBER % p.GROUPS
    slot = _slot(work_ptr + mine * SIZE, p.ROWS, p.B_TILE)
    more_slot = _slot(work_ptr + mine * SIZE + p.ROWS * p.B_TILE, p.ROWS, p.MORE)
    step = FIRST * steps
    lap = 0
    for number in range(FIRST, _jobs(units, p.STREAM), TURNS):
        unit, first, last = _job(number, units, steps, p.STREAM)
        if last > first:
            a0, b0 = _place(unit // parts, p.A, p.B, p.ROWS * p.GROUPS, p.B_TILE + p.MORE, p.GROUP)
            a0 += NUMBER % p.GROUPS * p.ROWS
            if p.PINGPONG:  # a stage's phase tells our step from one two laps before only if all between have been made
                mbarrier.wait(p.turn.index(NUMBER), (lap + 1 - NUMBER) & 1)
                lap += 1
            chain = _nothing(p.ROWS, p.B_TILE)
            more = _nothing(p.ROWS, p.MORE)
            total = _nothing(p.ROWS, p.B_TILE // 2 if p.HALVES else p.B_TILE)
            more_total = _nothing(p.ROWS, p.MORE)
            if p.STREAM:  # noqa: SIM102 - the second condition is run-time
                if first > 0:  # what the program before us began
                    while gl.atomic_cas(flag_ptr + mine - p.GROUPS, 1, 0, sem="acquire") == 0:
                        pass
                    barrier()
                    chain = gl.load(slot - p.GROUPS * SIZE, cache_modifier=".cg")
                    if p.MORE:
                        more = gl.load(more_slot - p.GROUPS * SIZE, cache_modifier=".cg")
            if p.CUT and not p.SPLIT:  # segments in sequence
                each = p.length // p.BLOCK_K
                for start in range(0, steps, each):
                    chain, more, step = _chain(p, chain, more, 0, gl.minimum(each, steps - start), step, NUMBER, False)
                    if p.HALVES:
                        chain_a, chain_b = _halves(chain, p.ROWS, p.B_TILE)
                        total += chain_a
                        if start > 0:
                            chain_b += sums.load(chain_b.type.layout)
                        sums.store(chain_b)
                    else:
                        total += chain
                        more_total += more
            else:
                chain, more, step = _chain(p, chain, more, first, last, step, NUMBER, p.PINGPONG)
                step += (TURNS - 1) * steps
            if last < steps:
                gl.store(slot, chain)
                if p.MORE:
                    gl.store(more_slot, more)
                barrier()  # every thread's numbers are stored before one thread says so
                gl.atomic_xchg(flag_ptr + mine, 1, sem="release")
            elif p.SPLIT:
                carried = gl.num_programs(0) * p.GROUPS * SIZE if p.STREAM else 0
                part_ptr = work_ptr + carried + (unit % parts).to(gl.int64) * p.A * p.B
                _store(p, chain, part_ptr, a0, b0, p.B_TILE)
                if p.MORE:
                    _store(p, more, part_ptr, a0, b0 + p.B_TILE, p.MORE)
            else:
                if not p.CUT:
                    total += chain
                    more_total += more
                if p.HALVES:
                    rest = _nothing(p.ROWS, p.B_TILE // 2) + sums.load(total.type.layout)
                    _finish(p, total, sums, y_ptr, bias_ptr, a0, b0, p.B_TILE // 2, not p.SWAP)
                    _finish(p, rest, sums, y_ptr, bias_ptr, a0, b0 + p.B_TILE // 2, p.B_TILE // 2, not p.SWAP)
                else:
                    _finish(p, total, sums, y_ptr, bias_ptr, a0, b0, p.B_TILE, False)
                if p.MORE:
                    _finish(p, more_total, sums, y_ptr, bias_ptr, a0, b0 + p.B_TILE, p.MORE, False)


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
    A = gl.to_tensor(N if SWAP else M)
    B = gl.to_tensor(M if SWAP else N)
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
    shared = (a_tiles, b_tiles, more_tiles, held, full, empty, turn)
    sizes = (A, B, gl.to_tensor(K), gl.to_tensor(segments), gl.to_tensor(length))
    p = Program(shared, sizes, (ROWS, B_TILE, MORE, BLOCK_K, GROUP, GROUPS, STAGES, SWAP, CUT, HALVES, BIAS, STORE,
                                PINGPONG, SPLIT, STREAM))
    if CONSUMERS == 1:
        gl.warp_specialize([(_consume, (p, y_ptr, bias_ptr, work_ptr, flag_ptr, 0)),
                            (_produce, (p, a_desc, b_desc, more_desc))], [1], [24])
    elif CONSUMERS == 2:
        gl.warp_specialize([(_consume, (p, y_ptr, bias_ptr, work_ptr, flag_ptr, 0)),
                            (_consume, (p, y_ptr, bias_ptr, work_ptr, flag_ptr, 1)),
                            (_produce, (p, a_desc, b_desc, more_desc))], [4, 1], [REGISTERS, 24])
    else:
        gl.warp_specialize([(_consume, (p, y_ptr, bias_ptr, work_ptr, flag_ptr, 0)),
                            (_consume, (p, y_ptr, bias_ptr, work_ptr, flag_ptr, 1)),
                            (_consume, (p, y_ptr, bias_ptr, work_ptr, flag_ptr, 2)),
                            (_produce, (p, a_desc, b_desc, more_desc))], [4, 4, 1], [REGISTERS, REGISTERS, 24])


# for hopper_tree.py, whose kernel has the same parts: renamed, they would count as other code than what was recorded
sides, place, produce, chain_of, nothing, finish = _sides, _place, _produce, _chain, _nothing, _finish
