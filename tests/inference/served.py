"""Small models, engines and what a prompt gets alone."""
import dataclasses

import torch
import torch.nn.functional as F

from kernels.inference import Engine, digest_of
from kernels.lab.load import small_model
from kernels.model import steps

TILED = small_model()
EXACT = small_model("invariant")
CONTEXT = TILED.config.context


def prompt(number: int, length: int) -> list[int]:
    """Tokens below 200, another row for each number."""
    return [(37 * i + 101 * number + i * i % 11) % 200 for i in range(length)]


def engine(model=TILED, **changes) -> Engine:
    return Engine(model, **{"pages": 40, "page_size": 4, "max_batch": 4, "budget": 16, "chunk": 5, "digests": True,
                            **changes})


def forward_of(model, tokens: list[int], answer: list[int]) -> str:
    """The digest of the logits behind which these tokens were chosen, from one forward over prompt and answer."""
    return digest_of(steps.logits(model, tokens + answer)[len(tokens) - 1 : -1])


def follows_the_batch(model):
    """The model with a product whose last bits depend on how many rows it has."""
    other = model.using("tiled")
    other.ops = dataclasses.replace(other.ops, linear=lambda x, weight, order:
                                    F.linear(x, weight) * (1 + len(x) * torch.tensor(2.0**-12)))
    return other
