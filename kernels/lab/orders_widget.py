"""SumOrders: where the sums of the same numbers end, order by order; a thin shell over orders_chart.study."""
from __future__ import annotations

import html

import ipywidgets as w

from ..op import DTYPES
from . import orders, orders_chart
from .widgets import SETTLE_SECONDS, Measuring, _message, _png

LENGTHS = (2, 3, 4, 5, 6, 7, 8, 16, 64, 256, 1024, 4096)


class SumOrders(Measuring):  # for the way it brings a frontend's messages home; nothing is measured
    """Controls for length, format, ways to add, spread, signs and seed, and a histogram for each way to add.

    length  one of LENGTHS; up to 8 numbers every order is tried, beyond it 1000 random ones
    dtype   a name in op.DTYPES

    ValueError for a length or a dtype there is not.
    """

    def __init__(self, length: int = 4096, dtype: str = "float32"):
        super().__init__()
        self._waiting = None
        for name, value, known in (("length", length, LENGTHS), ("dtype", dtype, DTYPES)):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(map(str, known))}, got {value!r}")
        self._build(length, dtype)
        self._draw()
        w.VBox.__init__(self, self._laid_out(), layout=w.Layout(max_width="920px"))
        for control in (self.length, self.dtype, self.spread, self.positive, self.seed, *self.kinds.values()):
            control.observe(lambda change: self._at_home(self._draw_soon), "value")

    def __repr__(self):  # what a saved notebook keeps of the widget
        return f"SumOrders({self.length.value}, {self.dtype.value!r}): run this cell in JupyterLab to use it"

    def _build(self, length, dtype):
        labelled = {"style": {"description_width": "initial"}, "continuous_update": False}
        self.length = w.SelectionSlider(description="Numbers", options=LENGTHS, value=length, **labelled)
        self.dtype = w.Dropdown(description="Format", options=list(DTYPES), value=dtype, style=labelled["style"])
        self.spread = w.IntSlider(description="Sizes over so many powers of two", min=4, max=28, value=4, **labelled)
        self.positive = w.Checkbox(description="positive only", indent=False)
        self.seed = w.BoundedIntText(description="Seed", min=0, max=9999, **labelled)
        self.kinds = {name: w.Checkbox(description=name, value=True, indent=False) for name in orders.KINDS}
        self.errors = w.HTML()
        self.chart = w.Image(format="png", layout=w.Layout(width="100%", max_width="900px"))
        self.words = w.HTML()

    def _laid_out(self):
        for control, width in ((self.length, "290px"), (self.dtype, "180px"), (self.seed, "130px"),
                               (self.spread, "440px")):
            control.layout.width = width
        for box in (self.positive, *self.kinds.values()):
            box.layout.width = "auto"
        row = {"flex_flow": "row wrap", "grid_gap": "2px 16px", "align_items": "center"}
        lines = ((self.length, self.dtype, self.seed), (self.spread, self.positive),
                 (w.Label("Added by"), *self.kinds.values()))
        controls = w.VBox([w.HBox(line, layout=w.Layout(**row)) for line in lines], layout=w.Layout(
            border="1px solid var(--jp-border-color2, #ddd)", padding="8px 12px", margin="0 0 8px 0"))
        return [controls, self.errors, self.chart, self.words]

    def _draw_soon(self):
        """Draw once the controls are still, so that a key held down does not queue a chart for each step."""
        if self._loop is None:
            self._draw()
            return
        if self._waiting:
            self._waiting.cancel()
        self._waiting = self._loop.call_later(SETTLE_SECONDS, self._draw)

    def _draw(self):
        """Replace the chart; where the controls ask for none, say so and leave it."""
        kinds = [name for name, box in self.kinds.items() if box.value]
        if not kinds:
            self.errors.value = _message("choose at least one way to add")
            return
        figure, words = orders_chart.study(self.length.value, DTYPES[self.dtype.value], kinds, self.spread.value - 4,
                                           self.positive.value, self.seed.value)
        self.errors.value, self.chart.value = "", _png(figure)
        self.words.value = f"<details><summary>This figure in words</summary>{html.escape(words)}</details>"
