"""Small parts of the widgets: lines and panels of controls, messages, downloads, what a control's text says."""
from __future__ import annotations

import base64
import html
import io
import re

import ipywidgets as w
import pandas as pd
from matplotlib.figure import Figure

from ..style import MOVED

LABELLED = {"style": {"description_width": "initial"}}
CELL = "padding:1px 4px 1px 14px;text-align:right;font-variant-numeric:tabular-nums"
_ROW = {"flex_flow": "row wrap", "grid_gap": "2px 16px", "align_items": "center"}
_PANEL = {"border": "1px solid var(--jp-border-color2, #ddd)", "padding": "8px 12px", "margin": "0 0 8px 0"}


def line(*controls: w.Widget) -> w.HBox:
    """Controls side by side, on further lines where there is no room."""
    return w.HBox(controls, layout=w.Layout(**_ROW))


def panel(*lines: w.Widget) -> w.VBox:
    """Lines of controls in one frame."""
    return w.VBox(lines, layout=w.Layout(**_PANEL))


def widths(wanted: dict[w.Widget, str]) -> None:
    for control, width in wanted.items():
        control.layout.width = width


def message(problem: str | Exception) -> str:
    """HTML that tells the reader what went wrong."""
    return (f'<div style="border-left:3px solid {MOVED[1]};background:#fbeeed;color:#5b1512;padding:3px 10px;'
            f'margin:2px 0;font-size:12px;line-height:1.5">{html.escape(str(problem))}</div>')


def in_a_line(error: Exception) -> str:
    """The error's type and the first line of what it says."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else 'no message'}"


def downloads_html(rows: pd.DataFrame, png: bytes, name: str) -> str:
    """Links that save the rows as CSV and the chart as PNG, with the data inside them."""
    csv = rows.to_csv(index=False, float_format="%.6g", lineterminator="\n").encode()
    return " · ".join(
        f'<a download="{html.escape(name)}.{kind}" href="data:{mime};base64,{base64.b64encode(data).decode()}" '
        f'style="color:var(--jp-content-link-color,#0366d6)">Download {kind.upper()}</a>'
        for kind, mime, data in (("csv", "text/csv", csv), ("png", "image/png", png)))


def png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=150)
    return file.getvalue()


def seconds(s: float) -> str:
    return f"{s:.0f} s" if s < 100 else f"{s / 60:.0f} min"


def token_counts(text: str) -> list[int]:
    """The whole numbers in a control's text. ValueError for anything else, and for a number below 1."""
    words = re.split(r"[\s,;]+", text.strip(" ,;"))
    for word in words:
        if not word.isdecimal() or int(word) < 1:
            raise ValueError(f"token counts must be whole numbers of at least 1, such as '1 8 64', got {word!r}")
    return [int(word) for word in words]
