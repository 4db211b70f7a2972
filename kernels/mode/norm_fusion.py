"""RMSNorm's operations in a graph, and the addition before them, replaced by one op (rounded_norm.py).

A norm stays as it is where something else reads what it computes on the way, as backward passes do.
"""
from __future__ import annotations

import operator
from typing import NamedTuple

import torch
from torch._prims_common import is_contiguous_or_false
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true, sym_eq

from ..op import DTYPES
from ..ops.rms_norm import RESIDENT_WIDTH
from .rounded_norm import ADDED, LARGEST_EPS, NORM, SMALLEST_EPS

_ADD, _MULTIPLY, _CONVERT = ("aten::add.Tensor",), ("aten::mul.Tensor",), ("prims::convert_element_type",)
_SQUARE = ("aten::pow.Tensor_Scalar", "same_bits_mode::aten_pow_Tensor_Scalar")
_RSQRT = ("aten::rsqrt", "same_bits_mode::aten_rsqrt")
_MEAN = ("same_bits_mode::aten_mean_dim",)


class _Norm(NamedTuple):
    """A norm in a graph: what it reads, and its nodes in the order of the graph, the last of which is y."""

    x: Node
    weight: Node
    eps: float
    nodes: list[Node]


def fuse(module: torch.fx.GraphModule, devices: tuple[str, ...] = ("cuda",)) -> None:
    """Put one op in the place of each norm on these kinds of device, and of the addition before it."""
    found = False
    for node in list(module.graph.nodes):
        norm = _norm(node, devices) if _called(node, *_MEAN) else None
        if norm is not None:
            (_put_with_addition if _takes_addition(norm) else _put)(module.graph, norm)
            found = True
    if found:
        module.recompile()


def _called(node, *names: str) -> bool:
    """Whether a node calls one of these ops, without named arguments."""
    return isinstance(node, Node) and getattr(node.target, "name", str)() in names and not node.kwargs


def _chain(node: Node, *ops: tuple[str, ...]) -> list[Node]:
    """The nodes that follow as ops are named, each the one user of that before; empty if others do."""
    found = [node]
    for names in ops:
        users = list(found[-1].users)
        if len(users) != 1 or not _called(users[0], *names):
            return []
        found.append(users[0])
    return found


def _norm(mean: Node, devices) -> _Norm | None:
    """The norm around a mean, if there is one that the op can stand for."""
    start = _ADD, _RSQRT, _MULTIPLY
    chain = _chain(mean, *start, _CONVERT, _MULTIPLY) or _chain(mean, *start, _MULTIPLY)
    square = mean.args[0]
    if not chain or list(square.users) != [mean]:
        return None
    _, shifted, scale, scaled, *_, y = chain
    normed = chain[-2]
    h, weight = _other(scaled, scale), _other(y, normed)
    if not isinstance(weight, Node) or weight is normed or not _squares(square, h):
        return None
    before = [square]
    x = h
    if normed is not scaled:
        if not _called(h, *_CONVERT) or set(h.users) != {square, scaled}:
            return None
        x, before = h.args[0], [h, square]
    norm = _Norm(x, weight, shifted.args[1], [*before, *chain])
    return norm if _fits(norm, h, normed, mean.args[1:], devices) and _contiguous(y) else None


def _other(node: Node, factor: Node):
    """The other argument of an op of two."""
    return node.args[1] if node.args[0] is factor else node.args[0]


def _squares(square: Node, h) -> bool:
    return isinstance(h, Node) and (square.args == (h, 2) and _called(square, *_SQUARE)
                                    or square.args == (h, h) and _called(square, *_MULTIPLY))


def _fits(norm: _Norm, h: Node, normed: Node, reduced: tuple, devices) -> bool:
    """Whether dtypes, shapes and numbers are those of the op."""
    x, weight, eps = norm.x.meta["val"], norm.weight.meta["val"], norm.eps
    if not isinstance(eps, (int, float)) or not SMALLEST_EPS <= eps <= LARGEST_EPS:
        return False
    if not isinstance(weight, torch.Tensor) or x.device.type not in devices or x.dtype not in DTYPES.values():
        return False
    width = x.shape[-1] if x.dim() else 0
    return (isinstance(width, int) and 0 < width <= RESIDENT_WIDTH and reduced in (([-1], True), ([x.dim() - 1], True))
            and h.meta["val"].dtype == torch.float32 and normed.meta["val"].dtype == x.dtype == weight.dtype
            and weight.dim() == 1 and statically_known_true(weight.shape[0] == width))


def _takes_addition(norm: _Norm) -> bool:
    """Whether x is a sum of two alike, and all else that reads it comes where the op can give it."""
    x = norm.x
    if not _called(x, *_ADD) or x is norm.weight or not all(isinstance(a, Node) for a in x.args):
        return False
    after = max(x, norm.weight)
    return _contiguous(x) and all(_alike(a.meta["val"], x.meta["val"]) for a in x.args) and \
        all(after < user for user in x.users if user not in norm.nodes)


def _contiguous(node: Node) -> bool:
    """Whether a result lies as the op's will: whoever called the graph was told its strides."""
    return is_contiguous_or_false(node.meta["val"])


def _alike(a, b) -> bool:
    return isinstance(a, torch.Tensor) and a.dtype == b.dtype and a.device == b.device and a.dim() == b.dim() and \
        statically_known_true(sym_eq(tuple(a.shape), tuple(b.shape)))


def _put(graph: torch.fx.Graph, norm: _Norm) -> None:
    y = norm.nodes[-1]
    with graph.inserting_before(y):
        _replace(y, graph.call_function(NORM, (norm.x, norm.weight, float(norm.eps))))
    _erase(graph, norm.nodes)


def _put_with_addition(graph: torch.fx.Graph, norm: _Norm) -> None:
    x, y = norm.x, norm.nodes[-1]
    with graph.inserting_after(max(x, norm.weight)):
        both = graph.call_function(ADDED, (*x.args, norm.weight, float(norm.eps)))
    both.meta["val"] = y.meta["val"], x.meta["val"]
    with graph.inserting_after(both):
        for place, node in enumerate((y, x)):
            _replace(node, graph.call_function(operator.getitem, (both, place)))
    _erase(graph, [x, *norm.nodes])


def _replace(node: Node, by: Node) -> None:
    by.meta = dict(node.meta)
    node.replace_all_uses_with(by)


def _erase(graph: torch.fx.Graph, nodes: list[Node]) -> None:
    for node in reversed(nodes):
        graph.erase_node(node)
