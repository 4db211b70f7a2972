"""Other ways to a batch-invariant product, to be measured beside ours."""
from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F

from ...runtime import Unavailable
from .call import CALL
from .order import check
from .schedule import Schedule


def tiled(x, weight, bias=None):
    """Batch-invariant in plain PyTorch: 128 rows at a time, the last ones padded, so that every call has one shape.

    The order is the library's, unknown but the same for a row in any batch, if a row's place in its tile does not
    matter to the library: *certified by test, not by construction*.
    """
    check(x, weight, bias)
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    padded = F.pad(rows, (0, 0, 0, -len(rows) % 128))
    tiles = [F.linear(tile, weight, bias) for tile in padded.split(128) if len(padded)]
    y = torch.cat(tiles)[: len(rows)] if tiles else rows.new_empty(0, len(weight))
    return y.view(*x.shape[:-1], len(weight))


FROZEN = Schedule("pointer", 128, 128, 64, warps=8, stages=3, group=8)
_FROZEN_FLOAT32 = replace(FROZEN, block_k=16)


def frozen(x, weight, bias=None):
    """Batch invariance as it is usually had: one schedule, tiles of 128 by 128 by 64, for all token counts."""
    check(x, weight, bias)
    return CALL.run_schedule(FROZEN if x.dtype != torch.float32 else _FROZEN_FLOAT32, x, weight, bias)


_SWITCH = {torch.bfloat16: "allow_bf16_reduced_precision_reduction",
           torch.float16: "allow_fp16_reduced_precision_reduction"}


def cublas_no_split_k(x, weight, bias=None):
    """F.linear with cuBLAS told not to split k; the settings are put back afterwards.

    Nothing is guaranteed: cuBLAS still chooses a kernel by the number of tokens. *By test*, its bits are ours wherever
    our order is one chain; where it is several they are not (but at one recorded point), and moved at a few.
    Raises Unavailable on a CPU and for float32, which have no such setting.
    """
    check(x, weight, bias)
    if not x.is_cuda or x.dtype not in _SWITCH:
        raise Unavailable(f"cuBLAS has no setting against split-K for {x.dtype} on {x.device.type}")
    switches, name, library = torch.backends.cuda.matmul, _SWITCH[x.dtype], torch.backends.cuda.preferred_blas_library
    before, preferred = (getattr(switches, name), getattr(switches, f"{name}_split_k")), library()
    try:
        library("cublaslt")  # the only one of cuBLAS's interfaces that knows the setting
        setattr(switches, name, (False, False))
        return F.linear(x, weight, bias)
    finally:
        setattr(switches, name, before)
        library(preferred)
