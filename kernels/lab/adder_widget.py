"""AdderSteps: which bits survive a tensor core's addition, by exponents; a thin shell over adder_chart.study."""
from __future__ import annotations

import html

import ipywidgets as w

from . import adder_chart
from .widgets import SETTLE_SECONDS, Measuring, _message, _png

START = (3, -6, -14, -27)


class AdderSteps(Measuring):  # for the way it brings a frontend's messages home; nothing is measured
    """A slider for the exponent of each product and of the accumulator, and the picture of their addition.

    exponents    of the products (adder_chart.example); None starts as a zero
    accumulator  the same for the accumulator
    adder        a name in adder_chart.ADDERS

    ValueError for exponents that the picture does not take, or an adder there is not.
    """

    def __init__(self, exponents=START, accumulator: int | None = -2, adder: str = "Hopper"):
        super().__init__()
        self._waiting = None
        adder_chart.example(exponents, accumulator)
        if adder not in adder_chart.ADDERS:
            raise ValueError(f"adder must be one of {', '.join(adder_chart.ADDERS)}, got {adder!r}")
        self._build([*exponents, accumulator], adder)
        self._draw()
        w.VBox.__init__(self, self._laid_out(), layout=w.Layout(max_width="1000px"))
        for control in (*self.sliders, *self.zeros, self.adder):
            control.observe(lambda change: self._at_home(self._draw_soon), "value")

    def __repr__(self):  # what a saved notebook keeps of the widget
        *exponents, accumulator = self.exponents
        return f"AdderSteps({tuple(exponents)}, {accumulator}, {self.adder.value!r}): run this cell to use it"

    @property
    def exponents(self) -> list[int | None]:
        """Those of the products, then the accumulator's; None for a zero."""
        return [None if zero.value else slider.value for slider, zero in zip(self.sliders, self.zeros, strict=True)]

    def _build(self, exponents, adder):
        names = [f"product {i}" for i in range(adder_chart.PRODUCTS)] + ["accumulator"]
        low, high = adder_chart.EXPONENTS[0], adder_chart.EXPONENTS[-1]
        self.sliders = [w.IntSlider(description=name, min=low, max=high, value=e or 0, continuous_update=False,
                                    style={"description_width": "90px"}, layout=w.Layout(width="420px"))
                        for name, e in zip(names, exponents, strict=True)]
        self.zeros = [w.Checkbox(description="zero", value=e is None, indent=False, layout=w.Layout(width="70px"))
                      for e in exponents]
        said = {f"{name}: {a.fraction_bits} bits below the largest": name for name, a in adder_chart.ADDERS.items()}
        self.adder = w.Dropdown(description="Adder", options=said, value=adder, layout=w.Layout(width="360px"))
        self.errors = w.HTML()
        self.chart = w.Image(format="png", layout=w.Layout(width="100%", max_width="1000px"))
        self.words = w.HTML()

    def _laid_out(self):
        lines = [w.HBox(pair) for pair in zip(self.sliders, self.zeros, strict=True)]
        controls = w.VBox([w.Label("Exponents (powers of two)"), lines[-1], *lines[:-1], self.adder], layout=w.Layout(
            border="1px solid var(--jp-border-color2, #ddd)", padding="8px 12px", margin="0 0 8px 0"))
        return [controls, self.errors, self.chart, self.words]

    def _draw_soon(self):
        """Draw once the controls are still, so that a key held down does not queue a picture for each step."""
        if self._loop is None:
            self._draw()
            return
        if self._waiting:
            self._waiting.cancel()
        self._waiting = self._loop.call_later(SETTLE_SECONDS, self._draw)

    def _draw(self):
        """Replace the picture; say so where every term is zero, and leave it."""
        *exponents, accumulator = self.exponents
        if accumulator is None and set(exponents) == {None}:
            self.errors.value = _message("all five are zero, and so is their sum")
            return
        figure, words = adder_chart.study(exponents, accumulator, adder_chart.ADDERS[self.adder.value])
        self.errors.value, self.chart.value = "", _png(figure)
        self.words.value = f"<details><summary>This figure in words</summary>{html.escape(words)}</details>"
