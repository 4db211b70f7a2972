"""What a sweep is to measure, as the command, the widget and the estimate of its cost all take it."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ... import runtime
from ...op import DTYPES, Op, Shape
from .. import bench

TOKENS = (1, 8, 32, 128, 256, 512, 1024, 2048, 4096, 16384)


@dataclass
class Sweep:
    """What to measure. `passes` repeats all points, so that slow drift shows in the percentiles.

    `again` measures points that are recorded already.
    """

    op: Op
    tokens: Sequence[int] = TOKENS
    implementations: Sequence[str] = ("cuda", "python", "triton")
    dtypes: Sequence[str] = ("bfloat16",)
    shapes: Sequence[str] = ()
    clocks: Sequence[str] = ()
    passes: int = 3
    repeats: int = 7
    again: bool = False
    device: torch.device = field(default_factory=runtime.device)

    def __post_init__(self):
        self.shapes = tuple(str(Shape.parse(s)) for s in self.shapes or self.op.shapes)
        self.clocks = tuple(self.clocks) or bench.clocks(self.device)
        self.tokens = tuple(sorted(set(self.tokens)))
        for name in self.implementations:
            self.op.implementation(name)
        unknown = [d for d in self.dtypes if d not in DTYPES]
        if unknown:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {unknown[0]!r}")
        for clock in self.clocks:
            if clock not in bench.known(self.device):
                raise ValueError(f"clock must be one of {', '.join(bench.known(self.device))} here, got {clock!r}")
        if not self.tokens or self.tokens[0] < 1:
            raise ValueError(f"tokens must be whole numbers of at least 1, got {self.tokens}")
        for name in ("passes", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def points(self) -> list[tuple[str, str, int]]:
        return [(d, s, t) for d in self.dtypes for s in self.shapes for t in self.tokens]
