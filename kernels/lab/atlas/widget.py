"""Atlas: the recorded atlas, filtered and drawn, and any cell of it measured again here; a shell over atlas.atlas.

A process measures, a worker thread passes its rows on, and the thread that made the widget draws them.
"""
from __future__ import annotations

import html
from pathlib import Path

import ipywidgets as w
import pandas as pd

from ... import runtime
from .. import records, style
from ..widgets import jobs, parts
from ..widgets.base import Measuring
from . import chart as atlas_chart
from . import measure as atlas
from .measure import ATLAS, PROPERTIES

ANY, BOTH, APPLIES = "any", "both", "any that applies"
VERDICTS = (APPLIES, "varies", "same", "not here", "not applicable", "error")
LONGEST = 60  # lines of the table
KEY = ("Pale: the same bits. Dark: bits moved; the number is the per cent of elements that differ. Hatched: no such "
       "kernel here, or no such test. Empty: does not apply, or filtered out.")
NO_ROWS = pd.DataFrame(columns=list(ATLAS.columns))


class Atlas(Measuring):
    """The atlas of one machine: filters, a chart, a table, downloads, and one op measured live beside its record.

    machine  the recorded machine to open on (default: the first there is)
    out      the data folder that holds recorded machines
    trials   as in atlas.test

    `shown` are the rows that pass the filters, `rows` those measured here, and `file` holds them too; `run()`, `stop()`
    and `join()` do from code what the buttons do. ValueError for trials below 1.
    """

    TABLE, JOB = ATLAS, jobs.atlas_cells

    def __init__(self, machine: str | None = None, *, out=records.DATA, trials: int = 20):
        super().__init__()
        if trials < 1:
            raise ValueError(f"trials must be at least 1, got {trials}")
        self._out, self._trials = Path(out), trials
        self._asked, self._recorded = [], NO_ROWS
        self._build(machine)
        self._load()
        self._draw()
        w.VBox.__init__(self, self._laid_out(), layout=w.Layout(max_width="100%"))
        self._connect()

    # --- what it holds

    @property
    def recorded(self) -> pd.DataFrame:
        """The chosen machine's rows, with atlas.csv's columns; empty if there is none."""
        return self._recorded

    @property
    def shown(self) -> pd.DataFrame:
        """The recorded rows that pass the filters."""
        rows = self._recorded
        for word in self.text.value.split():
            rows = rows[rows.op.str.contains(word, case=False, regex=False)]
        for control, column in ((self.property, "property"), (self.dtype, "dtype")):
            if control.value not in (ANY, BOTH):
                rows = rows[rows[column] == control.value]
        if self.verdict.value == APPLIES:
            return rows[rows.verdict != "not applicable"]
        return rows[rows.verdict.str.startswith(self.verdict.value)]

    def __repr__(self):  # what a saved notebook keeps of the widget
        return "Atlas(): run this cell in JupyterLab to use it"

    # --- the controls

    def _build(self, machine):
        labelled, names = parts.LABELLED, atlas.machines(self._out)
        if machine is not None and machine not in names:
            self._problems["machine"] = f"no recorded machine {machine!r}; there are: {', '.join(names) or 'none'}"
            machine = None
        self.machine = w.Dropdown(description="Recorded on", options=names or ["none"],
                                  value=machine or next(iter(names), "none"), **labelled)
        self.text = w.Text(description="Op contains", placeholder="such as sdpa or backward", continuous_update=False,
                           **labelled)
        self.property = w.Dropdown(description="Property", options=[ANY, *PROPERTIES], **labelled)
        self.verdict = w.Dropdown(description="Verdict", options=VERDICTS, **labelled)
        self.dtype = w.Dropdown(description="Dtype", options=[BOTH, *atlas.RECORDED_DTYPES], **labelled)
        self.live_op = w.Dropdown(description="Op", options=atlas.names(), value="mm", **labelled)
        self.live_dtype = w.Dropdown(description="Dtype", options=list(atlas.DTYPES), value="float32", **labelled)
        self.live_property = w.Dropdown(description="Property", options=[*PROPERTIES, ANY], value="batch", **labelled)
        self.live, self.key, self.table, self.downloads = w.HTML(), w.HTML(), w.HTML(), w.HTML()
        self.chart = w.Image(format="png", layout=w.Layout(max_width="none", flex="none"))

    def _laid_out(self):
        parts.widths({self.machine: "220px", self.text: "280px", self.property: "180px", self.verdict: "220px",
                      self.dtype: "150px", self.live_op: "280px", self.live_dtype: "160px",
                      self.live_property: "190px", self.progress: "160px"})
        look = parts.panel(parts.line(w.HTML("<b>Look up</b>"), self.machine, self.text),
                           parts.line(self.property, self.verdict, self.dtype))
        measure = parts.panel(
            parts.line(w.HTML("<b>Measure here</b>"), self.live_op, self.live_dtype, self.live_property),
            self._run_line, parts.line(self.live))
        scrolled = w.Box([self.chart], layout=w.Layout(overflow="auto", max_height="1200px"))  # not shrunk
        return [look, measure, self.errors, scrolled, self.key, self.downloads, self.table]

    def _connect(self):
        self.machine.observe(lambda change: self._in_own_thread(self._change_machine), "value")
        self._redraw_on(self.text, self.property, self.verdict, self.dtype)

    def _change_machine(self):
        self._load()
        self._draw()

    def _load(self):
        """Read the chosen machine's rows; what is wrong with them is shown, not raised."""
        self._problems.pop("recorded", None)
        name, self._recorded, self._device = self.machine.value, NO_ROWS, ""
        if name == "none":
            return
        try:
            self._device = str(records.read_machine(self._out / name).get("device", name))
            self._recorded = _undamaged(atlas.recorded(name, self._out))[list(ATLAS.columns)]
        except (OSError, ValueError, AttributeError) as error:
            self._problems["recorded"] = f"recorded data of {name}: {error}"

    # --- measuring

    def _prepare(self):
        properties = PROPERTIES if self.live_property.value == ANY else (self.live_property.value,)
        self._asked = atlas.cells([self.live_op.value], [self.live_dtype.value], properties)
        return len(self._asked), f"testing {self._asked[0][0]}", (self._asked, self._trials)

    def _on_rows(self, rows):
        for row in rows:
            self._rows[row["property"]] = row
        self.progress.value = len(self._rows)

    def _so_far(self):
        return len(self._rows), len(self._asked), "properties"

    def _progress(self):
        return f"{len(self._rows)} of {len(self._asked)} properties"

    # --- drawing

    def _draw(self):
        """Replace the live verdicts and, if the filters have changed, the chart, the table and the downloads."""
        self._show_errors()
        self.live.value = self._live_html()
        asked = (self.machine.value, self.text.value, self.property.value, self.verdict.value, self.dtype.value)
        if asked == getattr(self, "_drawn", None):
            return
        self._drawn, rows = asked, self.shown
        png = b""
        if len(rows):
            figure = atlas_chart.atlas_chart({self._device: rows}, halves=False,
                                             groups=atlas_chart.in_groups(self._recorded))
            png, self.chart.layout.width = parts.png(figure), f"{100 * figure.get_figwidth():.0f}px"
        self.chart.value, self.chart.layout.display = png, None if png else "none"
        self.key.value = _small(KEY) if png else ""
        self.table.value = table_html(rows)
        self.downloads.value = parts.downloads_html(rows, png, f"atlas-{self.machine.value}") if len(rows) else ""

    def _live_html(self) -> str:
        """The live verdicts, each over that of every recorded machine."""
        if not self._rows:
            return ""
        first = next(iter(self._rows.values()))
        here, beside = records.device_name() if runtime.HAS_GPU else "this CPU", []
        for name in atlas.machines(self._out):
            try:
                rows = _undamaged(atlas.recorded(name, self._out))
            except (OSError, ValueError):
                continue
            beside.append((name, rows[(rows.op == first["op"]) & (rows.dtype == first["dtype"])]))
        lines = [_head("property", "machine", "size", *_NUMBERS)]
        for name, row in self._rows.items():
            lines.append(_line(name, f"{here}, now", row["shape"], pd.Series(row)))
            for machine, rows in beside:
                mine = rows[rows.property == name]
                lines.append(_line("", f"{machine}, recorded", mine["shape"].iloc[0], mine.iloc[0]) if len(mine)
                             else _line("", f"{machine}: not recorded", "", None))
        return (f'<div style="font-size:12px;margin-top:4px"><b>{html.escape(first["op"])}</b> in {first["dtype"]}'
                f'</div>{_table(lines)}{_small(f"also in {self.file}") if self.file else ""}')


