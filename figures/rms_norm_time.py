"""LLM-42's first chart, measured again: RMSNorm's execution time against tokens, and the same without the launch."""
from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from figures import medians, not_recorded, one_experiment, specified, sweep_rows
from kernels.lab import records, style
from kernels.lab.sweep import chart

ALT = ("Two panels. Left, the published chart's axes: execution time in milliseconds over 1 to 4096 tokens. Our "
       "medians: the default (CUDA) and the Triton kernel stay near 0.02 ms up to 1024 tokens and reach about "
       "0.1 and 0.07 ms at 4096; plain Python takes about 0.5 ms to launch its many steps. Hollow marks show "
       "the published points. Right, the same without launch on log axes: the Triton kernel is below PyTorch's default "
       "at every count and below torch.compile and FlashInfer at most; at 1024 tokens FlashInfer is lowest.")
TOKENS = (1, 8, 32, 128, 256, 512, 1024, 2048, 4096)


def draw(data=records.DATA, machine: str | None = None) -> Figure:
    rows, machine = sweep_rows(data, machine, ["rms_norm"])
    rows = one_experiment(rows)
    rows = rows[rows.tokens.isin(TOKENS)] if rows.tokens.isin(TOKENS).any() else rows
    tokens = sorted({*TOKENS, *rows.tokens})
    published = pd.read_csv(records.DATA / "llm42" / "rms_norm.csv", comment="#")
    figure = Figure(figsize=(13, 5.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1))
    _published_axes(left, rows, published, tokens, machine)
    _without_launch(right, rows, tokens, machine)
    figure.suptitle(_claim(rows, machine), x=0.01, ha="left", fontsize=14, fontweight="bold")
    style.caption(figure, f"{specified(rows)}. Lines: {machine['device']}, {medians(rows)} with their 20-80 % band. "
                          "Left: clock `call`, host wall time, launch included.\n"
                          "Right: clock `graph`, CUDA-graph replay on warm inputs, no launch. Hollow marks: the points "
                          "published by LLM-42, measured on an H100 PCIe."
                          + not_recorded(["cuda", "python", "triton"], rows.implementation))
    return figure


def _claim(rows, machine) -> str:
    """What both panels show of our kernel and the default, at the counts where both are recorded."""
    us = rows[rows.clock.isin(["call", "graph"])].pivot(
        index=["clock", "tokens"], columns="implementation", values="us_p50")
    if not {"cuda", machine["ours"]} <= set(us):
        return "RMSNorm's execution time against tokens"
    ratio = (us[machine["ours"]] / us.cuda).dropna()
    if len(ratio) and ratio.max() < 1:
        return "Fixed bits cost nothing here: the batch-invariant kernel beats the default at every count"
    return (f"In a fixed order RMSNorm takes {ratio.min():.2g} to {ratio.max():.2g} times the default's time"
            if len(ratio) else "RMSNorm's execution time against tokens")


def _published_axes(axes, rows, published, tokens, machine):
    rows = rows[(rows.clock == "call") & rows.implementation.isin(["cuda", "python", "triton"])]
    chart.published_marks(axes, published, tokens, unit="ms")
    chart.time_lines(axes, rows, tokens, unit="ms", labels=style.ON_A_CPU if machine["is_cpu"] else {})
    style.token_axis(axes, tokens)
    axes.set(ylabel="Execution Time (ms)", title="The published chart, measured again")
    most = rows.us_p80.max() / 1e3 if len(rows) else 0
    if most <= 1.35:
        axes.set_ylim(0, 1.35)
        axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2])
    else:
        axes.set_ylim(0, 1.1 * most)
    mark = Line2D([], [], linestyle="none", marker="o", markersize=8, markerfacecolor="none", color=style.GREY,
                  label="published (H100 PCIe)")
    axes.legend(handles=[*[line for line in axes.lines if not line.get_label().startswith("_")], mark],
                loc="upper left")
    _say_if_empty(axes, rows, "call")


def _without_launch(axes, rows, tokens, machine):
    rows = rows[(rows.clock == "graph") & (rows.implementation != "split")]
    chart.time_lines(axes, rows, tokens, log=True, unit="us")
    style.token_axis(axes, tokens, log=True)
    axes.set_yscale("log")
    axes.set(ylabel="Device time (µs)", title="The same work without the launch")
    axes.set_yticks([2, 5, 10, 20, 50, 100, 200, 500], ["2", "5", "10", "20", "50", "100", "200", "500"])
    axes.minorticks_off()
    if len(rows):
        axes.legend(loc="upper left")
    _say_if_empty(axes, rows, "graph", " (a CPU has none)" if machine["is_cpu"] else "")


def _say_if_empty(axes, rows, clock, why=""):
    if not len(rows):
        axes.text(0.5, 0.5, f"nothing recorded on the clock {clock}{why}", transform=axes.transAxes, ha="center",
                  color=style.GREY)
