"""How fast the matrix product runs in its fixed order, against cuBLAS, at every token count and for every weight."""
from __future__ import annotations

import math

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from kernels import matmul
from kernels.lab import records, style
from kernels.op import Shape

ALT = ("Small panels, one for each of eleven weights of a Llama-3.1-8B-shaped model and of tensor-parallel shards: "
       "speed relative to cuBLAS over 1 to 4096 tokens, bfloat16, inputs out of cache, with a grey line at equal "
       "speed. The solid line of the fixed order with a free schedule stays near the grey line. The dashed line of "
       "one frozen schedule lies below it nearly everywhere. Two thin lines show cuBLAS without split-K and fixed "
       "tiles of 128 rows.")
NAMES = {"tiled": {"linewidth": 1.1, "markersize": 5.5, "alpha": 0.7},
         "cublas_no_split_k": {"linewidth": 1.1, "markersize": 3.5, "alpha": 0.7},
         "frozen": {"linewidth": 1.6, "markersize": 3.5},
         "triton": {"linewidth": 2.4, "markersize": 5}}
COLUMNS = 4


def draw(data=records.DATA) -> Figure:
    rows = recorded(data)
    machine = records.read_machine(records.Path(data) / rows.machine.iloc[0])
    speed = relative(rows)
    shapes = [s for s in matmul.shapes if s in speed.index.unique("shape")]
    lines = math.ceil((len(shapes) + 1) / COLUMNS)  # one place for the legend
    figure = Figure(figsize=(13, 1.2 + 2.5 * lines), layout="constrained")
    grid = figure.subplots(lines, COLUMNS, sharex=True, sharey=True)
    for axes, shape in zip(grid.flat, shapes, strict=False):
        _panel(axes, speed.loc[shape])
        axes.set_title("{N:,} x {K:,}".format(**Shape.parse(shape)), fontsize=11)
    grid.flat[0].set_ylim(0, 1.05 * max(1.1, speed.max(axis=None)))
    _edges(grid, len(shapes), sorted(speed.index.unique("tokens")))
    figure.suptitle(f"Fixed order, free schedule: {_mean(speed.triton):.2f} of cuBLAS' speed in the geometric mean; "
                    f"one frozen schedule: {_mean(speed.frozen):.2f}", x=0.01, ha="left", fontsize=14,
                    fontweight="bold")
    style.caption(figure, f"weight N x K, bfloat16 · {machine['device']}, torch {machine['torch']} · clock `cold`: "
                          "device time with inputs out of cache, medians of three interleaved sweeps · 1 is the speed "
                          f"of F.linear (cuBLAS)\n{_bits(rows)}")
    return figure


def recorded(data) -> pd.DataFrame:
    """The products' rows in bfloat16 on the clock `cold`. Raises ValueError where there are none."""
    rows = records.load(out=data)
    rows = rows[(rows.op == "matmul") & (rows.dtype == "bfloat16") & (rows.clock == "cold")]
    if not len(rows):
        raise ValueError("no matmul rows on the clock cold are recorded: python -m kernels sweep matmul")
    return rows


def relative(rows) -> pd.DataFrame:
    """Times the default's speed: a row for each shape and token count, a column for each contender."""
    us = rows.pivot(index=["shape", "tokens"], columns="implementation", values="us_p50")
    return us[list(NAMES)].rdiv(us.cuda, axis=0)


def _panel(axes, speed):
    axes.axhline(1, color=style.GREY, linewidth=1.3, zorder=1)
    for name, look in NAMES.items():
        mine = speed[name].dropna()
        axes.plot(mine.index, mine, **style.contender(name) | look)


def _edges(grid, panels, tokens):
    """Ticks and labels at the outer panels, and the legend where no panel is."""
    style.token_axis(grid.flat[0], tokens, log=True)
    for axes in grid.flat:
        axes.set_xticks(tokens[::2], [str(t) for t in tokens[::2]])
        axes.set_xlabel("")
        axes.minorticks_off()
    for axes in grid[:, 0]:
        axes.set_ylabel("Times cuBLAS' speed")
    for axes in grid.flat[:panels][-COLUMNS:]:  # the lowest panel of each column
        axes.set_xlabel("# Tokens")
        axes.xaxis.set_tick_params(labelbottom=True)
    for axes in grid.flat[panels:]:
        axes.set_axis_off()
    handles, labels = grid.flat[0].get_legend_handles_labels()
    legend = grid.flat[-1].legend(handles[::-1], labels[::-1], loc="center", frameon=False, fontsize=8.2,
                                  handlelength=3.2, labelspacing=0.8)
    legend.set_in_layout(False)  # it is a little wider than a panel


def _bits(rows) -> str:
    """At how many points a row's bits were not those of the largest batch."""
    moved = rows[~rows.same_bits.astype(bool)].implementation.value_counts()
    kept = [name for name in ("cuda", *NAMES) if name not in moved]
    said = [f"{name} at {count} of {(rows.implementation == name).sum()} points" for name, count in moved.items()]
    return " · ".join([*(["bits moved: " + ", ".join(said)] if said else []), "same bits: " + ", ".join(kept)])


def _mean(column) -> float:
    return float(np.exp(np.log(column.dropna()).mean()))
