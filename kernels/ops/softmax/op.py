"""softmax and log_softmax as ops; the order is in order.py beside this file."""
from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from ... import bits
from ...call import KernelCall, refuse_dual, row_stride
from ...launch import compiled
from ...op import Op, Shape, Work
from .kernels import SHOWN, steps
from .order import Differentiable, check, specify
from .schedule import Schedule, choose, every


class _Softmax(KernelCall):
    """A schedule of choice: the arguments, results and bits of the specification, as fast as we can make it."""

    parameters = "Tensor x, int dim=-1, ScalarType? dtype=None"
    Schedule, kernel = Schedule, SHOWN
    check = staticmethod(check)

    def __init__(self, name: str, logarithm: bool):
        self.name, self.logarithm = name, logarithm
        super().__init__()

    def result_dtype(self, x, dim, dtype):
        return dtype or x.dtype

    def schedule(self, x, dim, dtype):
        return choose(x.numel() // (x.shape or (1,))[dim], (x.shape or (1,))[dim], x.itemsize, self.logarithm)

    def readable(self, x, dim, dtype):
        if dim % max(x.dim(), 1) != max(x.dim(), 1) - 1:
            return x.movedim(dim, -1).contiguous(), -1, dtype
        return (x.contiguous() if row_stride(x) is None else x), dim, dtype

    def finish(self, y, x, dim, dtype):
        return y.movedim(-1, dim).contiguous() if y.dim() else y

    def steps(self, schedule, x, dim, dtype):
        return steps(schedule, x, dtype, self.logarithm)

    def launch(self, plan, x, dim, dtype):
        read = self.readable(x, dim, dtype)[0] if plan.copies else x
        y = plan.like(read)
        px, py = read.data_ptr(), y.data_ptr()
        if plan.second is None:
            plan.first(px, px, py)
        else:
            columns = torch.empty(plan.scratch, dtype=torch.float32, device=x.device)
            plan.first(px, px, columns.data_ptr())
            plan.second(px, px, columns.data_ptr(), py)
        return self.finish(y, x, dim, dtype) if plan.copies else y

    def memory(self, plan, x, dim, dtype):
        return {"x_ptr": x, "columns_ptr": x.new_empty(plan.scratch), "y_ptr": x.new_empty(x.shape)}


def _inputs(tokens: int, shape, dtype=torch.bfloat16, device="cpu", seed: int = 0) -> tuple:
    return bits.portable(tokens, Shape.parse(shape, "D")["D"], dtype, device, seed, scale=4), -1


def _op(name: str, title: str, default, logarithm: bool) -> Op:
    call = _Softmax(name, logarithm)

    def cuda(x, dim=-1, dtype=None):
        """The default: PyTorch's own."""
        return default(x, dim, dtype=dtype)

    def python(x, dim=-1, dtype=None):
        """The specification: x of any shape, float32, float16 or bfloat16 -> as many results over `dim`, in x's dtype.

        With `dtype` torch.float32 they are not rounded to 16 bits. Raises TypeError or ValueError for anything else.
        Differentiable, once.
        """
        refuse_dual(f"{name}.python", "x", x)  # exp and log are made of bits, which have no derivative
        gradient = getattr(x, "requires_grad", False) and torch.is_grad_enabled()
        return (Differentiable.apply if gradient else specify)(x, dim, logarithm, dtype)

    def work(tokens: int, shape, dtype=torch.bfloat16) -> Work:
        elements = tokens * Shape.parse(shape, "D")["D"]
        return Work(bytes=2 * elements * dtype.itemsize, flops=(4 if logarithm else 5) * elements)

    return Op(name=name, title=title, order="chunks of 1024 in sequence, segment by segment, then neighbours in pairs",
              cuda=cuda, python=call.specification(python), triton=call.triton, inputs=_inputs, work=work,
              per_token=(0,), shapes=("D=32000", "D=128256"), schedules=partial(every, logarithm=logarithm),
              schedule=lambda tokens, shape, dtype: str(
                  choose(tokens, Shape.parse(shape, "D")["D"], dtype.itemsize, logarithm)),
              extras={"compile": compiled(cuda)}, call=call)


softmax = _op("softmax", "Softmax", F.softmax, False)
log_softmax = _op("log_softmax", "Log-softmax", F.log_softmax, True)
