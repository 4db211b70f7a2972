"""Other implementations of our ops, to be measured beside ours."""
from __future__ import annotations

import torch

from ..arithmetic.sums import ordered_sum
from ..call import check_tensors
from ..runtime import Unavailable


def flashinfer_rms_norm(x, weight, residual=None, eps=1e-6):
    """FlashInfer's kernel; with a residual it overwrites x and residual, as its API does."""
    try:
        from flashinfer import norm
    except ImportError as error:
        raise Unavailable(f"flashinfer: {error}") from None
    if residual is None:
        return norm.rmsnorm(x, weight, eps)
    norm.fused_add_rmsnorm(x, residual, weight, eps)
    return x, residual


def split_rms_norm(x, weight, residual=None, eps=1e-6, parts=None):
    """How bits move: the row's sum is cut into parts, as many as leave no core idle, so *the batch* decides the order.

    For teaching. With few rows each is cut in up to 128 parts; with many it stays whole. Same arguments and
    result as the specification, same accuracy, other bits for other batches.
    """
    check_tensors(x=x, weight=weight, **({} if residual is None else {"residual": residual}))
    stream = x if residual is None else (x.float() + residual.float()).to(x.dtype)
    rows, width = max(x.numel() // x.shape[-1], 1), x.shape[-1]
    parts = parts or min(width, max(1, 128 // rows))
    square = stream.float() ** 2
    total = sum(ordered_sum(piece) for piece in square.tensor_split(parts, dim=-1))
    y = (stream.float() * torch.rsqrt(total / width + eps) * weight.float()).to(x.dtype)
    return y if residual is None else (y, stream)
