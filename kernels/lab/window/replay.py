"""What a verify pass costs at work: G windows of W tokens, W x G = 512, each behind a prefix that it attends to.

    python -m kernels window --curves verify --ops default invariant fused

verify  the 512 tokens copied to the device, the forward, a choice behind each token and the choices back on the host;
        all on the device is one CUDA graph. A CPU has no graph: there it is eager
floor   as in measure.py, with logits behind every token, and the prefixes' keys and values read once at the copy's
        bandwidth

A cell whose keys and values do not fit is a row without times. Ops take turns, on one cache.
"""
from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd
import torch

from ... import runtime
from ...model.cache import KVCache, free_memory
from ...model.config import Config
from ...model.llama import Llama
from .. import bench, provenance, records
from . import measure
from .measure import RUNS, VERIFY_COST, WARMUPS, Ceilings, Watch

CURVE = "verify"
PREFIXES = (1024, 4096)
TOKENS = 512  # of a pass


@dataclass(frozen=True)
class Cell:
    """One shape of a pass: `group` windows of `window` tokens, each behind `prefix` tokens."""

    window: int
    prefix: int
    group: int

    @property
    def tokens(self) -> int:
        return self.window * self.group

    def kv_bytes(self, config: Config, dtype: torch.dtype) -> int:
        """Of the keys and values of all requests, with those of the windows."""
        token = config.layers * 2 * config.kv_heads * config.head_dim * dtype.itemsize
        return self.group * (self.prefix + self.window) * token

    def floor_ms(self, config: Config, dtype: torch.dtype, ceilings: Ceilings) -> float:
        """The least time of the products, and of reading each key and value once."""
        read = self.kv_bytes(config, dtype) / (ceilings.copy_gbytes_per_s * 1e9)
        return measure.floor_ms(config, self.tokens, dtype, ceilings, logits=self.tokens) + 1e3 * read

    def pass_bytes(self, config: Config, dtype: torch.dtype, ops: int) -> int:
        """About the bytes of the cache and of passes with so many ops, whose graphs each keep what they make."""
        widest = 3 * config.intermediate_size + 8 * config.hidden_size + config.vocab_size
        return self.kv_bytes(config, dtype) + ops * self.tokens * widest * dtype.itemsize

    def __str__(self):
        return f"{self.group} windows of {self.window} tokens behind {self.prefix}"


