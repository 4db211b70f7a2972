"""Measure this machine: every op, at sizes that it can do, into data/<machine>/token_sweep.csv.

    python -m kernels record                 all ops, after an estimate of how long it takes
    python -m kernels record --estimate      the estimate alone
    python -m kernels record softmax mean    these ops alone

Each contender is tried first, and left out at token counts at which a call takes too long or the data is too large.
A GPU does each op's own shapes. A CPU does the first of them and small ones; there Triton is interpreted, which takes
some milliseconds for each row, so it does few rows of small shapes, a few times. An interrupted record goes on where it
was.
"""
from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from .. import OPS, runtime
from ..op import DTYPES, Op, Shape
from . import bench, records
from .sweep.measure import TOKENS, Sweep, sweep

RECORDED = ("cuda", "python", "triton")
RECORDED_DTYPES = ("bfloat16", "float32")
SMALL = {1: 1024, 2: 64}  # how many sizes a shape has -> the most that each is in a small one


@dataclass(frozen=True)
class Means:
    """What one contender may take: token counts, seconds and bytes a call; and how often it is measured."""

    tokens: tuple[int, ...]
    seconds: float
    bytes: int
    passes: int = 3
    repeats: int = 7


@dataclass(frozen=True)
class Cost:
    """Seconds that a call takes, and that its inputs take to make."""

    call: float
    inputs: float


@dataclass
class Part:
    """Contenders of one op, shape and dtype with the same token counts, and about how many seconds they take."""

    sweep: Sweep
    seconds: float


@dataclass
class Plan:
    """What to measure of one op, and in words what of it and what not."""

    parts: list[Part] = field(default_factory=list)
    words: list[str] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return sum(part.seconds for part in self.parts)


