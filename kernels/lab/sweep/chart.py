"""Token charts: plain functions from rows with data/'s columns to a Figure. Figures and widgets draw with these.

A chart shows one experiment (one op, dtype, shape and clock): medians over token counts with their 20-80 % band,
and under them, for every contender and token count, whether its bits were those of the largest batch.
"""
from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import ScaledTranslation

from .. import style

CLOCKS = {"cold": "device time, inputs out of cache", "graph": "device time, warm inputs",
          "call": "host time a call, launch included", "event": "an event pair around each call, warm inputs",
          "flush": "an event pair around a call, inputs out of cache"}
WIDTH, PLOT_INCHES = 9.0, 7.9


def sweep_chart(rows: pd.DataFrame, *, clock: str, title: str = "", log: bool = False, machine: str = "",
                overlays: Iterable[pd.DataFrame] = (), published: pd.DataFrame | None = None,
                ceiling: float | None = None, tokens: Sequence[int] = (), labels: Mapping[str, str] = {}) -> Figure:
    """Time against token counts with a strip of verdicts under it.

    rows       data/'s columns; those of another clock are left out. ValueError if they mix dtypes or shapes
    title      the claim; machine: where the rows were measured, for the caption
    log        both axes logarithmic; otherwise token counts evenly spaced and time from zero
    overlays   other machines' rows (with a column `machine`), thin and dashed; another clock is named in the legend
    published  data/llm42/rms_norm.csv, as faint marks; ceiling: a copy's GB/s, drawn as the least possible time
    tokens     counts to leave room for before they are measured; labels: other names for contenders

    The reader's rcParams stay as they are; to save an SVG with the same bytes each time, call style.theme() first.
    """
    rows = one_experiment(rows, clock)
    labels = labels or style.ON_A_CPU if machine.endswith((" thread", " threads")) else labels
    overlays = [one_experiment(o, clock, or_other=True) for o in overlays]
    overlays = [o for o in overlays if len(o)]
    frames = [rows, *overlays, *([published] if published is not None else [])]
    counts = sorted({*tokens, *(int(t) for f in frames for t in f.tokens)})
    unit = "ms" if max((f.us_p50.max() for f in [rows, *overlays] if len(f)), default=0) >= 5000 else "us"
    names = style.in_order(rows)
    with mpl.rc_context():
        style.theme()
        figure, axes, strip = _panels(max(len(names), 1), len(overlays) + (published is not None) + bool(ceiling))
        lines, notes = time_lines(axes, rows, counts, log=log, unit=unit, labels=labels), []
        for overlay in overlays:
            faint = time_lines(axes, overlay, counts, log=log, unit=unit, faint=True)
            lines += [line for line, name in zip(faint, style.in_order(overlay), strict=True) if name not in names]
            notes.append(_proxy(_overlay_label(overlay, rows, clock), linestyle=_FAINT["linestyle"], linewidth=1.3))
        if published is not None:
            notes.append(published_marks(axes, published, counts, log=log, unit=unit))
        verdict_strip(strip, rows, counts, log=log)
        _finish(axes, strip, counts, log, unit)
        if ceiling and len(rows):  # last, so that it does not stretch the time axis
            notes.append(ceiling_line(axes, rows, counts, ceiling, log=log, unit=unit))
        _head(axes, title, lines, notes)
        style.caption(figure, _caption(rows, machine, clock, log))
    return figure


def one_experiment(rows: pd.DataFrame, clock: str, or_other: bool = False) -> pd.DataFrame:
    """The rows of this clock (or, if it has none and `or_other`, of its only clock). ValueError if they are mixed."""
    chosen = rows[rows.clock == clock]
    if or_other and not len(chosen) and rows.clock.nunique() == 1:
        chosen = rows
    for column in ("op", "dtype", "shape"):
        if chosen[column].nunique() > 1:
            found = ", ".join(map(str, chosen[column].unique()))
            raise ValueError(f"a chart shows one {column}, these rows have {found}")
    return chosen.sort_values("tokens", kind="stable")


def time_lines(axes: Axes, rows: pd.DataFrame, tokens: Sequence[int], *, log: bool = False, unit: str = "us",
               faint: bool = False, labels: Mapping[str, str] = {}) -> list[Line2D]:
    """A median line with its 20-80 % band for each contender; `tokens` are the axis' counts. Returns the lines."""
    lines, size = [], float(np.clip(0.5 * np.median([*_gaps(tokens, log), 100]), 2, mpl.rcParams["lines.markersize"]))
    for name in style.in_order(rows):
        mine = rows[rows.implementation == name]
        look = style.contender(name) | ({"label": labels[name]} if name in labels else {})
        x = style.positions(mine.tokens, tokens, log)
        low, middle, high = (mine[c].to_numpy(float) / _PER[unit] for c in ("us_p20", "us_p50", "us_p80"))
        if not faint:
            axes.fill_between(x, low, high, color=look["color"], alpha=0.18, linewidth=0)
            if len(x) == 1:  # a band of no width cannot be seen
                axes.vlines(x, low, high, color=look["color"], alpha=0.35, linewidth=5)
        lines += axes.plot(x, middle, **look | (_FAINT if faint else {"markersize": size}),
                           zorder=2 if faint else 3)
        style.hollow(axes, x, middle, mine, lines[-1])
    return lines


