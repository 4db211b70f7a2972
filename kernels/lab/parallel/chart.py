"""Pictures of one model on several GPUs or processes: the digest of its logits in each, and the time.

Plain functions to a Figure, and one that says it in words; the figure, notebook 08 and the widget draw with these.
"""
from __future__ import annotations

from itertools import cycle

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .. import records, style
from .measure import TENSOR_PARALLEL

LINES = {"default": "cuda", "invariant": "triton"}  # drawn as these contenders are
POINT = ["model", "phase", "batch", "context"]
_DIGITS = 6


def recorded(machine: str | None = None, out=records.DATA) -> pd.DataFrame:
    """One machine's rows, with a column `cpu`. FileNotFoundError where none is recorded."""
    rows = records.load(TENSOR_PARALLEL, machine, out)
    if not len(rows):
        raise ValueError(f"no row is recorded in {out}/{machine}/{TENSOR_PARALLEL.file}: python -m kernels parallel")
    name = rows.machine.iloc[0]
    return rows.assign(cpu=records.is_cpu(name, records.read_machine(f"{out}/{name}")))


def unit(rows: pd.DataFrame) -> str:
    """What a model is shared among in these rows: GPUs, or processes of a CPU."""
    return "processes" if bool(rows.cpu.iloc[0]) else "GPUs"


