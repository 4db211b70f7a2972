"""Pictures of attention's order, of one sequence's seven ways, and of the exponential unit's errors.

Plain functions to a Figure, each with one that says it in words; notebook 05 draws with these.
"""
from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from ...ops.attention.order import BLOCK, LEAF
from .. import style
from .measure import Way

_CALLS = sns.color_palette("crest", 7).as_hex()
_GIVEN = "#dcdcdc"
_LEAVES = ("#d7e6f3", "#fbe3c9", "#dceee4", "#eedcea")


# One sequence, seven ways.

def ways_chart(ways: Sequence[Way], caption: str = "", title: str = "") -> Figure:
    """A bar a way: which positions each call computes, a shade a call; beside it how many calls, and the digest.

    `caption` says what computed them and where; the claim is the title if none is given.
    """
    with mpl.rc_context():
        style.theme()
        figure = Figure(figsize=(9, 1.5 + 0.42 * len(ways)), layout="constrained")
        axes = figure.subplots()
        draw_ways(axes, ways)
        axes.set_title(title or ways_claim(ways), pad=10)
        style.caption(figure, f"A shade a call; grey: computed for another request. {caption}".strip())
    return figure


def draw_ways(axes: Axes, ways: Sequence[Way]) -> None:
    """The bars alone."""
    n, first = len(ways[0].result), ways[0].digest
    for y, way in enumerate(ways):
        if way.given:
            axes.barh(y, way.given, 0.62, 0, color=_GIVEN, hatch="///", edgecolor="white", linewidth=0)
        for i, (begin, end) in enumerate(way.spans):
            axes.barh(y, end - begin, 0.62, begin, color=_CALLS[i * 3 % len(_CALLS)], edgecolor="white",
                      linewidth=0.8 if len(way.spans) < 12 else 0)
        axes.text(way.given + (n - way.given) / 2, y, way.note, ha="center", va="center", fontsize=8)
        glyph, fill, ink = style.SAME if way.digest == first else style.MOVED
        axes.text(n * 1.02, y, _calls(way), va="center", fontsize=8.5)
        axes.text(n * 1.15, y, f"{way.digest[:12]}  {glyph}", va="center", fontsize=8.5, color=ink,
                  bbox={"facecolor": fill, "edgecolor": "none", "boxstyle": "round,pad=0.25"})
    axes.set(yticks=range(len(ways)), yticklabels=[way.name for way in ways], xlabel="position in the sequence",
             xlim=(0, n * 1.36), xticks=_ticks(n), ylim=(len(ways) - 0.5, -0.6))
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(axis="y", length=0)


def ways_claim(ways: Sequence[Way]) -> str:
    """What the digests say, in one line."""
    found = len({way.digest for way in ways})
    return f"One sequence, {len(ways)} ways, {'one digest' if found == 1 else f'{found} digests'}"


def ways_words(ways: Sequence[Way]) -> str:
    """The picture in words: its text alternative."""
    last = len(ways[0].result) - 1
    said = [f"{way.name}: {_calls(way)}"
            + (f" for positions {way.given} to {last}, those before for another request" if way.given
               else f" of {_sizes(way)}" if 1 < len(way.spans) < 8 else "")
            + f", {f'{way.note}, ' if way.note else ''}{way.digest[:12]}" for way in ways]
    return (f"{ways_claim(ways)}. A bar a way over the positions 0 to {last} of one sequence, a shade a call, the "
            f"digest beside it. {'; '.join(said)}.")


def _calls(way) -> str:
    return _many(len(way.spans), "call", "calls")


def _many(count: int, one: str, more: str) -> str:
    return f"{count} {one if count == 1 else more}"


def _sizes(way) -> str:
    return ", ".join(str(end - begin) for begin, end in way.spans)


