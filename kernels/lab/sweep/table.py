"""The table under a sweep's chart."""
from __future__ import annotations

import html

import pandas as pd

from .. import style
from ..widgets import parts


def table_html(rows: pd.DataFrame) -> str:
    """A small table: a line for each token count, a column for each contender, its median time and its verdict."""
    if not len(rows):
        return ""
    names = style.in_order(rows)
    cells = {(r.implementation, r.tokens): r for r in rows.itertuples()}
    head = "".join(f'<th style="{parts.CELL};border-bottom:3px solid {style.contender(n)["color"]}">{html.escape(n)}'
                   '</th><th></th>' for n in names)
    lines = "".join(
        f'<tr><td style="{parts.CELL}">{t:,}</td>' + "".join(_cell(cells.get((n, t))) for n in names) + "</tr>"
        for t in sorted(rows.tokens.unique()))
    return (f'<table style="{style.TABLE}">'
            f'<tr style="border-bottom:1px solid #bbb"><th style="{parts.CELL}">tokens</th>{head}</tr>{lines}</table>'
            '<div style="font-size:11px;color:var(--jp-ui-font-color2,#555);margin-top:2px">Median time a call. '
            '✓ the bits of the largest batch, ✗ how many elements differ from it.</div>')


def _cell(row) -> str:
    if row is None:
        return f'<td style="{parts.CELL};color:#888">-</td><td></td>'
    time_text = f"{row.us_p50:,.1f} µs" if row.us_p50 < 1000 else f"{row.us_p50 / 1000:,.2f} ms"
    if pd.isna(row.same_bits):
        verdict = ""
    elif row.same_bits:
        verdict = f'<span style="color:{style.SAME[2]}">✓</span>'
    else:
        verdict = f'<b style="color:{style.MOVED[1]}">✗ {row.elements_differ:,}</b>'
    return f'<td style="{parts.CELL}">{time_text}</td><td style="text-align:left">{verdict}</td>'
