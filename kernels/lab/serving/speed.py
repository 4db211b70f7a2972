"""How fast a model is served: decode steps of a batch, prefill of a prompt, and a server under random arrivals.

    python -m kernels serving                      on a GPU: 8B shape, random weights; on a CPU: the byte model
    python -m kernels serving --phases arrivals    requests that arrive at random, by the wall clock (arrivals.py)

decode   one token for each of `batch` requests behind `context` tokens, the chosen tokens read back
prefill  a prompt of `context` tokens in one window, the token chosen read back

Host wall clock. On a GPU the whole forward with its attention and argmax is one CUDA graph, for every contender alike;
the cache has a row a request, which is what PyTorch's attention reads fastest. On a CPU it is eager. Contenders take
turns run by run. Among them may be `shareable`: the same weights in the order that up to eight GPUs can share, on one.
"""
from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch

from ... import runtime
from ...model.batch import Batch
from ...model.cache import KVCache
from ...model.config import PRESETS, SHARED
from ...model.llama import Llama
from ...model.ops import FROZEN, NAMES
from .. import bench, provenance, records
from . import arrivals
from .recorded import model_of

RUNS, WARMUPS = 50, 10
SHAREABLE = "shareable"
OPS = {"cuda": ("default", "invariant", FROZEN), "cpu": ("default", "tiled")}
DECODE = {"cuda": ((1, 1024), (8, 1024), (32, 1024), (64, 1024), (128, 1024), (256, 1024), (1, 8192), (8, 8192),
                   (32, 8192), (64, 8192)), "cpu": ((1, 128), (8, 128), (32, 128))}
PREFILL = {"cuda": (512, 1024, 2048, 4096, 8192), "cpu": (128, 512)}
PHASES = ("decode", "prefill", "arrivals")
SERVING = records.Table(
    "serving.csv", ("model", "ops", "phase", "batch", "context", "tokens_per_s_p05", "tokens_per_s_p50",
                    "tokens_per_s_p95", "ms_p05", "ms_p50", "ms_p95", "recorded_at", "source"),
    ("model", "ops", "phase", "batch", "context"))


@dataclass(frozen=True)
class Cell:
    """What is timed: `batch` requests, `new` tokens each behind `behind` in the cache."""

    phase: str
    batch: int
    context: int

    @property
    def new(self) -> int:
        return self.context if self.phase == "prefill" else 1

    @property
    def behind(self) -> int:
        return 0 if self.phase == "prefill" else self.context


def cells(kind: str, phases: Sequence[str] = PHASES) -> Iterator[Cell]:
    """What is recorded on this kind of device."""
    if "decode" in phases:
        yield from (Cell("decode", batch, context) for batch, context in DECODE[kind])
    if "prefill" in phases:
        yield from (Cell("prefill", 1, context) for context in PREFILL[kind])


def parsed(text: str) -> Cell:
    """A cell as the command takes it: 8x1024 is a decode, 512 a prefill. ValueError for anything else."""
    found = re.fullmatch(r"(?:([1-9]\d*)x)?([1-9]\d*)", text)
    if not found:
        raise ValueError("a cell must be BATCHxCONTEXT for decode, such as 8x1024, or TOKENS for prefill, got "
                         f"{text!r}")
    return Cell("decode" if found[1] else "prefill", int(found[1] or 1), int(found[2]))


def step(model: Llama, cache: KVCache, cell: Cell) -> Callable[[], list[int]]:
    """A function that runs the cell once and returns the tokens chosen; on a GPU it replays one CUDA graph."""
    batch = cache.batch([cell.new] * cell.batch, [cell.behind] * cell.batch)
    ids = [(7919 * i + 13) % model.config.vocab_size for i in range(cell.batch * cell.new)]
    tokens = torch.tensor(ids, dtype=torch.int64, device=model.device)

    def chosen():
        return model.forward(tokens, batch, cache).argmax(-1)

    if model.device.type != "cuda":
        return lambda: chosen().tolist()
    return _replayed(model, chosen, tokens, ids, (cache, batch))


