"""Kind hopper for an order that is a tree: eight leaves of k follow each other in one program.

While a leaf is made, up to three sums wait for it: of one leaf, of two and of four. They wait in registers; in a large
tile, whose registers have room for three chains, the sum of four waits in shared memory. hopper_chain.py makes the
chains. Larger tiles would have to leave more of them in global memory: on an H200 that cost more than it saved.
"""
from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.language.extra.cuda import gdc_wait

from ...launch import Step
from . import hopper
from .descriptors import tiles_of
from .hopper import sides
from .hopper_chain import Program, chain_of, finish, nothing, produce
from .hopper_walk import place
from .product import Product
from .schedule import SHARED, Schedule, Unsuitable

REGISTERS = 192  # of a thread's 232, for sums; the rest are for other things


def suits(schedule: Schedule, product: Product) -> None:
    """Raise Unsuitable for tiles and switches that the kernel cannot carry out."""
    s = schedule
    hopper.suits(s, product)
    held = 4 * s.block_m * s.block_n if _held(s) else 0
    if sides(s)[2] or s.warps > 8 or 3 * _sums(s) > REGISTERS or s.shared_bytes + held > SHARED:
        raise Unsuitable("kind hopper walks a tree with 4 or 8 warps, in tiles whose sides are powers of 2, where "
                         f"three and the sums that wait have room, got {s}")


def memory(schedule: Schedule, product: Product) -> tuple[int, int]:
    """No numbers and no counters."""
    return 0, 0


def step(s: Schedule, product: Product) -> Step:
    """The launch of a schedule. Raises Unsuitable for strides that bulk copies cannot read."""
    p = product
    rows, columns, _, consumers = sides(s)
    shapes = {"x": ((p.m, p.k), p.x_strides), "weight": ((p.n, p.k), p.weight_strides)}
    high, wide = ("weight", "x") if s.swap else ("x", "weight")
    a, b = (tiles_of(p.dtype, *shapes[side], (size, s.block_k), hopper.with_layout)
            for side, size in ((high, rows), (wide, columns)))
    return Step(kernel, p.programs(s),
                {"a_desc": a, "b_desc": b, "y_ptr": p.dtype, "bias_ptr": p.dtype, "work_ptr": torch.float32,
                 "flag_ptr": torch.int32},
                {**p.sizes, "length": p.order.length},
                {"ROWS": rows, "COLUMNS": columns, "BLOCK_K": s.block_k, "GROUP": s.group, "CONSUMERS": consumers,
                 "STAGES": s.stages, "SWAP": s.swap, "HELD": _held(s), "BIAS": p.bias, "STORE": s.store},
                {"num_warps": 4},
                {"a_desc": high, "b_desc": wide})


def _sums(s: Schedule) -> int:
    """Registers in which a thread has its part of a tile of sums."""
    rows, columns, *_ = sides(s)
    return rows * columns // 128


def _held(s: Schedule) -> bool:
    """Whether sums of four leaves wait in shared memory."""
    return 4 * _sums(s) > REGISTERS


@gluon.jit
def _two(p, chain, blocks, step, NUMBER: gl.constexpr):
    """The sum of the next two leaves of so many blocks, and the next step's number; nothing is read of `chain`."""
    chain, _, step = chain_of(p, chain, 0, 0, blocks, step, NUMBER, False)
    left = nothing(p.ROWS, p.B_TILE) + chain
    chain, _, step = chain_of(p, chain, 0, 0, blocks, step, NUMBER, False)
    return left + chain, step


@gluon.jit
def _four(p, chain, blocks, step, NUMBER: gl.constexpr):
    """The sum of the next four leaves."""
    left, step = _two(p, chain, blocks, step, NUMBER)
    right, step = _two(p, chain, blocks, step, NUMBER)
    return left + right, step


@gluon.jit
def _consume(p, y_ptr, bias_ptr, NUMBER: gl.constexpr, HELD: gl.constexpr):
    """Group NUMBER's rows of each tile."""
    held = p.held.index(NUMBER if HELD else 0)
    blocks = p.length // p.BLOCK_K
    tiles = gl.cdiv(p.A, p.ROWS * p.GROUPS) * gl.cdiv(p.B, p.B_TILE)
    step = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        a0, b0 = place(tile, p.A, p.B, p.ROWS * p.GROUPS, p.B_TILE, p.GROUP)
        chain = nothing(p.ROWS, p.B_TILE)
        left = nothing(p.ROWS, p.B_TILE)
        four = nothing(p.ROWS, p.B_TILE)
        for half in range(2):
            four, step = _four(p, chain, blocks, step, NUMBER)
            if half == 0:
                if HELD:
                    held.store(four)
                else:
                    left = four
        if HELD:
            left = held.load(four.type.layout)
        total = nothing(p.ROWS, p.B_TILE) + (left + four)
        finish(p, total, held, y_ptr, bias_ptr, a0 + NUMBER * p.ROWS, b0, p.B_TILE, HELD and not p.SWAP)


@gluon.jit(do_not_specialize=["M"])
def kernel(a_desc, b_desc, y_ptr, bias_ptr, work_ptr, flag_ptr, M, N, K, length,
           ROWS: gl.constexpr, COLUMNS: gl.constexpr, BLOCK_K: gl.constexpr, GROUP: gl.constexpr,
           CONSUMERS: gl.constexpr, STAGES: gl.constexpr, SWAP: gl.constexpr, HELD: gl.constexpr,
           BIAS: gl.constexpr, STORE: gl.constexpr, PDL: gl.constexpr):
    """The high side a (rows shared out among the CONSUMERS) is x, or with SWAP the weight; the wide side b is the
    other. Programs walk tiles; launched with 4 warps, which are the first consumer. With HELD the sum of four leaves
    waits in shared memory."""
    if PDL:
        gdc_wait()
    A = gl.to_tensor(N if SWAP else M)
    B = gl.to_tensor(M if SWAP else N)
    a_tiles = gl.allocate_shared_memory(a_desc.dtype, [STAGES * CONSUMERS, ROWS, BLOCK_K], a_desc.layout)
    b_tiles = gl.allocate_shared_memory(b_desc.dtype, [STAGES, COLUMNS, BLOCK_K], b_desc.layout)
    if HELD:
        held = gl.allocate_shared_memory(gl.float32, [CONSUMERS, ROWS, COLUMNS],
                                         gl.SwizzledSharedLayout(8, 1, 4, [1, 0]))
    else:
        held = a_tiles
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=CONSUMERS)
    fence_async_shared()
    shared = (a_tiles, b_tiles, b_tiles, held, full, empty, empty)
    leaves = gl.to_tensor(8)  # where k ends before they do, bulk copies bring zeros
    sizes = (A, B, leaves * length, leaves, gl.to_tensor(length))
    p = Program(shared, sizes, (ROWS, COLUMNS, 0, BLOCK_K, GROUP, CONSUMERS, STAGES, SWAP, True, False, BIAS, STORE,
                                False, False, False))
    if CONSUMERS == 1:
        gl.warp_specialize([(_consume, (p, y_ptr, bias_ptr, 0, HELD)),
                            (produce, (p, a_desc, b_desc, b_desc))], [1], [24])
    else:
        gl.warp_specialize([(_consume, (p, y_ptr, bias_ptr, 0, HELD)), (_consume, (p, y_ptr, bias_ptr, 1, HELD)),
                            (produce, (p, a_desc, b_desc, b_desc))], [4, 1], [232, 24])
