"""LLM-42's first chart, measured again like for like, and this suite's own kernel on the device and with its launch."""
from __future__ import annotations

import textwrap

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from figures import (
    CLOCKS,
    ends,
    medians,
    named_once,
    not_recorded,
    of_older_code,
    one_experiment,
    pick,
    specified,
    sweep_rows,
)
from figures.page import SCREEN, Page, around
from kernels.lab import records, style
from kernels.lab.sweep import chart

TOKENS = (1, 8, 32, 128, 256, 512, 1024, 2048, 4096)
THEIRS = tuple(ours for ours, _ in style.PUBLISHED.values())
OURS = ("cuda", "python", "triton", "compile", "flashinfer")


def draw(data=records.DATA, machine: str | None = None, page: Page = SCREEN) -> Figure:
    rows, machine = recorded(data, machine)
    tokens = sorted({*TOKENS, *rows.tokens})
    clocks = ("call",) if machine["is_cpu"] else ("graph", "call")
    figure = page.figure(15, 5.8 if page.screen else 2.9 * (1 + len(clocks)) if page.narrow else 3.4)
    panels = {"ncols": 1 + len(clocks), "width_ratios": (1.1, *(1 for _ in clocks))}
    left, *others = figure.subplots(1 + len(clocks)) if page.narrow else figure.subplots(**panels)
    _published_axes(left, rows, tokens, machine)
    for axes, clock in zip(others, clocks, strict=True):
        _ours(axes, rows, clock, tokens, machine, legend=axes is others[0])
        axes.set_title({"graph": "This suite, on the device", "call": "This suite, a call"}[clock])
    drawn = pd.concat([_theirs(rows), rows[rows.implementation.isin(OURS) & rows.clock.isin(["graph", "call"])]])
    what = f"{specified(rows)}. Lines: {machine['device']}, {medians(drawn)} with their 20-80 % band. "
    first, second = ("First", "Below") if page.narrow else ("Left", "Beside it")
    what += (f"{first}, evenly spaced counts and time from zero: clock `event`, {CLOCKS['event']}; dashed, "
             "the same code on the clock `graph`. Hollow marks: published by LLM-42, measured on an H100 "
             f"PCIe. {second}, log axes: "
             + " and ".join(f"clock `{clock}`, {CLOCKS[clock]}" for clock in clocks) + ".")
    _fit(page, left, others, tokens)
    around(figure, page, _claim(rows, machine), (textwrap.fill(what, 215) if page.screen else what)
           + not_recorded(dict.fromkeys([*THEIRS, *OURS]), drawn.implementation) + of_older_code(drawn),
           None if page.screen else named_once(others))
    return figure


def _fit(page, left, others, tokens):
    """On paper and on a slide: fewer labelled counts, and the names of our lines leave their panel."""
    if page.screen:
        return
    for axes in others:
        style.thin_labels(axes, tokens, page.width - 1 if page.narrow else page.width / 3 - 1)
        if axes.get_legend():
            axes.get_legend().remove()
    left.tick_params(axis="x", labelsize=7.5 if not page.narrow else None)
    left.legend(handles=left.get_legend().legend_handles, loc="upper left", fontsize=7.5)


def words(data=records.DATA, machine: str | None = None) -> str:
    rows, machine = recorded(data, machine)
    graph, call = (rows[(rows.clock == clock) & rows.implementation.isin(OURS)] for clock in ("graph", "call"))
    theirs, cpu = _theirs(rows), machine["is_cpu"]
    device = "" if cpu else f" Middle, device time in microseconds: {ends(graph)}."
    return (f"{_claim(rows, machine)}. Panels over token counts. Left, LLM-42's published chart measured again "
            f"with code of the same methods, milliseconds: {ends(theirs, per=1e3, names=THEIRS)}; hollow marks are the "
            f"published points, dashed lines the same code as a CUDA graph.{device} Right, a call with its "
            f"launch, in microseconds: {ends(call, cpu=cpu)}.")


