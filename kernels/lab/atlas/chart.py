"""The atlas as a table to look at: ops by property, a cell for each dtype, one block of columns a machine.

Plain functions from atlas.csv's rows to a Figure; the figure and the widget draw with these. One unit of the axes is
one inch, so that text and cells keep their proportions however many ops there are.
"""
from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

import matplotlib as mpl
import pandas as pd
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.layout_engine import PlaceHolderLayoutEngine

from .. import style
from . import measure as atlas

GROUPS = {  # heading -> the properties of which at least one moved the op's bits; the first that fits is taken
    "Race: move from run to run": ("run",),
    "Move with the batch": ("batch", "position", "neighbours"),
    "Move with the number of queries, not with the batch": ("query",),
    "Move with the number of threads alone": ("threads",),
    "Move when a CUDA graph replays them": ("graph",),
    "Never moved in these tests": (),
}
DRAWING, RANDOM = "Draw random numbers, which a batch shares", ("multinomial", "dropout")
LACKING = "No kernel here"
ABSENT, FAILED = "#c9c9c9", "#e69f00"
NAMES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
ROW, CELL, LABEL, GAP, MACHINE_GAP, HEAD, MARGIN = 0.19, 0.33, 2.2, 0.06, 0.3, 0.62, 0.15
NARROWEST = 5.4  # inches of a column of ops: room for a heading
TALLEST = 46  # rows in a column of ops when there is one machine


def group(rows: pd.DataFrame) -> str:
    """Under which heading an op belongs, by its rows on every machine shown."""
    if not rows.verdict.isin(["same", "varies"]).any():
        return LACKING
    if set(rows.op) <= set(RANDOM):
        return DRAWING
    moved = set(rows.property[rows.verdict == "varies"])
    return next(heading for heading, some in GROUPS.items() if moved & set(some) or not some)


def in_groups(rows: pd.DataFrame) -> dict[str, list[str]]:
    """Heading -> its ops: those that move in most cells first, then in the atlas' order."""
    order = {name: i for i, name in enumerate(atlas.names())}
    found = {heading: [] for heading in (*GROUPS, DRAWING, LACKING)}
    for op in sorted(rows.op.unique(), key=lambda op: (order.get(op, len(order)), op)):
        found[group(rows[rows.op == op])].append(op)
    moved = rows[rows.verdict == "varies"].groupby("op").size()
    return {heading: sorted(ops, key=lambda op: -moved.get(op, 0)) for heading, ops in found.items() if ops}


def share(value: float) -> str:
    """A share in per cent, in at most four characters: 64, 2.3, .8, .05, <.01."""
    percent = 100 * value
    if percent >= 9.95:
        return f"{percent:.0f}"
    if percent >= 0.95:
        return f"{percent:.1f}"
    if percent >= 0.095:
        return f"{percent:.1f}"[1:]
    return f"{percent:.2f}"[1:] if percent >= 0.0095 else "<.01"


def atlas_chart(tables: Mapping[str, pd.DataFrame], *, groups: Mapping[str, list[str]] | None = None, title: str = "",
                caption: str = "") -> Figure:
    """Draw the rows of one or two machines: their name over their columns, ops in the groups of `in_groups`.

    `groups` keeps the groups of a larger table of which these rows are a part. Properties that apply to no row of a
    machine get no column. The title's further lines are set smaller. ValueError where there is no row.
    """
    rows = pd.concat(list(tables.values()), ignore_index=True) if tables else pd.DataFrame()
    if not len(rows):
        raise ValueError("there is no row to draw")
    dtypes = [d for d in NAMES if d in set(rows.dtype)]
    columns = _columns(tables, dtypes)
    width = max(LABEL + max((right for *_, right in columns), default=0), NARROWEST)
    shown = {heading: [op for op in ops if op in set(rows.op)] for heading, ops in (groups or in_groups(rows)).items()}
    lists = _split({heading: ops for heading, ops in shown.items() if ops}, TALLEST if len(tables) == 1 else 10**6)
    notes = textwrap.wrap(caption, int(len(lists) * width * 15.5))
    height = HEAD + ROW * max(map(len, lists)) + 0.17 * len(notes) + _top(title) + 0.25
    size = (len(lists) * (width + MACHINE_GAP) - MACHINE_GAP + 2 * MARGIN, height)
    with mpl.rc_context():
        style.theme()
        figure = Figure(figsize=size, layout=PlaceHolderLayoutEngine(True, True))  # no layout, whenever it is saved
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(-MARGIN, size[0] - MARGIN), ylim=(height, 0))
        axes.axis("off")
        top = _top(title)
        for i, line in enumerate(title.splitlines()):
            axes.text(0, 0.3 + 0.24 * i, line, fontsize=11 if i else 14, fontweight="normal" if i else "bold",
                      va="baseline")
        cells = _Cells(axes)
        for i, listed in enumerate(lists):
            _draw_list(axes, cells, listed, tables, columns, dtypes, i * (width + MACHINE_GAP), top)
        cells.draw()
        for i, line in enumerate(reversed(notes)):
            axes.text(0, height - 0.12 - 0.17 * i, line, fontsize=8.5, color="#404040", va="baseline")
    return figure


def _top(title: str) -> float:
    """Where the table begins, in inches below the figure's edge."""
    return 0.26 + 0.24 * len(title.splitlines()) if title else 0.1


