"""The product over batches y[b] = x[b] @ weight[b].T: each matrix in the order of ops/matmul/order.py for its N and K.

Why a batch cannot change it: matrix b names its own two factors. How many matrices there are appears nowhere.

The specification is one matrix product after another; float32 takes all of them through a chain together, which is
the same chain in each. The schedule launches one product for each matrix.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..arithmetic.elementary import fma
from ..call import check_tensors
from .matmul import order as orders
from .matmul.op import matmul


def check(x, weight) -> None:
    """Raise TypeError or ValueError for arguments that make no product over batches."""
    check_tensors(x=x, weight=weight)
    if x.dim() != 3:
        raise ValueError(f"x must have three dimensions (B, M, K), got shape {tuple(x.shape)}")
    if weight.dim() != 3 or weight.shape[0] != x.shape[0] or weight.shape[2] != x.shape[2]:
        raise ValueError(f"weight must have shape ({x.shape[0]}, N, {x.shape[2]}), the B and K of x, got "
                         f"{tuple(weight.shape)}")


def specified(x, weight, order=None) -> torch.Tensor:
    """The specification: x (B, M, K), weight (B, N, K) -> (B, M, N) in x's dtype.

    float32, float16 or bfloat16; `order` as in `matmul.python`. Raises TypeError or ValueError for anything else.
    """
    check(x, weight)
    if x.dtype != torch.float32:
        return _each(matmul.python, x, weight, order)
    found = orders.checked(order, *weight.shape[1:])
    total = torch.zeros(*x.shape[:2], weight.shape[1], dtype=torch.float32, device=x.device)
    for start in range(0, x.shape[2], max(found.length, 1)):
        total = total + _chain(x[..., start : start + found.length], weight[..., start : start + found.length])
    return total


def _chain(x, weight) -> torch.Tensor:
    """`chain` of ops/matmul/order.py for float32, over all matrices at once."""
    total = torch.zeros(*x.shape[:2], weight.shape[1], dtype=torch.float32, device=x.device)
    for k in range(x.shape[2]):
        total = fma(x[:, :, k, None].expand_as(total), weight[:, None, :, k].expand_as(total), total)
    return total


def scheduled(x, weight, order=None) -> torch.Tensor:
    """A schedule: the arguments, results and bits of the specification, one launch a matrix."""
    check(x, weight)
    return _each(matmul.triton, x, weight, order)


def _each(product: Callable, x, weight, order) -> torch.Tensor:
    y = torch.empty(*x.shape[:2], weight.shape[1], dtype=x.dtype, device=x.device)
    for b in range(len(x)):
        y[b] = product(x[b], weight[b], None, order)
    return y


@dataclass(frozen=True)
class Batched:
    """The two implementations under an op's names. Its digests are those of `matmul`, matrix for matrix."""

    python: Callable
    triton: Callable


bmm = Batched(specified, scheduled)
