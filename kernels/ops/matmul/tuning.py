"""Choosing a schedule while products run: their first calls try a few, and the fastest is kept.

Others freeze their tables, because another schedule may mean other bits. Here a schedule decides no bit, so it may be
tried on a reader's own arguments, in the middle of a model.
"""
from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from functools import wraps
from pathlib import Path
from typing import Any

import torch

from ...runtime import HAS_GPU, device
from . import learned
from .learned import LEARNED, Form
from .plan import Plan
from .schedule import Schedule
from .trial import GpuClock, HostClock, Trial, candidates


class _Thread(threading.local):
    def __init__(self):
        self.entered: list[tuning] = []


_THREAD, _LOCK = _Thread(), threading.Lock()
_TRIALS: dict[Form, _Watched] = {}


class tuning:
    """In this block, this thread's first products of a form try a few schedules, and keep the fastest. No bit changes.

    A form is a weight's N and K, a dtype, an order and a quarter of a doubling of tokens. Every call gives its result;
    each candidate is called once to be compiled and `calls` times to be timed, by events that nobody waits for. While
    a CUDA graph is captured nothing is tried: a graph keeps what was best when it was captured. What was learned stays
    when the block is left, and a form that was not done keeps the best of what it has measured. The block's `tried`
    then says what was, its `began` how many forms were begun, its `spent` how many seconds went into it.

    candidates  schedules a form tries: the first choice, and the next best by the model of time (cost.py)
    calls       timed calls a candidate
    seconds     of the host's time, for all forms of the block: what is not tried by then is not tried
    table       a file of your own to read what was learned before, if it exists, and to write it to at the end

    It may be nested, the innermost one's numbers hold, and entered by several threads; a thread that is started inside
    does not inherit it. Raises ValueError for numbers that are not positive and for a table that cannot be read,
    RuntimeError where it is left by another thread or in another order than it was entered.
    """

    def __init__(self, candidates: int = 4, calls: int = 3, seconds: float = 60.0, table=None, clock=None):
        for name, value in (("candidates", candidates), ("calls", calls)):
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not seconds > 0:
            raise ValueError(f"seconds must be a positive number, got {seconds!r}")
        self.candidates, self.calls, self.seconds = candidates, calls, seconds
        self.table = None if table is None else Path(table)
        self.clock: GpuClock = clock or (GpuClock() if HAS_GPU else HostClock())
        self.spent, self.began = 0.0, 0  # seconds, forms
        self.tried: dict[Form, dict[Schedule, float]] = {}  # microseconds, the median of each candidate's

    def __enter__(self):
        if self.table and self.table.exists():
            load(self.table)
        _forget_plans()
        _THREAD.entered.append(self)
        return self

    def __exit__(self, *_):
        if not _THREAD.entered or _THREAD.entered[-1] is not self:
            raise RuntimeError("tuning must be left by the thread that entered it, the innermost one first")
        _THREAD.entered.pop()
        if self not in _THREAD.entered:  # the same object may be entered twice
            for watched in [w for w in list(_TRIALS.values()) if w.block is self]:
                watched.trial.close()
                watched.settle()
        if self.table:
            learned.save(self.table)

    def __call__(self, function: Callable) -> Callable:
        """`function` with each call in such a block: a decorator."""
        @wraps(function)
        def inside(*arguments, **named):
            with tuning(self.candidates, self.calls, self.seconds, self.table, self.clock):
                return function(*arguments, **named)
        return inside


