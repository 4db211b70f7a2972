"""How near RMSNorm comes to the memory's own speed: bytes a second against a plain copy's."""
from __future__ import annotations

from matplotlib.figure import Figure

from figures import CLOCKS, ends, medians, not_recorded, of_older_code, one_experiment, specified, sweep_rows
from figures.page import SCREEN, Page, around
from kernels.lab import records, style

LEFT_OUT = ("split", "eager", "two_pass")


def words(data=records.DATA, machine: str | None = None) -> str:
    rows, machine = recorded(data, machine)
    copy = machine.get("copy_gbytes_per_s", 0)
    return (f"{_claim(rows[rows.implementation == machine['ours']], copy)}. Bytes moved by {specified(rows)} in GB/s "
            f"over token counts, {CLOCKS[rows.clock.iloc[0]]}, under a dashed line at a plain copy's {copy:,.0f}: "
            f"{ends(rows, 'gbytes_per_s', cpu=machine['is_cpu'])}.")


def recorded(data, machine):
    """The rows of one experiment, without contenders that are there for another figure, and their machine."""
    rows, machine = sweep_rows(data, machine, ["rms_norm"])
    return one_experiment(rows[~rows.implementation.isin(LEFT_OUT)], CLOCKS), machine


def draw(data=records.DATA, machine: str | None = None, page: Page = SCREEN) -> Figure:
    rows, machine = recorded(data, machine)
    clock, tokens, copy = rows.clock.iloc[0], sorted(rows.tokens.unique()), machine.get("copy_gbytes_per_s", 0)
    figure = page.figure(9, 5.2 if page.screen else 3)
    axes = figure.subplots()
    if copy:
        axes.axhline(copy, color="#404040", linestyle=(0, (4, 2)), linewidth=1.2)
        axes.annotate(f"a plain copy: {copy:,.0f} GB/s", (tokens[-1], copy), xytext=(0, 4),
                      textcoords="offset points", ha="right", fontsize=9, color="#404040")
    for name in style.CONTENDERS:
        mine = rows[rows.implementation == name].sort_values("tokens")
        if len(mine):
            line, = axes.plot(mine.tokens, mine.gbytes_per_s, **style.contender(name, machine["is_cpu"]))
            style.hollow(axes, mine.tokens, mine.gbytes_per_s, mine, line)
    style.token_axis(axes, tokens, log=True)
    axes.set(ylabel="Bytes moved a second (GB/s)", ylim=(0, 1.12 * max(copy, rows.gbytes_per_s.max() / 1.05)))
    claim = _claim(rows[rows.implementation == machine["ours"]], copy)
    caption = (f"{specified(rows)} · {machine['device']} · clock `{clock}`: {CLOCKS[clock]},{page.newline}"
               f"{medians(rows)} · bytes counted once for each input and output · tokens on a log axis"
               + not_recorded(["cuda", machine["ours"]], rows.implementation)
               + not_recorded(["copy_gbytes_per_s"], machine) + of_older_code(rows))
    if page.screen:
        axes.set_title(claim)
        axes.legend(loc="upper left", bbox_to_anchor=(0, 0.9))
        style.caption(figure, caption)
    else:
        style.thin_labels(axes, tokens, page.width - 1)
        around(figure, page, claim, caption, axes.get_legend_handles_labels())
    return figure


def _claim(ours, copy) -> str:
    """How near our kernel comes to a copy at the largest count it is recorded at."""
    if not len(ours) or not copy:
        return "Bytes that RMSNorm moves a second"
    last = ours.loc[ours.tokens.idxmax()]
    return (f"At {last.tokens} tokens RMSNorm in a fixed order runs at {last.gbytes_per_s / copy:.0%} of a plain "
            "copy")
