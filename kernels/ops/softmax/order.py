"""softmax and log_softmax over one dimension.

    softmax      y = exp(x - m) * (exp(m - M) / S)
    log_softmax  y = (x - M) - log(S)

The order, for a row of D numbers. Lay it out in chunks of 1024, so that column j holds x[j], x[1024+j], ... and
pad the last chunk with -inf; a row narrower than 1024 has the power of two that holds it as its columns. Each
column keeps two numbers: m, the largest so far (at least -3.4e38, the lowest float32), and s, a sum of exponentials
relative to m. Up to 32 chunks are one segment; a wider row is cut into segments of 8 chunks. For each segment in
sequence

    1. m becomes the largest of m and the column's numbers in the segment
    2. s is multiplied by exp(old m - m)
    3. exp(x - m) is added to s, chunk by chunk in sequence

Then M is the largest m, and S is the sum over the columns of s * exp(m - M), neighbours added in pairs (as
arithmetic/sums.py says). A result of softmax takes its column's m and one factor exp(m - M) * (1 / S). Every step is
one float32 operation, exp and log are those of arithmetic/elementary.py, and the result is rounded once to x's dtype.

Why a batch cannot change it: every step names numbers of one row and the row's own length. The number of
rows, the neighbours, the GPU and the launch appear nowhere. A maximum has no order, so it may be taken in any.

Accuracy, tested against float64 for numbers up to 16 in rows of 1 to 33000: softmax errs by at most 2**-19 |y| in
float32, 2**-11 |y| and 1 % more in float16, 2**-8 |y| and 0.1 % more in bfloat16; log_softmax by at most
2**-22 (1 + |y|), 2**-11 (1 + |y|) and 2**-8 (1 + |y|), the last two and 0.1 % more.

A row with a NaN or +inf, or of -inf alone, gives NaN throughout, as PyTorch's does.

Method: Milakov and Gimelshein, Online normalizer calculation for softmax, arXiv 1805.02867.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from ...arithmetic.elementary import LOWEST_FLOAT, exp, log
from ...arithmetic.sums import add_neighbours, ordered_sum, tree_width
from ...call import check_tensors

WHOLE, SEGMENT = 32, 8  # chunks: rows of up to WHOLE are one segment, wider ones are cut into segments of SEGMENT


def specify(x, dim, logarithm, dtype=None):
    """softmax of x over `dim`, or its logarithm, in `dtype` or x's. Raises as `check` does."""
    dim, dtype = check(x, dim, dtype), dtype or x.dtype
    if x.numel() == 0:
        return torch.empty_like(x, dtype=dtype)
    rows = x.float().reshape(x.shape or (1,)).movedim(dim, -1)
    width = tree_width(rows.shape[-1])
    padded = F.pad(rows, (0, -rows.shape[-1] % width), value=float("-inf"))
    chunks = padded.unflatten(-1, (-1, width)).unbind(-2)
    m, s = _columns(chunks)
    top = m.amax(-1, keepdim=True)
    total = add_neighbours(s * exp(m - top))
    if logarithm:
        rest = log(total)
        y = [(chunk - top) - rest for chunk in chunks]
    else:
        factor = exp(m - top) * (1.0 / total)
        y = [exp(chunk - m) * factor for chunk in chunks]
    y = torch.cat([chunk.to(dtype) for chunk in y], -1)[..., :rows.shape[-1]]
    return y.movedim(-1, dim).contiguous().view(x.shape)


class Differentiable(torch.autograd.Function):
    """The specification with a gradient, whose one sum a row has the order of arithmetic/sums.py."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, dim, logarithm, dtype):
        return specify(x, dim, logarithm, dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):  # apart from `forward`, as torch.func needs it
        ctx.save_for_backward(output)
        x, ctx.dim, ctx.logarithm, _ = inputs
        ctx.dtype = x.dtype

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        result, = ctx.saved_tensors
        if result.numel() == 0:
            return dy.to(ctx.dtype), None, None, None
        y, dy = (t.float().reshape(t.shape or (1,)) for t in (result, dy))
        total = ordered_sum((dy if ctx.logarithm else dy * y).movedim(ctx.dim, -1)).movedim(-1, ctx.dim)
        dx = dy - exp(y) * total if ctx.logarithm else y * (dy - total)
        return dx.to(ctx.dtype).view(result.shape), None, None, None


def _columns(chunks) -> tuple[torch.Tensor, torch.Tensor]:
    """Each column's largest number and its sum of exponentials relative to that."""
    segment = len(chunks) if len(chunks) <= WHOLE else SEGMENT
    m, s = torch.full_like(chunks[0], LOWEST_FLOAT), torch.zeros_like(chunks[0])
    for start in range(0, len(chunks), segment):
        old = m
        for chunk in chunks[start:start + segment]:
            m = torch.maximum(m, chunk)
        s = s * exp(old - m)
        for chunk in chunks[start:start + segment]:
            s = s + exp(chunk - m)
    return m, s


def check(x, dim=-1, dtype=None) -> int:
    """The dimension counted from 0. Raises TypeError or ValueError for what softmax cannot take."""
    check_tensors(x=x)
    if not isinstance(dim, int) or isinstance(dim, bool):
        raise TypeError(f"dim must be an int, got {dim!r}")
    if not -max(x.dim(), 1) <= dim < max(x.dim(), 1):
        raise ValueError(f"dim must name a dimension of x, which has {x.dim()}, got {dim}")
    if dtype not in (None, x.dtype, torch.float32):
        raise TypeError(f"dtype must be None, x's {x.dtype} or torch.float32, got {dtype!r}")
    return dim % max(x.dim(), 1)
