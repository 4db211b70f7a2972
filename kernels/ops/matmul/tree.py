"""Kinds pointer and tma for an order that is a tree: eight leaves of k follow each other in one program, or have
programs of their own (split), the last of which to end adds them.

A leaf's end is a number known at run time alone, so no compiler can join two chains; and a program walks all eight
leaves, where k ends before they do over zeros, so that no place in the tree stays empty.
"""
from __future__ import annotations

import torch

from ...launch import Step
from ...runtime import tl, triton
from .descriptors import tiles_of
from .leaves import join, join_all
from .product import Product
from .schedule import Schedule, Unsuitable
from .tiles import dot, finish, memory, place

__all__ = ["memory", "pointer_kernel", "step", "suits", "tma_kernel"]


def suits(schedule: Schedule, product: Product) -> None:
    """Raise Unsuitable for switches that a tree has not."""
    s = schedule
    if s.persistent or s.store:
        raise Unsuitable(f"kind {s.kind} walks the leaves of one tile a program, and stores by pointer, got {s}")


def step(s: Schedule, product: Product) -> Step:
    """The launch of a schedule. Raises Unsuitable for strides that bulk copies cannot read."""
    p, bulk = product, s.kind == "tma"
    constants = {"BLOCK_M": s.block_m, "BLOCK_N": s.block_n, "BLOCK_K": s.block_k, "GROUP": s.group, "SWAP": s.swap,
                 "SPLIT": s.split, "BIAS": p.bias}
    scalars, rest = {**p.sizes, "length": p.order.length}, {"partial_ptr": torch.float32, "counter_ptr": torch.int32}
    options = {"num_warps": s.warps, "num_stages": s.stages}
    if bulk:
        x = tiles_of(p.dtype, (p.m, p.k), p.x_strides, (s.block_m, s.block_k))
        weight = tiles_of(p.dtype, (p.n, p.k), p.weight_strides, (s.block_n, s.block_k))
        pointers = {"x_desc": x, "weight_desc": weight, "y_ptr": p.dtype, "bias_ptr": p.dtype, **rest}
        return Step(tma_kernel, p.programs(s), pointers, scalars, constants, options,
                    {"x_desc": "x", "weight_desc": "weight"})
    strides = dict(zip(("x_stride", "x_step", "weight_stride", "weight_step"),
                       (*p.x_strides, *p.weight_strides), strict=True))
    constants |= {"EVEN_N": p.n % s.block_n == 0, "EVEN_K": p.k == p.order.segments * p.order.length,
                  "ADDER": p.adder}
    return Step(pointer_kernel, p.programs(s),
                {**dict.fromkeys(("x_ptr", "weight_ptr", "bias_ptr", "y_ptr"), p.dtype), **rest},
                {**scalars, **strides}, constants, options)


@triton.jit(do_not_specialize=["M"])
def pointer_kernel(x_ptr, weight_ptr, bias_ptr, y_ptr, partial_ptr, counter_ptr, M, N, K, length, x_stride, x_step,
                   weight_stride, weight_step, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                   GROUP: tl.constexpr, SWAP: tl.constexpr, SPLIT: tl.constexpr, BIAS: tl.constexpr,
                   EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, ADDER: tl.constexpr, PDL: tl.constexpr):
    """One tile of y a program (with SPLIT: one leaf of one tile), any sizes and strides."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    tile = tl.program_id(0)
    leaf = 0
    start = 0
    end = 8 * length
    if SPLIT:
        leaf = tile % 8
        tile = tile // 8
        start = leaf * length
        end = start + length
    m0, n0 = place(tile, M, N, BLOCK_M, BLOCK_N, GROUP)
    m = m0 + tl.arange(0, BLOCK_M)
    n = n0 + tl.arange(0, BLOCK_N)
    x_row = x_ptr + m.to(tl.int64)[:, None] * x_stride
    weight_row = weight_ptr + n.to(tl.int64)[:, None] * weight_stride
    m_inside = (m < M)[:, None]
    n_inside = (n < N)[:, None]
    if SWAP:
        chain = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    else:
        chain = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    low = tl.zeros_like(chain)
    mid = tl.zeros_like(chain)
    high = tl.zeros_like(chain)
    left = length
    for block in tl.range(start, end, BLOCK_K):
        k = (block + tl.arange(0, BLOCK_K))[None, :]
        x_at = x_row + k.to(tl.int64) * x_step
        weight_at = weight_row + k.to(tl.int64) * weight_step
        if EVEN_K:
            x = tl.load(x_at, mask=m_inside, other=0.0)
        else:
            x = tl.load(x_at, mask=m_inside & (k < K), other=0.0)
        if EVEN_K and EVEN_N:
            weight = tl.load(weight_at)
        elif EVEN_K:
            weight = tl.load(weight_at, mask=n_inside, other=0.0)
        else:
            weight = tl.load(weight_at, mask=n_inside & (k < K), other=0.0)
        chain = dot(x, weight, chain, SWAP, ADDER)
        if not SPLIT:
            left -= BLOCK_K
            if left == 0:
                low, mid, high = join(chain, leaf, low, mid, high)
                chain = tl.zeros_like(chain)
                leaf += 1
                left = length
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    if SPLIT:
        total, last = join_all(chain, partial_ptr, counter_ptr, tile, leaf)
        if last:
            finish(total, y_ptr, bias_ptr, m0, n0, M, N, BLOCK_M, BLOCK_N, SWAP, BIAS)
    else:
        finish(tl.zeros_like(high) + high, y_ptr, bias_ptr, m0, n0, M, N, BLOCK_M, BLOCK_N, SWAP, BIAS)


@triton.jit(do_not_specialize=["M"])
def tma_kernel(x_desc, weight_desc, y_ptr, bias_ptr, partial_ptr, counter_ptr, M, N, K, length,
               BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
               SWAP: tl.constexpr, SPLIT: tl.constexpr, BIAS: tl.constexpr, PDL: tl.constexpr):
    """The same with bulk copies (sm_90 and up), which fill what lies outside with zeros; K contiguous in both."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    tile = tl.program_id(0)
    leaf = 0
    start = 0
    end = 8 * length
    if SPLIT:
        leaf = tile % 8
        tile = tile // 8
        start = leaf * length
        end = start + length
    m0, n0 = place(tile, M, N, BLOCK_M, BLOCK_N, GROUP)
    if SWAP:
        chain = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    else:
        chain = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    low = tl.zeros_like(chain)
    mid = tl.zeros_like(chain)
    high = tl.zeros_like(chain)
    left = length
    for k in tl.range(start, end, BLOCK_K):
        chain = dot(x_desc.load([m0, k]), weight_desc.load([n0, k]), chain, SWAP, "")
        if not SPLIT:
            left -= BLOCK_K
            if left == 0:
                low, mid, high = join(chain, leaf, low, mid, high)
                chain = tl.zeros_like(chain)
                leaf += 1
                left = length
    if SPLIT:
        total, last = join_all(chain, partial_ptr, counter_ptr, tile, leaf)
        if last:
            finish(total, y_ptr, bias_ptr, m0, n0, M, N, BLOCK_M, BLOCK_N, SWAP, BIAS)
    else:
        finish(tl.zeros_like(high) + high, y_ptr, bias_ptr, m0, n0, M, N, BLOCK_M, BLOCK_N, SWAP, BIAS)
