"""One addition of a Hopper tensor core, digit by digit: what its adder keeps of four products and an accumulator."""
from __future__ import annotations

from matplotlib.figure import Figure

from figures.page import SCREEN, Page, around
from kernels.arithmetic.tensor_core import HOPPER, explain
from kernels.lab import records
from kernels.lab.adder import chart as adder_chart

EXPONENTS, ACCUMULATOR = (3, -6, -14, -27), -2


def words(data=records.DATA, machine: str | None = None) -> str:
    return adder_chart.in_words(explain(*adder_chart.example(EXPONENTS, ACCUMULATOR), HOPPER), HOPPER)


def draw(data=records.DATA, machine: str | None = None, page: Page = SCREEN) -> Figure:
    """Worked out from the rule alone; it is the same for every record."""
    if page.screen:
        return adder_chart.study(EXPONENTS, ACCUMULATOR)[0]
    table = explain(*adder_chart.example(EXPONENTS, ACCUMULATOR), HOPPER)
    figure = page.figure(10, 2.6)
    axes = figure.subplots()
    adder_chart.digits(axes, table, HOPPER)
    if page.narrow:
        axes.set_xlim(right=axes.get_xlim()[1] + 7)  # the numbers beside the digits keep their size
        axes.set_xticks(axes.get_xticks()[::2])
        for sign in (text for text in axes.texts if text.get_text() == "−"):
            sign.set(ha="right", x=sign.get_position()[0] + 0.25)  # clear of the digit
    around(figure, page, adder_chart.claim(table, HOPPER), adder_chart.caption(table))
    return figure
