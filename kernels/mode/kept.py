"""The short way of a call on a GPU whose like was made before: from the dispatcher to the launch.

A rule checks its arguments, takes views of them and finds a plan, inside the guards of switch.py. All of it follows
from the tensors' classes, shapes, strides, dtypes and GPU, and from the numbers beside them. Under these a rule leaves
the plan of a call that it took, and the next such call launches it: `SHORT` says how, and gives None where nothing was
left. Whatever is unusual (another class, a dispatch mode, a transform, a plan whose schedules are being tried) goes to
the rule as first calls do, so that no refusal is left out.
"""
from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

from ..call import Plans
from ..ops.layer_norm import layer_norm
from ..ops.matmul.call import CALL as MATMUL
from ..ops.matmul.plan import Plan
from ..ops.mean import mean, sum
from ..ops.softmax import log_softmax, softmax
from .steps import can_make, of_product, of_reduction

_TENSOR, _PARAMETER = torch.Tensor, torch.nn.Parameter
_modes, _level = torch._C._len_torch_dispatch_stack, torch._C._functorch.maybe_current_level
SHORT: dict[str, Callable] = {}  # the op -> its arguments -> its result, or None


def form(*tensors: torch.Tensor) -> tuple | None:
    """Shape, strides, dtype and GPU of each, which decide a plan; None where a rule must look."""
    if _modes() or _level() is not None or forward_ad._current_level >= 0:
        return None
    found: tuple = ()
    try:
        for t in tensors:
            if t.__class__ is not _TENSOR and t.__class__ is not _PARAMETER or t.layout is not torch.strided:
                return None
            found += t.shape, t.stride(), t.dtype, t.get_device()
    except RuntimeError:  # a nested tensor has no one shape
        return None
    return found


def can_keep(found: tuple | None) -> bool:
    """Whether tensors of this form are on a GPU and have numbers, and nothing about them is unusual."""
    return found is not None and found[3] >= 0 and all(map(math.prod, found[::4]))


def keep(name: str, tensors: tuple, numbers: tuple, call: Any, arguments: tuple) -> None:
    """Leave the plan of a call that a rule took with these tensors and numbers, if there is something to launch."""
    key = name, numbers, form(*tensors)
    if can_keep(key[-1]) and key not in call.plans:
        call.plans.keep(key, call.plan(arguments))


def shortened(*names: str) -> Callable:
    def add(function: Callable) -> Callable:
        SHORT.update(dict.fromkeys(names, function))
        return function
    return add


@shortened("mm")
def _mm(self, mat2):
    plan = MATMUL.plans.get(("mm", (), form(self, mat2)))
    if plan is not None and plan.launch is Plan.on_gpu:  # which asks a weight for its address alone
        return plan.launch(plan, self, mat2, None, None)
    return None


@shortened("addmm")
def _addmm(self, mat1, mat2, **scales):
    plan = None if scales else MATMUL.plans.get(("addmm", (), form(mat1, mat2, self)))
    if plan is not None and plan.launch is Plan.on_gpu:
        return plan.launch(plan, mat1, mat2, self, None)
    return None


def _reduction(op) -> Callable:
    name, find = op.name, op.call.plans.get

    def reduced(self, dim, keepdim=False, **named):
        plan = None if named or dim is None else find((name, (*dim, keepdim), form(self)))
        return None if plan is None else plan.launch(plan, self, dim, keepdim)
    return reduced


def reduction_key(self, dim, keepdim=False, *, dtype=None) -> tuple | None:
    """What decides a sum's or mean's step (composites.py); None for all dimensions, another dtype, or a gradient."""
    if dim is None or dtype is not None or self.requires_grad and torch.is_grad_enabled():
        return None
    return keepdim, *dim, self.shape, self.stride(), self.dtype, self.get_device()


def leave_reduction(op) -> Callable:
    """What makes such a step of the plan that the rule left."""
    name, plans = op.name, op.call.plans

    def leave(_, self, dim, keepdim=False, **named):
        lies = form(self)
        plan = plans.get((name, (*dim, keepdim), lies)) if can_keep(lies) else None
        if plan is not None and not can_make(self.get_device()):
            return NotImplemented
        return None if plan is None else of_reduction(plan, self.get_device())
    return leave


def leave_product(name: str, tensors: tuple, shape: tuple[int, ...], steps: Plans, key: tuple) -> Callable | None:
    """The step of a product whose rule left a plan for tensors of this form, to be kept in `steps` under `key`; None if
    there is none, NotImplemented while schedules are being tried. It goes with the plan, whose schedule may be learned
    anew."""
    plan = MATMUL.plans.get((name, (), form(*tensors)))
    if plan is None:
        return None
    if plan.launch is not Plan.on_gpu or True not in plan.ready or not can_make(plan.index):
        return NotImplemented
    step = of_product(plan, shape)
    if step is not None:
        weakref.finalize(plan, steps.pop, key, None)
    return step


def _over(op) -> Callable:
    name, find = op.name, op.call.plans.get

    def over(self, dim, half_to_float):
        plan = find((name, (dim, half_to_float), form(self)))
        return None if plan is None else plan.launch(plan, self, dim, torch.float32 if half_to_float else None)
    return over


SHORT |= {"sum.dim_IntList": _reduction(sum), "mean.dim": _reduction(mean), "_softmax": _over(softmax),
          "_log_softmax": _over(log_softmax)}


@shortened("native_layer_norm")
def _layer_norm(input, normalized_shape, weight, bias, eps):
    plan = None if weight is None or bias is None else layer_norm.call.plans.get(
        ("native_layer_norm", (eps, *normalized_shape), form(input, weight, bias)))
    return None if plan is None else plan.launch(plan, input, weight, bias, eps)


def short(name: str) -> Callable:
    """The short way of an op, a function of its arguments; of most ops one that gives None."""
    return SHORT.get(name, _none)


def _none(*arguments, **named) -> None:
    return None
