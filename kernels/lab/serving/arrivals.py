"""A server under random arrivals: how long a request waits for its first token, and for each one behind it.

Requests arrive as a Poisson process does: the gaps between them are drawn from one exponential distribution, by a seed.
Their prompts and counts are a crowd's (loads.py), in the order of its calls, and none is cancelled. Times are by the
wall clock, from the moment at which a request arrives, even if a step is under way then. Each contender is served three
times, in turns, by an engine that has served the same requests before, all at once: its kernels are compiled and its
graphs captured. Its prefix cache is emptied before each pass.
"""
from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from ... import runtime
from ...inference import Engine, Request, Sampler
from ...model.llama import Llama
from .. import provenance, records
from . import loads
from .recorded import model_of

RATES, REQUESTS, PASSES = (2.0, 8.0), 100, 3
LATENCY = records.Table(
    "latency.csv", ("model", "ops", "rate", "requests", "first_ms_p05", "first_ms_p50", "first_ms_p95",
                    "between_ms_p05", "between_ms_p50", "between_ms_p95", "tokens_per_s", "recorded_at", "source"),
    ("model", "ops", "rate"))


def gaps(rate: float, number: int, seed: int = 0) -> list[float]:
    """Seconds between `number` arrivals, `rate` a second in the mean. ValueError for a rate that is not above 0."""
    if not 0 < rate < math.inf:
        raise ValueError(f"rate must be a number of arrivals a second above 0, got {rate!r}")
    draw = random.Random(seed)
    return [-math.log(1.0 - draw.random()) / rate for _ in range(number)]


def crowd(model: Llama, requests: int = REQUESTS) -> loads.Load:
    """Who asks: a half our prompt, a half strangers."""
    copies = max(requests // 2, 1)
    return loads.crowd(model.config, copies, requests - copies)


def ready(model: Llama, load: loads.Load) -> Engine:
    """An engine that has served the load once, all of it at once, and waits for nothing any more."""
    engine = Engine(model, pages=load.server.pages, budget=256, chunk=128)
    engine.warm_up()
    for call in load.calls:
        _asked(engine, call)
    engine.run()
    return engine


def serve(engine: Engine, load: loads.Load, rate: float) -> tuple[list[float], list[float], float]:
    """Milliseconds to each request's first token, those between tokens, and tokens a second over all."""
    engine.cache.forget()
    times = np.cumsum(gaps(rate, len(load.calls))).tolist()
    waiting = list(zip(times, load.calls, strict=True))
    begin, served = time.perf_counter(), []
    while waiting or engine.scheduler.requests:
        now = time.perf_counter() - begin
        while waiting and waiting[0][0] <= now:
            arrived, call = waiting.pop(0)
            served.append((begin + arrived, _asked(engine, call)))
        if not engine.step():
            time.sleep(1e-4)
    return _times(served)


def _asked(engine: Engine, call: loads.Call) -> Request:
    sampler = Sampler(temperature=1.0, seed=call.seed) if call.seed else Sampler()
    return engine.submit(call.prompt, call.count, sampler)


def _times(served: Sequence[tuple[float, Request]]) -> tuple[list[float], list[float], float]:
    first = [1e3 * (request.times[0] - arrived) for arrived, request in served]
    between = [1e3 * gap for _, request in served for gap in np.diff(request.times)]
    ends = max(request.times[-1] for _, request in served) - served[0][0]
    return first, between, sum(len(request.answer) for _, request in served) / ends


def source() -> str:
    """The code that decides a row: this file, the loads, the engine, the model and its ops."""
    return provenance.source(__file__, loads.__file__)


def record(name: str, folder, ops: Sequence[str], rates: Sequence[float] = RATES, requests: int = REQUESTS, *,
           again: bool = False, said: Callable[[str], None] = print) -> pd.DataFrame:
    """Serve each rate with each of these ops in turns; returns latency.csv whole. Recorded rates are skipped."""
    first, engines = model_of(name, ops[0], runtime.device()), {}
    load = crowd(first, requests)
    records.note_machine(folder, LATENCY.file)
    for rate in rates:
        rows = LATENCY.read(folder)
        rows = rows[(rows.model == name) & (rows.rate == rate) & rows.source.isin(provenance.known_as(source()))]
        if not again and set(rows.ops) >= set(ops):
            continue
        engines = engines or {each: ready(first.using(each), load) for each in ops}
        found: dict[str, list] = {each: [] for each in ops}
        for _ in range(PASSES):
            for each, engine in engines.items():
                found[each].append(serve(engine, load, rate))
        LATENCY.merge(folder, [_row(name, each, rate, requests, passes) for each, passes in found.items()])
        waits = {each: np.median([ms for one in passes for ms in one[0]]) for each, passes in found.items()}
        said(f"{rate:g} arrivals a second, first token: "
             + ", ".join(f"{each} {ms:.1f} ms" for each, ms in waits.items()))
    return LATENCY.read(folder)


def _row(model, ops, rate, requests, passes) -> dict:
    row = {"model": model, "ops": ops, "rate": rate, "requests": requests, "recorded_at": records.now(),
           "source": source(), "tokens_per_s": float(np.median([speed for _, _, speed in passes]))}
    for what, place in (("first", 0), ("between", 1)):
        values = np.percentile([ms for one in passes for ms in one[place]], (5, 50, 95))
        row |= {f"{what}_ms_p{p}": float(value) for p, value in zip(("05", "50", "95"), values, strict=True)}
    return row
