"""The sources of moving bits: what each breaks, which cells of the atlas show it, and what stops it.

Notebook 02 has a section for each. Its demonstrations are in device.py (one call), host.py (one CPU), collectives.py
(several processes) and server.py (batches formed by arrival).

    python -m kernels sources --record    run notebook 02 and write what it saw to data/<machine>/sources.csv
"""
from __future__ import annotations

import argparse
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import pandas as pd

from .. import provenance, records
from ..atlas import measure as atlas
from ..notebook import cells as notebook
from ..notebook import run as runner

PROPERTIES = {
    "run": "the same call, repeated, gives the same bits",
    "batch": "a token's bits do not depend on what else is in the call",
    "schedule": "nor on how the work is carried out: kernels, threads, compiler, library, machine, processes",
}


@dataclass(frozen=True)
class Expected:
    """One cell of the atlas, and by machine the verdict that the notebook relies on. Other machines' are only shown."""

    op: str
    property: str
    dtype: str = "float32"
    verdicts: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))


def _expected(op: str, property: str, dtype: str = "float32", **verdicts: str) -> Expected:
    """`cpu` and `h200` are the verdicts expected in the folders cpu-avx512 and h200 of data/."""
    folders = {"cpu": "cpu-avx512", "h200": "h200"}
    return Expected(op, property, dtype, MappingProxyType({folders[k]: verdict for k, verdict in verdicts.items()}))


@dataclass(frozen=True)
class Source:
    """One source: which of PROPERTIES it breaks, what stops it, and what it expects of the atlas."""

    name: str
    breaks: tuple[str, ...]
    fix: str
    expected: tuple[Expected, ...] = ()


SOURCES: tuple[Source, ...] = (
    Source("atomic additions", ("run",), "a cell for each block; cells added in order", (
        _expected("index_put[accumulate]", "run", cpu="varies", h200="same"),
        _expected("index_add", "run", cpu="same", h200="varies"),
        _expected("scatter_add[1d]", "run", cpu="same", h200="varies"),
        _expected("bincount[weights]", "run", cpu="same", h200="varies"),
        _expected("sdpa[flash].backward", "run", "bfloat16", cpu="same", h200="varies"),
        _expected("embedding.backward", "run", cpu="same", h200="same"),
    )),
    Source("batch size", ("batch",), "an order that names one row and its length", (
        _expected("mm", "batch", cpu="varies", h200="varies"),
        _expected("mm", "batch", "bfloat16", cpu="same", h200="varies"),
        _expected("sdpa[decode]", "batch", "bfloat16", cpu="same", h200="varies"),
        _expected("softmax", "batch", cpu="same", h200="same"),
        _expected("rms_norm", "batch", cpu="same", h200="same"),
    )),
    Source("position and padding", ("batch",), "the same code for every element; pad on the right", (
        _expected("silu", "batch", cpu="varies", h200="same"),
        _expected("mm", "position", cpu="same", h200="same"),
        _expected("mm", "neighbours", cpu="same", h200="same"),
    )),
    Source("split reductions", ("batch",), "cut a sum by its own length alone", (
        _expected("sum", "batch", cpu="same", h200="varies"),
        _expected("mean", "batch", cpu="same", h200="varies"),
    )),
    Source("query length", ("batch",), "attention in one order for any number of queries", (
        _expected("sdpa[math]", "query", cpu="varies", h200="varies"),
        _expected("sdpa[flash]", "query", "bfloat16", cpu="varies", h200="varies"),
        _expected("matmul[3d@2d]", "query", cpu="varies", h200="varies"),
    )),
    Source("thread count", ("schedule",), "an order that does not ask for it", (
        _expected("sum[all]", "threads", cpu="varies", h200="not applicable"),
        _expected("mm", "threads", cpu="varies", h200="not applicable"),
    )),
    Source("reduced precision", ("schedule",), "say the precision of factors and sums"),
    Source("library and autotuning", ("run", "schedule"), "race only schedules of one order"),
    Source("torch.compile", ("schedule",), "a custom op, which the compiler leaves whole", (
        _expected("compile(rms_norm)", "batch", cpu="varies", h200="varies"),
        _expected("rms_norm", "batch", cpu="same", h200="same"),
    )),
    Source("another processor", ("schedule",), "additions written out one by one"),
    Source("another version", ("schedule",), "pin versions, keep digests"),
    Source("number of processes", ("schedule",), "gather, then add in order"),
    Source("dynamic batching", ("batch",), "batch-invariant kernels", (
        _expected("mm", "batch", cpu="varies", h200="varies"),
    )),
    Source("shared random numbers", ("batch",), "a draw is a hash of its own request and step", (
        _expected("multinomial", "position", cpu="varies", h200="varies"),
    )),
)


def names() -> list[str]:
    """Every source, in the notebook's order."""
    return [source.name for source in SOURCES]


