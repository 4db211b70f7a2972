"""The gradient of cross-entropy, from log-probabilities. No sum, so no order.

The loss is the mean, as ops/mean/order.py adds, of -logp[t, target[t]] over T tokens, logp by ops/softmax/order.py in
float32. For a gradient dloss of it, a logit's is

    (exp(logp) - [it is the target]) * (dloss * float32(1 / T))

each step one float32 operation, exp that of arithmetic/elementary.py, rounded once to bfloat16.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch

from ..arithmetic.elementary import exp, tl_exp
from ..call import check_tensors
from ..launch import Step
from ..runtime import tl, triton
from .backward import DTYPE, BackwardCall, Pass, check_tokens


def _python(logp, targets, dloss):
    """The specification: logp (T, V) float32, targets (T,) int64 from 0 to V - 1, dloss () float32 -> (T, V) bfloat16.

    A target outside that range has no 1. Raises TypeError or ValueError for anything else.
    """
    _CALL.check(logp, targets, dloss)
    scale = dloss * torch.full_like(dloss, 1.0 / max(len(logp), 1))
    hot = targets[:, None] == torch.arange(logp.shape[1], dtype=torch.int64, device=logp.device)
    return ((exp(logp) - hot.float()) * scale).to(DTYPE)


@triton.jit
def _kernel(logp_ptr, targets_ptr, dloss_ptr, dlogits_ptr, share, V: tl.constexpr, BLOCK: tl.constexpr,
            PDL: tl.constexpr):
    """BLOCK columns of one token."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    BLOCKS: tl.constexpr = (V + BLOCK - 1) // BLOCK
    token = (tl.program_id(0) // BLOCKS).to(tl.int64)
    column = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    scale = tl.load(dloss_ptr) * share
    logp = tl.load(logp_ptr + token * V + column, mask=column < V, other=0.0)
    hot = tl.where(column == tl.load(targets_ptr + token), 1.0, 0.0)
    y = (tl_exp(logp) - hot) * scale
    tl.store(dlogits_ptr + token * V + column, y.to(dlogits_ptr.dtype.element_ty), mask=column < V)


@dataclass(frozen=True)
class Schedule:
    """Columns a program, and warps."""

    columns: int = 1024
    warps: int = 4


class _CrossEntropyBackward(BackwardCall):
    """A schedule: the arguments, results and bits of the specification."""

    name = "cross_entropy_backward"
    parameters = "Tensor logp, Tensor targets, Tensor dloss"
    Schedule, kernel = Schedule, _kernel

    def check(self, logp, targets, dloss):
        check_tensors(logp=logp)
        if logp.dim() != 2 or not logp.shape[1] or logp.dtype != torch.float32:
            raise ValueError(f"logp must be (T, V) of float32, got {tuple(logp.shape)} of {logp.dtype}")
        check_tokens("targets", targets, logp.shape[:1], torch.int64, logp)
        check_tokens("dloss", dloss, (), torch.float32, logp)

    def results(self, logp, targets, dloss):
        return {"dlogits": torch.empty(logp.shape, dtype=DTYPE, device=logp.device)}

    def schedule(self, logp, targets, dloss):
        return Schedule(min(1024, max(32, 1 << (logp.shape[1] - 1).bit_length())))

    def readable(self, logp, targets, dloss):
        return logp.contiguous(), targets.contiguous(), dloss

    def steps(self, schedule, logp, targets, dloss):
        width = logp.shape[1]
        return [Step(_kernel, len(logp) * -(-width // schedule.columns),
                     {"logp_ptr": torch.float32, "targets_ptr": torch.int64, "dloss_ptr": torch.float32,
                      "dlogits_ptr": DTYPE},
                     {"share": 1.0 / len(logp)}, {"V": width, "BLOCK": schedule.columns},
                     {"num_warps": schedule.warps})]


_CALL = _CrossEntropyBackward()
cross_entropy_backward = Pass("cross_entropy_backward", "no sum", _python, _CALL.triton, _CALL)
