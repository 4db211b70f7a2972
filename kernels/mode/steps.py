"""Calls on a GPU as one function each: what a plan does through several, written out for one form of a call.

Inside of a model the host meets each function cold, and calling it costs more than what it does. A step takes its op's
own arguments and gives the op's result. It gives None where a call is not as its form was: at other alignments, where
another GPU is the current one, or without memory.
"""
from __future__ import annotations

from collections.abc import Callable

import torch

from ..ops.matmul.counters import COUNTERS
from ..ops.matmul.plan import Plan
from ..runtime import contiguous_strides, current_device, current_stream


def can_make(index: int) -> bool:
    """Whether steps for GPU `index` can be made now: it is the current one, and no graph is captured."""
    return current_device() == index and not torch.cuda.is_current_stream_capturing()


def of_product(plan: Plan, shape: torch.Size) -> Callable | None:
    """x, weight, bias -> a new y of this shape, by a plan that was launched; None for schedules that copy first.

    The tensors lie as the plan's do, with rows in any number of dimensions.
    """
    chosen = plan.ready.get(True)
    if chosen is None or chosen.copies:
        return None
    index, dtype, strides = plan.index, plan.dtype, contiguous_strides(shape)
    work, counters, take = chosen.work, chosen.counters, COUNTERS.take
    launch = chosen.launch if chosen.bulk else chosen.first.compiled(index)
    described = chosen.described if chosen.bulk else None
    stored = chosen.bulk and chosen.schedule.store and chosen.schedule.kind == "tma"
    second, partial_sums = (chosen.steps[-1].compiled(index), chosen.partial) if chosen.schedule.reduce else (None, 0)

    def step(x, weight, bias=None):
        px, pw = x.data_ptr(), weight.data_ptr()
        pb = px if bias is None else bias.data_ptr()
        if (px | pw | pb) & 15 or not (px and pw and pb) or current_device() != index:
            return None
        device, stream = x.device, current_stream(index)
        y = torch.empty_strided(shape, strides, dtype=dtype, device=device)
        at = count = py = y.data_ptr()
        found = () if described is None else described.get((px, pw, py if stored else 0))
        if counters:
            count = take(index, stream, counters)
        if found is None or not count:  # descriptors to make, or a capture that took all counters
            chosen(0, px, pw, pb, py, device)
            return y
        if work:
            sums = torch.empty(work, dtype=torch.float32, device=device)
            at = sums.data_ptr()
        if described is None:
            launch(stream, px, pw, pb, py, at, count)
        elif stored:
            launch(stream, *found, pb, at, count)
        else:
            launch(stream, *found, py, pb, at, count)
        if second is not None:
            second(stream, at + partial_sums, pb, py)
        return y
    return step


def of_reduction(plan, index: int) -> Callable:
    """x, dim, keepdim -> the sum or mean, by the plan of such a call on GPU `index`."""
    if plan.copies or plan.second is not None:
        return lambda x, dim, keepdim=False: plan.launch(plan, x, dim, keepdim)
    launch = plan.steps[0].compiled(index)
    shape, strides, dtype, device = plan.shape, plan.strides, plan.dtype, plan.device

    def step(x, dim, keepdim=False):
        px = x.data_ptr()
        if px & 15 or not px or current_device() != index:
            return None
        y = torch.empty_strided(shape, strides, dtype=dtype, device=device)
        launch(current_stream(index), px, y.data_ptr())
        return y
    return step
