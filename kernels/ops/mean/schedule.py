"""How the order of sums is carried out. It decides speed, never a bit."""
from __future__ import annotations

from dataclasses import dataclass

from ...arithmetic.sums import CHUNK, tree_width
from ...op import Shape

RESIDENT_WIDTH = 16 * CHUNK  # wider rows are streamed
ENOUGH_PROGRAMS = 132  # to give each multiprocessor of a large GPU one


@dataclass(frozen=True)
class Schedule:
    """How the order is carried out. `kind` is the kernel:

    rows     `rows` whole rows a program, up to RESIDENT_WIDTH long
    stream   one row of any length a program, `flight` chunks in flight
    inner    `columns` neighbouring results a program, in `parts` passes, `flight` chunks of each in flight
    split    `columns` of a row's column sums a program, `flight` of its chunks in flight; a second launch adds them
    """

    kind: str
    warps: int
    rows: int = 1
    flight: int = 1
    columns: int = 1
    parts: int = 1

    def __str__(self):
        named = {"rows": f"rows={self.rows}", "stream": f"stream={self.flight}",
                 "inner": f"inner={self.columns} parts={self.parts} flight={self.flight}",
                 "split": f"split={self.columns} flight={self.flight}"}
        return f"{named[self.kind]} warps={self.warps}"


def choose(outer: int, length: int, inner: int = 1, itemsize: int = 2) -> Schedule:
    """The fastest schedule we know for numbers of `itemsize` bytes laid out as (outer, length, inner).

    It is chosen from a table of cases; none changes a bit.
    """
    width = tree_width(length)
    if inner > 1:
        return _schedule_inner(outer, length, inner, itemsize)
    if length >= 64 * CHUNK and outer < ENOUGH_PROGRAMS:
        return _schedule_split(outer * width)
    if length > RESIDENT_WIDTH:
        return Schedule("stream", warps=16, flight=4)
    if width < CHUNK:  # several narrow rows a program, once there are enough to go round
        rows = min(2 * CHUNK // width, _power_of_two(outer // (4 * ENOUGH_PROGRAMS)))
        return Schedule("rows", warps=4 if rows * width >= 512 else 1, rows=rows)
    return Schedule("rows", warps=4 if length * itemsize <= 16 * CHUNK else 8 if length <= 8 * CHUNK else 16)


def _schedule_inner(outer, length, inner, itemsize) -> Schedule:
    width = tree_width(length)
    columns = min(2 * _power_of_two(inner - 1), 64 * CHUNK // (width * itemsize), CHUNK)
    # cut finer until every multiprocessor has a program, but not below a few thousand numbers or a sector of memory
    while outer * -(-inner // columns) < ENOUGH_PROGRAMS and columns * length > 4 * CHUNK and columns * itemsize > 32:
        columns //= 2
    if outer * -(-inner // columns) < ENOUGH_PROGRAMS and length > RESIDENT_WIDTH:
        return _schedule_split(outer * inner * CHUNK)
    warps = min(16, _power_of_two(width * columns // (2 * CHUNK)))
    return Schedule("inner", warps, flight=min(4, 2 * _power_of_two((length - 1) // CHUNK)), columns=columns,
                    parts=min(8, width) if inner * itemsize >= 32 else 1)


def _schedule_split(columns: int) -> Schedule:
    """A split of `columns` column sums: one program a multiprocessor if there are enough, a warp's sums at least."""
    each = min(256, max(32, _power_of_two(columns // ENOUGH_PROGRAMS)))
    return Schedule("split", warps=1, flight=2 * CHUNK // each, columns=each)


def _power_of_two(n: int) -> int:
    """The largest power of two that is at most n, and 1 for less."""
    return 1 << max(n, 1).bit_length() - 1


def every(shape, dtype) -> list[Schedule]:
    """Every schedule the tests hold to the specification's bits."""
    length, inner = sizes(shape)
    split = [Schedule("split", warps, flight=flight, columns=columns)
             for columns, flight, warps in ((32, 16, 1), (128, 4, 1), (256, 2, 4))]
    tokens = (*range(1, 300), *(1 << i for i in range(21)))
    chosen = [choose(outer, length, inner, dtype.itemsize) for outer in tokens]
    if inner > 1:
        wide = [Schedule("inner", warps, flight=flight, columns=columns, parts=parts)
                for columns, parts, flight, warps in ((16, 1, 1, 8), (16, 8, 4, 8), (32, 8, 1, 16), (32, 8, 2, 16))
                if parts <= tree_width(length)]
        return list(dict.fromkeys([*wide, *split, *chosen]))
    rows = [Schedule("rows", warps, rows=rows) for rows in (1, 2, 4) for warps in (1, 4, 8, 16)
            if length <= RESIDENT_WIDTH and rows * length <= 8 * CHUNK * warps]
    stream = [Schedule("stream", warps, flight=flight) for warps in (4, 16) for flight in (1, 4)]
    return list(dict.fromkeys([*rows, *stream, *split, *chosen]))


def sizes(shape) -> tuple[int, int]:
    """D and inner: a token is a row of D numbers, or of D times inner with only the D reduced."""
    shape = Shape.parse(shape, "D")
    return shape["D"], shape.get("inner", 1)
