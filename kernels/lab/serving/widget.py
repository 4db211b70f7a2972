"""BatchSlider: one request's text under a slider for the batch size; a shell over serving.chart.study.

ServerSettings: the answers of a server under all its settings; a shell over serving.tree.study.
"""
from __future__ import annotations

import ipywidgets as w

from ...model.config import preset
from ..widgets import parts
from ..widgets.base import Study
from . import chart, tree
from .loads import Server, crowd
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


class ServerSettings(Study):
    """Chunk size, prefix cache, pages, batch limit and drafts of a server, a button that fixes the order, and below
    the tree of answers to one prompt asked for `copies` times among strangers, `count` tokens each.

    What a setting gave is kept. Raises ValueError for numbers below 1.
    """

    def __init__(self, copies: int = 12, count: int = 24):
        super().__init__()
        crowd(preset("byte"), copies, count=count)
        self._copies, self._count = copies, count
        self.chunk = _choice("Tokens a chunk", (5, 16, 64), 64)
        self.batch = _choice("Requests a step", (1, 4, 16), 16)
        self.pages = _choice("Pages of 8 tokens", (24, 400), 400)
        self.drafts = _choice("Drafts a step", (0, 4), 0)
        self.sharing = w.ToggleButton(description="Prefix cache", value=True)
        self.fixed = w.ToggleButton(description="Fix the order", value=False)
        sliders = (self.chunk, self.batch, self.pages, self.drafts)
        parts.widths(dict.fromkeys(sliders, "330px") | {self.sharing: "130px", self.fixed: "130px"})
        lines = parts.line(*sliders), parts.line(self.sharing, self.fixed)
        self._show(parts.panel(*lines), "920px", *sliders, self.sharing, self.fixed)

    def _study(self):
        server = Server(pages=self.pages.value, page_size=8, max_batch=self.batch.value, budget=64,
                        chunk=self.chunk.value, sharing=self.sharing.value, speculate=self.drafts.value)
        return tree.study(server, self.fixed.value, self._copies, self._count)

    def __repr__(self):
        return f"ServerSettings({self._copies}, {self._count}): run this cell in JupyterLab to use it"


def _choice(name: str, options: tuple[int, ...], value: int) -> w.SelectionSlider:
    return w.SelectionSlider(description=name, options=options, value=value, continuous_update=False, **parts.LABELLED)
