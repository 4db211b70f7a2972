"""The gradient of SwiGLU on a GPU: the steps that ops/swiglu.py states for it, in one kernel. No sum, so no order."""
from __future__ import annotations

from dataclasses import dataclass

import torch

from ..arithmetic.elementary import tl_exp
from ..call import check_tensors
from ..launch import Step
from ..ops.swiglu import swiglu
from ..runtime import tl, triton
from .backward import BackwardCall, Pass, check_tokens


def _python(gate_up, dy):
    """The specification: gate_up (T, 2F), dy (T, F) -> the gradient of gate_up (T, 2F), that of `swiglu.python`.

    float32, float16 or bfloat16, both of one dtype. Raises TypeError or ValueError for anything else.
    """
    _CALL.check(gate_up, dy)
    with torch.enable_grad():
        given = gate_up.detach().requires_grad_()
        return torch.autograd.grad(swiglu.python(given), given, dy)[0]


@triton.jit
def _kernel(gate_up_ptr, dy_ptr, dx_ptr, F: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """BLOCK columns of one token."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    BLOCKS: tl.constexpr = (F + BLOCK - 1) // BLOCK
    token = (tl.program_id(0) // BLOCKS).to(tl.int64)
    column = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    at = token * 2 * F + column
    gate = tl.load(gate_up_ptr + at, mask=column < F, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + at + F, mask=column < F, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + token * F + column, mask=column < F, other=0.0).to(tl.float32)
    e = tl_exp(-tl.abs(gate), NONPOSITIVE=True)
    share = tl.div_rn(tl.where(gate < 0, e, 1.0), 1.0 + e)
    silu = gate * share
    d_gate = (dy * up) * (share + silu * (1.0 - share))
    d_up = dy * silu
    tl.store(dx_ptr + at, d_gate.to(dx_ptr.dtype.element_ty), mask=column < F)
    tl.store(dx_ptr + at + F, d_up.to(dx_ptr.dtype.element_ty), mask=column < F)


@dataclass(frozen=True)
class Schedule:
    """Columns a program, and warps."""

    columns: int = 1024
    warps: int = 4


class _SwiGLUBackward(BackwardCall):
    """A schedule: the arguments, results and bits of the specification."""

    name = "swiglu_backward"
    parameters = "Tensor gate_up, Tensor dy"
    Schedule, kernel = Schedule, _kernel

    def check(self, gate_up, dy):
        check_tensors(gate_up=gate_up, dy=dy)
        if gate_up.dim() != 2 or gate_up.shape[1] % 2 or not gate_up.shape[1]:
            raise ValueError(f"gate_up must have shape (T, 2F), got {tuple(gate_up.shape)}")
        check_tokens("dy", dy, (gate_up.shape[0], gate_up.shape[1] // 2), gate_up.dtype, gate_up)

    def results(self, gate_up, dy):
        return {"dx": torch.empty_like(gate_up, memory_format=torch.contiguous_format)}

    def schedule(self, gate_up, dy):
        return Schedule()

    def readable(self, gate_up, dy):
        return gate_up.contiguous(), dy.contiguous()

    def steps(self, schedule, gate_up, dy):
        width = dy.shape[1]
        return [Step(_kernel, len(dy) * -(-width // schedule.columns),
                     dict.fromkeys(("gate_up_ptr", "dy_ptr", "dx_ptr"), gate_up.dtype), {},
                     {"F": width, "BLOCK": schedule.columns}, {"num_warps": schedule.warps})]


_CALL = _SwiGLUBackward()
swiglu_backward = Pass("swiglu_backward", "no sum", _python, _CALL.triton, _CALL)
