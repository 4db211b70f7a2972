"""Kind tma: tiles read by bulk copies (sm_90 and up), and perhaps stored so; K contiguous in both x and weight."""
from __future__ import annotations

import torch

from ...launch import Step
from ...runtime import tl, triton
from .descriptors import tiles_of
from .product import Product
from .schedule import Schedule, Unsuitable, holds_odd
from .tiles import add_segments, dot, finish, for_k, keep_segment, memory, place

__all__ = ["memory", "step", "suits", "tma_kernel"]


def suits(schedule: Schedule, product: Product) -> None:
    """Raise Unsuitable for switches that do not go together."""
    if schedule.split and (schedule.store or schedule.persistent):
        raise Unsuitable(f"persistent programs and bulk stores walk segments in sequence, got {schedule}")
    if schedule.store and schedule.swap:
        raise Unsuitable(f"a swapped tile has no bulk store, got {schedule}")
    if product.n % 2 and not holds_odd(schedule):
        raise Unsuitable(f"shared memory has no room for results of an odd N beside tiles in flight, got {schedule}")


def step(s: Schedule, product: Product) -> Step:
    """The launch of a schedule. Raises Unsuitable for strides that bulk copies cannot read."""
    p = product
    x = tiles_of(p.dtype, (p.m, p.k), p.x_strides, (s.block_m, s.block_k))
    weight = tiles_of(p.dtype, (p.n, p.k), p.weight_strides, (s.block_n, s.block_k))
    y = tiles_of(p.dtype, (p.m, p.n), (p.n, 1), (s.block_m, s.block_n)) if s.store else p.dtype
    return Step(for_k(p.k, tma_kernel), p.programs(s),
                {"x_desc": x, "weight_desc": weight, "y": y, "bias_ptr": p.dtype, "partial_ptr": torch.float32,
                 "counter_ptr": torch.int32},
                {**p.sizes, **p.segments},
                {"BLOCK_M": s.block_m, "BLOCK_N": s.block_n, "BLOCK_K": s.block_k, "GROUP": s.group, "SWAP": s.swap,
                 "CUT": p.cut, "SPLIT": s.split, "REDUCE": s.reduce, "BIAS": p.bias, "STORE": s.store,
                 "PERSISTENT": s.persistent, "FLATTEN": s.flatten, "SPECIALIZE": s.specialize},
                {"num_warps": s.warps, "num_stages": s.stages},
                {"x_desc": "x", "weight_desc": "weight"})


@triton.jit
def _tma_tile(tile, x_desc, weight_desc, y, bias_ptr, partial_ptr, counter_ptr, M, N, K, segments, length,
              BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
              SWAP: tl.constexpr, CUT: tl.constexpr, SPLIT: tl.constexpr, REDUCE: tl.constexpr, BIAS: tl.constexpr,
              STORE: tl.constexpr):
    segment = 0
    start = 0
    end = K
    if SPLIT:
        segment = tile % segments
        tile = tile // segments
        start = segment * length
        end = tl.minimum(K, start + length)
    m0, n0 = place(tile, M, N, BLOCK_M, BLOCK_N, GROUP)
    if SWAP:
        chain = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    else:
        chain = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    total = tl.zeros_like(chain)
    for k in tl.range(start, end, BLOCK_K):
        x = x_desc.load([m0, k])
        weight = weight_desc.load([n0, k])
        chain = dot(x, weight, chain, SWAP, "")
        if CUT and not SPLIT:  # noqa: SIM102 - the second condition is run-time
            if (k + BLOCK_K) % length == 0:
                total += chain
                chain = tl.zeros_like(chain)
    if SPLIT and REDUCE:
        keep_segment(chain, partial_ptr, segment, m0, n0, M, N, BLOCK_M, BLOCK_N, SWAP)
    elif SPLIT:
        total, last = add_segments(chain, partial_ptr, counter_ptr, tile, segment, segments)
        if last:
            finish(total, y, bias_ptr, m0, n0, M, N, BLOCK_M, BLOCK_N, SWAP, BIAS)
    else:
        total += chain
        if STORE:
            if BIAS:
                n = n0 + tl.arange(0, BLOCK_N)
                total += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
            y.store([m0, n0], total.to(x_desc.dtype))
        else:
            finish(total, y, bias_ptr, m0, n0, M, N, BLOCK_M, BLOCK_N, SWAP, BIAS)


@triton.jit(do_not_specialize=["M"])
def tma_kernel(x_desc, weight_desc, y, bias_ptr, partial_ptr, counter_ptr, M, N, K, segments, length,
               BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
               SWAP: tl.constexpr, CUT: tl.constexpr, SPLIT: tl.constexpr, REDUCE: tl.constexpr, BIAS: tl.constexpr,
               STORE: tl.constexpr, PERSISTENT: tl.constexpr, FLATTEN: tl.constexpr, SPECIALIZE: tl.constexpr,
               PDL: tl.constexpr):
    """Tiles read by bulk copies (sm_90 and up), which fill what lies outside with zeros; K contiguous in both."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        if REDUCE:  # its blocks may come, and wait
            tl.extra.cuda.gdc_launch_dependents()
    if PERSISTENT:
        tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN,
                             warp_specialize=SPECIALIZE):
            _tma_tile(tile, x_desc, weight_desc, y, bias_ptr, partial_ptr, counter_ptr, M, N, K, segments, length,
                      BLOCK_M, BLOCK_N, BLOCK_K, GROUP, SWAP, CUT, SPLIT, REDUCE, BIAS, STORE)
    else:
        _tma_tile(tl.program_id(0), x_desc, weight_desc, y, bias_ptr, partial_ptr, counter_ptr, M, N, K, segments,
                  length, BLOCK_M, BLOCK_N, BLOCK_K, GROUP, SWAP, CUT, SPLIT, REDUCE, BIAS, STORE)
