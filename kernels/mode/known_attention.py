"""Attention whose launches are known when code is compiled, so that CUDA graphs hold it with what is around it.

What a mask says decides the launches. Where there is none the sizes do, and a mask made of constants is read while its
code is compiled: transformers makes such a mask where it is given none. Other masks are read at each call
(compiled_attention.py). Where nothing but y is wanted, as without gradients, an op of its own makes nothing else.

A graph reads tables of this suite where they lay when it was recorded. So the first call, which PyTorch makes before it
records, has another thread make them, whose memory is no graph's, and they stay for the process's life.
"""
from __future__ import annotations

import operator
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch
from torch.utils._python_dispatch import _disable_current_modes

from .attention import has_op
from .compiled_attention import EFFICIENT, MASKED, kernel_of, laid, rows, said
from .graphs import notes_without_inputs, varies
from .kept import form, short
from .kept_attention import ATTENTION
from .masks import of_mask
from .names import op_of
from .opaque import defined, schema_of
from .seen import Read, Seen
from .switch import Unsupported

FORWARD = ("_scaled_dot_product_flash_attention", *(name for name in MASKED if not name.endswith("_backward")))
SEEN: list[Seen] = []  # what constant masks say; a call in compiled code carries its mask's place here
NO_MASK = -1  # such a place
_HELD: set = set()  # the sequences whose tables graphs may read
_LOCK = threading.Lock()  # of SEEN


def replace(module: torch.fx.GraphModule, in_graphs: bool) -> None:
    """Put known attention in the place of calls whose masks are constants, and of those without a mask which graphs
    hold (`in_graphs`) or of which y alone is wanted."""
    module.graph.eliminate_dead_code()  # with what is wanted of a call and never used
    places: dict[torch.fx.Node, int | None] = {}  # of each reading of a mask
    for node in list(module.graph.nodes):
        name, read = _attention(node)
        given, shapes = _bound(name, node, read) if name else ({}, {})
        if not name or not _can(name, given, shapes):
            continue
        if read and node.args[0] not in places:
            places[node.args[0]] = _place(node.args[0])
        alone = all(user.target is operator.getitem and user.args[1] == 0 for user in node.users)
        place = places[node.args[0]] if read else NO_MASK if in_graphs or alone else None
        if place is not None:
            if alone:
                _put_y(module.graph, node, place, given, in_graphs)
            else:
                _put(module.graph, node, name, place, read)
    module.graph.eliminate_dead_code()
    module.recompile()


def _attention(node: torch.fx.Node) -> tuple[str, bool]:
    """Which op of FORWARD a node calls, and whether its mask is read at the call; "" if it calls none."""
    space, _, called = getattr(node.target, "name", str)().partition("::aten_")
    name = called.removesuffix("_read")
    if space != "same_bits_mode" or name not in FORWARD:
        return "", False
    return name, name != called


def _bound(name: str, node: torch.fx.Node, read: bool) -> tuple[dict, dict]:
    """What a call gives ATen's op, by name, and its tensors' shapes as PyTorch traced them."""
    given = dict(zip((a.name for a in op_of(name)._schema.arguments), node.args[read:], strict=False)) | node.kwargs
    return given, {key: given[key].meta["val"] for key in ("query", "key", "value")}


def _can(name: str, given: dict, shapes: dict) -> bool:
    """Whether this suite's attention takes the call, and its sizes are numbers."""
    q, k, v = shapes.values()
    sizes = [n for t in (q, k, v) for n in (*t.shape, *t.stride())]
    return all(type(n) is int for n in sizes) and 0 not in sizes and q.dim() == k.dim() == 4 \
        and q.shape[0] == k.shape[0] and not q.shape[1] % k.shape[1] and has_op(q, k, v, given.get("scale")) \
        and not given.get("dropout_p") and not (given.get("attn_bias") is not None and given.get("is_causal"))


def _place(reading: torch.fx.Node) -> int | None:
    """Where SEEN has what a mask says, if it is constant and shows each sequence's keys from the first on."""
    mask, *sizes = reading.args
    try:
        with _disable_current_modes(), torch.no_grad():
            value = _value(mask, {})
            seen = None if value is None else of_mask(value, *sizes, value.device)
    except Unsupported:
        return None  # it is refused by name when it is called
    if seen is None or seen.window or any(seen.starts) or seen.empty is not None:
        return None
    with _LOCK:
        place = next((i for i, known in enumerate(SEEN) if known is seen), len(SEEN))
        SEEN[place:] = SEEN[place:] or [seen]
    return place


