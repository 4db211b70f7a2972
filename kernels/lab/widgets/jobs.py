"""What the widgets run in their process: each function takes `report`, `stop`, and what its widget asks for.

Reports are "doing" (what is about to be measured, in words), "rows", and what else the widget has an `_on_...` for.
This file imports no widget, so that a process starts in the time that torch takes.
"""
from __future__ import annotations

import threading
import time
from collections.abc import Callable

from ... import OPS, runtime
from ...model.llama import Llama
from ..atlas import measure as atlas
from ..sweep import measure as sweep
from ..window import measure as window

Report = Callable[..., None]
_BETWEEN_REPORTS = 0.3  # seconds between two reports of how far a window has come


def in_a_line(error: Exception) -> str:
    """The error's type and the first line of what it says."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else 'no message'}"


def token_sweep(report: Report, stop: threading.Event, op: str, options: dict):
    """The sweep of these options over an op of this name; also reports "failed_point", (where, why)."""
    wanted = sweep.Sweep(OPS[op], **options)
    for rows in sweep.sweep(wanted, stop=stop, progress=False, on_start=lambda what: report("doing", what),
                            on_error=lambda where, error: report("failed_point", (where, in_a_line(error)))):
        report("rows", rows)


def window_cost(report: Report, stop: threading.Event, model: str, options: dict, ceilings: window.Ceilings | None):
    """Windows of a preset; also reports "ceilings", and "round" with the rounds done."""
    report("doing", "measuring what a copy and a large product reach here")
    ceilings = ceilings or window.Ceilings.measured(runtime.device())
    report("ceilings", ceilings)
    report("doing", f"making {model}")
    llama, before, reported = Llama(model, device=runtime.device()), 0, 0.0

    def on_run(done: int, total: int):
        nonlocal reported
        if time.monotonic() - reported > _BETWEEN_REPORTS:
            report("round", before + done)
            reported = time.monotonic()

    watch = window.Watch(on_point=lambda row: report("rows", [row]), on_run=on_run, stop=stop)
    for tokens in sorted(set(options["windows"])):
        if stop.is_set():
            return
        report("doing", f"timing a window of {tokens}")
        window.window_cost(llama, **options | {"windows": [tokens]}, ceilings=ceilings, watch=watch)
        before += options["runs"] + options["warmups"]


def atlas_cells(report: Report, stop: threading.Event, cells: list[tuple[str, str, str]], trials: int):
    """Cells of the atlas, one after the other."""
    for cell in cells:
        if stop.is_set():
            return
        report("doing", f"testing {cell[0]}, {cell[2]}")
        for row in atlas.atlas([cell], trials=trials, progress=False):
            report("rows", [row])
