"""The matrix product's chain on Hopper with loads in a warp of their own, written in Gluon.

One warp copies tiles of x and of the weight into shared memory, ahead of one, two or three groups of four warps that
each walk k in order into one accumulator. So several tensor core instructions are always in flight, and a tile may be
192 rows high or 160 wide. Two groups may take turns, so that one stores its tile while the other multiplies; and where
tiles do not divide evenly among the multiprocessors, a program carries a chain it began over to the next. Plain Triton
cannot write these, and products of 128 tokens and more want them.
steps.py imports this file when a schedule of kind `hopper` runs, on sm_90.
What a program does is in hopper_walk.py, what its warps do in hopper_chain.py.
"""
from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ...launch import Step
from .descriptors import tiles_of
from .hopper_chain import Program, chain_of, finish, halves, nothing, produce, slot_of, store
from .hopper_walk import abreast_of, first_rows, job, jobs, segment_of
from .product import Product
from .schedule import SHARED, Schedule, Unsuitable

barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # its name before and after Triton 3.7


def suits(schedule: Schedule, product: Product) -> None:
    """Raise Unsuitable for tiles and switches that the kernel cannot carry out."""
    s = schedule
    rows, wide, more, _ = sides(s)
    high = s.block_n if s.swap else s.block_m
    if (product.dtype == torch.float32 or s.warps not in (4, 8, 12) or high not in (rows, rows * (s.warps // 4))
            or rows not in (64, 128) or not 16 <= wide + more <= 256 or more & (more - 1) or 0 < more < 16):
        raise Unsuitable("schedules of kind hopper take 16-bit numbers, have 4, 8 or 12 warps with 64 or 128 rows for "
                         f"each four, and up to 256 columns, a sum of two powers of 2, got {s}")
    if s.pingpong and (s.warps != 8 or rows * (wide + more) > 128 * 192 or product.cut or s.stream):
        raise Unsuitable(f"two groups of four warps that take turns walk one chain of a tile up to 128x192, got {s}")
    if s.split and not s.reduce:  # where the last segment ends early, bulk copies bring zeros
        raise Unsuitable(f"kind hopper splits into segments, which a second kernel adds, got {s}")
    if s.stream and product.cut and not s.split:
        raise Unsuitable(f"a chain is carried over where segments have programs of their own, got {s}")
    if s.lockstep and product.programs(s) > min(product.units(s), product.multiprocessors):
        raise Unsuitable(f"chains are carried over where every program runs and has one, got {s}")
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
    rows, most, more, consumers = sides(s)
    matrices = {"x": ((p.m, p.k), p.x_strides), "weight": ((p.n, p.k), p.weight_strides)}
    high, wide = ("weight", "x") if s.swap else ("x", "weight")
    a, b, rest = (size and tiles_of(p.dtype, *matrices[side], (size, s.block_k), with_layout) or None
                  for side, size in ((high, rows), (wide, most), (wide, more)))
    return Step(kernel, p.programs(s),
                {"a_desc": a, "b_desc": b, "more_desc": rest, "y_ptr": p.dtype, "bias_ptr": p.dtype,
                 "work_ptr": torch.float32, "flag_ptr": torch.int32},
                {**p.sizes, **p.segments},
                {"ROWS": rows, "B_TILE": most, "MORE": more, "BLOCK_K": s.block_k, "GROUP": s.group,
                 "CONSUMERS": consumers, "STAGES": s.stages, "SWAP": s.swap, "CUT": p.cut,
                 "HALVES": _waiting(s, p) > 0, "BIAS": p.bias, "STORE": s.store, "PINGPONG": s.pingpong,
                 "SPLIT": s.split, "STREAM": 2 if s.lockstep else s.stream,
                 "REGISTERS": 160 if consumers == 3 else 232},
                {"num_warps": 4},
                {"a_desc": high, "b_desc": wide, "more_desc": wide})


def sides(s: Schedule) -> tuple[int, int, int, int]:
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
    slot = slot_of(work_ptr + mine * SIZE, p.ROWS, p.B_TILE)
    more_slot = slot_of(work_ptr + mine * SIZE + p.ROWS * p.B_TILE, p.ROWS, p.MORE)
    abreast = abreast_of(p)
    step = FIRST * steps
    lap = 0
    for number in range(FIRST, jobs(units, abreast, p.STREAM), TURNS):
        unit, first, last = job(number, units, steps, abreast, p.STREAM)
        if last > first:
            a0, b0 = first_rows(p, unit, parts)
            a0 += NUMBER % p.GROUPS * p.ROWS
            if p.PINGPONG:  # a stage's phase tells our step from one two laps before only if all between have been made
                mbarrier.wait(p.turn.index(NUMBER), (lap + 1 - NUMBER) & 1)
                lap += 1
            chain = nothing(p.ROWS, p.B_TILE)
            more = nothing(p.ROWS, p.MORE)
            total = nothing(p.ROWS, p.B_TILE // 2 if p.HALVES else p.B_TILE)
            more_total = nothing(p.ROWS, p.MORE)
            if p.STREAM:  # noqa: SIM102 - the second condition is run-time
                if first > 0:  # what the program before us began
                    while gl.atomic_cas(flag_ptr + mine - abreast * p.GROUPS, 1, 0, sem="acquire") == 0:
                        pass
                    barrier()
                    chain = gl.load(slot - abreast * p.GROUPS * SIZE, cache_modifier=".cg")
                    if p.MORE:
                        more = gl.load(more_slot - abreast * p.GROUPS * SIZE, cache_modifier=".cg")
            if p.CUT and not p.SPLIT:  # segments in sequence
                each = p.length // p.BLOCK_K
                for start in range(0, steps, each):
                    count = gl.minimum(each, steps - start)
                    chain, more, step = chain_of(p, chain, more, 0, count, step, NUMBER, False)
                    if p.HALVES:
                        chain_a, chain_b = halves(chain, p.ROWS, p.B_TILE)
                        total += chain_a
                        if start > 0:
                            chain_b += sums.load(chain_b.type.layout)
                        sums.store(chain_b)
                    else:
                        total += chain
                        more_total += more
            else:
                chain, more, step = chain_of(p, chain, more, first, last, step, NUMBER, p.PINGPONG)
                step += (TURNS - 1) * steps
            if last < steps:
                gl.store(slot, chain)
                if p.MORE:
                    gl.store(more_slot, more)
                barrier()  # every thread's numbers are stored before one thread says so
                gl.atomic_xchg(flag_ptr + mine, 1, sem="release")
            elif p.SPLIT:
                carried = gl.num_programs(0) * p.GROUPS * SIZE if p.STREAM else 0
                part_ptr = work_ptr + carried + segment_of(p, unit, parts).to(gl.int64) * p.A * p.B
                store(p, chain, part_ptr, a0, b0, p.B_TILE)
                if p.MORE:
                    store(p, more, part_ptr, a0, b0 + p.B_TILE, p.MORE)
            else:
                if not p.CUT:
                    total += chain
                    more_total += more
                if p.HALVES:
                    rest = nothing(p.ROWS, p.B_TILE // 2) + sums.load(total.type.layout)
                    finish(p, total, sums, y_ptr, bias_ptr, a0, b0, p.B_TILE // 2, not p.SWAP)
                    finish(p, rest, sums, y_ptr, bias_ptr, a0, b0 + p.B_TILE // 2, p.B_TILE // 2, not p.SWAP)
                else:
                    finish(p, total, sums, y_ptr, bias_ptr, a0, b0, p.B_TILE, False)
                if p.MORE:
                    finish(p, more_total, sums, y_ptr, bias_ptr, a0, b0 + p.B_TILE, p.MORE, False)


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
    With STREAM chains are shared out evenly, with STREAM 2 in lockstep (hopper_walk.py).
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
                            (produce, (p, a_desc, b_desc, more_desc))], [1], [24])
    elif CONSUMERS == 2:
        gl.warp_specialize([(_consume, (p, y_ptr, bias_ptr, work_ptr, flag_ptr, 0)),
                            (_consume, (p, y_ptr, bias_ptr, work_ptr, flag_ptr, 1)),
                            (produce, (p, a_desc, b_desc, more_desc))], [4, 1], [REGISTERS, 24])
    else:
        gl.warp_specialize([(_consume, (p, y_ptr, bias_ptr, work_ptr, flag_ptr, 0)),
                            (_consume, (p, y_ptr, bias_ptr, work_ptr, flag_ptr, 1)),
                            (_consume, (p, y_ptr, bias_ptr, work_ptr, flag_ptr, 2)),
                            (produce, (p, a_desc, b_desc, more_desc))], [4, 4, 1], [REGISTERS, REGISTERS, 24])
