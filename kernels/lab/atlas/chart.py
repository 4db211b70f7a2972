"""The atlas as a table to look at: ops by property, a cell for each dtype, one block of columns a machine.

Plain functions from atlas.csv's rows to a Figure; the figure and the widget draw with these. One unit of the axes is
one inch, so that text and cells keep their proportions however many ops there are.
"""
from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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
NEVER = list(GROUPS)[-1]
DRAWING, RANDOM = "Draw random numbers, which a batch shares", ("multinomial", "dropout")
LACKING = "No kernel here"
ABSENT, FAILED = "#c9c9c9", "#e69f00"
NAMES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
MARGIN = 0.15
TALLEST = 46  # rows in a column of ops when there is one machine


@dataclass(frozen=True)
class Form:
    """How much of the atlas is drawn, and its inches.

    row, cell, label, gap, machine_gap, head: of the table; narrowest: a column of ops, so that a heading has room
    points: of an op's name, a property's and a number's (0: no number in a cell)
    listed: every op has a line; else those that never moved share one, and if `counted` those of each group do
    tall: the figure's inches, where they are given, and `wide` too
    """

    row: float = 0.19
    cell: float = 0.33
    label: float = 2.2
    gap: float = 0.06
    machine_gap: float = 0.3
    head: float = 0.62
    narrowest: float = 5.4
    points: tuple[float, float, float] = (8, 7.5, 6.5)
    listed: bool = True
    counted: bool = False
    wide: float | None = None
    tall: float | None = None
    title: float = 14

    @property
    def base(self) -> float:
        """Where in a row its text stands."""
        return 0.71 if self.row < 0.25 else 0.6


FULL = Form()


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
                caption: str = "", form: Form = FULL, halves: bool = True) -> Figure:
    """Draw the rows of one or two machines: their name over their columns, ops in the groups of `in_groups`.

    `groups` keeps the groups of a larger table of which these rows are a part. Properties that apply to no row of a
    machine get no column. The title's further lines are set smaller. One machine's table is set in two halves where it
    is long, unless `halves` is false. ValueError where there is no row.
    """
    rows = pd.concat(list(tables.values()), ignore_index=True) if tables else pd.DataFrame()
    if not len(rows):
        raise ValueError("there is no row to draw")
    dtypes = [d for d in NAMES if d in set(rows.dtype)]
    columns = _columns(tables, dtypes, form)
    width = max(form.label + max((right for *_, right in columns), default=0), form.narrowest)
    shown = {heading: [op for op in ops if op in set(rows.op)] for heading, ops in (groups or in_groups(rows)).items()}
    tallest = TALLEST if len(tables) == 1 and form.listed and halves else 10**6
    lists = _split(_lines({heading: ops for heading, ops in shown.items() if ops}, form), tallest)
    wide = len(lists) * (width + form.machine_gap) - form.machine_gap + 2 * MARGIN
    if form.wide:
        wide, title = form.wide, _title(title, form)
        notes = style.wrapped(caption, wide - 2 * MARGIN, style.CAPTION).splitlines()
    else:
        notes = textwrap.wrap(caption, int(len(lists) * width * 15.5))
    height = form.tall or form.head + form.row * max(map(len, lists)) + 0.17 * len(notes) + _top(title) + 0.25
    size = (wide, height)
    with mpl.rc_context():
        style.theme()
        figure = Figure(figsize=size, layout=PlaceHolderLayoutEngine(True, True))  # no layout, whenever it is saved
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(-MARGIN, size[0] - MARGIN), ylim=(height, 0))
        axes.axis("off")
        top = _top(title)
        for i, line in enumerate(title.splitlines()):
            small = i and not form.wide
            axes.text(0, 0.3 + 0.24 * i, line, fontsize=11 if small else form.title,
                      fontweight="normal" if small else "bold", va="baseline")
        cells = _Cells(axes, form)
        for i, listed in enumerate(lists):
            x = i * (width + form.machine_gap)
            _heads(axes, columns, dtypes, x + form.label, top, form, ", continued" if i else "")
            _draw_list(axes, cells, listed, tables, columns, dtypes, x, top + form.head)
        cells.draw()
        for i, line in enumerate(reversed(notes)):
            axes.text(0, height - 0.12 - 0.17 * i, line, fontsize=8.5, color="#404040", va="baseline")
    return figure


def _top(title: str) -> float:
    """Where the table begins, in inches below the figure's edge."""
    return 0.26 + 0.24 * len(title.splitlines()) if title else 0.1


def _columns(tables, dtypes, form) -> list[tuple[str, str, float, float]]:
    """(machine, property, left, right) of each pair of cells, in inches from the label's right edge."""
    found, x = [], 0.0
    for machine, rows in tables.items():
        applies = set(rows.property[rows.verdict != "not applicable"])
        for name in atlas.PROPERTIES:
            if name in applies:
                found.append((machine, name, x, x + form.cell * len(dtypes)))
                x += form.cell * len(dtypes) + form.gap
        x += form.machine_gap
    return found