def compared(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of points that were recorded on several numbers of GPUs; all rows where no point was."""
    several = rows.groupby(POINT).gpus.transform("nunique") > 1
    return rows[several] if several.any() else rows


def alone(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of points that were recorded on one number of GPUs, beside others that were on several."""
    return rows.drop(compared(rows).index)


def claim(rows: pd.DataFrame) -> str:
    """What digests say of the points that were recorded on several numbers of GPUs, in one line."""
    rows = compared(rows)
    most = rows.gpus.nunique()
    said = []
    for ops in (name for name in LINES if (rows.ops == name).any()):
        kinds = rows[rows.ops == ops].groupby(POINT).logit_digest.nunique()
        low, high = int(kinds.min()), int(kinds.max())
        said.append(f"{ops} ops {low if low == high else f'{low} to {high}'} digest{'s' * (high != 1)}")
    counts = ", ".join(map(str, sorted(rows.gpus.unique())))
    if most == 1:
        one = {"processes": "process"}.get(unit(rows), "GPU")
        return f"One model on one {one}" if counts == "1" else f"One model on {counts} {unit(rows)}"
    return f"One model on {counts} {unit(rows)}: {', '.join(said)}"


def digest_grid(axes: Axes, rows: pd.DataFrame) -> None:
    """A line for each point and set of ops, a column for each number of GPUs: the digest, dark where it is another.

    Points that were recorded on one number of GPUs alone are left out, if there are others.
    """
    rows = compared(rows)
    counts = sorted(rows.gpus.unique())
    lines = list(rows.groupby(["ops", *POINT]))
    names = _names(rows)
    for y, (_, mine) in enumerate(lines):
        first = mine.sort_values("gpus").logit_digest.iloc[0]
        for row in mine.itertuples():
            glyph, fill, ink = style.SAME if row.logit_digest == first else style.MOVED
            axes.text(counts.index(row.gpus), y, f"{row.logit_digest[:_DIGITS]} {glyph}", ha="center", va="center",
                      fontsize=9, color=ink, bbox={"facecolor": fill, "edgecolor": "none", "boxstyle": "round,pad=0.3"})
    axes.set(xlim=(-0.6, len(counts) - 0.4), ylim=(len(lines) - 0.4, -0.6), xlabel=f"number of {unit(rows)}")
    axes.set_xticks(range(len(counts)), [str(c) for c in counts])
    axes.set_yticks(range(len(lines)), [names(*key) for key, _ in lines])
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.set_title("Digest of the logits")


def _names(rows: pd.DataFrame):
    """(ops, model, phase, batch, context) -> the point in few words, with its model where there are several."""
    several = rows.model.nunique() > 1
    return lambda ops, model, *point: f"{_short(model)}: " * several + point_name(ops, *point)


def _short(model: str) -> str:
    """A preset's size, or 'byte'; the caption has the whole name."""
    return model if model == "byte" else model.rpartition("-")[2].upper()


def point_name(ops: str, phase: str, batch: int, context: int) -> str:
    """A point in few words."""
    return f"{ops}, {phase} of {context} tokens" if phase == "prefill" else f"{ops}, decode of {batch} behind {context}"


def times(axes: Axes, rows: pd.DataFrame) -> None:
    """Milliseconds a forward over the number of GPUs: medians, bands from the 5th to the 95th percentile.

    Of the same points as `digest_grid`; the marks of the byte model are hollow where there is another beside it.
    """
    rows = compared(rows)
    names, hollow = _names(rows), rows.model.nunique() > 1
    for (ops, model, phase, batch, context), mine in rows.sort_values("gpus").groupby(["ops", *POINT]):
        look = style.contender(LINES[ops])
        line = "-" if phase == "prefill" else "--" if batch == 1 else ":"
        axes.plot(mine.gpus, mine.ms_p50, color=look["color"], marker=look["marker"], linestyle=line,
                  label=names(ops, model, phase, batch, context),
                  **({"markerfacecolor": "white"} if hollow and model == "byte" else {}))
        axes.fill_between(mine.gpus, mine.ms_p05, mine.ms_p95, color=look["color"], alpha=0.15, linewidth=0)
    counts = sorted(rows.gpus.unique())
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(counts, [str(c) for c in counts])
    axes.minorticks_off()
    axes.set_ylim(rows.ms_p50.min() / 1.5, 1.5 * rows.ms_p50.max())  # one slow run must not flatten the lines
    style.time_ticks(axes, True)
    axes.set(xlabel=f"number of {unit(rows)}", ylabel="milliseconds a forward", title="Time")


def shares(rows: pd.DataFrame) -> pd.Series:
    """Times the default's time that a forward takes with invariant ops, at each point and number of GPUs."""
    ms = rows.pivot(index=[*POINT, "gpus"], columns="ops", values="ms_p50")
    return (ms.invariant / ms.default).dropna() if {"invariant", "default"} <= set(ms) else ms.iloc[:0].sum(axis=1)


def ratios(axes: Axes, rows: pd.DataFrame) -> None:
    """Times the default's time with invariant ops: a line for each point, a mark for each number of GPUs."""
    found = shares(rows)
    points = list(dict.fromkeys(found.index.droplevel("gpus")))
    several = rows.model.nunique() > 1
    kinds = ("o", "white"), ("D", style.BLUE), ("s", "white"), ("^", style.BLUE)
    looks = dict(zip(sorted(rows.gpus.unique()), cycle(kinds), strict=False))
    for gpus, mine in found.groupby("gpus"):
        marker, face = looks[gpus]
        axes.plot(mine.to_numpy(), [points.index(point) for point in mine.index.droplevel("gpus")], linestyle="none",
                  marker=marker, color=style.BLUE, markerfacecolor=face, label=f"invariant / default, on {gpus}")
    names = [f"{_short(model)}: " * several + point_name("", *point).removeprefix(", ") for model, *point in points]
    axes.axvline(1, color=style.contender("cuda")["color"], linewidth=1.3, zorder=1)
    axes.set_yticks(range(len(points)), names)
    axes.set(ylim=(len(points) - 0.4, -0.6), xlim=(0, 1.08 * max(1, found.max())), xlabel="of the default's",
             title="Invariant ops' time")


def caption(rows: pd.DataFrame, device: str) -> str:
    """What was measured, and what a time on a shared CPU does not say."""
    text = (f"{', '.join(rows.model.unique())}, bfloat16, {device}. Logits of each prompt and each step, compared with "
            f"those on {compared(rows).gpus.min()}. Medians with 5-95 % bands")
    if bool(rows.cpu.iloc[0]):
        return (f"{text}.\nThe processes share this CPU's cores and talk by gloo: their times are of an oversubscribed "
                "CPU, and of the specification, and say nothing of GPUs.")
    slow = rows.ms_p95.max()
    beyond = f" The axis fits the medians; the slowest 95th percentile is {_ms(slow)} ms." \
        if slow > 1.5 * rows.ms_p50.max() else ""
    lone = alone(rows)
    left_out = (f" On {' or '.join(map(str, sorted(lone.gpus.unique())))} {unit(rows)} alone: "
                f"{lone.groupby(POINT).ngroups} of {rows.groupby(POINT).ngroups} points, with their digests in the "
                "record.") if len(lone) else ""
    return f"{text}; forwards replayed as CUDA graphs.{left_out}{beyond}"


def chart(rows: pd.DataFrame, device: str) -> Figure:
    """Digests beside times, of a machine's rows; the claim is the title."""
    with mpl.rc_context():
        style.theme()
        figure = Figure(figsize=(13, 1.6 + 0.42 * max(7, len(compared(rows).groupby(["ops", *POINT])))),
                        layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=[1.1, 1])
        digest_grid(left, rows)
        times(right, rows)
        right.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
        figure.suptitle(claim(rows), x=0.01, ha="left", fontsize=13, fontweight="bold")
        style.caption(figure, caption(rows, device))
    return figure


def words(rows: pd.DataFrame) -> str:
    """The picture in words: its text alternative."""
    said, names = [], _names(rows)
    for key, mine in rows.sort_values("gpus").groupby(["ops", *POINT]):
        each = ", ".join(f"{r.logit_digest[:_DIGITS]} in {_ms(r.ms_p50)} ms on {r.gpus}" for r in mine.itertuples())
        said.append(f"{names(*key)}: {each}")
    return (f"{claim(rows)}. Two panels over the number of {unit(rows)}: the digest of the logits, and milliseconds a "
            f"forward. {'; '.join(said)}.")


def _ms(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def study(gpus: tuple[int, ...], phase: str, machine: str | None = None, out=records.DATA) -> tuple[Figure, str]:
    """The chart of some numbers of GPUs and one phase: picture and words. ValueError where none of these is recorded.
    """
    rows = recorded(machine, out)
    mine = rows[rows.gpus.isin(gpus) & (rows.phase == phase)]
    if not len(mine):
        raise ValueError(f"nothing is recorded of {phase} on {' and '.join(map(str, gpus)) or 'no'} {unit(rows)}; have "
                         f"{', '.join(map(str, sorted(rows.gpus.unique())))}")
    device = records.read_machine(f"{out}/{rows.machine.iloc[0]}").get("device", rows.machine.iloc[0])
    return chart(mine, device), words(mine)
