"""Rows of older code: another version of a kernel decided them, so they say nothing about today's kernels."""
from __future__ import annotations

from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd

from .. import OPS, runtime, tables
from ..op import Shape
from ..ops.all_reduce import call as all_reduce
from . import closure, provenance, records


def is_older(row) -> bool:
    """Whether a row of a token sweep, of digests or of certificates was decided by other code than today's.

    Where that cannot be told, for `untold` says so, it counts as today's.
    """
    todays = _of(row)
    return todays is not None and row.source not in todays


def untold(row) -> bool:
    """Whether this row's code cannot be read here: schedules in Gluon need Triton."""
    return _of(row) is None


def _of(row) -> frozenset | None:
    schedule = getattr(row, "schedule", "")
    given = (row.op, getattr(row, "implementation", "triton"), row.dtype, row.shape,
             int(row.tokens if hasattr(row, "tokens") else row.rows), getattr(row, "clock", ""))
    return _todays(*given, schedule if isinstance(schedule, str) else "")


@cache
def _todays(*row) -> frozenset | None:
    """Every source that counts as today's for such a row; None where it cannot be told."""
    try:
        return _sources(*row)
    except ImportError:
        if runtime.HAS_TRITON:
            raise
        return None


def _sources(op: str, implementation: str, dtype: str, shape: str, tokens: int, clock: str, schedule: str) -> frozenset:
    if op not in OPS:  # all_reduce, which needs ranks
        return provenance.known_as(provenance.source(all_reduce.__file__))
    known = OPS[op]
    try:
        now = {provenance.of_row(known, implementation, dtype, shape, tokens, clock, schedule)}
    except ValueError:  # a schedule or an implementation that is no more
        now = set()
    launched = implementation in provenance.BY_SCHEDULE and clock != "call"
    return frozenset().union(*map(provenance.known_as, now), known_as(op) if launched else ())


@cache
def known_as(op: str) -> frozenset[str]:
    """Sources of an op's launches that data/same_code.csv lists as today's."""
    return provenance.known_as(of_stored(op)) - {of_stored(op)}


@cache
def of_stored(op: str) -> str:
    """`source` of every launch that the tables of this suite's GPUs choose for an op."""
    known, found = OPS[op], []
    for gpu in ("h100", "h200") if op == "matmul" else ():  # which alone has tables
        for dtype, shapes in tables.load(gpu, known.call.Schedule.parse).get(op, {}).items():
            found += [provenance.launches(known, str(schedule), dtype, Shape(N=n, K=k), tokens)
                      for (n, k), column in shapes.items() for tokens, schedule in column.items()]
    return closure.digest(*map(closure.of_launches, found))


def mark(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with columns `older` and `untold`."""
    found = [(is_older(row), untold(row)) for row in rows.itertuples()]
    older, unsaid = np.array(found, bool).reshape(-1, 2).T
    return rows.assign(older=older, untold=unsaid)


def listed(table: records.Table, out=records.DATA) -> list[str]:
    """One line for each machine, op and implementation that has older rows in a table: how many of how many."""
    lines = []
    for path in sorted(Path(out).glob(f"*/{table.file}")):
        rows = mark(table.read(path.parent))
        kinds = [c for c in ("op", "implementation", "clock") if c in rows]
        every = Counter(rows[kinds].itertuples(index=False, name=None))
        old = Counter(rows[rows.older][kinds].itertuples(index=False, name=None))
        lines += [f"{path.parent.name} {table.file} {' '.join(kind)}: {old[kind]} of {every[kind]} rows"
                  for kind in sorted(old)]
    return lines
