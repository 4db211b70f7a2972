"""What the matrix product does with the machine: TFLOP/s under the measured copy and product ceilings."""
from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from figures import CLOCKS, ends, medians, named_once, not_recorded, of_older_code, of_other_runs
from figures.matmul_speed import panel_title, recorded
from figures.page import SCREEN, Page, around
from kernels import matmul
from kernels.lab import records, style
from kernels.op import Shape

SHAPES = ("N=4096,K=4096", "N=28672,K=4096", "N=1280,K=8192")
NAMES = ("cuda", "tiled", "frozen", "triton")
OURS = ("triton", "python")
TICKS = (1, 3, 10, 30, 100, 300, 1000)


CEILINGS = ("copy_gbytes_per_s", "matmul_tflops")


def draw(data=records.DATA, machine: str | None = None, page: Page = SCREEN) -> Figure:
    rows, machine = recorded(data, machine)
    machine = _capped(rows, machine)
    names = [*dict.fromkeys([*NAMES[:-1], machine["ours"]])]
    rows = rows[rows.implementation.isin(names)]
    claim, weights = _claim(rows[rows.implementation == machine["ours"]], machine), rows["shape"].nunique()
    shapes = [s for s in SHAPES if s in set(rows["shape"])] or sorted(set(rows["shape"]))[:3]
    rows = rows[rows["shape"].isin(shapes)]
    clock, tokens = rows.clock.iloc[0], sorted(rows.tokens.unique())
    figure = page.figure(13, 5 if page.screen else 2.6 * len(shapes) if page.narrow else 3.4)
    panels = (len(shapes), 1) if page.narrow else (1, len(shapes))
    for axes, shape in zip(figure.subplots(*panels, sharey=True, squeeze=False).flat, shapes, strict=True):
        _panel(axes, rows[rows["shape"] == shape], tokens, names, machine["is_cpu"])
        if set(CEILINGS) <= set(machine):
            axes.plot(tokens, ceiling(shape, tokens, machine), color="#404040", linestyle=(0, (1, 1.5)),
                      linewidth=1.6, label="Measured ceilings", zorder=1)
        axes.set(yscale="log", title=panel_title(shape, "  " if page.screen else "\n"))
        low = [tick for tick in (0.001, 0.01, 0.1) if tick > rows.tflops.min() / 2]
        axes.set_yticks([*low, *TICKS], [f"{tick:g}" for tick in (*low, *TICKS)])
        axes.minorticks_off()
        if not page.screen:
            style.thin_labels(axes, tokens, page.width / panels[1] - 1)
        if axes.get_subplotspec().is_first_col():
            axes.set_ylabel("TFLOP/s")
    if page.screen:
        figure.axes[0].legend(loc="lower right", fontsize=8.5, handlelength=3.4)
    around(figure, page, claim, f"weight N x K, {len(shapes)} of {weights} · {rows.dtype.iloc[0]} · "
           f"{machine['device']}, torch {machine['torch']} · clock `{clock}`: {CLOCKS[clock]}, {medians(rows)} · both "
           f"axes logarithmic{_measured(machine)}"
           + not_recorded(names, rows.implementation) + not_recorded(CEILINGS, machine)
           + of_other_runs(rows) + of_older_code(rows),
           None if page.screen else named_once(figure.axes))
    return figure


def words(data=records.DATA, machine: str | None = None) -> str:
    rows, machine = recorded(data, machine)
    machine = _capped(rows, machine)
    ours = rows[rows.implementation == machine["ours"]]
    names, said = [n for n in dict.fromkeys([*NAMES[:-1], machine["ours"]])], []
    for shape in [s for s in SHAPES if s in set(rows["shape"])]:
        here = ends(rows[rows["shape"] == shape], "tflops", names=names, cpu=machine["is_cpu"])
        said.append(f"{_sizes(shape)}: {here}")
    return (f"{_claim(ours, machine)}. Three panels, each one of these weights: TFLOP/s over token counts on log axes "
            "under a dotted line, the most that the ceilings allow, which rises with the tokens and then is flat. "
            f"{'. '.join(said)}." + _measured(machine).replace("\nc", " C") + ".")


def _measured(machine) -> str:
    """The ceilings in words; '' where they are not both measured."""
    if not set(CEILINGS) <= set(machine):
        return ""
    product = f"{machine['matmul_tflops']:,.{0 if machine['matmul_tflops'] >= 10 else 2}f}"
    return (f"\nceilings, of the same machine: a copy at {machine['copy_gbytes_per_s']:,.0f} GB/s and the fastest "
            f"product that is recorded, {product} TFLOP/s: {machine['fastest']}")


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
    """The machine with a product rate that is a ceiling, and whose it is: that of the large product of machine.json,
    or of the fastest row.
    """
    if CEILINGS[1] not in machine:
        return machine
    found = {machine[CEILINGS[1]]: "the large one of machine.json"}
    if rows.tflops.notna().any():
        best = rows.loc[rows.tflops.idxmax()]
        found[best.tflops] = f"{best.implementation}, {_sizes(best['shape'])}, {best.tokens} tokens"
    most = max(found)
    return machine | {CEILINGS[1]: most, "fastest": found[most]}


def _sizes(shape) -> str:
    return "{N:,} x {K:,}".format(**Shape.parse(shape))


def _claim(ours, machine) -> str:
    """How near our kernel comes to both ceilings with any weight, at the fewest and the most tokens recorded."""
    if not len(ours) or not set(CEILINGS) <= set(machine):
        return "Matrix products against the machine's ceilings"
    few, many = ours.tokens.min(), ours.tokens.max()
    copy = ours[ours.tokens == few].gbytes_per_s / machine["copy_gbytes_per_s"]
    product = ours[ours.tokens == many].tflops / machine["matmul_tflops"]
    weights = ours["shape"].nunique()
    return (f"Fixed order, {weights} weight{'s' * (weights > 1)}: {copy.min():.0%} to {copy.max():.0%} of a copy's "
            f"speed at {few} token{'s' if few > 1 else ''}, {product.min():.0%} to {product.max():.0%} of the fastest "
            f"product at {many}")
