"""What stands on a page in place of a widget: the chart that it opens on, drawn when the page is built."""
from __future__ import annotations

import ast
import base64
import html
import re
from collections.abc import Callable, Mapping
from importlib import import_module

from nbformat.v4 import new_output

from ... import OPS
from ..atlas import chart as atlas_chart
from ..sweep import chart as sweep_chart
from ..window import chart as window_chart

NOTE = "(a widget: run the notebook to use it)"  # what a committed notebook keeps of one
# a widget that opens on recorded data, or on the machine that builds the site -> where it is, its chart in words
WIDGETS: Mapping[str, tuple[str, Callable[..., str]]] = {
    "TokenSweep": ("..sweep", lambda widget: sweep_chart.claim(widget.shown)),
    "WindowCost": ("..window", lambda widget: window_chart.claim(widget.shown)),
    "Atlas": ("..atlas", lambda widget: atlas_chart.words({widget.machine.value: widget.recorded})),
    "SumOrders": ("..orders", lambda widget: _plain(widget.words.value)),
    "AdderSteps": ("..adder", lambda widget: _plain(widget.words.value)),
    "GpuChart": ("..parallel", lambda widget: _plain(widget.words.value)),
    "MixExplorer": ("..verifying", lambda widget: _plain(widget.words.value))}
# opens on what the reader's own machine computes: the notebook's last picture, of the same function, stands for it
OF_THIS_MACHINE = ("BatchSlider", "ServerSettings")


def with_pictures(nb):
    """The notebook, changed in place: each widget's note is a picture, and a line that says how to use the widget.

    Raises ValueError for a widget that this file does not know.
    """
    last = None
    for cell in nb.cells:
        outputs = []
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if data.get("text/plain") == NOTE and "image/png" not in data:
                outputs += _picture(*_of(cell.source, last))
                continue
            if "image/png" in data:
                last = data["image/png"], output.metadata["image/png"]["alt"]
            outputs.append(output)
        if outputs:
            cell.outputs = outputs
    return nb


def _picture(png: str, words: str) -> list:
    """The outputs in place of a widget's note."""
    line = ('<p class="picture-of-a-widget">This is how the widget opens. Run the notebook to use it.</p>'
            f"<details><summary>This figure in words</summary>{html.escape(words)}</details>")
    return [new_output("display_data", {"image/png": png, "text/plain": words},
                       metadata={"image/png": {"alt": words}}),
            new_output("display_data", {"text/html": line})]


def is_widget(cell) -> bool:
    """Whether the cell's committed output is a widget's note."""
    return any(output.get("data", {}).get("text/plain") == NOTE for output in cell.get("outputs", []))


def _of(source: str, last: tuple[str, str] | None) -> tuple[str, str]:
    """PNG in base64, and the picture in words, for the widget that this cell makes in its last line."""
    call = ast.parse(source).body[-1]
    name = getattr(getattr(getattr(call, "value", None), "func", None), "id", "")
    if name in OF_THIS_MACHINE and last is not None:
        return last
    if name not in WIDGETS:
        raise ValueError(f"widget must be one of {', '.join((*WIDGETS, *OF_THIS_MACHINE))}, with a picture before the "
                         f"last, got {source.strip().splitlines()[-1]!r}")
    room, in_words = WIDGETS[name]
    widget = getattr(import_module(room, __package__), name)(*map(_value, call.value.args))
    return base64.b64encode(widget.chart.value).decode(), f"The widget as it opens. {in_words(widget)}"


def _value(node: ast.expr):
    """An argument of a widget: an op by name, or a literal. ValueError for anything else."""
    return OPS[node.id] if isinstance(node, ast.Name) and node.id in OPS else ast.literal_eval(node)


def _plain(folded: str) -> str:
    """The text in the <details> of a Study."""
    return html.unescape(re.sub(r"<[^>]+>", "", folded.partition("</summary>")[2]))
