"""What a verifier makes decode again: tokens dropped over the window W, and how long decode and verifier agree."""
from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from figures import described, named_once
from figures.page import SCREEN, Page, around
from kernels.lab import records
from kernels.lab.verifying import chart
from kernels.lab.verifying.measure import ROLLBACKS

EXPERIMENT = ["model", "verifier", "dtype", "temperature", "group", "requests"]


def _rows(data, machine) -> tuple[pd.DataFrame, dict]:
    """The experiment with the most windows, of these the one with the most flips; and the machine."""
    rows = records.load(ROLLBACKS, machine, data)
    if not len(rows):
        raise ValueError(f"no rollback is recorded for {machine or 'any machine'} in {data}: python -m kernels "
                         "rollbacks")
    experiments = [rows for _, rows in rows.groupby(EXPERIMENT)]
    best = max(experiments, key=lambda mine: (len(mine), mine.flips.sum()))
    return best.sort_values("window"), described(data, rows.machine.iloc[0])


def draw(data=records.DATA, machine: str | None = None, page: Page = SCREEN) -> Figure:
    rows, about = _rows(data, machine)
    figure = page.figure(11, 4 if not page.narrow else 5.6)
    left, right = figure.subplots(*((2, 1) if page.narrow else (1, 2)))
    chart.shares(left, rows, chart.published())
    chart.spans(right, rows)
    for axes in (left, right):
        axes.get_legend().remove()
    around(figure, page, chart.rollbacks_claim(rows), _caption(rows, about, page.newline), named_once([left, right]))
    return figure


def words(data=records.DATA, machine: str | None = None) -> str:
    rows, about = _rows(data, machine)
    points = [f"{row.window}: {row.share:g}%" for row in chart.published().itertuples()]
    return (f"{chart.rollbacks_words(rows)} Hollow marks on the left: LLM-42's published shares, {'; '.join(points)}. "
            f"{_caption(rows, about)}")


def _caption(rows, about, newline: str = " ") -> str:
    one = rows.iloc[0]
    return (f"The trained byte model in {one['dtype']}, {about['device'].removeprefix('NVIDIA ')}: {one.requests:,.0f} "
            f"requests together, {rows.tokens.sum():,.0f} tokens, drawn at temperature {one.temperature:g}."
            f"{newline}Verifier: {one.verifier} ops at one shape, G = {one.group}. Nothing is perturbed: a flip is a "
            "draft of decode that the verifier's pass does not choose.")
