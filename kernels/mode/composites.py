"""Whole calls of composite ops, seen by a key of the dispatcher above autograd: linear, matmul and attention.

PyTorch makes a product of one or several from a matrix and rows of more than two dimensions, and adds a bias inside it
or behind it. How the rows lie decides, and what needs a gradient. A slice of a batch of one lies otherwise than one of
two, so its bits could move. Here all rows are one product, with its bias, whatever they lie in. (folded.py)

On a GPU the parts of linear and attention take the host longer than a launch. So a call like one before is one step. It
is where nothing comes between this key and the GPU's kernels: no gradient, autocast, transform, tracing or lazy
negation, all of which are among the call's own keys. The first call of a form goes the long way. If rules took its
parts and left plans (kept.py), the next such call launches what they left.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.autograd import forward_ad

from ..call import Plans
from .folded import leave_linear, linear, linear_at_once, linear_key, matmul
from .kept_attention import attention_at_once, attention_key, leave_attention
from .switch import EARLY, KEYS, op_of, unseen_by_dynamo

_KEY = torch._C.DispatchKeySet(EARLY)
_LONG = Plans()  # keys of calls whose first one left nothing: they go the long way


class Composite(NamedTuple):
    """How an op's whole calls are made. All take the op's arguments, but `key` a key before them.

    long     the long way, which is given the op first
    key      what decides a step; None for calls that have none
    at_once  the result in one step, or None where no step is known
    leave    after the long way: make a step of what rules left, if there is one, and say so
    """

    long: Callable
    key: Callable = lambda *arguments, **named: None
    at_once: Callable = lambda *arguments, **named: None
    leave: Callable = lambda *arguments, **named: False


def keys(*names: str) -> int:
    """The set of these keys and the early one, as a number."""
    found = _KEY
    for name in names:
        found = found | torch._C.DispatchKeySet(torch._C._dispatch_key_parse(name))
    return found.raw_repr()


USUAL = {keys("CUDA", "AutogradCUDA"), keys("CUDA")}  # inference tensors have no second one


def seen_whole(op, way: Composite) -> Callable:
    """The early key's kernel of an op, which is given the call's keys before its arguments."""
    def kernel(given, *arguments, **named):
        key = way.key(*arguments, **named) if given.raw_repr() in USUAL and forward_ad._current_level < 0 else None
        if key is not None:
            found = way.at_once(key, *arguments, **named)
            if found is not None:
                return found
        with torch._C._ExcludeDispatchKeyGuard(_KEY):
            result = way.long(op, *arguments, **named)
        if key is not None and key not in _LONG:
            with torch._C._ExcludeDispatchKeyGuard(KEYS):
                if not way.leave(key, *arguments, **named):
                    _LONG.keep(key, None)
        return result
    return unseen_by_dynamo(kernel)


def _as_it_is(op, *arguments, **named):
    return op(*arguments, **named)


def _into(function: Callable) -> Callable:
    """The overload that writes its result."""
    def long(op, *arguments, out):
        result = function(op_of(op._schema.name.removeprefix("aten::")), *arguments)
        if result.dtype != out.dtype or result.device != out.device or out.requires_grad:
            return op(*arguments, out=out)  # PyTorch's to refuse
        return out.resize_(result.shape).copy_(result)
    return long


COMPOSITES = {"linear": Composite(linear, linear_key, linear_at_once, leave_linear), "matmul": Composite(matmul),
              "linear.out": Composite(_into(linear)), "matmul.out": Composite(_into(matmul)),
              "scaled_dot_product_attention": Composite(_as_it_is, attention_key, attention_at_once, leave_attention)}
