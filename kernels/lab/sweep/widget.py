"""TokenSweep: a sweep measured and drawn in a notebook; a shell over sweep.sweep and chart.sweep_chart.

A process measures, a worker thread passes its rows on, and the thread that made the widget draws them.
"""
from __future__ import annotations

import html
import time
from pathlib import Path

import ipywidgets as w
import pandas as pd
import torch

from ... import OPS, runtime
from ...op import DTYPES, Op, Shape
from .. import bench, records, style
from ..widgets import jobs, parts
from ..widgets.base import Measuring
from ..widgets.process import process_bytes
from . import chart, estimate
from . import context as contexts
from . import measure as sweep

LONGEST_SHAPE = 80  # characters
NO_ROWS = pd.DataFrame(columns=list(records.TOKEN_SWEEP.columns))
FOR_A_CPU = {"rms_norm": "D=1024,residual", "matmul": "N=32,K=64",  # quick in Triton's interpreter
             "rotary": "H=8,D=64,context=64", "swiglu": "F=256",
             "attention_prefill": "H=2,KV=1,D=16", "attention_chunk": "H=2,KV=1,D=16,context=32",
             "attention_decode": "H=2,KV=1,D=16,context=32"}


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
        self._asked, self._failures = None, {}
        self._recorded_rows, self._experiments, self._loading = NO_ROWS, {}, False
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
        all_rows = self._recorded_rows
        if self.recording.value not in self._experiments:
            return all_rows.iloc[:0]
        dtype, shape, clock = self._experiments[self.recording.value]
        return all_rows[(all_rows.op == self._op.name) & (all_rows.dtype == dtype)
                        & (all_rows["shape"] == shape) & (all_rows.clock == clock)]

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
        gpu, labelled, shape = runtime.HAS_GPU, parts.LABELLED, _first_shape(self._op)
        clocks = bench.clocks(self._device)
        counts = (1, 8, 32, 128, 256, 512, 1024, 2048, 4096) if gpu else (1, 2, 4, 8, 16, 32)
        self.op = w.Dropdown(description="Op", options=list(OPS), value=self._op.name, **labelled)
        self.dtype = w.Dropdown(description="Dtype", options=list(DTYPES), **labelled,
                                value=_first_dtype(self._op))
        self.shape = w.Combobox(description="Shape", value=shape, options=sorted({shape, *self._op.shapes}),
                                continuous_update=False, placeholder=self._op.shapes[0], **labelled)
        self.context = w.SelectionSlider(description="Context", options=[0], continuous_update=False, **labelled)
        self.clock = w.Dropdown(description="Clock", options=clocks, **labelled)
        self.tokens = w.Text(description="Token counts", value=" ".join(map(str, counts)),
                             continuous_update=False, **labelled)
        self.implementations = {}
        self.contenders = w.HBox(layout=w.Layout(flex_flow="row wrap", grid_gap="0 18px"))
        names = [("none", None)] + [(n, n) for n in records.machines(out=self._out)]
        known = [n for _, n in names]
        chosen = machine or next(filter(None, known), None)
        if chosen not in known:
            there_are = ", ".join(filter(None, known)) or "none"
            self._problems["machine"] = f"no recorded machine {chosen!r}; there are: {there_are}"
            chosen = None
        self.machine = w.Dropdown(description="Recorded on", options=names, value=chosen, **labelled)
        self.recording = w.Dropdown(description="Experiment", options=["none"], **labelled)
        self.overlay = w.Checkbox(description="recorded beside live", value=gpu, indent=False)
        self.published = w.Checkbox(description="LLM-42's published points", indent=False)
        self.log_axes = w.Checkbox(description="log axes", value=True, indent=False)
        self.chart = w.Image(format="png", layout=w.Layout(width="100%", max_width="900px"))
        self.table, self.downloads = w.HTML(), w.HTML()
        self._offer_contenders()

    def _offer_contenders(self):
        split_shows_bits_moving = not runtime.HAS_GPU
        chosen = {"cuda", "python", "triton"} | ({"split"} if split_shows_bits_moving else set())
        self.implementations = {
            name: w.Checkbox(description=name, value=name in chosen, indent=False, layout=w.Layout(width="auto"))
            for name in self._op.implementations}
        self.contenders.children = tuple(self.implementations.values())
        self._check_on(*self.implementations.values())
        self.published.disabled = self._op.name != "rms_norm"

    def _offer_contexts(self):
        """The slider's places: the contexts of the op, of what is recorded, and of the shape as it is now."""
        found = contexts.offered(self.shape.value, [*self._op.shapes, *(s for _, s, _ in self._experiments.values())])
        self._loading = True
        self.context.options = found or [0]
        self.context.value = contexts.of(self.shape.value) or self.context.options[0]
        self.context.layout.display = None if found else "none"
        self._loading = False

    def _change_context(self):
        """Measure with this context, and show what is recorded of it."""
        if self._loading or self.context.value == contexts.of(self.shape.value):
            return
        self.shape.value = contexts.replaced(self.shape.value, self.context.value)
        self.recording.value = (contexts.recorded(self._experiments, self.recording.value, self.context.value)
                                or self.recording.value)

    def _laid_out(self):
        parts.widths({self.op: "170px", self.dtype: "170px", self.shape: "260px", self.clock: "150px",
                      self.context: "420px",
                      self.tokens: "auto", self.machine: "200px", self.recording: "370px", self.overlay: "auto",
                      self.published: "auto", self.log_axes: "auto"})
        self.tokens.layout.flex = "1 1 auto"
        notes = self.notes
        measure = parts.panel(parts.line(self.op, self.dtype, self.shape, notes["shape"], self.clock),
                              parts.line(self.context), parts.line(self.tokens, notes["tokens"]),
                              parts.line(w.Label("Contenders"), self.contenders, notes["contenders"]), self._run_line)
        compare = parts.panel(parts.line(self.machine, self.recording),
                              parts.line(w.Label("Show"), self.overlay, self.published, self.log_axes))
        return [measure, compare, self.errors, self.chart, self.downloads, self.table]

    def _connect(self):
        self.op.observe(lambda change: self._in_own_thread(self._change_op), "value")
        self.machine.observe(lambda change: self._in_own_thread(self._change_machine), "value")
        self.recording.observe(lambda change: self._in_own_thread(self._change_recording), "value")
        self.context.observe(lambda change: self._in_own_thread(self._change_context), "value")
        self.shape.observe(lambda change: self._in_own_thread(self._offer_contexts), "value")
        self._redraw_on(self.overlay, self.published, self.log_axes)
        self._check_on(self.dtype, self.shape, self.clock, self.tokens)

    def _change_op(self):
        self.stop()
        self._op, self._rows, self._failures = OPS[self.op.value], {}, {}
        shape = _first_shape(self._op)
        self.shape.options, self.shape.value = sorted({shape, *self._op.shapes}), shape
        if not runtime.HAS_GPU:
            self.dtype.value = _first_dtype(self._op)
        self.published.value = False
        self._offer_contenders()
        self._load()
        self._offer_contexts()
        self._draw()
        self._foresee()

    def _change_machine(self):
        self._load()
        self._offer_contexts()
        self._change_recording()

    def _change_recording(self):
        if not self._loading:
            self.overlay.value = True  # a recording just chosen is to be seen
            self._draw()

    # --- recorded data

    def _load(self):
        """Read the chosen machine's rows; what is wrong with them is shown, not raised."""
        rows, name, self._device_name = NO_ROWS.assign(machine=[]), self.machine.value, ""
        if name is not None:
            for solved in ("machine", "recorded"):
                self._problems.pop(solved, None)
            try:
                self._device_name = f"Recorded on {_device_in(self._out / name)}"
                rows = _undamaged(records.load(machine=name, out=self._out))
            except (OSError, ValueError) as error:
                self._problems["recorded"] = f"recorded data of {name}: {error}"
        self._recorded_rows = rows
        mine = rows[rows.op == self._op.name]
        found = list(mine[["dtype", "shape", "clock"]].drop_duplicates().itertuples(index=False, name=None))
        found.sort(key=self._preference)
        self._experiments = {f"{shape} · {dtype} · {clock}": (dtype, shape, clock) for dtype, shape, clock in found}
        kept, self._loading = self.recording.value, True
        self.recording.options = list(self._experiments) or ["none"]
        self.recording.value = kept if kept in self._experiments else self.recording.options[0]
        self._loading = False

    def _preference(self, experiment):
        """The experiment set in the controls first, then the op's own first shape, bfloat16, cold."""
        dtype, shape, clock = experiment
        shapes, kinds, clocks = list(self._op.shapes), list(DTYPES), list(bench.CLOCKS)
        here = experiment == (self.dtype.value, self.shape.value, self.clock.value)
        return (not here, *(seq.index(v) if v in seq else 99 for seq, v in
                            ((shapes, shape), (kinds, dtype), (clocks, clock))))

    # --- measuring

    def _fields(self):
        return {"shape": lambda: _shape_for(self._op, self.shape.value) and "",
                "tokens": lambda: parts.repeated(parts.whole_numbers(self.tokens.value)),
                "contenders": lambda: self._chosen() and ""}

    def _chosen(self) -> list[str]:
        names = [name for name, box in self.implementations.items() if box.value]
        if not names:
            raise ValueError("choose at least one contender")
        return names

    def _options(self) -> dict:
        """What the controls ask for beside the op, in the words of sweep.Sweep."""
        return {"tokens": parts.whole_numbers(self.tokens.value), "implementations": self._chosen(),
                "dtypes": [self.dtype.value], "shapes": [_shape_for(self._op, self.shape.value)],
                "clocks": [self.clock.value], "passes": self._passes, "repeats": self._repeats}

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
        self._asked, self._failures = wanted, {}
        self._clock = _Clock(wanted.points() * wanted.passes, estimate.seconds(wanted))
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
        where, why = failure
        name, _, point = where.partition(" at ")
        points = self._failures.setdefault((name, why), [])
        if point not in points:
            points.append(point)

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
        png = parts.png(self._figure(rows, self._published_points()))
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
            where = self._device_name if len(recorded) else ""
            return chart.sweep_chart(rows, clock=clock, machine=where, labels=labels, **look)
        overlays = [recorded] if self.overlay.value and len(recorded) else []
        labels = {} if runtime.HAS_GPU else style.ON_A_CPU
        here = records.device_name() + (", Triton's interpreter" if runtime.where() == "INTERPRETER" else "")
        return chart.sweep_chart(rows, clock=self._asked.clocks[0], machine=here, overlays=overlays, labels=labels,
                                 tokens=self._asked.tokens, **look)

    def _published_points(self):
        self._problems.pop("published", None)
        if not self.published.value:
            return None
        path = self._out / "llm42" / "rms_norm.csv"
        try:
            points = pd.read_csv(path, comment="#")
            return points[["tokens", "implementation", "read_off_ms", "logged_ms"]].astype({"tokens": int})
        except (OSError, ValueError, KeyError) as error:
            self._problems["published"] = f"{path}: {error}"
            return None

    def _messages(self):
        messages = super()._messages()
        for (name, why), points in self._failures.items():
            more = f" and {len(points) - 1} more points" if len(points) > 1 else ""
            at = f" at {points[0]}{more}" if points[0] else ""
            messages.append(f"{name}{at}: {why}")
        return messages


