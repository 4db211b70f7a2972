"""Sum and mean over any dimensions.

    sum(x, dim, keepdim)     mean(x, dim, keepdim) = sum * float32(1 / count)

The order. The numbers that make one result, in row-major order of the reduced dimensions (as they stand in x's
shape, in whatever order `dim` names them), are one row of `count` float32 numbers. It is summed as arithmetic/sums.py
says: chunks of 1024 in sequence, then neighbours in pairs. Then +0 is added, which turns -0 into +0 and changes
nothing else. The mean is one float32 multiplication more. The result is rounded once to x's dtype.

Why a batch cannot change it: every step names numbers of one row and their count. The number of rows, the other
dimensions, the strides, the GPU and the launch appear nowhere.

Accuracy, tested against float64 on rows of up to 3000 numbers: within half an ulp of the dtype for the last rounding
and, for each float32 rounding on the way (chunks - 1, log2 of the columns, and 2), 2**-24 of the sum of |x|, or of the
mean of |x|; 1 % more at most.

Corners, all decided by that order:

- A sum of nothing is +0, a mean of nothing NaN (0 * inf).
- Numbers that cancel, and any number of -0.0, give +0, as in torch.
- NaN, or infinities of both signs, give NaN; one sign of infinity gives that infinity.
- A float32 sum may overflow on the way, also where the mean would fit. A float16 sum beyond 65504 becomes infinite
  in the last rounding; its mean does not, being scaled before.
- A tensor without dimensions is a row of one number. An expanded, strided or lazily negated input gives the bits
  of its contiguous copy.
"""
from __future__ import annotations

from math import prod

import torch

from ...arithmetic.sums import ordered_sum
from ...call import check_tensors


def specify(x, dim, keepdim, mean):
    """The sum of x over `dim`, or its mean, in x's dtype. Raises as `check` does."""
    dims = check(x, dim, keepdim)
    kept = [i for i in range(x.dim()) if i not in dims]
    count = prod(x.shape[i] for i in dims)
    rows = x.float().permute((*kept, *dims)).reshape(*[x.shape[i] for i in kept], count)
    total = ordered_sum(rows)[..., 0] + 0.0 if count else rows.new_zeros(rows.shape[:-1])
    if mean:  # a float32 tensor: both factors round once, alike
        total = total * torch.full_like(total, 1.0 / count if count else float("inf"))
    return total.to(x.dtype).view(shape_of(x, dims, keepdim))


def check(x, dim=None, keepdim=False) -> tuple[int, ...]:
    """The reduced dimensions, as `dims_of` has them. Raises TypeError or ValueError for what a sum cannot take."""
    check_tensors(x=x)
    if not isinstance(keepdim, bool):
        raise TypeError(f"keepdim must be True or False, got {type(keepdim).__name__}")
    return dims_of(x, dim)


def dims_of(x, dim) -> tuple[int, ...]:
    """The reduced dimensions counted from 0, in order. None and () mean all, as in torch."""
    given = () if dim is None else dim if isinstance(dim, (tuple, list)) else (dim,)
    for d in given:
        if not isinstance(d, int) or isinstance(d, bool):
            raise TypeError(f"dim must be None, an int or a tuple of ints, got {dim!r}")
        if not -max(x.dim(), 1) <= d < max(x.dim(), 1):
            raise ValueError(f"dim must name dimensions of x, which has {x.dim()}, got {dim!r}")
    counted = sorted(d % max(x.dim(), 1) for d in given)
    if len(set(counted)) < len(counted):
        raise ValueError(f"dim must name each dimension once, got {dim!r} for a tensor that has {x.dim()}")
    return tuple(counted if given and x.dim() else range(x.dim()))


def shape_of(x, dims, keepdim) -> tuple[int, ...]:
    """The shape of the result."""
    return tuple(1 if i in dims else n for i, n in enumerate(x.shape) if keepdim or i not in dims)
