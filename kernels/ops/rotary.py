"""Rotary positions: queries and keys turned in place, keys and values written to the cache. No sum, so no order.

Source: Su et al., RoFormer, arXiv 2104.09864.
"""
from __future__ import annotations

from collections.abc import Callable

import torch

from ..call import Plans
from ..launch import Launch, Step
from ..runtime import require_triton, tl, triton

HEADS_A_PROGRAM = 8


def rotary(table, positions, capacity: int, heads: int) -> Callable:
    """Once a forward: positions (G, W) -> rotate(qkv, kv), which each layer calls.

    qkv is (G, W, heads + 2 * kv_heads, head_dim): queries and keys are rotated in place, in float32, rounded
    once. kv is the layer's cache, (G, capacity, 2 * kv_heads, head_dim): keys and values are written into it.
    """
    positions = positions.clamp(0, capacity - 1)  # a bad one must not reach another request's slots
    cos, sin = table[positions][:, :, None].chunk(2, -1)
    cos, sin = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
    first = torch.arange(0, len(positions) * capacity, capacity, dtype=torch.int64, device=positions.device)[:, None]
    slots = (first + positions).flatten()

    def rotate(qkv, kv):
        qk = qkv[:, :, : heads + kv.shape[2] // 2]
        a, b = qk.chunk(2, -1)
        qk.copy_(qk * cos + torch.cat([b, a], -1) * sin)
        kv.flatten(0, 1).index_copy_(0, slots, qkv[:, :, heads:].flatten(0, 1))
    return rotate


@triton.jit
def _rotary_kernel(qkv_ptr, table_ptr, positions_ptr, kv_ptr, window, capacity, QUERIES: tl.constexpr,
                   KEYS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """BLOCK heads of one token: queries and keys turned in place, keys and values written to the token's slot."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    HEADS: tl.constexpr = QUERIES + 2 * KEYS
    BLOCKS: tl.constexpr = (HEADS + BLOCK - 1) // BLOCK
    token = (tl.program_id(0) // BLOCKS).to(tl.int64)
    head = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)[:, None]
    column = tl.arange(0, HALF)[None, :]
    position = tl.load(positions_ptr + token)
    inside = (position >= 0) & (position < capacity)
    cos = tl.load(table_ptr + position * 2 * HALF + column, mask=inside, other=0.0)
    sin = tl.load(table_ptr + position * 2 * HALF + HALF + column, mask=inside, other=0.0)

    at = qkv_ptr + (token * HEADS + head) * 2 * HALF + column
    a = tl.load(at, mask=head < HEADS, other=0.0)
    b = tl.load(at + HALF, mask=head < HEADS, other=0.0)
    turns = head < QUERIES + KEYS
    x, y = a.to(tl.float32), b.to(tl.float32)
    a = tl.where(turns, (x * cos - y * sin).to(a.dtype), a)
    b = tl.where(turns, (y * cos + x * sin).to(b.dtype), b)
    tl.store(at, a, mask=turns)
    tl.store(at + HALF, b, mask=turns)

    slot = token // window * capacity + position
    into = kv_ptr + (slot * 2 * KEYS + head - QUERIES) * 2 * HALF + column
    keep = (head >= QUERIES) & (head < HEADS) & inside
    tl.store(into, a, mask=keep)
    tl.store(into + HALF, b, mask=keep)


def fused_rotary(table: torch.Tensor, positions: torch.Tensor, capacity: int, heads: int) -> Callable:
    """As `rotary`: positions (G, W) -> rotate(qkv, kv). One launch a layer, none before; all contiguous."""
    positions = positions.contiguous()

    def rotate(qkv, kv):
        index = qkv.get_device()
        key = (index, qkv.dtype, positions.shape, capacity, heads, kv.shape[2:])
        launch = _LAUNCHES.get(key) or _LAUNCHES.keep(key, _ready(index, qkv, kv, positions, capacity, heads))
        pointers = {"qkv_ptr": qkv, "table_ptr": table, "positions_ptr": positions, "kv_ptr": kv}
        if index < 0:
            return launch.step.interpret(pointers)
        at = [t.data_ptr() for t in pointers.values()]
        return launch(at[0] | at[1] | at[2] | at[3], *at)
    return rotate


_LAUNCHES = Plans()


def _ready(index, qkv, kv, positions, capacity, heads) -> Launch:
    require_triton("rotary")
    kv_heads, half = kv.shape[2] // 2, kv.shape[3] // 2
    programs = positions.numel() * -(-(heads + 2 * kv_heads) // HEADS_A_PROGRAM)
    return Launch(Step(_rotary_kernel, programs,
                       {"qkv_ptr": qkv.dtype, "table_ptr": torch.float32, "positions_ptr": torch.int64,
                        "kv_ptr": kv.dtype},
                       {"window": positions.shape[1], "capacity": capacity},
                       {"QUERIES": heads, "KEYS": kv_heads, "HALF": half, "BLOCK": HEADS_A_PROGRAM},
                       {"num_warps": 4}), index)
