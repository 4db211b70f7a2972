"""How fast softmax, log_softmax and mean run in their fixed order, against PyTorch's default."""
from __future__ import annotations

import numpy as np
import seaborn as sns
from matplotlib.figure import Figure

from kernels.lab import records, style

ALT = ("Two panels, bfloat16 left and float32 right: how many times as fast as PyTorch's default the fixed-order "
       "Triton kernels run over 1 to 4096 tokens, inputs out of cache, on log axes. A grey line marks equal speed. "
       "Lines for softmax and log_softmax 32000 and 128256 wide and for mean 4096 and 8192 wide lie above it: 1.3 "
       "to 1.7 at 4096 tokens, and 1.5 to 9.0 at 32 or fewer, where the default leaves most of the GPU idle.")
OPS = ("softmax", "log_softmax", "mean")
MARKERS = ("o", "s", "^")


def draw(data=records.DATA) -> Figure:
    rows = records.load(out=data)
    rows = rows[rows.op.isin(OPS) & (rows.clock == "cold") & rows.implementation.isin(["cuda", "triton"])]
    machine = records.read_machine(records.Path(data) / rows.machine.iloc[0])
    us = rows.pivot(index=["dtype", "op", "shape", "tokens"], columns="implementation", values="us_p50")
    ratio = us.cuda / us.triton
    figure = Figure(figsize=(13, 5.4), layout="constrained")
    for axes, dtype in zip(figure.subplots(1, 2, sharey=True), ("bfloat16", "float32"), strict=True):
        _panel(axes, ratio[dtype])
        axes.set_title(dtype)
    figure.axes[0].set_ylabel("Times the default's speed")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right center",
                  handlelength=3.6)
    figure.suptitle(f"Softmax and mean in a fixed order: {np.exp(np.log(ratio).mean()):.1f} times the default's speed "
                    f"in the geometric mean, {ratio.min():.2f} at worst", x=0.01, ha="left", fontsize=14,
                    fontweight="bold")
    style.caption(figure, f"{machine['device']}, torch {machine['torch']} · clock `cold`: device time with inputs out "
                          "of cache, medians of three interleaved sweeps · default: F.softmax, F.log_softmax, "
                          "torch.mean")
    return figure


def _panel(axes, ratio):
    axes.axhline(1, color=style.GREY, linewidth=1.4)
    tokens = sorted(ratio.index.unique("tokens"))
    palette = sns.color_palette("colorblind")
    for op, color, marker in zip(OPS, (palette[0], palette[1], palette[2]), MARKERS, strict=True):
        shapes = sorted(ratio[op].index.unique("shape"), key=lambda shape: int(shape.removeprefix("D=")))
        for shape, line in zip(shapes, ((0, (4, 2)), "-"), strict=True):
            mine = ratio[op, shape]
            axes.plot(mine.index, mine, color=color, marker=marker, markersize=6, linestyle=line,
                      label=f"{op}, {shape.removeprefix('D=')} wide")
    axes.set_yscale("log")
    axes.set_yticks([1, 1.5, 2, 3, 5, 8], ["1", "1.5", "2", "3", "5", "8"])
    axes.minorticks_off()
    style.token_axis(axes, tokens, log=True)
