"""A function whose calls run in a mode: what the mode does as a decorator."""
from __future__ import annotations

import inspect
from collections.abc import Callable

from torch.utils._contextlib import context_decorator


def inside(enter: Callable, function: Callable) -> Callable:
    """`function`, each call of which runs in a mode that `enter` makes; of a generator function, each of its steps.

    Raises TypeError for async functions: while one awaits, others would run in the mode of the thread.
    """
    ways = function, type(function).__call__  # which an object may have of its own
    if any(inspect.iscoroutinefunction(way) or inspect.isasyncgenfunction(way) for way in ways):
        raise TypeError(f"batch_invariant cannot decorate {getattr(function, '__name__', function)}, for the mode is "
                        "the thread's and an async function's awaits let others run in it: use `with "
                        "batch_invariant():` around code without await")
    return context_decorator(enter, function.__call__ if inspect.isgeneratorfunction(ways[1]) else function)
