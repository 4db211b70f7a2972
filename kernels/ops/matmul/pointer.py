"""Kind pointer: tiles read through pointers, any sizes and strides, on any GPU and in Triton's interpreter."""
from __future__ import annotations

import torch

from ...launch import Step
from ...runtime import tl, triton
from .product import Product
from .schedule import Schedule
from .tiles import add_segments, dot, finish, for_k, keep_segment, memory, place

__all__ = ["memory", "pointer_kernel", "step", "suits"]


def suits(schedule: Schedule, product: Product) -> None:
    """Every product."""


def step(s: Schedule, product: Product) -> Step:
    """The launch of a schedule."""
    given = dict.fromkeys(("x_ptr", "weight_ptr", "bias_ptr", "y_ptr"), product.dtype)
    strides = dict(zip(("x_stride", "x_step", "weight_stride", "weight_step"),
                       (*product.x_strides, *product.weight_strides), strict=True))
    return Step(for_k(product.k, pointer_kernel), product.programs(s),
                {**given, "partial_ptr": torch.float32, "counter_ptr": torch.int32},
                {**product.sizes, **strides, **product.segments},
                {"BLOCK_M": s.block_m, "BLOCK_N": s.block_n, "BLOCK_K": s.block_k, "GROUP": s.group, "SWAP": s.swap,
                 "CUT": product.cut, "SPLIT": s.split, "REDUCE": s.reduce, "BIAS": product.bias,
                 "EVEN_N": product.n % s.block_n == 0, "EVEN_K": product.k % s.block_k == 0,
                 "ADDER": product.adder},
                {"num_warps": s.warps, "num_stages": s.stages})


@triton.jit(do_not_specialize=["M"])
def pointer_kernel(x_ptr, weight_ptr, bias_ptr, y_ptr, partial_ptr, counter_ptr, M, N, K, x_stride, x_step,
                   weight_stride, weight_step, segments, length,
                   BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
                   SWAP: tl.constexpr, CUT: tl.constexpr, SPLIT: tl.constexpr, REDUCE: tl.constexpr,
                   BIAS: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, ADDER: tl.constexpr,
                   PDL: tl.constexpr):
    """One tile of y a program (with SPLIT: one segment of one tile), any sizes and strides."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        if REDUCE:  # its blocks may come, and wait
            tl.extra.cuda.gdc_launch_dependents()
    tile = tl.program_id(0)
    segment = 0
    start = 0
    end = K
    if SPLIT:
        segment = tile % segments
        tile = tile // segments
        start = segment * length
        end = tl.minimum(K, start + length)
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
    total = tl.zeros_like(chain)
    for block in tl.range(start, end, BLOCK_K):
        k = (block + tl.arange(0, BLOCK_K))[None, :]
        x_at = x_row + k.to(tl.int64) * x_step
        weight_at = weight_row + k.to(tl.int64) * weight_step
        if EVEN_K:
            x = tl.load(x_at, mask=m_inside, other=0.0)
        else:
            x = tl.load(x_at, mask=m_inside & (k < end), other=0.0)
        if EVEN_K and EVEN_N:
            weight = tl.load(weight_at)
        elif EVEN_K:
            weight = tl.load(weight_at, mask=n_inside, other=0.0)
        else:
            weight = tl.load(weight_at, mask=n_inside & (k < end), other=0.0)
        chain = dot(x, weight, chain, SWAP, ADDER)
        if CUT and not SPLIT:  # noqa: SIM102 - the second condition is run-time
            if (block + BLOCK_K) % length == 0:
                total += chain
                chain = tl.zeros_like(chain)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    if SPLIT and REDUCE:
        keep_segment(chain, partial_ptr, segment, m0, n0, M, N, BLOCK_M, BLOCK_N, SWAP)
    elif SPLIT:
        total, last = add_segments(chain, partial_ptr, counter_ptr, tile, segment, segments)
        if last:
            finish(total, y_ptr, bias_ptr, m0, n0, M, N, BLOCK_M, BLOCK_N, SWAP, BIAS)
    else:
        total += chain
        finish(total, y_ptr, bias_ptr, m0, n0, M, N, BLOCK_M, BLOCK_N, SWAP, BIAS)
