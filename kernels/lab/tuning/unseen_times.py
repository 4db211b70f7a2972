"""How products of unseen weights are timed: the contenders, their kernels made ready, and sweeps over points."""
from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import torch

from ...op import DTYPES, Shape, dtype_name
from ...ops.matmul import learned, trial
from ...ops.matmul.contenders import FROZEN
from ...ops.matmul.op import matmul
from ...ops.matmul.plan import Plan
from ...ops.matmul.schedule import Schedule
from ...ops.matmul.tuning import forget, tuning
from .. import bench, provenance, records
from ..sweep.measure import Checker
from ..sweep.options import Sweep
from .cost_times import good_kernels, kernel_of
from .unseen_weights import Point, counts

UNSEEN = records.Table("unseen.csv", records.TOKEN_SWEEP.columns, records.TOKEN_SWEEP.key)
PASSES = 3

# contenders


@cache
def _weight(shape: str, dtype: torch.dtype, device, seed: int) -> torch.Tensor:
    return matmul.inputs(0, shape, dtype, device, seed)[1]


def inputs(tokens: int, shape, dtype=torch.bfloat16, device="cpu", seed: int = 0) -> tuple:
    """The op's own inputs; a GPU's weights are made once for all token counts."""
    if torch.device(device).type != "cuda":
        return matmul.inputs(tokens, shape, dtype, device, seed)
    x = matmul.inputs(tokens, Shape(N=1, K=Shape.parse(shape)["K"]), dtype, device, seed)[0]
    return x, _weight(str(shape), dtype, device, seed), None


class Online:
    """The product with the schedule that `kernels.tuning` keeps for a form after its first calls."""

    def __init__(self):
        self.kept: dict[Point, Schedule] = {}

    def __call__(self, x, weight, bias=None):
        return matmul.run_schedule(self.kept[_point(x, weight)], x, weight, bias)

    def learn(self, point: Point, device) -> None:
        """Call the product in a block of `tuning`, on as many separate inputs as do not stay in L2."""
        if point in self.kept:
            return
        dtype, shape, tokens = point
        given = [inputs(tokens, shape, DTYPES[dtype], device, i)
                 for i in range(bench.sets("cold", _bytes(point), device) if device.type == "cuda" else 1)]
        forget()
        with tuning() as block:
            for i in range(block.candidates * (block.calls + 1)):
                matmul.triton(*given[i % len(given)])
            if device.type == "cuda":
                torch.cuda.synchronize()
        found = list(learned.LEARNED.values())
        self.kept[point] = found[0] if found else Schedule.parse(matmul.schedule(tokens, shape, DTYPES[dtype]))
        forget()  # `triton` shall choose as if it had learned nothing


def _point(x, weight) -> Point:
    return dtype_name(x.dtype), str(Shape(N=weight.shape[0], K=weight.shape[1])), len(x)


def _bytes(point: Point) -> int:
    return matmul.work(point[2], point[1], DTYPES[point[0]]).bytes


def candidates(point: Point, device, count: int) -> list[Schedule]:
    """What may run at a point: what `triton` and `tuning` try first, and the frozen schedule."""
    dtype, shape, tokens = point
    n, k = Shape.parse(shape).values()
    x, weight = (torch.empty(rows, k, dtype=DTYPES[dtype], device=device) for rows in (tokens, n))
    return [*trial.candidates(Plan(x, weight, None, None), count), FROZEN]


def prepare(wanted: list[Point], device, count: int, workers=None, progress: Callable[[str], None] = print) -> list:
    """Compile and compare all kernels of these points. -> (point, schedule) of those that failed."""
    found = {(p[0], *Shape.parse(p[1]).values(), p[2]): candidates(p, device, count) for p in wanted}
    good = good_kernels(found, workers, progress)
    return [(p, str(s)) for p, schedules in found.items() for s in schedules if kernel_of(*p[:3], s) not in good]


# measuring


