"""The atlas: which of PyTorch's own ops move their bits, and what moves them, on a GPU and on a CPU."""
from __future__ import annotations

from matplotlib.figure import Figure

from kernels.lab import records
from kernels.lab.atlas import chart as atlas_chart
from kernels.lab.atlas import measure as atlas


def _machines(data) -> list[str]:
    """The first recorded GPU and the first recorded CPU."""
    names = atlas.machines(data)
    return [m for m in names if not m.startswith("cpu")][:1] + [m for m in names if m.startswith("cpu")][:1]


def _tables(data=records.DATA) -> dict:
    """Device and torch version -> rows."""
    tables = {}
    for name in _machines(data):
        machine = records.read_machine(records.Path(data) / name)
        heading = f"{machine['device'].removeprefix('NVIDIA ')}, torch {machine['torch'].partition('+')[0]}"
        tables[heading] = _shown(atlas.recorded(name, data))
    return tables


def _shown(rows):
    return rows[rows.op.isin(atlas.names()) & rows.dtype.isin(atlas.RECORDED_DTYPES)]


def draw(data=records.DATA) -> Figure:
    tables = _tables(data)
    if not tables:
        raise FileNotFoundError(f"no {atlas.ATLAS.file} is recorded in {data}: run python -m kernels atlas")
    moved = [atlas_chart.counts(atlas_chart.steady(rows), "batch") for rows in tables.values()]
    claim = " and ".join(f"{some} of {of} on {'a CPU' if name.startswith('cpu') else name.upper()}"
                         for name, (some, of) in zip(_machines(data), moved, strict=True))
    return atlas_chart.atlas_chart(
        tables, title=f"Ops that give a row other bits in another batch: {claim}\n"
                      "leaving out those that race from run to run and those that draw random numbers",
        caption="PyTorch's own ops, its default settings. Pale: the same bits in at least 20 comparisons. Dark: bits "
                "moved, and moved again in a further measurement; the number is the per cent of elements that differ "
                "from the first call. Hatched: no such kernel here, or no such test. Empty: does not apply. "
                "run: the same call again. batch: other batch sizes. position: the row elsewhere in the batch. "
                "neighbours: the other rows changed. query: the same positions computed with other numbers of "
                "queries. threads: other numbers of CPU threads. graph: a CUDA graph replayed. An op that moves from "
                "run to run may move in every column for that reason alone. An op stands under what moved it on any "
                "machine shown. Sizes in atlas.csv.")


ALT = atlas_chart.words(_tables())
