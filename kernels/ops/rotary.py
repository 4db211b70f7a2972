"""Two elementwise steps of a decoder, one kernel each instead of five and two. No sum, so no order to fix.

`rotary` and `swiglu` take and give what their namesakes in llama.py do.
"""
from __future__ import annotations

from collections.abc import Callable

import torch

from ..runtime import Compiled, current_stream, tl, triton

HEADS_A_PROGRAM = 8
COLUMNS_A_PROGRAM = 1024


@triton.jit
def _rotary_kernel(qkv_ptr, table_ptr, positions_ptr, kv_ptr, window, capacity, QUERIES: tl.constexpr,
                   KEYS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK heads of one token: queries and keys turned in place, keys and values written to the token's slot."""
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


@triton.jit
def _swiglu_kernel(x_ptr, y_ptr, F: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK columns of one token, in float32, rounded once."""
    BLOCKS: tl.constexpr = (F + BLOCK - 1) // BLOCK
    token = (tl.program_id(0) // BLOCKS).to(tl.int64)
    column = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(x_ptr + token * 2 * F + column, mask=column < F, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + token * 2 * F + F + column, mask=column < F, other=0.0).to(tl.float32)
    y = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(y_ptr + token * F + column, y.to(y_ptr.dtype.element_ty), mask=column < F)


def rotary(table: torch.Tensor, positions: torch.Tensor, capacity: int, heads: int) -> Callable:
    """As llama.rotary: positions (G, W) -> rotate(qkv, kv). One launch a layer, none before; all contiguous."""
    positions = positions.contiguous()
    tokens, window = positions.numel(), positions.shape[1]

    def rotate(qkv, kv):
        kv_heads, half = kv.shape[2] // 2, kv.shape[3] // 2
        grid = tokens * -(-(heads + 2 * kv_heads) // HEADS_A_PROGRAM)
        _launch(_rotary_kernel, grid, (qkv, table, positions, kv), (window, capacity),
                (heads, kv_heads, half, HEADS_A_PROGRAM))
    return rotate


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """As llama.swiglu: (T, 2F), contiguous -> (T, F)."""
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    y = torch.empty(tokens, width, dtype=gate_up.dtype, device=gate_up.device)
    grid = tokens * -(-width // COLUMNS_A_PROGRAM)
    _launch(_swiglu_kernel, grid, (gate_up, y), (), (width, COLUMNS_A_PROGRAM))
    return y


_COMPILED: dict = {}


def _launch(kernel, grid, tensors, scalars, constants):
    """Launch a compiled kernel kept by all that Triton specialises on; on a CPU, Triton's interpreter."""
    index = tensors[0].get_device()
    if index < 0:
        if tensors[0].dtype != torch.float32:
            raise TypeError(f"Triton's interpreter is wrong for {tensors[0].dtype}: give it float32")
        return kernel[(grid,)](*tensors, *scalars, *constants)
    if torch.cuda.current_device() != index:
        with torch.cuda.device(index):
            return _launch(kernel, grid, tensors, scalars, constants)
    pointers = [t.data_ptr() for t in tensors]
    key = (id(kernel), index, grid, tensors[0].dtype, scalars, constants, *[p % 16 == 0 for p in pointers])
    compiled = _COMPILED.get(key)
    if compiled is None:
        compiled = _COMPILED[key] = Compiled(kernel, grid, tensors, scalars, constants, num_warps=4,
                                             enable_fp_fusion=False)
    return compiled(current_stream(index), *pointers, *scalars)
