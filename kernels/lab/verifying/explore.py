"""What a mix of requests gets a second: loose, verified, or with ops whose order is fixed; predicted and measured.

    python -m kernels mix --batch 32 --windows 64 --groups 8 --shares 0 0.1 0.25 0.5 0.75 1

A mix is B requests at once, a share of them deterministic. Three ways to serve it:

loose      default ops, nobody verified: what a share that must be deterministic does without
verified   default ops; the share decodes drafts, and each W of them are replayed in groups of G
invariant  ops whose order is fixed (`tiled` on a CPU), for all requests; `frozen` are those of one schedule

Predicted from two times measured here, of a decode step t_B and of a verify pass t_V. In W steps each of B requests
gets W tokens, of which a deterministic one keeps k(p, W), if each draft flips with probability p. What is recorded is
predicted for p = 0, as of a model whose drafts never flip; the command says what share of them did:

    tokens a second = (loose * W + deterministic * k(p, W)) / (W * t_B + ceil(deterministic / G) * t_V)
    held back       = (W - 1) / 2 steps and the passes

No request waits for a place, and all deterministic ones ripen together; the measurement has neither simplification.
"""
from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

import pandas as pd
import torch

from ... import runtime
from ...inference import Engine
from ...inference.verify import VerifyingEngine
from ...model.config import PRESETS
from ...model.llama import Llama
from ...model.ops import FROZEN
from .. import provenance, records
from ..serving.measure import byte_model, fixed_ops, requests

PAGE, WARM, PASSES = 16, 2, 3
WAYS = ("loose", "verified", "invariant")
MIX = records.Table(
    "mix.csv",
    ("model", "way", "ops", "batch", "share", "window", "group", "tokens", "tokens_per_s", "held_back_ms",
     "predicted_tokens_per_s", "predicted_held_back_ms", "recorded_at", "source"),
    ("model", "way", "batch", "share", "window", "group"))


@dataclass(frozen=True)
class Mix:
    """`batch` requests at once, `share` of them deterministic, verified in windows of W and groups of G.

    Raises ValueError that names the field.
    """

    batch: int = 8
    share: float = 0.5
    window: int = 16
    group: int = 4
    count: int = 48  # tokens of each answer
    model: str = "byte"

    def __post_init__(self):
        for name in ("batch", "window", "group", "count"):
            if type(value := getattr(self, name)) is not int or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        if not 0 <= self.share <= 1:
            raise ValueError(f"share must lie in 0..1, got {self.share!r}")

    @property
    def deterministic(self) -> int:
        return round(self.batch * self.share)


@dataclass(frozen=True)
class Served:
    """Tokens a second, milliseconds that a kept draft is held back on average, and the share of drafts that flipped."""

    tokens_per_s: float
    held_back_ms: float = 0.0
    flipped: float = 0.0


@dataclass(frozen=True)
class Costs:
    """Milliseconds of a decode step of B requests with default and with fixed ops, and of a verify pass."""

    step_ms: float
    fixed_step_ms: float
    pass_ms: float


def predicted(mix: Mix, costs: Costs, flip: float = 0.0) -> dict[str, Served]:
    """What this file's docstring says of each of WAYS, where a draft flips with probability `flip`."""
    sure, window = mix.deterministic, mix.window
    kept = sum((1 - flip) ** i for i in range(window))
    passes = math.ceil(sure / mix.group) * costs.pass_ms
    verified = ((mix.batch - sure) * window + sure * kept) / (window * costs.step_ms + passes)
    held = (window - 1) / 2 * costs.step_ms + passes if sure else 0.0
    return {"loose": Served(1e3 * mix.batch / costs.step_ms), "verified": Served(1e3 * verified, held),
            "invariant": Served(1e3 * mix.batch / costs.fixed_step_ms)}


@cache
def costs(batch: int, window: int, group: int, model: str = "byte") -> Costs:
    """The times that a prediction needs, measured here once: medians of a few steps and passes."""
    mix = Mix(batch, 1.0, window, group, model=model)
    return Costs(_step_ms(mix, "default"), _step_ms(mix, fixed_ops()), _pass_ms(mix))


