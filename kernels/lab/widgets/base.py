"""The widgets' base classes: Measuring measures in a process under Run and Stop, Study draws what its controls say."""
from __future__ import annotations

import asyncio
import html
import itertools
import os
import queue
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import ipywidgets as w
import pandas as pd

from .. import records
from . import parts, process

SETTLE_SECONDS = 0.15
SHOWN_SECONDS = 1.0  # how long a run waits for its rows to be shown: a busy kernel may draw much later


class SingleThreaded(w.VBox):
    """A widget that is drawn by the thread that made it, whichever thread a frontend's message arrives on.

    A subclass calls `SingleThreaded.__init__` first and `VBox.__init__` once it has its children: ipywidgets closes a
    widget whose constructor raised, too, and `close` needs what is set here.
    """

    def __init__(self):
        self._thread = threading.get_ident()
        try:
            self._loop = asyncio.get_running_loop()
        except RuntimeError:  # a script or a test: join() draws
            self._loop = None

    def _in_own_thread(self, action):
        if self._loop is None or threading.get_ident() == self._thread:
            action()
        else:
            self._loop.call_soon_threadsafe(action)

    def _redraw_on(self, *controls):
        for control in controls:
            control.observe(lambda change: self._in_own_thread(self._redraw), "value")

    def _redraw(self):
        self._draw()


class Study(SingleThreaded):
    """Controls, the picture that a plain function draws from them, and the picture in words.

    A subclass gives `_study()`: the figure and its words, or a ValueError to show while the last picture stays.
    """

    def _show(self, controls: w.Widget, width: str, *redrawn_by: w.Widget):
        self._waiting = None
        self.errors, self.words = w.HTML(), w.HTML()
        self.chart = w.Image(format="png", layout=w.Layout(width="100%", max_width=width))
        self._draw()
        w.VBox.__init__(self, [controls, self.errors, self.chart, self.words], layout=w.Layout(max_width=width))
        self._redraw_on(*redrawn_by)

    def _redraw(self):
        """Draw once the controls are still, so that a key held down does not queue a picture for each step."""
        if self._loop is None:
            self._draw()
            return
        if self._waiting:
            self._waiting.cancel()
        self._waiting = self._loop.call_later(SETTLE_SECONDS, self._draw)

    def _draw(self):
        try:
            figure, words = self._study()
        except ValueError as error:
            self.errors.value = parts.message(error)
            return
        self.errors.value, self.chart.value = "", parts.png(figure)
        self.words.value = f"<details><summary>This figure in words</summary>{html.escape(words)}</details>"