_NUMBERS = ("verdict", "differ", "ulp", "distinct", "trials")
_TIGHT = parts.CELL.replace("14px", "10px") + ";white-space:nowrap"


def table_html(rows: pd.DataFrame) -> str:
    """The rows as a small table, the first LONGEST of them."""
    if not len(rows):
        return '<div style="font-size:12px">No recorded row passes these filters.</div>'
    lines = [_head("op", "dtype", "size", "property", *_NUMBERS)]
    for _, row in rows.head(LONGEST).iterrows():
        lines.append(_line(row["op"], row["dtype"], row["shape"], row, row["property"]))
    more = len(rows) - LONGEST
    return _table(lines) + (_small(f"and {more:,} more rows; the CSV has them all") if more > 0 else "")


def _table(lines) -> str:
    words = "differ: of the compared elements. ulp: the largest distance. distinct: results that one row had."
    return (f'<div style="overflow-x:auto"><table style="{style.TABLE}">'
            f'{"".join(lines)}</table></div>{_small(words)}')


def _small(text: str) -> str:
    return ('<div style="font-size:11px;line-height:1.5;color:var(--jp-ui-font-color2,#555);margin-top:2px">'
            f'{html.escape(text)}</div>')


def _head(*names) -> str:
    cells = "".join(f'<th style="{_TIGHT}">{name}</th>' for name in names)
    return f'<tr style="border-bottom:1px solid #bbb">{cells}</tr>'


