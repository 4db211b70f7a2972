"""What random products are compared in products.py: kinds of weights, forms, inputs and numbers of tokens."""
from __future__ import annotations

from dataclasses import replace
from functools import cache
from random import Random
from typing import NamedTuple

import torch

from ... import bits
from ...op import DTYPES, Shape
from ...ops.matmul.choice import tested
from ...ops.matmul.op import matmul as op
from ...ops.matmul.order import order
from ...ops.matmul.product import Product
from ...ops.matmul.schedule import Schedule, Unsuitable
from ...ops.matmul.steps import steps
from ...ops.matmul.ways import variants
from ..tuning import cost_design
from .certificates import TRUSTED, rows_of

KINDS, EMPTY = 24, 0.02  # kinds of weights; how often there are no rows, or rows of no numbers
INPUTS = ("portable", "cancellation", "wide", "subnormal", "signed_zero", "residue")
LEFT = (0, 1, 2, 4, 8, 15, 16, 17, 40, 63, 64, 65, 100, 127, 128, 129, 255, 257)  # by N and K, of a span


class Scale(NamedTuple):
    """How large products are: sizes reach `times` spans, tokens `tokens`, or what a schedule needs to carry chains."""

    span: int
    times: int
    tokens: int
    streamed: int
    lockstep: int

    def most(self, schedule: Schedule) -> int:
        """Tokens for this schedule."""
        return self.lockstep if schedule.lockstep else self.streamed if schedule.stream else self.tokens


ON_GPU, ON_CPU = Scale(512, 5, 300, 1283, 3400), Scale(16, 1, 20, 20, 20)


class Kind(NamedTuple):
    """Weights that share kernels: every (N, K) of `sizes`."""

    dtype: str
    bias: bool
    sizes: tuple[tuple[int, int], ...]

    @property
    def cut(self) -> bool:
        """Whether k has several segments."""
        return order(*self.sizes[-1]).segments > 1


class Form(NamedTuple):
    """What is compiled: a schedule for a kind of weights; its number decides nothing."""

    number: int
    kind: Kind
    schedule: Schedule


# what is drawn


def kind_of(draw: Random, scale: Scale) -> Kind:
    """A random kind. One in six has a single N or K: 1."""
    while True:
        cut, one = draw.random() < 0.5, draw.choice([*range(4), "n", "k"])
        fewest = draw.choice([0, 4 * scale.span])  # rows: tiles enough that chains are carried over
        n, k = (draw.choice(LEFT) % scale.span for _ in range(2))
        ns = [1] if one == "n" else [n + scale.span * i for i in range(scale.times + 1)]
        ks = [1] if one == "k" else [k + 512 * cut + scale.span * i for i in range(scale.times + 1)]
        sizes = [(n, k) for n in ns for k in ks if (one == "n" or n > 1) and (one == "k" or k > 1)
                 and (order(n, k).segments > 1) == cut and n >= fewest]
        if sizes:
            return Kind(draw.choice(["bfloat16", "float16"]), draw.random() < 0.5, tuple(sizes))


