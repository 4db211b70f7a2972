"""The weights of a model that is trained, in one row of memory, and the AdamW that moves them.

The numbers kept are float32; a bfloat16 copy, rounded from them after every step, is what the model reads. With a
step's gradients g of all weights in one row, and its three numbers a, b and keep (recipe.py), all in float32:

    norm = sqrt(the sum of g * g), as ops/mean/order.py adds;  g = g * min(clip / norm, 1)
    m = m * beta1 + g * (1 - beta1)
    v = v * beta2 + (g * g) * (1 - beta2)
    w = w * keep                              matrices alone
    w = w - (m / (sqrt(v) * b + eps)) * a

each operation of its own, one rounding each; roots are taken in float64 and rounded, because a CPU's float32 root is
not always correctly rounded. So a CPU's weights are a GPU's, bit for bit.

Method: Loshchilov and Hutter, Decoupled Weight Decay Regularization, arXiv 1711.05101.
"""
from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from .. import bits
from ..model.config import Config
from ..model.weights import random_weights
from ..ops import mean
from .backward import DTYPE
from .recipe import Recipe

# powers of two that the usual sizes of these matrices are multiplied by at first: small branches, small first logits
_SMALLER = {"output": 0.5, "down": 0.5, "head": 0.25}


class Parameters:
    """All weights of a Config on one device, matrices before vectors.

    weights  name -> bfloat16 tensor that requires a gradient, a view of `half`
    """

    def __init__(self, config: Config, recipe: Recipe, device: torch.device):
        self.shapes = dict(sorted(config.shapes.items(), key=lambda item: len(item[1]) == 1))
        self.master = torch.cat([_first(name, shape, recipe.seed, device).flatten()
                                 for name, shape in self.shapes.items()])
        self.matrices = sum(math.prod(shape) for shape in self.shapes.values() if len(shape) > 1)
        self.m, self.v = torch.zeros_like(self.master), torch.zeros_like(self.master)
        self.half = self.master.to(DTYPE)
        pieces = self.half.split([math.prod(shape) for shape in self.shapes.values()])
        self.weights = {name: piece.view(shape).detach().requires_grad_()
                        for (name, shape), piece in zip(self.shapes.items(), pieces, strict=True)}
        self._constants = torch.tensor([recipe.beta1, 1.0 - recipe.beta1, recipe.beta2, 1.0 - recipe.beta2, recipe.eps,
                                        recipe.clip], dtype=torch.float64, device="cpu").float().to(device)

    @torch.no_grad()
    def update(self, gradients: Sequence[torch.Tensor], numbers: torch.Tensor, how: str) -> None:
        """One step of AdamW: gradients in the order of `weights`, numbers (3,) of `Recipe.numbers`."""
        (a, b, keep), (beta1, rest1, beta2, rest2, eps, clip) = numbers, self._constants
        g = torch.cat([gradient.flatten().float() for gradient in gradients])
        norm = _root(mean.sum.implementation(how)(g * g))
        g = g * (clip / norm).clamp(max=1.0)  # of a gradient of zeros: infinity, so 1
        self.m.mul_(beta1).add_(g * rest1)
        self.v.mul_(beta2).add_((g * g) * rest2)
        self.master[: self.matrices].mul_(keep)
        self.master.sub_((self.m / (_root(self.v).mul_(b).add_(eps))).mul_(a))
        self.half.copy_(self.master)

    def digest(self) -> str:
        """SHA-256 of the bfloat16 weights by name: of what a model folder holds."""
        return bits.digest({name: weight.detach() for name, weight in self.weights.items()})


def _first(name: str, shape: tuple[int, ...], seed: int, device: torch.device) -> torch.Tensor:
    """A weight before the first step, with the same bits on every machine; a vector is all ones."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.float32, device=device)
    return random_weights(seed, torch.float32, device)(name, shape) * _SMALLER.get(name.rpartition(".")[2], 1.0)


def _root(x: torch.Tensor) -> torch.Tensor:
    return x.double().sqrt().float()
