"""Ops of torch.library that stand for rules in compiled code, into which no decomposition looks."""
from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache

import torch


@cache
def _library() -> torch.library.Library:
    return torch.library.Library("same_bits_mode", "FRAGMENT")


def defined(own: str, schema: str, run: Callable, fake: Callable, *tags: torch.Tag):
    """Make an op: what it runs on any device, and what it says of tensors that have shapes alone."""
    _library().define(own + schema, tags=tags)
    _library().impl(own, run, "CompositeExplicitAutograd")
    made = getattr(torch.ops.same_bits_mode, own).default
    torch.library.register_fake(made, fake, lib=_library())
    return made


def schema_of(op) -> str:
    """An op's arguments and results as torch.library writes them. `from` is no name in compiled code: it is `from_`."""
    schema = str(op._schema)[str(op._schema).index("("):]
    return re.sub(r" from(?=[,=)])", " from_", schema)


def named_as_pytorchs(function: Callable, op) -> Callable:
    """`function`, which has the arguments of PyTorch's op, under the names of schema_of."""
    if "from_" not in schema_of(op):
        return function
    return lambda *given, **named: function(*given, **{{"from_": "from"}.get(k, k): v for k, v in named.items()})
