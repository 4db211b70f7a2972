"""The dispatcher's keys that the mode turns on for a thread, and what happens to a call that has no fixed order.

`Fake` is a key for extensions outside PyTorch's core, of which there is none left that uses it. It stands below
autograd and autocast and above the devices, and a fallthrough makes it free for every op without a rule.
`DeferredInit` is another such key, above autograd and autocast: for whole calls of composite ops (composites.py).
"""
from __future__ import annotations

import os
import sys
import threading
import warnings
from collections.abc import Callable
from functools import partial

import torch
from torch._C._dynamo import eval_frame
from torch.autograd import forward_ad
from torch.utils._pytree import tree_map_only

from . import decorated
from .asked_first import OnlyPyTorchCanAsk, are_asked, ask, ask_outside, is_plain, without_numbers
from .names import public

NAMES = "Fake", "DeferredInit"
KEY, EARLY = map(torch._C._dispatch_key_parse, NAMES)
_BELOW = torch._C._dispatch_keyset_full_after(KEY)
KEYS = torch._C.DispatchKeySet(KEY) | torch._C.DispatchKeySet(EARLY)
RULES: dict[str, Callable] = {}  # the op as torch.ops.aten writes it -> what takes its place


class MovesBits(UserWarning):
    """An op ran as PyTorch runs it, and the batch may change its bits."""


class Refused(RuntimeError):
    """An op that has no fixed order here, in a mode that is strict. No TypeError: `a @ b` would hide that one."""


class Unsupported(Exception):
    """Raised by a rule: it has no order for these arguments, and the text says which they were."""


class _Thread(threading.local):
    def __init__(self):
        self.entered: list[tuple[batch_invariant, bool]] = []  # of each mode, and whether the keys counted before
        self.warned: set[str] = set()


_THREAD, _LOCK = _Thread(), threading.Lock()
_OURS = tuple(os.path.dirname(file) + os.sep for file in (torch.__file__, __file__))
_STRICT = {True: 0, False: 0}  # how many modes are on, in all threads


class batch_invariant:
    """In this block, and in backward passes begun in it, this thread's ops add in an order that no batch changes.

    strict  what becomes of an op that is known to move its bits and has no order here, or of arguments that a rule
            does not cover (a dense mask, dropout, float64, sparse, nested or complex tensors): True refuses it with
            `Refused`, False runs it as PyTorch does and warns with `MovesBits`, once an op and block. Both name it

    Random draws are such ops. Those that make weights pass in silence, for weights are no rows of a batch: into a
    Parameter, in torch.nn.init and where a module is built; and so do those of a DataLoader.

    A mode may be nested, entered again while it is on, and entered by several threads at once; the innermost one's
    `strict` holds. A thread that is started inside does not inherit it: enter it there; a process that is forked inside
    does. torch.compile compiles once outside and once inside. Raises TypeError for a `strict` that is no bool,
    RuntimeError where it is left by a thread that did not enter it, which changes nothing, or in another order than it
    was entered. It is left all the same then: once all are, the thread is as it was before the first.
    """

    def __init__(self, strict: bool = False):
        if type(strict) is not bool:
            raise TypeError(f"strict must be True or False, got {strict!r}")
        self.strict = strict

    def __enter__(self):
        from .installing import install  # which needs the rules, and they this file

        install()
        before = torch._C._dispatch_tls_is_dispatch_key_included(KEY)
        _include(True)
        _THREAD.entered.append((self, before))
        _THREAD.warned = set()
        with _LOCK:
            _STRICT[self.strict] += 1
        return self

    def __exit__(self, *_):
        entered = _THREAD.entered
        place = next((i for i in reversed(range(len(entered))) if entered[i][0] is self), None)
        if place is None:
            raise RuntimeError("batch_invariant must be left by the thread that entered it, and once for each time")
        _, before = entered.pop(place)
        with _LOCK:
            _STRICT[self.strict] -= 1
        if place < len(entered):
            entered[place] = entered[place][0], before  # whichever is left last brings this back
            raise RuntimeError("batch_invariant must be left in the order that it was entered, the innermost one first")
        _include(before)

    def __call__(self, function: Callable) -> Callable:
        """`function` with each call in such a mode: a decorator. Of a generator function, the body runs in the mode and
        what comes between does not. Raises TypeError for an async function."""
        return decorated.inside(lambda: batch_invariant(self.strict), function)


def _include(on: bool) -> None:
    for key in (KEY, EARLY):
        torch._C._dispatch_tls_set_dispatch_key_included(key, on)