def _ticks(n: int) -> list[int]:
    """From 0 to n in six or so round steps."""
    step = next((s for s in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000) if n / s <= 7), n)
    return [*range(0, n - step // 3, step), n]


# The order of the keys.

def key_order(positions: Sequence[int], window: int = 0) -> Figure:
    """For a query at each position: its blocks of keys, numbered in the order in which they are taken.

    Blocks and leaves lie at absolute positions; a leaf has one colour, and pale hatching is what a query does not see.
    """
    with mpl.rc_context():
        style.theme()
        figure = Figure(figsize=(10, 1.6 + 0.55 * len(positions)), layout="constrained")
        axes = figure.subplots()
        end = (max(positions) // BLOCK + 1) * BLOCK
        for y, position in enumerate(positions):
            _query(axes, y, position, window)
        for at in range(LEAF, end, LEAF):
            axes.vlines(at, -0.75, len(positions) - 0.45, color="#404040", linewidth=1.6)
        for leaf in range(-(-end // LEAF)):
            middle = (leaf * LEAF + min(end, leaf * LEAF + LEAF)) / 2
            axes.text(middle, -0.62, f"leaf {leaf}", ha="center", va="center", fontsize=9)
        axes.set(xlim=(-8, end + 8), ylim=(len(positions) - 0.4, -0.85), yticks=range(len(positions)),
                 yticklabels=[f"query {p}" for p in positions], xlabel="position of the key",
                 xticks=range(0, end + 1, LEAF // 2))
        axes.set_title("Edges at absolute positions; each query begins with its newest block", pad=10)
        axes.grid(False)
        axes.spines[:].set_visible(False)
        axes.tick_params(axis="y", length=0)
        style.caption(figure, f"Blocks of {BLOCK} keys, leaves of {LEAF}. Numbers: which block comes first, second and "
                              "so on. Hatched: keys that the query does not see")
    return figure


def key_order_words(positions: Sequence[int], window: int = 0) -> str:
    """The picture in words: its text alternative."""
    said = []
    for position in positions:
        taken = blocks(position, window)
        leaves = len({block * BLOCK // LEAF for block in taken})
        said.append(f"the query at {position} takes {_many(len(taken), 'block', 'blocks')}, from {taken[0]} down to "
                    f"{taken[-1]}, in {_many(leaves, 'leaf', 'leaves')}")
    return (f"A line a query over the positions of the keys, cut in blocks of {BLOCK} and leaves of {LEAF} at the same "
            f"places for all. {'; '.join(said)}. The last block of each is seen up to the query itself.")


def blocks(position: int, window: int = 0) -> list[int]:
    """The blocks that a query sees, in the order in which they are taken."""
    oldest = max(position - window + 1, 0) if window else 0
    return list(range(position // BLOCK, oldest // BLOCK - 1, -1))


def _query(axes, y, position, window):
    oldest = max(position - window + 1, 0) if window else 0
    for step, block in enumerate(blocks(position, window), start=1):
        left, fill = block * BLOCK, _LEAVES[block * BLOCK // LEAF % len(_LEAVES)]
        axes.barh(y, BLOCK, 0.7, left, facecolor="none", edgecolor="#b0b0b0", hatch="////", linewidth=0)
        begin, end = max(left, oldest), min(left + BLOCK, position + 1)
        axes.barh(y, end - begin, 0.7, begin, color=fill, linewidth=0)
        axes.barh(y, BLOCK, 0.7, left, facecolor="none", edgecolor="#404040", linewidth=0.8)
        axes.text(left + BLOCK / 2, y, str(step), ha="center", va="center", fontsize=8,
                  path_effects=[withStroke(linewidth=2.5, foreground="white", alpha=0.8)])


# The exponential unit.

def unit_chart(negative: torch.Tensor, positive: torch.Tensor) -> Figure:
    """What measure.unit_errors found for both signs: the range of errors as a band, their mean as a line."""
    with mpl.rc_context():
        style.theme()
        figure = Figure(figsize=(9, 3.8), layout="constrained")
        for axes, errors, sign in zip(figure.subplots(1, 2, sharey=True), (negative, positive), (-1, 1), strict=True):
            x = sign * (np.arange(len(errors)) + 0.5) / len(errors)
            low, mean, high = errors.numpy().T
            axes.fill_between(x, low, high, color=style.BLUE, alpha=0.25, linewidth=0, label="least to greatest")
            axes.plot(x, mean, color=style.BLUE, linewidth=1.4, label="mean")
            for half in (-0.5, 0.5):
                axes.axhline(half, color=style.GREY, linewidth=1, linestyle="--")
            axes.set(xlabel="x", xlim=(min(sign, 0) - 0.03, max(sign, 0) + 0.03),
                     xticks=np.linspace(sign, 0, 6).round(1))
            axes.set_title(f"{'Negative' if sign < 0 else 'Positive'} x: {errors[:, 0].min():+.2f} to "
                           f"{errors[:, 2].max():+.2f}, on average {errors[:, 1].mean():+.2f}", fontsize=10)
        figure.axes[0].set_ylabel("error of the unit, ulps")
        figure.axes[0].legend(loc="upper left", ncols=2)
        low, high = figure.axes[0].get_ylim()
        figure.axes[0].set_ylim(low, high + 0.2 * (high - low))  # room for the legend
        style.caption(figure, "All 2^23 places of an octave of each sign. Dashed: what correct rounding stays within")
    return figure


def unit_words(negative: torch.Tensor, positive: torch.Tensor) -> str:
    """The picture in words: its text alternative."""
    said = [f"{name} arguments err by {e[:, 0].min():+.2f} to {e[:, 2].max():+.2f} ulps, {e[:, 1].mean():+.2f} on "
            "average" for name, e in (("negative", negative), ("positive", positive))]
    return f"Two panels, x from -1 to 0 and from 0 to 1: {' and '.join(said)}."
