"""WindowCost: what a window of tokens costs, measured and drawn in a notebook; a shell over window_cost.

A process measures, a worker thread passes its rows on, and the thread that made the widget draws them.
"""
from __future__ import annotations

import time
from pathlib import Path

import ipywidgets as w
import pandas as pd
import torch

from ... import runtime
from ...model.config import PRESETS, preset
from .. import bench, records, style
from ..widgets import jobs, parts
from ..widgets.base import Measuring
from ..widgets.process import process_bytes
from . import chart as window_chart
from . import estimate
from . import measure as window_cost
from .measure import VERIFY_COST

NO_ROWS = pd.DataFrame(columns=list(VERIFY_COST.columns))


class WindowCost(Measuring):
    """The time of a pass over windows of tokens: controls, a live chart, a table, downloads.

    model   the name of a preset
    out     the data folder that holds recorded machines
    runs, warmups   rounds at each window (few, so that a run stays interactive)

    It opens on recorded rows. `rows` are those of the last live run, and `file` holds them too; `shown` are those in
    the chart. `run()`, `stop()` and `join()` do from code what the buttons do. ValueError for an unknown model, for
    runs below 1 or warmups below 0.
    """

    TABLE, JOB = VERIFY_COST, jobs.window_cost

    def __init__(self, model: str = "small", *, out=records.DATA, runs: int = 10, warmups: int = 2):
        super().__init__()
        window_cost.checked(preset(model), runtime.device(), (), None, (), runs, warmups)
        self._out, self._runs, self._warmups = Path(out), runs, warmups
        self._asked, self._ceilings, self._clock = [], None, None
        self._recordings = self._find_recordings()
        self._build(preset(model).name)
        self._load()
        self._draw()
        w.VBox.__init__(self, self._laid_out(), layout=w.Layout(max_width="980px"))
        self._connect()
        self._foresee()

    # --- what it holds

    @property
    def recorded(self) -> pd.DataFrame:
        """The chosen recorded rows, with verify_cost.csv's columns; empty if there are none."""
        return self._recorded

    @property
    def shown(self) -> pd.DataFrame:
        """The rows that chart, table and downloads show: the live ones, else the recorded ones."""
        return self.rows if self._live else self.recorded

    @property
    def _live(self) -> bool:
        return bool(self._rows)  # until the first point is there, the chart stays as it was

    def __repr__(self):  # what a saved notebook keeps of the widget
        return f"WindowCost({self.model.value!r}): run this cell in JupyterLab to use it"

    # --- the controls

    def _build(self, model):
        labelled, gpu = parts.LABELLED, runtime.HAS_GPU
        windows = window_cost.WINDOWS if gpu else (1, 2, 4, 8, 16, 32, 64, 128, 256)
        self.model = w.Dropdown(description="Model", options=list(PRESETS), value=model, **labelled)
        self.windows = w.Text(description="Windows", value=" ".join(map(str, windows)), continuous_update=False,
                              **labelled)
        self.curves = {name: w.Checkbox(description=name, value=True, indent=False) for name in ("paper", "graph")}
        if not gpu:
            self.curves["graph"].value, self.curves["graph"].disabled = False, True
            self.curves["graph"].description = "graph (needs a CUDA GPU)"
        self.ops = {name: w.Checkbox(description=f"{name} ops", value=name == "default", indent=False)
                    for name in window_cost.ops_on(runtime.device())}
        self.recording = w.Dropdown(description="Recorded on", options=[*self._recordings, "none"], **labelled)
        self.overlay = w.Checkbox(description="recorded beside live", value=gpu, indent=False)
        self.published = w.Checkbox(description="LLM-42's published points", indent=False)
        self.chart = w.Image(format="png", layout=w.Layout(width="100%", max_width="960px"))
        self.table, self.downloads = w.HTML(), w.HTML()

    def _laid_out(self):
        boxes = (*self.curves.values(), *self.ops.values(), self.overlay, self.published)
        parts.widths({self.model: "200px", self.recording: "290px"} | dict.fromkeys((self.windows, *boxes), "auto"))
        self.windows.layout.flex = "1 1 auto"
        measure = parts.panel(
            parts.line(self.model, self.windows, self.notes["windows"]),
            parts.line(w.Label("Curves"), *self.curves.values(), *self.ops.values(), self.notes["curves"]),
            self._run_line)
        compare = parts.panel(parts.line(self.recording, self.overlay, self.published))
        return [measure, compare, self.errors, self.chart, self.downloads, self.table]

    def _connect(self):
        self.recording.observe(lambda change: self._in_own_thread(self._change_recording), "value")
        self._redraw_on(self.overlay, self.published)
        self._check_on(self.model, self.windows, *self.curves.values(), *self.ops.values())

    def _change_recording(self):
        self._load()
        self.overlay.value = True  # a recording just chosen is to be seen
        self._draw()

    # --- recorded data

    def _find_recordings(self) -> dict[str, tuple[str, str, records.Table]]:
        """What is recorded: 'machine · model' -> machine's name, its device, the table of that model."""
        found = {}
        for name in records.machines(VERIFY_COST.file, self._out):
            folder = self._out / name
            try:
                device = str(records.read_machine(folder).get("device", name))
                tables = {model: window_cost.table_for(model, folder) for model in PRESETS}
            except (ValueError, AttributeError) as error:
                self._problems[name] = f"recorded data of {name}: {error}"
                continue
            found |= {f"{name} · {model}": (name, device, table) for model, table in tables.items()
                      if (folder / table.file).exists()}
        return found

    def _load(self):
        """Read the chosen recording; what is wrong with it is shown, not raised."""
        self._problems.pop("recording", None)
        self._recorded, self._device = NO_ROWS, ""
        if self.recording.value not in self._recordings:
            return
        name, self._device, table = self._recordings[self.recording.value]
        try:
            numbers = dict.fromkeys(("ms_p05", "ms_p50", "ms_p95", "ms_per_token_p50", "floor_ms"), float)
            self._recorded = table.read(self._out / name).astype({**numbers, "tokens": int})
        except (OSError, ValueError) as error:
            self._problems["recording"] = f"recorded data of {name}: {error}"

    # --- measuring

    def _fields(self):
        return {"windows": self._check_windows, "curves": lambda: self._chosen() and ""}

    def _check_windows(self) -> str:
        windows = parts.whole_numbers(self.windows.value, "windows")
        window_cost.checked(preset(self.model.value), runtime.device(), windows, None, (), self._runs, self._warmups)
        return parts.repeated(windows)

    def _chosen(self) -> dict[str, list[str]]:
        """The curves and the ops."""
        found = {}
        for name, boxes in (("curves", self.curves), ("ops", self.ops)):
            found[name] = [key for key, box in boxes.items() if box.value]
            if not found[name]:
                raise ValueError(f"choose at least one of {' and '.join(boxes)}")
        return found

    def asked(self) -> dict:
        """The arguments for window_cost that the controls ask for. Raises ValueError that says what is wrong."""
        wanted = {"windows": parts.whole_numbers(self.windows.value, "windows"), **self._chosen(),
                  "runs": self._runs, "warmups": self._warmups}
        window_cost.checked(preset(self.model.value), runtime.device(), wanted["windows"], wanted["curves"],
                            wanted["ops"], self._runs, self._warmups)
        return wanted

    def _size(self, wanted) -> tuple:
        """What the estimates take: the model, the windows, how many passes each has, the dtype and the device."""
        passes = len(wanted["curves"]) * len(wanted["ops"])
        return preset(self.model.value), wanted["windows"], passes, _dtype(), runtime.device()

    def _beside(self) -> int:
        """Bytes of the process before it measures anything, and of what it finds a machine's ceilings with."""
        device = runtime.device()
        return process_bytes(device) + (0 if self._ceilings else bench.ceilings_bytes(device))

    def _forecast(self):
        size = self._size(self.asked())
        needed = estimate.refuse_too_large(*size, beside=self._beside())
        took = estimate.seconds(*size, self._ceilings, self._runs + self._warmups)
        return f"a run takes about {parts.seconds(took)} and {bench.gigabytes(needed)}"

    def _prepare(self):
        wanted = self.asked()
        if runtime.HAS_GPU:
            torch.cuda.empty_cache()  # what this process keeps another one cannot have
        estimate.refuse_too_large(*self._size(wanted), beside=self._beside())
        self._asked, self._measured, self._clock = sorted(set(wanted["windows"])), self.model.value, None
        self._done = 0
        steps = len(self._asked) * (self._runs + self._warmups)
        return steps, "measuring", (self._measured, wanted, self._ceilings)

    def _on_ceilings(self, ceilings):
        self._ceilings, config = ceilings, preset(self._measured)
        floors = [window_cost.floor_ms(config, window, _dtype(), ceilings) for window in self._asked]
        self._clock = _Clock([floor for floor in floors for _ in range(self._runs + self._warmups)])

    def _on_round(self, done):
        self.progress.value = self._done = done
        self._say_progress()

    def _progress(self):
        if not self._done:
            return ""
        at = min(self._done // (self._runs + self._warmups), len(self._asked) - 1)
        return f"{at} of {len(self._asked)} windows, {self._clock.text(self._done)}"

    def _on_rows(self, rows):
        for row in rows:
            self._rows[row["curve"], row["ops"], row["tokens"]] = row
        self.progress.value = self._finished() * (self._runs + self._warmups)

    def _finished(self) -> int:
        return len({tokens for _, _, tokens in self._rows})

    def _so_far(self):
        return self._finished(), len(self._asked), "windows"

    # --- drawing

    def _draw(self):
        """Replace the chart, the table and, when nothing is being measured, the downloads."""
        rows, points = self.shown, self._published_points()
        self._show_errors()
        beside = self.recorded.assign(machine=self.recording.value) if self._live and self.overlay.value else None
        model = self._measured if self._live else self.recording.value.partition(" · ")[2]
        where = records.device_name() if self._live else self._device and f"Recorded on {self._device}"
        png = parts.png(window_chart.window_chart(
            rows, windows=self._asked if self._live else (), points=points, recorded=beside,
            title=window_chart.claim(rows), caption=window_chart.caption(model, where) if len(rows) else ""))
        self.chart.value, self.table.value = png, table_html(rows)
        if not self.running:
            slug = records.slug() if self._live else self.recording.value.partition(" · ")[0]
            links = parts.downloads_html(rows, png, f"window-cost-{model}-{slug}") if len(rows) else ""
            self.downloads.value = links + (self._kept_html() if self._live else "")

    def _published_points(self):
        self._problems.pop("published", None)
        try:
            return window_chart.published(self._out) if self.published.value else None
        except (OSError, ValueError) as error:
            self._problems["published"] = f"published points: {error}"


class _Clock:
    """How long the rest takes: what the rounds so far took, scaled by what each round should cost."""

    def __init__(self, costs):
        self._costs, self._first = costs, None

    def text(self, done: int) -> str:
        now = time.monotonic()
        if self._first is None:  # the rounds before this one also hold the making of the model
            self._first = done, now
        earlier, then = self._first
        known = sum(self._costs[earlier:done])
        if not known:
            return "measuring"
        return f"about {parts.seconds((now - then) / known * sum(self._costs[done:]))} left"


def table_html(rows: pd.DataFrame) -> str:
    """A small table: a line for each window, and for each curve the median time of a pass and of a token."""
    if not len(rows):
        return ""
    lines = window_chart.in_order(rows)
    cells = {(r.curve, r.ops, r.tokens): f"{r.ms_p50:,.4g}</td><td style='{parts.CELL}'>{r.ms_per_token_p50:,.3g}"
             for r in rows.itertuples()}
    head = "".join(f'<th style="{parts.CELL};border-bottom:3px solid {window_chart.colour(curve, ops)}">{curve}, {ops}'
                   f'</th><th style="{parts.CELL}">a token</th>' for curve, ops in lines)
    empty = f"-</td><td style='{parts.CELL}'>-"
    body = "".join(f'<tr><td style="{parts.CELL}">{t:,}</td>' + "".join(
        f'<td style="{parts.CELL}">{cells.get((*line, t), empty)}</td>' for line in lines) + "</tr>"
        for t in sorted(rows.tokens.unique()))
    return (f'<table style="{style.TABLE}">'
            f'<tr style="border-bottom:1px solid #bbb"><th style="{parts.CELL}">tokens</th>{head}</tr>{body}</table>'
            '<div style="font-size:11px;color:var(--jp-ui-font-color2,#555);margin-top:2px">Medians in ms: a pass, and '
            'a pass divided by its tokens.</div>')


def _dtype() -> torch.dtype:
    return torch.bfloat16 if runtime.HAS_GPU else torch.float32