class _Clock:
    """How far a sweep has come, and how long the rest takes: a point costs what it cost in the pass before, any other
    what was estimated, as far as estimates have been right.
    """

    def __init__(self, todo: list[tuple], costs: list[float]):
        self.todo, self._estimates = todo, costs
        self.done, self._costs, self._spent = 0, {}, 0.0
        self.start()

    def start(self):
        """What comes is measured; before, a process was started."""
        self._last = time.monotonic()

    def tick(self):
        now = time.monotonic()
        self._costs[self.todo[self.done]] = now - self._last
        self._spent += now - self._last
        self._last, self.done = now, self.done + 1

    def text(self) -> str:
        slower = self._spent / sum(self._estimates[:self.done]) if self.done else 1.0
        left = sum(self._costs.get(point, slower * cost)
                   for point, cost in zip(self.todo[self.done:], self._estimates[self.done:], strict=True))
        return f"{self.done} of {len(self.todo)} points, about {parts.seconds(left)} left"


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


def _first_shape(op: Op) -> str:
    """The shape the controls open on."""
    return op.shapes[0] if runtime.HAS_GPU else FOR_A_CPU.get(op.name, op.shapes[0])


def _first_dtype(op: Op) -> str:
    """The dtype the controls open on. Triton's interpreter is wrong for bfloat16, which attention works around."""
    return "bfloat16" if runtime.HAS_GPU or op.name.startswith("attention") else "float32"


