"""mm and addmm in compiled code on a GPU: a call like one before is one step (steps.py)."""
from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import cache

import torch

from ..call import Plans
from ..ops.matmul.call import CALL as MATMUL
from ..ops.matmul.plan import Plan
from .kept import can_keep, form, short
from .names import op_of
from .steps import can_make, of_product
from .switch import RULES, guarded

STEPS = Plans()  # the op and its tensors' form -> step, or None for a form that has none


@cache
def product(name: str) -> Callable:
    """mm or addmm: its rule, unless a call of this form left a step."""
    op = op_of(name)
    long, find, count = guarded(name, op, RULES[name], short(name)), STEPS.get, 2 + (name == "addmm")

    def run(*given, **named):
        if named or len(given) != count:
            return long(*given, **named)
        tensors = given if count == 2 else (*given[1:], given[0])
        key = name, form(*tensors)
        step = find(key)
        found = None if step is None else step(*tensors)
        if found is None:
            found = long(*given)
            if key not in STEPS and can_keep(key[1]):
                _leave(key, tensors, found.shape)
        return found
    return run


def _leave(key: tuple, tensors: tuple, shape: torch.Size) -> None:
    """A step of a call whose rule left a plan. It goes with the plan, whose schedule may be learned anew."""
    plan = MATMUL.plans.get((key[0], (), key[1]))
    if plan is None or not all(bias.is_contiguous() for bias in tensors[2:]):  # a step copies nothing
        STEPS.keep(key, None)
    elif plan.launch is Plan.on_gpu and True in plan.ready and can_make(plan.index):
        STEPS.keep(key, of_product(plan, shape))
        weakref.finalize(plan, STEPS.pop, key, None)
