"""Rotary positions: each head of a row turned by its position's angles, pair by pair.

    y[i]       = x[i] * cos[i] - x[i + D/2] * sin[i]               for i < D/2
    y[i + D/2] = x[i + D/2] * cos[i] + x[i] * sin[i]

with cos and sin from the row of a table that a position names: D/2 cosines, then D/2 sines (model/rotary_table.py
makes one).

The order. Both products are rounded to float32, then their difference or sum is, then that is rounded to x's dtype.
Nothing is fused. Infinities and NaN go the way these operations send them.

Why a batch cannot change it: a result names two numbers of its own head and two of its own position's row of the table.
The number of rows, the neighbours, the GPU and the launch appear nowhere.

A position outside the table is a ValueError on a CPU. On a GPU the host does not look: such a row is NaN throughout,
and no memory outside the table is read.

Models call `rotary_into` (into.py beside this file), which also puts keys and values into their cache.

Source: Su et al., RoFormer, arXiv 2104.09864.
"""
from __future__ import annotations

import torch

from ...runtime import device_function, tl


def angles(table, positions):
    """Each position's cosines and sines, (T, 1, D/2); NaN for one outside the table."""
    inside = (positions >= 0) & (positions < len(table))
    rows = torch.where(inside[:, None], table[positions.clamp(0, len(table) - 1)], float("nan"))
    return rows[:, None].chunk(2, -1)


def turned(x, cos, sin):
    """x in float32, every head of it turned."""
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


@device_function
def tl_angles(table_ptr, position, context, column, HALF: tl.constexpr):
    """`angles` of one position, at these columns."""
    inside = (position >= 0) & (position < context)
    at, mask = table_ptr + position * 2 * HALF + column, inside & (column < HALF)
    return tl.load(at, mask=mask, other=float("nan")), tl.load(at + HALF, mask=mask, other=float("nan"))


@device_function
def tl_turned(a, b, cos, sin):
    """`turned` of the halves of some heads; fusion is off."""
    a, b = a.to(tl.float32), b.to(tl.float32)
    return a * cos - b * sin, b * cos + a * sin


def check_places(name: str, places: torch.Tensor, first: str, x: torch.Tensor) -> None:
    """One int64 for each token of x, the argument called `first`. Raises TypeError or ValueError by name."""
    if not isinstance(places, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(places).__name__}")
    if places.dtype != torch.int64 or places.layout != torch.strided:
        raise TypeError(f"{name} must be a strided tensor of int64, got {places.layout} of {places.dtype}")
    if places.shape != x.shape[:1]:
        raise ValueError(f"{name} must have shape ({len(x)},), one for each token, got {tuple(places.shape)}")
    if places.device != x.device:
        raise ValueError(f"{name} must be on {first}'s device {x.device}, got {places.device}")


def check_angles(first: str, x: torch.Tensor, table: torch.Tensor, positions: torch.Tensor) -> None:
    """A table of x's width, and a position for each token of x; on a CPU, one that lies in the table."""
    if not isinstance(table, torch.Tensor):
        raise TypeError(f"table must be a tensor, got {type(table).__name__}")
    if table.dtype != torch.float32 or table.layout != torch.strided:
        raise TypeError(f"table must be a strided tensor of float32, got {table.layout} of {table.dtype}")
    if table.device != x.device:
        raise ValueError(f"table must be on {first}'s device {x.device}, got {table.device}")
    if table.dim() != 2 or table.shape[1] != x.shape[2] or not len(table):
        raise ValueError(f"table must have shape (context, {x.shape[2]}), as wide as {first}, got {tuple(table.shape)}")
    check_places("positions", positions, first, x)
    if positions.is_cpu and len(positions) and not 0 <= int(positions.min()) <= int(positions.max()) < len(table):
        raise ValueError(f"positions must lie in 0..{len(table) - 1}, the table's rows, got "
                         f"{int(positions.min())}..{int(positions.max())}")
