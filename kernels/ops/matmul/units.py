"""Products whose sizes are multiples of 8, 4 or 2, and not of 16: the kernels of three kinds, told so.

Triton asks whether a number is a multiple of 16 and knows nothing of others: it would read and store 1016 numbers a
row two bytes at a time, where 16 would do. A size rounded down to a multiple that it is says what it is a multiple of.
"""
from __future__ import annotations

import math
from dataclasses import replace

from ...launch import Step
from ...runtime import tl, triton
from . import pointer, tma
from .product import Product
from .tiles import for_k


def unit(*numbers: int) -> int:
    """8, 4 or 2, the largest that divides all of these; 1 where none does, or where Triton sees 16 by itself."""
    common = math.gcd(16, *numbers)
    return 1 if common == 16 else common


def told(step: Step, product: Product) -> Step:
    """The launch of a schedule for an order in sequence, told of what sizes and strides are multiples."""
    p, of_n = product, unit(product.n)
    if step.kernel in (for_k(1, pointer.pointer_kernel), for_k(1, tma.tma_kernel)):
        return step
    if step.kernel is not pointer.pointer_kernel:
        return step if of_n == 1 else _with(step, _by_bulk_copies(step), N_UNIT=of_n)
    in_line = p.x_strides[1] == p.weight_strides[1] == 1
    of_k = unit(p.k, p.x_strides[0], p.weight_strides[0]) if in_line else 1
    return step if of_n == of_k == 1 else _with(step, pointer_kernel, N_UNIT=of_n, K_UNIT=of_k)


def _by_bulk_copies(step: Step):
    """The kernel that takes the place of a launch's own."""
    if step.kernel is tma.tma_kernel:
        return tma_kernel
    from . import hopper_units  # written in Gluon, as hopper.py is

    return hopper_units.kernel


def _with(step: Step, kernel, **units: int) -> Step:
    return replace(step, kernel=kernel, constants={**step.constants, **units})


@triton.jit(do_not_specialize=["M"])
def pointer_kernel(x_ptr, weight_ptr, bias_ptr, y_ptr, partial_ptr, counter_ptr, M, N, K, x_stride, x_step,
                   weight_stride, weight_step, segments, length,
                   BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
                   SWAP: tl.constexpr, CUT: tl.constexpr, SPLIT: tl.constexpr, REDUCE: tl.constexpr,
                   BIAS: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, ADDER: tl.constexpr,
                   N_UNIT: tl.constexpr, K_UNIT: tl.constexpr, PDL: tl.constexpr):
    """pointer.py's kernel for N a multiple of N_UNIT; K and the distances of rows multiples of K_UNIT."""
    pointer.pointer_kernel(x_ptr, weight_ptr, bias_ptr, y_ptr, partial_ptr, counter_ptr, M, N // N_UNIT * N_UNIT,
                           K // K_UNIT * K_UNIT, x_stride // K_UNIT * K_UNIT, x_step,
                           weight_stride // K_UNIT * K_UNIT, weight_step, segments, length, BLOCK_M, BLOCK_N, BLOCK_K,
                           GROUP, SWAP, CUT, SPLIT, REDUCE, BIAS, EVEN_N, EVEN_K, ADDER, PDL)


@triton.jit(do_not_specialize=["M"])
def tma_kernel(x_desc, weight_desc, y, bias_ptr, partial_ptr, counter_ptr, M, N, K, segments, length,
               BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
               SWAP: tl.constexpr, CUT: tl.constexpr, SPLIT: tl.constexpr, REDUCE: tl.constexpr, BIAS: tl.constexpr,
               STORE: tl.constexpr, PERSISTENT: tl.constexpr, FLATTEN: tl.constexpr, SPECIALIZE: tl.constexpr,
               N_UNIT: tl.constexpr, PDL: tl.constexpr):
    """tma.py's kernel for N a multiple of N_UNIT."""
    tma.tma_kernel(x_desc, weight_desc, y, bias_ptr, partial_ptr, counter_ptr, M, N // N_UNIT * N_UNIT, K, segments,
                   length, BLOCK_M, BLOCK_N, BLOCK_K, GROUP, SWAP, CUT, SPLIT, REDUCE, BIAS, STORE, PERSISTENT,
                   FLATTEN, SPECIALIZE, PDL)
