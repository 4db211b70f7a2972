"""LLM-42's second chart, measured again: what a window of tokens costs a token, and the same passes undivided."""
from __future__ import annotations

import textwrap

import pandas as pd
from matplotlib.figure import Figure

from figures import described, named_once, not_recorded
from figures.page import SCREEN, Page, around
from kernels.lab import records
from kernels.lab.window import chart as window_chart
from kernels.lab.window.measure import VERIFY_COST
from kernels.lab.window.replay import CURVE

TOKENS = (16, 32, 64, 128, 256, 512)
CEILINGS = ("copy_gbytes_per_s", "matmul_tflops")
WORK = (" At work: W x G tokens, each window behind 1024 or 4096 tokens of its own, a token chosen behind every one, "
        "one CUDA graph.")


def draw(data=records.DATA, machine: str | None = None, page: Page = SCREEN) -> Figure:
    rows = records.load(VERIFY_COST, machine, out=data)
    if not len(rows):
        raise ValueError(f"no window is recorded for {machine or 'any machine'} in {data}: python -m kernels window")
    machine = described(data, rows.machine.iloc[0])
    rows, replays = rows[rows.curve != CURVE], rows[rows.curve == CURVE]
    points, panels = window_chart.published(), 3 if len(replays) else 2
    figure = page.figure(6.5 * panels, 5.8 if page.screen else 3 * panels if page.narrow else 3.6)
    left, right, *more = figure.subplots(*((panels, 1) if page.narrow else (1, panels)))
    for axes in more:
        window_chart.replays(axes, replays)
        axes.set_title(f"The pass at work: {int((replays.tokens * replays.group).max())} tokens on their prefixes")
    paper = rows[(rows.curve == "paper") & (rows.ops == "default") & rows.tokens.isin(TOKENS)]
    window_chart.per_token(left, paper, TOKENS, points=points)
    top = max(left.get_ylim()[1], 0.85)
    if top < 5:
        ticks = [i / 5 for i in range(int(5 * top) + 1)]
        left.set_yticks(ticks, [f"{tick:.1f}" for tick in ticks])
    left.set(ylim=(0, top), title="The published chart, measured again")
    window_chart.whole_pass(right, rows, sorted(rows.tokens.unique()), points=points)
    right.set_title("The same passes, not divided by their tokens")
    places = ("left", "right") if panels == 2 else ("left", "middle")
    caption = _caption(machine, rows, replays, *(("above", "below") if page.narrow else places))
    if not page.screen:
        for axes in more:  # a list above the lines, for two columns are wider than a panel
            axes.legend(loc="upper center").set_in_layout(False)
            axes.set_ylim(top=1.6 * axes.get_ylim()[1])
        for axes in (left, right):
            axes.get_legend().remove()
        right.set_ylim(top=1.15 * max(max(line.get_ydata()) for line in right.lines))  # no legend needs room
    around(figure, page, _claim(rows), (textwrap.fill(caption, 92 * panels) if page.screen else caption)
           + not_recorded(["paper", "graph"], rows.curve) + not_recorded(["default", "invariant"], rows.ops)
           + not_recorded(CEILINGS, machine), None if page.screen else named_once([right, left]))
    return figure


def words(data=records.DATA, machine: str | None = None) -> str:
    rows = records.load(VERIFY_COST, machine, out=data)
    rows, replays = rows[rows.curve != CURVE], rows[rows.curve == CURVE]
    said = []
    for (curve, ops), mine in rows.groupby(["curve", "ops"], sort=False):
        few, many = (mine.loc[mine.tokens == count].iloc[0] for count in (mine.tokens.min(), mine.tokens.max()))
        said.append(f"{curve} with {ops} ops {few.ms_p50:.1f} at {few.tokens} and {many.ms_p50:.1f} at {many.tokens}")
    paper = rows[(rows.curve == "paper") & (rows.ops == "default") & rows.tokens.isin(TOKENS)].sort_values("tokens")
    per = [f"{row.ms_p50 / row.tokens:.3f} at {row.tokens}" for row in (*paper.iloc[:1].itertuples(),
                                                                      *paper.iloc[-1:].itertuples())]
    return (f"{_claim(rows)}. Panels over the tokens in a window. Left, the published chart's axes: latency per "
            f"token in milliseconds of our eager passes, {' and '.join(per)}; hollow marks are the published points, "
            "with the area beneath them in green. Beside it, the whole pass in milliseconds on log "
            f"axes: {'; '.join(said)}; dotted, the matrix products' least time by measured ceilings."
            + _replays_in_words(replays))


def _replays_in_words(rows) -> str:
    """A third panel, if there is one."""
    said = [f"{row.ops} ops, {row.group} windows of {row.tokens} behind {row.prefix}: "
            + (f"{row.ms_p50:.1f} of a floor of {row.floor_ms:.1f}" if row.ms_p50 == row.ms_p50 else "does not fit")
            for row in rows.sort_values(["ops", "prefix", "tokens"]).itertuples()]
    return f" Third, passes on prefixes, in milliseconds: {'; '.join(said)}." if said else ""


def _claim(rows) -> str:
    """How much longer a longer window takes, of every curve that has both windows."""
    ms = rows.pivot(index=["curve", "ops"], columns="tokens", values="ms_p50")
    if not {16, 128} <= set(ms):
        return "What a window of tokens costs"
    ratio = ms[128] / ms[16]
    few, many, curves = ratio.min(), ratio.max(), ratio.notna().sum()
    if not curves:
        return "What a window of tokens costs"
    times = f"{few:.2f} to {many:.2f}" if curves > 1 else f"{many:.2f}"
    which = f" in all {curves} curves" if curves > 1 else ""
    means = ": one reading of the weights serves a window" if many < 2 else ""
    return f"128 tokens take {times} times as long as 16{which}{means}"


def _caption(machine, rows, replays, first, second) -> str:
    return (
        f"{machine.get('verify_cost_model', 'a model')}, random weights, one request, empty prefix. Lines: "
        f"{machine['device']}, medians with their 5-95 % band (hatched: other ops than the default's). Clock: host "
        "wall time of one pass. paper: preparing the batch, an eager forward, the chosen token back on the host. "
        "graph: the same, forward and argmax replayed as one CUDA graph. floor: for each matrix product the longer of "
        "its bytes at a copy's bandwidth and its operations at a large product's rate, both measured in that run. "
        f"{_ops(pd.concat([rows, replays]))}{WORK if len(replays) else ''} Hollow marks: published by LLM-42, an H100 "
        f"PCIe; read off the chart ({first}, over the green area it has there), the authors' log ({second}). "
        f"Axes: {first}, evenly spaced windows and time from zero; {second}, both logarithmic.")


def _ops(rows) -> str:
    """What the lines' ops are. Until 2026-11-29 the model had this suite's ops at three steps alone."""
    early = (rows[rows.ops == "invariant"].recorded_at.astype(str) < "2026-11-29").any()
    said = "this suite's RMSNorm, rotary and SwiGLU; products and attention were PyTorch's." if early else \
        "this suite's, every step."
    fused = " Fused ops: PyTorch's products and attention under this suite's fusions, not invariant."
    return f"Invariant ops: {said}{fused if (rows.ops == 'fused').any() else ''}"
