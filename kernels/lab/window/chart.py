"""Window charts: plain functions from rows with verify_cost.csv's columns to axes, for figures and widgets.

`per_token` is the published chart's form: a pass divided by its tokens, windows evenly spaced, time from zero.
`whole_pass` shows the same passes undivided on log axes, above the least time their matrix products could take.
"""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .. import records, style

# curve -> colour, marker, words
CURVES = {
    "paper": (style.BLUE, "o", "paper: eager"),
    "graph": (style.VERMILION, "D", "graph: one CUDA graph"),
}
INVARIANT = {"paper": style.PURPLE, "graph": style.BROWN}  # colour of a curve whose ops are not the default
FUSED = {"paper": style.SKY, "graph": style.ORANGE}
OPS = ("default", "invariant", "tiled", "fused")
LOOKS = {"default": "-", "fused": (0, (1, 1.2))}  # line styles; of other ops dashed
# of curve verify: prefix -> marker; ops -> colour
PREFIXES = {1024: "o", 4096: "s"}
REPLAYS = {"default": style.VERMILION, "invariant": style.BROWN, "tiled": style.BROWN, "fused": style.ORANGE}
_PUBLISHED = {"linestyle": "none", "marker": "o", "markersize": 9.5, "markerfacecolor": "none",
              "markeredgewidth": 1.5, "color": style.GREY, "label": "LLM-42 (H100 PCIe)"}
_FAINT = {"linewidth": 1.1, "alpha": 0.6, "markersize": 4}


def published(out=records.DATA) -> pd.DataFrame:
    """The points of LLM-42's chart: as read off it, and as its authors logged them. Raises OSError or ValueError."""
    path = Path(out) / "llm42" / "verify_cost.csv"
    points = pd.read_csv(path, comment="#")
    missing = {"tokens", "read_off_ms_per_token", "logged_total_ms"} - set(points.columns)
    if missing:
        raise ValueError(f"{path} lacks the columns {', '.join(sorted(missing))}")
    return points


def window_chart(rows: pd.DataFrame, *, windows: Sequence[int] = (), points: pd.DataFrame | None = None,
                 recorded: pd.DataFrame | None = None, title: str = "", caption: str = "") -> Figure:
    """Both forms side by side. `rows` may be empty; what else is drawn is as in `per_token` and `whole_pass`.

    windows: those to leave room for before they are measured.
    """
    tables = [table for table in (rows, points, recorded) if table is not None]
    windows = sorted({*windows, *(int(t) for table in tables for t in table.tokens)})
    with mpl.rc_context():
        style.theme()
        figure = Figure(figsize=(11, 4.8), layout="constrained")
        left, right = figure.subplots(1, 2)
        per_token(left, rows, windows, points=points, recorded=recorded)
        whole_pass(right, rows, windows, points=points, recorded=recorded)
        left.set_title("Time a token: the pass, divided")
        right.set_title("Time a pass: undivided, on log axes")
        figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
        style.caption(figure, caption)
    return figure


def per_token(axes: Axes, rows: pd.DataFrame, windows: Sequence[int], *, points: pd.DataFrame | None = None,
              recorded: pd.DataFrame | None = None) -> None:
    """Milliseconds a token over `windows`, evenly spaced.

    points: the published ones, as hollow marks over a green area, as published; recorded: another machine's rows, thin,
    named in column `machine`.
    """
    _lines(axes, rows, windows, divided=True)
    if points is not None:
        axes.fill_between(style.positions(points.tokens, windows, log=False), points.read_off_ms_per_token,
                          color=style.GREEN, alpha=0.18, linewidth=0, zorder=1)
    _add_others(axes, windows, points, recorded, divided=True)
    style.token_axis(axes, windows)
    axes.set(xlabel="Number of Tokens", ylabel="Latency per Token (ms)")
    _finish(axes, log=False)


def whole_pass(axes: Axes, rows: pd.DataFrame, windows: Sequence[int], *, points: pd.DataFrame | None = None,
               recorded: pd.DataFrame | None = None) -> None:
    """Milliseconds a pass over `windows`, both axes logarithmic, and the floor of `rows`. Others as in `per_token`."""
    _lines(axes, rows, windows)
    floor = rows.drop_duplicates("tokens").sort_values("tokens")
    if len(floor):
        axes.plot(floor.tokens, floor.floor_ms, color="#404040", linestyle=(0, (1, 1.5)), linewidth=1.8, zorder=2,
                  label="floor: the matrix products")
    _add_others(axes, windows, points, recorded)
    style.token_axis(axes, windows, log=True)
    axes.set(xlabel="Number of Tokens", ylabel="Time a pass (ms)", yscale="log")
    _finish(axes, log=True)


