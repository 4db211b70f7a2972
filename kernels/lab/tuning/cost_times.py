"""Time many schedules of the matrix product over many sizes, from which the model of time is fitted.

    python -m kernels.lab.tuning.cost_times --seconds 150               into data/<machine>/cost_times.csv
    python -m kernels.lab.tuning.cost_times --seconds 60 --part 1/4     a quarter of the weights, for one of four GPUs
    python -m kernels.lab.tuning.cost_fit                               the fit, into data/schedules/<gpu>_cost.json

Each kernel is compiled and compared with the trusted schedule in processes of their own, as the tuner does. A point is
a weight, a token count and a dtype; its schedules are timed `cold` and interleaved, with PyTorch's default among them.
A point that is in the file is not timed again, but for tiles that the design got later (cost_added.py).
"""
from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache, partial
from itertools import groupby

import numpy as np
import torch

from ... import bits, runtime
from ...op import DTYPES, Shape
from ...ops.matmul import cost
from ...ops.matmul.op import matmul as op
from ...ops.matmul.order import order
from ...ops.matmul.schedule import Schedule
from ...ops.matmul.ways import Form, suits
from .. import bench, records
from ..command import part
from ..proofs.certificates import TRUSTED, stand_in
from . import cost_design as design
from .cost_added import Todo, beside, part_of, wanting
from .tune import proved

COST_TIMES = records.Table(
    "cost_times.csv",
    ("dtype", "shape", "tokens", "schedule", "us_p50", "repeats", "same_bits", "registers", "shared_bytes",
     "recorded_at"),
    ("dtype", "shape", "tokens", "schedule"))


