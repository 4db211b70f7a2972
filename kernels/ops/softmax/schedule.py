"""How the order of softmax is carried out. It decides speed, never a bit."""
from __future__ import annotations

from dataclasses import dataclass

import torch

from ...arithmetic.sums import tree_width
from ...op import Shape
from .order import SEGMENT, WHOLE


@dataclass(frozen=True)
class Schedule:
    """How the order is carried out. `kind` is the kernel:

    resident  `rows` whole rows of up to 32 chunks a program
    stream    one row of any length a program, `flight` segments of 8 chunks in flight, read a second time at the end
    columns   `columns` of a row's columns a program, `flight` segments in flight; a second launch of `chunks`
              chunks and 4 warps a program makes the results
    """

    kind: str
    warps: int
    rows: int = 1
    flight: int = 1
    columns: int = 32
    chunks: int = 4

    def __str__(self):
        named = {"resident": f"rows={self.rows}", "stream": f"stream={self.flight}",
                 "columns": f"columns={self.columns} flight={self.flight} chunks={self.chunks}"}
        return f"{named[self.kind]} warps={self.warps}"


def choose(rows: int, length: int, itemsize: int = 2, logarithm: bool = False) -> Schedule:
    """The fastest schedule known for `rows` rows of this length, with numbers of `itemsize` bytes."""
    chunks, short = -(-length // tree_width(length)), itemsize == 2
    if chunks <= 8:
        together = max(1, min(16, 1024 // tree_width(length), rows // 264))
        return Schedule("resident", 4, rows=1 << (together.bit_length() - 1))
    if chunks <= WHOLE:
        if logarithm and short and rows > 192:
            return Schedule("stream", 8, flight=2)
        return Schedule("resident", 8 if short or rows < 1024 else 16)
    if rows <= 16:
        return Schedule("columns", 1, flight=4, columns=32, chunks=2)
    if rows <= 64:
        return Schedule("columns", 2, flight=4, columns=64)
    if rows <= 192 or short and rows <= 384:
        return Schedule("stream", 16, flight=4)
    if not short:
        return Schedule("stream", 16, flight=2)
    return Schedule("stream", 8, flight=2 if logarithm or rows <= 1024 else 1)


def every(shape, dtype=torch.bfloat16, logarithm: bool = False) -> list[Schedule]:
    """Every schedule worth testing for rows of this length; the chosen ones are among them."""
    length, width = Shape.parse(shape, "D")["D"], tree_width(Shape.parse(shape, "D")["D"])
    flights = (1, 4) if length > SEGMENT * width else (1,)
    found = [Schedule("stream", warps, flight=flight) for warps in (4, 8, 16) for flight in flights]
    found += [Schedule("columns", 1, flight=flights[-1], columns=min(columns, width), chunks=chunks)
              for columns in (16, 64) for chunks in (2, 8)]
    if length <= WHOLE * width:
        found += [Schedule("resident", warps, rows) for rows in (1, 2, 4) for warps in (1, 4, 8, 16)
                  if rows * length <= 4096 * warps]
    return list(dict.fromkeys(found + [choose(1 << i, length, dtype.itemsize, logarithm) for i in range(21)]))
