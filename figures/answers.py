"""Answers and speed side by side: how many answers one prompt gets under load, and what it costs to get one."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from figures import described, named_once
from figures.answer_tree import named, totals
from figures.page import SCREEN, Page, around
from kernels.lab import records, style
from kernels.lab.serving.recorded import VERIFIED
from kernels.lab.serving.speed import SERVING, SHAREABLE

LOOKS = {"default": (style.GREEN, "o"), "invariant": (style.BLUE, "^"), "tiled": (style.BROWN, "*"),
         "frozen": (style.ORANGE, "D"), "fused": (style.PURPLE, "v"), "verified": (style.VERMILION, "s")}
PANELS = {"decode": ("batch", "Requests in the batch", "Decode"),
          "prefill": ("context", "Tokens of the prompt", "Prefill")}


def _speed(data) -> tuple[pd.DataFrame, dict]:
    """The first GPU's rows of serving.csv, of a model of real size if it has one, and that machine; no rows where no
    GPU has recorded any. Of a phase without the default's speed there is nothing to show.
    """
    for name in records.machines(SERVING.file, data):
        about = described(data, name)
        rows = SERVING.read(Path(data) / name)
        if about["is_cpu"] or not len(rows):
            continue
        model = max(rows.model.unique(), key=lambda model: (model != "byte", (rows.model == model).sum()))
        rows = rows[rows.model == model]
        known = set(rows[rows.ops == "default"].phase) & set(PANELS)
        if known:
            return rows[rows.phase.isin(known)], about
    return pd.DataFrame(columns=list(SERVING.columns)), {}


def draw(data=records.DATA, machine: str | None = None, page: Page = SCREEN) -> Figure:
    (every, about), (speed, gpu) = totals(data, machine), _speed(data)
    phases = [phase for phase in PANELS if (speed.phase == phase).any()]
    panels = 1 + len(phases)
    more = max(0, len(every) - 5) if page.narrow else 0  # lines that need room of their own
    figure = page.figure(4.6 * panels if panels > 1 else 9, 4.2 if not page.narrow else 2.8 * panels + 0.5 * more)
    shape = {"height_ratios": [2.8 + 0.5 * more] + [2.8] * (panels - 1)} if page.narrow else {}
    axes = np.ravel(figure.subplots(*((panels, 1) if page.narrow else (1, panels)), squeeze=False, **shape))
    _answers(axes[0], every)
    for place, phase in zip(axes[1:], phases, strict=True):
        _ratios(place, speed[speed.phase == phase], *PANELS[phase])
        if not page.screen and phase == "decode":
            style.thin_labels(place, sorted(speed[speed.phase == phase].batch.unique()),
                              page.width / (1 if page.narrow else panels) - 1.2)
    around(figure, page, _claim(every, speed), _caption(every, about, speed, gpu, page), named_once(axes))
    return figure


def _answers(axes, every) -> None:
    """A line for each set of ops and temperature: its answers, and its digests of logits."""
    names = []
    for y, row in enumerate(every.sort_values(["model", "temperature", "ops"]).itertuples()):
        color, marker = LOOKS.get(row.ops, (style.GREY, "P"))
        names.append(f"{row.ops}, {_chosen(row.temperature)}" + (f"\n{row.model}" if every.model.nunique() > 1 else ""))
        axes.plot([row.answers, row.logit_digests], [y, y], color=color, linewidth=1.2, zorder=1, label="_range")
        axes.plot(row.logit_digests, y, marker, color=color, markerfacecolor="white", markersize=11, linestyle="none",
                  label="_digests")
        axes.plot(row.answers, y, marker, color=color, markersize=7, linestyle="none", label="_answers")
        said = f"{row.answers:,.0f}" if row.answers == row.logit_digests else \
            f"{row.answers:,.0f} and {row.logit_digests:,.0f}"
        axes.annotate(said, (row.logit_digests, y), (9, 0), textcoords="offset points", va="center", fontsize=9)
    for fill, label in ((style.INK, "different answers"), ("white", "different digests of logits")):
        axes.plot([], [], "o", color=style.INK, markerfacecolor=fill, linestyle="none", label=label)
    axes.set_xscale("log")
    axes.set(xlim=(0.7, 4 * max(every.requests.max(), 10)), ylim=(len(names) - 0.4, -0.6),
             xlabel=f"of {_requests(every)} requests for one prompt", title="Answers")
    axes.set_yticks(range(len(names)), names)
    ticks = [1, 10, 100, 1000]
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()


def _ratios(axes, rows, across, label, title) -> None:
    """Tokens a second beside the default's; a line for each set of ops and context."""
    key, other = ["batch", "context"], "context" if across == "batch" else "batch"
    us = rows.pivot(index=key, columns="ops", values="tokens_per_s_p50")
    least = rows.context.min()
    for ops in us.columns.drop("default").drop(SHAREABLE, errors="ignore"):  # which README tells of
        for fixed, mine in (us[ops] / us.default).dropna().reset_index(name="ratio").groupby(other):
            color, marker = LOOKS.get(ops, (style.GREY, "P"))
            name = f"{ops}, {fixed:,} tokens" if across == "batch" else ops
            axes.plot(mine[across], mine.ratio, color=color, marker=marker, label=name,
                      linestyle="--" if across == "batch" and fixed != least else "-")
    axes.axhline(1, color=style.GREEN, linewidth=1.2, label="default")
    axes.set_xscale("log", base=2)
    ticks = sorted(rows[across].unique())
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.set(xlabel=label, ylabel="tokens a second, of the default's", title=title)
    axes.set_ylim(bottom=0)


