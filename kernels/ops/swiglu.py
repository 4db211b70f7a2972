"""SwiGLU: silu of the first half of each row, times the second.

    y = gate * sigmoid(gate) * up

The order. There is no sum; each step is one float32 operation, rounded once, and exp is that of
arithmetic/elementary.py:

    1. e     = exp(-|gate|)                      in [0, 1], so that nothing overflows
    2. share = (1 or e) / (1 + e)                1 where gate >= 0, e where it is below: sigmoid(gate)
    3. y     = (gate * share) * up               rounded once more, to gate_up's dtype

Why a batch cannot change it: every step names two numbers of one row. The number of rows, the neighbours, the GPU and
the launch appear nowhere.

A NaN gives NaN, and so does a gate of -inf, as PyTorch's does; +inf gives +inf * up. A gate of -1000 gives zero.

The gradient of the specification, of the same steps:

    dgate = (dy * up) * (share + (gate * share) * (1 - share)),    dup = dy * (gate * share)

Accuracy, tested against float64: at most 5 * 2**-24 |y| before the last rounding to 16 bits, for gates of -87 and more;
below, where e is a subnormal number, at most 2**-142 |up|.

Source: Shazeer, GLU Variants Improve Transformer, arXiv 2002.05202.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from .. import bits
from ..arithmetic.elementary import exp, tl_exp
from ..call import KernelCall, check_tensors, refuse_dual, row_stride
from ..launch import Step, compiled
from ..op import Op, Shape, Work
from ..runtime import tl, triton

ENOUGH_PROGRAMS = 264  # two a multiprocessor of an H100 or H200


def _cuda(gate_up):
    """The default: F.silu, and a multiplication."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def _python(gate_up):
    """The specification: gate_up (T, 2F), float32, float16 or bfloat16 -> (T, F) in its dtype.

    Raises TypeError or ValueError for anything else. Differentiable, once.
    """
    refuse_dual("swiglu.python", "gate_up", gate_up)  # exp is made of bits, which have no derivative
    gradient = getattr(gate_up, "requires_grad", False) and torch.is_grad_enabled()
    return (_Differentiable.apply if gradient else _specify)(gate_up)


def _specify(gate_up):
    _CALL.check(gate_up)
    gate, up = gate_up.float().chunk(2, -1)
    return (gate * _share(gate) * up).to(gate_up.dtype)


def _share(gate):
    """sigmoid(gate), steps 1 and 2."""
    e = exp(-gate.abs())
    return torch.where(gate < 0, e, torch.ones_like(e)) / (1.0 + e)


class _Differentiable(torch.autograd.Function):
    """The specification with its gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(gate_up):
        return _specify(gate_up)

    @staticmethod
    def setup_context(ctx, inputs, output):  # apart from `forward`, as torch.func needs it
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        gate_up, = ctx.saved_tensors
        gate, up = gate_up.float().chunk(2, -1)
        dy, share = dy.float(), _share(gate)
        silu = gate * share
        return torch.cat([dy * up * (share + silu * (1.0 - share)), dy * silu], -1).to(gate_up.dtype)


@triton.jit
def _swiglu_kernel(x_ptr, y_ptr, x_stride, F: tl.constexpr, COLUMNS: tl.constexpr, PDL: tl.constexpr):
    """COLUMNS columns of one token."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    BLOCKS: tl.constexpr = (F + COLUMNS - 1) // COLUMNS
    token = (tl.program_id(0) // BLOCKS).to(tl.int64)
    column = tl.program_id(0) % BLOCKS * COLUMNS + tl.arange(0, COLUMNS)
    gate = tl.load(x_ptr + token * x_stride + column, mask=column < F, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + token * x_stride + F + column, mask=column < F, other=0.0).to(tl.float32)
    e = tl_exp(-tl.abs(gate), NONPOSITIVE=True)
    share = tl.div_rn(tl.where(gate < 0, e, 1.0), 1.0 + e)
    y = gate * share * up
    tl.store(y_ptr + token * F + column, y.to(y_ptr.dtype.element_ty), mask=column < F)


@dataclass(frozen=True)
class Schedule:
    """How it is carried out: columns of a token a program, and warps."""

    columns: int = 1024
    warps: int = 4

    def __str__(self):
        return f"columns={self.columns} warps={self.warps}"


def _schedule(tokens: int, width: int, itemsize: int = 2) -> Schedule:
    """1024 columns a program, fewer while that leaves multiprocessors idle; a thread loads 16 bytes of each half."""
    columns = 1024
    while columns > 256 and (tokens * -(-width // columns) < ENOUGH_PROGRAMS or columns >= 2 * width):
        columns //= 2
    return Schedule(columns, columns * itemsize // 512)


def _schedules(shape, dtype) -> list[Schedule]:
    """Every schedule the tests hold to the specification's bits."""
    Shape.parse(shape, "F")
    others = [Schedule(columns, warps) for columns, warps in ((64, 1), (256, 4), (1024, 1), (2048, 4), (4096, 16))]
    return others + [Schedule(columns, columns * dtype.itemsize // 512) for columns in (256, 512, 1024)]


class _SwiGLU(KernelCall):
    """A schedule of choice: the arguments, results and bits of the specification, as fast as we can make it."""

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
        return _schedule(gate_up.shape[0], gate_up.shape[1] // 2, gate_up.itemsize)

    def readable(self, gate_up):
        return (gate_up.contiguous() if row_stride(gate_up) is None else gate_up,)

    def steps(self, schedule, gate_up):
        tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
        return [Step(_swiglu_kernel, tokens * -(-width // schedule.columns),
                     {"x_ptr": gate_up.dtype, "y_ptr": gate_up.dtype}, {"x_stride": row_stride(gate_up)},
                     {"F": width, "COLUMNS": schedule.columns}, {"num_warps": schedule.warps})]

    def launch(self, plan, gate_up):
        read = gate_up.contiguous() if plan.copies else gate_up
        tokens, width = gate_up.shape
        y = torch.empty((tokens, width // 2), dtype=gate_up.dtype, device=gate_up.device)
        x = read.data_ptr()
        plan.first(x, x, y.data_ptr())
        return y

    def memory(self, plan, gate_up):
        return {"x_ptr": gate_up, "y_ptr": self.outputs(gate_up)[0]}


_CALL = _SwiGLU()


def _inputs(tokens: int, shape, dtype=torch.bfloat16, device="cpu", seed: int = 0) -> tuple:
    return (bits.portable(tokens, 2 * Shape.parse(shape, "F")["F"], dtype, device, seed, scale=3),)


def _work(tokens: int, shape, dtype=torch.bfloat16) -> Work:
    elements = tokens * Shape.parse(shape, "F")["F"]
    return Work(bytes=3 * elements * dtype.itemsize, flops=5 * elements)


swiglu = Op(
    name="swiglu", title="SwiGLU", order="no sum: an exponential, a quotient and two products, each rounded",
    cuda=_cuda, python=_CALL.specification(_python), triton=_CALL.triton, inputs=_inputs, work=_work, per_token=(0,),
    shapes=("F=14336", "F=8192", "F=512"), schedules=_schedules,
    schedule=lambda tokens, shape, dtype: str(_schedule(tokens, Shape.parse(shape, "F")["F"], dtype.itemsize)),
    extras={"compile": compiled(_cuda)}, call=_CALL)
