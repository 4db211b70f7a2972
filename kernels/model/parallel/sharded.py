"""A decoder of which each rank holds a piece. Its calls are Llama's; every rank makes the same ones.

Products by rows keep the order of the whole weight, so a row has the same bits wherever it is. Products along k stop
at one float32 part a rank, and `all_reduce` adds the parts in the order's tree, rounded once: so what goes into the
residual stream is the same on every rank, and for every number of ranks. Norms, rotations and attention see one
token's or one head's numbers, and run alike everywhere. Logits are gathered whole before anything is chosen of them,
for a sum over a shard of the vocabulary would be another order.

`default` is what PyTorch does today: each rank's product in the library's order, rounded, then the library's
all_reduce, whose result follows the number of ranks.
"""
from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch

from ...ops.all_reduce import all_reduce
from ...ops.all_reduce import ranks as words
from ...ops.all_reduce.part import part
from ...ops.matmul.order import order, shared_order
from ...ops.matmul.shared import shared_part
from .. import folder as folders
from ..config import Config, preset
from ..llama import Llama
from ..ops import Ops
from ..weights import Weights, random_weights
from . import cut
from .join import Ranks

Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Sharded(Llama):
    """One rank's piece of a decoder.

    config   a Config or the name of a preset: of the whole model. With invariant ops its `shared` must be 8
    ranks    this process among the others (`join`)
    ops      'default' or 'invariant'; `using` gives the other over the same weights
    dtype    default: bfloat16
    weights  (name, shape) -> whole tensor; default: random_weights(seed, dtype, device), one tensor at a time

    `config` of the model is this rank's, with its own heads: what a cache is made from. `whole` is the model's.
    Raises as Llama does, and ValueError on every rank for sizes that ranks cannot share out or weights, ops or dtypes
    that differ between them.
    """

    def __init__(self, config: Config | str, ranks: Ranks, *, ops: str = "invariant", dtype: torch.dtype | None = None,
                 seed: int = 0, weights: Weights | None = None):
        self.whole = config = preset(config) if isinstance(config, str) else config
        self.ranks = ranks
        cut.check(config, ranks.size, ops)
        dtype = dtype or torch.bfloat16
        pieces = cut.Cut(config, weights or random_weights(seed, dtype, ranks.device), ranks, dtype)
        super().__init__(cut.local(config, ranks.size), ops=ops, dtype=dtype, device=ranks.device, weights=pieces)
        if config.tied_embeddings:
            self.head = cut.piece(config, "head", self.embedding, ranks.size, ranks.rank)
        pieces.agree(ops)
        self._places = self._named()
        self.ops = self._joined(self.ops)

    def using(self, ops: str) -> Sharded:
        """The same weights, not copied, under other ops."""
        cut.check(self.whole, self.ranks.size, ops)
        other = super().using(ops)
        other.ops = other._joined(other.ops)
        return other

    def _named(self) -> dict[int, str]:
        """Which weight a product is given: the tensor itself tells."""
        layers = {id(getattr(layer, name)): name for layer in self.layers
                  for name in ("qkv", "output", "gate_up", "down")}
        return layers | {id(self.head): "head"}

    def _joined(self, ops: Ops) -> Ops:
        """The same ops, whose products reach over all ranks."""
        shapes = self.whole.layer_shapes | {"head": (self.whole.vocab_size, self.whole.hidden_size)}
        along = _default_sum if self.ops_name == "default" or self.ranks.size == 1 else _ordered_sum
        ways: dict[str, Product] = {}
        for name in ("qkv", "gate_up", "head", *cut.ALONG_K):
            if name in cut.ALONG_K:
                ways[name] = along(ops, *shapes[name], self.whole.shared, self.ranks)
            else:
                ways[name] = _by_rows(ops, *shapes[name], self.ranks, gather=name == "head")
        places = self._places
        return dataclasses.replace(ops, linear=lambda x, weight, _: ways[places[id(weight)]](x, weight))

    def __repr__(self):
        return f"{super().__repr__()[:-1]}, {self.ranks}>"


def load(folder: str | Path, ranks: Ranks, *, ops: str = "invariant", shared: int = 8) -> Sharded:
    """A rank's piece of the model in a folder, its products in the order that `shared` ranks can carry out.

    Each rank reads the whole model into the host's memory first. Raises as `folder.load` and Sharded do.
    """
    stored = folders.load(folder, device="cpu")
    weights = stored.weights()
    return Sharded(dataclasses.replace(stored.config, shared=shared), ranks, ops=ops, dtype=stored.dtype,
                   weights=lambda name, _: weights[name])


def _by_rows(ops: Ops, n: int, k: int, ranks: Ranks, gather: bool) -> Product:
    """x @ weight.T of this rank's rows, in the order of all n; gathered, the columns of all ranks in their order."""
    whole = order(n, k)

    def product(x, weight):
        y = ops.linear(x, weight, whole)
        return torch.cat(words.gathered(y, ranks.group), -1) if gather and ranks.size > 1 else y
    return product


def _ordered_sum(ops: Ops, n: int, k: int, shared: int, ranks: Ranks) -> Product:
    """A part a rank, added in the tree."""
    tree, group = shared_order(n, k, shared), ranks.group

    def on_gpu(x, weight):
        room = all_reduce.room((len(x), n), x.device, group)
        return all_reduce.triton(part(x, weight, tree, ranks.size, out=room), None, x.dtype, group)

    def specified(x, weight):
        return all_reduce.python(shared_part(x, weight, tree, ranks.size), None, x.dtype, group)
    return on_gpu if ranks.device.type == "cuda" else specified


def _default_sum(ops: Ops, n: int, k: int, shared: int, ranks: Ranks) -> Product:
    """The library's product, and over several ranks the library's sum, in place. On one rank: the op's own product."""
    whole = None if shared == 1 else shared_order(n, k, shared)
    return lambda x, weight: words.summed(ops.linear(x, weight, whole), ranks.group)