def published_marks(axes: Axes, published: pd.DataFrame, tokens: Sequence[int], *, log: bool = False,
                    unit: str = "us") -> Line2D:
    """The points read off the published chart, as faint hollow marks. Returns their legend entry."""
    for name in style.in_order(published):
        mine = published[published.implementation == name]
        look = style.contender(name)
        axes.plot(style.positions(mine.tokens, tokens, log), mine.read_off_ms * 1e3 / _PER[unit], linestyle="none",
                  marker=look["marker"], color=look["color"], markerfacecolor="none", markersize=8, alpha=0.45)
    return _proxy("Published by LLM-42 (H100 PCIe, D=8192,residual)", linestyle="none", marker="o", markersize=8,
                  markerfacecolor="none", alpha=0.6)


def ceiling_line(axes: Axes, rows: pd.DataFrame, tokens: Sequence[int], ceiling: float, *, log: bool = False,
                 unit: str = "us") -> Line2D:
    """The time in which a plain copy moves the bytes each point must move, at `ceiling` GB/s. Returns the line."""
    least = rows.drop_duplicates("tokens")
    us = least.gbytes_per_s * least.us_p50 / ceiling  # the first two make the bytes
    return axes.plot(style.positions(least.tokens, tokens, log), us / _PER[unit], color="#404040", linewidth=1.2,
                     linestyle=(0, (1, 1.5)), label=f"A plain copy's time at {ceiling:,.0f} GB/s", zorder=1)[0]


def verdict_strip(axes: Axes, rows: pd.DataFrame, tokens: Sequence[int], *, log: bool = False) -> None:
    """One line of cells for each contender: a tick where its bits were those of the largest batch, else a cross."""
    names = style.in_order(rows)
    cells = dict(zip(tokens, np.minimum(21.0, 0.88 * _gaps(tokens, log)), strict=True))
    for y, name in enumerate(names):
        mine = rows[rows.implementation == name]
        for x, count, same in zip(style.positions(mine.tokens, tokens, log), mine.tokens, mine.same_bits, strict=True):
            if pd.isna(same):
                continue
            glyph, fill, ink = style.SAME if same else style.MOVED
            axes.vlines(x, y - 0.42, y + 0.42, color=fill, linewidth=0.72 * cells[count])
            if cells[count] >= 9:
                axes.text(x, y, glyph, color=ink, ha="center", va="center_baseline", fontsize=0.5 * cells[count])
    axes.set_yticks(range(len(names)), names)
    for label, name in zip(axes.get_yticklabels(), names, strict=True):
        label.set(color=style.contender(name)["color"], fontweight="bold")
    axes.set_ylim(max(len(names), 1) - 0.4, -0.6)
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)


def claim(rows: pd.DataFrame, tokens: Sequence[int] = ()) -> str:
    """What the verdicts in these rows (of one experiment, over `tokens` if not all are there yet) say."""
    if not len(rows):
        return "Nothing measured yet"
    sizes, moves = {}, {}
    for name in style.in_order(rows):
        same = rows.same_bits[rows.implementation == name].dropna()
        sizes[name], moves[name] = len(same), int((~same.astype(bool)).sum())
    moved = [f"{n} at {moves[n]} of {sizes[n]} token counts" for n in moves if moves[n]]
    moved[1:] = [text.removesuffix(" token counts") for text in moved[1:]]
    kept = [n for n in moves if not moves[n]]
    if moved:
        return f"Bits moved: {_listed(moved)}" + (f". Same bits: {_listed(kept)}" if kept else "")
    if len({*rows.tokens, *tokens}) == 1:
        return "One token count: its bits have nothing to be compared with"
    return f"Same bits at every token count: {_listed(kept)}"


_LINE = 15  # points a line of legend takes
_PER = {"us": 1.0, "ms": 1000.0}
_FAINT = {"linewidth": 1.1, "linestyle": (0, (4, 2)), "alpha": 0.6, "markersize": 4}


def _listed(words) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _limits(tokens, log) -> tuple[float, float]:
    if not len(tokens):
        return (0.5, 2) if log else (-0.5, 0.5)
    room = max(1.3, (tokens[-1] / tokens[0]) ** 0.05)
    return (tokens[0] / room, tokens[-1] * room) if log else (-0.5, len(tokens) - 0.5)