def _shape_for(op: Op, text: str) -> str:
    """The shape as data/ writes it. ValueError unless it has the op's sizes, once and at least 1, and no others."""
    if len(text) > LONGEST_SHAPE:
        raise ValueError(f"{op.name} needs a shape like {op.shapes[0]!r}, got {len(text)} characters")
    names = [part.partition("=")[0].strip() for part in text.split(",")]
    if twice := next((name for name in names if names.count(name) > 1), ""):
        raise ValueError(f"a shape has each size once, got {twice!r} more than once in {text!r}")
    shape, own = Shape.parse(text.strip()), [Shape.parse(s) for s in op.shapes]
    sizes = {name for name, value in own[0].items() if value is not True}
    known = {name for s in own for name in s}
    good = {name for name, value in shape.items() if (value is True) != (name in sizes) and value > 0}
    if not sizes <= good or good != set(shape) or not good <= known:
        raise ValueError(f"{op.name} needs a shape like {' or '.join(map(repr, op.shapes[:2]))}, got {text!r}")
    return str(shape)


def _undamaged(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows. ValueError that names the column in which there is something a chart cannot show."""
    for column in ("tokens", "us_p20", "us_p50", "us_p80", "gbytes_per_s"):
        if not (pd.to_numeric(rows[column], errors="coerce") > 0).all():
            raise ValueError(f"column {column} holds something other than positive numbers")
    for column in ("op", "implementation", "dtype", "shape", "clock"):
        if not rows[column].map(lambda value: isinstance(value, str)).all():
            raise ValueError(f"column {column} has empty or numeric cells")
    if not rows.same_bits.dropna().isin([True, False]).all():
        raise ValueError("column same_bits holds something other than True and False")
    return rows


def _device_in(folder: Path) -> str:
    machine = records.read_machine(folder)
    if not isinstance(machine, dict) or "device" not in machine:
        raise ValueError(f"{folder / 'machine.json'} names no device")
    return machine["device"]