def active() -> bool:
    """Whether this thread's ops go to the rules now."""
    return torch._C._dispatch_tls_is_dispatch_key_included(KEY) and \
        not torch._C._dispatch_tls_is_dispatch_key_excluded(KEY)


def strict() -> bool:
    """Whether the innermost mode refuses. A device's backward thread entered none: there any strict mode decides."""
    return _THREAD.entered[-1][0].strict if _THREAD.entered else _STRICT[True] > 0


def rule(*names: str) -> Callable:
    """Register a function of an op's own arguments as its rule.

    It returns the result, raises Unsupported, or gives NotImplemented where PyTorch's op has no order to fix.
    """
    def add(function: Callable) -> Callable:
        RULES.update(dict.fromkeys(names, function))
        return function
    return add


def object_to(name: str, why: str) -> None:
    """Raise Refused in a strict mode, else warn with MovesBits, once an op and block."""
    name = public(name)
    text = f"batch_invariant: {name} {why}"
    if strict():
        raise Refused(f"{text}. Leave the block for it, or use strict=False to run it as PyTorch does")
    if name not in _THREAD.warned:
        _THREAD.warned.add(name)
        warnings.warn(f"{text}; it runs as PyTorch runs it, and the batch may move its bits", MovesBits,
                      stacklevel=_callers_level())


def _callers_level() -> int:
    """For warnings.warn: where the reader's code called into PyTorch or this suite."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OURS):
        level, frame = level + 1, frame.f_back
    return level


def guarded(name: str, op, function: Callable, short: Callable) -> Callable:
    """`function` as a kernel of the dispatcher: without the keys and without gradients, which come from above.

    `short` (kept.py) is asked first, outside of the guards: it gives the result, or None.
    """
    def kernel(*arguments, **named):
        found = short(*arguments, **named)
        if found is not None:
            return found
        given = _tensors(arguments, named)
        if are_asked(given):
            return _asked(name, op, given, arguments, named)
        with torch._C._ExcludeDispatchKeyGuard(KEYS):
            if without_numbers(given):
                return op(*arguments, **named)
            if not all(map(is_plain, given)):  # a class that computes with its own numbers, and is not asked again
                arguments, named = tree_map_only(torch.Tensor, _as_plain, (arguments, named))
            gradients = torch.is_grad_enabled()
            torch._C._set_grad_enabled(False)
            try:
                if any(t.is_nested for t in given):
                    raise Unsupported("has no order for nested tensors")
                if forward_ad._current_level >= 0:
                    raise Unsupported("has no order under forward-mode derivatives")
                result = function(*arguments, **named)
            except Unsupported as why:
                object_to(name, str(why))
                result = NotImplemented
            finally:
                torch._C._set_grad_enabled(gradients)
            return op(*arguments, **named) if result is NotImplemented else result
    return unseen_by_dynamo(kernel)


def made_of_rules(name: str, op, function: Callable) -> Callable:
    """A kernel, given the call's keys, of an op whose parts have rules, where it comes whole to our key: a class of
    tensors or a mode may take it so. `function` makes it of its parts; it takes first what PyTorch makes of the op."""
    def kernel(keys, *arguments, **named):
        given, below = _tensors(arguments, named), keys & _BELOW
        if are_asked(given):
            return _asked(name, op, given, arguments, named)
        return function(partial(op._handle.redispatch_boxed, below), *arguments, **named)
    return unseen_by_dynamo(kernel)


def _tensors(arguments: tuple, named: dict) -> list[torch.Tensor]:
    return [a for a in (*arguments, *named.values()) if isinstance(a, torch.Tensor)]


def _as_plain(t: torch.Tensor) -> torch.Tensor:
    return t if is_plain(t) else t.as_subclass(torch.Tensor)


def _asked(name: str, op, given: list[torch.Tensor], arguments: tuple, named: dict):
    """What modes and classes of tensors make of a call."""
    try:
        return ask(op, given, KEY, arguments, named)
    except OnlyPyTorchCanAsk as which:
        object_to(name, f"has no order for {which} with this release of PyTorch")
    return ask_outside(op, given, arguments, named)


def unseen_by_dynamo(kernel: Callable) -> Callable:
    """`kernel` so marked that Dynamo compiles neither it nor what it calls: where Dynamo gives a reader's frame up, it
    takes those that the frame calls, and settings of PyTorch's that a kernel reads would be constants."""
    skip = eval_frame._FrameAction.SKIP
    eval_frame.set_code_exec_strategy(kernel.__code__, eval_frame._FrameExecStrategy(skip, skip))
    return kernel
