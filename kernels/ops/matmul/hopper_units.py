"""The kernel of hopper.py for weight rows a multiple of 8, 4 or 2, and not of 16: told so (units.py says why)."""
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from . import hopper


@gluon.jit(do_not_specialize=["M"])
def kernel(a_desc, b_desc, more_desc, y_ptr, bias_ptr, work_ptr, flag_ptr, M, N, K, segments, length,
           ROWS: gl.constexpr, B_TILE: gl.constexpr, MORE: gl.constexpr, BLOCK_K: gl.constexpr, GROUP: gl.constexpr,
           CONSUMERS: gl.constexpr, STAGES: gl.constexpr, SWAP: gl.constexpr, CUT: gl.constexpr,
           HALVES: gl.constexpr, BIAS: gl.constexpr, STORE: gl.constexpr, PINGPONG: gl.constexpr,
           SPLIT: gl.constexpr, STREAM: gl.constexpr, REGISTERS: gl.constexpr, N_UNIT: gl.constexpr,
           PDL: gl.constexpr):
    """hopper.py's kernel for N a multiple of N_UNIT."""
    hopper.kernel(a_desc, b_desc, more_desc, y_ptr, bias_ptr, work_ptr, flag_ptr, M, N // N_UNIT * N_UNIT, K, segments,
                  length, ROWS, B_TILE, MORE, BLOCK_K, GROUP, CONSUMERS, STAGES, SWAP, CUT, HALVES, BIAS, STORE,
                  PINGPONG, SPLIT, STREAM, REGISTERS, PDL)