def candidates(n: int, k: int, tokens: int, dtype: torch.dtype, most: int) -> list[Schedule]:
    """At most so many schedules, and half as many of tiles that the design got later."""
    ways, form = _rough_ways(dtype), Form.of(n, k, tokens, dtype)
    times = np.where(suits(ways.sizes, form), cost.predicted(ways, form, design.ROUGH), np.inf)
    ranked = [ways.schedules[i] for i in times.argsort() if times[i] < 4 * times.min()]
    most = most if n % 16 == k % 16 == 0 else most // 3  # of which every kernel is compiled again
    later = [s for s in ranked if s in design.added()]
    tiles = {replace(s, stream=False, lockstep=False): s for s in reversed(later)}  # each with its fastest way
    later.sort(key=lambda s: s not in tiles.values())
    return _few([s for s in ranked if s not in design.added()], most) + _few(later, most // 2)


def _few(ranked: list[Schedule], most: int) -> list[Schedule]:
    """Those that a rough model expects to be fast, and every fifth of the others."""
    kept = ranked[:most * 4 // 5]
    return kept + ranked[len(kept)::5][:most - len(kept)]


@cache
def _rough_ways(dtype) -> cost.Ways:
    return cost.Ways.of(design.rough_tiles(dtype), lockstep=True)


def wanted(most: int, dtypes: Iterable[str] = tuple(DTYPES)) -> dict[tuple, list[Schedule]]:
    """{(dtype, n, k, tokens): schedules} of the whole design, in the order in which it is measured."""
    return {(dtype, n, k, tokens): candidates(n, k, tokens, DTYPES[dtype], most)
            for dtype, n, k, tokens in design.points() if dtype in dtypes}


def kernel_of(dtype: str, n: int, k: int, s: Schedule) -> tuple:
    """What decides a schedule's compiled kernel, or more than that."""
    odd = (n % s.block_n > 0, k % s.block_k > 0) if s.kind == "pointer" else ()
    return dtype, s, order(n, k).segments > 1, n % 16, k % 16, *odd


def good_kernels(points: dict, workers: int | None, progress: Callable[[str], None]) -> set[tuple]:
    """What `kernel_of` says of all kernels that compile, run and keep the trusted schedule's bits."""
    first: dict[tuple, tuple] = {}
    for (dtype, n, k, _), schedules in points.items():
        for s in schedules:
            first.setdefault(kernel_of(dtype, n, k, s), (n, k))
    kept = set()
    for dtype in dict.fromkeys(key[0] for key in first):
        jobs: dict[tuple, list] = {}
        for key, weight in first.items():
            if key[0] == dtype:
                jobs.setdefault((*weight, 1), []).append(key[1])
        kept |= {(dtype, *found) for found in proved(jobs, DTYPES[dtype], workers, progress)}
    return {key for key, weight in first.items() if (*key[:2], *stand_in(*weight)) in kept}


def timed(point: tuple, schedules: list[Schedule], weights: Callable, device, repeats: int) -> list[dict]:
    """Rows of COST_TIMES at one point, the default's with the schedule `cuda`; those that fail are left out."""
    dtype, n, k, tokens = point
    shape, x = Shape(N=n, K=k), partial(op.inputs, tokens, Shape(N=1, K=k), DTYPES[dtype], device)
    inputs = cache(lambda i: (x(3 * i)[0], weights(i), None))
    contenders = {"cuda": op.cuda, **{str(s): partial(op.run_schedule, s) for s in schedules}}
    timings = bench.measure(contenders, inputs, bench.clocks(device)[0], device=device, repeats=repeats,
                            set_bytes=op.work(tokens, shape, DTYPES[dtype]).bytes)
    trusted, rows = op.run_schedule(TRUSTED, *inputs(0)), []
    for name, timing in timings.items():
        if isinstance(timing, Exception):
            print(f"  {point} {name}: {type(timing).__name__}: {str(timing)[:120]}", file=sys.stderr)
            continue
        same = bits.same_bits(contenders[name](*inputs(0)), trusted)
        rows.append({"dtype": dtype, "shape": str(shape), "tokens": tokens, "schedule": name,
                     "us_p50": timing.percentiles()["us_p50"], "repeats": repeats, "same_bits": same,
                     **room(name, inputs(0)), "recorded_at": records.now()})
    return rows


_ROOM: dict[tuple, dict] = {}


def room(name: str, arguments: tuple) -> dict:
    """Registers a thread and bytes of shared memory that a schedule's kernel takes; {} on a CPU, and for `cuda`."""
    if name == "cuda" or not arguments[0].is_cuda:
        return {}
    key = name, order(*arguments[1].shape).segments > 1
    if key not in _ROOM:
        kernel = op.call.launches(Schedule.parse(name), *arguments)[0].compiled(arguments[0].get_device()).kernel
        _ROOM[key] = {"registers": kernel.n_regs, "shared_bytes": kernel.metadata.shared}
    return _ROOM[key]


def measure(folder, points: dict, seconds: float, repeats: int = 5, progress: Callable[[str], None] = print) -> int:
    """Time points until `seconds` have passed, into COST_TIMES, weight by weight; how many rows there are now."""
    deadline = time.monotonic() + seconds
    todo = wanting(points, COST_TIMES.read(folder))
    for (dtype, n, k), group in groupby(todo, lambda point: point[:3]):
        weights = cache(partial(_weight, dtype, n, k))
        rows, begun = [], time.monotonic()
        for point in group:
            if time.monotonic() < deadline:
                rows += _timed_or_told(point, todo[point], weights, repeats, progress)
        COST_TIMES.merge(folder, rows)
        progress(f"{dtype} N={n} K={k}: {len(rows)} rows in {time.monotonic() - begun:.1f} s, "
                 f"{deadline - time.monotonic():.0f} s left")
    return len(COST_TIMES.read(folder))


def _weight(dtype, n, k, i):
    return op.inputs(0, Shape(N=n, K=k), DTYPES[dtype], runtime.device(), 3 * i)[1]


def _timed_or_told(point, todo: Todo, weights, repeats, progress) -> list[dict]:
    try:
        return beside(timed(point, todo.contenders, weights, runtime.device(), repeats), todo.anchors)
    except Exception as error:  # noqa: BLE001 - one point's failure must not cost the others
        progress(f"  {point}: {type(error).__name__}: {str(error)[:200]}")
        return []
    finally:
        if runtime.HAS_GPU:
            torch.cuda.empty_cache()


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels.lab.tuning.cost_times",
                                     description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600, help="of timing, after the kernels are compiled")
    parser.add_argument("--most", type=int, default=26, help="schedules at a point")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, help="processes that compile")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--part", type=part, default=(1, 1), help="such as 1/4: the first of four GPUs' share")
    parser.add_argument("--out", default=records.DATA, help="the data folder")
    parser.add_argument("--machine", help="the folder's name under it (default: from the device)")
    a = parser.parse_args(argv)
    if not runtime.HAS_GPU:
        print("error: schedules are timed on a CUDA GPU, and there is none here", file=sys.stderr)
        return 1
    folder, begun = records.open_machine(a.out, a.machine), time.monotonic()
    todo = wanting(part_of(wanted(a.most, a.dtypes), a.part), COST_TIMES.read(folder))
    good = good_kernels({p: found.contenders for p, found in todo.items()}, a.workers, partial(print, flush=True))
    points = {p: [s for s in found.schedules if kernel_of(*p[:3], s) in good] for p, found in todo.items()}
    print(f"{len(good)} kernels compiled and compared in {time.monotonic() - begun:.0f} s; {len(points)} points, "
          f"{sum(map(len, points.values()))} schedules to time", flush=True)
    count = measure(folder, points, a.seconds, a.repeats, partial(print, flush=True))
    records.note_machine(folder, COST_TIMES.file)
    print(f"{count} rows in {folder / COST_TIMES.file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