def means(name: str, device: torch.device) -> Means:
    """What this contender may take on this machine."""
    if device.type == "cuda":
        return Means(TOKENS, 0.1, torch.cuda.mem_get_info(device)[0] // 16)
    if name == "triton":
        return Means((1, 2, 8), 2.0, 150_000, passes=1, repeats=3)
    return Means((1, 8, 32, 128, 256, 512), 0.2, 1 << 23)


def shapes(op: Op, device: torch.device) -> list[str]:
    """Which shapes of an op this machine records; on a CPU small ones first."""
    if device.type == "cuda":
        return list(op.shapes)
    return list(dict.fromkeys([*map(small, op.shapes), op.shapes[0]]))


def small(shape: str) -> str:
    """A shape of the same form that takes a CPU a moment."""
    sizes = Shape.parse(shape)
    most = SMALL[min(sum(size is not True for size in sizes.values()), 2)]
    return str(Shape(**{name: size if size is True else min(size, most) for name, size in sizes.items()}))


def plan(op: Op, device: torch.device) -> Plan:
    """Try every contender of an op, and say what fits."""
    made = Plan()
    for dtype in RECORDED_DTYPES:
        pace: dict[str, float] = {}  # of each contender: seconds for an operation, at the shape before
        for shape in shapes(op, device):
            times, said = {}, []
            for name in RECORDED:
                try:
                    times[name] = tried(op, name, shape, dtype, device, pace)
                    said.append(f"{name} up to {max(times[name])}" if times[name] else f"{name} too large or too slow")
                except Exception as error:  # noqa: BLE001 - a contender that cannot run must not cost the others
                    said.append(f"{name} cannot: {str(error).splitlines()[0][:100]}")
            made.words.append(f"  {op.name} {shape} {dtype}, tokens: {', '.join(said)}")
            made.parts += _parts(op, shape, dtype, times, device)
    return made


def tried(op: Op, name: str, shape: str, dtype: str, device, pace: dict[str, float]) -> dict[int, Cost]:
    """What a call costs at each token count that the contender's means allow. Raises what the contender raises.

    `pace` keeps from shape to shape how long it takes for an operation, so that what would take minutes is not tried.
    """
    found: dict[int, Cost] = {}
    allowed = means(name, device)
    for count in allowed.tokens:
        work = op.work(count, shape, DTYPES[dtype])
        expected = _expected(found, count) if found else pace.get(name, 0) * work.flops / 10
        if work.bytes > allowed.bytes or expected > 2 * allowed.seconds:
            break
        cost = _cost(op, name, count, shape, dtype, device)
        if not found:
            pace[name] = cost.call / work.flops
        if cost.call > allowed.seconds:
            break
        found[count] = cost
    return found


def _expected(found: dict[int, Cost], count: int) -> float:
    """Seconds to expect of a call at a larger count: on the line through the last two, if there are two."""
    counts = list(found)[-2:]
    last = found[counts[-1]].call
    more = last - found[counts[0]].call
    return last + more * (count - counts[-1]) / max(counts[-1] - counts[0], 1)


def _cost(op, name, count, shape, dtype, device) -> Cost:
    """The best of two or three calls, since one may compile or be slow by chance."""
    begun = time.perf_counter()
    arguments = op.inputs(count, shape, DTYPES[dtype], device, 0)
    inputs, calls = time.perf_counter() - begun, []
    while len(calls) < 2 or len(calls) < 3 and sum(calls) < 0.5:
        start = time.perf_counter()
        op.implementation(name)(*arguments)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        calls.append(time.perf_counter() - start)
    return Cost(min(calls), inputs)


def _parts(op, shape, dtype, times, device) -> Iterator[Part]:
    """Contenders with the same means and counts are measured together, interleaved."""
    alike: dict = {}
    for name, found in times.items():
        alike.setdefault((means(name, device).passes, means(name, device).repeats, tuple(found)), []).append(name)
    for (passes, repeats, tokens), names in alike.items():
        if tokens:
            wanted = Sweep(op, tokens, names, (dtype,), (shape,), passes=passes, repeats=repeats, device=device)
            yield Part(wanted, sum(_seconds(wanted, *point) for name in names for point in times[name].items()))


def _seconds(wanted: Sweep, tokens: int, cost: Cost) -> float:
    """About how long one contender takes at one point: its calls on each clock, and those that compare its bits."""
    size = wanted.op.work(tokens, wanted.shapes[0], DTYPES[wanted.dtypes[0]]).bytes
    calls = {"cold": min(48, max(2, 150_000_000 // size)), "graph": 20 if size < 1 << 26 else 4}
    rounds = sum(0.05 + wanted.repeats * max(calls[clock] * cost.call if clock in calls else 0.02, cost.call)
                 for clock in wanted.clocks)
    return 2 * (cost.call + cost.inputs) + wanted.passes * (rounds + 2 * cost.call + cost.inputs)


def record(parts: Iterable[Part], folder, again: bool = False) -> int:
    """Measure these, each point written as soon as it is measured; how many rows were written.

    Points that this very code has recorded are skipped, unless `again`.
    """
    written = 0
    for part in parts:
        part.sweep.again = again
        for rows in sweep(part.sweep, done=records.TOKEN_SWEEP.read(folder), progress=False):
            records.TOKEN_SWEEP.merge(folder, rows)
            written += len(rows)
    return written


def minutes(seconds: float) -> str:
    return f"about {seconds / 60:.0f} min" if seconds >= 90 else f"about {max(seconds, 1):.0f} s"


def _arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m kernels record", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", metavar="op", help=f"which to record: {', '.join(OPS)} (default: all)")
    parser.add_argument("--estimate", action="store_true", help="say how long it would take, and measure nothing")
    parser.add_argument("--out", default=records.DATA, help="the data folder")
    parser.add_argument("--machine", help="the folder's name under it (default: from the device)")
    parser.add_argument("--again", action="store_true", help="measure points that are recorded already")
    a = parser.parse_args(argv)
    if unknown := set(a.ops) - set(OPS):
        parser.error(f"op must be one of {', '.join(OPS)}, got {', '.join(sorted(unknown))}")
    return a


def _planned(names: Sequence[str], device) -> dict[str, Plan]:
    """The plan of each op; prints what fits and how long it takes."""
    plans = {}
    for name in names:
        plans[name] = plan(OPS[name], device)
        print(*plans[name].words, f"{name}: {minutes(plans[name].seconds)}", sep="\n", flush=True)
    print(f"{minutes(sum(made.seconds for made in plans.values()))} in all", flush=True)
    return plans


def main(argv=None) -> int:
    a, device = _arguments(argv), runtime.device()
    folder = None if a.estimate else records.open_machine(a.out, a.machine)  # refused before anything is tried
    print(f"{records.device_name()}: trying what fits, for a minute or two", flush=True)
    plans = _planned(a.ops or list(OPS), device)
    if a.estimate:
        return 0
    try:
        records.note_machine(folder, records.TOKEN_SWEEP.file,
                             **bench.ceilings(device, records.read_machine(folder)))
        for name, made in plans.items():
            start, written = time.monotonic(), record(made.parts, folder, a.again)
            took = f"recorded in {time.monotonic() - start:.0f} s" if written else "was recorded already"
            print(f"{name}: {took}", flush=True)
    except KeyboardInterrupt:
        print(f"stopped; what was measured is in {folder}, and the same command goes on from there", file=sys.stderr)
        return 130
    print(f"{folder / records.TOKEN_SWEEP.file} is written; draw it with: python -m figures --machine {folder.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
