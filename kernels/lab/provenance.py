"""Which code decided a recorded row: `source`, a hash that no comment and no layout changes."""
from __future__ import annotations

import ast
import csv
import inspect
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from ..launch import Step
from ..op import DTYPES, Op, Shape
from . import closure

ROOT = Path(__file__).resolve().parents[2]
SAME_CODE = ROOT / "data" / "same_code.csv"
BY_SCHEDULE = ("triton", "online")  # implementations whose row names the schedule that was launched


@cache
def source(*files: str) -> str:
    """The first 12 hex digits of SHA-256 over the code of these files and of all in `kernels` that they import.

    Code is the syntax tree without imports, comments and docstrings. A file in kernels/lab counts only if it is among
    `files`: widgets, charts and records decide no row.
    """
    return closure.digest(*sorted(closure.tree(path.read_text(encoding="utf-8")) for path in deciding(*files)))


def of_op(op: Op) -> str:
    """`source` of what an op computes, how it is called and how its numbers are added: of all its files."""
    return source(inspect.getfile(inspect.unwrap(op.python)))


def of_row(op: Op, implementation: str, dtype: str, shape: str, tokens: int, clock="", schedule="") -> str:
    """`source` of a measured row. ValueError for a `schedule` that the op has no more, or that no longer suits.

    A schedule's time on a GPU, and its bits, are decided by what is launched; its time on the host by all the op's
    files; every other implementation by its function and what that calls.
    """
    if implementation in BY_SCHEDULE and clock == "call":
        return of_op(op)
    if implementation in BY_SCHEDULE:
        return closure.of_launches(launches(op, schedule, dtype, shape, tokens))
    return closure.of_functions(op.implementation(implementation))


def launches(op: Op, schedule: str, dtype: str, shape: str | Shape, tokens: int) -> list[Step]:
    """The launches of a schedule, given by its name, for contiguous arguments. ValueError for a name the op has not."""
    numbers = DTYPES[dtype]
    parse = getattr(op.call.Schedule, "parse", None)  # the matrix product's are text in tables
    if parse is None:
        parse = {str(s): s for s in op.schedules(shape, numbers)}.get
    if (found := parse(schedule)) is None:
        raise ValueError(f"{op.name} has no schedule {schedule!r} at {shape}, {dtype}")
    return op.call.launches(found, *op.inputs(tokens, shape, numbers, "meta"))


@cache
def known_as(now: str) -> frozenset[str]:
    """Sources whose rows count as recorded by the code `now`: itself, and those that data/same_code.csv lists."""
    with SAME_CODE.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(line for line in file if not line.startswith("#"))
        return frozenset({now, *(row["source"] for row in rows if row["now"] == now)})


def deciding(*files: str) -> set[Path]:
    """These files and those in `kernels`, but not in kernels/lab, that they import, directly or not."""
    found, waiting = set(), {Path(file).resolve() for file in files}
    while waiting:
        path = waiting.pop()
        found.add(path)
        waiting |= {p for p in imported(path) if (ROOT / "kernels" / "lab") not in p.parents} - found
    return found


def imported(path: Path) -> set[Path]:
    """The files of this project that a file imports, also inside functions. A package counts as its __init__.py."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        for module, names in _imports(node, path):
            base = ROOT.joinpath(*module.split("."))
            inside = [file for name in names if (file := _file(base / name))]
            found.update(inside if len(inside) == len(names) and names else [*inside, _file(base)])
    return found - {None, ROOT / "kernels" / "__init__.py"}


def _imports(node: ast.AST, path: Path) -> Iterator[tuple[str, list[str]]]:
    """(absolute module, names taken from it) of an import statement; nothing of any other node."""
    if isinstance(node, ast.Import):
        yield from ((alias.name, []) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        package = path.relative_to(ROOT).parts[:-node.level] if node.level else ()
        yield ".".join((*package, *filter(None, [node.module]))), [alias.name for alias in node.names]


def _file(base: Path) -> Path | None:
    return next((p for p in (base.with_name(base.name + ".py"), base / "__init__.py") if p.is_file()), None)
