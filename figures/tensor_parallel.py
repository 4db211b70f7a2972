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
    lines = len(rows.groupby(["ops", "phase", "batch", "context"]))
    figure = page.figure(13, 0.9 + 0.55 * max(7, lines) if page.screen or not page.narrow else 7)
    shape = {"height_ratios": [1.2, 1]} if page.narrow else {"width_ratios": [1.1, 1]}
    left, right = figure.subplots(*((2, 1) if page.narrow else (1, 2)), **shape)
    chart.digest_grid(left, rows)
    if page.narrow:
        for text in left.texts:
            text.set(fontsize=7, text=text.get_text()[:4] + text.get_text()[-2:])  # four digits have room
        left.tick_params(axis="y", labelsize=7)
    chart.times(right, rows)
    around(figure, page, chart.claim(rows), chart.caption(rows, device), named_once([right]), columns=3)
    return figure


def words(data=records.DATA, machine: str | None = None) -> str:
    return chart.words(chart.recorded(machine, data))
