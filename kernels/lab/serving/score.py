"""A score on held-out text, in bits a byte: windows of text in batches of some size, decoded a byte a step."""
from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from ...model.llama import Llama
from ...model.sampling import log_probs
from .measure import held_out

WINDOWS, LENGTH = 8, 12


@torch.no_grad()
def score(model: Llama, size: int, windows: int = WINDOWS, length: int = LENGTH) -> float:
    """Bits that the model needs for a byte behind the first of each window, with `size` windows a step.

    The windows are spread over the held-out text, and their bytes' float32 log-probabilities are summed exactly, so
    that nothing but the model can move with the size. Raises ValueError for a size, windows or a length that cannot be.
    """
    text = held_out()
    for name, value, least, most in (("size", size, 1, windows), ("length", length, 2, model.config.context),
                                     ("windows", windows, 1, len(text) // max(length, 1))):
        if type(value) is not int or not least <= value <= most:
            raise ValueError(f"{name} must be a whole number from {least} to {most}, got {value!r}")
    begins = [i * (len(text) // windows) for i in range(windows)]
    pieces = torch.tensor([list(text[begin : begin + length]) for begin in begins], dtype=torch.int64,
                          device=model.device)
    found: list[float] = []
    for some in pieces.split(size):
        cache = model.cache(len(some), length)
        steps = [model(some[:, i : i + 1], cache, prefix=i) for i in range(length - 1)]
        found += log_probs(torch.cat(steps), some[:, 1:].t().flatten()).tolist()
    return -math.fsum(found) / math.log(2) / len(found)


def scores(model: Llama, sizes: Iterable[int], windows: int = WINDOWS, length: int = LENGTH) -> dict[int, float]:
    """`score` in batches of each of these sizes."""
    return {size: score(model, size, windows, length) for size in sizes}
