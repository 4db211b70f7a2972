"""Candidates for the products of one form, timed on calls that are made anyway, and the clocks they are timed by."""
from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace
from statistics import median
from threading import Lock
from typing import Any

import torch

from ...runtime import current_device
from . import copies, cost, steps, ways
from . import order as orders
from .plan import Plan
from .product import Product
from .schedule import Schedule, Unsuitable

_DELAY = 50_000  # cycles, about 30 us: while the GPU waits, the host gets ahead, and its time to launch is not counted


class GpuClock:
    """Events on the current stream. Nothing waits for them: whoever asks is told when they have passed."""

    def now(self) -> float:
        """Seconds of the host's clock."""
        return time.perf_counter()

    def begin(self) -> Any:
        """Before a call: a mark of it."""
        mark = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(_DELAY)
        mark[0].record()
        return mark

    def end(self, mark: Any) -> None:
        """Behind the call."""
        mark[1].record()

    def us(self, mark: Any) -> float | None:
        """Microseconds between, or None while the GPU is not there yet, or a graph is captured, which asking ends."""
        if torch.cuda.is_current_stream_capturing() or not mark[1].query():
            return None
        return 1e3 * mark[0].elapsed_time(mark[1])

    def usable(self, index: int) -> bool:
        """Whether a call on GPU `index` can be timed now: no graph is being captured, and the events are its own."""
        return current_device() == index and not torch.cuda.is_current_stream_capturing()


class HostClock(GpuClock):
    """The host's clock, for Triton's interpreter."""

    def begin(self) -> Any:
        return [time.perf_counter()]

    def end(self, mark: Any) -> None:
        mark.append(time.perf_counter())

    def us(self, mark: Any) -> float | None:
        return 1e6 * (mark[1] - mark[0])

    def usable(self, index: int) -> bool:
        return True


class Trial:
    """Each candidate is called once to be compiled, then `calls` times to be timed, in turn with the others.

    All threads may take part. `best` is the fastest by its median so far, `over` whether nothing is left to learn.
    """

    def __init__(self, candidates: Iterable[Schedule], calls: int, clock: GpuClock):
        self.calls, self.clock, self.lock = calls, clock, Lock()
        self.begun = dict.fromkeys(candidates, 0)
        self.times: dict[Schedule, list[float]] = {s: [] for s in self.begun}
        self.waiting: list[tuple[Schedule, Any]] = []
        self.closed = False

    def next(self) -> tuple[Schedule, bool] | None:
        """The candidate to call now, and whether to time it; None where all have had their calls."""
        with self.lock:
            self._collect()
            schedule = min(self.begun, key=self.begun.__getitem__, default=None)
            if self.closed or schedule is None or self.begun[schedule] > self.calls:
                return None
            self.begun[schedule] += 1
            return schedule, self.begun[schedule] > 1

    def note(self, schedule: Schedule, mark: Any) -> None:
        """A timed call has been launched."""
        with self.lock:
            self.waiting.append((schedule, mark))

    def drop(self, schedule: Schedule) -> None:
        """The candidate does not run here."""
        with self.lock:
            self.begun.pop(schedule, None)
            self.times.pop(schedule, None)

    def close(self) -> None:
        """Learn no more than what has come in."""
        with self.lock:
            self._collect()
            self.closed = True

    def medians(self) -> dict[Schedule, float]:
        """Microseconds of each candidate that was timed."""
        with self.lock:
            self._collect()
            return {s: median(us) for s, us in self.times.items() if us}

    @property
    def best(self) -> Schedule | None:
        """The fastest so far; None before the first time has come in."""
        timed = self.medians()
        return min(timed, key=timed.__getitem__, default=None)

    @property
    def over(self) -> bool:
        """Whether all times are in, or will not be waited for."""
        with self.lock:
            self._collect()
            return self.closed or not self.waiting and all(n > self.calls for n in self.begun.values())

    def _collect(self) -> None:
        """Take in the times of calls that have ended. The lock is held."""
        still = []
        for schedule, mark in self.waiting:
            us = self.clock.us(mark)
            if us is None:
                still.append((schedule, mark))
            elif schedule in self.times:
                self.times[schedule].append(us)
        self.waiting = still


def candidates(plan: Plan, count: int) -> list[Schedule]:
    """The plan's first choice, then the model's best, then what the plan would take next, of those that run here.

    For very many tokens the first choice on copies is the second: what they cost and what they save depends on K.
    """
    p, different = plan.product, {}
    first = plan.wanted[:1] + [replace(s, copy=True) for s in plan.wanted[:1] if s.kind != "pointer" and p.m >= 2048]
    for schedule in (*first, *copies.offered(p, _by_the_model(p, plan.index, count)), *plan.wanted):
        if _runs(schedule, p, plan.index):
            different.setdefault(p.carried_out(schedule), schedule)
    return list(different.values())[:count]


def _by_the_model(p: Product, index: int, count: int) -> list[Schedule]:
    if orders.is_tree(p.order):
        return []
    rows = [stride for stride, step in (p.x_strides, p.weight_strides) if step == 1]
    form = ways.Form(p.n, p.k, p.m, *p.order, p.dtype.itemsize, p.followed, ways.unevenness(p.k, *rows),
                     p.multiprocessors)
    return cost.best(form if p.followed else form.on_copies(*p.apart), count, index)


def _runs(schedule: Schedule, p: Product, index: int) -> bool:
    try:
        return bool(steps.steps(schedule, p)) and (index >= 0 or schedule.kind == "pointer")
    except Unsuitable:
        return False
