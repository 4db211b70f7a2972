"""How fast the matrix product runs in its fixed order, against cuBLAS, at every token count and for every weight."""
from __future__ import annotations

import math

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator

from figures import CLOCKS, medians, named_once, not_recorded, of_older_code, of_other_runs, pick, sweep_rows
from figures.page import SCREEN, Page, around
from kernels import matmul
from kernels.lab import records, style
from kernels.op import Shape

NAMES = {"tiled": {"linewidth": 1.1, "markersize": 5.5},
         "cublas_no_split_k": {"linewidth": 1.3, "markersize": 3.5, "color": "#8a2f7c"},  # darker, as it is thin
         "frozen": {"linewidth": 1.6, "markersize": 3.5},
         "triton": {"linewidth": 2.4, "markersize": 5}}
COLUMNS = {"screen": 4, "single": 3, "double": 4, "slide": 6}
# the layer of Llama-3.1-8B, or of the 70B cut over 8 GPUs, that has such a weight
LAYERS = {"N=6144,K=4096": "query, key, value", "N=4096,K=4096": "attention's output", "N=28672,K=4096": "gate and up",
          "N=4096,K=14336": "down", "N=128256,K=4096": "head", "N=1280,K=8192": "70B / 8: q, k, v",
          "N=7168,K=8192": "70B / 8: gate, up", "N=8192,K=1024": "70B / 8: output",
          "N=8192,K=3584": "70B / 8: down", "N=1024,K=4096": "key, or value", "N=512,K=4096": "8B / 8: query"}


def draw(data=records.DATA, machine: str | None = None, page: Page = SCREEN) -> Figure:
    rows, machine = recorded(data, machine)
    names = NAMES if machine["ours"] in NAMES else {machine["ours"]: NAMES["triton"], **NAMES}
    speed, default = relative(rows, names), "the default's" if machine["is_cpu"] else "cuBLAS'"
    shapes = sorted(speed.index.unique("shape"), key=lambda s: (*matmul.shapes, s).index(s))
    columns = COLUMNS[page.name]
    lines = math.ceil((len(shapes) + page.screen) / columns)  # one place for the screen's legend
    figure = page.figure(13, (1.2 + 2.5 * lines) if page.screen else 1.75 * lines)
    grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for axes, shape in zip(grid.flat, shapes, strict=False):
        _panel(axes, speed.loc[shape], names, machine["is_cpu"], rows[rows["shape"] == shape])
        axes.set_title(panel_title(shape, "  " if page.screen else "\n"), fontsize=10.5)
    grid.flat[0].set_ylim(0, 1.05 * max(1.1, speed.max(axis=None)))
    _edges(grid, len(shapes), sorted(speed.index.unique("tokens")), default, page)
    clock = rows.clock.iloc[0]
    around(figure, page, _claim(speed, machine["ours"], default),
           f"weight N x K and the layer of Llama-3.1-8B that has it, or of the 70B model cut over 8 GPUs (70B / 8) · "
           f"{rows.dtype.iloc[0]} · {machine['device']}, torch {machine['torch']}\nclock `{clock}`: {CLOCKS[clock]}, "
           f"{medians(rows)} · tokens on a log axis, speed from zero · 1 is the speed of F.linear"
           f"{'' if machine['is_cpu'] else ' (cuBLAS)'}\n{_bits(rows, names)}"
           + not_recorded([*names], rows.implementation) + of_other_runs(rows) + of_older_code(rows),
           None if page.screen else tuple(part[::-1] for part in named_once(grid.flat)))
    return figure


def panel_title(shape: str, between: str = "  ") -> str:
    """A weight's sizes, and the layer that has it."""
    return "{N:,} x {K:,}".format(**Shape.parse(shape)) + (f"{between}{LAYERS[shape]}" if shape in LAYERS else "")


def words(data=records.DATA, machine: str | None = None) -> str:
    rows, machine = recorded(data, machine)
    names = NAMES if machine["ours"] in NAMES else {machine["ours"]: None, **NAMES}
    speed, default = relative(rows, names), "the default's" if machine["is_cpu"] else "cuBLAS'"
    said = "; ".join(f"{style.contender(name, machine['is_cpu'])['label']} {column.min():.2f} to {column.max():.2f}, "
                     f"in the geometric mean {_mean(column):.2f}"
                     for name, column in speed.items() if column.notna().any())
    return (f"{_claim(speed, machine['ours'], default)}. Small panels, one for each of "
            f"{len(speed.index.unique('shape'))} weights of a Llama-3.1-8B-shaped model and of tensor-parallel shards, "
            f"over token counts: times {default} speed, with a grey line at 1. Over all panels: {said}. "
            f"{_bits(rows, names)}.")


