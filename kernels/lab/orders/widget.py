"""SumOrders: where the sums of the same numbers end, order by order; a shell over orders.chart.study."""
from __future__ import annotations

import ipywidgets as w

from ...op import DTYPES
from ..widgets import parts
from ..widgets.base import Study
from . import chart as orders_chart
from . import measure as orders

LENGTHS = (2, 3, 4, 5, 6, 7, 8, 16, 64, 256, 1024, 4096)


class SumOrders(Study):
    """Controls for length, format, ways to add, spread, signs and seed, and a histogram for each way to add.

    length  one of LENGTHS; up to 8 numbers every order is tried, beyond it 1000 random ones
    dtype   a name in op.DTYPES

    ValueError for another length or dtype.
    """

    def __init__(self, length: int = 4096, dtype: str = "float32"):
        super().__init__()
        for name, value, known in (("length", length, LENGTHS), ("dtype", dtype, DTYPES)):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(map(str, known))}, got {value!r}")
        self._build(length, dtype)
        self._show(self._laid_out(), "920px", self.length, self.dtype, self.spread, self.positive, self.seed,
                   *self.kinds.values())

    def __repr__(self):  # what a saved notebook keeps of the widget
        return f"SumOrders({self.length.value}, {self.dtype.value!r}): run this cell in JupyterLab to use it"

    def _build(self, length, dtype):
        labelled = parts.LABELLED | {"continuous_update": False}
        self.length = w.SelectionSlider(description="Numbers", options=LENGTHS, value=length, **labelled)
        self.dtype = w.Dropdown(description="Format", options=list(DTYPES), value=dtype, **parts.LABELLED)
        self.spread = w.IntSlider(description="Sizes over so many powers of two", min=4, max=28, value=4, **labelled)
        self.positive = w.Checkbox(description="positive only", indent=False)
        self.seed = w.BoundedIntText(description="Seed", min=0, max=9999, **labelled)
        self.kinds = {name: w.Checkbox(description=name, value=True, indent=False) for name in orders.KINDS}

    def _laid_out(self):
        boxes = (self.positive, *self.kinds.values())
        parts.widths({self.length: "290px", self.dtype: "180px", self.seed: "130px", self.spread: "440px"}
                     | dict.fromkeys(boxes, "auto"))
        return parts.panel(parts.line(self.length, self.dtype, self.seed), parts.line(self.spread, self.positive),
                           parts.line(w.Label("Added by"), *self.kinds.values()))

    def _study(self):
        kinds = [name for name, box in self.kinds.items() if box.value]
        if not kinds:
            raise ValueError("choose at least one way to add")
        return orders_chart.study(self.length.value, DTYPES[self.dtype.value], kinds, self.spread.value - 4,
                                  self.positive.value, self.seed.value)
