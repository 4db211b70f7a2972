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


def _rows(data, machine) -> tuple[pd.DataFrame, dict, pd.DataFrame]:
    """The experiment with the most windows, of these the one with the most flips; its machine; the byte model's rows
    of the other machines. Of all machines, unless one is named.
    """
    names = [machine] if machine else records.machines(ROLLBACKS.file, data) or [None]
    every = pd.concat([records.load(ROLLBACKS, name, data) for name in names])
    if not len(every):
        raise ValueError(f"no rollback is recorded for {machine or 'any machine'} in {data}: python -m kernels "
                         "rollbacks")
    experiments = [rows for _, rows in every.groupby(["machine", *EXPERIMENT], sort=False)]
    best = max(experiments, key=lambda mine: (len(mine), mine.flips.sum()))
    name = best.machine.iloc[0]
    return best.sort_values("window"), described(data, name), every[every.machine != name]


def draw(data=records.DATA, machine: str | None = None, page: Page = SCREEN) -> Figure:
    rows, about, others = _rows(data, machine)
    figure = page.figure(11, 4 if not page.narrow else 5.6)
    left, right = figure.subplots(*((2, 1) if page.narrow else (1, 2)))
    chart.shares(left, rows, chart.published())
    chart.spans(right, rows)
    for axes in (left, right):
        axes.get_legend().remove()
    around(figure, page, chart.rollbacks_claim(rows), _caption(rows, about, _elsewhere(others, data), page.newline),
           named_once([left, right]))
    return figure


def words(data=records.DATA, machine: str | None = None) -> str:
    rows, about, others = _rows(data, machine)
    points = [f"{row.window}: {row.share:g}%" for row in chart.published().itertuples()]
    return (f"{chart.rollbacks_words(rows)} Hollow marks on the left: LLM-42's published shares, {'; '.join(points)}. "
            f"{_caption(rows, about, _elsewhere(others, data))}")


def _elsewhere(others, data) -> str:
    """How many drafts flipped on the other machines."""
    said = []
    for name, mine in others.groupby("machine", sort=False):
        windows = " and ".join(map(str, sorted(mine.window.unique())))
        device = described(data, name)["device"].removeprefix("NVIDIA ")
        said.append(f"On the {device}, W = {windows}: {mine.flips.sum():,.0f} of {mine.drafts.sum():,.0f} drafts "
                    "flipped.")
    return " ".join(said)


def _caption(rows, about, elsewhere: str, newline: str = " ") -> str:
    one = rows.iloc[0]
    return (f"The trained byte model in {one['dtype']}, {about['device'].removeprefix('NVIDIA ')}: {one.requests:,.0f} "
            f"requests together, {rows.tokens.sum():,.0f} tokens, drawn at temperature {one.temperature:g}."
            f"{newline}Verifier: {one.verifier} ops at one shape, G = {one.group}. Nothing is perturbed: a flip is a "
            "draft of decode that the verifier's pass does not choose." + (newline + elsewhere if elsewhere else ""))
