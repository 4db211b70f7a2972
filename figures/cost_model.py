"""The model of time: predicted against measured, and what a schedule that it chooses costs beside the fastest."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from figures import described, named_once
from figures.page import SCREEN, Page, around
from kernels.lab import records, style
from kernels.lab.tuning import cost_fit
from kernels.lab.tuning.cost_times import COST_TIMES

LOOKS = {False: {"color": style.BLUE, "marker": "o", "label": "weights that were fitted"},
         True: {"color": style.VERMILION, "marker": "^", "label": "weights that were not"}}
WORST = 1.5  # times the fastest schedule's time, at the right edge


def draw(data=records.DATA, machine: str | None = None, page: Page = SCREEN) -> Figure:
    rows, chosen, machine = recorded(data, machine)
    figure = page.figure(13, 5.6 if page.screen else 6.4 if page.narrow else 3.8)
    left, right = figure.subplots(*((2, 1) if page.narrow else (1, 2)))
    low, high = 0.8 * rows.us_p50.min(), 1.25 * rows.us_p50.max()
    left.plot([low, high], [low, high], color=style.GREY, linewidth=1.3, zorder=1)
    left.plot(rows.us_p50, rows.predicted, linestyle="none", marker=".", markersize=2, color=style.GREY, alpha=0.4,
              rasterized=True, label="every schedule", zorder=2)
    for checked, look in LOOKS.items():
        mine = chosen[chosen.checked == checked]
        left.plot(mine.us, mine.predicted, linestyle="none", markersize=4, zorder=3 + checked,
                  **look | {"label": f"chosen, {look['label']}"})
        _lost(right, mine, look)
    left.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high), xlabel="Measured, us",
             ylabel="Predicted, us", title="Predicted against measured")
    left.minorticks_off()
    right.set(xlim=(1, WORST), ylim=(0, 1), xlabel="Times the fastest schedule's time", ylabel="Share of points",
              title="What its choice costs")
    right.yaxis.set_major_formatter(PercentFormatter(1))
    if page.screen:
        left.legend(loc="upper left")
        right.legend(loc="lower right")
    around(figure, page, _claim(chosen), _caption(rows, chosen, machine), None if page.screen else named_once([left]))
    return figure


def words(data=records.DATA, machine: str | None = None) -> str:
    rows, chosen, _ = recorded(data, machine)
    said = "; ".join(f"{look['label']}: {cost_fit.words(chosen[chosen.checked == checked])}"
                     for checked, look in LOOKS.items() if (chosen.checked == checked).any())
    return (f"{_claim(chosen)}. Left, microseconds predicted over microseconds measured of {len(rows)} schedules, on "
            f"log axes, with a line where they are equal; within {_middle(rows):.0%} for half of them. Right, the "
            f"share of points at which the schedule that it chooses takes at most so many times the time of the "
            f"fastest that was timed. {said}.")


def recorded(data, machine: str | None = None) -> tuple[pd.DataFrame, pd.DataFrame, dict]:
    """What was timed in bfloat16, with a column `predicted`; one row a point, as cost_fit.choices has it; the machine.

    Raises FileNotFoundError where no machine has the table or its GPU has no fitted model, ValueError without rows.
    """
    rows = records.load(COST_TIMES, machine, out=data)
    name = rows.machine.iloc[0] if len(rows) else machine
    known = cost_fit.timed(rows, "bfloat16")
    if not len(known.rows):
        raise ValueError(f"no schedule is timed for {name} in {data}: python -m kernels.lab.tuning.cost_times")
    fitted = cost_fit.stored(known, cost_fit.tables_name(name), Path(data) / "schedules")
    default = rows[(rows.dtype == "bfloat16") & (rows.schedule == "cuda")]
    chosen = cost_fit.choices(fitted, known, default)
    return known.rows.assign(predicted=cost_fit.predicted(fitted, known)), chosen, described(data, name)


def _lost(axes, chosen, look):
    """The share of points at which the choice takes at most so many times the fastest's time, as steps."""
    lost = np.sort(chosen.us / chosen.best)
    axes.step([*lost, max(WORST, 2 * lost.max(initial=1))], [*np.arange(1, len(lost) + 1) / max(len(lost), 1), 1],
              where="post", color=look["color"], label=look["label"])


def _middle(rows) -> float:
    return float(np.expm1(np.abs(np.log(rows.predicted / rows.us_p50)).median()))


def _claim(chosen) -> str:
    part = chosen[chosen.checked] if chosen.checked.any() else chosen
    kind = "weights that were not fitted" if chosen.checked.any() else "its own weights"
    lost = float(np.exp(np.log(part.us / part.best).mean()))
    return f"A schedule chosen by the model takes {lost:.2f} times the fastest's time, for {kind}"


def _caption(rows, chosen, machine) -> str:
    return (f"{rows['shape'].nunique()} weights, {len(chosen)} points, {len(rows):,} times of schedules · bfloat16 · "
            f"{machine['device']}, torch {machine['torch']} · clock `cold`: device time with inputs out of cache\n"
            f"predicted within {_middle(rows):.0%} for half of all; both axes logarithmic (time) · a point is a weight "
            f"and a token count; beyond {WORST:g}: {(chosen.us / chosen.best > WORST).sum()} of {len(chosen)} points")
