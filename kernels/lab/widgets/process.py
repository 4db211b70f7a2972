"""A process to measure in: it can be ended inside an op that is running, and its memory and its crashes are its own.

serve.py is what runs there. A process lives on after a job, so that the next one starts at once.
"""
from __future__ import annotations

import atexit
import contextlib
import os
import pickle
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

GRACE = 0.5  # seconds that a job which is asked to stop has to end by itself
LAST_WORDS = 0.5  # seconds to wait for what an ended process had sent before


def process_bytes(device: torch.device) -> int:
    """About what a process with torch takes of this device's memory before it measures anything."""
    return {"cpu": 400_000_000, "cuda": 700_000_000}.get(device.type, 0)


class Process:
    """A process that runs one function at a time and sends back what the function reports."""

    def __init__(self):
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the process runs
        self._reports, self._up = queue.SimpleQueue(), False
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "kernels.lab.widgets.serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._log, env=os.environ | {"PYTHONPATH": paths},
            start_new_session=True)  # a kernel's interrupt is for its own cell
        threading.Thread(target=self._read, name="reports", daemon=True).start()

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def run(self, function: Callable, arguments: tuple, stop: threading.Event) -> Iterator[tuple[str, Any]]:
        """Yield the reports (what, value) of function(report, stop, *arguments) until it ends; "started" comes first.

        The function and what it takes and reports must be such as can be pickled. Once `stop` is set it has GRACE
        seconds to end by itself; then the process is ended, whatever it is doing, and reports "killed". Raises
        RuntimeError that says how the process ended, if it ended by itself.
        """
        gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        self.say("job", pickle.dumps((function, arguments, torch.get_num_threads(), gpu)))
        if self._up:
            yield "started", None
        asked = None
        while True:
            if stop.is_set():
                if asked is None:
                    asked = time.monotonic()
                    self.say("stop")
                elif time.monotonic() - asked > GRACE:
                    self.end()
                    yield from self._last_words()
                    yield "killed", None
                    return
            try:
                report = self._reports.get(timeout=0.05)
            except queue.Empty:
                continue
            if report is None:
                raise RuntimeError(self._how_it_ended())
            if report[0] == "ended":
                return
            self._up = True
            yield report

    def say(self, what: str, value=None):
        """Send a message; a process that has ended hears nothing."""
        with contextlib.suppress(OSError, ValueError):
            pickle.dump((what, value), self._process.stdin)
            self._process.stdin.flush()

    def end(self):
        """End the process now, whatever it is doing, and all that it has started."""
        if self.alive and hasattr(os, "killpg"):
            with contextlib.suppress(OSError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()

    def _read(self):
        try:
            while True:
                self._reports.put(pickle.load(self._process.stdout))
        except Exception:  # noqa: BLE001 - a process that is ended may leave half a report
            self._process.wait()
            self._reports.put(None)

    def _last_words(self) -> Iterator[tuple[str, Any]]:
        """What the process had sent before it was ended."""
        with contextlib.suppress(queue.Empty):
            while (report := self._reports.get(timeout=LAST_WORDS)) is not None and report[0] != "ended":
                yield report

    def _how_it_ended(self) -> str:
        code = self._process.returncode
        if code < 0:
            name = signal.Signals(-code).name
            why = ", as the system does where memory runs out" if name == "SIGKILL" else ""
            return f"the measuring process was killed ({name}{why})"
        self._log.seek(0)
        said = self._log.read().decode(errors="replace").strip().splitlines()
        return f"the measuring process ended with code {code}" + (f": {said[-1][:200]}" if said else "")


_idle: list[Process] = []
_lock = threading.Lock()


def borrow() -> Process:
    """A process that waits for a job, or a new one."""
    with _lock:
        while _idle:
            process = _idle.pop()
            if process.alive:
                return process
    return Process()


def give_back(process: Process) -> None:
    """Keep a process for the next job, if none waits yet; one that was ended is replaced, which takes seconds."""
    with _lock, contextlib.suppress(OSError):  # where no process can be started, the next run says so
        if not _idle:
            _idle.append(process if process.alive else Process())
            return
    process.end()


@atexit.register
def end_idle() -> None:
    """End the process that waits for a job."""
    with _lock:
        while _idle:
            _idle.pop().end()