def _chosen(temperature: float) -> str:
    return "greedy" if temperature == 0 else f"temperature {temperature:g}"


def _requests(every) -> str:
    low, high = (f"{number:,.0f}" for number in (every.requests.min(), every.requests.max()))
    return low if low == high else f"{low} to {high}"


def _claim(every, speed) -> str:
    """Greedy answers of a model of real size, if it has some, else of the byte model; and what a fixed order costs."""
    greedy = every[every.temperature == every.temperature.min()]
    model = max(greedy.model.unique(), key=lambda model: (model != "byte", (greedy.model == model).sum()))
    greedy = greedy[greedy.model == model]
    said = [f"{_counted(row.answers, 'answer')} with {named(row.ops)}" for row in greedy.itertuples()]
    cost = _cost(speed)
    return f"One prompt, {_requests(greedy)} requests: {', '.join(said)}{cost and f'; invariant ops run at {cost}'}"


def _counted(number: float, what: str) -> str:
    return f"{number:,.0f} {what}{'s' * (number != 1)}"


def _cost(speed) -> str:
    if not len(speed):
        return ""
    us = speed.pivot(index=["phase", "batch", "context"], columns="ops", values="tokens_per_s_p50")
    if not {"default", "invariant"} <= set(us):
        return ""
    ratio = (us["invariant"] / us["default"]).dropna()
    mean = float(np.exp(np.log(ratio.astype(float)).mean()))
    return f"{mean:.2f} of the default's speed ({ratio.min():.2f} to {ratio.max():.2f})"


def _caption(every, about, speed, gpu, page) -> str:
    said = (f"Answers: the {about['device'].removeprefix('NVIDIA ')}, bfloat16, random loads that mix lengths, chunks, "
            "cache hits, preemptions and cancellations; every request asks the same, with the same seed.")
    if (every.ops == VERIFIED).any():
        said += f"{page.newline}Verified: default ops, checked by default ops at one shape; one draft in 16 is wrong."
    if not len(speed):
        return f"{said}{page.newline}Speed: no GPU has recorded it yet."
    others = of_another_run(speed)
    return (f"{said}{page.newline}Speed: {speed.model.iloc[0]}, random weights, on the "
            f"{gpu['device'].removeprefix('NVIDIA ')}: medians of interleaved runs, one CUDA graph a step for each"
            f"{others and f'; {others} of other runs than invariant'}.")


def of_another_run(speed) -> str:
    """The ops of which some point was timed in another run than `invariant`: contenders of a run are written together.
    """
    at = speed.assign(at=pd.to_datetime(speed.recorded_at, utc=True, format="ISO8601")).pivot(
        index=["phase", "batch", "context"], columns="ops", values="at")
    return " and ".join(ops for ops in at if "invariant" in at and
                        ((at[ops] - at.invariant).abs() > pd.Timedelta(minutes=1)).any())


def words(data=records.DATA, machine: str | None = None) -> str:
    (every, about), (speed, _) = totals(data, machine), _speed(data)
    said = [f"{row.model} with {named(row.ops)}, {_chosen(row.temperature)}: {_counted(row.answers, 'answer')} and "
            f"{_counted(row.logit_digests, 'digest')} of logits of {row.requests:,.0f} requests"
            for row in every.itertuples()]
    cost = _cost(speed)
    shown = (f"Beside it the speed of decoding and prefill against the default's: {cost}." if cost else
             "Its speed is not shown, for no GPU has recorded it yet.")
    return (f"{_claim(every, speed)}. A chart of different answers and different digests of logits on a log axis, on "
            f"the {about['device']}. {'; '.join(said)}. {shown}")
