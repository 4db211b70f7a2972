"""What Hopper's attention kernel does to one tile in registers: scores, weights, sums, and the merge of leaves.

Every add is written out, two numbers at a time (a sum of two has no order), so no layout can change it. wgmma holds
what meets here in one thread: `assert_trivial` proves at compile time that nothing moves.
"""
from __future__ import annotations

import inspect

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma

from ...arithmetic.elementary import LN2 as LN2_NUMBER
from ...arithmetic.elementary import tl_log

barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # its name before and after Triton 3.7
log = gluon.jit(getattr(tl_log, "fn", None) or inspect.unwrap(tl_log))

ROWS = gl.constexpr(64)  # query rows a group of four warps
BLOCK = gl.constexpr(128)  # keys a block: part of the order
LN2 = gl.constexpr(LN2_NUMBER)
LOWEST = gl.constexpr(-3.4028234663852886e38)  # where maxima begin: no score is lower, and no difference is NaN


@gluon.constexpr_function
def tile_layout(columns):
    """Which thread of four warps holds what of a tile of wgmma, 64 rows high."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 16])


@gluon.jit
def lane_sums(p):
    """(R, 128) -> (R, 4): sum t is over columns 8j + 2t and 8j + 2t + 1, the halves of j first, the pair last."""
    R: gl.constexpr = p.shape[0]
    x = p.reshape([R, 16, 4, 2]).permute((0, 2, 1, 3)).reshape([R, 4, 32])
    x = gl.sum(x.reshape([R, 4, 2, 16]), axis=2)
    x = gl.sum(x.reshape([R, 4, 2, 8]), axis=2)
    x = gl.sum(x.reshape([R, 4, 2, 4]), axis=2)
    x = gl.sum(x.reshape([R, 4, 2, 2]), axis=2)
    return gl.sum(x, axis=2)


@gluon.jit
def join(sums, like):
    """(R, 4) -> (R,): lanes 0 + 1 and 2 + 3, then these two; in the layout of `like`."""
    R: gl.constexpr = sums.shape[0]
    x = gl.sum(gl.sum(sums.reshape([R, 2, 2]), axis=2), axis=1)
    return gl.convert_layout(x, like.type.layout, assert_trivial=True)


@gluon.jit
def scaled(sums, alpha, block):
    """sums * alpha + block, fused; alpha is (R,)."""
    a = gl.convert_layout(alpha, gl.SliceLayout(1, sums.type.layout), assert_trivial=True)
    return gl.fma(sums, gl.expand_dims(a, 1).broadcast_to(sums.shape), block)


@gluon.jit
def for_rows_of(x, tile):
    """A number a row, in the layout that the tile's rows have."""
    return gl.convert_layout(x, gl.SliceLayout(1, tile.type.layout), assert_trivial=True)


@gluon.jit
def rows_of(x, tile):
    """A number a row, for each column of the tile."""
    return gl.expand_dims(for_rows_of(x, tile), 1).broadcast_to(tile.shape)


@gluon.jit
def top_of(s, m, scale):
    """A row's maximum, times scale, after another block's scores."""
    return gl.maximum(for_rows_of(m, s), gl.max(s, axis=1) * scale)


@gluon.jit
def weights_of(s, top, scale):
    return gl.exp2(gl.fma(s, gl.full_like(s, 0.0) + scale, rows_of(-top, s)))


@gluon.jit
def seen(s, position, key):
    """Scores of queries at these positions, and keys from `key` on: -inf where the key comes later."""
    keys = key + gl.arange(0, s.shape[1], gl.SliceLayout(0, s.type.layout))
    return gl.where(gl.expand_dims(keys, 0) <= gl.expand_dims(for_rows_of(position, s), 1), s, float("-inf"))


@gluon.jit
def as_operand(p, BF16: gl.constexpr):
    """Weights as the left operand of wgmma; two are rounded by one instruction (p.to() would swap halves and back)."""
    layout: gl.constexpr = gl.DotOperandLayout(0, p.type.layout, 2)
    if BF16:
        pairs = gl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [p], dtype=gl.bfloat16,
                                          is_pure=True, pack=2)
    else:
        pairs = gl.inline_asm_elementwise("cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [p], dtype=gl.float16,
                                          is_pure=True, pack=2)
    return gl.convert_layout(pairs, layout, assert_trivial=True)


@gluon.jit
def scores(q, keys):
    """The scores of a block, still being made."""
    none = gl.zeros([ROWS, BLOCK], gl.float32, tile_layout(BLOCK))
    return warpgroup_mma(q, keys.permute((1, 0)), none, use_acc=False, is_async=True)


@gluon.jit
def weighed(s, m, scale, BF16: gl.constexpr):
    """A block's scores -> (its weights as an operand, the maxima now, the sums of its lanes)."""
    top = top_of(s, m, scale)
    weights = weights_of(s, top, scale)
    return as_operand(weights, BF16), top, lane_sums(weights)


@gluon.jit
def _spread(x):
    """A tile as (16-byte slots of a thread, threads, 4): in shared memory each thread's 16 bytes lie beside its
    neighbour's. Each thread keeps what it holds."""
    N: gl.constexpr = x.shape[1]
    y = x.reshape([4, 2, 8, N // 16, 2, 4, 2]).permute((1, 3, 0, 2, 5, 4, 6))
    return y.reshape([N // 8, 128, 4])


@gluon.jit
def put(held, x):
    held.store(_spread(x))


@gluon.jit
def get(held, like):
    """What `put` left there, in the layout of `like`."""
    N: gl.constexpr = like.shape[1]
    x = held.load(_spread(like).type.layout).reshape([2, N // 16, 4, 8, 4, 2, 2]).permute((2, 0, 3, 1, 5, 4, 6))
    return gl.convert_layout(x.reshape([64, N]), like.type.layout, assert_trivial=True)


@gluon.jit
def factors(M, m):
    """What two partial results, of maxima M and m, are scaled by: (joint maximum, factor of M's, factor of m's)."""
    top = gl.maximum(M, m)
    return top, gl.exp2(M - top), gl.exp2(m - top)


@gluon.jit
def merged(rest, acc, a, c):
    """The newer leaves' tile and this one's, on one scale."""
    return gl.fma(rest, rows_of(a, acc), acc * rows_of(c, acc))


@gluon.jit
def reciprocal(x):
    """1 / x rounded correctly; 0 where nothing was summed, so that such a row is 0."""
    y = gl.inline_asm_elementwise("rcp.rn.f32 $0, $1;", "=r,r", [x], dtype=gl.float32, is_pure=True, pack=1)
    return gl.where(x == 0.0, 0.0, y)


@gluon.jit
def bar(KIND: gl.constexpr, number, THREADS: gl.constexpr, WARPS: gl.constexpr):
    """PTX's named barrier `number` of THREADS threads, `sync` or `arrive`, by all threads of a partition.

    Triton's mbarrier.arrive puts a barrier among the partition's warps before it; `arrive` here does without. Triton
    itself uses the lowest few of the 16 barriers. Each barrier's arrivals and syncs must balance at the end.
    """
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    x = gl.full([32 * WARPS], 0, gl.int32, layout) + number
    gl.inline_asm_elementwise("bar." + KIND + " $1, " + THREADS + "; mov.u32 $0, $1;", "=r,r", [x], dtype=gl.int32,
                              is_pure=False, pack=1)
