"""MixExplorer: window, group, share and batch under sliders; a shell over verifying.chart.explored."""
from __future__ import annotations

import ipywidgets as w

from ..widgets import parts
from ..widgets.base import Study
from . import chart
from .explore import Costs, Mix

WINDOWS, GROUPS, BATCHES = (4, 8, 16, 32, 64), (1, 2, 4, 8), (2, 4, 8, 16, 32)


class MixExplorer(Study):
    """Sliders for W, G, the share of deterministic requests and the batch, a button that measures, the picture below.

    The first picture of a batch, a window and a group times a step and a pass, about a second on a laptop; what was
    timed is kept. `costs` are predicted from in its place, another machine's for instance. Raises ValueError for a mix
    that cannot be.
    """

    def __init__(self, window: int = 16, group: int = 4, share: float = 0.5, batch: int = 8, model: str = "byte",
                 costs: Costs | None = None):
        super().__init__()
        Mix(batch, share, window, group)
        self._model, self._costs = model, costs
        settings = {"continuous_update": False, **parts.LABELLED}
        self.window = w.SelectionSlider(description="Window W", options=sorted({*WINDOWS, window}), value=window,
                                        **settings)
        self.group = w.SelectionSlider(description="Group G", options=sorted({*GROUPS, group}), value=group,
                                       **settings)
        self.share = w.IntSlider(description="Deterministic, %", min=0, max=100, step=5, value=round(100 * share),
                                 **settings)
        self.batch = w.SelectionSlider(description="Requests", options=sorted({*BATCHES, batch}), value=batch,
                                       **settings)
        self.measure = w.ToggleButton(description="Measure it here", value=False)
        controls = (self.window, self.group, self.share, self.batch)
        parts.widths(dict.fromkeys(controls, "330px") | {self.measure: "150px"})
        self._show(parts.panel(parts.line(self.window, self.group), parts.line(self.share, self.batch),
                               parts.line(self.measure)), "860px", *controls, self.measure)

    def __repr__(self):  # what a saved notebook keeps of the widget
        return "MixExplorer(): run this cell in JupyterLab to use it"

    def _study(self):
        return chart.explored(self.window.value, self.group.value, self.share.value / 100, self.batch.value,
                              self.measure.value, self._model, self._costs)
