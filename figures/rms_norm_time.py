"""LLM-42's first chart, measured again: RMSNorm's execution time against tokens, and the same without the launch."""
from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from kernels.lab import records, style
from kernels.lab.sweep import chart

ALT = ("Two panels. Left, the published chart's axes: execution time in milliseconds over 1 to 4096 tokens. Our "
       "medians: the default (CUDA) and the Triton kernel stay near 0.02 ms up to 1024 tokens and reach about "
       "0.1 and 0.07 ms at 4096; plain Python takes about 0.5 ms to launch its many steps. Hollow marks show "
       "the published points. Right, the same without launch on log axes: the Triton kernel is below PyTorch's default "
       "at every count and below torch.compile and FlashInfer at most; at 1024 tokens FlashInfer is lowest.")
TOKENS = (1, 8, 32, 128, 256, 512, 1024, 2048, 4096)


def draw(data=records.DATA) -> Figure:
    rows = records.load(out=data)
    rows = rows[(rows.op == "rms_norm") & (rows.dtype == "bfloat16") & (rows["shape"] == "D=8192,residual")]
    rows = rows[rows.tokens.isin(TOKENS)]
    published = pd.read_csv(records.DATA / "llm42" / "rms_norm.csv", comment="#")
    device = records.read_machine(records.Path(data) / rows.machine.iloc[0])["device"]
    figure = Figure(figsize=(13, 5.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1))
    _published_axes(left, rows, published)
    _without_launch(right, rows)
    figure.suptitle("Fixed bits cost nothing here: the batch-invariant kernel beats the default at every count",
                    x=0.01, ha="left", fontsize=14, fontweight="bold")
    style.caption(figure, f"residual + RMSNorm, hidden 8192, bfloat16. Lines: {device}, medians of three interleaved "
                          "sweeps with their 20-80 % band. Left: clock `call`, host wall time, launch included.\n"
                          "Right: clock `graph`, CUDA-graph replay on warm inputs, no launch. Hollow marks: the points "
                          "published by LLM-42, measured on an H100 PCIe.")
    return figure


def _published_axes(axes, rows, published):
    rows = rows[(rows.clock == "call") & rows.implementation.isin(["cuda", "python", "triton"])]
    chart.published_marks(axes, published, TOKENS, unit="ms")
    chart.time_lines(axes, rows, TOKENS, unit="ms")
    style.token_axis(axes, TOKENS)
    axes.set(ylabel="Execution Time (ms)", ylim=(0, 1.35), title="The published chart, measured again")
    axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2])
    mark = Line2D([], [], linestyle="none", marker="o", markersize=8, markerfacecolor="none", color=style.GREY,
                  label="published (H100 PCIe)")
    axes.legend(handles=[*[line for line in axes.lines if not line.get_label().startswith("_")], mark],
                loc="upper left")


def _without_launch(axes, rows):
    rows = rows[(rows.clock == "graph") & (rows.implementation != "split")]
    chart.time_lines(axes, rows, TOKENS, log=True, unit="us")
    style.token_axis(axes, TOKENS, log=True)
    axes.set_yscale("log")
    axes.set(ylabel="Device time (µs)", title="The same work without the launch")
    axes.set_yticks([2, 5, 10, 20, 50, 100, 200, 500], ["2", "5", "10", "20", "50", "100", "200", "500"])
    axes.minorticks_off()
    axes.legend(loc="upper left")
