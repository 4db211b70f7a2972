"""What a window of tokens costs: one request, an empty prefix, one forward over the window, one token chosen.

    python -m kernels window --model llama-3.1-8b --windows 16 32 64 128 --curves paper graph --out data

paper  eager, host wall clock: the batch made on the host, its tokens and positions copied to the device, the
       forward, argmax, and the chosen token back on the host
graph  the same, with forward and argmax replayed as one CUDA graph
verify a verifier's pass at work: replay.py says what it is
floor  what the matrix products alone must take: for each the longer of its bytes at the measured copy
       bandwidth and its FLOPs at the measured rate, summed

The curves `paper` and `graph` are timed interleaved in one run. Method of `paper`: LLM-42's chart of its verifier.
"""
from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from ... import runtime
from ...model.cache import free_memory
from ...model.config import PRESETS, Config, preset
from ...model.llama import Llama
from .. import bench, provenance, records

WINDOWS = (16, 32, 64, 128, 256, 512, 1024)
WARMUPS, RUNS = 10, 50
OPS = {"cuda": ("default", "invariant", "fused"), "cpu": ("default", "tiled")}
NO_GRAPH = "curve graph replays a CUDA graph and needs a CUDA GPU; on a CPU there is paper alone"
VERIFY_COST = records.Table(
    "verify_cost.csv",
    ("curve", "ops", "tokens", "prefix", "group", "ms_p05", "ms_p50", "ms_p95", "ms_per_token_p50", "floor_ms",
     "recorded_at", "source"),
    ("curve", "ops", "tokens", "prefix", "group"),
)


@dataclass(frozen=True)
class Ceilings:
    """What this machine reaches at best: GB/s of a copy (read plus written), TFLOP/s of a large product."""

    copy_gbytes_per_s: float
    matmul_tflops: float

    @classmethod
    def measured(cls, device: torch.device, known: Mapping = MappingProxyType({})) -> Ceilings:
        """Those that the machine.json `known` holds, the others measured now."""
        ceilings = cls(**bench.ceilings(device, known))
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return ceilings


def products(config: Config, tokens: int, logits: int = 1) -> list[tuple[int, int, int]]:
    """The (M, N, K) of every matrix product of a forward over `tokens` tokens that gives `logits` rows of logits."""
    layer = [(tokens, *shape) for shape in config.layer_shapes.values() if len(shape) == 2]
    return config.layers * layer + [(logits, config.vocab_size, config.hidden_size)]


def floor_ms(config: Config, tokens: int, dtype: torch.dtype, ceilings: Ceilings, logits: int = 1) -> float:
    """The least time the matrix products of one forward can take, in milliseconds. Attention is not in it."""
    total = 0.0
    for m, n, k in products(config, tokens, logits):
        moved = (m * k + n * k + m * n) * dtype.itemsize
        total += max(moved / (ceilings.copy_gbytes_per_s * 1e9), 2 * m * n * k / (ceilings.matmul_tflops * 1e12))
    return total * 1e3


def curves_on(device: torch.device) -> tuple[str, ...]:
    """The curves that can be measured on this device."""
    return ("paper", "graph") if device.type == "cuda" else ("paper",)


def ops_on(device: torch.device) -> tuple[str, ...]:
    """The ops whose time says something on this device: on a CPU `invariant` is the specification, which nobody times.

    `tiled` is batch-invariant there at speed, and in float32.
    """
    return OPS["cuda" if device.type == "cuda" else "cpu"]


@dataclass(frozen=True)
class Watch:
    """How a run is followed while it measures, and ended.

    on_point  is called with each row as soon as it is measured
    on_run    is called after each round with the rounds done and their total
    stop      once set, ends the run after the current round; the unfinished window is dropped
    progress  shows a progress bar
    """

    on_point: Callable[[dict], None] | None = None
    on_run: Callable[[int, int], None] | None = None
    stop: threading.Event | None = None
    progress: bool = False


def window_cost(model: Llama | str, windows: Sequence[int] = WINDOWS, curves: Sequence[str] | None = None,
                ops: Sequence[str] = ("default",), *, runs: int = RUNS, warmups: int = WARMUPS,
                done: pd.DataFrame | None = None, ceilings: Ceilings | None = None,
                watch: Watch = Watch()) -> pd.DataFrame:
    """Measure windows of tokens; returns VERIFY_COST's columns, one row a (curve, ops, window), times in ms.

    model     a Llama, or a preset's name for one with random weights on runtime.device()
    curves    default: all that this device has
    done      rows recorded before: those measured by this very code are not measured again
    ceilings  default: measured now

    Raises ValueError for windows, curves, ops or counts that cannot be measured, and MemoryError that names the sizes.
    """
    device = runtime.device() if isinstance(model, str) else model.device
    config = preset(model) if isinstance(model, str) else model.config
    curves = checked(config, device, windows, curves, ops, runs, warmups)
    todo = _todo(windows, curves, ops, done)
    rows: list[dict] = []
    if not todo:
        return pd.DataFrame(rows, columns=list(VERIFY_COST.columns))
    ceilings = ceilings or Ceilings.measured(device)
    model = Llama(model, device=device) if isinstance(model, str) else model
    rounds = _Rounds(len(todo), warmups, runs, watch)
    with rounds.bar:
        for window, keys in todo:
            floor = floor_ms(config, window, model.dtype, ceilings)
            for (curve, name), ms in _measure(model, window, keys, rounds).items():
                rows.append(_row(curve, name, window, ms, floor))
                if watch.on_point:
                    watch.on_point(rows[-1])
            if device.type == "cuda":
                torch.cuda.empty_cache()  # a graph's own memory
            if rounds.stopped():
                break
    return pd.DataFrame(rows, columns=list(VERIFY_COST.columns))


