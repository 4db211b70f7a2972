"""Copies of x and of the weight, into rows that begin at whole lines of memory.

Bulk copies want contiguous rows that begin at multiples of 16 bytes, so not a K that is no multiple of 8, nor columns
of another matrix. Pointers follow any rows, at two bytes a load. For many tokens it is faster to copy first. (Rows at
multiples of 16 and not of 128 bytes can be followed, but each piece of one touches a line more.) The order
stays that of the true K: what the copies hold beyond it is never read, and bulk copies bring zeros there, as they do in
every product whose K is no multiple of a tile. Such zeros leave every bit. Added to a chain of +0 or of numbers they
change nothing, nor infinity, nor NaN, and a chain of -0 that they make +0 is added to +0 next (order.py).
"""
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch

from ...launch import Launch, Step
from ...runtime import device_function, tl, triton
from .product import Product
from .schedule import Schedule

SIDE = 64  # rows and columns that a program copies: either side may be the contiguous one
MANY = 32  # with more tokens, and without a model of time, copying the weight is taken for less than reading it so


def offered(product: Product, found: Iterable[Schedule]) -> list[Schedule]:
    """The schedules of choice, those of bulk copies on copies where these cannot follow the rows of many tokens.

    What a model of time chose (cost.py) says by itself that it reads copies, for few tokens too.
    """
    if product.m <= MANY or product.dtype == torch.float32 or product.followed:
        return list(found)
    return [replace(s, copy=s.kind != "pointer") for s in found]


def width(product: Product) -> int:
    """Numbers from one row of a copy to the next: whole lines of memory, and whole tiles of the copying kernel."""
    return product.k + -product.k % SIDE


def copied(product: Product) -> Product:
    """The product of the copies."""
    x, weight = ((width(product), 1) if apart else strides for apart, strides in
                 zip(product.apart, (product.x_strides, product.weight_strides), strict=True))
    return replace(product, x_strides=x, weight_strides=weight)


def sizes(product: Product) -> tuple[int, int]:
    """Numbers in the copy of x and in that of the weight."""
    of_x, of_weight = product.apart
    return of_x * product.m * width(product), of_weight * product.n * width(product)


def step(product: Product) -> Step:
    """The launch that makes the copies."""
    p = product
    pointers = ("x_ptr", "weight_ptr", "x_copy_ptr", "weight_copy_ptr")
    strides = dict(zip(("x_stride", "x_step", "weight_stride", "weight_step"), (*p.x_strides, *p.weight_strides),
                       strict=True))
    tiles = sum(-(-size // width(p) // SIDE) for size in sizes(p)) * (width(p) // SIDE)
    return Step(copy_kernel, tiles, dict.fromkeys(pointers, p.dtype), {**p.sizes, **strides, "width": width(p)},
                {"OF_X": p.apart[0], "OF_WEIGHT": p.apart[1], "SIDE": SIDE}, {})


def reading(launch: Step, product: Product) -> Step:
    """The launch of a schedule by pointers, told that what they point to are the copies."""
    there = {f"{name}_ptr": f"{name}_copy_ptr" for name, apart in zip(("x", "weight"), product.apart, strict=True)
             if apart and f"{name}_ptr" in launch.pointers}
    return replace(launch, named={**launch.named, **there})


class Copies:
    """The copies that a product needs, made ready for GPU `index`."""

    def __init__(self, product: Product, index: int):
        self.launch, self.dtype, self.apart = Launch(step(product), index), product.dtype, product.apart
        self.of_x, of_weight = sizes(product)
        self.size, self.bytes = self.of_x + of_weight, product.dtype.itemsize

    def __call__(self, px: int, pw: int, device) -> tuple[torch.Tensor, int, int]:
        """Copy on the current stream. -> memory to hold until what reads it is launched, pointers to read instead."""
        memory = torch.empty(self.size, dtype=self.dtype, device=device)
        x_copy = memory.data_ptr()
        weight_copy = x_copy + self.of_x * self.bytes
        self.launch(px | pw, px, pw, x_copy, weight_copy)
        return memory, x_copy if self.apart[0] else px, weight_copy if self.apart[1] else pw


@device_function
def _copy(tile, from_ptr, to_ptr, rows, K, stride, step, width, SIDE: tl.constexpr):
    """Tile number `tile` of a matrix (rows, K), with zeros up to the copy's width."""
    row = (tile // (width // SIDE) * SIDE + tl.arange(0, SIDE))[:, None]
    k = (tile % (width // SIDE) * SIDE + tl.arange(0, SIDE))[None, :]
    numbers = tl.load(from_ptr + row.to(tl.int64) * stride + k.to(tl.int64) * step, mask=(row < rows) & (k < K),
                      other=0.0)
    tl.store(to_ptr + row.to(tl.int64) * width + k, numbers, mask=row < rows)


@triton.jit(do_not_specialize=["M"])
def copy_kernel(x_ptr, weight_ptr, x_copy_ptr, weight_copy_ptr, M, N, K, x_stride, x_step, weight_stride, weight_step,
                width, OF_X: tl.constexpr, OF_WEIGHT: tl.constexpr, SIDE: tl.constexpr, PDL: tl.constexpr):
    """x (M, K) and weight (N, K), or one of them, into rows `width` apart: programs for x first, then the weight's."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    tile = tl.program_id(0)
    if OF_X and OF_WEIGHT:
        tiles = tl.cdiv(M, SIDE) * (width // SIDE)
        if tile < tiles:
            _copy(tile, x_ptr, x_copy_ptr, M, K, x_stride, x_step, width, SIDE)
        else:
            _copy(tile - tiles, weight_ptr, weight_copy_ptr, N, K, weight_stride, weight_step, width, SIDE)
    elif OF_X:
        _copy(tile, x_ptr, x_copy_ptr, M, K, x_stride, x_step, width, SIDE)
    else:
        _copy(tile, weight_ptr, weight_copy_ptr, N, K, weight_stride, weight_step, width, SIDE)
