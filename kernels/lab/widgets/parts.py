"""Small parts of the widgets: lines and panels of controls, messages, downloads, what a control's text says."""
from __future__ import annotations

import base64
import html
import io
import re
from collections import Counter

import ipywidgets as w
import pandas as pd
from matplotlib.figure import Figure

from ..style import MOVED

LABELLED = {"style": {"description_width": "initial"}}
LONGEST_NUMBER = 18  # digits: more than any tensor has elements
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


def remark(text: str) -> str:
    """HTML that tells the reader what is odd and no error."""
    return f'<div style="color:var(--jp-ui-font-color2,#555);font-size:12px;padding:3px 0">{html.escape(text)}</div>'


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
    return f"{s:.0f} s" if s < 100 else f"{s / 60:.0f} min" if s < 6000 else f"{s / 3600:,.0f} h"


def whole_numbers(text: str, what: str = "token counts") -> list[int]:
    """The whole numbers in a control's text, as they stand. ValueError for anything else, for one below 1 or too large.
    """
    words = re.split(r"[\s,;]+", text.strip(" ,;"))
    for word in words:
        if not word.isdecimal() or len(word) > LONGEST_NUMBER or int(word) < 1:
            shown = repr(word) if len(word) <= LONGEST_NUMBER else f"{word[:LONGEST_NUMBER]!r}..."
            raise ValueError(f"{what} must be whole numbers of at least 1, such as '1 8 64', and of at most "
                             f"{LONGEST_NUMBER} digits, got {shown}")
    return [int(word) for word in words]


def repeated(numbers: list[int]) -> str:
    """What to say of numbers that stand more than once; "" if there are none."""
    twice = [str(n) for n, times in Counter(numbers).items() if times > 1]
    if not twice:
        return ""
    listed = ", ".join(twice[:5]) + (f" and {len(twice) - 5} more" if len(twice) > 5 else "")
    return f"{listed} {'stands' if len(twice) == 1 else 'stand'} there more than once, and will be measured once"