def _columns(tables, dtypes) -> list[tuple[str, str, float, float]]:
    """(machine, property, left, right) of each pair of cells, in inches from the label's right edge."""
    found, x = [], 0.0
    for machine, rows in tables.items():
        applies = set(rows.property[rows.verdict != "not applicable"])
        for name in atlas.PROPERTIES:
            if name in applies:
                found.append((machine, name, x, x + CELL * len(dtypes)))
                x += CELL * len(dtypes) + GAP
        x += MACHINE_GAP
    return found


def _split(groups, tallest) -> list[list[tuple[str, str]]]:
    """Lines ("heading" or "op", text) in one list, or in two of equal height where there are too many."""
    lines = [line for heading, ops in groups.items()
             for line in [("heading", f"{heading} ({len(ops)})"), *(("op", op) for op in ops)]]
    if len(lines) <= tallest:
        return [lines]
    cut = (len(lines) + 1) // 2
    cut -= lines[cut - 1][0] == "heading"
    second = lines[cut:]
    if second[0][0] == "op":
        heading = next(text for kind, text in reversed(lines[:cut]) if kind == "heading")
        second = [("heading", heading.rpartition(" (")[0] + ", continued"), *second]
    return [lines[:cut], second]


class _Cells:
    """Rectangles gathered by colour, so that a figure of thousands stays small."""

    def __init__(self, axes):
        self.axes, self.boxes = axes, {}

    def add(self, colour, x, y, width):
        box = [(x + 0.008, y + 0.008), (x + width - 0.008, y + 0.008), (x + width - 0.008, y + ROW - 0.008),
               (x + 0.008, y + ROW - 0.008)]
        self.boxes.setdefault(colour, []).append(box)

    def draw(self):
        for colour, boxes in sorted(self.boxes.items()):
            hatch = {"hatch": "////////", "edgecolors": "white", "linewidths": 0} if colour == ABSENT else {}
            self.axes.add_collection(PolyCollection(boxes, facecolors=colour, **{"linewidths": 0, **hatch}),
                                     autolim=False)


def _draw_list(axes, cells, lines, tables, columns, dtypes, x, y):
    verdicts = {(machine, r.op, r.property, r.dtype): r for machine, rows in tables.items() for r in rows.itertuples()}
    _heads(axes, columns, dtypes, x + LABEL, y)
    y += HEAD
    for kind, text in lines:
        if kind == "heading":
            axes.text(x, y + 0.75 * ROW, text, fontsize=9, fontweight="bold", va="baseline")
        else:
            axes.text(x + LABEL - 0.08, y + 0.73 * ROW, text, fontsize=8, ha="right", va="baseline")
            for machine, name, left, _ in columns:
                for i, dtype in enumerate(dtypes):
                    _cell(axes, cells, verdicts.get((machine, text, name, dtype)), x + LABEL + left + i * CELL, y)
        y += ROW


def _heads(axes, columns, dtypes, x, y):
    for machine in dict.fromkeys(column[0] for column in columns):
        left = min(c[2] for c in columns if c[0] == machine)
        axes.text(x + left, y + 0.13, machine, fontsize=9.5, fontweight="bold", va="baseline")
    for _, name, left, right in columns:
        axes.text(x + (left + right) / 2, y + 0.37, name, fontsize=7.5, ha="center", va="baseline")
        for i, dtype in enumerate(dtypes):
            axes.text(x + left + (i + 0.5) * CELL, y + 0.53, NAMES[dtype], fontsize=6, color="#606060",
                      ha="center", va="baseline")


def _cell(axes, cells, row, x, y):
    verdict = "not applicable" if row is None else row.verdict
    if verdict == "not applicable":
        return
    kind = verdict.partition(":")[0]
    cells.add({"same": style.SAME[1], "varies": style.MOVED[1], "not here": ABSENT}.get(kind, FAILED), x, y, CELL)
    if kind in ("varies", "error"):
        text, colour = (share(row.share_differ), style.MOVED[2]) if kind == "varies" else ("!", "black")
        axes.text(x + CELL / 2, y + 0.71 * ROW, text, fontsize=6.5, color=colour, ha="center", va="baseline")


def counts(rows: pd.DataFrame, property: str) -> tuple[int, int]:
    """How many ops moved in this property in some dtype, and how many were tested."""
    tested = rows[(rows.property == property) & rows.verdict.isin(["same", "varies"])]
    return tested[tested.verdict == "varies"].op.nunique(), tested.op.nunique()


def steady(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of ops that neither race from run to run on this machine nor draw random numbers."""
    racing = rows.op[(rows.property == "run") & (rows.verdict == "varies")]
    return rows[~rows.op.isin([*racing, *RANDOM])]


def words(tables: Mapping[str, Sequence]) -> str:
    """The chart in words, with its counts: a text alternative."""
    parts = []
    for machine, rows in tables.items():
        found = [f"{name} {moved} of {tested}" for name in atlas.PROPERTIES
                 for moved, tested in [counts(rows, name)] if tested]
        moved, tested = counts(steady(rows), "batch")
        parts.append(f"{machine}: {', '.join(found)}; batch {moved} of {tested} without the ops that race or draw")
    return ("A table of PyTorch's own ops by what was changed between two calls, each cell coloured by whether the "
            "bits of a row moved and labelled with the per cent of elements that differ. Ops whose bits moved in "
            "float32 or bfloat16, of those tested. " + ". ".join(parts) + ".")