def replays(axes: Axes, rows: pd.DataFrame) -> None:
    """Milliseconds of a verify pass at work over its window, a line for each ops and prefix, and the floors below.

    A cross on the axis marks a cell whose keys and values did not fit.
    """
    windows = sorted(rows.tokens.unique())
    for (ops, prefix), mine in rows.sort_values("tokens").groupby(["ops", "prefix"], sort=True):
        look = {"color": REPLAYS[ops], "marker": PREFIXES.get(prefix, "D"), "linestyle": LOOKS.get(ops, (0, (4, 2)))}
        known, absent = mine.dropna(subset=["ms_p50"]), mine[mine.ms_p50.isna()]
        axes.fill_between(known.tokens, known.ms_p05, known.ms_p95, color=look["color"], alpha=0.2, linewidth=0)
        axes.plot(known.tokens, known.ms_p50, **look, label=f"{ops} ops behind {prefix}")
        if len(absent):
            axes.plot(absent.tokens, [0.0] * len(absent), linestyle="none", marker="x", color=look["color"],
                      clip_on=False, label=f"{ops} ops behind {prefix}: does not fit")
    for number, (_, mine) in enumerate(rows.drop_duplicates(["prefix", "tokens"]).sort_values("tokens")
                                       .groupby("prefix", sort=True)):
        axes.plot(mine.tokens, mine.floor_ms, color="#404040", linestyle=(0, (1, 1.5)), linewidth=1.8,
                  label="_" if number else "floors: products, keys and values")
    style.token_axis(axes, windows, log=True)
    axes.set(xlabel="Window W, in groups of W x G tokens", ylabel="Time a pass (ms)", ylim=(0, None))
    axes.set_ylim(top=1.6 * axes.get_ylim()[1])
    axes.legend(loc="upper right", ncols=2, handlelength=3).set_in_layout(False)


def colour(curve: str, ops: str) -> str:
    return CURVES[curve][0] if ops == "default" else (FUSED if ops == "fused" else INVARIANT)[curve]


def in_order(rows: pd.DataFrame) -> list[tuple[str, str]]:
    """The (curve, ops) in these rows: paper before graph, default before invariant before tiled."""
    found = set(rows[["curve", "ops"]].itertuples(index=False, name=None))
    return [(curve, ops) for curve in CURVES for ops in OPS if (curve, ops) in found]


def claim(rows: pd.DataFrame) -> str:
    """What the first curve in these rows says, in one sentence."""
    if not len(rows):
        return "Nothing measured yet"
    curve, ops = in_order(rows)[0]
    ms = rows[(rows.curve == curve) & (rows.ops == ops)].sort_values("tokens").set_index("tokens").ms_p50
    first, last = ms.index[0], ms.index[-1]
    level = max(window for window in ms.index if (ms.loc[:window] <= 1.25 * ms[first]).all())
    said = [f"{window} tokens take {ms[window] / ms[first]:.3g} times"
            for window in dict.fromkeys((level, last)) if window != first]
    return (f"Curve {curve}: {' and '.join(said)} as long as {first}" if said
            else f"Curve {curve}: measure another window to compare")


def caption(model: str, where: str) -> str:
    """What was measured, where, and by which clock."""
    return (f"{model}, one request, empty prefix · {where} · clock: host wall time of a pass, medians, band 5-95 %\n"
            "paper: prepare the batch, eager forward, token back on the host · graph: forward and argmax in one graph "
            "· invariant ops: this suite's, every step\ntiled ops: PyTorch's, in tiles of one shape · left: windows "
            "evenly spaced, time from zero · right: both axes logarithmic · hatched bands: invariant or tiled ops")


def _lines(axes, rows, windows, *, divided=False, faint=False) -> list[Line2D]:
    """A median line with its 5-95 % band for each curve and ops; ops other than the default dashed."""
    lines = []
    for curve, ops in in_order(rows):
        mine = rows[(rows.curve == curve) & (rows.ops == ops)].sort_values("tokens")
        color, (_, marker, words) = colour(curve, ops), CURVES[curve]
        x, share = style.positions(mine.tokens, windows, log=not divided), mine.tokens if divided else 1
        low, middle, high = (mine[column] / share for column in ("ms_p05", "ms_p50", "ms_p95"))
        if not faint:
            axes.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0,
                              hatch=None if ops == "default" else "////")
        look = {"color": color, "marker": marker, "linestyle": LOOKS.get(ops, (0, (4, 2))),
                "label": words if ops == "default" else f"{curve}, {ops} ops", "zorder": 3}
        lines += axes.plot(x, middle, **look | (_FAINT | {"label": "_"} if faint else {}))
    return lines


def _add_others(axes, windows, points, recorded, divided=False):
    if recorded is not None and len(recorded):
        _lines(axes, recorded, windows, divided=divided, faint=True)
        axes.plot([], [], color=style.GREY, **_FAINT, label=f"recorded, {recorded.machine.iloc[0]}")
    if points is not None:
        column = "read_off_ms_per_token" if divided else "logged_total_ms"
        axes.plot(style.positions(points.tokens, windows, log=not divided), points[column], **_PUBLISHED, zorder=4)


def _finish(axes, log):
    """The time axis fits the lines, not the bands: one slow run must not flatten a chart."""
    axes.minorticks_off()
    times = np.concatenate([line.get_ydata() for line in axes.lines] or [[]]).astype(float)
    if not len(times):
        axes.text(0.5, 0.5, "no points yet", transform=axes.transAxes, ha="center", color=style.GREY)
        axes.set_yticks([])
    elif log:
        low, high = times.min() / 1.25, times.max() * 1.15
        axes.set_ylim(low, high * (high / low) ** 0.3)  # room for the legend above the lines
        style.time_ticks(axes, log)
        axes.legend(loc="upper left", ncols=2, handlelength=3).set_in_layout(False)
    else:
        axes.set_ylim(0, 1.15 * times.max())
        style.time_ticks(axes, log)
        axes.legend(loc="upper right", handlelength=3)