def _line(first, second, size, row, *further) -> str:
    numbers = [] if row is None else [
        _verdict(row.verdict), _number(100 * row.share_differ, "{:.3g} %"), _number(row.largest_ulp, "{:,.0f}"),
        _number(row.distinct, "{:.0f}"), _number(row.trials, "{:.0f}")]
    texts = [*(html.escape(str(text)) for text in (first, second, size, *further)), *numbers]
    return "<tr>" + "".join(f'<td style="{_TIGHT}">{text}</td>' for text in texts) + "</tr>"


def _verdict(text: str) -> str:
    colours = {"same": style.SAME[2], "varies": style.MOVED[1]}
    weight = "bold" if text == "varies" else "normal"
    return f'<span style="color:{colours.get(text, "#666")};font-weight:{weight}">{html.escape(text)}</span>'


def _number(value, form: str) -> str:
    return "" if pd.isna(value) else form.format(value)


def _undamaged(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows. ValueError that names the column in which there is something a table cannot show."""
    for column in ("op", "dtype", "shape", "property", "verdict"):
        if not rows[column].map(lambda value: isinstance(value, str)).all():
            raise ValueError(f"column {column} has empty or numeric cells")
    for column in ("share_differ", "largest_ulp", "distinct", "trials"):
        given = rows[column].dropna()
        if pd.to_numeric(given, errors="coerce").isna().any():
            raise ValueError(f"column {column} holds something other than numbers")
    return rows