class _Watched:
    """Plans of one form while its candidates are tried: each call of theirs comes here."""

    def __init__(self, form: Form, block: tuning, trial: Trial):
        self.form, self.block, self.trial = form, block, trial
        self.plans: dict[Plan, tuple[Callable, dict[Schedule, Plan]]] = {}  # its own launch, and its candidates'
        self.lock = threading.Lock()

    def add(self, plan: Plan) -> Plan:
        """Have the plan's calls come here."""
        with self.lock:
            self.plans[plan] = plan.launch, {}
            plan.launch = self.call
        return plan

    def call(self, plan: Plan, *arguments) -> torch.Tensor:
        """One call: of the next candidate, or of the best so far."""
        block = self.block
        wanted = self.trial.next() if self._tries(plan) else None
        if wanted is None:
            if self.trial.over and block.clock.usable(plan.index):
                self.settle()
                return plan.launch(plan, *arguments)
            return self._run(plan, self.trial.best, arguments)
        schedule, timed = wanted
        start = block.clock.now()
        try:
            mark = block.clock.begin() if timed else None
            y = self._run(plan, schedule, arguments)
            if timed:
                block.clock.end(mark)
                self.trial.note(schedule, mark)
            return y
        except torch.OutOfMemoryError:  # there may be memory at the next call
            raise
        except Exception:  # noqa: BLE001 - compilers raise what they like, and the plan has other schedules
            self.trial.drop(schedule)
            self.plans.get(plan, (None, {}))[1].pop(schedule, None)
            return self.call(plan, *arguments)
        finally:
            block.spent += block.clock.now() - start

    def _tries(self, plan: Plan) -> bool:
        block = self.block
        if block.spent >= block.seconds:
            self.trial.close()
        return block in _THREAD.entered and block.clock.usable(plan.index)

    def _run(self, plan: Plan, schedule: Schedule | None, arguments) -> torch.Tensor:
        launch, ready = self.plans.get(plan, (plan.launch, {}))
        schedule = schedule or next(iter(ready), None)  # one that was launched: its code is loaded, as a capture wants
        if schedule is None:
            return launch(plan, *arguments)
        if schedule not in ready:
            ready[schedule] = Plan(*arguments, schedule)
        return ready[schedule].launch(ready[schedule], *arguments)

    def settle(self) -> None:
        """Give the plans back, with the fastest as their first choice, ready as it was launched last."""
        best = self.trial.best
        self.block.tried[self.form] = self.trial.medians()
        with _LOCK, self.lock:
            if best is not None:
                LEARNED[self.form] = best
            for plan, (launch, ready) in self.plans.items():
                _prefer(plan, best)
                plan.ready = ready[best].ready if best in ready else plan.ready
                plan.launch = launch
            self.plans = {}
            _TRIALS.pop(self.form, None)


def watched(plan: Plan) -> Plan:
    """A new plan: with what was learned of its form as its first choice, or in a block with its calls watched."""
    if plan.launch is Plan.nothing or not (LEARNED or _THREAD.entered):
        return plan
    form = Form.of(plan.product, plan.index)
    if form in LEARNED:
        _prefer(plan, LEARNED[form])
        return plan
    block = _THREAD.entered[-1] if _THREAD.entered else None
    if block is None or block.spent >= block.seconds or not block.clock.usable(plan.index):
        return plan
    with _LOCK:
        if form not in _TRIALS:
            found = candidates(plan, block.candidates)
            if len(found) < 2:
                return plan
            _TRIALS[form] = _Watched(form, block, Trial(found, block.calls, block.clock))
            block.began += 1
        return _TRIALS[form].add(plan)


def warm(model: Any, token_counts: Iterable[int], **numbers) -> int:
    """Tune all products of a model's forwards over so many tokens, before a graph is captured. -> forms that were new.

    model         a Llama of this suite, or whatever takes token ids (1, count) int64; its products are matmul.triton's,
                  or those of a batch_invariant block around this call
    token_counts  of the forwards to come
    numbers       `tuning`'s own

    It waits for the GPU. Raises as `tuning` does, and as the model does.
    """
    with torch.no_grad(), tuning(**numbers) as block:
        for count in token_counts:
            ids = torch.zeros(1, count, dtype=torch.int64, device=getattr(model, "device", None) or device())
            for _ in range(block.candidates * (block.calls + 1) + 1):
                model(ids, *([model.cache(1, count)] if hasattr(model, "cache") else []))
                if HAS_GPU:
                    torch.cuda.synchronize()
                if not _TRIALS:
                    break
    return block.began


def load(path) -> int:
    """Read a table that `save` wrote. -> how many forms it has. Raises as learned.load does."""
    found = learned.load(path)
    _forget_plans()
    return len(found)


def forget() -> None:
    """Forget what was learned, so that products are chosen for as without it."""
    LEARNED.clear()
    _forget_plans()


tuning.load, tuning.save, tuning.forget = map(staticmethod, (load, learned.save, forget))


def _prefer(plan: Plan, schedule: Schedule | None) -> None:
    if schedule is not None:
        plan.wanted = list(dict.fromkeys([schedule, *plan.wanted]))


def _forget_plans() -> None:
    """Have plans made anew whose schedule nobody named, but for those that have what was learned or are being tried."""
    from .call import CALL

    for key, plan in list(CALL.plans.items()):
        tried = getattr(plan.launch, "__func__", None) is _Watched.call
        form = Form.of(plan.product, plan.index)
        known = form in LEARNED and LEARNED[form] == plan.wanted[0]  # an empty product wants None
        if not (plan.forced or tried or known):
            CALL.plans.pop(key, None)
