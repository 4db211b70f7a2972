"""Nodes of graphs in compiled code: which are made alike, and what is noted of them."""
from __future__ import annotations

import operator

import torch
from torch.utils._pytree import tree_flatten


def numbered(module: torch.fx.GraphModule) -> dict[torch.fx.Node, int]:
    """Each node -> a number, the same for nodes that are made alike."""
    values: dict[tuple, int] = {}  # operations on equal values -> their number
    of: dict[torch.fx.Node, int] = {}
    for node in module.graph.nodes:
        leaves, form = tree_flatten((node.args, node.kwargs))
        known = node.op == "call_function" and not varies(node.target)
        made = tuple(f"value {of[leaf]}" if isinstance(leaf, torch.fx.Node) else repr(leaf) for leaf in leaves)
        of[node] = values.setdefault((node.target, str(form), made) if known else (node,), len(values))
    return of


def varies(target) -> bool:
    """Whether two alike calls may differ: random draws, and ops that write."""
    if target is operator.getitem:
        return False
    return not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable or \
        torch.Tag.nondeterministic_seeded in target.tags


def notes_without_inputs(node: torch.fx.Node) -> dict:
    """What PyTorch noted of a node, for another that takes its place with other arguments."""
    return {key: kept for key, kept in node.meta.items() if key != "eager_input_vals"}