def cells(config: Config, windows: Iterable[int], prefixes: Iterable[int] = PREFIXES,
          tokens: int = TOKENS) -> list[Cell]:
    """The shapes of passes of `tokens` tokens. ValueError for a window that does not divide them, or a context left."""
    found = []
    for window in sorted(set(windows)):
        if window < 1 or tokens % window:
            raise ValueError(f"windows of curve {CURVE} must divide the {tokens} tokens of a pass, got {window}")
        for prefix in prefixes:
            if prefix + window > config.context:
                raise ValueError(f"a window of {window} tokens behind {prefix} is longer than {config.name}'s context "
                                 f"of {config.context}")
            found.append(Cell(window, prefix, tokens // window))
    return found


def source() -> str:
    """The code that decides a row: this file, measure.py, the model and its ops."""
    return provenance.source(__file__, measure.__file__)


def verify_pass(model: Llama, cache: KVCache, cell: Cell) -> Callable[[], list[int]]:
    """A function that replays a cell's tokens behind what its cache holds, and returns the choice behind each."""
    ids = [(7919 * i + 13) % model.config.vocab_size for i in range(cell.tokens)]
    tokens = torch.tensor(ids, dtype=torch.int64, device=model.device)
    batch = cache.batch([cell.window] * cell.group, [cell.prefix] * cell.group)

    def chosen():
        return model.forward(tokens, batch, cache, logits="all").argmax(-1)

    replay = measure.captured(model.device, chosen) if model.device.type == "cuda" else chosen

    def step(held=(cache, batch)):  # whose memory a graph reads and writes
        tokens.copy_(torch.tensor(ids, dtype=torch.int64, device="cpu"))
        return replay().tolist()
    return step


def verify_cost(model: Llama, shapes: Sequence[Cell], ops: Sequence[str] = ("default",), *, runs: int = RUNS,
                warmups: int = WARMUPS, done: pd.DataFrame | None = None, ceilings: Ceilings | None = None,
                watch: Watch = Watch()) -> pd.DataFrame:  # noqa: B008
    """Measure passes of these shapes; VERIFY_COST's columns, one row a (cell, ops), without times where it cannot fit.

    Rows in `done` that this very code measured are not measured again. Raises ValueError for ops that say nothing here.
    """
    measure.checked(model.config, model.device, (), (), ops, runs, warmups)
    ceilings, rows = ceilings or Ceilings.measured(model.device), []
    for cell, names in _todo(shapes, ops, done):
        if watch.stop is not None and watch.stop.is_set():
            break
        times = _measured(model, cell, names, runs, warmups)
        floor = cell.floor_ms(model.config, model.dtype, ceilings)
        for name in names:
            rows.append(_row(name, cell, times[name] if times else None, floor))
            if watch.on_point:
                watch.on_point(rows[-1])
    return pd.DataFrame(rows, columns=list(VERIFY_COST.columns))


def _todo(shapes, ops, done) -> Iterator[tuple[Cell, list[str]]]:
    same = done[done.source.isin(provenance.known_as(source()))] if done is not None and len(done) else None
    skip = set() if same is None else set(same[list(VERIFY_COST.key)].itertuples(index=False, name=None))
    for cell in shapes:
        names = [name for name in dict.fromkeys(ops)
                 if (CURVE, name, cell.window, cell.prefix, cell.group) not in skip]
        if names:
            yield cell, names


def _measured(model: Llama, cell: Cell, ops: list[str], runs: int, warmups: int) -> dict[str, list[float]] | None:
    """{ops: milliseconds, one a run}, interleaved; None, said on stderr, where the cell does not fit."""
    needed, free = cell.pass_bytes(model.config, model.dtype, len(ops)), free_memory(model.device)
    if free is not None and needed > free:
        return _no_room(cell, model, f"needs about {bench.gigabytes(needed)}")
    try:
        cache = model.cache(cell.group, cell.prefix + cell.window)
        cache.kv.normal_(generator=torch.Generator(model.device).manual_seed(0))
        steps = {name: verify_pass(model.using(name), cache, cell) for name in ops}
        samples: dict[str, list[float]] = {name: [] for name in ops}
        for _ in range(warmups + runs):
            for name, step in steps.items():
                start = time.perf_counter()
                step()
                samples[name].append(1e3 * (time.perf_counter() - start))
    except (torch.OutOfMemoryError, MemoryError) as error:
        return _no_room(cell, model, str(error).splitlines()[0])
    return {name: ms[warmups:] for name, ms in samples.items()}


def _no_room(cell: Cell, model: Llama, why: str) -> None:
    free = free_memory(model.device)
    beside = "" if free is None else f", and {bench.gigabytes(free)} are free beside the weights"
    print(f"{model.config.name}: {cell} do not fit: {why}{beside}", file=sys.stderr)


def _row(ops: str, cell: Cell, ms: list[float] | None, floor: float) -> dict:
    p05, p50, p95 = (float(v) for v in np.percentile(ms, (5, 50, 95))) if ms else [float("nan")] * 3
    return {"curve": CURVE, "ops": ops, "tokens": cell.window, "prefix": cell.prefix, "group": cell.group,
            "ms_p05": p05, "ms_p50": p50, "ms_p95": p95, "ms_per_token_p50": p50 / cell.tokens, "floor_ms": floor,
            "recorded_at": records.now(), "source": source()}


def record(model: str, folder, shapes: Sequence[Cell], ops: Sequence[str], *, runs: int = RUNS,
           warmups: int = WARMUPS, again: bool = False) -> pd.DataFrame:
    """verify_cost of a preset, each cell written into `folder` as it is measured; returns the whole table."""
    table = measure.table_for(model, folder)
    done = None if again else table.read(folder)
    if not list(_todo(shapes, ops, done)):
        return table.read(folder)
    device = runtime.device()
    ceilings, llama = Ceilings.measured(device, records.read_machine(folder)), Llama(model, device=device)
    first = {"verify_cost_model": model} if table is VERIFY_COST else {}
    records.note_machine(folder, table.file, **asdict(ceilings), **first)
    verify_cost(llama, shapes, ops, runs=runs, warmups=warmups, done=done, ceilings=ceilings,
                watch=Watch(on_point=lambda row: table.merge(folder, [row])))
    return table.read(folder)
