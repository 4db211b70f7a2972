"""Pictures of rounding: where the numbers are, and where the sums of the same numbers in many orders end.

Plain functions to a Figure; notebook 01 and its widget draw with these.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from ... import bits
from ...op import dtype_name
from .. import style
from . import measure as orders

SHUFFLES = 1000  # orders drawn where there are too many to try
NUMBER_LINE_ALT = (
    "Two number lines. Above, every number of an 8-bit float from 0 to 16: crowded near 0, a half apart from 2 to 4, "
    "two apart from 8 to 16. Below, the numbers from 250 to 262: bfloat16 has every whole number up to 256 and every "
    "second one after it, so that a cross at 257, the sum of 256 and 1, falls in a gap; float16 has steps of 1/8 and "
    "then 1/4; float32's are too close to be told apart.")
_BINS = 60


def number_line() -> Figure:
    """Every number of an 8-bit format up to 16, and those of the three common formats near 256."""
    low, around, high = 250, 256, 262
    with mpl.rc_context():
        style.theme()
        figure = Figure(figsize=(9, 3.9), layout="constrained")
        above, below = figure.subplots(2, 1, height_ratios=(1, 2.3))
        _ticks(above, 0, representable(torch.float8_e5m2, 0, 16))
        above.set_title("float8_e5m2, 3 significant bits: every number from 0 to 16")
        above.set(yticks=[], xlim=(-0.2, 16.2), xticks=range(0, 17, 2))
        names = ("bfloat16", "float16", "float32")
        for y, dtype in enumerate(map(orders.DTYPES.get, names)):
            _row_near(below, y, dtype, low, around, high)
        below.plot(around + 1, 0, "x", color=style.VERMILION, markersize=8, markeredgewidth=2)
        below.text(around + 1, -0.34, f"{around} + 1", color=style.VERMILION, ha="center", va="bottom", fontsize=8.5)
        below.set_title(f"Three formats near {around}: above a power of two the gaps double")
        below.set_yticks(range(len(names)), [f"{n}\n{bits.SIGNIFICANT_BITS[orders.DTYPES[n]]} bits" for n in names])
        below.set(ylim=(2.75, -0.75), xlim=(low - 0.2, high + 0.2), xticks=range(low, high + 1))
        for axes in (above, below):
            axes.grid(False)
            axes.spines["left"].set_visible(False)
            axes.tick_params(axis="y", length=0)
    return figure


def representable(dtype: torch.dtype, low: float, high: float) -> list[float]:
    """All numbers of this dtype from low to high. ValueError where there are more than 65,536."""
    found = [low]
    while found[-1] < high:
        found.append(found[-1] + orders.ulp(found[-1], dtype))
        if len(found) > 1 << 16:
            raise ValueError(f"there are too many numbers of {dtype_name(dtype)} from {low} to {high} to list them")
    return found


def _ticks(axes, y, values):
    axes.vlines(values, y - 0.3, y + 0.3, color=style.BLUE, linewidth=1.5)


def _row_near(axes, y, dtype, low, around, high):
    gaps = [orders.ulp(low, dtype), orders.ulp(around, dtype)]
    if gaps[0] > (high - low) / 200:
        _ticks(axes, y, representable(dtype, low, high))
    else:  # too close to be told apart
        axes.fill_between([low, high], y - 0.3, y + 0.3, color=style.BLUE, linewidth=0)
    for gap, middle in zip(gaps, ((low + around) / 2, (around + high) / 2), strict=True):
        text = f"{gap:g}" if gap > 1e-3 else f"1/{1 / gap:,.0f}"
        axes.text(middle, y + 0.36, f"gap {text}", ha="center", va="top", fontsize=8.5, color="#404040")


def distribution_chart(found: Mapping[str, torch.Tensor], x: torch.Tensor, title: str = "",
                       caption: str = "") -> Figure:
    """One histogram a name: where the sums `found` of vector x lie, in ulps from the exact sum.

    Each panel is scaled to its own highest bar; its verdict is whether all orders gave the same bits.
    """
    table = orders.summary(found, x)
    errors = {name: orders.errors(y, x).numpy() for name, y in found.items()}
    nearest = torch.tensor([float(orders.exact(x))], dtype=torch.float64, device="cpu").to(x.dtype)
    edges = _edges(np.concatenate(list(errors.values())), orders.errors(nearest, x).item())
    with mpl.rc_context():
        style.theme()
        figure = Figure(figsize=(9, 1.25 + 0.85 * len(found)), layout="constrained")
        panels = figure.subplots(len(found), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (name, y) in zip(panels, errors.items(), strict=True):
            _histogram(axes, name, y, edges, table.loc[name])
        bottom = panels[-1]
        bottom.tick_params(axis="x", pad=8)
        power = f"2^{{{np.log2(orders.unit(x)):.0f}}}"
        bottom.set_xlabel(f"Distance from the exact sum, in ulps of {dtype_name(x.dtype)} (one is ${power}$)")
        panels[0].set_title(title or claim(table, x.numel()), pad=8)
        ticks = f"A tick below the bars: a bin, {edges[1] - edges[0]:g} ulp wide, that holds a sum"
        style.caption(figure, f"{caption}\n{ticks}".strip())
    return figure


def claim(table: pd.DataFrame, n: int) -> str:
    """What a table of orders.summary says of n numbers, in one line."""
    few, many = table["different results"].min(), table["different results"].max()
    between = f"{few:,} to {many:,} different sums" if few < many else f"{many:,} sum{'s' if many > 1 else ''}"
    return f"The same {n:,} numbers in other orders: {between}"


def in_words(found: Mapping[str, torch.Tensor], x: torch.Tensor) -> str:
    """The chart of these sums in words: its text alternative."""
    said = [f"{name}: different results {line['different results']:,.0f}, largest error "
            f"{line['worst error (ulp)']:.3g} ulp" for name, line in orders.summary(found, x).iterrows()]
    return (f"Histograms of sums of the same {x.numel():,} {dtype_name(x.dtype)} numbers in other orders, by distance "
            f"from the exact sum in ulps. {'; '.join(said)}.")


def study(n: int, dtype: torch.dtype = torch.float32, kinds: Sequence[str] = tuple(orders.KINDS), spread: int = 0,
          positive: bool = False, seed: int = 0) -> tuple[Figure, str]:
    """`n` numbers added by each of `kinds` in every order (n up to 8) or in 1000 random ones: the chart, and in words.

    Arguments as in orders.numbers and orders.distribution. TypeError or ValueError for anything else.
    """
    x = orders.numbers(n, dtype, spread, positive, seed)
    rows = orders.permutations(n) if n <= 8 else orders.shuffles(n, SHUFFLES, seed)
    found = orders.distribution(x, rows, kinds)
    which = f"all {len(rows):,} orders" if n <= 8 else f"{len(rows):,} random orders"
    signs = "positive" if positive else "of both signs"
    caption = (f"{n:,} numbers of {dtype_name(dtype)}, {signs}, sizes over {4 + spread} powers of two, seed {seed}; "
               f"{which} of the same numbers")
    return distribution_chart(found, x, caption=caption), in_words(found, x)


def _edges(errors, centre) -> np.ndarray:
    """Bins for all panels, one of them around `centre`: one ulp wide, or wider where the sums lie far apart."""
    low, high, width = min(errors.min(), 0), max(errors.max(), 0), 1.0
    while (high - low) / width > _BINS:
        width *= 2
    first = centre - width / 2 - 0.25 * (width > 1)  # no sum lies on an edge
    steps = np.arange(np.floor((low - first) / width) - 1, np.floor((high - first) / width) + 3)
    return first + width * steps


def _histogram(axes, name, errors, edges, line):
    count, _ = np.histogram(errors, edges)
    share, middle = count / len(errors), (edges[:-1] + edges[1:]) / 2
    top = share.max()
    axes.bar(middle, share, 0.9 * np.diff(edges), color=style.BLUE, linewidth=0)
    axes.vlines(middle[count > 0], -0.11 * top, -0.03 * top, color=style.BLUE, linewidth=2)  # rare results show too
    axes.axvline(0, color="#404040", linewidth=1, linestyle=(0, (3, 2)))
    axes.set_yticks([top], [f"{100 * top:.3g} %"])
    axes.set(ylim=(-0.12 * top, 1.08 * top), xlim=(edges[0], edges[-1]))
    axes.set_ylabel(name, rotation=0, ha="right", va="center", fontweight="bold")
    axes.yaxis.set_label_coords(-0.085, 0.5)
    axes.grid(False)
    axes.spines["left"].set_visible(False)
    axes.spines["bottom"].set_position(("data", 0))
    axes.tick_params(length=0)
    _verdict(axes, int(line["different results"]), line["worst error (ulp)"])


def _verdict(axes, results, worst):
    """Right of a panel: whether the order mattered, and how far off it was."""
    glyph, fill, ink = style.SAME if results == 1 else style.MOVED
    several = results > 1
    axes.text(1.015, 0.5, f"{glyph} {results:,} result{'s' * several}", transform=axes.transAxes, fontsize=9,
              va="bottom", color=fill if several else ink, fontweight="bold")
    axes.text(1.015, 0.45, f"off by {'up to ' * several}{worst:,.3g} ulp", transform=axes.transAxes, fontsize=8.5,
              va="top", color="#404040")
