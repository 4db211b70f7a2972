"""Dispatch modes, and tensors whose class computes with others inside: they see an op before its rule does.

So find_moving_ops sees the op and not what a rule does, and what a class computes inside is in the mode. PyTorch asks
them itself where its key for them stands above ours. In torch 2.11 it stands below, and there it would turn ours off.
"""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils._python_dispatch import _pop_mode_temporarily

_PYTHON = torch._C._dispatch_key_parse("Python")
_ABOVE = (torch._C._dispatch_keyset_full() - torch._C._dispatch_keyset_full_after(_PYTHON)).remove(_PYTHON)
_COUNT_MODES = torch._C._len_torch_dispatch_stack


def are_asked(given: list[torch.Tensor]) -> bool:
    """Whether a mode or a class among these arguments is to see a call that has come to our key."""
    some = any(map(_wraps, given)) or _COUNT_MODES() > 0 and not without_numbers(given)
    return some and not torch._C._dispatch_tls_is_dispatch_key_excluded(_PYTHON)


def ask(op: Callable, given: list[torch.Tensor], keep: int, arguments: tuple, named: dict):
    """What they make of a call, with key `keep` on: the innermost mode first. Raises TypeError if all give it up."""
    classes = tuple(dict.fromkeys(type(t) for t in given if _wraps(t)))
    with torch._C._ExcludeDispatchKeyGuard(_ABOVE.remove(keep)):
        if _COUNT_MODES():
            with _pop_mode_temporarily() as mode:
                found = mode.__torch_dispatch__(op, classes, arguments, named)
            if found is not NotImplemented:
                return found
        for each in classes:
            found = each.__torch_dispatch__(op, classes, arguments, named)
            if found is not NotImplemented:
                return found
    raise TypeError(f"no __torch_dispatch__ of {', '.join(each.__name__ for each in classes)} takes {op}")


def _wraps(t: torch.Tensor) -> bool:
    """Whether its class computes with tensors inside, in this mode."""
    if type(t).__torch_dispatch__ is torch.Tensor.__torch_dispatch__ or t.is_meta:
        return False
    from torch._subclasses import FakeTensor
    from torch._subclasses.functional_tensor import FunctionalTensor

    return not isinstance(t, (FakeTensor, FunctionalTensor))


def without_numbers(tensors: list[torch.Tensor]) -> bool:
    """Tensors of torch.compile's tracing, and meta tensors: they have shapes alone."""
    return any(t.is_meta or type(t).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__ for t in tensors)
