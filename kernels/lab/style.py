"""What all charts share: the theme, how each contender and verdict is drawn, and the axes.

Two runs give the same bytes.
"""
from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.text import Text
from matplotlib.textpath import text_to_path
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

_SAFE = sns.color_palette("colorblind").as_hex()
GREEN, VERMILION, BLUE, ORANGE, GREY = _SAFE[2], _SAFE[3], _SAFE[0], _SAFE[1], "#6e6e6e"
PURPLE = "#a23f91"  # darker than the palette's, which fades in thin lines
SKY = _SAFE[9]
BROWN = "#7a4b1e"  # darker than the palette's, which the colour-blind take for green or purple
INK = "#303030"
# a verdict: its glyph, its fill and the ink on it; told apart by lightness, not hue
SAME, MOVED = ("✓", "#e0efe9", "#14604a"), ("✗", "#8c1d18", "#ffffff")
# of a table in a notebook, whose page may be dark: paper and ink of its own, for the colours above are made for white
TABLE = "background:#ffffff;color:#262626;border-collapse:collapse;font-size:12px;line-height:1.5"
CAPTION = 8.5  # points

# implementation -> colour, marker, line style, label
CONTENDERS = {
    "cuda": (GREEN, "o", "-", "PyTorch's default"),
    "python": (VERMILION, "s", "-", "Specification"),
    "triton": (BLUE, "^", "-", "Schedule (Triton)"),
    "compile": (ORANGE, "D", "--", "torch.compile of the default"),
    "flashinfer": (PURPLE, "v", "-.", "FlashInfer"),
    "eager": (BROWN, "P", ":", "PyTorch eager, float32"),
    "two_pass": (SKY, "X", ":", "Eager add, two-pass Triton"),
    "tiled": (BROWN, "*", (0, (6, 1.5, 1, 1.5, 1, 1.5)), "Fixed tiles of 128 rows (tiled)"),
    "frozen": (ORANGE, "D", (0, (4, 2)), "One frozen schedule"),
    "cublas_no_split_k": (PURPLE, "v", "-.", "cuBLAS without split-K (no guarantee)"),
    "flash_attention_3": (PURPLE, "v", "-.", "FlashAttention-3"),
    "sdpa_flash": (BROWN, "P", (0, (5, 1, 1, 1)), "SDPA, FlashAttention-2's backend"),
    "sdpa_cudnn": (SKY, "X", ":", "SDPA, cuDNN's backend"),
    "sdpa_efficient": (INK, "<", (0, (8, 2)), "SDPA, the memory-efficient backend"),
    "split": (GREY, "x", ":", "Split by batch (moves bits)"),
}


ON_A_CPU = {"triton": "Schedule (Triton's interpreter)"}
# the lines of LLM-42's first chart, in its wording: whose code they are there, and which of ours has their method
PUBLISHED = {"cuda": ("flashinfer", "Non-batch-invariant (CUDA)"), "python": ("eager", "Batch-invariant (Python)"),
             "triton": ("two_pass", "Batch-invariant (Triton)")}


def contender(name: str, cpu: bool = False) -> dict:
    """Keyword arguments for Axes.plot: colour, marker, line style and label of one implementation on a GPU or a CPU."""
    color, marker, line, label = CONTENDERS.get(name, (GREY, "P", ":", name))
    label = ON_A_CPU.get(name, label) if cpu else label
    return {"color": color, "marker": marker, "linestyle": line, "label": label}


def in_order(rows: pd.DataFrame) -> list[str]:
    """The contenders in these rows, in the theme's order; unknown ones last."""
    found = set(rows.implementation)
    return [n for n in CONTENDERS if n in found] + sorted(found - set(CONTENDERS))


