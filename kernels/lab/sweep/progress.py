"""How far a running sweep has come: the time that is left, and the points that failed."""
from __future__ import annotations

import time

from ..widgets import parts


class Clock:
    """How far a sweep has come, and how long the rest takes: a point costs what it cost in the pass before, any other
    what was estimated, as far as estimates have been right.
    """

    def __init__(self, todo: list[tuple], costs: list[float]):
        self.todo, self._estimates = todo, costs
        self.done, self._costs, self._spent = 0, {}, 0.0
        self.start()

    def start(self):
        """What comes is measured; before, a process was started."""
        self._last = time.monotonic()

    def tick(self):
        now = time.monotonic()
        self._costs[self.todo[self.done]] = now - self._last
        self._spent += now - self._last
        self._last, self.done = now, self.done + 1

    def text(self) -> str:
        slower = self._spent / sum(self._estimates[:self.done]) if self.done else 1.0
        left = sum(self._costs.get(point, slower * cost)
                   for point, cost in zip(self.todo[self.done:], self._estimates[self.done:], strict=True))
        return f"{self.done} of {len(self.todo)} points, about {parts.seconds(left)} left"


class Failures:
    """The points that failed, those of one contender for one reason together."""

    def __init__(self):
        self._points: dict[tuple[str, str], list[str]] = {}

    def __bool__(self):
        return bool(self._points)

    def add(self, where: str, why: str):
        """`where` names a contender, and mostly a point: 'triton at 8 tokens'."""
        name, _, point = where.partition(" at ")
        points = self._points.setdefault((name, why), [])
        if point not in points:
            points.append(point)

    def messages(self) -> list[str]:
        """A line for each contender and reason."""
        messages = []
        for (name, why), points in self._points.items():
            more = f" and {len(points) - 1} more points" if len(points) > 1 else ""
            at = f" at {points[0]}{more}" if points[0] else ""
            messages.append(f"{name}{at}: {why}")
        return messages
