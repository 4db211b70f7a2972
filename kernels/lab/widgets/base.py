"""The widgets' base classes: Measuring has a worker thread under Run and Stop, Study draws what its controls say."""
from __future__ import annotations

import asyncio
import html
import queue
import threading
import time

import ipywidgets as w
import pandas as pd

from . import parts

SETTLE_SECONDS = 0.15


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
    """A widget with one worker thread, which only measures and reports; the widget's own thread shows the reports.

    A subclass gives

    COLUMNS           of its table in data/
    _prepare()        reads the controls: (number of steps, first status, the arguments of `_measure`). ValueError says
                      which control is wrong
    _measure(*args)   the worker: reports "rows", or any other <what> that has a method `_on_<what>(value)`
    _on_rows(rows)    keeps rows in `_rows` and advances the progress
    _so_far()         (finished, asked for, their name in the plural)
    _draw()           shows what there is; called after the reports "rows" and "ended", which is the worker's last
    """

    COLUMNS = ()

    def __init__(self):
        super().__init__()
        self._queue, self._stop, self._taken = queue.SimpleQueue(), threading.Event(), threading.Event()
        self._worker, self._rows, self._problems = None, {}, {}
        self.run_button = w.Button(description="Run", icon="play", button_style="primary")
        self.stop_button = w.Button(description="Stop", icon="stop", disabled=True)
        self.progress, self.status, self.errors = w.IntProgress(min=0, max=1, value=0), w.HTML(), w.HTML()
        parts.widths({self.run_button: "96px", self.stop_button: "96px", self.progress: "220px"})
        self._run_line = parts.line(self.run_button, self.stop_button, self.progress, self.status)
        self.run_button.on_click(lambda _: self._run_soon())
        self.stop_button.on_click(lambda _: self.stop())

    @property
    def rows(self) -> pd.DataFrame:
        """The rows of the last live run, with data/'s columns."""
        return pd.DataFrame(list(self._rows.values()), columns=list(self.COLUMNS))

    @property
    def running(self) -> bool:
        return self._worker is not None

    # --- what the buttons do

    def run(self):
        """Start measuring what the controls say; returns at once."""
        if self.running:
            return
        self._problems.pop("run", None)
        try:
            steps, status, arguments = self._prepare()
        except ValueError as error:
            self._problems["run"] = str(error)
            self._show_errors()
            return
        self._rows, self._began = {}, time.monotonic()
        self.run_button.disabled, self.stop_button.disabled = True, False
        self.progress.max, self.progress.value, self.progress.bar_style = steps, 0, "info"
        self._say(status)
        self._show_errors()
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
        """End the run after the current round; finished points are kept."""
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
        try:
            self._measure(*arguments)
        except Exception as error:  # noqa: BLE001 - shown in the widget, where the reader looks
            self._report("failed", error)
        self._report("ended")

    def _report(self, what, value=None):
        """Queue a report and wait until it is shown, so that drawing does not disturb a timing."""
        self._taken.clear()
        self._queue.put((what, value))
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._take)
        self._taken.wait(0 if what == "ended" else 1.0)

    # --- the widget's own side

    def _take(self):
        """Show the worker's reports."""
        reports = []
        while not self._queue.empty():
            reports.append(self._queue.get())
        for what, value in reports:
            getattr(self, f"_on_{what}")(value)
        if any(what in ("rows", "ended") for what, _ in reports):
            self._draw()
        if reports:
            self._taken.set()

    def _on_failed(self, error):
        self._problems["run"] = parts.in_a_line(error)

    def _on_ended(self, _):
        self._worker.join()
        self._worker = None
        self.run_button.disabled, self.stop_button.disabled = False, True
        finished, asked, what = self._so_far()
        self.progress.bar_style = "success" if finished == asked else "warning"
        how = "done" if finished == asked else f"{self._cut_short()} after {finished} of {asked} {what}"
        self._say(f"{how}, {parts.seconds(time.monotonic() - self._began)}")

    def _cut_short(self) -> str:
        return "stopped" if self._stop.is_set() else "broke off"

    def _say(self, text):
        self.status.value = f'<span style="color:var(--jp-ui-font-color2,#555)">{html.escape(text)}</span>'

    def _show_errors(self):
        self.errors.value = "".join(map(parts.message, self._messages()))

    def _messages(self) -> list[str]:
        return list(self._problems.values())
