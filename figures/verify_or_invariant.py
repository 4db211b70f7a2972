"""When to verify: tokens a second over the share of deterministic requests, for each way to serve them."""
from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from figures import described, named_once
from figures.page import SCREEN, Page, around
from kernels.lab import records, style
from kernels.lab.verifying import chart
from kernels.lab.verifying.explore import MIX, PASSES

FROZEN = "frozen"
LOOKS = {**chart.WAYS, FROZEN: (style.ORANGE, (0, (6, 1.5)), "frozen: one schedule for all")}
MARKERS = {"loose": "o", "verified": "D", "invariant": "^", FROZEN: "s"}
EXPERIMENT = ["model", "batch", "window", "group", "tokens"]


def _rows(data, machine) -> tuple[pd.DataFrame, dict]:
    """The experiment with the most shares, a model of real size before the byte model; and the machine."""
    rows = records.load(MIX, machine, data)
    if not len(rows):
        raise ValueError(f"no mix is recorded for {machine or 'any machine'} in {data}: python -m kernels mix")
    experiments = [rows for _, rows in rows.groupby(EXPERIMENT)]
    best = max(experiments, key=lambda mine: (mine.model.iloc[0] != "byte", mine.share.nunique(), len(mine)))
    return best.sort_values("share"), described(data, rows.machine.iloc[0])


def draw(data=records.DATA, machine: str | None = None, page: Page = SCREEN) -> Figure:
    rows, about = _rows(data, machine)
    figure = page.figure(9, 4.4 if not page.narrow else 3.2)
    axes = figure.subplots()
    for way, mine in _ways(rows).items():
        color, line, label = LOOKS[way]
        axes.plot(100 * mine.share, mine.tokens_per_s, color=color, linestyle=line, marker=MARKERS[way], label=label)
        said = mine.dropna(subset="predicted_tokens_per_s")
        if len(said):
            axes.plot(100 * said.share, said.predicted_tokens_per_s, color=color, linestyle=":", linewidth=1,
                      label=f"_{way}, predicted")
    axes.plot([], [], color=style.GREY, linestyle=":", linewidth=1, label="predicted from one step and one pass")
    axes.set(xlabel="Deterministic requests, %", ylabel="Tokens a second", ylim=(0, None),
             xlim=(-2, 100 * rows.share.max() + 2))
    if rows.share.max() < 1:
        axes.set_xticks(sorted(100 * rows.share.unique()))
    around(figure, page, _claim(rows), _caption(rows, about, page.newline), named_once([axes]))
    return figure


def _ways(rows) -> dict[str, pd.DataFrame]:
    found = {way: rows[rows.way == way] for way in LOOKS}
    return {way: mine for way, mine in found.items() if len(mine)}


def words(data=records.DATA, machine: str | None = None) -> str:
    rows, about = _rows(data, machine)
    said = []
    for way, mine in _ways(rows).items():
        points = [f"{row.tokens_per_s:,.0f} at {row.share:.0%}" for row in mine.itertuples()]
        said.append(f"{way} {', '.join(points)}")
    held = rows[(rows.way == "verified") & (rows.share > 0)]
    late = f" A kept draft is held back {held.held_back_ms.mean():,.0f} ms in the mean." \
        if len(held) and not about["is_cpu"] else ""  # by the wall clock, which on a shared CPU counts others' work
    return (f"{_claim(rows)}. Tokens a second over the share of deterministic requests: {'; '.join(said)}. Dotted "
            f"lines are predicted from one step and one pass.{late} {_caption(rows, about)}")


def _claim(rows) -> str:
    """Where verification serves more tokens than a fixed order for all, of the shares above 0 that were measured."""
    speed = rows[rows.share > 0].pivot(index="share", columns="way", values="tokens_per_s")
    if not {"verified", "invariant"} <= set(speed) or not len(both := speed[["verified", "invariant"]].dropna()):
        return "What loose and deterministic requests together get a second"
    ratio = both.verified / both.invariant
    wins, ops = ratio[ratio > 1].index, f"{rows[rows.way == 'invariant'].ops.iloc[0]} ops"
    span = f"{ratio.min():.2f}" if len(ratio) == 1 else f"{ratio.min():.2f} to {ratio.max():.2f}"
    if not len(wins):
        return f"Verification wins nowhere: {span} of the tokens a second that {ops} serve"
    if len(wins) == len(ratio):
        return f"Verification serves {span} times the tokens of {ops}, at every share"
    if list(wins) == list(ratio.index[: len(wins)]):
        return f"Verification serves more tokens than {ops} up to {wins[-1]:.0%} of deterministic requests"
    return f"Verification serves more tokens than {ops} at {', '.join(f'{share:.0%}' for share in wins)}"


def _caption(rows, about, newline: str = " ") -> str:
    one = rows.iloc[0]
    model = "The trained byte model" if one.model == "byte" else f"{one.model}, random weights"
    fixed = rows[rows.way == "invariant"].ops
    ops = f" The invariant ops are `{fixed.iloc[0]}`." if len(fixed) and fixed.iloc[0] != "invariant" else ""
    most = f" Shares above {rows.share.max():.0%} were not measured." if rows.share.max() < 1 else ""
    return (f"{model}, {about['device'].removeprefix('NVIDIA ')}: {one.batch} requests at once, {one.tokens} tokens "
            f"each; verified in windows of {one.window} tokens, {one.group} to a pass.{newline}Medians of {PASSES} "
            f"passes in turns; prompts are read before the clock starts"
            f"{', which counts the time of one thread' if about['is_cpu'] else ''}.{ops}{most}"
            + "".join(newline + said for said in (_flips(rows), _missed(rows)) if said))


def _flips(rows) -> str:
    """Why a model without training rolls back often."""
    return ("The logits of random weights lie close together, so drafts flip far more often than a trained model's."
            if rows.model.iloc[0] != "byte" and (rows.way == "verified").any() else "")


def _missed(rows) -> str:
    """Where the step that predicts the default took over twice as long as steps at work: its lines say little."""
    loose = rows[rows.way == "loose"].dropna(subset="predicted_tokens_per_s")
    times = (loose.tokens_per_s / loose.predicted_tokens_per_s).median() if len(loose) else 1
    return (f"The step that predicts default ops was timed {times:.1f} times as long as steps at work, so their dotted "
            "lines lie too low.") if times > 2 else ""
