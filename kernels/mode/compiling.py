"""torch.compile while the mode is on.

The dispatcher's keys are part of Dynamo's guards, so a function is compiled once outside and once inside. What Inductor
leaves to ATen reaches the rules when it runs. What it would lower or decompose itself, sums and softmax and small
products, is traced as one opaque op for each rule, by a table of decompositions that is handed to this compilation
alone: nothing of Inductor's is changed. AOTAutograd keeps compiled graphs by their code, which the mode is no part of,
so compilations inside neither read nor fill that cache.
"""
from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps

import torch

from .elements import ONE, TWO
from .kept import short
from .switch import RULES, active, guarded, op_of

_LIBRARY: list[torch.library.Library] = []


@cache
def _opaque(name: str):
    """A rule as an op of torch.library, with the schema of the op it stands for."""
    if not _LIBRARY:
        _LIBRARY.append(torch.library.Library("same_bits_mode", "FRAGMENT"))
    op, own = op_of(name), "aten_" + name.replace(".", "_")
    _LIBRARY[0].define(own + str(op._schema)[str(op._schema).index("("):])
    _LIBRARY[0].impl(own, guarded(name, op, RULES[name], short(name, op)), "CompositeExplicitAutograd")
    made = getattr(torch.ops.same_bits_mode, own).default
    torch.library.register_fake(made, lambda *arguments, **named: op(*arguments, **named), lib=_LIBRARY[0])
    return made


def _decomposition(name: str, before: Callable | None) -> Callable:
    on_cpu_alone = name in (*ONE, *TWO)

    def traced(*arguments, **named):
        if on_cpu_alone and arguments[0].device.type != "cpu":
            return NotImplemented if before is None else before(*arguments, **named)
        return _opaque(name)(*arguments, **named)
    return traced


def decompositions(known: dict) -> dict:
    """Inductor's table `known`, with each rule in its place."""
    table = dict(known)
    for name in RULES:
        op = op_of(name)
        if op is not None and not _writes(op):
            table[op] = _decomposition(name, known.get(op))
    return table


def _writes(op) -> bool:
    return any(a.alias_info is not None and a.alias_info.is_write for a in op._schema.arguments)


def hook() -> None:
    """Let `torch.compile` with Inductor ask, at each compilation, whether the mode is on."""
    wrapper = torch._TorchCompileInductorWrapper
    compile_as_ever = wrapper.__call__

    @wraps(compile_as_ever)
    def compile_graph(self, model, inputs, **named):
        if not active():
            return compile_as_ever(self, model, inputs, **named)
        import torch._functorch.config as functorch
        from torch._inductor.compile_fx import compile_fx
        from torch._inductor.decomposition import select_decomp_table

        patches = {**self.config, **(named.get("config_patches") or {})}
        with functorch.patch(enable_autograd_cache=False):
            return compile_fx(model, inputs, config_patches=patches,
                              decompositions=decompositions(select_decomp_table()))
    wrapper.__call__ = compile_graph
