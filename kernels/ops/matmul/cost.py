"""A model of time: how long a schedule of the matrix product takes, and which is fastest for any sizes.

It decides speed, never a bit: all its schedules carry out the order of N and K.

Programs walk tiles, so many at a time; such a wave takes as long as the slowest of four: one tile's chain from its
first load to its store, the work of all tiles that share a multiprocessor, the bytes that come from memory, those that
come from L2. What a step of k takes was measured for each tile, and is data (data/schedules/<gpu>_cost.json):
lab/tuning/cost_times.py measures, cost_fit.py fits.
"""
from __future__ import annotations

import json
import warnings
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ... import tables
from .schedule import Schedule
from .ways import Form, Sizes, columns, lanes, suits, units, variants

SHARPNESS = 3  # of "as long as the slowest": of two that take equally long, it makes 1.26 times one
STAYS = 32e6  # bytes of a weight that L2 keeps for whoever comes later


def best(form: Form, count: int = 1, index: int = -1) -> list[Schedule]:
    """The `count` schedules that the model expects to be fastest on GPU `index`, fastest first.

    Each carries out the form's order, and has bulk copies only if `form.bulk`: on copies, if the form counts their
    bytes. Empty where neither this GPU nor a near relative was measured, or where there is nothing to multiply. Takes a
    third of a millisecond.
    """
    known = quantities(index)
    ways = known and known.ways.get("float32" if form.size == 4 else "bfloat16")
    if not ways or not (form.n and form.k and form.tokens):
        return []
    times = np.where(suits(ways.sizes, form), predicted(ways, form, known.rates), np.inf)
    found = [ways.schedules[i] for i in np.argsort(times, kind="stable")[:count] if times[i] < np.inf]
    return [replace(s, copy=s.kind != "pointer") for s in found] if form.copied else found


def predicted(ways: Ways, form: Form, rates: Rates) -> np.ndarray:
    """Microseconds of each way, where it suits the form."""
    return microseconds(amounts(ways.sizes, form, ways.tile.held), ways.tile, rates)


class Tile(NamedTuple):
    """What was measured of a schedule's tile, in microseconds; `held` is a number of programs.

    start   a launch: until its first tile has begun, and after its last is stored
    once    a tile's beginning and end
    alone   a step of k of a tile that has a multiprocessor to itself
    shared  the same where several programs share a multiprocessor, for each of them
    adding  times as long a step where segments end within a tile: their sums take registers
    uneven  times as long a step of a pointer kernel where k is no multiple of 16; ways.py says how much of it counts
    held    programs that a multiprocessor holds
    """

    start: Any
    once: Any
    alone: Any
    shared: Any
    adding: Any
    uneven: Any
    held: Any


class Rates(NamedTuple):
    """What was measured of a GPU: bytes a microsecond from memory and from L2, then microseconds, and a share.

    carry   chains handed on to another program (stream)
    wait    what programs wait for such a chain, as a share of its time
    join    segments added by the program that comes last (split)
    more    a second kernel: one that adds segments, or one that copies rows
    cut     one segment's end, where the next follows in the same program
    apart   times as long for bytes from memory where programs that stream read the same weight rows at different times
    """

    memory: Any
    l2: Any
    carry: Any
    wait: Any
    join: Any
    more: Any
    cut: Any
    apart: Any = 1.0


class Wave(NamedTuple):
    """Programs that run together: how often, tiles on the busiest multiprocessor, bytes from memory and from L2."""

    times: Any
    tiles: Any
    memory: Any
    l2: Any


class Amounts(NamedTuple):
    """What a schedule has to do for a form.

    steps    of k, a tile; cuts: segments that end within a tile, but for the last
    full     waves of as many programs as there is room for, and the last, smaller one
    carries  and joins: whether there are any; more: kernels beside the first
    partial  bytes of segments' sums, written and read
    copied   bytes of rows that are copied first
    uneven   how much of a tile's `uneven` counts; apart: whether weight rows come from memory more than once
    """

    steps: Any
    cuts: Any
    full: Wave
    last: Wave
    carries: Any
    joins: Any
    more: Any
    partial: Any
    copied: Any
    uneven: Any
    apart: Any = False


