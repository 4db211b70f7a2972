"""How a model is trained: sizes, seeds, rates, and each step's numbers, which the host works out before the first."""
from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Recipe:
    """Steps of `batch` windows of `length` tokens, and AdamW with decoupled decay.

    By default the byte model reads its text about seven times: from ten times on, held-out text is predicted worse.

    seed    of the first weights and of the windows drawn
    rate    the highest learning rate, reached after `warmup` steps; it ends at `last` times that
    decay   of matrices a step, times the rate; vectors do not decay
    clip    the largest norm of a step's whole gradient
    scored  windows of held-out text whose loss is taken

    Raises ValueError that names the field for what no training can have.
    """

    steps: int = 2000
    batch: int = 32
    length: int = 1024
    seed: int = 0
    rate: float = 2e-3
    warmup: int = 100
    last: float = 0.05
    decay: float = 0.3
    clip: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    scored: int = 64

    def __post_init__(self):
        for field, least in (("steps", 1), ("batch", 1), ("length", 2), ("seed", 0), ("warmup", 0), ("scored", 1)):
            value = getattr(self, field)
            if type(value) is not int or value < least:
                raise ValueError(f"{field} must be a whole number of at least {least}, got {value!r}")
        for field in ("rate", "clip", "eps"):
            if not 0 < getattr(self, field) < math.inf:
                raise ValueError(f"{field} must be a positive number, got {getattr(self, field)!r}")
        for field in ("last", "decay", "beta1", "beta2"):
            if not 0 <= getattr(self, field) < 1:
                raise ValueError(f"{field} must be a number from 0 to below 1, got {getattr(self, field)!r}")

    def rate_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0: it rises in a line, then falls as 1 - 3 x**2 + 2 x**3.

        The cubic is near half a cosine, and unlike one has the same bits on every machine.
        """
        if step < self.warmup:
            return self.rate * ((step + 1) / self.warmup)
        x = (step - self.warmup) / max(self.steps - self.warmup, 1)
        return self.rate * (self.last + (1.0 - self.last) * (1.0 - x * x * (3.0 - 2.0 * x)))

    def numbers(self, device: torch.device) -> torch.Tensor:
        """(steps, 3) float32: a step's rate over 1 - beta1**t, 1 / sqrt(1 - beta2**t), and what is left after decay.

        t counts from 1; the powers are products in sequence, in float64, for the same reason as above.
        """
        rows, first, second = [], 1.0, 1.0
        for step in range(self.steps):
            first, second, rate = first * self.beta1, second * self.beta2, self.rate_at(step)
            rows.append((rate / (1.0 - first), 1.0 / math.sqrt(1.0 - second), 1.0 - rate * self.decay))
        return torch.tensor(rows, dtype=torch.float64, device="cpu").float().to(device)
