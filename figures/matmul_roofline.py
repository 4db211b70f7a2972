"""What the matrix product does with the machine: TFLOP/s under the measured copy and product ceilings."""
from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from figures import CLOCKS, ends, medians, not_recorded, of_older_code
from figures.matmul_speed import recorded
from kernels import matmul
from kernels.lab import records, style
from kernels.op import Shape

SHAPES = ("N=4096,K=4096", "N=28672,K=4096", "N=1280,K=8192")
NAMES = ("cuda", "tiled", "frozen", "triton")
OURS = ("triton", "python")
TICKS = (1, 3, 10, 30, 100, 300, 1000)


CEILINGS = ("copy_gbytes_per_s", "matmul_tflops")


def draw(data=records.DATA, machine: str | None = None) -> Figure:
    rows, machine = recorded(data, machine)
    machine = _capped(rows, machine)
    names = [*dict.fromkeys([*NAMES[:-1], machine["ours"]])]
    rows = rows[rows.implementation.isin(names)]
    shapes = [s for s in SHAPES if s in set(rows["shape"])] or sorted(set(rows["shape"]))[:3]
    rows = rows[rows["shape"].isin(shapes)]
    clock, tokens = rows.clock.iloc[0], sorted(rows.tokens.unique())
    figure = Figure(figsize=(13, 5), layout="constrained")
    for axes, shape in zip(figure.subplots(1, len(shapes), sharey=True, squeeze=False)[0], shapes, strict=True):
        _panel(axes, rows[rows["shape"] == shape], tokens, names, machine["is_cpu"])
        if set(CEILINGS) <= set(machine):
            axes.plot(tokens, ceiling(shape, tokens, machine), color="#404040", linestyle=(0, (1, 1.5)),
                      linewidth=1.6, label="Measured ceilings", zorder=1)
        axes.set(yscale="log", title="{N:,} x {K:,}".format(**Shape.parse(shape)))
        low = [tick for tick in (0.001, 0.01, 0.1) if tick > rows.tflops.min() / 2]
        axes.set_yticks([*low, *TICKS], [f"{tick:g}" for tick in (*low, *TICKS)])
        axes.minorticks_off()
    figure.axes[0].set_ylabel("TFLOP/s")
    figure.axes[0].legend(loc="lower right", fontsize=8.5, handlelength=3.4)
    figure.suptitle(_claim(rows[rows.implementation == machine["ours"]], machine), x=0.01, ha="left", fontsize=14,
                    fontweight="bold")
    style.caption(figure, f"weight N x K, {rows.dtype.iloc[0]} · {machine['device']}, torch {machine['torch']} · clock "
                          f"`{clock}`: {CLOCKS[clock]}, {medians(rows)}{_measured(machine)}"
                          + not_recorded(names, rows.implementation) + not_recorded(CEILINGS, machine)
                          + of_older_code(rows))
    return figure


def words(data=records.DATA, machine: str | None = None) -> str:
    rows, machine = recorded(data, machine)
    machine = _capped(rows, machine)
    ours = rows[rows.implementation == machine["ours"]]
    names, said = [n for n in dict.fromkeys([*NAMES[:-1], machine["ours"]])], []
    for shape in [s for s in SHAPES if s in set(rows["shape"])]:
        here = ends(rows[rows["shape"] == shape], "tflops", names=names, cpu=machine["is_cpu"])
        said.append("{N:,} x {K:,}: ".format(**Shape.parse(shape)) + here)
    return (f"{_claim(ours[ours['shape'].isin(SHAPES)], machine)}. Three panels, each a weight: TFLOP/s over token "
            "counts on log axes under a dotted line, the most that the measured ceilings allow, which rises with the "
            f"tokens and then is flat. {'. '.join(said)}.")


def _measured(machine) -> str:
    """The ceilings in words; '' where they are not both measured."""
    if not set(CEILINGS) <= set(machine):
        return ""
    product = f"{machine['matmul_tflops']:,.{0 if machine['matmul_tflops'] >= 10 else 2}f}"
    return (f"\nceilings measured on the same machine: a copy at {machine['copy_gbytes_per_s']:,.0f} GB/s, the "
            f"fastest product at {product} TFLOP/s")


def _panel(axes, rows, tokens, names, cpu):
    for name in names:
        mine = rows[rows.implementation == name].sort_values("tokens")
        look = {"markersize": 7 if name == "tiled" else 5, "linewidth": 2.2 if name in OURS else 1.6}
        if len(mine):
            line, = axes.plot(mine.tokens, mine.tflops, **style.contender(name, cpu) | look)
            style.hollow(axes, mine.tokens, mine.tflops, mine, line)
    style.token_axis(axes, tokens, log=True)
    axes.set_xticks(tokens[::2], [str(t) for t in tokens[::2]])


def ceiling(shape, tokens, machine) -> np.ndarray:
    """TFLOP/s at each token count if the product moved its bytes as a copy does, and multiplied as a large one."""
    work = [matmul.work(int(t), shape) for t in tokens]
    memory = np.array([w.flops / w.bytes * machine["copy_gbytes_per_s"] / 1e3 for w in work])
    return np.minimum(memory, machine["matmul_tflops"])


def _capped(rows, machine) -> dict:
    """The machine with a product rate that is a ceiling: that of a large product, or of the fastest recorded one."""
    found = [machine[CEILINGS[1]], rows.tflops.max()] if CEILINGS[1] in machine else []
    return machine | ({CEILINGS[1]: max(found)} if found else {})


def _claim(ours, machine) -> str:
    """How near our kernel comes to both ceilings, at the fewest and the most tokens it is recorded at."""
    if not len(ours) or not set(CEILINGS) <= set(machine):
        return "Matrix products against the machine's ceilings"
    few, many = ours.tokens.min(), ours.tokens.max()
    copy = ours[ours.tokens == few].gbytes_per_s / machine["copy_gbytes_per_s"]
    product = ours[ours.tokens == many].tflops / machine["matmul_tflops"]
    return (f"In a fixed order: {copy.min():.0%} to {copy.max():.0%} of a copy's bandwidth at {few} "
            f"token{'s' if few > 1 else ''}, {product.min():.0%} to {product.max():.0%} of the fastest product's speed "
            f"at {many}")