@cache
def measured(mix: Mix, way: str, ops: str | None = None) -> Served:
    """The mix served once to its end on this machine, prompts read before the clock starts; kept.

    ops  of way `invariant`; by default those whose order is fixed and that are quick here
    """
    return _served(_ready(mix, way, ops), mix, way)


def _ready(mix: Mix, way: str, ops: str | None) -> Engine:
    """An engine for a way, any share, whose graphs are captured."""
    if way not in WAYS:
        raise ValueError(f"way must be one of {', '.join(WAYS)}, got {way!r}")
    engine = _engine(mix, "default" if way != "invariant" else ops or fixed_ops(), way == "verified")
    engine.warm_up()  # captures its graphs
    return engine


def _served(engine: Engine, mix: Mix, way: str) -> Served:
    asked = _submitted(engine, mix, mix.deterministic if way == "verified" else 0)
    while not all(request.answer for request in asked):
        engine.step()
    before, start = sum(len(request.answer) for request in asked), _now()
    engine.run()
    seconds = _now() - start
    held = [wait for request in asked for wait in getattr(request, "held_back", ())]
    flips = sum(getattr(request, "flips", 0) for request in asked)
    return Served((sum(len(request.answer) for request in asked) - before) / seconds,
                  1e3 * sum(held) / len(held) if held else 0.0, flips / max(flips + len(held), 1))


def _model(mix: Mix, ops: str) -> Llama:
    return byte_model(ops) if mix.model == "byte" else _made(mix.model).using(ops)


@cache
def _made(model: str) -> Llama:
    return Llama(model, dtype=byte_model().dtype, device=byte_model().device)