def schedules(kind: Kind, scale: Scale, tma: bool) -> list[Schedule]:
    """Every schedule that can carry out all products of a kind, on copies where rows cannot be followed.

    `tma`: the GPU has bulk copies.
    """
    found = [*(way for tile in cost_design.rough_tiles(DTYPES[kind.dtype]) for way in variants(tile)),
             *tested(*kind.sizes[-1], DTYPES[kind.dtype])]
    copied = kind.sizes[-1][1] % 8 != 0
    every = dict.fromkeys(replace(s, copy=copied and s.kind != "pointer") for s in found if tma or s.kind == "pointer")
    some = kind.sizes[::max(len(kind.sizes) // 3, 1)] + kind.sizes[-1:]
    return [s for s in every if least(s, kind) <= scale.most(s)
            and all(suits(s, kind, n, k, tokens) for n, k in (kind.sizes if s.lockstep else some)
                    for tokens in {least(s, kind) or scale.most(s), scale.most(s)})]


def least(schedule: Schedule, kind: Kind) -> int:
    """The fewest tokens that a schedule can do of a kind: in lockstep, every program must have a chain."""
    return rows_of(schedule, min(n for n, _ in kind.sizes)) if schedule.lockstep else 0


def suits(s: Schedule, kind: Kind, n: int, k: int, tokens: int) -> bool:
    """Whether a schedule carries out a product just as it is written."""
    p = Product(tokens, n, k, DTYPES[kind.dtype], (k, 1), (k, 1), order(n, k), kind.bias)
    try:
        return p.carried_out(s) == s and bool(steps(s, p))
    except Unsuitable:
        return False


def forms(seed: int, most: int, scale: Scale, tma: bool) -> list[Form]:
    """At most so many forms, of KINDS kinds or fewer."""
    draw, found, kinds = Random(seed), [], {}
    while len(kinds) < min(KINDS, most):
        kinds[kind_of(draw, scale)] = None
    for i, kind in enumerate(kinds):
        every = schedules(kind, scale, tma)
        chosen = draw.sample(every, min(len(every), (most - len(found)) // (len(kinds) - i)))
        found += [Form(len(found) + j, kind, s) for j, s in enumerate(chosen)]
    return found


def tokens_of(draw: Random, form: Form, scale: Scale) -> int:
    """None, one, a tile's edge, or any number; as many as the schedule needs."""
    few, most, m = least(form.schedule, form.kind), scale.most(form.schedule), form.schedule.block_m
    last = most // m * m
    edges = [t for t in (0, 1, m - 1, m, m + 1, 2 * m - 1, 2 * m + 1, last, last + 1, few, most) if few <= t <= most]
    return draw.choice([draw.choice(edges), draw.randint(few, most)])


class Case(NamedTuple):
    """Arguments for as many tokens as any schedule gets, and the trusted schedule's result."""

    what: str
    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    trusted: torch.Tensor


@cache
def _numbers(name: str, count: int, dtype: torch.dtype, device) -> torch.Tensor:
    """Numbers to take inputs from, in rows of any length: of x, or with the name `weight` of weights."""
    x, weight, _ = op.inputs(count // 4096, Shape(N=count // 4096, K=4096), dtype, device, 11)
    found = {"portable": x, "residue": x, "weight": weight}.get(name)
    return (bits.adversarial(name, count // 4096, 4096, dtype, device, 7) if found is None else found).flatten()


def case_of(draw: Random, kind: Kind, rows: int, scale: Scale, device) -> Case:
    """A weight of this kind, an input, and what the trusted schedule makes of them."""
    n, k = draw.choice(kind.sizes)
    n, k = draw.choice([(0, k), (n, 0)]) if draw.random() < EMPTY else (n, k)  # of which nothing is launched
    name, dtype = draw.choice(INPUTS if kind.bias else INPUTS[:-1]), DTYPES[kind.dtype]
    widest = scale.times * scale.span + 1024
    count = -(-max(rows + 4, widest) * widest // 4096) * 4096

    def taken(name, *shape):
        numbers, size = _numbers(name, count, dtype, device), shape[0] * shape[1]
        begin = draw.randrange(0, len(numbers) - size + 1, 8)  # at multiples of 16 bytes
        return numbers[begin:begin + size].view(shape)

    weight, x = taken("weight", n, k), taken(name, rows, k)
    bias = taken("portable", 1, n)[0] if kind.bias else None
    if name == "residue":  # the rounded product taken away again: the last bits of the sum are left (certificates.py)
        x = x[:1].repeat(rows, 1)
        bias = -op.run_schedule(TRUSTED, x[:1], weight, None)[0]
    return Case(f"N={n},K={k},bias={kind.bias},{kind.dtype} {name}", x, weight, bias,
                op.run_schedule(TRUSTED, x, weight, bias))
