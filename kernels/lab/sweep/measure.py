"""Token sweeps: time and bits of an op's contenders over token counts.

    python -m kernels sweep rms_norm --tokens 1 8 32 --out data

A point is one (dtype, shape, tokens). All its contenders are timed in one interleaved run, and each gets a verdict: do
its rows at this token count equal, bit for bit, its rows at the largest count of the sweep or of its record?
"""
from __future__ import annotations

import argparse
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

import pandas as pd
import torch
from tqdm.auto import tqdm

from ... import OPS, bits
from ...op import DTYPES
from .. import bench, older, provenance, records
from .estimate import refuse_too_large
from .options import TOKENS, Sweep

KEY = list(records.TOKEN_SWEEP.key)


@dataclass
class Verdict:
    """Bits of one contender at one point: whether the rows equal those at the largest count, how many elements differ,
    and a digest.
    """

    same: bool
    differ: int
    digest: str


@dataclass(frozen=True)
class _Watch:
    """How a sweep is followed and ended; see `sweep`."""

    on_error: Callable[[str, Exception], None]
    on_start: Callable[[str], None]
    stop: threading.Event


class _Stopped(Exception):
    """Stopped within a point, whose contenders are not all measured."""


def sweep(wanted: Sweep, *, done: pd.DataFrame | None = None, stop: threading.Event | None = None,
          on_error: Callable[[str, Exception], None] | None = None,
          on_start: Callable[[str], None] | None = None, progress: bool = True) -> Iterator[list[dict]]:
    """Yield the finished rows (dicts of data/'s columns) of each point, pass after pass.

    `done` are rows already recorded: points they cover with this code are skipped, unless `again` is wanted; a
    contender's bits are compared with those at the largest count it is recorded at. `stop`, once set, ends the sweep
    after the contender that runs. `on_error(where, exception)` is called with each contender that fails, once and not
    in every pass, `on_start(what)` with what is about to be measured, in words. Raises MemoryError, before anything is
    allocated, for points that cannot fit.
    """
    samples: dict[tuple, bench.Timing] = {}
    watch = _Watch(_once(on_error or _print_error), on_start or (lambda what: None), stop or threading.Event())
    checker = Checker(wanted, done, watch.on_start)
    todo = to_measure(wanted, done)
    refuse_too_large(wanted, todo, largest_recorded(wanted, done))
    bar = tqdm(todo * wanted.passes, desc=f"{wanted.op.name} sweep", disable=not progress, file=sys.stderr)
    with bar, suppress(_Stopped):
        for point in bar:
            yield _measure_point(wanted, point, samples, checker, watch)


def to_measure(wanted: Sweep, done: pd.DataFrame | None = None) -> list[tuple[str, str, int]]:
    """The points of one pass: all, or those that `done` does not have."""
    skip = set() if wanted.again else _recorded(wanted, done)
    return [point for point in wanted.points() if point not in skip]


def largest_recorded(wanted: Sweep, done: pd.DataFrame | None = None) -> int:
    """The largest count with which bits are compared because it is recorded; 0 if there is none."""
    return max((count for (name, dtype, shape), count in _largest(wanted, done).items()
                if name in wanted.implementations and dtype in wanted.dtypes and shape in wanted.shapes), default=0)


def _largest(wanted, done) -> dict[tuple[str, str, str], int]:
    """(implementation, dtype, shape) -> the largest count recorded of the op."""
    if done is None or not len(done):
        return {}
    return done[done.op == wanted.op.name].groupby(["implementation", "dtype", "shape"]).tokens.max().to_dict()


def _once(tell: Callable[[str, Exception], None]) -> Callable[[str, Exception], None]:
    """`tell`, but not again of the same kind of error at the same place."""
    told = set()

    def call(where, error):
        if (where, type(error)) not in told:
            told.add((where, type(error)))
            tell(where, error)
    return call


def _print_error(where, error):
    tqdm.write(f"{where}: {type(error).__name__}: {str(error).splitlines()[0]}", file=sys.stderr)


def _recorded(wanted, done) -> set:
    """Points all of whose wanted rows are recorded by this very code, with at least as many repeats."""
    if done is None or not len(done):
        return set()
    rows = done[(done.op == wanted.op.name) & (done.repeats >= wanted.passes * wanted.repeats)]
    rows = rows[~older.mark(rows).older]
    have = set(rows[["implementation", "dtype", "shape", "tokens", "clock"]].itertuples(index=False, name=None))
    lines = [(name, clock) for name in wanted.implementations for clock in wanted.clocks]
    return {point for point in wanted.points() if all((name, *point, clock) in have for name, clock in lines)}


