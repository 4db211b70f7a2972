"""`find_moving_ops`: which of a model's calls give a row other bits when something else in the batch changes.

A row's forward is watched call by call and its results are kept. A second forward, in which the row is the same and
something else is not, is compared with it while it runs. A call *starts* a difference if all that fed it were equal,
and *carries* one otherwise: who starts is to blame.
"""
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import pandas as pd
import torch

from ... import bits
from . import ways
from .watch import OUTPUT, Key, Seen, run
from .ways import WAYS

STARTS, CARRIES, SAME, ABSORBS, ELSEWHERE = "starts", "carries", "same", "absorbs", "not compared"


@dataclass(frozen=True)
class Call:
    """One ATen call of a way: where it was made, what became of the row's part of its results, and what fed it.

    verdict  `starts`: other bits from equal inputs. `carries`: from inputs with other bits. `same`, and `absorbs`,
             which is the same from inputs with other bits. `not compared`: a result has no part that is the row's, or
             the other forward did not make this call
    """

    way: str
    number: int
    module: str
    op: str
    verdict: str
    elements: int
    differ: int
    ulps: int
    fed_by: tuple[Key, ...]

    @property
    def moved(self) -> bool:
        return self.verdict in (STARTS, CARRIES)


@dataclass(frozen=True)
class Report:
    """What was found. False if no bit moved; true if one did, or if a way compared nothing: it has not been checked.

    calls    every call of every way; of a model's results, as calls of `output`, those whose call was not compared
    tried    the ways that were tried
    left_out way -> why it was not tried
    kinds    module -> its class
    """

    calls: tuple[Call, ...]
    tried: tuple[str, ...]
    left_out: dict[str, str]
    kinds: dict[str, str]

    def __bool__(self):
        return any(call.moved for call in self.calls) or bool(self.unchecked)

    @property
    def unchecked(self) -> list[str]:
        """The ways in which nothing was compared, so that they say nothing of the model's bits."""
        compared = {call.way for call in self.calls if call.elements}
        return [way for way in self.tried if way not in compared]

    @property
    def first(self) -> Call | None:
        """The first call that starts a difference, in the first way that has one."""
        return next((call for call in self.calls if call.verdict == STARTS), None)

    def starts(self) -> pd.DataFrame:
        """The calls to blame, a row each."""
        return self._frame(call for call in self.calls if call.verdict == STARTS)

    def table(self) -> pd.DataFrame:
        """A row for each way and module with a call that moved: its first one, and what fed that. Empty if none did."""
        first: dict[tuple, Call] = {}
        for call in self.calls:
            if call.moved:
                first.setdefault((call.way, call.module), call)
        return self._frame(first.values())

    def _frame(self, calls: Iterable[Call]) -> pd.DataFrame:
        rows = [{"way": c.way, "layer": c.module, "kind": self.kinds.get(c.module, ""), "op": c.op,
                 "verdict": c.verdict, "differ": c.differ, "elements": c.elements, "ulps": c.ulps,
                 "fed by": ", ".join(f"{op} in {module}" for module, op, _ in c.fed_by) or "inputs and weights"}
                for c in calls]
        return pd.DataFrame(rows, columns=["way", "layer", "kind", "op", "verdict", "differ", "elements", "ulps",
                                           "fed by"])

    def __str__(self):
        if not self:
            return (f"no bit moved: {', '.join(self.tried)}, {sum(c.verdict == SAME for c in self.calls)} results "
                    "compared")
        return "\n".join(self._line(way) for way in self.tried)

    def _line(self, way: str) -> str:
        own = [call for call in self.calls if call.way == way]
        start = next((call for call in own if call.verdict == STARTS), None)
        if way in self.unchecked:
            return f"{way}: nothing was compared, for no result has a part that is the row's"
        if start is None:
            return f"{way}: no bit moved"
        made = "".join(f" (made by {op} in {module}, which was not compared)" for module, op, _ in start.fed_by
                       if start.op == OUTPUT)
        return (f"{way} ({WAYS[way].says}): {start.op} in {start.module or 'the model'}{made} is the first to move, "
                f"{start.differ} of {start.elements} elements, up to {start.ulps} ulps; "
                f"{sum(call.verdict == STARTS for call in own)} calls start a difference, "
                f"{sum(call.verdict == CARRIES for call in own)} carry one")


