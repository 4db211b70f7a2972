"""How fast softmax, log_softmax and mean run in their fixed order, against PyTorch's default."""
from __future__ import annotations

import numpy as np
import seaborn as sns
from matplotlib.figure import Figure

from figures import CLOCKS, medians, named_once, not_recorded, pick, sweep_rows
from kernels.lab import records, style

ALT = ("Two panels, bfloat16 left and float32 right: how many times as fast as PyTorch's default the fixed-order "
       "Triton kernels run over 1 to 4096 tokens, inputs out of cache, on log axes. A grey line marks equal speed. "
       "Lines for softmax and log_softmax 32000 and 128256 wide and for mean 4096 and 8192 wide lie above it: 1.3 "
       "to 1.7 at 4096 tokens, and 1.5 to 9.0 at 32 or fewer, where the default leaves most of the GPU idle.")
OPS = ("softmax", "log_softmax", "mean")
MARKERS = ("o", "s", "^")


LINES = ((0, (4, 2)), "-", (0, (1, 1.5)), "-.")
TICKS = (1, 1.5, 2, 3, 5, 8)


def draw(data=records.DATA, machine: str | None = None) -> Figure:
    rows, machine = sweep_rows(data, machine, OPS)
    rows = pick(rows, "clock", *CLOCKS)
    clock = rows.clock.iloc[0]
    us = rows.pivot(index=["dtype", "op", "shape", "tokens"], columns="implementation", values="us_p50")
    us = us.reindex(columns=["cuda", machine["ours"]]).dropna()
    if not len(us):
        raise ValueError(f"no point of {', '.join(OPS)} is recorded for both cuda and {machine['ours']}")
    ratio = us.cuda / us[machine["ours"]]
    figure = Figure(figsize=(13, 5.4), layout="constrained")
    for axes, dtype in zip(figure.subplots(1, 2, sharey=True), ("bfloat16", "float32"), strict=True):
        axes.set_title(dtype)
        if dtype in ratio.index.unique("dtype"):
            _panel(axes, ratio[dtype])
    _axis(figure.axes[0], ratio)
    figure.legend(*named_once(figure.axes), loc="outside right center", handlelength=3.6)
    figure.suptitle(f"Softmax and mean in a fixed order: {np.exp(np.log(ratio).mean()):.1f} times the default's speed "
                    f"in the geometric mean, {ratio.min():.2f} at worst", x=0.01, ha="left", fontsize=14,
                    fontweight="bold")
    style.caption(figure, f"{machine['device']}, torch {machine['torch']} · clock `{clock}`: {CLOCKS[clock]}, "
                          f"{medians(rows)} · default: F.softmax, F.log_softmax, torch.mean"
                          + not_recorded(OPS, ratio.index.unique("op"))
                          + not_recorded(["bfloat16", "float32"], ratio.index.unique("dtype")))
    return figure


def _axis(axes, ratio):
    axes.set_ylabel("Times the default's speed")
    axes.set_yscale("log")
    low = [tick for tick in (0.01, 0.03, 0.1, 0.3, 0.6) if tick > ratio.min() / 2 and ratio.min() < 1]
    axes.set_yticks([*low, *TICKS], [f"{tick:g}" for tick in (*low, *TICKS)])
    axes.minorticks_off()


def _panel(axes, ratio):
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
            axes.plot(mine.index, mine, color=color, marker=marker, markersize=6, linestyle=lines[i % len(lines)],
                      label=f"{op}, {shape.removeprefix('D=')} wide")
    style.token_axis(axes, tokens, log=True)


def _width(shape) -> int:
    return int(shape.removeprefix("D=").partition(",")[0])