def hollow(axes: Axes, x, y, rows: pd.DataFrame, line) -> None:
    """White inside the marks of those rows that are of older code, if the rows have a column `older`."""
    if "older" in rows and rows.older.any():
        old = rows.older.to_numpy(bool)
        axes.plot(np.asarray(x)[old], np.asarray(y)[old], linestyle="none", marker=line.get_marker(),
                  markersize=0.5 * line.get_markersize(), color="white", zorder=line.get_zorder() + 1, label="_older")


def theme() -> None:
    """Set the suite's look, whatever the reader's matplotlibrc says, and fix what would change a figure's bytes."""
    mpl.rcdefaults()
    sns.set_theme(context="notebook", style="whitegrid", palette="colorblind")
    mpl.rcParams.update({
        "font.family": "DejaVu Sans", "font.size": 10, "axes.titlesize": 12, "axes.titleweight": "bold",
        "axes.titlelocation": "left", "axes.labelsize": 10, "xtick.labelsize": 9, "ytick.labelsize": 9,
        "legend.fontsize": 9, "legend.frameon": True, "legend.framealpha": 0.9, "lines.markersize": 6,
        "lines.linewidth": 2.0, "axes.spines.top": False, "axes.spines.right": False, "grid.alpha": 0.5,
        "figure.dpi": 100, "savefig.dpi": 150, "svg.hashsalt": "same-bits", "svg.fonttype": "path",
        "figure.constrained_layout.use": True,
    })


def caption(figure: Figure, text: str, y: float | None = None) -> Text:
    """Lines under the figure, none wider than it, or at height `y`: which machine, which clock, what the band is."""
    return figure.supxlabel(wrapped(text, figure.get_figwidth(), CAPTION), x=0.01, y=y, ha="left", fontsize=CAPTION,
                            color="#404040")


def wrapped(text: str, inches: float, points: float, weight: str = "normal") -> str:
    """The text in lines no wider than this, by the widths of its letters; its own lines stay apart."""
    lines = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split():
            longer = f"{line} {word}".strip()
            if line and _width(longer, points, weight) > 70 * inches:
                lines.append(line)
                longer = word
            line = longer
        lines.append(line)
    return "\n".join(lines)


@lru_cache(1 << 14)  # a quarter of a figure's time otherwise, and a widget draws its words again and again
def _width(line: str, points: float, weight: str) -> float:
    font = FontProperties(family="DejaVu Sans", size=points, weight=weight)
    return text_to_path.get_text_width_height_descent(line, font, False)[0]


def token_axis(axes: Axes, tokens: Sequence[int], log: bool = False) -> None:
    """Token counts as the published chart has them (evenly spaced), or on a log axis."""
    if log:
        axes.set_xscale("log", base=2)
    axes.set_xticks(list(tokens) if log else list(range(len(tokens))), [str(t) for t in tokens])
    axes.minorticks_off()
    axes.set_xlabel("# Tokens")


def thin_labels(axes: Axes, tokens: Sequence[int], inches: float) -> None:
    """Of a log token axis about so long, label the counts that stand apart; the last one always."""
    octave = inches / max(np.log2(tokens[-1] / tokens[0]), 1)
    shown = [tokens[-1]]
    for count in reversed(tokens[:-1]):
        room = 0.04 * (len(str(count)) + len(str(shown[-1]))) + 0.08
        shown += [count] if np.log2(shown[-1] / count) * octave >= room else []
    axes.set_xticks(shown, [str(t) for t in shown])


def positions(values, tokens: Sequence[int], log: bool) -> np.ndarray:
    """Where these counts stand on the token axis of `tokens`."""
    return np.asarray(values, float) if log else np.searchsorted(np.asarray(tokens), np.asarray(values)).astype(float)


def time_ticks(axes: Axes, log: bool) -> None:
    """A time axis: from zero, or ticks at 1, 2, 5 (fewer over many decades) of each power of ten; plain numbers."""
    if not log:
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_locator(MaxNLocator(6))
    elif axes.lines:
        low, high = axes.get_ylim()
        decades = np.log10(high / low)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2.2 else (1, 3) if decades < 3.5 else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.set_ylim(axes.get_ylim())