def checked(config: Config, device: torch.device, windows: Sequence[int], wanted: Sequence[str] | None,
            ops: Sequence[str], runs: int, warmups: int) -> tuple[str, ...]:
    """The curves wanted, or all that this device has. ValueError that says what cannot be measured."""
    for window in windows:
        if not isinstance(window, int) or not 1 <= window <= config.context:
            raise ValueError(f"windows must be whole numbers in 1..{config.context}, the context of {config.name}, "
                             f"got {window!r}")
    wanted = tuple(dict.fromkeys(curves_on(device) if wanted is None else wanted))
    for curve in wanted:
        if curve not in ("paper", "graph"):
            raise ValueError(f"curve must be paper or graph, got {curve!r}")
        if curve not in curves_on(device):
            raise ValueError(NO_GRAPH)
    for name in ops:
        if name not in ops_on(device):
            raise ValueError(f"ops must be {' or '.join(ops_on(device))} on {device.type}, got {name!r}")
    if runs < 1 or warmups < 0:
        raise ValueError(f"runs must be at least 1 and warmups at least 0, got {runs} and {warmups}")
    return wanted


def source() -> str:
    """The code that decides a row: this file, the model and its ops."""
    return provenance.source(__file__)


def _todo(windows, curves, ops, done: pd.DataFrame | None) -> list[tuple[int, list[tuple[str, str]]]]:
    """Each window with the (curve, ops) this code has not measured there yet."""
    skip = set()
    if done is not None and len(done):
        same_code = done[done.source.isin(provenance.known_as(source()))]
        skip = set(same_code[list(VERIFY_COST.key)].itertuples(index=False, name=None))
    wanted = [(c, o) for o in dict.fromkeys(ops) for c in curves]
    todo = [(w, [(c, o) for c, o in wanted if (c, o, w, 0, 1) not in skip]) for w in sorted(set(windows))]
    return [(w, keys) for w, keys in todo if keys]


class _Rounds:
    """Counts the rounds, reports each one, and says when to stop."""

    def __init__(self, windows: int, warmups: int, runs: int, watch: Watch):
        self.warmups, self.runs, self.watch, self.finished = warmups, runs, watch, 0
        self.total = windows * (warmups + runs)
        self.bar = tqdm(total=self.total, desc="windows", unit="round", disable=not watch.progress, file=sys.stderr)

    def stopped(self) -> bool:
        return self.watch.stop is not None and self.watch.stop.is_set()

    def tick(self):
        self.finished += 1
        self.bar.update()
        if self.watch.on_run:
            self.watch.on_run(self.finished, self.total)


def _measure(model, window, keys, rounds) -> dict[tuple[str, str], list[float]]:
    """{(curve, ops): milliseconds, one a run}, interleaved; {} if stopped before the last round."""
    try:
        steps = {(c, o): {"paper": paper_pass, "graph": graph_pass}[c](model.using(o), window) for c, o in keys}
        samples = {key: [] for key in steps}
        for _ in range(rounds.warmups + rounds.runs):
            if rounds.stopped():
                return {}
            for key, step in steps.items():
                start = time.perf_counter()
                step()
                samples[key].append(1e3 * (time.perf_counter() - start))
            rounds.tick()
    except torch.OutOfMemoryError:
        free = (free_memory(model.device) or 0) / 1e9
        raise MemoryError(f"a window of {window} tokens does not fit beside {model.config.name}, whose weights take "
                          f"{model.nbytes / 1e9:.1f} GB: {model.device} has {free:.1f} GB free") from None
    return {key: ms[rounds.warmups:] for key, ms in samples.items()}


def paper_pass(model: Llama, window: int) -> Callable[[], int]:
    """A function that prepares a prompt on the host, runs it and returns the token chosen."""
    cache, ids = model.cache(1, window), _prompt(model, window)

    def step():
        tokens = torch.tensor([ids], dtype=torch.int64, device=model.device)
        return model(tokens, cache).argmax(-1).item()
    return step


def graph_pass(model: Llama, window: int) -> Callable[[], int]:
    """The same, with everything on the device captured once and replayed; the batch is made before."""
    cache, ids = model.cache(1, window), _prompt(model, window)
    tokens, batch = torch.tensor(ids, dtype=torch.int64, device=model.device), cache.batch([window], [0])

    def chosen():
        return model.forward(tokens, batch, cache).argmax(-1)

    replay = captured(model.device, chosen)

    def step(held=(cache, batch)):  # whose memory the graph reads and writes
        tokens.copy_(torch.tensor(ids, dtype=torch.int64, device="cpu"))
        return replay().item()
    return step


