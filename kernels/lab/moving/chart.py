"""A picture of a model's layers, in the order they run: in which way which of them starts or carries a difference."""
from __future__ import annotations

import matplotlib as mpl
from matplotlib.figure import Figure

from .. import style
from .measure import CARRIES, STARTS, Call, Report

MOST = 40  # layers shown
_SAID = {STARTS: style.MOVED, CARRIES: ("", "#f0b9a8", style.INK), "": style.SAME}


def _cells(report: Report) -> dict[tuple[str, str], Call | None]:
    """(layer, way) -> the call that tells most of it: the first that starts, else the first that carries; or None."""
    cells: dict[tuple[str, str], Call | None] = {}
    for call in report.calls:
        before = cells.setdefault((call.module, call.way), None)
        if call.moved and (before is None or before.verdict == CARRIES and call.verdict == STARTS):
            cells[call.module, call.way] = call
    return cells


def moving_chart(report: Report, title: str = "") -> Figure:
    """A row for each layer, a column for each way: same, carries, or starts with the op's name."""
    cells = _cells(report)
    layers = list(dict.fromkeys(layer for layer, _ in cells))
    ways = list(dict.fromkeys(way for _, way in cells))
    shown = layers[:MOST]
    with mpl.rc_context():
        style.theme()
        wide = max(map(len, shown), default=0)
        figure = Figure(figsize=(1.2 + 0.085 * wide + 1.7 * len(ways), 1.4 + 0.25 * len(shown)), layout="constrained")
        axes = figure.subplots()
        for y, layer in enumerate(shown):
            for x, way in enumerate(ways):
                if (layer, way) in cells:
                    _cell(axes, x, y, cells[layer, way])
        axes.set(xlim=(-0.5, len(ways) - 0.5), ylim=(len(shown) - 0.5, -0.5))
        axes.set_xticks(range(len(ways)), ways)
        axes.set_yticks(range(len(shown)), shown, fontsize=8)
        axes.xaxis.tick_top()
        axes.tick_params(length=0)
        axes.grid(False)
        axes.spines[:].set_visible(False)
        width = figure.get_size_inches()[0] - 0.2
        figure.suptitle(style.wrapped(title or claim(report), width, 11, "bold"), x=0.01, ha="left", fontsize=11,
                        fontweight="bold")
        left = f"{len(layers) - MOST} layers behind these are not shown. " if len(layers) > MOST else ""
        style.caption(figure, style.wrapped(f"Dark: the op that starts a difference, its inputs being equal. Pale: "
                                            f"carries one on. {left}Ways: {', '.join(ways)}.", width, style.CAPTION))
    return figure


def _cell(axes, x: float, y: float, call: Call | None) -> None:
    glyph, fill, ink = _SAID[call.verdict if call else ""]
    axes.add_patch(mpl.patches.Rectangle((x - 0.48, y - 0.44), 0.96, 0.88, facecolor=fill, edgecolor="none"))
    text = f"{glyph} {_short(call.op)}" if call and call.verdict == STARTS else glyph
    axes.text(x, y, text, ha="center", va="center", fontsize=8, color=ink)


def _short(op: str) -> str:
    """A name that fits a cell."""
    return "attention" if op.startswith("_scaled_dot_product") else op if len(op) <= 18 else f"{op[:17]}…"


def claim(report: Report) -> str:
    """What was found, in one line."""
    first = report.first
    if first is None:
        return f"Nothing was compared: {', '.join(report.unchecked)}." if report.unchecked else "No bit moved."
    ways = list(dict.fromkeys(call.way for call in report.calls if call.verdict == STARTS))
    where = first.module or "the model"
    return f"{_short(first.op)} in {where} is the first to move its bits ({', '.join(ways)})"


def moving_words(report: Report) -> str:
    """The picture in words: its text alternative."""
    cells = _cells(report)
    said = [f"{layer}, {way}: {call.op} {call.verdict}, {call.differ} of {call.elements} elements"
            for (layer, way), call in cells.items() if call is not None]
    return f"Layers in the order they run, and what moves in each. {claim(report)} {'; '.join(said[:MOST])}".strip()