def recorded(data, machine):
    """The rows of one experiment at the published token counts, and their machine."""
    rows, machine = sweep_rows(data, machine, ["rms_norm"])
    rows = one_experiment(rows)
    return rows[rows.tokens.isin(TOKENS)] if rows.tokens.isin(TOKENS).any() else rows, machine


def _theirs(rows):
    """Code with the methods of the published lines, on the paper's clock, or on the first one that has them."""
    return pick(rows[rows.implementation.isin(THEIRS)], "clock", "event", "call")


def _claim(rows, machine) -> str:
    """Our kernel's time as a part of the default's, at the counts where both are recorded."""
    us = rows.pivot(index=["clock", "tokens"], columns="implementation", values="us_p50")
    said = []
    for clock, what in (("graph", "on the device"), ("call", "in a call")):
        if {"cuda", machine["ours"]} <= set(us) and clock in us.index:
            ratio = (us[machine["ours"]] / us.cuda)[clock].dropna()
            said += [f"{ratio.min():.2f} to {ratio.max():.2f} times the default's time {what}"] if len(ratio) else []
    return f"RMSNorm in a fixed order takes {' and '.join(said)}" if said else "RMSNorm's execution time against tokens"


def _published_axes(axes, rows, tokens, machine):
    published = pd.read_csv(records.DATA / "llm42" / "rms_norm.csv", comment="#")
    chart.published_marks(axes, published, tokens, unit="ms")
    mine = _theirs(rows)
    for name, (ours, label) in style.PUBLISHED.items():
        here = {"linestyle": "-"} | {k: v for k, v in style.contender(name).items() if k != "label"}
        label = style.contender(ours)["label"] if machine["is_cpu"] else label  # there is no CUDA
        for clock, look in ((mine.clock.iloc[0] if len(mine) else "event", {"label": label}),
                            ("graph", {"linestyle": (0, (4, 2)), "linewidth": 1.1, "markersize": 3, "label": "_"})):
            line = rows[(rows.implementation == ours) & (rows.clock == clock)].sort_values("tokens")
            if len(line):
                x, y = style.positions(line.tokens, tokens, False), line.us_p50 / 1e3
                style.hollow(axes, x, y, line, axes.plot(x, y, **here | look)[0])
    style.token_axis(axes, tokens)
    axes.set(ylabel="Execution Time (ms)", title="The published chart, measured again")
    axes.set_ylim(0, max(1.35, 1.1 * mine.us_p50.max() / 1e3 if len(mine) else 0))
    mark = Line2D([], [], linestyle="none", marker="o", markersize=8, markerfacecolor="none", color=style.GREY,
                  label="published (H100 PCIe)")
    axes.legend(handles=[*[line for line in axes.lines if not line.get_label().startswith("_")], mark],
                loc="upper left")
    if not len(mine):
        _say_empty(axes, "event")


def _ours(axes, rows, clock, tokens, machine, legend):
    rows = rows[(rows.clock == clock) & rows.implementation.isin(OURS)]
    labels, tokens = (style.ON_A_CPU, sorted(set(rows.tokens))) if machine["is_cpu"] else ({}, tokens)
    chart.time_lines(axes, rows, tokens, log=True, unit="us", labels=labels)
    style.token_axis(axes, tokens, log=True)
    axes.set_xticks(tokens[::2], [str(t) for t in tokens[::2]])
    axes.set_yscale("log")
    axes.set_ylabel({"graph": "Device time (µs)", "call": "Host time a call (µs)"}[clock])
    if not len(rows):
        _say_empty(axes, clock)
        return
    style.time_ticks(axes, log=True)
    axes.minorticks_off()
    if legend:
        axes.legend(loc="best" if machine["is_cpu"] else "upper left")


def _say_empty(axes, clock):
    axes.text(0.5, 0.5, f"nothing recorded on the clock {clock}", transform=axes.transAxes, ha="center",
              color=style.GREY)
