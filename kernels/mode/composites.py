"""Whole calls of ops, seen by a key of the dispatcher above autograd: linear, matmul, attention, sums and means.

PyTorch makes a product of one or several from a matrix and rows of more than two dimensions, and adds a bias inside it
or behind it. How the rows lie decides, and what needs a gradient. A slice of a batch of one lies otherwise than one of
two, so its bits could move. Here all rows are one product, with its bias, whatever they lie in. (folded.py)

On a GPU the way through autograd and a rule takes the host longer than a launch. So a call like one before is one step
(steps.py). It is where nothing comes between this key and the GPU's kernels: no gradient, autocast, transform, tracing
or lazy negation, all of which are among the call's own keys. The first call of a form goes the long way. If rules took
its parts and left plans (kept.py), the next such call launches what they left.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.autograd import forward_ad

from ..call import Plans
from ..ops.mean import mean, sum
from .folded import LINEAR, leave_linear, linear, linear_key, matmul
from .kept import leave_reduction, reduction_key
from .names import op_of
from .switch import EARLY, KEYS
from .whole_attention import WHOLE, attention, attention_key, leave_attention

_KEY, _CUDA = (torch._C.DispatchKeySet(key) for key in (EARLY, torch._C._dispatch_key_parse("CUDA")))


class Composite(NamedTuple):
    """How an op's whole calls are made. `key` and `leave` take the op's arguments, `leave` behind the key.

    long   the long way, which is given the op first
    key    what decides a step; None for calls that have none
    leave  after the long way: a step made of what rules left, None for calls that have none, NotImplemented for later
    steps  key -> step, which takes the op's arguments and gives its result, or None where it cannot
    """

    long: Callable
    key: Callable = lambda *arguments, **named: None
    leave: Callable = lambda *arguments, **named: None
    steps: Plans = Plans()


def usual(device: str) -> dict[int, torch._C.DispatchKeySet]:
    """The sets of keys, as numbers, of calls on a kind of device between which and its kernels nothing comes -> the
    same without our keys.

    In inference mode there is no key of autograd, only ops that write have the one that counts versions, and ops of
    which all are composites have none of the rules.
    """
    on, autograd, versions = (torch._C.DispatchKeySet(torch._C._dispatch_key_parse(name))
                              for name in (device, f"Autograd{device}", "ADInplaceOrView"))
    return {(rest | ours).raw_repr(): rest for ours in (_KEY, KEYS)
            for rest in (on, on | autograd, on | versions, on | autograd | versions)}


USUAL = usual("CUDA")


def seen_whole(op, way: Composite) -> Callable:
    """The early key's kernel of an op, which is given the call's keys before its arguments."""
    find = way.steps.get

    def kernel(given, *arguments, **named):
        key = way.key(*arguments, **named) if given.raw_repr() in USUAL and forward_ad._current_level < 0 else None
        step = None if key is None else find(key)
        found = None if step is None else step(*arguments, **named)
        if found is not None:
            return found
        with torch._C._ExcludeDispatchKeyGuard(_KEY):
            result = way.long(op, *arguments, **named)
        if key is not None and key not in way.steps:
            with torch._C._ExcludeDispatchKeyGuard(KEYS):
                step = way.leave(key, *arguments, **named)
            if step is not NotImplemented:
                way.steps.keep(key, step)
        return result
    return kernel


def unless_on_gpu(op) -> Callable:
    """The early key's kernel of a function of one number, which has a rule on a CPU alone: past it on a GPU.

    Without gradients it goes past autograd too, which for what it writes to counts versions.
    """
    go_on, writes = op._handle.redispatch_boxed, op._schema.is_mutable

    def kernel(given, *arguments, **named):
        rest = USUAL.get(given.raw_repr()) if forward_ad._current_level < 0 else None
        if rest is None:
            with torch._C._ExcludeDispatchKeyGuard(_KEY):
                return go_on(given.remove(EARLY), *arguments, **named)
        return go_on(rest if writes or torch.is_grad_enabled() else _CUDA, *arguments, **named)
    return kernel


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


COMPOSITES = {"linear": Composite(linear, linear_key, leave_linear, LINEAR), "matmul": Composite(matmul),
              "linear.out": Composite(_into(linear)), "matmul.out": Composite(_into(matmul)),
              "scaled_dot_product_attention": Composite(attention, attention_key, leave_attention, WHOLE),
              **{name: Composite(_as_it_is, reduction_key, leave_reduction(op), Plans())
                 for name, op in (("sum.dim_IntList", sum), ("mean.dim", mean))}}