class Measuring:
    """Sweeps over points, into a folder."""

    def __init__(self, folder, wanted: list[Point], names: tuple[str, ...], repeats: int, device):
        self.folder, self.points, self.repeats, self.device = folder, wanted, repeats, device
        self.online, self.clock = Online(), bench.clocks(device)[0]
        self.op = replace(matmul, inputs=inputs, extras={**matmul.extras, "online": self.online})
        self.names, self.weight = names, ("", "")
        self.samples: dict[tuple, bench.Timing] = {}
        self.rows: dict[tuple, dict] = {}
        self.told = cache(self._told)  # what does not change from sweep to sweep
        self.checkers = {dtype: Checker(Sweep(self.op, counts(dtype), names, [dtype], [p[1] for p in wanted],
                                              [self.clock], PASSES, repeats, device=device))
                         for dtype in dict.fromkeys(p[0] for p in wanted)}

    def run(self, seconds: float, progress: Callable[[str], None]) -> bool:
        """PASSES sweeps, or as far as the seconds last. -> whether all was timed."""
        begun = saved = time.monotonic()
        try:
            for sweep in range(PASSES):
                for i, point in enumerate(self.points):
                    if time.monotonic() - begun > seconds:
                        return False
                    self._one(point, progress)
                    if time.monotonic() - saved > 15 or i == len(self.points) - 1:
                        saved = self.save()
                        progress(f"sweep {sweep + 1} of {PASSES}: {i + 1} of {len(self.points)} points, "
                                 f"{saved - begun:.0f} s")
            return True
        finally:
            self.save()

    def save(self) -> float:
        """Write what was measured since the last time."""
        UNSEEN.merge(self.folder, list(self.rows.values()))
        self.rows = {}
        return time.monotonic()

    def _one(self, point: Point, progress) -> None:
        try:
            timings = self._timings(point)
        except Exception as error:  # noqa: BLE001 - one point's failure must not cost the others
            progress(f"  {point}: {type(error).__name__}: {str(error)[:200]}")
            return
        for name, timing in timings.items():
            if isinstance(timing, Exception):
                progress(f"  {point} {name}: {type(timing).__name__}: {str(timing)[:200]}")
                continue
            key = (name, *point)
            self.samples[key] = self.samples[key] + timing if key in self.samples else timing
            self.rows[key] = self._row(key)

    def _timings(self, point: Point) -> dict:
        dtype, shape, tokens = point
        if self.weight != point[:2]:
            _weight.cache_clear()
            self.weight = point[:2]
        if "online" in self.names:
            self.online.learn(point, self.device)
        contenders = {name: self.op.implementation(name) for name in self.names}
        timings = bench.measure(contenders, lambda i: inputs(tokens, shape, DTYPES[dtype], self.device, i), self.clock,
                                device=self.device, set_bytes=_bytes(point), repeats=self.repeats)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return timings

    def _row(self, key) -> dict:
        name, dtype, shape, tokens = key
        timing, work = self.samples[key], matmul.work(tokens, shape, DTYPES[dtype])
        percentiles = timing.percentiles()
        us = percentiles["us_p50"]
        return {"op": "matmul", "implementation": name, "dtype": dtype, "shape": shape, "tokens": tokens,
                "clock": self.clock, **percentiles, "repeats": len(timing.us), "gbytes_per_s": work.bytes / us / 1e3,
                "tflops": work.flops / us / 1e6, **self.told(key), "recorded_at": records.now()}

    def _told(self, key) -> dict:
        """A row's bits, schedule and code."""
        name, dtype, shape, tokens = key
        if name == "online":
            self.online.learn((dtype, shape, counts(dtype)[-1]), self.device)  # whose rows the bits are compared with
        verdict = self.checkers[dtype](name, key[1:])
        schedule = {"triton": lambda: matmul.schedule(tokens, shape, DTYPES[dtype]),
                    "online": lambda: str(self.online.kept[key[1:]])}.get(name, lambda: None)()
        return {"same_bits": verdict.same, "elements_differ": verdict.differ, "digest": verdict.digest,
                "schedule": schedule,
                "source": provenance.of_row(matmul, name, dtype, shape, tokens, self.clock, schedule)}