def find_moving_ops(model: torch.nn.Module, inputs, ways: Iterable[str] | None = None, row: int = 0) -> Report:
    """Which ATen calls of `model` give one row other bits when its surroundings change.

    inputs  a tensor, a tuple of arguments, or a dict of them by name, on the model's device; tensors whose first size
            is the batch's hold a row each, and there are two rows at least
    ways    of WAYS: `run`, `batch`, `place`, and for a causal model's input_ids `padding` and `query`; by default all
            that the inputs allow
    row     which row is watched

    It runs without gradients and in the mode the model is in, training or not. Each run has its own copies of the
    inputs, caches among them, and starts from the model's buffers and attributes as they are, which stay so. Raises
    TypeError or ValueError for inputs, ways or a row that cannot be, and what the model itself raises, with hooks and
    modes gone.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    given = _of(inputs)
    chosen = _chosen(ways, given)
    if type(row) is not int or not 0 <= row < given.batch:
        raise ValueError(f"row must be a whole number from 0 to {given.batch - 1}, got {row!r}")
    left_out = {way: why for way in chosen if (why := WAYS[way].needs(given))}
    with torch.random.fork_rng(devices=[]):
        alone = _kept(model, given.rows([row]), 0, None)
        calls = [call for way in chosen if way not in left_out for call in _compare(model, given, way, row, alone)]
    kinds = {name or type(model).__name__: type(module).__name__ for name, module in model.named_modules()}
    return Report(tuple(calls), tuple(way for way in chosen if way not in left_out), left_out, kinds)


def _chosen(named, given: ways.Inputs) -> list[str]:
    chosen = list(WAYS) if named is None else [named] if isinstance(named, str) else list(named)
    for way in chosen:
        if way not in WAYS:
            raise ValueError(f"ways must be among {', '.join(WAYS)}, got {way!r}")
        if named is not None and (why := WAYS[way].needs(given)):
            raise ValueError(f"way {way!r} {why}")
    return chosen


_of = ways.of  # the name is an argument's too


def _compare(model, inputs, name: str, row: int, alone: dict) -> list[Call]:
    """One way: a forward that is kept, and another that is compared with it. `alone` is the row's own forward."""
    way = WAYS[name]
    one, other = way.first(inputs, row), way.again(inputs, row)
    kept = alone if one.batch == 1 and not way.prefix else _kept(model, one, row, alone)
    comparison = _Comparison(name, kept, other.batch, way.place(inputs, row), way.prefix)
    _run(model, other, comparison.see)
    return comparison.calls


def _kept(model, inputs: ways.Inputs, row: int, alone: dict | None) -> dict[Key, tuple]:
    """A forward's results by call. Of a whole batch the row's part, which is as large as the row's `alone`."""
    kept: dict[Key, tuple] = {}

    def keep(seen: Seen):
        results = seen.results
        if inputs.batch > 1:
            shapes = [t.shape for t in alone.get(seen.key, ())]
            results = tuple(ways.part(t, shape, inputs.batch, row, False) for t, shape in
                            zip(results, shapes, strict=False))
        kept[seen.key] = tuple(None if t is None else t.clone() for t in results)
    _run(model, inputs, keep)
    return kept


def _run(model, inputs: ways.Inputs, tell) -> None:
    own = inputs.own()
    run(model, own.arguments, own.named, tell)


class _Comparison:
    def __init__(self, way: str, kept: dict[Key, tuple[torch.Tensor, ...]], rows: int, row: int, prefix: bool):
        self.way, self.kept, self.rows, self.row, self.prefix = way, kept, rows, row, prefix
        self.calls: list[Call] = []
        self.moved: set[Key] = set()
        self.compared: set[Key] = set()

    def see(self, seen: Seen) -> None:
        carried = bool(self.moved.intersection(seen.fed_by))
        if seen.key[1] == OUTPUT:
            if self.compared.issuperset(seen.fed_by) and seen.fed_by:
                return  # by the call that made it
        elif not any(t.is_floating_point() or t.is_complex() for t in seen.results):
            self.moved.update([seen.key] * carried)  # masks and places have no rounding; they hand it on
            return
        pairs = self._pairs(seen)
        self.compared.update([seen.key] * bool(pairs))
        if pairs and all(_shows_or_hides(t) for pair in pairs for t in pair):
            self.moved.update([seen.key] * carried)
            return
        differ, ulps, elements = _count(pairs)
        if differ:
            self.moved.add(seen.key)
        verdict = (ELSEWHERE if not pairs else (CARRIES if carried else STARTS) if differ else
                   ABSORBS if carried else SAME)
        if not pairs and carried:
            self.moved.add(seen.key)  # what it feeds is not to blame
        module, op, _ = seen.key
        self.calls.append(Call(self.way, len(self.calls), module, op, verdict, elements, differ, ulps, seen.fed_by))

    def _pairs(self, seen: Seen) -> list[tuple[torch.Tensor, torch.Tensor]]:
        wanted = self.kept.get(seen.key, ())
        if len(wanted) != len(seen.results):
            return []
        parts = [None if w is None else ways.part(t, w.shape, self.rows, self.row, self.prefix)
                 for t, w in zip(seen.results, wanted, strict=True)]
        return [(w, p) for w, p in zip(wanted, parts, strict=True)
                if w is not None and p is not None and w.dtype == p.dtype]


def _shows_or_hides(t: torch.Tensor) -> bool:
    """Whether this is a mask in floating point, as attention adds it: zeros, and -inf or the lowest number."""
    if not t.is_floating_point() or not t.numel() or t.itemsize == 1:
        return False
    hidden = t <= torch.finfo(t.dtype).min
    return bool(hidden.any() and (hidden | (t == 0)).all())


def _count(pairs) -> tuple[int, int, int]:
    """Elements that differ, the largest distance in ulps among finite ones, and elements compared."""
    differ = ulps = elements = 0
    for one, other in pairs:
        elements += one.numel()
        moved = bits.moved(one, other)
        if one.numel() and moved.any():
            differ += int(moved.sum())
            if one.is_floating_point():
                finite = moved & one.isfinite() & other.isfinite()
                ulps = max(ulps, int(bits.ulp_distance(one, other)[finite].max()) if finite.any() else 0)
    return differ, ulps, elements
