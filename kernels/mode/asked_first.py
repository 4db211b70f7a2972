"""Dispatch modes, and tensors whose class computes with others inside: they see an op before its rule does.

So find_moving_ops sees the op and not what a rule does, and what a class computes inside is in the mode. PyTorch asks
them itself where its key for them stands above ours, as in torch 2.13. In 2.11 it stands below, and turns ours off for
what they call. There they are asked here, of ops that have a rule and of those that composites.py sees whole; what they
make of other ops is outside the mode.
DTensor, which only PyTorch can ask, is objected to by name there.
"""
from __future__ import annotations

import sys
from collections.abc import Callable
from functools import reduce
from operator import or_

import torch
from torch.utils._python_dispatch import _pop_mode_temporarily

_PYTHON = torch._C._dispatch_key_parse("Python")
_ABOVE = (torch._C._dispatch_keyset_full() - torch._C._dispatch_keyset_full_after(_PYTHON)).remove(_PYTHON)
_COUNT_MODES = torch._C._len_torch_dispatch_stack


class OnlyPyTorchCanAsk(Exception):
    """Of a class of tensors that PyTorch computes itself; the text names it."""


def is_below(keep: int) -> bool:
    """Whether PyTorch asks them only behind this key of ours."""
    return _ABOVE.has(keep)


def are_asked(given: list[torch.Tensor]) -> bool:
    """Whether a mode or a class among these arguments is to see a call that has come to our key."""
    some = any(map(_wraps, given)) or _COUNT_MODES() > 0 and not without_numbers(given)
    return some and not torch._C._dispatch_tls_is_dispatch_key_excluded(_PYTHON)


def ask(op: Callable, given: list[torch.Tensor], keep: int, arguments: tuple, named: dict):
    """What they make of a call, with key `keep` on: the innermost mode first. Raises TypeError if all give it up, and
    OnlyPyTorchCanAsk."""
    classes = _in_order(given)
    with torch._C._ExcludeDispatchKeyGuard(_ABOVE.remove(keep)):
        if _COUNT_MODES():
            with _pop_mode_temporarily() as mode:
                found = mode.__torch_dispatch__(op, classes, arguments, named)
            if found is not NotImplemented:
                return found
        for each in classes:
            if issubclass(each, _computed_by_pytorch()):
                raise OnlyPyTorchCanAsk(each.__name__)
            found = each.__torch_dispatch__(op, classes, arguments, named)
            if found is not NotImplemented:
                return found
    raise TypeError(f"no __torch_dispatch__ of {', '.join(each.__name__ for each in classes)} takes {op}")


def ask_outside(op: Callable, given: list[torch.Tensor], arguments: tuple, named: dict):
    """What PyTorch's own fallback makes of a call: it asks them all, without our keys."""
    keys = reduce(or_, map(torch._C._dispatch_keys, given)) & torch._C._dispatch_keyset_full_after(_PYTHON).add(_PYTHON)
    return op._handle.redispatch_boxed(keys, *arguments, **named)


def _in_order(given: list[torch.Tensor]) -> tuple[type, ...]:
    """Their classes as PyTorch asks them: as they come, but a class before those that it inherits from."""
    classes: list[type] = []
    for kind in dict.fromkeys(type(t) for t in given if _wraps(t)):
        place = next((i for i, known in enumerate(classes) if issubclass(kind, known)), len(classes))
        classes.insert(place, kind)
    return tuple(classes)


def _computed_by_pytorch() -> tuple[type, ...]:
    kind = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return () if kind is None else (kind,)


def _wraps(t: torch.Tensor) -> bool:
    """Whether its class computes with tensors inside, in this mode."""
    return not (is_plain(t) or t.is_meta or _is_traced(t))


def without_numbers(tensors: list[torch.Tensor]) -> bool:
    """Tensors of torch.compile's tracing, and meta tensors: they have shapes alone."""
    return any(t.is_meta or not is_plain(t) and _is_traced(t) for t in tensors)


def is_plain(t: torch.Tensor) -> bool:
    """Whether its class leaves ops to PyTorch."""
    return type(t).__torch_dispatch__ is torch.Tensor.__torch_dispatch__


def _is_traced(t: torch.Tensor) -> bool:
    from torch._subclasses import FakeTensor
    from torch._subclasses.functional_tensor import FunctionalTensor

    return isinstance(t, (FakeTensor, FunctionalTensor))
