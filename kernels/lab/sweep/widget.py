"""TokenSweep: a sweep measured and drawn in a notebook; a shell over sweep.sweep and chart.sweep_chart.

A process measures, a worker thread passes its rows on, and the thread that made the widget draws them.
"""
from __future__ import annotations

from pathlib import Path

import ipywidgets as w
import pandas as pd
import torch

from ... import OPS, runtime
from ...op import Op
from .. import bench, records, style
from ..widgets import jobs, parts
from ..widgets.base import Measuring
from ..widgets.process import process_bytes
from . import chart, estimate
from . import context as contexts
from . import measure as sweep
from .controls import Controls
from .progress import Clock, Failures
from .recorded import Recordings
from .shapes import shape_for
from .table import table_html


class TokenSweep(Measuring):
    """Time and bits of an op's contenders over token counts: controls, a live chart, verdicts, a table, downloads.

    op       an Op or its name; machine: the recorded machine to open on (default: the first there is)
    out      the data folder that holds recorded machines
    passes, repeats   as in sweep.Sweep (default: few, so that a sweep stays interactive)

    It opens on recorded rows. `rows` are those of the last live sweep, and `file` holds them too; `shown` are those in
    the chart. `run()`, `stop()` and `join()` do from code what the buttons do. ValueError for an unknown op, or for
    passes or repeats below 1.
    """

    TABLE, JOB = records.TOKEN_SWEEP, jobs.token_sweep

    def __init__(self, op: Op | str = "rms_norm", machine: str | None = None, *, out=records.DATA,
                 passes: int | None = None, repeats: int | None = None):
        super().__init__()
        name = op if isinstance(op, str) else op.name
        if name not in OPS:
            raise ValueError(f"op must be one of {', '.join(OPS)}, got {name!r}")
        self._op, self._out = OPS[name], Path(out)
        self._passes = (3 if runtime.HAS_GPU else 1) if passes is None else passes
        self._repeats = 5 if repeats is None else repeats
        sweep.Sweep(self._op, passes=self._passes, repeats=self._repeats, device=runtime.device())
        self._device = runtime.device()
        self._asked, self._failures = None, Failures()
        self._build(machine)
        self._load()
        self._offer_contexts()
        self._draw()
        w.VBox.__init__(self, self._laid_out(), layout=w.Layout(max_width="920px"))
        self._connect()
        self._foresee()

    # --- what it holds

    @property
    def recorded(self) -> pd.DataFrame:
        """The chosen recorded experiment, with data/'s columns and `machine`; empty if there is none."""
        return self._recordings.rows

    @property
    def shown(self) -> pd.DataFrame:
        """The rows the chart, the table and the downloads show: the live ones, else the recorded ones."""
        return self.rows if self._live else self.recorded[list(self.TABLE.columns)]

    @property
    def _live(self) -> bool:
        return bool(self._rows)  # until the first point is there, the chart stays as it was

    def __repr__(self):  # what a saved notebook keeps of the widget
        return f"TokenSweep({self._op.name!r}): run this cell in JupyterLab to use it"

    # --- the controls

    def _build(self, machine):
        asked = self._controls = Controls(self._op, self._device)
        self.op, self.dtype, self.shape, self.context = asked.op, asked.dtype, asked.shape, asked.context
        self.clock, self.tokens, self.contenders = asked.clock, asked.tokens, asked.contenders
        known = self._recordings = Recordings(machine, self._out, self._problems)
        self.machine, self.recording, self.overlay = known.machine, known.recording, known.overlay
        self.published, self.log_axes = known.published, known.log_axes
        self.chart = w.Image(format="png", layout=w.Layout(width="100%", max_width="900px"))
        self.table, self.downloads = w.HTML(), w.HTML()

    @property
    def implementations(self) -> dict[str, w.Checkbox]:
        """The boxes of the op's contenders."""
        return self.contenders.boxes

    def _offer_contexts(self):
        """The contexts of the op, of what is recorded, and of the shape as it is now."""
        recorded = (shape for _, shape, _ in self._recordings.experiments.values())
        self.context.offer(self.shape.value, [*self._op.shapes, *recorded])

    def _change_context(self):
        """Measure with this context, and show what is recorded of it."""
        if self.context.offering or self.context.value == contexts.of(self.shape.value):
            return
        self.shape.value = contexts.replaced(self.shape.value, self.context.value)
        experiments, chosen = self._recordings.experiments, self.recording.value
        self.recording.value = contexts.recorded(experiments, chosen, self.context.value) or chosen

    def _laid_out(self):
        return [self._controls.panel(self.notes, self._run_line), self._recordings.panel(), self.errors, self.chart,
                self.downloads, self.table]

    def _connect(self):
        self.op.observe(lambda change: self._in_own_thread(self._change_op), "value")
        self.machine.observe(lambda change: self._in_own_thread(self._change_machine), "value")
        self.recording.observe(lambda change: self._in_own_thread(self._change_recording), "value")
        self.context.observe(lambda change: self._in_own_thread(self._change_context), "value")
        self.shape.observe(lambda change: self._in_own_thread(self._offer_contexts), "value")
        self._redraw_on(self.overlay, self.published, self.log_axes)
        self._check_on(self.dtype, self.shape, self.clock, self.tokens, *self.contenders.children)

    def _change_op(self):
        self.stop()
        self._op, self._rows, self._failures = OPS[self.op.value], {}, Failures()
        self._controls.offer(self._op)
        self._check_on(*self.contenders.children)
        self._load()
        self.published.value = False
        self._offer_contexts()
        self._draw()
        self._foresee()

    def _change_machine(self):
        self._load()
        self._offer_contexts()
        self._change_recording()

    def _change_recording(self):
        if not self._recordings.loading:
            self.overlay.value = True  # a recording just chosen is to be seen
            self._draw()

    def _load(self):
        """Read what is recorded of the op; of its experiments, the one in the controls comes first."""
        self._recordings.load(self._op, self._controls.experiment())

    # --- measuring

    def _fields(self):
        return {"shape": lambda: shape_for(self._op, self.shape.value) and "",
                "tokens": lambda: parts.repeated(parts.whole_numbers(self.tokens.value)),
                "contenders": lambda: self.contenders.chosen() and ""}

    def _options(self) -> dict:
        """What is asked for beside the op, in the words of sweep.Sweep."""
        return {**self._controls.options(self._op), "passes": self._passes, "repeats": self._repeats}

    def asked(self) -> sweep.Sweep:
        """The sweep that the controls ask for. Raises ValueError that says which control is wrong."""
        return sweep.Sweep(self._op, device=self._device, **self._options())

    def _forecast(self):
        wanted = self.asked()
        process = process_bytes(self._device)
        estimate.refuse_too_large(wanted, beside=process)
        needed = max(estimate.bytes_needed(wanted, point) for point in wanted.points()) + process
        return f"a run takes about {parts.seconds(sum(estimate.seconds(wanted)))} and {bench.gigabytes(needed)}"

    def _prepare(self):
        wanted = self.asked()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # what this process keeps another one cannot have
        estimate.refuse_too_large(wanted, beside=process_bytes(self._device))
        self._asked, self._failures = wanted, Failures()
        self._clock = Clock(wanted.points() * wanted.passes, estimate.seconds(wanted))
        return len(self._clock.todo), self._clock.text(), (self._op.name, self._options())

    def _on_rows(self, rows):
        for row in rows:
            if row["op"] == self._op.name:  # the op may have been changed since
                self._rows[row["implementation"], row["tokens"]] = row
        self._clock.tick()
        self.progress.value = self._clock.done
        self._doing = ""
        self._say_progress()

    def _on_started(self, _):
        self._clock.start()
        super()._on_started(_)

    def _progress(self):
        return self._clock.text()

    def _on_failed_point(self, failure):
        self._failures.add(*failure)

    def _on_ended(self, _):
        super()._on_ended(_)
        if self._failures:
            self.progress.bar_style = "warning"

    def _so_far(self):
        return self._clock.done, len(self._clock.todo), "points"

    # --- drawing

    def _draw(self):
        """Replace the chart, the table and, when nothing is being measured, the downloads."""
        rows = self.shown
        png = parts.png(self._figure(rows, self._recordings.published_points()))
        self._show_errors()
        self.chart.value = png
        self.table.value = table_html(rows)
        if not self.running:
            where = records.slug() if self._live else self.machine.value
            links = parts.downloads_html(rows, png, f"{self._op.name}-{where}") if len(rows) else ""
            self.downloads.value = links + (self._kept_html() if self._live else "")

    def _figure(self, rows, published):
        recorded, look = self.recorded, {"log": self.log_axes.value, "published": published}
        look["title"] = chart.claim(rows, self._asked.tokens if self._live else ())
        if not self._live:
            clock = recorded.clock.iloc[0] if len(recorded) else self.clock.value
            labels = style.ON_A_CPU if str(self.machine.value).startswith("cpu") else {}
            where = self._recordings.device_name if len(recorded) else ""
            return chart.sweep_chart(rows, clock=clock, machine=where, labels=labels, **look)
        overlays = [recorded] if self.overlay.value and len(recorded) else []
        labels = {} if runtime.HAS_GPU else style.ON_A_CPU
        here = records.device_name() + (", Triton's interpreter" if runtime.where() == "INTERPRETER" else "")
        return chart.sweep_chart(rows, clock=self._asked.clocks[0], machine=here, overlays=overlays, labels=labels,
                                 tokens=self._asked.tokens, **look)

    def _messages(self):
        return [*super()._messages(), *self._failures.messages()]
