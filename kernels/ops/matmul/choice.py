"""Which schedule a product takes: the one that was timed for its weight, else the one that a model of time expects to
be fastest, else one of a general rule. A schedule decides speed, never a bit.
"""
from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch

from ...op import Shape
from . import cost
from .order import order
from .schedule import Schedule, gpu, measured, rule
from .ways import Form

EXPECTED = 3  # schedules of the model's that are offered: one that does not run gives way to the next


def choose(op: str, shape, dtype: torch.dtype, tokens: int, index: int = -1) -> Iterator[Schedule]:
    """Schedules for `tokens` rows on GPU `index` (-1: none), best first. Every one gives the same bits.

    The table's, if it holds this very weight; then the best by the model of time (cost.py) or, where no such model is
    stored for this GPU, the table's nearest weight within a doubling; then the rule, from fast to modest. A caller
    takes the first that runs.
    """
    n, k = Shape.parse(shape)["N"], Shape.parse(shape)["K"]
    expected = cost.best(_form(n, k, tokens, dtype, index), EXPECTED, index)
    known = (*measured(op, n, k, dtype, tokens, index, near=0), *expected) if expected else measured(
        op, n, k, dtype, tokens, index)
    return iter(dict.fromkeys((*known, *rule(n, k, dtype, tokens, index))))


def _form(n: int, k: int, tokens: int, dtype: torch.dtype, index: int) -> Form:
    """The form of contiguous x and weight; where bulk copies cannot read their rows, they may read copies."""
    form = Form.of(n, k, tokens, dtype, gpu(index)[1])
    return form if form.bulk else form.on_copies()


def tested(n: int, k: int, dtype: torch.dtype, gpus: Iterable[int] = (-1,)) -> list[Schedule]:
    """Schedules of every kind that can carry out the order of (n, k), those that are chosen on `gpus` among them."""
    chosen = [s for tokens in (1 << i for i in range(18)) for index in gpus
              for s in choose("matmul", Shape(N=n, K=k), dtype, tokens, index)]
    if dtype == torch.float32:
        tiles = [Schedule("pointer", *tile, warps=4, stages=2) for tile in ((16, 16, 16), (32, 64, 32), (64, 16, 32))]
    else:
        tiles = [Schedule("pointer", m, n, k, warps=w, stages=s) for m, n, k, w, s in (
            (16, 16, 16, 1, 2), (16, 128, 64, 4, 3), (64, 32, 128, 4, 2), (128, 128, 64, 8, 3), (128, 64, 32, 4, 4))]
        tiles += [Schedule("hopper", m, n, k, warps=w, stages=s, swap=swap, persistent=True, stream=stream)
                  for m, n, k, w, s, swap, stream in (
                      (128, 256, 64, 8, 3, False, False), (256, 128, 64, 8, 3, True, False),
                      (16, 64, 64, 4, 8, True, True), (32, 128, 64, 8, 6, True, True), (64, 16, 64, 4, 8, False, True),
                      (64, 160, 64, 4, 6, False, False), (64, 80, 64, 4, 8, False, True))]
        tiles.append(Schedule("hopper", 128, 256, 64, warps=8, stages=3, persistent=True, store=True))
    every = list(dict.fromkeys(chosen + tiles + [replace(s, swap=not s.swap) for s in tiles if s.kind == "pointer"]))
    segments, length = order(n, k)
    if segments > 1:
        every += [replace(s, split=not s.split, reduce=False) for s in every
                  if not (s.persistent or s.store or s.kind == "hopper")]
        every += [replace(s, split=True, reduce=True) for s in every if s.kind == "hopper" or not s.persistent]
        every = [s for s in every if not length % s.block_k and (s.split or length >= 2 * s.block_k and not s.stream)]
    return list(dict.fromkeys(every))
