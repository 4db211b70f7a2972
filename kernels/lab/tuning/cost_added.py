"""Tiles that came to the design later (cost_design.ADDED), timed at points that were recorded without them.

Times of a point are compared with each other, so they must be of one GPU, as fast as it was. Two schedules of the point
are timed again beside the new ones: PyTorch's default and the fastest that was recorded. Each new time is multiplied by
what those two took then over what they take now. Where that is far from 1, or the two disagree, nothing is kept.
"""
from __future__ import annotations

import math
from typing import NamedTuple

import pandas as pd

from ...op import Shape
from ...ops.matmul.schedule import Schedule
from . import cost_design as design

NEAR, AGREE = 1.10, 1.04  # times as long that an anchor may take as it took then, and the two beside each other

Point = tuple[str, int, int, int]  # dtype, N, K, tokens


class Todo(NamedTuple):
    """What is to be timed at a point, and what its anchors took when it was recorded: {} where it was not."""

    schedules: list[Schedule]
    anchors: dict[str, float]

    @property
    def contenders(self) -> list[Schedule]:
        """The schedules, and the anchors that are none of PyTorch's."""
        return [*self.schedules, *(Schedule.parse(name) for name in self.anchors if name != "cuda")]


def wanting(points: dict[Point, list[Schedule]], rows: pd.DataFrame) -> dict[Point, Todo]:
    """What of a design is not in `rows` of cost_times.csv; of a point that is, only tiles of ADDED."""
    recorded = {key: dict(zip(part.schedule, part.us_p50, strict=True))
                for key, part in rows.groupby(["dtype", "shape", "tokens"])}
    todo = {}
    for point, schedules in points.items():
        dtype, n, k, tokens = point
        us = recorded.get((dtype, str(Shape(N=n, K=k)), tokens), {})
        new = [s for s in schedules if s in design.added() and str(s) not in us] if us else schedules
        if new:
            todo[point] = Todo(new, _anchors(us))
    return todo


def _anchors(us: dict[str, float]) -> dict[str, float]:
    """The default's time and the fastest schedule's, of a point's."""
    ours = {name: time for name, time in us.items() if name != "cuda"}
    fastest = min(ours, key=ours.__getitem__, default=None)
    return {name: us[name] for name in ("cuda", fastest) if name in us}


def beside(rows: list[dict], anchors: dict[str, float]) -> list[dict]:
    """New rows of a point as if they had been timed with its recorded ones; the anchors' own rows are left out.

    `rows` as timed now. Raises ValueError where that cannot be told: an anchor is missing, has moved by more than NEAR,
    or otherwise than the other by more than AGREE.
    """
    if not anchors:
        return rows
    now = {row["schedule"]: row["us_p50"] for row in rows}
    moved = {name: us / now[name] if name in now else math.nan for name, us in anchors.items()}
    said = ", ".join(f"{ratio:.3f} times {name}" for name, ratio in moved.items())
    if len(moved) < 2 or not all(1 / NEAR < ratio < NEAR for ratio in moved.values()):
        raise ValueError(f"this GPU is not as fast as when the point was recorded: {said}")
    if max(moved.values()) / min(moved.values()) > AGREE:
        raise ValueError(f"the two that were timed again do not agree: {said}")
    scale = math.prod(moved.values()) ** (1 / len(moved))
    return [{**row, "us_p50": row["us_p50"] * scale} for row in rows if row["schedule"] not in anchors]


def part_of(points: dict[Point, list[Schedule]], part: tuple[int, int]) -> dict[Point, list[Schedule]]:
    """The points of every so manieth weight, for one of so many GPUs that share the work: part (1, 4) to (4, 4)."""
    number, of = part
    weights = list(dict.fromkeys(point[:3] for point in points))
    mine = set(weights[number - 1::of])
    return {point: found for point, found in points.items() if point[:3] in mine}
