"""Kind hopper for one GPU's leaves of a tree: 1, 2 or 4 of them follow each other in one program (sm_90).

Chains are made as in matmul/hopper_chain.py. While a leaf is made, up to two sums wait for it in registers.
"""
from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.language.extra.cuda import gdc_wait

from ...launch import Step
from ..matmul import hopper
from ..matmul.descriptors import tiles_of
from ..matmul.hopper import sides
from ..matmul.hopper_chain import Program, chain_of, finish, nothing, produce
from ..matmul.hopper_walk import place
from ..matmul.product import Product
from ..matmul.schedule import SHARED, Schedule, Unsuitable

REGISTERS = 192  # of a thread's 232, for sums; the rest are for other things


def suits(schedule: Schedule, product: Product) -> None:
    """Raise Unsuitable for tiles and switches that the kernel cannot carry out."""
    s = schedule
    hopper.suits(s, product)
    rows, columns, more, _ = sides(s)
    waiting = {1: 0, 2: 1, 4: 2}[product.order.segments]
    if (more or s.warps > 8 or s.split or s.stream or s.pingpong or s.store or s.shared_bytes > SHARED
            or (1 + waiting) * rows * columns // 128 > REGISTERS):
        raise Unsuitable("kind hopper walks a part with 4 or 8 warps, in tiles whose sides are powers of 2, where a "
                         f"chain and the sums that wait have room, got {s}")


def step(s: Schedule, product: Product) -> Step:
    """The launch of a schedule. Raises Unsuitable for strides that bulk copies cannot read."""
    p = product
    rows, columns, _, consumers = sides(s)
    shapes = {"x": ((p.m, p.k), p.x_strides), "weight": ((p.n, p.k), p.weight_strides)}
    high, wide = ("weight", "x") if s.swap else ("x", "weight")
    a, b = (tiles_of(p.dtype, *shapes[side], (size, s.block_k), hopper.with_layout)
            for side, size in ((high, rows), (wide, columns)))
    return Step(kernel, p.programs(s), {"a_desc": a, "b_desc": b, "y_ptr": torch.float32},
                {**p.sizes, "length": p.order.length},
                {"ROWS": rows, "COLUMNS": columns, "BLOCK_K": s.block_k, "GROUP": s.group, "CONSUMERS": consumers,
                 "STAGES": s.stages, "SWAP": s.swap, "LEAVES": p.order.segments},
                {"num_warps": 4}, {"a_desc": high, "b_desc": wide})


@gluon.jit
def _leaf(p, chain, blocks, step, NUMBER: gl.constexpr):
    """The chain of the next leaf of so many blocks, and the next step's number; nothing is read of `chain`."""
    chain, _, step = chain_of(p, chain, 0, 0, blocks, step, NUMBER, False)
    return chain, step


@gluon.jit
def _two(p, chain, blocks, step, NUMBER: gl.constexpr):
    """The sum of the next two leaves."""
    chain, step = _leaf(p, chain, blocks, step, NUMBER)
    left = nothing(p.ROWS, p.B_TILE) + chain
    chain, step = _leaf(p, chain, blocks, step, NUMBER)
    return left + chain, step


@gluon.jit
def _consume(p, y_ptr, NUMBER: gl.constexpr, LEAVES: gl.constexpr):
    """Group NUMBER's rows of each tile."""
    blocks = p.length // p.BLOCK_K
    tiles = gl.cdiv(p.A, p.ROWS * p.GROUPS) * gl.cdiv(p.B, p.B_TILE)
    step = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        a0, b0 = place(tile, p.A, p.B, p.ROWS * p.GROUPS, p.B_TILE, p.GROUP)
        chain = nothing(p.ROWS, p.B_TILE)
        if LEAVES == 1:
            total, step = _leaf(p, chain, blocks, step, NUMBER)
        elif LEAVES == 2:
            total, step = _two(p, chain, blocks, step, NUMBER)
        else:
            left, step = _two(p, chain, blocks, step, NUMBER)
            right, step = _two(p, chain, blocks, step, NUMBER)
            total = left + right
        total = nothing(p.ROWS, p.B_TILE) + total
        finish(p, total, p.held.index(0), y_ptr, y_ptr, a0 + NUMBER * p.ROWS, b0, p.B_TILE, False)


@gluon.jit(do_not_specialize=["M"])
def kernel(a_desc, b_desc, y_ptr, M, N, K, length,
           ROWS: gl.constexpr, COLUMNS: gl.constexpr, BLOCK_K: gl.constexpr, GROUP: gl.constexpr,
           CONSUMERS: gl.constexpr, STAGES: gl.constexpr, SWAP: gl.constexpr, LEAVES: gl.constexpr,
           PDL: gl.constexpr):
    """The high side a (rows shared out among the CONSUMERS) is x, or with SWAP the weight; the wide side b is the
    other. Programs walk tiles; launched with 4 warps, which are the first consumer."""
    if PDL:
        gdc_wait()
    A = gl.to_tensor(N if SWAP else M)
    B = gl.to_tensor(M if SWAP else N)
    a_tiles = gl.allocate_shared_memory(a_desc.dtype, [STAGES * CONSUMERS, ROWS, BLOCK_K], a_desc.layout)
    b_tiles = gl.allocate_shared_memory(b_desc.dtype, [STAGES, COLUMNS, BLOCK_K], b_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=CONSUMERS)
    fence_async_shared()
    shared = (a_tiles, b_tiles, b_tiles, a_tiles, full, empty, empty)
    leaves = gl.to_tensor(LEAVES)  # where k ends before they do, bulk copies bring zeros
    sizes = (A, B, leaves * length, leaves, gl.to_tensor(length))
    p = Program(shared, sizes, (ROWS, COLUMNS, 0, BLOCK_K, GROUP, CONSUMERS, STAGES, SWAP, True, False, False, False,
                                False, False, False))
    if CONSUMERS == 1:
        gl.warp_specialize([(_consume, (p, y_ptr, 0, LEAVES)), (produce, (p, a_desc, b_desc, b_desc))], [1], [24])
    else:
        gl.warp_specialize([(_consume, (p, y_ptr, 0, LEAVES)), (_consume, (p, y_ptr, 1, LEAVES)),
                            (produce, (p, a_desc, b_desc, b_desc))], [4, 1], [232, 24])