def amounts(s: Sizes, form: Form, held: Any) -> Amounts:
    """What schedules, of which a multiprocessor holds `held` programs, have to do for a form."""
    chains, abreast = units(s, form), -(-form.tokens // s.m)
    slots = np.where(s.lockstep, abreast * lanes(s, form), form.sms) * held
    steps = -(-np.where(s.split, form.length, form.k) // s.k)
    memory = form.size * (form.n * form.k + form.tokens * (form.n + form.k)) / chains
    l2 = form.size * steps * s.k * (s.m + s.n)
    copied = form.copied * (1 - s.pointer)
    full = np.where(s.stream, chains / slots, chains // slots)
    rest = np.where(s.stream, 0, chains % slots)
    sums = np.where(s.reduce, form.tokens * form.n * form.segments, chains * s.m * s.n)
    return Amounts(steps, np.where(s.split, 0, form.segments - 1), Wave(full, held, slots * memory, slots * l2),
                   Wave(rest > 0, -(-rest // form.sms), rest * memory, rest * l2), s.stream * 1, s.split & ~s.reduce,
                   s.reduce * 1 + (copied > 0), 8 * sums * s.split, copied, s.pointer * form.uneven,
                   s.stream & ~s.lockstep & (abreast > 1) & (form.size * form.n * form.k > STAYS))


def microseconds(a: Amounts, tile: Tile, rates: Rates) -> Any:
    """How long a call takes."""
    slow = (1 + a.uneven * (tile.uneven - 1)) * (1 + (a.cuts > 0) * (tile.adding - 1))
    chain = tile.once + a.cuts * rates.cut + a.steps * tile.alone * slow
    work = a.steps * tile.shared * slow

    memory = rates.memory / (1 + a.apart * (rates.apart - 1))

    def time(wave):
        parts = (chain, wave.tiles * work, wave.memory / memory, wave.l2 / rates.l2)
        return wave.times * sum(part**SHARPNESS for part in parts) ** (1 / SHARPNESS)

    carry = rates.carry + rates.wait * a.steps * tile.alone
    more = a.carries * carry + a.joins * rates.join + a.more * rates.more
    moved = a.partial / rates.l2 + a.copied / rates.memory
    return tile.start + time(a.full) + time(a.last) + more + moved


# what was measured


class Ways(NamedTuple):
    """Every schedule that can be chosen, its sizes, and what was measured of its tile."""

    schedules: list[Schedule]
    sizes: Sizes
    tile: Tile

    @classmethod
    def of(cls, tiles: dict[Schedule, Tile], lockstep: bool = False) -> Ways:
        """`lockstep`: whether schedules that walk so were timed, and may be chosen."""
        every = [(s, known) for tile, known in tiles.items() for s in variants(tile) if lockstep or not s.lockstep]
        return cls([s for s, _ in every], Sizes(*columns(Sizes.of(s) for s, _ in every)),
                   Tile(*columns(known for _, known in every)))


class Quantities(NamedTuple):
    """What was measured of a GPU; by dtype (bfloat16 stands for all of 16 bits), what can be chosen."""

    rates: Rates
    ways: dict[str, Ways]


@cache
def quantities(index: int) -> Quantities | None:
    """What was measured of GPU `index` or, if that was not, of a near relative; None if neither was."""
    if index < 0:
        return None
    name = tables.slug(index)
    found = (load(n) for n in (name, *tables.RELATED.get(name, ())))
    return next((known for known in found if known), None)


def load(name: str, folder=None) -> Quantities | None:
    """The quantities in one GPU's file; None if there is none, and a warning if it cannot be used."""
    path = Path(folder or tables.FOLDER) / f"{name}_cost.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        return Quantities(Rates(**{what: _positive(rate) for what, rate in raw["rates"].items()}), {
            dtype: Ways.of({Schedule.parse(line): Tile(*map(_positive, numbers)) for line, numbers in lines.items()},
                           raw.get("lockstep") is True) for dtype, lines in raw["tiles"].items()})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        warnings.warn(f"{path} cannot be used ({error}): products take schedules of a general rule, which may be "
                      "slower. Their bits do not change.", RuntimeWarning, stacklevel=2)
        return None


def _positive(number: Any) -> float:
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 < number < np.inf:
        raise ValueError(f"a quantity must be a number above 0, got {number!r}")
    return number