def beside(op: str, property: str, dtype: str = "float32", live: bool = True) -> dict[str, str]:
    """Print the atlas's verdicts for one cell: measured now, and as each machine recorded it. Returns them.

    `live=False` leaves out the measurement. ValueError for an op, property or dtype that the atlas does not have.
    """
    verdicts = {"here, live": atlas.test(op, dtype, property)["verdict"]} if live else {}
    verdicts |= {f"{machine}, recorded": atlas.verdict(machine, op, dtype, property) for machine in atlas.machines()}
    text = " · ".join(f"{v} ({where})" for where, v in verdicts.items()) or "not recorded"
    print(f"  {op}, {dtype}, {property}: {text}")
    return verdicts


def recorded(name: str, live: Collection[str] = ()) -> bool:
    """Print each cell that one source has expectations of, as `beside` does; the ops in `live` are measured now too.

    Returns whether every record has the verdict that the source expects of it. ValueError for an unknown source.
    """
    _check(name)
    cells = next(source.expected for source in SOURCES if source.name == name)
    shown = [beside(cell.op, cell.property, cell.dtype, cell.op in live) for cell in cells]
    return all(found.get(f"{machine}, recorded", verdict) == verdict
               for cell, found in zip(cells, shown, strict=True) for machine, verdict in cell.verdicts.items())


def moved(machine: str, property: str) -> set[str]:
    """The ops that moved in this property of the atlas, but for those that race from run to run on that machine."""
    varies = atlas.recorded(machine).query("verdict == 'varies'")
    return set(varies.op[varies.property == property]) - set(varies.op[varies.property == "run"])


OBSERVED = records.Table("sources.csv", ("name", "question", "value", "recorded_at", "source"), ("name", "question"))
SEEN: dict[tuple[str, str], str] = {}  # what `observe` printed in this process, for `record` to write


def observe(name: str, question: str, value, cpu: bool = False) -> None:
    """notebook.observe for one source, with what other machines recorded. ValueError for an unknown source.

    `question` must be the same on every machine.
    """
    _check(name)
    SEEN[name, question] = notebook.printed(value)
    notebook.observe(question, value, answers(name, question, cpu), cpu)


def answers(name: str, question: str, cpu: bool = False, out=records.DATA) -> dict[str, str]:
    """Machine -> what it recorded for this question, "not recorded yet" for one that has an atlas but no answer.

    `cpu`: the machine's CPU answered, though it may have a GPU.
    """
    found = {}
    for machine in dict.fromkeys([*atlas.machines(out), *records.machines(OBSERVED.file, out)]):
        rows = OBSERVED.read(records.Path(out) / machine)
        value = rows.value[(rows.name == name) & (rows.question == question)]
        where = f"{machine}'s CPU" if cpu and not machine.startswith("cpu") else machine
        found[where] = f"{value.iloc[0]} recorded" if len(value) else "not recorded yet"
    return found


def record(out=records.DATA, number: str = "02") -> str:
    """Run a notebook in a fresh kernel and write what its `observe` saw under `out`; returns the folder's name.

    Raises NotebookError if the notebook fails.
    """
    import nbformat

    path, = runner.find([number])
    nb = runner.read(path)
    nb.cells.append(nbformat.v4.new_code_cell(
        "import json\nfrom kernels.lab.sources import claims\n"
        "print(json.dumps([[*asked, value] for asked, value in claims.SEEN.items()]))"))
    seen = json.loads(runner.execute(nb, path.parent, 600, path.name).cells[-1].outputs[0].text)
    folder = records.open_machine(out)
    OBSERVED.merge(folder, [{"name": name, "question": question, "value": value, "recorded_at": records.now(),
                             "source": source()} for name, question, value in seen])
    records.note_machine(folder, OBSERVED.file)
    return folder.name


def source() -> str:
    """The code that decides what is seen: the demonstrations and what they import."""
    return provenance.source(*map(str, Path(__file__).parent.glob("*.py")))


def _check(name: str) -> None:
    if name not in names():
        raise ValueError(f"name must be one of {', '.join(names())}, got {name!r}")


def table(seen: Mapping[str, bool | str]) -> pd.DataFrame:
    """One row a source: a mark for each property it breaks, whether it moved a bit here, and what stops it.

    `seen` holds True, False or a reason for each of `names`. ValueError if one is missing or unknown.
    """
    if set(seen) != set(names()):
        odd = sorted(set(seen) ^ set(names()))
        raise ValueError(f"seen must have exactly the sources of names(); missing or unknown: {', '.join(odd)}")
    words = {True: "moved", False: "did not move"}
    rows = [{**{p: "×" if p in s.breaks else "" for p in PROPERTIES},
             "here": words.get(seen[s.name], seen[s.name]), "what stops it": s.fix} for s in SOURCES]
    return pd.DataFrame(rows, index=names())


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(prog="python -m kernels sources", description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", required=True, help="run notebook 02 and keep what it saw")
    parser.add_argument("--out", default=records.DATA, help="the data folder")
    print(record(parser.parse_args(argv).out))


if __name__ == "__main__":
    main()
