"""GpuChart: one model's digests and times under a control for the number of GPUs; a shell over chart.study."""
from __future__ import annotations

import ipywidgets as w

from .. import records
from ..widgets import parts
from ..widgets.base import Study
from . import chart
from .measure import PHASES


class GpuChart(Study):
    """Which numbers of GPUs, which phase, and which machine's record; the chart below.

    Raises FileNotFoundError where no machine has recorded a model on several GPUs or processes.
    """

    def __init__(self, out=records.DATA):
        super().__init__()
        names = records.machines(chart.TENSOR_PARALLEL.file, out)
        if not names:
            raise FileNotFoundError(f"no machine has recorded {chart.TENSOR_PARALLEL.file} in {out}: torchrun "
                                    "--standalone --nproc-per-node N -m kernels parallel --record")
        self._out = out
        self.machine = w.Dropdown(description="Machine", options=names, **parts.LABELLED)
        counts = self._counts()
        self.gpus = w.SelectMultiple(description="GPUs", options=counts, value=counts, rows=4, **parts.LABELLED)
        self.phase = w.ToggleButtons(description="Phase", options=PHASES, **parts.LABELLED)
        self.machine.observe(self._other_machine, "value")
        self._show(parts.panel(parts.line(self.machine, self.gpus, self.phase)), "1000px", self.machine, self.gpus,
                   self.phase)

    def __repr__(self):  # what a saved notebook keeps of the widget
        return "GpuChart(): run this cell in JupyterLab to use it"

    def _counts(self) -> tuple[int, ...]:
        return tuple(int(n) for n in sorted(chart.recorded(self.machine.value, self._out).gpus.unique()))

    def _other_machine(self, change) -> None:
        self.gpus.options = self._counts()
        self.gpus.value = self._counts()

    def _study(self):
        return chart.study(tuple(self.gpus.value), self.phase.value, self.machine.value, self._out)
