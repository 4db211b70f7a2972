"""Watching one forward: every ATen call with the module that made it, and where its inputs came from."""
from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .state import put_back, tensors_in

OUTPUT = "output"  # a result of the model as if an op of this name gave it
# what they return is memory, not a value; and so are results of attention that only dropout fills
_STATE = frozenset(("philox_seed", "philox_offset", "rng_state", "unused", "debug_attn_mask"))
_MEMORY = frozenset(("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_"))

Key = tuple[str, str, int]  # the module, the op, and which of that module's calls of it


@dataclass(frozen=True)
class Seen:
    """One ATen call: its key, its results, and the calls that its inputs came from."""

    key: Key
    results: tuple[torch.Tensor, ...]
    fed_by: tuple[Key, ...]


class Watch(TorchDispatchMode):
    """Hands each call of a forward to `tell`, in order, until the forward ends."""

    def __init__(self, tell: Callable[[Seen], None]):
        super().__init__()
        self.tell, self.modules, self.counted = tell, [""], Counter()
        self.made_by: dict[int, Key] = {}  # storage -> the last call that wrote it

    def __torch_dispatch__(self, op, types, arguments=(), named=None):
        found = op(*arguments, **(named or {}))
        name, results = op._schema.name.removeprefix("aten::"), _tensors(found)
        if _is_view(op) or not results:
            return found
        if name == "clone":  # how a tensor lies decides whether PyTorch makes one
            maker = self.made_by.get(_storage(arguments[0]))
            self.made_by.pop(_storage(found), None)  # of a tensor that lay there before
            self.made_by.update({} if maker is None else {_storage(found): maker})
            return found
        given = dict.fromkeys(self.made_by[storage] for t in _tensors((arguments, named or {}))
                              if (storage := _storage(t)) in self.made_by)
        place = self.modules[-1]
        self.counted[place, name] += 1
        key = (place, name, self.counted[place, name])
        self.made_by.update(dict.fromkeys(map(_storage, results), key))
        if name not in _MEMORY:
            self.tell(Seen(key, tuple(_values(op, found)), tuple(given)))
        return found

    def outputs(self, module: str, found) -> None:
        """The model's results, each fed by the call that made it. Whole numbers count where there are no others."""
        tensors = _strided(tensors_in(found))
        rounded = [t for t in tensors if t.is_floating_point() or t.is_complex()]
        for number, tensor in enumerate(rounded or tensors, 1):
            maker = self.made_by.get(_storage(tensor))
            self.tell(Seen((module, OUTPUT, number), (tensor,), () if maker is None else (maker,)))


def _values(op, found) -> list[torch.Tensor]:
    """The results of a call that hold numbers of its own making."""
    names = [given.name for given in op._schema.returns]
    if not isinstance(found, tuple) or len(found) != len(names):
        return _tensors(found)
    return _tensors([each for name, each in zip(names, found, strict=True) if name not in _STATE])


def _tensors(value) -> list[torch.Tensor]:
    return _strided(tree_leaves(value))


def _strided(leaves: list) -> list[torch.Tensor]:
    return [t for t in leaves if isinstance(t, torch.Tensor) and t.layout == torch.strided and not t.is_meta]


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _is_view(op) -> bool:
    """Results that are the inputs seen in another way; what writes into an input is none."""
    if op._schema.name == "aten::_unsafe_view":
        return True
    given = [r.alias_info for r in op._schema.returns]
    return bool(given) and all(a is not None and not a.is_write for a in given)


@contextmanager
def placed(model: torch.nn.Module, watch: Watch) -> Iterator[None]:
    """Hooks on every module, so that `watch` knows where a call is made; gone afterwards, whatever happens."""
    handles = []
    try:
        for name, module in model.named_modules():
            def enter(module, arguments, *, name=name):
                watch.modules.append(name or type(module).__name__)

            def leave(module, arguments, result):
                watch.modules.pop()
            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(leave, always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def run(model: torch.nn.Module, arguments: tuple, named: dict, tell: Callable[[Seen], None]) -> None:
    """One forward without gradients, of a model that is put back behind it, calls first and then results.

    What the model raises comes out of here, with its hooks and modes gone.
    """
    watch = Watch(tell)
    with torch.no_grad(), put_back(model):
        with placed(model, watch), watch:
            found = model(*arguments, **named)
        watch.outputs(type(model).__name__, found)
