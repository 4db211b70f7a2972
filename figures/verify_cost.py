"""LLM-42's second chart, measured again: what a window of tokens costs a token, and the same passes undivided."""
from __future__ import annotations

import textwrap

from matplotlib.figure import Figure

from figures import described, not_recorded
from kernels.lab import records, style
from kernels.lab.window import chart as window_chart
from kernels.lab.window.measure import VERIFY_COST

TOKENS = (16, 32, 64, 128, 256, 512)


CEILINGS = ("copy_gbytes_per_s", "matmul_tflops")


def draw(data=records.DATA, machine: str | None = None) -> Figure:
    rows = records.load(VERIFY_COST, machine, out=data)
    if not len(rows):
        raise ValueError(f"no window is recorded for {machine or 'any machine'} in {data}: python -m kernels window")
    machine = described(data, rows.machine.iloc[0])
    points = window_chart.published()
    figure = Figure(figsize=(13, 5.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    paper = rows[(rows.curve == "paper") & (rows.ops == "default") & rows.tokens.isin(TOKENS)]
    window_chart.per_token(left, paper, TOKENS, points=points)
    top = max(left.get_ylim()[1], 0.85)
    if top < 5:
        ticks = [i / 5 for i in range(int(5 * top) + 1)]
        left.set_yticks(ticks, [f"{tick:.1f}" for tick in ticks])
    left.set(ylim=(0, top), title="The published chart, measured again")
    window_chart.whole_pass(right, rows, sorted(rows.tokens.unique()), points=points)
    right.set_title("The same passes, not divided by their tokens")
    figure.suptitle(_claim(rows), x=0.01, ha="left", fontsize=14, fontweight="bold")
    style.caption(figure, _caption(machine) + not_recorded(["paper", "graph"], rows.curve)
                  + not_recorded(["default", "invariant"], rows.ops) + not_recorded(CEILINGS, machine))
    return figure


def words(data=records.DATA, machine: str | None = None) -> str:
    rows = records.load(VERIFY_COST, machine, out=data)
    said = []
    for (curve, ops), mine in rows.groupby(["curve", "ops"], sort=False):
        few, many = (mine.loc[mine.tokens == count].iloc[0] for count in (mine.tokens.min(), mine.tokens.max()))
        said.append(f"{curve} with {ops} ops {few.ms_p50:.1f} at {few.tokens} and {many.ms_p50:.1f} at {many.tokens}")
    paper = rows[(rows.curve == "paper") & (rows.ops == "default") & rows.tokens.isin(TOKENS)].sort_values("tokens")
    per = [f"{row.ms_p50 / row.tokens:.3f} at {row.tokens}" for row in (*paper.iloc[:1].itertuples(),
                                                                      *paper.iloc[-1:].itertuples())]
    return (f"{_claim(rows)}. Two panels over the tokens in a window. Left, the published chart's axes: latency per "
            "token in milliseconds of our eager passes, with the area beneath in green, "
            f"{' and '.join(per)}; hollow marks are the published points. Right, the whole pass in milliseconds on log "
            f"axes: {'; '.join(said)}; dotted, the matrix products' least time by measured ceilings.")


def _claim(rows) -> str:
    curve = next((c for c in ("graph", "paper") if ((rows.curve == c) & (rows.ops == "default")).any()), None)
    ms = rows[(rows.curve == curve) & (rows.ops == "default")].set_index("tokens").ms_p50
    if not {16, 128} <= set(ms.index):
        return "What a window of tokens costs"
    ratio = ms[128] / ms[16]
    means = ": one reading of the weights serves a whole window" if ratio < 2 else ""
    return f"128 tokens take {ratio:.2f} times as long as 16{means}"


def _caption(machine) -> str:
    return textwrap.fill(
        f"{machine.get('verify_cost_model', 'a model')}, random weights, one request, empty prefix. Lines: "
        f"{machine['device']}, "
        "medians with their 5-95 % band. Clock: host wall time of one pass. paper: preparing the batch, an eager "
        "forward, the chosen token back on the host. graph: the same, forward and argmax replayed as one CUDA graph. "
        "floor: for each matrix product the longer of its bytes at a copy's bandwidth and its operations at a large "
        "product's rate, both measured in that run. Invariant ops: this suite's RMSNorm, rotary and SwiGLU; products "
        "and attention are PyTorch's. Hollow marks: published by LLM-42, an H100 PCIe; read off the chart (left), the "
        "authors' log (right).", 190)
