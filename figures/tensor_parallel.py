"""One model on 1, 2, 4 and 8 GPUs or processes: which digests its logits have, and what a forward takes."""
from __future__ import annotations

from matplotlib.figure import Figure

from figures import described, named_once
from figures.page import SCREEN, Page, around
from kernels.lab import records
from kernels.lab.parallel import chart


def draw(data=records.DATA, machine: str | None = None, page: Page = SCREEN) -> Figure:
    rows = chart.recorded(machine, data)
    device = described(data, rows.machine.iloc[0])["device"]
    lines = len(chart.compared(rows).groupby(["ops", *chart.POINT]))
    more = len(chart.alone(rows)) > 0 and len(chart.shares(rows)) > 0  # points that have no second number of GPUs
    panels = 3 if more else 2
    pitch = 0.55 if lines <= 14 else 0.4
    figure = page.figure(13 if panels == 2 else 15.5,
                         0.9 + pitch * max(7, lines) if page.screen or not page.narrow else 7 + 3.5 * more)
    shape = {"height_ratios": [1.2, 1, 1][:panels]} if page.narrow else {"width_ratios": [1.1, 1, 0.9][:panels]}
    left, right, *third = figure.subplots(*((panels, 1) if page.narrow else (1, panels)), **shape)
    chart.digest_grid(left, rows)
    chart.times(right, rows)
    for axes in third:
        chart.ratios(axes, rows)
    if page.narrow or more and not page.screen:
        for text in left.texts:
            text.set(fontsize=7, text=text.get_text()[:4] + text.get_text()[-2:])  # four digits have room
        for axes in (left, *third):
            axes.tick_params(axis="y", labelsize=7)
    around(figure, page, chart.claim(rows), chart.caption(rows, device), named_once([right, *third]),
           columns=3 if lines <= 14 or page.narrow else 4)
    return figure


def words(data=records.DATA, machine: str | None = None) -> str:
    rows = chart.recorded(machine, data)
    found, said = chart.shares(rows), []
    if len(chart.alone(rows)) and len(found):
        for (model, phase), mine in found.groupby(["model", "phase"]):
            low, high = f"{mine.min():.2f}", f"{mine.max():.2f}"
            said.append(f"{model}, {phase} {low}{f' to {high}' * (low != high)}")
    third = f" In a third panel, times the default's time with invariant ops: {'; '.join(said)}." if said else ""
    return f"{chart.words(rows)}{third}"
