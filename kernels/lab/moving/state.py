"""What a forward may write into: its arguments, of which each run has its own, and the model, which is put back."""
from __future__ import annotations

import copy
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.utils._pytree import tree_map

from ...bits import same_bits

_SHARED = type, types.ModuleType, torch.nn.Module, Callable  # there is one of each, whatever runs
_OWN = frozenset(vars(torch.nn.Module())) - {"_buffers"}  # every module's: hooks, parameters, modules


def changed(value, change: Callable, done: dict | None = None):
    """A copy of `value` with `change` done to its tensors: in containers, and in whatever has attributes."""
    done = {} if done is None else done
    return tree_map(lambda leaf: _leaf(leaf, change, done), value)


def _leaf(leaf, change: Callable, done: dict):
    if id(leaf) in done:
        return done[id(leaf)][0]
    new = change(leaf) if isinstance(leaf, torch.Tensor) else _copy(leaf)
    done[id(leaf)] = new, leaf  # which keeps the id its own
    if new is not leaf and not isinstance(leaf, torch.Tensor):
        vars(new).update(changed(dict(vars(leaf)), change, done))
    return new


def _copy(thing):
    if not hasattr(thing, "__dict__") or isinstance(thing, _SHARED):
        return thing
    try:
        return copy.copy(thing)
    except TypeError:  # a lock, a file: there is one
        return thing


def tensors_in(value) -> list[torch.Tensor]:
    """Every tensor of `value`, once, in order."""
    found: list[torch.Tensor] = []

    def note(tensor):
        found.append(tensor)
        return tensor
    changed(value, note)
    return found


@contextmanager
def put_back(model: torch.nn.Module) -> Iterator[None]:
    """What a forward leaves in a model is undone: attributes, buffers, lists and dicts, and the numbers of tensors.

    Parameters are not copied, for they are large, and objects of other classes are not looked into.
    """
    held: dict[int, tuple] = {}
    for module in model.modules():
        if not (hasattr(module, "has_uninitialized_params") and module.has_uninitialized_params()):
            attributes = vars(module)
            held[id(attributes)] = attributes, dict(attributes)
            for name, value in attributes.items():
                if name not in _OWN:
                    _hold(value, held)
    try:
        yield
    finally:
        with torch.no_grad():
            for now, before in held.values():
                _restore(now, before)


def _hold(value, held: dict[int, tuple]) -> None:
    if id(value) in held:
        return
    if isinstance(value, torch.Tensor):
        plain = type(value) is torch.Tensor and value.layout == torch.strided
        if plain and not value.is_meta and not value.is_quantized:
            held[id(value)] = value, value.detach().clone()
    elif isinstance(value, (dict, list, tuple)):
        held[id(value)] = value, copy.copy(value)
        for inner in value.values() if isinstance(value, dict) else value:
            _hold(inner, held)


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.itemsize == 1:  # PyTorch cannot ask all of them for NaN
        a, b = a.view(torch.uint8), b.view(torch.uint8)
    return same_bits(a, b)


def _restore(now, before) -> None:
    if isinstance(now, torch.Tensor):
        if not _same(now.detach(), before):
            now.detach().copy_(before)
    elif isinstance(now, list):
        if list(map(id, now)) != list(map(id, before)):
            now[:] = before
    elif isinstance(now, dict):
        for name in [name for name in now if name not in before]:
            del now[name]
        now.update({name: value for name, value in before.items() if now.get(name, now) is not value})