def _replayed(model: Llama, chosen, tokens, ids, held: tuple[KVCache, Batch]) -> Callable[[], list[int]]:
    side = torch.cuda.Stream(model.device)
    side.wait_stream(torch.cuda.current_stream(model.device))
    with torch.cuda.stream(side):
        for _ in range(3):  # whatever compiles, loads or picks an algorithm does so before the capture
            chosen()
    torch.cuda.current_stream(model.device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = chosen()
    given = torch.tensor(ids, dtype=torch.int64, device="cpu")

    def replay(kept=held):  # whose memory the graph reads and writes
        tokens.copy_(given)
        graph.replay()
        return result.tolist()
    return replay


def measure(models: dict[str, Llama], cell: Cell, runs: int = RUNS, warmups: int = WARMUPS) -> dict[str, list[float]]:
    """Milliseconds of each run of each contender, which take turns. Raises MemoryError where it does not fit."""
    first = next(iter(models.values()))
    if cell.behind + cell.new > first.config.context:
        raise ValueError(f"context must fit in {first.config.name}'s {first.config.context} tokens, got {cell}")
    try:
        cache = first.cache(cell.batch, cell.behind + cell.new)
        cache.kv.normal_()  # zeros would draw less power than numbers do
        steps = {name: step(model, cache, cell) for name, model in models.items()}
        samples: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(warmups + runs):
            for name, run in steps.items():
                start = time.perf_counter()
                run()
                samples[name].append(1e3 * (time.perf_counter() - start))
    except torch.OutOfMemoryError as error:
        raise MemoryError(f"{cell} does not fit beside {first.config.name}: {str(error).splitlines()[0]}") from None
    return {name: ms[warmups:] for name, ms in samples.items()}


def row(model: str, ops: str, cell: Cell, ms: Sequence[float]) -> dict:
    """A row of serving.csv; fewer milliseconds are more tokens a second."""
    p05, p50, p95 = (float(value) for value in np.percentile(ms, (5, 50, 95)))
    rates = {f"tokens_per_s_{name}": 1e3 * cell.batch * cell.new / value
             for name, value in (("p05", p95), ("p50", p50), ("p95", p05))}
    return {"model": model, "ops": ops, "phase": cell.phase, "batch": cell.batch, "context": cell.context, **rates,
            "ms_p05": p05, "ms_p50": p50, "ms_p95": p95, "recorded_at": records.now(), "source": source()}


def contender(first: Llama, ops: str) -> Llama:
    """The same weights, not copied, under other ops; SHAREABLE are a GPU's invariant ones, or a CPU's tiled ones."""
    if ops != SHAREABLE:
        return first.using(ops)
    weights, fixed = first.weights(), "invariant" if first.device.type == "cuda" else "tiled"
    return Llama(replace(first.config, shared=max(SHARED)), ops=fixed, dtype=first.dtype, device=first.device,
                 weights=lambda name, shape: weights[name])


def source() -> str:
    """The code that decides a row: this file, the model and its ops."""
    return provenance.source(__file__)


def record(name: str, folder, ops: Sequence[str], wanted: Sequence[Cell], *, runs: int = RUNS, again: bool = False,
           said: Callable[[str], None] = print) -> pd.DataFrame:
    """Time these cells, each written as soon as it is measured; returns serving.csv whole.

    Cells of which this very code has recorded all contenders are skipped, unless `again`. One that does not fit is
    named and left out.
    """
    device, models = runtime.device(), {}
    records.note_machine(folder, SERVING.file, **bench.ceilings(device, records.read_machine(folder)))
    for cell in wanted:
        if not again and _done(folder, name, cell) >= set(ops):
            continue
        if not models:
            first = model_of(name, next(each for each in ops if each != SHAREABLE), device)
            models = {each: contender(first, each) for each in ops}
        try:
            found = measure(models, cell, runs)
        except MemoryError as error:
            said(f"left out: {error}")
            continue
        SERVING.merge(folder, [row(name, each, cell, ms) for each, ms in found.items()])
        said(f"{cell.phase}, batch {cell.batch}, context {cell.context}: "
             + ", ".join(f"{each} {np.median(ms):.3f} ms" for each, ms in found.items()))
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return SERVING.read(folder)


def _done(folder, model: str, cell: Cell) -> set[str]:
    rows = SERVING.read(folder)
    mine = (rows.model == model) & (rows.phase == cell.phase) & (rows.batch == cell.batch)
    return set(rows[mine & (rows.context == cell.context) & rows.source.isin(provenance.known_as(source()))].ops)


def _arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m kernels serving", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(dict.fromkeys(["byte", *PRESETS])),
                        default="llama-3.1-8b" if runtime.HAS_GPU else "byte")
    parser.add_argument("--ops", nargs="+", choices=(*NAMES, FROZEN, SHAREABLE))
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=PHASES)
    parser.add_argument("--cells", nargs="+", help="instead: BATCHxCONTEXT for decode, TOKENS for prefill")
    parser.add_argument("--runs", type=int, default=RUNS, help=f"timed runs a cell, at least {RUNS}")
    parser.add_argument("--rates", type=float, nargs="+", default=arrivals.RATES, help="arrivals a second")
    parser.add_argument("--requests", type=int, default=arrivals.REQUESTS, help="that arrive, in each of three passes")
    parser.add_argument("--out", default=records.DATA, help="the data folder")
    parser.add_argument("--machine", help="the folder's name under it (default: from the device)")
    parser.add_argument("--again", action="store_true", help="measure cells that are recorded already")
    a = parser.parse_args(argv)
    if a.ops == [SHAREABLE]:
        parser.error(f"--ops {SHAREABLE} is timed beside others, such as invariant")
    if SHAREABLE in (a.ops or ()) and "arrivals" in a.phases and not a.cells:
        parser.error(f"--ops {SHAREABLE} is timed in decode and prefill: name --phases or --cells")
    if a.runs < RUNS:
        parser.error(f"--runs must be at least {RUNS} for a recorded cell, got {a.runs}")
    return a


def main(argv=None) -> int:
    a, device = _arguments(argv), runtime.device()
    if device.type == "cpu":
        torch.set_num_threads(1)  # the steps of a small model are slower with more
    ops = a.ops or OPS[device.type]
    wanted = [parsed(text) for text in a.cells] if a.cells else list(cells(device.type, a.phases))
    folder = records.open_machine(a.out, a.machine)
    try:
        record(a.model, folder, ops, wanted, runs=a.runs, again=a.again, said=_say)
        if "arrivals" in a.phases and not a.cells:
            arrivals.record(a.model, folder, ops, a.rates, a.requests, again=a.again, said=_say)
    except KeyboardInterrupt:
        print(f"stopped; what was measured is in {folder}, and the same command goes on from there", file=sys.stderr)
        return 130
    return 0


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
