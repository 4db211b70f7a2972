"""The order of one element of a matrix product y = x @ weight.T + bias, and the specification that adds so.

For weight (N, K). float16 and bfloat16: a chain over k, sixteen products a step, each step one addition of the tensor
core (arithmetic/tensor_core.py says what that rounds). float32: a chain over k of fused multiply-adds, one rounding
each. One chain leaves a GPU idle where a weight has few rows, and where k is very long. There `order(N, K)` cuts k
into segments of one length, each with a chain of its own that starts from zero. The sum starts from +0, the chains
are added to it in sequence in float32, then the bias; the result is rounded once to the dtype.

A weight whose k several GPUs may share has another order, `shared_order(N, K)`: k in eight leaves of one length, each
a chain of its own from zero, whose sums are added in pairs, ((0+1) + (2+3)) + ((4+5) + (6+7)), before that is added to
+0. So each of 1, 2, 4 or 8 GPUs has one number to send, the sum of its own leaves (shared.py).

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
LEAVES, ROUNDS = 8, 3  # of a tree: added in pairs so many times, one sum is left
LEAF_STEP, SHORTEST_LEAF = 32, 64  # the length of a leaf is a multiple; two blocks of k at least


class Order(NamedTuple):
    """k is cut into `segments` pieces of `length`, the last of which may be shorter; (1, K) is one chain."""

    segments: int
    length: int


class Tree(NamedTuple):
    """k is cut into `segments` leaves of `length`, the last of which may be shorter, or empty with a sum of +0.

    Neighbours are added in pairs, `rounds` times.
    """

    segments: int
    length: int
    rounds: int = ROUNDS


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


def shared_order(n: int, k: int, gpus: int = LEAVES) -> Order | Tree:
    """The order of a whole weight (n, k) whose k at most `gpus` GPUs may ever share: 1, or 8 for 1, 2, 4 and 8 of them.

    Eight leaves of an eighth of k, rounded up to a multiple of 32, and at least 64. Raises ValueError for another
    number of GPUs.
    """
    if gpus == 1:
        return order(n, k)
    if gpus != LEAVES:
        raise ValueError(f"gpus must be 1 or {LEAVES}, the most GPUs that may ever share a weight, got {gpus!r}")
    length = max(-(-k // LEAVES), SHORTEST_LEAF)
    return Tree(LEAVES, length + -length % LEAF_STEP)


def is_tree(given: Sequence[int] | None) -> bool:
    """Whether an order that a call names is a tree, here or as torch.library passes it on: (leaves, length, rounds)."""
    return isinstance(given, (tuple, list)) and len(given) == len(Tree._fields)


def asked(given: Sequence[int] | None, n: int, k: int) -> Order | Tree:
    """The order that a call for weight (n, k) asks for, in sequence or a tree; None asks for `order(n, k)`.

    Raises TypeError or ValueError that says what an order may be.
    """
    if given is None:
        return order(n, k)
    if not isinstance(given, (tuple, list)) or len(given) not in (2, 3) or any(type(v) is not int for v in given):
        raise TypeError("order must be two integers (segments, length), three of a tree (leaves, length, rounds), or "
                        f"None, got {given!r}")
    if not is_tree(given):
        return checked(given, n, k)
    count, length, rounds = given
    if (count, rounds) != (LEAVES, ROUNDS) or length < SHORTEST_LEAF or length % LEAF_STEP or count * length < k:
        raise ValueError(f"order of a tree must be ({LEAVES}, length, {ROUNDS}), its length a multiple of {LEAF_STEP}, "
                         f"at least {SHORTEST_LEAF} and an eighth of k = {k}, got {tuple(given)}")
    return Tree(count, length, rounds)


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


def check_call(x, weight, bias=None, given: Sequence[int] | None = None) -> None:
    """`check`, for an order that may be a tree."""
    check(x, weight, bias)
    asked(given, *weight.shape)


def specified(x, weight, bias=None, given: Sequence[int] | None = None) -> torch.Tensor:
    """The specification without gradients: x (..., K), weight (N, K), bias (N,) or None -> (..., N) in x's dtype."""
    check_call(x, weight, bias, given)
    found = asked(given, *weight.shape)
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    total = torch.zeros(len(rows), len(weight), dtype=torch.float32, device=x.device)
    if isinstance(found, Tree):
        total = total + leaves(rows, weight, found.length)
    else:
        for start in range(0, found.segments * found.length, max(found.length, 1)):
            piece = slice(start, start + found.length)
            total = total + chain(rows[:, piece], weight[:, piece])
    if bias is not None:
        total = total + bias.float()
    return total.to(x.dtype).view(*x.shape[:-1], len(weight))


def leaves(x, weight, length: int, count: int = LEAVES, first: int = 0) -> torch.Tensor:
    """The sum of `count` leaves of k, a power of two, from leaf `first` on: x (M, K), weight (N, K) -> (M, N) float32.

    One leaf is a chain; more are the sum of their first half added to that of their second half.
    """
    if count == 1:
        piece = slice(first * length, (first + 1) * length)
        return chain(x[:, piece], weight[:, piece])
    half = count // 2
    return leaves(x, weight, length, half, first) + leaves(x, weight, length, half, first + half)


def chain(x, weight) -> torch.Tensor:
    """One chain over k: x (M, K), weight (N, K) -> (M, N) float32."""
    if x.dtype != torch.float32:
        return tensor_core.chain(x, weight)
    total = torch.zeros(len(x), len(weight), dtype=torch.float32, device=x.device)
    for k in range(x.shape[1]):
        total = fma(x[:, k, None].expand_as(total), weight[None, :, k].expand_as(total), total)
    return total