def _engine(mix: Mix, ops: str, verifies: bool) -> Engine:
    length = len(requests(1)[0]) + mix.count
    settings = {"pages": (mix.batch + mix.group) * -(-length // PAGE), "page_size": PAGE, "max_batch": mix.batch,
                "budget": 64 * mix.batch, "sharing": False}
    if not verifies:
        return Engine(_model(mix, ops), **settings)
    return VerifyingEngine(_model(mix, ops), window=mix.window, group=mix.group, reach=max(length, mix.window),
                           **settings)


def _submitted(engine: Engine, mix: Mix, verified: int) -> list:
    """The mix's requests, the first `verified` of them to be verified. A prompt's bytes are tokens of any model."""
    return [engine.submit(list(prompt), mix.count, **({"verify": True} if i < verified else {}))
            for i, prompt in enumerate(requests(mix.batch + 1)[1:])]


def _step_ms(mix: Mix, ops: str, steps: int = 6) -> float:
    """Of the second time that the requests are served: PyTorch's attention plans each length that it first meets."""
    if mix.count <= WARM + steps:
        raise ValueError(f"count must be more than {WARM + steps}, for so many steps are timed, got {mix.count}")
    engine, times = _engine(mix, ops, False), []
    engine.warm_up()  # as engines that are measured do
    for step in (engine.step, lambda: _timed(engine.step)):
        asked = _submitted(engine, mix, 0)
        while not all(request.answer for request in asked):
            engine.step()
        times = [step() for _ in range(WARM + steps)]
        for request in asked:
            engine.cancel(request)
    return _median(times[WARM:])


def _pass_ms(mix: Mix, passes: int = 4) -> float:
    """Of a full group behind a prompt: what `_replay` does, without what it keeps."""
    engine = _engine(mix, "default", True)
    batch = engine.shape.batch([0] * mix.group, [])
    tokens = torch.zeros(mix.window * mix.group, dtype=torch.int64, device=engine.model.device)
    return _median([_timed(lambda: engine.verifier.forward(tokens, batch, engine.cache).argmax(-1).tolist())
                    for _ in range(WARM + passes)][WARM:])


def _timed(call) -> float:
    start = _now()
    call()
    return 1e3 * (_now() - start)


def _now() -> float:
    """Seconds of the wall clock; of one thread on a CPU those that it ran, so that others on the machine count not."""
    return time.perf_counter() if runtime.HAS_GPU or torch.get_num_threads() > 1 else time.thread_time()


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def record(mix: Mix, shares: Sequence[float], ops: Sequence[str] = (), passes: int = PASSES,
           done=frozenset()) -> Iterator[tuple[pd.DataFrame, float]]:
    """MIX's columns of each share once it is measured, medians of its passes, and the share of drafts that flipped.

    A row for each way, and each further ops. Ways take turns, so that a slow minute slows all of them alike. `mix` has
    the rest. A share is left out if all of its rows, (model, way, batch, share, window, group, tokens), are in `done`.
    """
    asked = _asked(ops)
    wanted = [each for share in shares for each in [replace(mix, share=share)]
              if not {tuple(_key(each, *one).values()) for one in asked} <= done]
    if not wanted:
        return
    known = costs(mix.batch, mix.window, mix.group, mix.model)
    engines = {each: _ready(mix, *each) for each in asked}
    for each in wanted:
        found: dict[tuple[str, str | None], list[Served]] = {one: [] for one in asked}
        for _ in range(passes):
            for (way, name), engine in engines.items():
                found[way, name].append(_served(engine, each, way))
        yield pd.DataFrame([_row(each, *one, predicted(each, known), got) for one, got in found.items()],
                           columns=list(MIX.columns)), _middle(found["verified", None]).flipped


def _key(mix: Mix, way: str, name: str | None) -> dict:
    return {"model": mix.model, "way": name if name == FROZEN else way, "batch": mix.batch, "share": mix.share,
            "window": mix.window, "group": mix.group, "tokens": mix.count}


def _recorded(folder) -> frozenset[tuple]:
    """The rows that this very code has recorded, as `record` wants them."""
    rows = MIX.read(folder)
    same = rows[rows.source.isin(provenance.known_as(provenance.source(__file__)))] if len(rows) else rows
    return frozenset(same[[*MIX.key, "tokens"]].itertuples(index=False, name=None))


def _asked(ops: Sequence[str]) -> list[tuple[str, str | None]]:
    return [(way, None) for way in WAYS] + [("invariant", name) for name in ops if name != fixed_ops()]


def _row(mix: Mix, way: str, name: str | None, guess: dict[str, Served], passes: list[Served]) -> dict:
    got = _middle(passes)
    said = guess[way] if name is None else Served(float("nan"), float("nan"))
    return {**_key(mix, way, name), "ops": name or (fixed_ops() if way == "invariant" else "default"),
            "tokens_per_s": got.tokens_per_s, "held_back_ms": got.held_back_ms,
            "predicted_tokens_per_s": said.tokens_per_s, "predicted_held_back_ms": said.held_back_ms,
            "recorded_at": records.now(), "source": provenance.source(__file__)}


def _middle(passes: list[Served]) -> Served:
    """The pass of the median rate."""
    return sorted(passes, key=lambda served: served.tokens_per_s)[len(passes) // 2]


def _arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m kernels mix", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(PRESETS), default="byte")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128, help="of each answer")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.0, 0.02, 0.1, 0.25, 0.5, 0.75, 1.0])
    parser.add_argument("--windows", type=int, nargs="+", default=[64])
    parser.add_argument("--groups", type=int, nargs="+", default=[8])
    parser.add_argument("--ops", nargs="+", choices=("invariant", "tiled", FROZEN),
                        help="more ops to serve all requests with, such as frozen where there are such")
    parser.add_argument("--out", default=records.DATA, help="the data folder")
    parser.add_argument("--machine", help="the folder's name under it (default: from the device)")
    parser.add_argument("--again", action="store_true", help="measure shares that are recorded already")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    a = _arguments(argv)
    mixes = [Mix(a.batch, a.shares[0], window, group, a.tokens, a.model) for window in a.windows for group in a.groups]
    if not runtime.HAS_GPU:
        torch.set_num_threads(1)  # the steps of a small model are slower with more
    folder = records.open_machine(a.out, a.machine)
    records.note_machine(folder, MIX.file)
    done = frozenset() if a.again else _recorded(folder)
    for mix in mixes:
        for rows, flipped in record(mix, a.shares, a.ops or (), done=done):
            MIX.merge(folder, rows)
            print(f"W = {mix.window}, G = {mix.group}, share {rows.share[0]:g}, {flipped:.1%} of drafts flipped, "
                  "tokens a second: " + ", ".join(f"{row.way} {row.tokens_per_s:,.0f}" for row in rows.itertuples()),
                  file=sys.stderr, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
