"""AdderSteps: which bits survive a tensor core's addition, by exponents; a shell over adder.chart.study."""
from __future__ import annotations

import ipywidgets as w

from ..widgets import parts
from ..widgets.base import Study
from . import chart as adder_chart

START = (3, -6, -14, -27)


class AdderSteps(Study):
    """A slider for the exponent of each product and of the accumulator, and the picture of their addition.

    exponents    of the products (adder_chart.example); None starts as a zero
    accumulator  the same for the accumulator
    adder        a name in adder_chart.ADDERS

    ValueError for exponents that the picture does not take, or an unknown adder.
    """

    def __init__(self, exponents=START, accumulator: int | None = -2, adder: str = "Hopper"):
        super().__init__()
        adder_chart.example(exponents, accumulator)
        if adder not in adder_chart.ADDERS:
            raise ValueError(f"adder must be one of {', '.join(adder_chart.ADDERS)}, got {adder!r}")
        self._build([*exponents, accumulator], adder)
        self._show(self._laid_out(), "1000px", *self.sliders, *self.zeros, self.adder)

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
        options = {f"{name}: {a.fraction_bits} bits below the largest": name for name, a in adder_chart.ADDERS.items()}
        self.adder = w.Dropdown(description="Adder", options=options, value=adder, layout=w.Layout(width="360px"))

    def _laid_out(self):
        lines = [w.HBox(pair) for pair in zip(self.sliders, self.zeros, strict=True)]
        return parts.panel(w.Label("Exponents (powers of two)"), lines[-1], *lines[:-1], self.adder)

    def _study(self):
        *exponents, accumulator = self.exponents
        if accumulator is None and set(exponents) == {None}:
            raise ValueError("all five are zero, and so is their sum")
        return adder_chart.study(exponents, accumulator, adder_chart.ADDERS[self.adder.value])
