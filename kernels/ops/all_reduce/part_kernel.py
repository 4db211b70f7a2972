"""Kind pointer for one GPU's leaves of a tree: 1, 2 or 4 of them follow each other in one program, any strides.

As in matmul/tree.py, a leaf's end is a number known at run time alone, so no compiler can join two chains; and all
leaves are walked, where k ends before they do over zeros.
"""
from __future__ import annotations

import torch

from ...launch import Step
from ...runtime import tl, triton
from ..matmul.leaves import join
from ..matmul.product import Product
from ..matmul.schedule import Schedule
from ..matmul.tiles import dot, finish, place


def step(s: Schedule, product: Product) -> Step:
    """The launch of a schedule: y is float32, `product.order` says how many leaves and how long."""
    p, leaves = product, product.order.segments
    strides = dict(zip(("x_stride", "x_step", "weight_stride", "weight_step"),
                       (*p.x_strides, *p.weight_strides), strict=True))
    return Step(pointer_kernel, p.tiles(s), {"x_ptr": p.dtype, "weight_ptr": p.dtype, "y_ptr": torch.float32},
                {**p.sizes, "length": p.order.length, **strides},
                {"BLOCK_M": s.block_m, "BLOCK_N": s.block_n, "BLOCK_K": s.block_k, "GROUP": s.group, "SWAP": s.swap,
                 "LEAVES": leaves, "EVEN_N": p.n % s.block_n == 0, "EVEN_K": p.k == leaves * p.order.length,
                 "ADDER": p.adder},
                {"num_warps": s.warps, "num_stages": s.stages})


@triton.jit(do_not_specialize=["M"])
def pointer_kernel(x_ptr, weight_ptr, y_ptr, M, N, K, length, x_stride, x_step, weight_stride, weight_step,
                   BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
                   SWAP: tl.constexpr, LEAVES: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
                   ADDER: tl.constexpr, PDL: tl.constexpr):
    """One tile of a part a program."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    m0, n0 = place(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP)
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
    leaf = 0
    left = length
    for block in tl.range(0, LEAVES * length, BLOCK_K):
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
        left -= BLOCK_K
        if left == 0:
            low, mid, high = join(chain, leaf, low, mid, high)
            chain = tl.zeros_like(chain)
            leaf += 1
            left = length
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    if LEAVES == 1:
        total = low
    elif LEAVES == 2:
        total = mid
    else:
        total = high
    finish(tl.zeros_like(total) + total, y_ptr, y_ptr, m0, n0, M, N, BLOCK_M, BLOCK_N, SWAP, False)
