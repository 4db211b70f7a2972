"""Which code decided a recorded row: `source`, a hash that a comment, an import or a move does not change."""
from __future__ import annotations

import ast
import csv
import hashlib
import inspect
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from ..op import Op

ROOT = Path(__file__).resolve().parents[2]
SAME_CODE = ROOT / "data" / "same_code.csv"


@cache
def source(*files: str) -> str:
    """The first 12 hex digits of SHA-256 over the code of these files and of all in `kernels` that they import.

    Code is the syntax tree without imports, comments and docstrings. A file in kernels/lab counts only if it is among
    `files`: widgets, charts and records decide no row.
    """
    trees = sorted(_tree(path.read_text(encoding="utf-8")) for path in deciding(*files))
    return hashlib.sha256("\0".join(trees).encode()).hexdigest()[:12]


def of_op(op: Op) -> str:
    """`source` of what an op computes, how it is called and how its numbers are added."""
    return source(inspect.getfile(inspect.unwrap(op.python)))


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


def _tree(text: str) -> str:
    """Code as text that is the same in every version of Python: empty fields are left out."""
    return "\n".join(map(_plain, _body(ast.parse(text))))


def _plain(node) -> str:
    if isinstance(node, list):
        return "[" + " ".join(map(_plain, node)) + "]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = ((name, _body(node) if name == "body" and isinstance(node.body, list) else value)
              for name, value in ast.iter_fields(node) if name not in ("kind", "type_comment", "ctx"))
    kept = (f"{name}={_plain(value)}" for name, value in fields
            if isinstance(node, ast.Constant) or value not in (None, []))
    return f"{type(node).__name__}({' '.join(kept)})"


def _body(node) -> list:
    """The statements of a block that do something."""
    def idle(statement):
        text = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
        return text or isinstance(statement, (ast.Import, ast.ImportFrom))
    return [statement for statement in node.body if not idle(statement)]
