"""Sum and mean as ops; the order is in order.py beside this file."""
from __future__ import annotations

import torch

from ... import bits
from ...call import KernelCall
from ...launch import compiled
from ...op import Op, Work
from ...runtime import contiguous_strides
from .kernels import SHOWN, steps
from .order import check, dims_of, shape_of, specify
from .schedule import Schedule, choose, every, sizes
from .view import view_of


class _Reduction(KernelCall):
    """A schedule of choice: the arguments, results and bits of the specification, as fast as we can make it."""

    parameters = "Tensor x, int[]? dim=None, bool keepdim=False"
    Schedule, kernel = Schedule, SHOWN
    check = staticmethod(check)

    def __init__(self, name: str, mean: bool):
        self.name, self.mean = name, mean
        super().__init__()

    def traceable(self, x, dim, keepdim):
        return x, dims_of(x, dim), keepdim

    def outputs(self, x, dim, keepdim):
        return (x.new_empty(shape_of(x, dims_of(x, dim), keepdim)),)

    def empty(self, plan, x, dim, keepdim):
        return super().empty(plan, x, dim, keepdim).fill_(float("nan") if self.mean else 0.0)

    def schedule(self, x, dim, keepdim):
        return choose(*view_of(x, dims_of(x, dim))[:3], x.itemsize)

    def readable(self, x, dim, keepdim):
        order = view_of(x, dims_of(x, dim)).order
        if order is None:
            return x, dim, keepdim
        return x.permute(order).contiguous(), tuple(range(x.dim() - len(dims_of(x, dim)), x.dim())), keepdim

    def finish(self, y, x, dim, keepdim):
        return y.view(shape_of(x, dims_of(x, dim), keepdim))

    def steps(self, schedule, x, dim, keepdim):
        view = view_of(x, dims_of(x, dim))
        if schedule.kind in ("rows", "stream") and view.inner > 1:
            raise ValueError(f"schedule {schedule} sums dimensions that are last in memory; dim {dim} of shape "
                             f"{tuple(x.shape)} is not: it needs an inner or a split schedule")
        return steps(schedule, view, {"x_ptr": x.dtype, "y_ptr": x.dtype}, 1.0 / view.length if self.mean else 1.0)

    def prepare(self, plan, x, dim, keepdim):
        plan.shape, plan.device = shape_of(x, dims_of(x, dim), keepdim), x.device
        plan.strides = contiguous_strides(plan.shape)

    def launch(self, plan, x, dim, keepdim):
        if plan.copies:
            x = self.readable(x, dim, keepdim)[0]
        y = torch.empty_strided(plan.shape, plan.strides, dtype=plan.dtype, device=plan.device)
        px, py = x.data_ptr(), y.data_ptr()
        if plan.second is None:
            plan.first(px, px, py)
        else:
            sums = torch.empty(plan.scratch, dtype=torch.float32, device=plan.device)
            plan.first(px, px, sums.data_ptr())
            plan.second(0, sums.data_ptr(), py)
        return y

    def memory(self, plan, x, dim, keepdim):
        y = x.new_empty(shape_of(x, dims_of(x, dim), keepdim))
        return {"x_ptr": x, "sums_ptr": x.new_empty(plan.scratch), "y_ptr": y}


def _inputs(tokens: int, shape, dtype=torch.bfloat16, device="cpu", seed: int = 0) -> tuple:
    """(tokens, D) and dim -1, or for a shape such as D=1000,inner=64 (tokens, D, inner) and dim 1."""
    length, inner = sizes(shape)
    x = bits.portable(tokens, length * inner, dtype, device, seed)
    return (x, -1) if inner == 1 else (x.view(tokens, length, inner), 1)


def _op(name: str, title: str, default, order: str, mean: bool) -> Op:
    call = _Reduction(name, mean)

    def cuda(x, dim=None, keepdim=False):
        """The default: PyTorch's own."""
        return default(x, dim, keepdim)

    def python(x, dim=None, keepdim=False):
        """The specification: x of any shape, float32, float16 or bfloat16, reduced over `dim`, in x's dtype.

        dim is None or () for all dimensions, an int, or a tuple of ints; negative ones count from the end. Reduced
        dimensions stay with size 1 if keepdim. Raises TypeError or ValueError for anything else. Differentiable.
        """
        return specify(x, dim, keepdim, mean)

    def work(tokens: int, shape, dtype=torch.bfloat16) -> Work:
        length, inner = sizes(shape)
        return Work(bytes=tokens * (length + 1) * inner * dtype.itemsize, flops=tokens * (length - 1 + mean) * inner)

    def schedule(tokens: int, shape, dtype) -> str:
        return str(choose(tokens, *sizes(shape), dtype.itemsize))

    return Op(name=name, title=title, order=order, cuda=cuda, python=call.specification(python), triton=call.triton,
              inputs=_inputs, work=work, per_token=(0,), shapes=("D=8192", "D=4096"), schedules=every,
              schedule=schedule, extras={"compile": compiled(cuda)}, call=call)


_ORDER = "chunks of 1024 in sequence, then neighbours in pairs"
sum = _op("sum", "Sum", torch.sum, _ORDER, False)
mean = _op("mean", "Mean", torch.mean, _ORDER + ", times 1 / count", True)
