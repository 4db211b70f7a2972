"""How fast softmax, log_softmax and mean run in their fixed order, against PyTorch's default."""
from __future__ import annotations

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from figures import CLOCKS, medians, named_once, not_recorded, of_older_code, pick, sweep_rows
from figures.page import SCREEN, Page, around
from kernels.lab import records, style

OPS = ("softmax", "log_softmax", "mean")
MARKERS = ("o", "s", "^")


LINES = ((0, (4, 2)), "-", (0, (1, 1.5)), "-.")
TICKS = (1, 1.5, 2, 3, 5, 8)


def recorded(data, machine) -> tuple[pd.DataFrame, pd.Series, pd.Series, dict]:
    """The rows of one clock; how many times the default's speed ours has by dtype, op, shape and tokens; whether that
    is of older code; and the machine. ValueError where no point has both.
    """
    rows, machine = sweep_rows(data, machine, OPS)
    rows = pick(rows, "clock", *CLOCKS)
    rows = rows[rows.implementation.isin(["cuda", machine["ours"]])]
    table = rows.pivot(index=["dtype", "op", "shape", "tokens"], columns="implementation", values=["us_p50", "older"])
    us = table.get("us_p50", pd.DataFrame()).reindex(columns=["cuda", machine["ours"]]).dropna().astype(float)
    if not len(us):
        raise ValueError(f"no point of {', '.join(OPS)} is recorded for both cuda and {machine['ours']}")
    return rows, us.cuda / us[machine["ours"]], table.older.loc[us.index].any(axis=1), machine


def words(data=records.DATA, machine: str | None = None) -> str:
    rows, ratio, _, machine = recorded(data, machine)
    tokens = ratio.index.get_level_values("tokens")
    most = max(set.intersection(*(set(mine.index.unique("tokens")) for _, mine in ratio.groupby("op"))), default=0)
    most = most or tokens.max()  # the largest count that every op has, if there is one
    few, many = ratio[tokens <= 32], ratio[tokens == most]
    at_few = f" and {few.min():.1f} to {few.max():.1f} at 32 or fewer" if len(few) else ""
    below = (ratio < 1).sum()
    return (f"{_claim(ratio)}. Two panels, bfloat16 and float32, over token counts on log axes: how many times as "
            "fast as PyTorch's default softmax, log_softmax and mean run in their fixed order, "
            f"{CLOCKS[rows.clock.iloc[0]]}. "
            f"{below or 'None'} of {len(ratio)} points {'lie' if below != 1 else 'lies'} below the grey line at 1: "
            f"{many.min():.1f} to {many.max():.1f} at {most} tokens{at_few}.")


def _claim(ratio) -> str:
    return (f"Softmax and mean in a fixed order: {np.exp(np.log(ratio).mean()):.1f} times the default's speed in the "
            f"geometric mean, {ratio.min():.2f} at worst")


def draw(data=records.DATA, machine: str | None = None, page: Page = SCREEN) -> Figure:
    rows, ratio, older, machine = recorded(data, machine)
    clock = rows.clock.iloc[0]
    figure = page.figure(13, 4.5 if page.screen else 5.6 if page.narrow else 3.4)
    panels = (2, 1) if page.narrow else (1, 2)
    for axes, dtype in zip(figure.subplots(*panels, sharey=True), ("bfloat16", "float32"), strict=True):
        axes.set_title(dtype)
        if dtype in ratio.index.unique("dtype"):
            _panel(axes, ratio[dtype], older[dtype])
            if not page.screen:
                style.thin_labels(axes, sorted(ratio[dtype].index.unique("tokens")), page.width / panels[1] - 1)
    for axes in figure.axes[:panels[0]]:
        _axis(axes, ratio)
    around(figure, page, _claim(ratio), f"{machine['device']}, torch {machine['torch']} · clock `{clock}`: "
           f"{CLOCKS[clock]}, {medians(rows)} · both axes logarithmic · default: F.softmax, F.log_softmax, torch.mean"
           + not_recorded(OPS, ratio.index.unique("op"))
           + not_recorded(["bfloat16", "float32"], ratio.index.unique("dtype"))
           + of_older_code(older.to_frame("older")), named_once(figure.axes), 2 if page.narrow else 6)
    return figure


def _axis(axes, ratio):
    axes.set_ylabel("Times the default's speed")
    axes.set_yscale("log")
    low = [tick for tick in (0.01, 0.03, 0.1, 0.3, 0.6) if tick > ratio.min() / 2 and ratio.min() < 1]
    axes.set_yticks([*low, *TICKS], [f"{tick:g}" for tick in (*low, *TICKS)])
    axes.minorticks_off()


def _panel(axes, ratio, older):
    axes.axhline(1, color=style.GREY, linewidth=1.4)
    tokens = sorted(ratio.index.unique("tokens"))
    palette = sns.color_palette("colorblind")
    for op, color, marker in zip(OPS, (palette[0], palette[1], palette[2]), MARKERS, strict=True):
        if op not in ratio.index.unique("op"):
            continue
        shapes = sorted(ratio[op].index.unique("shape"), key=_width)
        lines = LINES if len(shapes) > 1 else LINES[1:]
        for i, shape in enumerate(shapes):
            mine = ratio[op, shape]
            line, = axes.plot(mine.index, mine, color=color, marker=marker, markersize=6,
                              linestyle=lines[i % len(lines)], label=f"{op}, {shape.removeprefix('D=')} wide")
            style.hollow(axes, mine.index, mine, older[op, shape].to_frame("older"), line)
    style.token_axis(axes, tokens, log=True)


def _width(shape) -> int:
    return int(shape.removeprefix("D=").partition(",")[0])
