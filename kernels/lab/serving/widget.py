"""BatchSlider: one request's text under a slider for the batch size; a shell over serving.chart.study."""
from __future__ import annotations

import ipywidgets as w

from ..widgets import parts
from ..widgets.base import Study
from . import chart
from .measure import COUNT, REQUEST, requests

BATCHES = (1, 2, 4, 8, 16, 32, 64)


class BatchSlider(Study):
    """A slider for the batch size, a button that fixes the order, and the request's text below.

    prompt  the request's bytes
    count   how many bytes follow it
    seed    they are drawn with, at temperature 1; None for the likeliest ones

    What a batch gave is kept, so that a slider moved back does not compute again.
    Raises ValueError for an empty prompt.
    """

    def __init__(self, prompt: bytes = REQUEST, count: int = COUNT, seed: int | None = None):
        super().__init__()
        requests(max(BATCHES), prompt)
        self._prompt, self._count, self._seed = prompt, count, seed
        self.size = w.SelectionSlider(description="Requests in the batch", options=BATCHES, value=1,
                                      continuous_update=False, **parts.LABELLED)
        self.fixed = w.ToggleButton(description="Fix the order", value=False)
        parts.widths({self.size: "440px", self.fixed: "140px"})
        self._show(parts.panel(parts.line(self.size, self.fixed)), "920px", self.size, self.fixed)

    def __repr__(self):  # what a saved notebook keeps of the widget
        return f"BatchSlider({self._prompt!r}): run this cell in JupyterLab to use it"

    def _study(self):
        return chart.study(self.size.value, self.fixed.value, self._prompt, self._count, self._seed)
