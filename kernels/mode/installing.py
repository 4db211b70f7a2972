"""What the mode registers with PyTorch, once a process: its keys' fallthroughs, the rules, torch.compile's hook."""
from __future__ import annotations

import threading

import torch

from . import (  # noqa: F401 - for rules
    attention,
    compiling,
    elements,
    overloads,
    products,
    reductions,
    refused,
    refused_draws,
    refused_libraries,
)
from .asked_first import is_below
from .composites import COMPOSITES, seen_whole, unless_on_gpu
from .kept import short
from .names import op_of, space_of
from .overloads import ON_A_CPU_ALONE
from .switch import EARLY, KEY, NAMES, RULES, guarded, made_of_rules, unseen_by_dynamo

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
    everywhere = torch.library.Library("_", "IMPL")
    spaces = {space: torch.library.Library(space, "IMPL") for space in sorted(set(map(space_of, RULES)) | {"aten"})}
    here, early = NAMES

    def early_kernel(name, kernel):
        spaces["aten"].impl(name, unseen_by_dynamo(kernel), early, with_keyset=True)
    for name in NAMES:
        everywhere.fallback(torch.library.fallthrough_kernel, name)
    for name, function in RULES.items():
        if (op := op_of(name)) is not None:
            spaces[space_of(name)].impl(name.rpartition("::")[2], guarded(name, op, function, short(name)), here)
            if name in ON_A_CPU_ALONE:
                early_kernel(name, unless_on_gpu(op))
    for name, way in COMPOSITES.items():
        early_kernel(name, seen_whole(op_of(name), way))
        if is_below(KEY) and name not in RULES:
            spaces["aten"].impl(name, made_of_rules(name, op_of(name), way.long), here, with_keyset=True)
    return everywhere, *spaces.values()


def _pass_higher_order() -> None:
    """The same fallthroughs for ops that take functions (cond, flex_attention), which the fallbacks do not reach."""
    later = getattr(torch._ops, "_HIGHER_ORDER_OP_DEFAULT_FALLTHROUGH_DISPATCH_KEYS", [])
    later.extend((KEY, EARLY))
    for op in tuple(getattr(torch._ops, "_higher_order_ops", {}).values()):
        for key in (KEY, EARLY):
            op.fallthrough(key)
