"""The atlas: PyTorch's own ops, and what moves their bits on this machine.

    python -m kernels atlas                                 test every op, into data/<machine>/atlas.csv
    python -m kernels atlas --ops mm softmax --properties batch

A cell is one op, dtype and property. A property is one way to compute a call's rows again; properties.py has them all.
"""
from __future__ import annotations

import argparse
import inspect
import itertools
import sys
from collections.abc import Iterator, Sequence

import pandas as pd
import torch
from tqdm.auto import tqdm

from ... import runtime
from ...op import DTYPES
from .. import provenance, records
from .cases import CASES, Case
from .properties import PROPERTIES, outcome

RECORDED_DTYPES = ("float32", "bfloat16")
ATLAS = records.Table(
    "atlas.csv",
    ("op", "dtype", "shape", "property", "verdict", "share_differ", "largest_ulp", "distinct", "trials",
     "recorded_at", "source"),
    ("op", "dtype", "shape", "property"),
)


def names() -> list[str]:
    """Every op of the atlas, in its order."""
    return [case.name for case in CASES]


def machines(out=records.DATA) -> list[str]:
    """The machines that recorded an atlas, data-centre GPUs first."""
    return records.machines(ATLAS.file, out)


def recorded(machine: str, out=records.DATA) -> pd.DataFrame:
    """A machine's atlas: the latest row of each op, dtype and property. FileNotFoundError if it recorded none."""
    rows = records.load(ATLAS, machine, out).sort_values("recorded_at", kind="stable")
    return rows.drop_duplicates(["op", "dtype", "property"], keep="last").sort_index()


def verdict(machine: str, op: str, dtype: str, property: str, out=records.DATA) -> str:
    """What a machine recorded: `same`, `varies`, `not applicable`, `not here: why`, `error: what`, or `not recorded`.

    ValueError for an op, dtype or property that the atlas does not have.
    """
    _checked(op, dtype, property)
    rows = recorded(machine, out)
    found = rows[(rows.op == op) & (rows.dtype == dtype) & (rows.property == property)]
    return found.verdict.iloc[0] if len(found) else "not recorded"


def test(op: str | Case, dtype: str, property: str, device=None, trials: int = 20) -> dict:
    """Measure one cell here and now: a dict of atlas.csv's columns.

    `same` rests on at least `trials` comparisons; `varies` was seen again in a further measurement, with the same seeds
    and inputs made anew. ValueError for an unknown op, dtype or property. An error of the op becomes its verdict.
    """
    case = _checked(op, dtype, property)
    device = torch.device(device or runtime.device())
    if trials < 1:
        raise ValueError(f"trials must be at least 1, got {trials}")
    found, tally = outcome(case, DTYPES[dtype], property, device, trials)
    return {"op": case.name, "dtype": dtype, "shape": case.size(device), "property": property, "verdict": found,
            **tally.columns(), "recorded_at": records.now(), "source": source()}


def _checked(op, dtype, property) -> Case:
    case = op if isinstance(op, Case) else next((c for c in CASES if c.name == op), None)
    if case is None:
        raise ValueError(f"op must be one of {', '.join(names())}, got {op!r}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if property not in PROPERTIES:
        raise ValueError(f"property must be one of {', '.join(PROPERTIES)}, got {property!r}")
    return case


def source() -> str:
    """The code that decides a row: this file, the cases, the properties and what they import."""
    return provenance.source(__file__, inspect.getfile(Case), inspect.getfile(outcome))


# --- all cells


def cells(ops: Sequence[str] = (), dtypes: Sequence[str] = RECORDED_DTYPES,
          properties: Sequence[str] = PROPERTIES) -> list[tuple[str, str, str]]:
    """(op, dtype, property) of every cell asked for. ValueError for an unknown name.

    Graphs come last: a capture that fails may leave PyTorch's allocator unfit for the next one.
    """
    wanted = [(o, d, p) for o in ops or names() for d in dtypes for p in properties]
    for cell in wanted:
        _checked(*cell)
    return sorted(wanted, key=lambda cell: cell[2] == "graph")


def atlas(wanted: Sequence[tuple[str, str, str]], done: pd.DataFrame | None = None, device=None, trials: int = 20,
          progress: bool = True) -> Iterator[dict]:
    """Yield a row for each wanted cell that `done` does not have from this code, at this size, with as many trials."""
    device = torch.device(device or runtime.device())
    todo = [cell for cell in wanted if cell not in _have(done, device, trials)]
    bar = tqdm(todo, desc="atlas", disable=not progress, file=sys.stderr)
    for cell in bar:
        bar.set_postfix_str(" ".join(cell))
        yield test(*cell, device=device, trials=trials)


def _have(done, device, trials) -> set:
    """Cells recorded by this very code at this size. A row with too few trials or an error does not count."""
    if done is None or not len(done):
        return set()
    sizes = {case.name: case.size(device) for case in CASES}
    good = done[(done.source.isin(provenance.known_as(source()))) & (done["shape"] == done.op.map(sizes))
                & ~done.verdict.str.startswith("error") & ((done.trials >= trials) | (done.trials == 0))]
    return set(good[["op", "dtype", "property"]].itertuples(index=False, name=None))


def record(folder, wanted, done=None, trials: int = 20, progress: bool = True) -> int:
    """Measure the wanted cells and write the rows of each op and dtype when they are finished; returns their number."""
    count = 0
    rows = atlas(wanted, done, trials=trials, progress=progress)
    for _, group in itertools.groupby(rows, key=lambda row: (row["op"], row["dtype"])):
        kept: list[dict] = []
        try:
            kept.extend(group)
        finally:  # an interrupted group keeps what it has
            if kept:
                ATLAS.merge(folder, kept)
                count += len(kept)
    return count


def _arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m kernels atlas", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="+", default=[], help="such as mm softmax (default: all)")
    parser.add_argument("--dtypes", nargs="+", default=list(RECORDED_DTYPES), choices=list(DTYPES))
    parser.add_argument("--properties", nargs="+", default=list(PROPERTIES), choices=PROPERTIES)
    parser.add_argument("--trials", type=int, default=20, help="comparisons that a cell needs at least")
    parser.add_argument("--out", default=records.DATA, help="the data folder")
    parser.add_argument("--machine", help="the folder's name under it (default: from the device)")
    parser.add_argument("--again", action="store_true", help="measure cells that are recorded already")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    a = _arguments(argv)
    try:
        wanted = cells(a.ops, a.dtypes, a.properties)
        folder = records.open_machine(a.out, a.machine)
        done = None if a.again else ATLAS.read(folder)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    records.note_machine(folder, ATLAS.file)
    try:
        count = record(folder, wanted, done, a.trials)
    except KeyboardInterrupt:
        print(f"stopped; what was measured is in {folder}, and the same command goes on from there", file=sys.stderr)
        return 130
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{count} cells measured, {len(wanted) - count} were recorded already, in {folder / ATLAS.file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
