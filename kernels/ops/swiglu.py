"""SwiGLU: silu of the first half of each row, times the second. No sum, so no order.

Source: Shazeer, GLU Variants Improve Transformer, arXiv 2002.05202.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..call import KernelCall, check_tensors
from ..launch import Step
from ..runtime import tl, triton

COLUMNS_A_PROGRAM = 1024


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """(T, 2F) -> (T, F): silu of the first half, times the second."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


@triton.jit
def _swiglu_kernel(x_ptr, y_ptr, F: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """BLOCK columns of one token, in float32, rounded once."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    BLOCKS: tl.constexpr = (F + BLOCK - 1) // BLOCK
    token = (tl.program_id(0) // BLOCKS).to(tl.int64)
    column = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(x_ptr + token * 2 * F + column, mask=column < F, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + token * 2 * F + F + column, mask=column < F, other=0.0).to(tl.float32)
    y = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(y_ptr + token * F + column, y.to(y_ptr.dtype.element_ty), mask=column < F)


@dataclass(frozen=True)
class Schedule:
    """Columns a program, and warps."""

    columns: int = COLUMNS_A_PROGRAM
    warps: int = 4


class _SwiGLU(KernelCall):
    """One kernel instead of two: gate_up (T, 2F) -> (T, F), in float32, rounded once."""

    name = "swiglu"
    parameters = "Tensor gate_up"
    Schedule, kernel = Schedule, _swiglu_kernel

    def check(self, gate_up):
        check_tensors(gate_up=gate_up)
        if gate_up.dim() != 2 or gate_up.shape[1] % 2:
            raise ValueError(f"gate_up must have shape (T, 2F), got {tuple(gate_up.shape)}")

    def outputs(self, gate_up):
        return (gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2),)

    def schedule(self, gate_up):
        return Schedule()

    def readable(self, gate_up):
        return (gate_up.contiguous(),)

    def steps(self, schedule, gate_up):
        tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
        return [Step(_swiglu_kernel, tokens * -(-width // schedule.columns),
                     {"x_ptr": gate_up.dtype, "y_ptr": gate_up.dtype}, {},
                     {"F": width, "BLOCK": schedule.columns}, {"num_warps": schedule.warps})]

    def launch(self, plan, gate_up):
        if plan.copies:
            gate_up = gate_up.contiguous()
        y = torch.empty((gate_up.shape[0], gate_up.shape[1] // 2), dtype=gate_up.dtype, device=gate_up.device)
        x = gate_up.data_ptr()
        plan.first(x, x, y.data_ptr())
        return y

    def memory(self, plan, gate_up):
        return {"x_ptr": gate_up, "y_ptr": self.outputs(gate_up)[0]}


fused_swiglu = _SwiGLU().triton
