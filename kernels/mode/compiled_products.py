"""mm and addmm in compiled code on a GPU: a call like one before is one step (steps.py)."""
from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

from ..call import Plans
from .kept import can_keep, form, leave_product, short
from .names import op_of
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
    whole = all(bias.is_contiguous() for bias in tensors[2:])  # a step copies nothing
    step = leave_product(key[0], tensors, shape, STEPS, key) if whole else None
    if step is not NotImplemented:
        STEPS.keep(key, step)
