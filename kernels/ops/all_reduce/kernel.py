"""The kernel that every schedule adds with: up to eight parts in their tree, the bias, one rounding, the stores."""
from __future__ import annotations

import torch

from ...launch import Step
from ...runtime import device_function, tl, triton

MOST = 8
PARTS = tuple(f"part{i}_ptr" for i in range(MOST))
RESULTS = tuple(f"y{i}_ptr" for i in range(MOST))


@device_function
def _pair(left_ptr, right_ptr, i, inside):
    """One addition. Not through L1, which does not see what another GPU has written."""
    return (tl.load(left_ptr + i, mask=inside, other=0.0, cache_modifier=".cg")
            + tl.load(right_ptr + i, mask=inside, other=0.0, cache_modifier=".cg"))


@triton.jit
def join_kernel(part0_ptr, part1_ptr, part2_ptr, part3_ptr, part4_ptr, part5_ptr, part6_ptr, part7_ptr, bias_ptr,
                y0_ptr, y1_ptr, y2_ptr, y3_ptr, y4_ptr, y5_ptr, y6_ptr, y7_ptr, start, end, N,
                PARTS: tl.constexpr, RESULTS: tl.constexpr, BLOCK: tl.constexpr, BIAS: tl.constexpr,
                PDL: tl.constexpr):
    """Elements start to end of y from PARTS parts; the same numbers are stored in RESULTS places."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    i = start + tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < end
    if PARTS == 1:
        tree = tl.load(part0_ptr + i, mask=inside, other=0.0, cache_modifier=".cg")
    elif PARTS == 2:
        tree = _pair(part0_ptr, part1_ptr, i, inside)
    elif PARTS == 4:
        tree = _pair(part0_ptr, part1_ptr, i, inside) + _pair(part2_ptr, part3_ptr, i, inside)
    else:
        tree = ((_pair(part0_ptr, part1_ptr, i, inside) + _pair(part2_ptr, part3_ptr, i, inside))
                + (_pair(part4_ptr, part5_ptr, i, inside) + _pair(part6_ptr, part7_ptr, i, inside)))
    total = tl.zeros([BLOCK], tl.float32) + tree
    if BIAS:
        total += tl.load(bias_ptr + i % N, mask=inside, other=0.0).to(tl.float32)
    y = total.to(y0_ptr.dtype.element_ty)
    tl.store(y0_ptr + i, y, mask=inside)
    if RESULTS >= 2:
        tl.store(y1_ptr + i, y, mask=inside)
    if RESULTS >= 4:
        tl.store(y2_ptr + i, y, mask=inside)
        tl.store(y3_ptr + i, y, mask=inside)
    if RESULTS == 8:
        tl.store(y4_ptr + i, y, mask=inside)
        tl.store(y5_ptr + i, y, mask=inside)
        tl.store(y6_ptr + i, y, mask=inside)
        tl.store(y7_ptr + i, y, mask=inside)


def join(parts: int, results: int, start: int, end: int, n: int, dtype: torch.dtype, bias: torch.dtype | None,
         block: int, warps: int) -> Step:
    """The launch that makes elements start to end of a result (..., n) in `results` places.

    Pointers past the last part or place are given as the first one; nothing is read or written there.
    """
    return Step(join_kernel, -(-(end - start) // block),
                {**dict.fromkeys(PARTS, torch.float32), "bias_ptr": bias or dtype, **dict.fromkeys(RESULTS, dtype)},
                {"start": start, "end": end, "N": n},
                {"PARTS": parts, "RESULTS": results, "BLOCK": block, "BIAS": bias is not None}, {"num_warps": warps})


def filled(pointers: list) -> list:
    """Eight pointers: those given, then the first again."""
    return [*pointers, *pointers[:1] * (MOST - len(pointers))]
