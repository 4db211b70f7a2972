"""Time products of weights that no table holds, as a model that nobody thought of would run them.

    python -m kernels unseen --seconds 200    into data/<machine>/unseen.csv, and what it says in words

Contenders beside PyTorch's default: `triton`, whose schedule is chosen without having been timed here; `frozen`, one
schedule for all; with --online also `online`, the schedule that kernels.tuning keeps. All kernels are first compiled
and compared with the trusted schedule in processes of their own. A point is timed `cold` and interleaved in three
sweeps over all points. Points that are in the file, recorded by this code, are not timed again.
"""
from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from ... import runtime
from ...op import Shape
from .. import older, records
from .unseen_times import PASSES, UNSEEN, Measuring, prepare
from .unseen_weights import MODELS, Point, points

LIMITS = (0.80, 0.85, 0.90, 0.95, 0.97, 1.0)


def left(wanted: list[Point], names: tuple[str, ...], folder, repeats: int) -> list[Point]:
    """The points that are not in the file, by this code and with so many repeats."""
    rows = older.mark(UNSEEN.read(folder))
    rows = rows[~rows.older.astype(bool) & (rows.repeats >= PASSES * repeats)]
    have = set(rows[["implementation", "dtype", "shape", "tokens"]].itertuples(index=False, name=None))
    return [point for point in wanted if any((name, *point) not in have for name in names)]


# in words


def speeds(rows: pd.DataFrame) -> pd.DataFrame:
    """Times the default's speed: a row for each dtype, shape and token count, a column for each other contender."""
    us = rows.pivot(index=["dtype", "shape", "tokens"], columns="implementation", values="us_p50")
    return us.drop(columns="cuda").rdiv(us.cuda, axis=0)


def words(rows: pd.DataFrame, worst: int = 20) -> Iterator[str]:
    """Lines that say how fast each contender is beside the default, and at which points `triton` is slowest."""
    table = speeds(rows)
    eights = np.array([Shape.parse(shape)["K"] % 8 == 0 for shape in table.index.get_level_values("shape")], dtype=bool)
    for name in table:
        for dtype in dict.fromkeys(table.index.get_level_values("dtype")):
            for text, chosen in (("k a multiple of 8", eights), ("other k", ~eights)):
                column = table[name][chosen & (table.index.get_level_values("dtype") == dtype)].dropna()
                if len(column):
                    yield f"{name}, {dtype}, {text}: {_summary(column)}"
    schedules = rows.set_index(["dtype", "shape", "tokens", "implementation"]).schedule
    for name in [name for name in ("triton", "online") if name in table]:
        yield f"slowest of {name}:"
        for point, speed in table[name].nsmallest(worst).items():
            yield f"  {speed:.2f}  {' '.join(map(str, point))}  {schedules[(*point, name)]}"


def _summary(speed: pd.Series) -> str:
    below = ", ".join(f"{limit:.2f} at {(speed < limit).sum()}" for limit in LIMITS)
    return (f"{np.exp(np.log(speed).mean()):.3f} of the default's speed in the geometric mean of {len(speed)} points, "
            f"{speed.min():.2f} at worst ({' '.join(map(str, speed.idxmin()[1:]))}), below {below}")


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels unseen", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600, help="of timing, after the kernels are compiled")
    parser.add_argument("--online", action="store_true", help="time what kernels.tuning keeps, too")
    parser.add_argument("--repeats", type=int, default=5, help="rounds a sweep")
    parser.add_argument("--dtypes", nargs="+", choices=("float16", "bfloat16"), default=["float16", "bfloat16"])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), help="only these models' weights")
    parser.add_argument("--workers", type=int, help="processes that compile")
    parser.add_argument("--again", action="store_true", help="time points that are recorded already: after a new fit")
    parser.add_argument("--say", action="store_true", help="measure nothing, and say what is recorded")
    parser.add_argument("--out", default=records.DATA, help="the data folder")
    parser.add_argument("--machine", help="the folder's name under it (default: from the device)")
    a = parser.parse_args(argv)
    if a.say:
        print(*words(UNSEEN.read(Path(a.out) / (a.machine or "h200"))), sep="\n")
        return 0
    if not runtime.HAS_GPU:
        print("error: a GPU's products are timed, and there is no CUDA GPU here", file=sys.stderr)
        return 1
    return _record(a, records.open_machine(a.out, a.machine), runtime.device())


def _wanted(a, names, folder) -> list[Point]:
    shapes = {str(Shape(N=n, K=k)) for model in a.models or MODELS for n, k in MODELS[model]}
    every = [p for p in points(a.dtypes) if p[1] in shapes]
    return every if a.again else left(every, names, folder, a.repeats)


def _record(a, folder, device) -> int:
    say, begun = partial(print, flush=True), time.monotonic()
    names = ("cuda", "triton", "frozen", *["online"] * a.online)
    todo = _wanted(a, names, folder)
    wrong = prepare(todo, device, 4 if a.online else 1, a.workers, say) if todo else []
    for point, schedule in wrong:
        say(f"  did not run, or moved a bit: {point} {schedule}")
    say(f"{len(todo)} points to time, ready after {time.monotonic() - begun:.0f} s")
    done = Measuring(folder, todo, names, a.repeats, device).run(a.seconds, say) if todo else True
    records.note_machine(folder, UNSEEN.file)
    say(*words(UNSEEN.read(folder)), "" if done else "The time was over before all was timed.", sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