class Measuring(SingleThreaded):
    """A widget that measures in a process of its own (process.py), so that Stop ends what runs, within two seconds.

    A worker thread follows the process: it writes rows to `file` as they come, and queues reports. The widget's own
    thread shows them. A subclass gives

    TABLE             the form of its rows
    JOB               what the process runs, a function in jobs.py
    _fields()         name of a control -> a function that checks it: ValueError says what is wrong with it, a text
                      returned what is odd about it
    _prepare()        (number of steps, first status, the arguments of JOB). ValueError or MemoryError says what
                      cannot be
    _on_rows(rows)    keeps rows in `_rows` and advances the progress; a method `_on_<what>(value)` for what else JOB
                      reports
    _progress()       how far the run is, in words
    _so_far()         (finished, asked for, their name in the plural)
    _forecast()       what a run would take, in words; may raise as `_prepare` does
    _draw()           shows what there is; called after the reports "rows" and "ended", which is the worker's last
    """

    TABLE: records.Table
    JOB: Callable

    def __init__(self):
        super().__init__()
        self._queue, self._stop = queue.SimpleQueue(), threading.Event()
        self._worker, self._rows, self.file, self._doing, self._killed = None, {}, None, "", False
        self._problems, self._remarks = {}, {}
        self.run_button = w.Button(description="Run", icon="play", button_style="primary")
        self.stop_button = w.Button(description="Stop", icon="stop", disabled=True)
        self.progress, self.status, self.errors = w.IntProgress(min=0, max=1, value=0), w.HTML(), w.HTML()
        self.notes = {name: w.HTML() for name in self._fields()}
        parts.widths({self.run_button: "96px", self.stop_button: "96px", self.progress: "220px"})
        self._run_line = parts.line(self.run_button, self.stop_button, self.progress, self.status)
        self.run_button.on_click(lambda _: self._run_soon())
        self.stop_button.on_click(lambda _: self.stop())

    @property
    def rows(self) -> pd.DataFrame:
        """The rows of the last live run, with data/'s columns; `file` holds them too."""
        return pd.DataFrame(list(self._rows.values()), columns=list(self.TABLE.columns))

    @property
    def running(self) -> bool:
        return self._worker is not None

    # --- what the controls say

    def _fields(self) -> dict[str, Callable]:
        return {}

    def _check_on(self, *controls: w.Widget):
        """Say beside the controls what is wrong with them, and what a run would take, whenever one changes."""
        for control in controls:
            control.observe(lambda change: self._in_own_thread(self._foresee), "value")

    def _foresee(self):
        """Check the controls; unless a run is on, say what one would take."""
        self._problems.pop("run", None)
        if self._fields_are_good() and not self.running:
            try:
                self._say(self._forecast())
            except (ValueError, MemoryError) as error:
                self._problems["run"] = str(error)
                self._say("")
        self._show_errors()

    def _fields_are_good(self) -> bool:
        good = True
        for name, check in self._fields().items():
            self._problems.pop(name, None)
            try:
                self._remarks[name] = check()
            except ValueError as error:
                self._problems[name], good = str(error), False
        return good

    def _forecast(self) -> str:
        return ""

    # --- what the buttons do

    def run(self):
        """Start measuring what the controls say; returns at once."""
        if self.running:
            return
        self._problems.pop("run", None)
        try:
            if not self._fields_are_good():
                return
            steps, status, arguments = self._prepare()
        except (ValueError, MemoryError) as error:
            self._problems["run"] = str(error)
            return
        finally:
            self._show_errors()
        self._rows, self._began, self.file, self._doing, self._killed = {}, time.monotonic(), None, "", False
        self.run_button.disabled, self.stop_button.disabled = True, False
        self.progress.max, self.progress.value, self.progress.bar_style = steps, 0, "info"
        self._first_status = status
        self._say("starting a process to measure in")
        self._stop.clear()
        self._worker = threading.Thread(target=self._work, args=arguments, name=type(self).__name__, daemon=True)
        self._worker.start()

    def _run_soon(self):
        """Run a moment later, when edits made before the click have arrived: each control's messages travel to the
        kernel on their own, by its main shell or a subshell, and a click may overtake them.
        """
        if self._loop is None:
            self.run()
        else:
            self._loop.call_soon_threadsafe(self._loop.call_later, SETTLE_SECONDS, self.run)

    def stop(self):
        """End the run within two seconds, whatever it is doing; finished points are kept."""
        self._stop.set()
        if self.running:
            self._in_own_thread(lambda: self.running and self._say("stopping"))

    def join(self, timeout: float = 600.0):
        """Wait for the run to end and draw it: for scripts and tests, which have no event loop to draw."""
        end = time.monotonic() + timeout
        while self.running and time.monotonic() < end:
            self._worker.join(0.02)
            self._take()

    def close(self):
        """Stop measuring, then close as every widget does."""
        self._stop.set()
        super().close()

    # --- the worker's side

    def _work(self, *arguments):
        """Follow the process, and keep it for the next run unless it was ended or has ended."""
        measuring, file = None, None
        try:
            measuring = process.borrow()
            for what, value in measuring.run(type(self).JOB, arguments, self._stop):
                if what == "rows":
                    file = file or _new_file(self.TABLE)
                    self._keep(value, file)
                self._report(what, value)
                if what == "rows":
                    measuring.say("shown")
        except Exception as error:  # noqa: BLE001 - shown in the widget, where the reader looks
            self._report("failed", str(error))
        if measuring is not None:
            process.give_back(measuring)
        self._report("ended")

    def _keep(self, rows, file: Path):
        """Write rows to disk before they are shown: a kernel that ends later takes nothing with it."""
        try:
            replace(self.TABLE, file=file.name).merge(file.parent, rows)
            self.file = file
        except OSError as error:
            self._report("unkept", str(error))

    def _report(self, what, value=None):
        """Queue a report. For rows, wait until they are shown, so that drawing does not disturb a timing."""
        shown = threading.Event()
        self._queue.put((what, value, shown))
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._take)
        end = time.monotonic() + SHOWN_SECONDS
        while what == "rows" and not self._stop.is_set() and time.monotonic() < end and not shown.wait(0.02):
            pass

    # --- the widget's own side

    def _take(self):
        """Show the worker's reports."""
        reports = []
        while not self._queue.empty():
            reports.append(self._queue.get())
        for what, value, _ in reports:
            getattr(self, f"_on_{what}")(value)
        if any(what in ("rows", "ended") for what, _, _ in reports):
            self._draw()
        for _, _, shown in reports:
            shown.set()

    def _on_started(self, _):
        if not self._stop.is_set():
            self._say(self._first_status)

    def _on_doing(self, what):
        self._doing = what
        self._say_progress()

    def _say_progress(self):
        if not self._stop.is_set():
            self._say(": ".join(filter(None, (self._progress(), self._doing))))

    def _progress(self) -> str:
        return ""

    def _on_failed(self, why):
        self._problems["run"] = why

    def _on_unkept(self, why):
        self._problems["file"] = why

    def _on_killed(self, _):
        self._killed = True

    def _on_ended(self, _):
        self._worker.join()
        self._worker = None
        self.run_button.disabled, self.stop_button.disabled = False, True
        finished, asked, what = self._so_far()
        whole = finished == asked
        self.progress.bar_style = "success" if whole else "warning"
        short = "stopped" if self._stop.is_set() else "broke off"
        how = "done" if whole else f"{short} after {finished} of {asked} {what}"
        broken = (self._killed or "run" in self._problems) and not whole
        where = f", while {self._doing}" if broken and self._doing else ""
        self._say(f"{how}, {parts.seconds(time.monotonic() - self._began)}{where}")

    def _say(self, text):
        self.status.value = f'<span style="color:var(--jp-ui-font-color2,#555)">{html.escape(text)}</span>'

    def _kept_html(self) -> str:
        """Where the rows of the last run lie, for a kernel that ends before they are downloaded."""
        return "" if self.file is None else (' · <span style="color:var(--jp-ui-font-color2,#555)">also in '
                                             f'{html.escape(str(self.file))}</span>')

    def _show_errors(self):
        """Each problem or remark beside its control, other problems under them all."""
        for name, note in self.notes.items():
            remark = parts.remark(self._remarks[name]) if self._remarks.get(name) else ""
            note.value = parts.message(self._problems[name]) if name in self._problems else remark
        self.errors.value = "".join(map(parts.message, self._messages()))

    def _messages(self) -> list[str]:
        return [text for name, text in self._problems.items() if name not in self.notes]


_runs = itertools.count(1)


@cache
def _folder() -> Path:
    """Where this kernel's live rows are written; the system empties it."""
    return Path(tempfile.mkdtemp(prefix="same-bits-"))


def _new_file(table: records.Table) -> Path:
    """A file of its own for a run's rows."""
    return _folder() / f"{Path(table.file).stem}-{os.getpid()}-{next(_runs)}.csv"