def _value(node: torch.fx.Node, known: dict) -> torch.Tensor | None:
    """The tensor that a node is, if it follows from constants."""
    if node.op != "call_function" or varies(node.target):
        return None
    if node not in known:
        inputs = {each: _value(each, known) for each in node.all_input_nodes}
        known[node] = None if any(value is None for value in inputs.values()) else node.target(
            *torch.fx.map_arg(node.args, inputs.__getitem__), **torch.fx.map_arg(node.kwargs, inputs.__getitem__))
    return known[node]


def _put(graph: torch.fx.Graph, node: torch.fx.Node, name: str, place: int, read: bool) -> None:
    given = list(node.args[read:])
    if name in MASKED:
        given[MASKED[name][0]] = None
    with graph.inserting_before(node):
        known = graph.call_function(_op(name), (place, *given), node.kwargs)
    known.meta = notes_without_inputs(node)
    node.replace_all_uses_with(known)
    graph.erase_node(node)


def _put_y(graph: torch.fx.Graph, node: torch.fx.Node, place: int, given: dict, in_graphs: bool) -> None:
    q, k, v = (given[key] for key in ("query", "key", "value"))
    with graph.inserting_before(node):
        known = graph.call_function(_Y, (place, in_graphs, q, k, v, given.get("is_causal", False), given.get("scale")))
    for user in list(node.users):
        known.meta = dict(user.meta)
        user.replace_all_uses_with(known)
        graph.erase_node(user)
    graph.erase_node(node)


@cache
def _op(name: str):
    """An op of FORWARD with the place of its mask in SEEN before its arguments."""
    op = op_of(name)
    return defined(f"aten_{name}_known", f"(int seen, {schema_of(op)[1:]}", _run(name),
                   lambda place, *given, **named: said(name, op(*given, **named), given))


@cache
def _run(name: str) -> Callable:
    """What such an op runs."""
    kernel, at_once = kernel_of(name), short(name)

    def call(place, q, k, v, *rest, **named):
        q, k, v = _readable(q, k, v)
        given = q, k, v, *(rest if place == NO_MASK else (Read(SEEN[place], None), *rest[1:]))
        found = at_once(*given, **named)
        if found is None and q.is_cuda:
            _prepare(kernel, given, named)
            found = at_once(*given, **named)
        return laid(name, kernel(*given, **named) if found is None else found, given)

    def run(*given, **named):
        if not torch._C._len_torch_dispatch_stack():
            return call(*given, **named)
        with _disable_current_modes():  # PyTorch's own, around the call before a recording
            return call(*given, **named)
    return run


def _readable(q, k, v) -> tuple[torch.Tensor, ...]:
    """q that lies as its op wants it, k and v whose rows do."""
    return rows(q), *(t if t.stride(-1) == 1 else t.contiguous() for t in (k, v))


def _run_y(place, in_graphs, q, k, v, causal, scale) -> torch.Tensor:
    """y alone, of whichever op PyTorch chose: the rules of all are the same."""
    numbers = causal, scale, False, None if place == NO_MASK else SEEN[place]
    found = ATTENTION.get((numbers, form(q, k, v)))
    ready = None if found is None else found.launched(q, k, v)
    if ready is not None:
        return ready[0]
    if in_graphs:
        return _run(EFFICIENT)(place, q, k, v, None, False, 0.0, causal, scale=scale)[0]
    mask = None if place == NO_MASK else Read(SEEN[place], None)
    given = *_readable(q, k, v), mask, False, 0.0, causal
    return laid(EFFICIENT, kernel_of(EFFICIENT)(*given, scale=scale), given)[0]


_Y = defined("known_attention", "(int seen, bool in_graphs, Tensor query, Tensor key, Tensor value, bool is_causal, "
             "float? scale) -> Tensor", _run_y, lambda place, in_graphs, q, *given: rows(q.new_empty(q.shape)))


def _prepare(kernel, given: tuple, named: dict) -> None:
    """Make a call in another thread, which leaves its tables. Raises RuntimeError while a graph is captured."""
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("batch_invariant: attention of this form must run once before a CUDA graph is captured")
    stream = torch.cuda.current_stream(given[0].device)

    def once():
        with torch.cuda.stream(stream), torch.no_grad():
            kernel(*given, **named)
    with ThreadPoolExecutor(1) as other:
        other.submit(once).result()
    _HELD.update(attention.sequences for attention in ATTENTION.values())