def captured(device: torch.device, chosen: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """What `chosen` does on the device as one CUDA graph: a function that replays it and returns its result."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):  # whatever compiles, loads or picks an algorithm does so before the capture
            chosen()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = chosen()

    def replay():
        graph.replay()
        return result
    return replay


def _prompt(model: Llama, window: int) -> list[int]:
    return [(7919 * i + 13) % model.config.vocab_size for i in range(window)]


def _row(curve, ops, window, ms, floor) -> dict:
    p05, p50, p95 = (float(v) for v in np.percentile(ms, (5, 50, 95)))
    return {"curve": curve, "ops": ops, "tokens": window, "prefix": 0, "group": 1, "ms_p05": p05, "ms_p50": p50,
            "ms_p95": p95, "ms_per_token_p50": p50 / window, "floor_ms": floor, "recorded_at": records.now(),
            "source": source()}


def table_for(model: str, folder) -> records.Table:
    """verify_cost.csv for the first model recorded in this folder, verify_cost.<model>.csv for any other."""
    if records.read_machine(folder).get("verify_cost_model", model) == model:
        return VERIFY_COST
    return replace(VERIFY_COST, file=f"verify_cost.{model}.csv")


def record(model: str, folder, windows: Sequence[int] = WINDOWS, curves: Sequence[str] | None = None,
           ops: Sequence[str] = ("default",), *, runs: int = RUNS, warmups: int = WARMUPS, again: bool = False,
           progress: bool = False) -> pd.DataFrame:
    """window_cost of a preset, each point written into `folder` as it is measured; returns the whole table.

    Points that this very code has recorded there are skipped, unless `again`. Raises as window_cost does.
    """
    device, table = runtime.device(), table_for(model, folder)
    curves = checked(preset(model), device, windows, curves, ops, runs, warmups)
    done = None if again else table.read(folder)
    if not _todo(windows, curves, ops, done):
        return done
    ceilings, llama = Ceilings.measured(device, records.read_machine(folder)), Llama(model, device=device)
    first = {"verify_cost_model": model} if table is VERIFY_COST else {}
    records.note_machine(folder, table.file, **asdict(ceilings), **first)
    watch = Watch(on_point=lambda row: table.merge(folder, [row]), progress=progress)
    window_cost(llama, windows, curves, ops, runs=runs, warmups=warmups, done=done, ceilings=ceilings, watch=watch)
    return table.read(folder)


def _arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m kernels window", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(PRESETS), default="llama-3.1-8b" if runtime.HAS_GPU else "small")
    parser.add_argument("--windows", type=int, nargs="+", default=list(WINDOWS))
    parser.add_argument("--curves", nargs="+", choices=("paper", "graph", "verify"),
                        help="default: paper, and graph on a GPU")
    parser.add_argument("--ops", nargs="+", default=["default"], choices=("default", "invariant", "fused", "tiled"),
                        help="here: " + " ".join(ops_on(runtime.device())))
    parser.add_argument("--prefixes", type=int, nargs="+", default=[1024, 4096],
                        help="tokens before each window of curve verify")
    parser.add_argument("--runs", type=int, default=RUNS, help=f"timed runs a point, at least {RUNS}")
    parser.add_argument("--out", default=records.DATA, help="the data folder")
    parser.add_argument("--machine", help="the folder's name under it (default: from the device)")
    parser.add_argument("--again", action="store_true", help="measure points that are recorded already")
    arguments = parser.parse_args(argv)
    if arguments.runs < RUNS:
        parser.error(f"--runs must be at least {RUNS} for a recorded point, got {arguments.runs}")
    return arguments


def _replays(a: argparse.Namespace) -> Callable:
    """What records curve verify into a folder. ValueError, before any is made, for windows that cannot be."""
    from . import replay

    shorter = [window for window in a.windows if window <= replay.TOKENS]
    for window in sorted({*a.windows} - {*shorter}):
        print(f"note: curve verify has passes of {replay.TOKENS} tokens, and no window of {window}", file=sys.stderr)
    shapes = replay.cells(preset(a.model), shorter, a.prefixes)
    return lambda folder: replay.record(a.model, folder, shapes, a.ops, runs=a.runs, again=a.again)


def main(argv=None) -> int:
    a = _arguments(argv)
    if a.curves is None and not runtime.HAS_GPU:
        print(f"note: {NO_GRAPH}", file=sys.stderr)
    folder = None
    try:
        curves = None if a.curves is None else [curve for curve in a.curves if curve != "verify"]
        checked(preset(a.model), runtime.device(), a.windows, curves, a.ops, a.runs, WARMUPS)
        replays = "verify" in (a.curves or ()) and _replays(a)
        folder = records.open_machine(a.out, a.machine)
        if curves != []:
            record(a.model, folder, a.windows, curves, a.ops, again=a.again, runs=a.runs, progress=True)
        if replays:
            replays(folder)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (MemoryError, OSError, runtime.Unavailable, torch.OutOfMemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"stopped; what was measured is in {folder}, and the same command goes on from there", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