def _lines(groups, form) -> list[tuple[str, str, Sequence[str]]]:
    """The table's lines: ("heading", text, ()), or ("op" or "count", text, the ops it is of)."""
    lines = []
    for heading, ops in groups.items():
        text = f"{heading} ({len(ops)})"
        if form.counted:
            lines.append(("count", text, ops))
        elif not form.listed and heading == NEVER:
            lines.append(("heading", f"{text}, not listed", ()))
        else:
            lines += [("heading", text, ()), *(("op", op, [op]) for op in ops)]
    return lines


def _split(lines, tallest) -> list[list[tuple[str, str, Sequence[str]]]]:
    """The lines in one list, or in two of equal height where there are too many."""
    if len(lines) <= tallest:
        return [lines]
    cut = (len(lines) + 1) // 2
    cut -= lines[cut - 1][0] == "heading"
    second = lines[cut:]
    if second[0][0] == "op":
        heading = next(text for kind, text, _ in reversed(lines[:cut]) if kind == "heading")
        second = [("heading", heading.rpartition(" (")[0] + ", continued", ()), *second]
    return [lines[:cut], second]


class _Cells:
    """Rectangles gathered by colour, so that a figure of thousands stays small."""

    def __init__(self, axes, form):
        self.axes, self.form, self.boxes = axes, form, {}

    def add(self, colour, x, y, text="", ink="black"):
        width, height, points = self.form.cell, self.form.row, self.form.points[-1]
        box = [(x + 0.008, y + 0.008), (x + width - 0.008, y + 0.008), (x + width - 0.008, y + height - 0.008),
               (x + 0.008, y + height - 0.008)]
        if text and points:
            self.axes.text(x + width / 2, y + self.form.base * height, text, fontsize=points, color=ink, ha="center",
                           va="baseline")
        self.boxes.setdefault(colour, []).append(box)

    def draw(self):
        for colour, boxes in sorted(self.boxes.items()):
            hatch = {"hatch": "////////", "edgecolors": "white", "linewidths": 0} if colour == ABSENT else {}
            self.axes.add_collection(PolyCollection(boxes, facecolors=colour, **{"linewidths": 0, **hatch}),
                                     autolim=False)


def _draw_list(axes, cells, lines, tables, columns, dtypes, x, y):
    verdicts = {(machine, r.op, r.property, r.dtype): r for machine, rows in tables.items() for r in rows.itertuples()}
    form = cells.form
    for kind, text, ops in lines:
        if kind == "heading":
            axes.text(x, y + 0.75 * form.row, text, fontsize=form.points[0] + 1, fontweight="bold", va="baseline")
        else:
            axes.text(x + form.label - 0.08, y + form.base * form.row + 0.02 * form.row, text, fontsize=form.points[0],
                      ha="right", va="baseline")
            for machine, name, left, _ in columns:
                for i, dtype in enumerate(dtypes):
                    rows = [verdicts.get((machine, op, name, dtype)) for op in ops]
                    (_count if kind == "count" else _cell)(cells, rows, x + form.label + left + i * form.cell, y)
        y += form.row


def _heads(axes, columns, dtypes, x, y, form, more):
    for machine in dict.fromkeys(column[0] for column in columns):
        left, right = (pick(c[i] for c in columns if c[0] == machine) for pick, i in ((min, 2), (max, 3)))
        text = style.wrapped(machine, right - left, 9, "bold") if form.wide else machine + more
        axes.text(x + left, y + (0 if form.wide else 0.13), text, fontsize=9 if form.wide else 9.5, fontweight="bold",
                  va="top" if form.wide else "baseline", linespacing=1.1)
    for _, name, left, right in columns:
        if not form.points[-1]:  # narrow: the name stands upright, and the caption tells the two dtypes
            axes.text(x + (left + right) / 2, y + form.head - 0.06, name, fontsize=form.points[1], ha="center",
                      va="bottom", rotation=90)
            continue
        axes.text(x + (left + right) / 2, y + form.head - 0.25, name, fontsize=form.points[1], ha="center",
                  va="baseline")
        for i, dtype in enumerate(dtypes):
            axes.text(x + left + (i + 0.5) * form.cell, y + form.head - 0.09, NAMES[dtype], fontsize=6, color="#606060",
                      ha="center", va="baseline")


def _cell(cells, rows, x, y):
    (row,) = rows
    verdict = "not applicable" if row is None else row.verdict
    if verdict == "not applicable":
        return
    kind = verdict.partition(":")[0]
    text = share(row.share_differ) if kind == "varies" else "!" if kind == "error" else ""
    cells.add({"same": style.SAME[1], "varies": style.MOVED[1], "not here": ABSENT}.get(kind, FAILED), x, y, text,
              style.MOVED[2] if kind == "varies" else "black")


def _count(cells, rows, x, y):
    """How many of these ops moved, if any was tested."""
    tested = [row.verdict == "varies" for row in rows if row is not None and row.verdict in ("same", "varies")]
    if tested:
        _, fill, ink = style.MOVED if any(tested) else style.SAME
        cells.add(fill, x, y, f"{sum(tested)}", ink)


def _title(title, form) -> str:
    """The title's lines as one text, in lines as long as the figure is wide."""
    return style.wrapped(", ".join(title.splitlines()), form.wide - 2 * MARGIN, form.title, "bold")


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