def _pixels(tokens, log) -> np.ndarray:
    """Roughly where the counts are, in pixels of a 100 dpi figure."""
    low, high = _limits(tokens, log)
    x = style.positions(tokens, tokens, log)
    share = np.log(x / low) / np.log(high / low) if log else (x - low) / (high - low)
    return 100 * PLOT_INCHES * share


def _gaps(tokens, log) -> np.ndarray:
    """Pixels from each count to its nearest neighbour."""
    between = np.concatenate([[100.0], np.diff(_pixels(tokens, log)), [100.0]])
    return np.minimum(between[:-1], between[1:])[:len(tokens)]


def _tick_labels(tokens, log) -> list[str]:
    """The counts as text, '' where it would run into its neighbour; the last one always has its text."""
    pixels, texts = _pixels(tokens, log), [str(t) for t in tokens]
    half = [4 * len(t) + 3 for t in texts]
    end = pixels[-1] - half[-1] if len(texts) else 0
    free, labels = -1e9, []
    for i, text in enumerate(texts):
        fits = i == len(texts) - 1 or (pixels[i] - half[i] >= free and pixels[i] + half[i] <= end)
        labels.append(text if fits else "")
        free = pixels[i] + half[i] if fits else free
    return labels


def _panels(contenders: int, notes: int):
    strip, head = 0.27 * contenders, 0.21 * (-(-contenders // 3) + -(-notes // 2))
    figure = Figure(figsize=(WIDTH, 4.7 + strip + head), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.07, w_pad=0.07, hspace=0.02)
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(3.2, strip))
    return figure, axes, below


def _proxy(label, **look) -> Line2D:
    return Line2D([], [], color=style.GREY, label=label, **look)


def _overlay_label(overlay, rows, clock) -> str:
    """The machine, and in what else the overlay differs from the rows."""
    said = ["recorded"]
    for column in ("dtype", "shape"):
        if not len(rows) or overlay[column].iloc[0] != rows[column].iloc[0]:
            said.append(str(overlay[column].iloc[0]))
    if overlay.clock.iloc[0] != clock:
        said.append(f"{overlay.clock.iloc[0]} clock")
    name = str(overlay.machine.iloc[0]) if "machine" in overlay else "another machine"
    return f"{name} ({', '.join(said)})"


def _caption(rows, machine, clock, log) -> str:
    what = [f"{rows.op.iloc[0]} {rows['shape'].iloc[0]} {rows.dtype.iloc[0]}"] if len(rows) else []
    parts = [*([machine] if machine else []), *what, f"clock {clock}: {CLOCKS.get(clock, clock)}",
             "medians, band 20-80 %", "both axes logarithmic" if log else "counts evenly spaced, time from zero"]
    return textwrap.fill(" · ".join(parts), 132)


def _finish(axes, strip, tokens, log, unit):
    """Scales, ticks and labels."""
    axes.margins(y=0.08)
    if log:
        axes.set_yscale("log")
    style.token_axis(strip, tokens, log)
    labels = _tick_labels(tokens, log)
    shown = [t for t, label in zip(tokens, labels, strict=True) if label]
    strip.set_xticks(style.positions(shown, tokens, log), [str(t) for t in shown])
    axes.set_xlim(_limits(tokens, log))
    axes.minorticks_off()
    axes.tick_params(labelbottom=False, length=0)
    axes.set_ylabel(f"Time a call ({'µs' if unit == 'us' else 'ms'})")
    style.time_ticks(axes, log)
    if not axes.lines:
        axes.text(0.5, 0.5, "no points yet", transform=axes.transAxes, ha="center", color=style.GREY)
        axes.set_yticks([])
    else:
        strip.set_title("Same bits as in the largest batch?", fontsize=8.5, fontweight="normal", color="#404040",
                        pad=3)


def _head(axes, title, lines, notes):
    """Above the axes: the claim, under it the legend of the lines, under that the legend of the faint marks."""
    across = 2 if len(lines) == 4 else 3
    rows_of_notes, rows_of_lines = -(-len(notes) // 2), -(-len(lines) // across)
    for handles, columns, rows_below in ((lines, across, rows_of_notes), (notes, 2, 0)):
        if handles:
            before = axes.get_legend()
            up = ScaledTranslation(0, (4 + _LINE * rows_below) / 72, axes.figure.dpi_scale_trans)
            legend = axes.legend(handles=handles, loc="lower left", ncols=columns, frameon=False, handlelength=2.4,
                                 bbox_to_anchor=(0, 1), bbox_transform=axes.transAxes + up, columnspacing=1.6,
                                 borderaxespad=0, borderpad=0)
            legend.set_in_layout(False)  # a wide legend must not squeeze the axes
            if before:  # an Axes holds one legend; the one before stays as a plain artist
                axes.add_artist(before)
    axes.set_title(textwrap.fill(title, 84) or " ", pad=10 + _LINE * (rows_of_notes + rows_of_lines))