def _measure_point(wanted, point, samples, checker, watch) -> list[dict]:
    dtype, shape, tokens = point
    work = wanted.op.work(tokens, shape, DTYPES[dtype])
    contenders, rows = {}, []
    for name in wanted.implementations:
        if watch.stop.is_set():
            raise _Stopped
        try:
            checker(name, point)
            contenders[name] = wanted.op.implementation(name)
        except Exception as error:  # noqa: BLE001 - a failed point shows its error and the sweep goes on
            watch.on_error(f"{name} at {tokens} tokens, {shape}, {dtype}", error)
    for clock in wanted.clocks:
        if watch.stop.is_set():
            raise _Stopped
        watch.on_start(f"timing {', '.join(contenders)} at {tokens} tokens")
        timings = bench.measure(
            contenders, lambda i: wanted.op.inputs(tokens, shape, DTYPES[dtype], wanted.device, i), clock,
            device=wanted.device, set_bytes=work.bytes, repeats=wanted.repeats)
        for name, timing in timings.items():
            if isinstance(timing, Exception):
                watch.on_error(f"{name} at {tokens} tokens, {shape}, {dtype}, {clock}", timing)
                continue
            key = (name, *point, clock)
            samples[key] = samples[key] + timing if key in samples else timing
            rows.append(_row(wanted, key, samples[key], work, checker(name, point)))
    if wanted.device.type == "cuda":
        torch.cuda.empty_cache()
    return rows


def _row(wanted, key, timing, work, verdict) -> dict:
    name, dtype, shape, tokens, clock = key
    percentiles = timing.percentiles()
    us = percentiles["us_p50"]
    schedule = wanted.op.schedule(tokens, shape, DTYPES[dtype]) if name == "triton" else None
    return {
        "op": wanted.op.name, "implementation": name, "dtype": dtype, "shape": shape, "tokens": tokens, "clock": clock,
        **percentiles, "repeats": len(timing.us),
        "gbytes_per_s": work.bytes / us / 1e3, "tflops": work.flops / us / 1e6,
        "same_bits": verdict.same, "elements_differ": verdict.differ, "digest": verdict.digest,
        "schedule": schedule, "recorded_at": records.now(),
        "source": provenance.of_row(wanted.op, name, dtype, shape, tokens, clock, schedule),
    }


class Checker:
    """Verdicts by (implementation, point), each worked out once. Keeps the largest batch's results of one shape."""

    def __init__(self, wanted: Sweep, done: pd.DataFrame | None = None, on_start: Callable = lambda what: None):
        self.wanted, self.verdicts, self.kept, self.on_start = wanted, {}, (None, {}), on_start
        self.recorded = _largest(wanted, done)

    def __call__(self, name, point) -> Verdict:
        if (name, point) not in self.verdicts:
            self.verdicts[name, point] = self._verdict(name, point)
        return self.verdicts[name, point]

    def _verdict(self, name, point) -> Verdict:
        dtype, shape, tokens = point
        largest = max((*self.wanted.tokens, self.recorded.get((name, dtype, shape), 0)))
        if self.kept[0] != (dtype, shape):
            self.kept = ((dtype, shape), {})
        reference = self.kept[1]
        if name not in reference:
            reference[name] = self._run(name, dtype, shape, largest)
        here = reference[name] if tokens == largest else self._run(name, dtype, shape, tokens)
        differ = bits.elements_differ(tuple(r[:tokens] for r in reference[name]), here)
        return Verdict(differ == 0, differ, bits.digest(here)[:16])

    def _run(self, name, dtype, shape, tokens) -> tuple:
        self.on_start(f"running {name} at {tokens} tokens")
        arguments = self.wanted.op.inputs(tokens, shape, DTYPES[dtype], self.wanted.device, 0)
        result = self.wanted.op.implementation(name)(*arguments)
        return result if isinstance(result, tuple) else (result,)


def _arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m kernels sweep", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("op", choices=list(OPS))
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--implementations", nargs="+", default=["cuda", "python", "triton"])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"], choices=list(DTYPES))
    parser.add_argument("--shapes", nargs="+", default=[], help="such as D=8192,residual (default: the op's own)")
    parser.add_argument("--clocks", nargs="+", default=[], choices=bench.CLOCKS)
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=7, help="rounds a pass")
    parser.add_argument("--out", default=records.DATA, help="the data folder")
    parser.add_argument("--machine", help="the folder's name under it (default: from the device)")
    parser.add_argument("--again", action="store_true", help="measure points that are recorded already")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    a = _arguments(argv)
    try:
        wanted = Sweep(OPS[a.op], a.tokens, a.implementations, a.dtypes, a.shapes, a.clocks, a.passes, a.repeats,
                       a.again)
        folder = records.open_machine(a.out, a.machine)
        done = records.TOKEN_SWEEP.read(folder)
        refuse_too_large(wanted, to_measure(wanted, done), largest_recorded(wanted, done))
    except (ValueError, MemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    records.note_machine(folder, records.TOKEN_SWEEP.file,
                         **bench.ceilings(wanted.device, records.read_machine(folder)))
    try:
        for rows in sweep(wanted, done=done):
            records.TOKEN_SWEEP.merge(folder, rows)
    except KeyboardInterrupt:
        print(f"stopped; what was measured is in {folder}, and the same command goes on from there", file=sys.stderr)
        return 130
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
