"""Products in a graph of the same x and several weights, q, k and v above all, as one op: for the host the way through
PyTorch's dispatcher takes longer than a launch.
"""
from __future__ import annotations

import operator

import torch
from torch.fx import Node

from .compiled_products import product
from .graphs import notes_without_inputs, numbered
from .opaque import defined

_MM, _VIEWS = "same_bits_mode::aten_mm", (torch.ops.aten.permute.default, torch.ops.aten.t.default)


def _run(x, mats) -> list[torch.Tensor]:
    one = product("mm")
    return [one(x, mat).contiguous() for mat in mats]


_SEVERAL = defined("several_mm", "(Tensor x, Tensor[] mats) -> Tensor[]", _run,
                   lambda x, mats: [x.new_empty((x.shape[0], mat.shape[1])) for mat in mats])


def put_together(module: torch.fx.GraphModule, devices: tuple[str, ...] = ("cuda",)) -> None:
    """Put one op in the place of products on these kinds of device that take the same x."""
    groups: dict[int, list[Node]] = {}
    values = numbered(module)
    for node in module.graph.nodes:
        if getattr(node.target, "name", str)() == _MM and node.meta["val"].device.type in devices \
                and _is_known_first(node.args[1]):
            groups.setdefault(values[node.args[0]], []).append(node)
    for products in groups.values():
        if len(products) > 1:
            _put(module.graph, products)
    module.recompile()


def _is_known_first(weight: Node) -> bool:
    """Whether a weight is an input of the graph, or a view of one."""
    if weight.op == "call_function" and weight.target in _VIEWS:
        weight = weight.args[0]
    return weight.op == "placeholder"


def _put(graph: torch.fx.Graph, products: list[Node]) -> None:
    first = products[0]
    for weight in dict.fromkeys(node.args[1] for node in products):
        if first < weight:
            first.prepend(weight)
    with graph.inserting_before(first):
        found = graph.call_function(_SEVERAL, (first.args[0], [node.args[1] for node in products]))
        found.meta["val"] = [node.meta["val"] for node in products]
        given = [node.meta["eager_input_vals"][0] for node in products if "eager_input_vals" in node.meta]
        if len(given) == len(products):  # the strides that Inductor keeps
            found.meta["eager_input_vals"] = (given[0][0], [weight for _, weight in given]), {}
        results = [graph.call_function(operator.getitem, (found, place)) for place in range(len(products))]
    for node, one in zip(products, results, strict=True):
        one.meta = notes_without_inputs(node)
        node.replace_all_uses_with(one)
        graph.erase_node(node)