def recorded(data, machine: str | None = None) -> tuple[pd.DataFrame, dict]:
    """The products' rows in one dtype (bfloat16) on the clock `cold`, or a CPU's `call`, and what their machine is.

    Raises ValueError where none can be compared with the default's.
    """
    rows, machine = sweep_rows(data, machine, ["matmul"])
    clock = "call" if machine["is_cpu"] else "cold"
    rows = pick(rows[rows.clock == clock], "dtype", "bfloat16")
    if relative(rows, [*NAMES, "python"]).isna().all(axis=None):
        raise ValueError(f"no product is recorded beside cuda's on the clock {clock} for {machine['device']}: "
                         "python -m kernels sweep matmul")
    return rows, machine


def relative(rows, names=tuple(NAMES)) -> pd.DataFrame:
    """Times the default's speed: a row for each shape and token count, a column for each of these contenders."""
    us = rows.pivot(index=["shape", "tokens"], columns="implementation", values="us_p50")
    us = us.reindex(columns=["cuda", *names])
    return us[list(names)].rdiv(us.cuda, axis=0)


def _panel(axes, speed, names, cpu, rows):
    axes.axhline(1, color=style.GREY, linewidth=1.3, zorder=1)
    for name, look in names.items():
        mine = speed[name].dropna()
        if len(mine):
            line, = axes.plot(mine.index, mine, **style.contender(name, cpu) | look)
            old = rows[rows.implementation == name].set_index("tokens").older.reindex(mine.index)
            style.hollow(axes, mine.index, mine, old.to_frame(), line)


def _edges(grid, panels, tokens, default, page):
    """Ticks and labels at the outer panels, and on a screen the legend where no panel is."""
    style.token_axis(grid.flat[0], tokens, log=True)
    for axes in grid.flat:
        axes.set_xticks(tokens[::2], [str(t) for t in tokens[::2]])
        axes.set_xlabel("")
        axes.minorticks_off()
    if not page.screen:
        grid.flat[0].figure.supylabel(f"Times {default} speed", fontsize=10)
        style.thin_labels(grid.flat[0], tokens, page.width / grid.shape[1] - 0.3)
        grid.flat[0].yaxis.set_major_locator(MultipleLocator(0.5))
    for axes in grid[:, 0] if page.screen else ():
        axes.set_ylabel(f"Times {default} speed")
    for axes in grid.flat[:panels][-grid.shape[1]:]:  # the lowest panel of each column
        axes.set_xlabel("# Tokens")
        axes.xaxis.set_tick_params(labelbottom=True)
    for axes in grid.flat[panels:]:
        axes.set_axis_off()
    if not page.screen:
        return
    handles, labels = named_once(grid.flat)
    legend = grid.flat[-1].legend(handles[::-1], labels[::-1], loc="center", frameon=False, fontsize=8.2,
                                  handlelength=3.2, labelspacing=0.8)
    legend.set_in_layout(False)  # it is a little wider than a panel


def _claim(speed, ours, default) -> str:
    words = {"triton": "Fixed order, free schedule", "python": "Fixed order, in plain PyTorch"}
    mean = {name: _mean(column) for name, column in speed.items() if column.notna().any()}
    said = [f"{words[ours]}: {mean[ours]:.2f} of {default} speed in the geometric mean"] if ours in mean else []
    return "; ".join([*said, *([f"one frozen schedule: {mean['frozen']:.2f}"] if "frozen" in mean else [])])


def _bits(rows, names) -> str:
    """At how many points a row's bits were not those of the largest batch."""
    moved = rows[~rows.same_bits.astype(bool)].implementation.value_counts()
    kept = [name for name in ("cuda", *names) if name not in moved and name in set(rows.implementation)]
    said = [f"{name} at {count} of {(rows.implementation == name).sum()} points" for name, count in moved.items()]
    return " · ".join([*(["bits moved: " + ", ".join(said)] if said else []),
                       *(["same bits: " + ", ".join(kept)] if kept else [])])


def _mean(column) -> float:
    return float(np.exp(np.log(column.dropna()).mean()))
