"""One order for a long sum, in plain PyTorch and in Triton.

The order, for a row of D numbers. Cut the row into chunks of 1024 and pad the last one with +0.
Add the chunks in sequence, column by column: column j gets ((x[j] + x[1024+j]) + x[2048+j]) + ...
That leaves 1024 column sums. Add neighbours in pairs, 0+1, 2+3, ..., which leaves 512; again, and
again, until one number is left. Every addition is one float32 addition; nothing is fused.

A row narrower than 1024 needs only the power of two that holds it: the columns beyond are +0, and
x + 0 = x. (One exception, harmless where squares are summed: -0 + +0 is +0.)

Why this one. A thread that loads eight neighbours, in a warp of 32 and a block of four warps, holds
columns 0-1023 of each chunk: the chunks and the first three pairings never leave the thread, the next
five are one shuffle each, and two more cross warps. Other thread counts move these borders, not the order.
"""
from __future__ import annotations

import torch

from ..runtime import device_function, tl

CHUNK = 1024


def tree_width(width: int) -> int:
    """How many columns the tree needs for a row this wide: a power of two, at most CHUNK."""
    return min(CHUNK, 1 << max(width - 1, 0).bit_length())


def add_chunks(x: torch.Tensor) -> torch.Tensor:
    """(..., D) -> (..., tree_width(D)): the chunks of 1024 added in sequence."""
    width = tree_width(x.shape[-1])
    x = torch.nn.functional.pad(x, (0, -x.shape[-1] % width)).unflatten(-1, (-1, width))
    total = x[..., 0, :]
    for chunk in range(1, x.shape[-2]):
        total = total + x[..., chunk, :]
    return total


def add_neighbours(x: torch.Tensor) -> torch.Tensor:
    """(..., a power of two) -> (..., 1): neighbours added in pairs until one is left."""
    while x.shape[-1] > 1:
        x = x[..., 0::2] + x[..., 1::2]
    return x


def ordered_sum(x: torch.Tensor) -> torch.Tensor:
    """(..., D) float32 -> (..., 1): the sum over the last dimension in this file's order."""
    return add_neighbours(add_chunks(x))


@device_function
def tree(x):
    """[rows, a power of two] -> [rows, 1]: neighbours added in pairs; a sum of two has no order."""
    for _ in tl.static_range(20):
        if x.shape[1] > 1:
            x = tl.sum(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]), axis=2)
    return x


@device_function
def tree_down(x):
    """[a power of two, columns] -> [1, columns]: neighbours in a column added in pairs."""
    for _ in tl.static_range(20):
        if x.shape[0] > 1:
            x = tl.sum(tl.reshape(x, [x.shape[0] // 2, 2, x.shape[1]]), axis=1)
    return x


@device_function
def add_in_sequence(x_ptr, at, column, inside, length, step, WIDTH: tl.constexpr, FLIGHT: tl.constexpr):
    """A chunk's columns, its numbers at the offsets `at`, each added up over the chunks, which are `step` apart.

    FLIGHT chunks are loaded at a time. What lies beyond the row, or not `inside`, is +0.
    """
    total = tl.zeros(at.shape, tl.float32)
    left = length
    for _ in range((length - 1) // (WIDTH * FLIGHT) + 1):
        xs = ()
        for c in tl.static_range(FLIGHT):
            mask = inside & (column < left - c * WIDTH)
            xs = xs + (tl.load(x_ptr + c * step + at, mask=mask, other=0.0),)
        for c in tl.static_range(FLIGHT):
            total += xs[c].to(tl.float32)
        x_ptr += FLIGHT * step
        left -= FLIGHT * WIDTH
    return total
