"""What the mode registers with PyTorch, once a process: its keys' fallthroughs, the rules, torch.compile's hook."""
from __future__ import annotations

import threading

import torch

from . import attention, compiling, elements, overloads, products, reductions, refused  # noqa: F401 - for rules
from .composites import COMPOSITES, seen_whole, unless_on_gpu
from .kept import short
from .overloads import ON_A_CPU_ALONE
from .switch import EARLY, KEY, NAMES, RULES, guarded, op_of, unseen_by_dynamo

_LIBRARIES: list[torch.library.Library] = []
_LOCK = threading.Lock()


def install() -> None:
    """Register all of it, unless that was done."""
    if _LIBRARIES:
        return
    with _LOCK:
        if not _LIBRARIES:
            made = _registered()
            _pass_higher_order()
            compiling.hook()
            _LIBRARIES.extend(made)


def _registered() -> tuple[torch.library.Library, ...]:
    """The libraries that hold the keys' fallthroughs and the rules, for as long as they are kept."""
    everywhere, aten = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    here, early = NAMES

    def early_kernel(name, kernel):
        aten.impl(name, unseen_by_dynamo(kernel), early, with_keyset=True)
    for name in NAMES:
        everywhere.fallback(torch.library.fallthrough_kernel, name)
    for name, function in RULES.items():
        if (op := op_of(name)) is not None:
            aten.impl(name, guarded(name, op, function, short(name)), here)
            if name in ON_A_CPU_ALONE:
                early_kernel(name, unless_on_gpu(op))
    for name, way in COMPOSITES.items():
        early_kernel(name, seen_whole(op_of(name), way))
    return everywhere, aten


def _pass_higher_order() -> None:
    """The same fallthroughs for ops that take functions (cond, flex_attention), which the fallbacks do not reach."""
    later = getattr(torch._ops, "_HIGHER_ORDER_OP_DEFAULT_FALLTHROUGH_DISPATCH_KEYS", [])
    later.extend((KEY, EARLY))
    for op in tuple(getattr(torch._ops, "_higher_order_ops", {}).values()):
        for key in (KEY, EARLY):
            op.fallthrough(key)
