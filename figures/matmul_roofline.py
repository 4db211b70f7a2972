"""What the matrix product does with the machine: TFLOP/s under the measured copy and product ceilings."""
from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from kernels import matmul
from kernels.lab import records, style
from kernels.op import Shape

ALT = ("Three panels, each a weight: TFLOP/s over 1 to 4096 tokens on log axes, bfloat16, inputs out of cache. A "
       "dotted line rises with the tokens, the most that the measured copy bandwidth allows, and bends into a flat "
       "one, the measured speed of a large product. cuBLAS and the fixed order with a free schedule run close "
       "together below it and along the flat part, at most a few per cent above that product's speed; one frozen "
       "schedule and fixed tiles of 128 rows mostly lie further below.")
SHAPES = ("N=4096,K=4096", "N=28672,K=4096", "N=1280,K=8192")
NAMES = ("cuda", "tiled", "frozen", "triton")


def draw(data=records.DATA) -> Figure:
    rows = records.load(out=data)
    rows = rows[(rows.op == "matmul") & (rows.dtype == "bfloat16") & (rows.clock == "cold")
                & rows["shape"].isin(SHAPES) & rows.implementation.isin(NAMES)]
    if not len(rows):
        raise ValueError("no matmul rows on the clock cold are recorded: python -m kernels sweep matmul")
    machine = records.read_machine(records.Path(data) / rows.machine.iloc[0])
    tokens = sorted(rows.tokens.unique())
    figure = Figure(figsize=(13, 5), layout="constrained")
    for axes, shape in zip(figure.subplots(1, len(SHAPES), sharey=True), SHAPES, strict=True):
        _panel(axes, rows[rows["shape"] == shape], tokens)
        axes.plot(tokens, ceiling(shape, tokens, machine), color="#404040", linestyle=(0, (1, 1.5)), linewidth=1.6,
                  label="Measured ceilings", zorder=1)
        axes.set(yscale="log", title="{N:,} x {K:,}".format(**Shape.parse(shape)))
        axes.set_yticks([1, 3, 10, 30, 100, 300, 1000], ["1", "3", "10", "30", "100", "300", "1000"])
        axes.minorticks_off()
    figure.axes[0].set_ylabel("TFLOP/s")
    figure.axes[0].legend(loc="lower right", fontsize=8.5, handlelength=3.4)
    figure.suptitle(_claim(rows, tokens, machine), x=0.01, ha="left", fontsize=14, fontweight="bold")
    style.caption(figure, f"weight N x K, bfloat16 · {machine['device']}, torch {machine['torch']} · clock `cold`: "
                          "device time with inputs out of cache, medians of three interleaved sweeps\nceilings "
                          f"measured on the same machine: a copy at {machine['copy_gbytes_per_s']:,.0f} GB/s, a large "
                          f"product at {machine['matmul_tflops']:,.0f} TFLOP/s")
    return figure


def _panel(axes, rows, tokens):
    for name in NAMES:
        mine = rows[rows.implementation == name].sort_values("tokens")
        look = {"markersize": 7 if name == "tiled" else 5, "linewidth": 2.2 if name == "triton" else 1.6}
        axes.plot(mine.tokens, mine.tflops, **style.contender(name) | look)
    style.token_axis(axes, tokens, log=True)
    axes.set_xticks(tokens[::2], [str(t) for t in tokens[::2]])


def ceiling(shape, tokens, machine) -> np.ndarray:
    """TFLOP/s at each token count if the product moved its bytes as a copy does, and multiplied as a large one."""
    work = [matmul.work(int(t), shape) for t in tokens]
    memory = np.array([w.flops / w.bytes * machine["copy_gbytes_per_s"] / 1e3 for w in work])
    return np.minimum(memory, machine["matmul_tflops"])


def _claim(rows, tokens, machine) -> str:
    ours = rows[rows.implementation == "triton"]
    first, last = ours[ours.tokens == tokens[0]].gbytes_per_s, ours[ours.tokens == tokens[-1]].tflops
    copy, product = first / machine["copy_gbytes_per_s"], last / machine["matmul_tflops"]
    return (f"In a fixed order: up to {copy.max():.0%} of a copy's bandwidth at {tokens[0]} token"
            f"{'s' if tokens[0] > 1 else ''}, up to {product.max():.0%} of a large product's speed at {tokens[-1]}")
