"""The order of one element of a matrix product y = x @ weight.T + bias, and the specification that adds so.

For weight (N, K). float16 and bfloat16: a chain over k, sixteen products a step, each step one addition of the tensor
core (arithmetic/tensor_core.py says what that rounds). float32: a chain over k of fused multiply-adds, one rounding
each. One chain leaves a GPU idle where a weight has few rows, and where k is very long. There `order(N, K)` cuts k
into segments of one length, each with a chain of its own that starts from zero. The sum starts from +0, the chains
are added to it in sequence in float32, then the bias; the result is rounded once to the dtype.

Why a batch cannot change it: the order names one row of x, one row of the weight, and the two numbers N and K.
The number of tokens chooses tiles, warps, and whether segments run side by side, which is no part of the order.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ...arithmetic import tensor_core
from ...arithmetic.elementary import fma
from ...call import check_tensors, refuse_dual

SEGMENT_STEP = 256  # the length of a segment is a multiple: every tile's block of k divides it
SHORTEST_SEGMENT = 512  # two blocks of k at least: a compiler may merge segments of one block into one chain
FEW_ROWS = 2048  # as many rows fill a GPU with one chain each
LONG = 8192  # with few tokens, a longer chain keeps the GPU waiting


class Order(NamedTuple):
    """k is cut into `segments` pieces of `length`, the last of which may be shorter; (1, K) is one chain."""

    segments: int
    length: int


def order(n: int, k: int) -> Order:
    """The order of a weight (n, k) where the caller names none."""
    wanted = 1
    while wanted < 8 and wanted * n < FEW_ROWS:
        wanted *= 2
    wanted = max(wanted, -(-k // LONG))
    length = max(-(-k // wanted), SHORTEST_SEGMENT)
    length += -length % SEGMENT_STEP
    return Order(1, k) if wanted == 1 or length >= k else Order(-(-k // length), length)


def checked(given: Sequence[int] | None, n: int, k: int) -> Order:
    """The order that a call for weight (n, k) asks for; None asks for `order(n, k)`.

    Raises TypeError or ValueError that says what an order may be.
    """
    if given is None:
        return order(n, k)
    if not isinstance(given, (tuple, list)) or len(given) != 2 or any(type(v) is not int for v in given):
        raise TypeError(f"order must be two integers (segments, length) or None, got {given!r}")
    segments, length = given
    if segments == 1 and length == k:
        return Order(1, k)
    if length < 64 or length % 32 or segments != -(-k // length):
        raise ValueError(f"order must be (1, {k}), or segments of a length that is a multiple of 32 and at least 64, "
                         f"as many as make up k = {k}, got {tuple(given)}")
    return Order(segments, length)


def check(x, weight, bias=None, given: Sequence[int] | None = None) -> None:
    """Raise TypeError or ValueError for arguments that make no product."""
    check_tensors(x=x, weight=weight, **({} if bias is None else {"bias": bias}))
    if weight.dim() != 2:
        raise ValueError(f"weight must have two dimensions (N, K), got shape {tuple(weight.shape)}")
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x must have a last dimension of {weight.shape[1]}, the K of weight {tuple(weight.shape)}, "
                         f"got shape {tuple(x.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape ({weight.shape[0]},), the N of weight, got {tuple(bias.shape)}")
    checked(given, *weight.shape)
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if tensor is not None:
            refuse_dual("matmul", name, tensor)  # the chain is cut out of PyTorch's derivatives


def specified(x, weight, bias=None, given: Sequence[int] | None = None) -> torch.Tensor:
    """The specification without gradients: x (..., K), weight (N, K), bias (N,) or None -> (..., N) in x's dtype."""
    check(x, weight, bias, given)
    segments, length = checked(given, *weight.shape)
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    total = torch.zeros(len(rows), len(weight), dtype=torch.float32, device=x.device)
    for start in range(0, segments * length, max(length, 1)):
        piece = slice(start, start + length)
        total = total + chain(rows[:, piece], weight[:, piece])
    if bias is not None:
        total = total + bias.float()
    return total.to(x.dtype).view(*x.shape[:-1], len(weight))


def chain(x, weight) -> torch.Tensor:
    """One chain over k: x (M, K), weight (N, K) -> (M, N) float32."""
    if x.dtype != torch.float32:
        return tensor_core.chain(x, weight)
    total = torch.zeros(len(x), len(weight), dtype=torch.float32, device=x.device)
    for k in range(x.shape[1]):
        total = fma(x[:, k, None].expand_as(total), weight[None, :, k].expand_as(total), total)
    return total
