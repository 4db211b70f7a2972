"""What is recorded, in a sweep's chart: the controls that choose it, and the rows that they choose."""
from __future__ import annotations

from pathlib import Path

import ipywidgets as w
import pandas as pd

from ... import runtime
from ...op import DTYPES, Op
from .. import bench, records
from ..widgets import parts

NO_ROWS = pd.DataFrame(columns=list(records.TOKEN_SWEEP.columns))


class Recordings:
    """The machine and the experiment of an op whose recorded rows are shown, and what else is drawn beside live ones.

    machine    the name of the one to open on (default: the first there is)
    problems   takes what is wrong, by name: it is shown, not raised
    """

    def __init__(self, machine: str | None, out: Path, problems: dict[str, str]):
        self._out, self._problems = out, problems
        self._op, self._rows, self.experiments, self.device_name, self.loading = None, NO_ROWS, {}, "", False
        names = [("none", None)] + [(n, n) for n in records.machines(out=out)]
        known = [n for _, n in names]
        chosen = machine or next(filter(None, known), None)
        if chosen not in known:
            there_are = ", ".join(filter(None, known)) or "none"
            problems["machine"] = f"no recorded machine {chosen!r}; there are: {there_are}"
            chosen = None
        self.machine = w.Dropdown(description="Recorded on", options=names, value=chosen, **parts.LABELLED)
        self.recording = w.Dropdown(description="Experiment", options=["none"], **parts.LABELLED)
        self.overlay = w.Checkbox(description="recorded beside live", value=runtime.HAS_GPU, indent=False)
        self.published = w.Checkbox(description="LLM-42's published points", indent=False)
        self.log_axes = w.Checkbox(description="log axes", value=True, indent=False)

    def panel(self) -> w.VBox:
        """The controls, laid out."""
        parts.widths({self.machine: "200px", self.recording: "370px", self.overlay: "auto", self.published: "auto",
                      self.log_axes: "auto"})
        return parts.panel(parts.line(self.machine, self.recording),
                           parts.line(w.Label("Show"), self.overlay, self.published, self.log_axes))

    @property
    def rows(self) -> pd.DataFrame:
        """The chosen recorded experiment, with data/'s columns and `machine`; empty if there is none."""
        all_rows = self._rows
        if self.recording.value not in self.experiments:
            return all_rows.iloc[:0]
        dtype, shape, clock = self.experiments[self.recording.value]
        return all_rows[(all_rows.op == self._op.name) & (all_rows.dtype == dtype)
                        & (all_rows["shape"] == shape) & (all_rows.clock == clock)]

    def load(self, op: Op, here: tuple[str, str, str]):
        """Read the chosen machine's rows of an op; `here` are the dtype, shape and clock to show if they are there."""
        rows, name, self.device_name = NO_ROWS.assign(machine=[]), self.machine.value, ""
        if name is not None:
            for solved in ("machine", "recorded"):
                self._problems.pop(solved, None)
            try:
                self.device_name = f"Recorded on {_device_in(self._out / name)}"
                rows = _undamaged(records.load(machine=name, out=self._out))
            except (OSError, ValueError) as error:
                self._problems["recorded"] = f"recorded data of {name}: {error}"
        self._op, self._rows = op, rows
        self.published.disabled = op.name != "rms_norm"
        mine = rows[rows.op == op.name]
        found = list(mine[["dtype", "shape", "clock"]].drop_duplicates().itertuples(index=False, name=None))
        found.sort(key=lambda experiment: _preference(op, experiment, here))
        self.experiments = {f"{shape} · {dtype} · {clock}": (dtype, shape, clock) for dtype, shape, clock in found}
        kept, self.loading = self.recording.value, True
        self.recording.options = list(self.experiments) or ["none"]
        self.recording.value = kept if kept in self.experiments else self.recording.options[0]
        self.loading = False

    def published_points(self) -> pd.DataFrame | None:
        """LLM-42's points; None if they are not asked for, or cannot be read."""
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


def _preference(op: Op, experiment: tuple, here: tuple):
    """The experiment set in the controls first, then the op's own first shape, bfloat16, cold."""
    dtype, shape, clock = experiment
    shapes, kinds, clocks = list(op.shapes), list(DTYPES), list(bench.CLOCKS)
    return (experiment != here, *(seq.index(v) if v in seq else 99 for seq, v in
                                  ((shapes, shape), (kinds, dtype), (clocks, clock))))


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
