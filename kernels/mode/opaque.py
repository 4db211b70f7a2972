"""Ops of torch.library that stand for rules in compiled code, into which no decomposition looks."""
from __future__ import annotations

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
    """An op's arguments and results as torch.library writes them."""
    return str(op._schema)[str(op._schema).index("("):]
