"""Masks in compiled code: an op of its own reads what one says on the host, once a forward, and gives it a number.

Layers that share a mask share that op's call within a graph. Where layers are graphs of their own, each makes its mask
anew from the one that it is given, and comparing its numbers with the last one's has the host wait for the GPU. So the
op is told too which input the mask is made of, and how: for the same input, not written to since, the number is known.
Inside of CUDA graphs an input may be written to unseen, so there the numbers are compared.
"""
from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
from torch.utils._pytree import tree_flatten

from .graphs import notes_without_inputs, numbered, varies
from .masks import READ, number_of
from .opaque import defined

LONGEST = 10_000  # characters of a text that says how a mask is made
_MADE: dict[str, int] = {}  # such a text -> its number
_KNOWN: dict[tuple, _Given] = {}  # how a mask is made, of which numbers, and its sizes -> the input it was last made of
MOST = 64


class _Given(NamedTuple):
    """An input of compiled code, and the number of what the mask says that was made of it."""

    source: weakref.ref
    version: int
    number: int


def _read(mask, *sizes) -> torch.Tensor:
    return torch.tensor(number_of(mask, *sizes), dtype=torch.int64, device="cpu")


def _read_of(source, made, numbers, mask, *sizes) -> torch.Tensor:
    version = None if source.is_inference() else source._version
    key = made, *numbers, *sizes
    known = _KNOWN.get(key)
    if known is not None and known.source() is source and known.version == version and known.number in READ:
        return torch.tensor(known.number, dtype=torch.int64, device="cpu")
    number = number_of(mask, *sizes)
    if _costs_a_wait(mask) and version is not None:
        _KNOWN[key] = _Given(weakref.ref(source), version, number)
        for old in list(_KNOWN)[:-MOST]:
            _KNOWN.pop(old, None)
    return torch.tensor(number, dtype=torch.int64, device="cpu")


def _costs_a_wait(mask) -> bool:
    """On a CPU comparing costs none, and numpy may have written to a mask unseen."""
    return mask.is_cuda


def _number(*given) -> torch.Tensor:
    return torch.empty((), dtype=torch.int64, device="cpu")


_SIZES = "Tensor mask, SymInt batch, SymInt queries, SymInt keys) -> Tensor"
READER = defined("read_mask", f"({_SIZES}", _read, _number, torch.Tag.cudagraph_unsafe)
READER_OF = defined("read_mask_of", f"(Tensor source, int made, SymInt[] numbers, {_SIZES}", _read_of, _number,
                    torch.Tag.cudagraph_unsafe)


def read_once(module: torch.fx.GraphModule) -> None:
    """Of readings of masks that are made alike leave the first: layers make and read theirs apart, of the same one."""
    values, first = numbered(module), {}
    for node in list(module.graph.nodes):
        if node.target is READER and first.setdefault(values[node], node) is not node:
            node.replace_all_uses_with(first[values[node]])
            module.graph.erase_node(node)
    module.recompile()


def name_sources(module: torch.fx.GraphModule) -> None:
    """Tell each reading of a mask that is made of one input, and of numbers, which input and how."""
    for node in list(module.graph.nodes):
        if node.target is not READER:
            continue
        inputs: dict[torch.fx.Node, str] = {}
        text = _text(node.args[0], inputs, {})
        sources = [each for each in inputs if isinstance(each.meta.get("val"), torch.Tensor)]
        if text is None or len(sources) != 1:
            continue
        numbers = [each for each in inputs if each is not sources[0]]
        with module.graph.inserting_before(node):
            named = module.graph.call_function(
                READER_OF, (sources[0], _MADE.setdefault(text, len(_MADE)), numbers, *node.args))
        named.meta = notes_without_inputs(node)
        node.replace_all_uses_with(named)
        module.graph.erase_node(node)
    module.recompile()


def _text(node: torch.fx.Node, inputs: dict, known: dict) -> str | None:
    """How a node is made of a graph's `inputs`, which are named here; None where another call of it may differ."""
    if node in known:
        return known[node]
    known[node] = text = None
    if node.op == "placeholder":
        text = inputs.setdefault(node, f"input {len(inputs)}: {type(node.meta.get('val')).__name__}")
    elif node.op == "call_function" and not varies(node.target):
        leaves, form = tree_flatten((node.args, node.kwargs))
        made = [_text(leaf, inputs, known) if isinstance(leaf, torch.fx.Node) else repr(leaf) for leaf in leaves]
        text = None if None in made else f"{node.target} {form} ({', '.join(map(str, made))})"
    known[node] = text if text is not None and len(text) <= LONGEST else None
    return known[node]
