"""The atlas: which of PyTorch's own ops move their bits, and what moves them, on a GPU and on a CPU."""
from __future__ import annotations

from dataclasses import replace

from matplotlib.figure import Figure

from figures import described
from figures.page import SCREEN, Page
from kernels.lab import records
from kernels.lab.atlas import chart as atlas_chart
from kernels.lab.atlas import measure as atlas
from kernels.lab.atlas.chart import Form


def machines_shown(data) -> list[str]:
    """The first recorded GPU and the first recorded CPU."""
    found = {}
    for name in atlas.machines(data):
        found.setdefault(records.is_cpu(name, described(data, name)), name)
    return [found[kind] for kind in (False, True) if kind in found]


def _tables(data=records.DATA, machine: str | None = None) -> dict:
    """Folder's name -> its rows that are ours to show."""
    tables = {name: atlas.recorded(name, data) for name in ([machine] if machine else machines_shown(data))}
    return {name: rows[rows.op.isin(atlas.names()) & rows.dtype.isin(atlas.RECORDED_DTYPES)]
            for name, rows in tables.items()}


def _heading(data, name) -> str:
    machine = described(data, name)
    return f"{machine['device'].removeprefix('NVIDIA ')}, torch {machine['torch'].partition('+')[0]}"


def _headed(data, tables) -> dict:
    """Device and torch version -> rows."""
    return {_heading(data, name): rows for name, rows in tables.items()}


def _claim(data, name, rows) -> str:
    some, of = atlas_chart.counts(atlas_chart.steady(rows), "batch")
    where = "a CPU" if records.is_cpu(name, described(data, name)) else name.upper()
    return f"{some} of {of} on {where}" if of else f"none tested on {where}"


FORMS = {
    "screen": atlas_chart.FULL,
    "single": Form(row=0.145, cell=0.105, label=1.72, gap=0.02, machine_gap=0.15, head=1.36, points=(7.3, 7.3, 0),
                   listed=False),
    "double": Form(row=0.165, cell=0.272, label=1.9, gap=0.05, machine_gap=0.25, head=0.78, points=(7.5, 6.8, 6.6),
                   listed=False),
    "slide": Form(row=0.38, cell=0.225, label=3.42, gap=0.045, machine_gap=0.2, head=0.9, points=(8.4, 6.9, 8),
                  counted=True),
}


def draw(data=records.DATA, machine: str | None = None, page: Page = SCREEN) -> Figure:
    tables = {name: rows for name, rows in _tables(data, machine).items() if len(rows)}
    if not tables:
        raise FileNotFoundError(f"no {atlas.ATLAS.file} is recorded in {data}: run python -m kernels atlas")
    claim = " and ".join(_claim(data, name, rows) for name, rows in tables.items())
    form = FORMS[page.name]
    if not page.screen:
        form = replace(form, wide=page.width, tall=page.height, title=page.heading)
    return atlas_chart.atlas_chart(
        _headed(data, tables), title=f"Ops that give a row other bits in another batch: {claim}\n"
                      "leaving out those that race from run to run and those that draw random numbers",
        caption=f"PyTorch's own ops, its default settings. {_cells(form)} Empty: does not apply. "
                "run: the same call again. batch: other batch sizes. position: the row elsewhere in the batch. "
                "neighbours: the other rows changed. query: the same positions computed with other numbers of "
                "queries. threads: other numbers of CPU threads. graph: a CUDA graph replayed. An op that moves from "
                "run to run may move in every column for that reason alone. An op stands under what moved it on any "
                "machine shown. Sizes in atlas.csv." + _lacking(tables), form=form)


def _cells(form) -> str:
    """What a cell shows, in words."""
    if form.counted:
        return ("A number: how many of the line's ops moved their bits, of those tested; pale: none, in at least 20 "
                "comparisons each.")
    number = "; the number is the per cent of elements that differ from the first call" if form.points[-1] else ""
    halves = "" if form.points[-1] else " Of two cells the left is float32, the right bfloat16."
    return ("Pale: the same bits in at least 20 comparisons. Dark: bits moved, and moved again in a further "
            f"measurement{number}.{halves} Hatched: no such kernel here, or no such test.")


def _lacking(tables) -> str:
    """Which ops a record has not tested, in one sentence; '' where it has tested all."""
    few = {name: len(set(atlas.names()) - set(rows.op)) for name, rows in tables.items()}
    return "".join(f" Not recorded for {name}: {count} ops." for name, count in few.items() if count)


def words(data=records.DATA, machine: str | None = None) -> str:
    return atlas_chart.words(_headed(data, _tables(data, machine)))
