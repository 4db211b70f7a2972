"""The order in which the parts of 1, 2, 4 or 8 GPUs become one result, and the specification that adds so.

Each GPU has the products of its own columns of k, added up as `shared_order` of the whole weight says: the sum of its
leaves, one float32 number for each element of the result. With parts p0 to p7 of eight GPUs:

    total = +0 + (((p0 + p1) + (p2 + p3)) + ((p4 + p5) + (p6 + p7)))
    y     = total + bias, rounded once to the result's dtype

Four GPUs have ((0+1) + (2+3)) of it, two (0+1), one its own part. A GPU's part is itself a subtree of the same tree, so
the numbers that are added, and in which pairs, are the same for every number of GPUs.

Why neither a batch nor the number of GPUs can change it: the order names eight leaves of k and one element. Who adds,
by which path numbers travel and how many tokens come together appear nowhere.

Source: Megatron-LM's cut of a layer, Shoeybi et al., arXiv 1909.08053; the order is ours.
"""
from __future__ import annotations

import torch

from ...call import refuse_foreign
from ...op import DTYPES
from ..matmul.shared import SHARES, joined
from . import ranks


def specified(part, bias=None, dtype: torch.dtype | None = None, group=None) -> torch.Tensor:
    """The specification: every rank's part (..., N) float32, bias (N,) or None -> (..., N) in `dtype`, on every rank.

    dtype  of the result, by default float32
    group  of torch.distributed, by default all ranks; parts are added in the order of its ranks

    Raises TypeError or ValueError before anything is sent, RuntimeError if a rank ends or does not come in time.
    """
    check("python", part, bias, dtype, group)
    return joined(ranks.gathered(part.detach(), group), bias, dtype or torch.float32)


def default(part, bias=None, dtype: torch.dtype | None = None, group=None) -> torch.Tensor:
    """What PyTorch calls: the part rounded to `dtype`, torch.distributed.all_reduce of that, the bias added.

    NCCL's order on GPUs, gloo's on a CPU: either follows the number of ranks and the size of the message. `part` may
    have any of the suite's dtypes; None keeps it.
    """
    _check_tensor("part", part)
    _check_bias(part, bias)
    _check_dtype(dtype)
    rounded = part.detach().to(dtype or part.dtype, memory_format=torch.contiguous_format, copy=True)
    total = ranks.summed(rounded, group)
    return total if bias is None else total + bias.to(total.dtype)


def check(word: str, part, bias, dtype, group) -> None:
    """Raise TypeError or ValueError for arguments that make no sum of parts."""
    _check_tensor("part", part)
    if part.dtype != torch.float32:
        raise TypeError(f"part must be float32, which is rounded once after the last addition, got {part.dtype}")
    refuse_foreign(f"all_reduce.{word}", "part", part)
    _check_bias(part, bias)
    _check_dtype(dtype)
    size = ranks.size(group)
    if size not in SHARES:
        raise ValueError(f"group must have 1, 2, 4 or 8 ranks, which eight leaves of k can be shared among, got {size}")


def _check_tensor(name, tensor) -> None:
    if not isinstance(tensor, torch.Tensor) or tensor.dtype not in DTYPES.values() or not tensor.dim():
        raise TypeError(f"{name} must be a tensor (..., N) of {', '.join(DTYPES)}, got "
                        f"{getattr(tensor, 'dtype', type(tensor).__name__)}")


def _check_bias(part, bias) -> None:
    if bias is None:
        return
    _check_tensor("bias", bias)
    if bias.shape != part.shape[-1:] or bias.device != part.device:
        raise ValueError(f"bias must have shape ({part.shape[-1]},) on {part.device}, the N of part, got "
                         f"{tuple(bias.shape)} on {bias.device}")


def _check_dtype(dtype) -> None:
    if dtype is not None and dtype not in DTYPES.values():
        raise TypeError(f"dtype must be one of {', '.join(DTYPES)} or None, got {dtype!r}")
