"""The code a function runs: its own syntax tree, and those of all in `kernels` that it names."""
from __future__ import annotations

import ast
import hashlib
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache
from types import ModuleType
from typing import Any

from ..launch import Step, Tiles

PROJECT = __name__.partition(".")[0]


def digest(*texts: str) -> str:
    """The first 12 hex digits of SHA-256 over these texts."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:12]


def of_functions(*functions: Any) -> str:
    """Which code these functions run, comments and docstrings apart. A kernel counts as the function it was made of."""
    return digest(*sorted({text for function in functions for text in closure(bare(function)).values()}))


def of_launches(steps: list[Step]) -> str:
    """Which code a GPU is given, and with which numbers: the kernels of these launches, and what they are told."""
    return digest(*(part for step in steps for part in (of_functions(step.kernel), _told(step))))


def _told(step: Step) -> str:
    pointers = {name: (p.dtype, p.shape, p.strides, p.block) if isinstance(p, Tiles) else p
                for name, p in step.pointers.items()}
    parts = (step.programs, pointers, step.scalars, step.constants, step.options, step.named, step.leaves)
    return repr([dict(part) if hasattr(part, "items") else part for part in parts])


def bare(function: Any) -> Any:
    """The Python function under what Triton, a cache or a decorator has wrapped around it."""
    while inspect.isroutine(inner := getattr(function, "__wrapped__", None) or getattr(function, "fn", None)):
        function = inner
    return function


@cache
def closure(function: Any) -> dict[str, str]:
    """name -> syntax tree of a function or class, and of all in `kernels` that it names; numbers by their value."""
    found: dict[str, str] = {}
    waiting = [function]
    while waiting:
        each = waiting.pop()
        name = f"{each.__module__}.{each.__qualname__}"
        if name in found:
            continue
        text = _text(each)
        found[name] = tree(text)
        for said, value in _named(each, ast.parse(text)):
            if inspect.isfunction(value) or inspect.isclass(value):
                waiting.append(value)
            else:
                found[f"{name} {said}"] = f"{said}={value!r}"
    return found


def _text(function: Any) -> str:
    """The source of a function or class; what was made without a file, or amid a line, counts by its compiled code."""
    try:
        text = textwrap.dedent(inspect.getsource(function))
        ast.parse(text)
    except (OSError, SyntaxError):
        text = repr((function.__code__.co_code, function.__code__.co_names))
    return text


def _named(function: Any, code: ast.Module) -> Iterator[tuple[str, Any]]:
    """(name, what it stands for) of each name in the tree that is code of this project, or a plain value.

    A decorator is not followed, and a switch is left out: both say where the code runs.
    """
    scope = _scope(function)
    decorators = {id(inner) for outer in getattr(code.body[0], "decorator_list", ()) for inner in ast.walk(outer)}
    for node in (node for node in ast.walk(code) if id(node) not in decorators):
        value = _value(node, scope)
        value = value.value if type(value).__name__ == "constexpr" else bare(value)
        ours = str(getattr(value, "__module__", "")).partition(".")[0] == PROJECT
        code = ours and (inspect.isfunction(value) or inspect.isclass(value))
        if code or isinstance(value, (int, float, str, tuple, list, dict)) and not isinstance(value, bool):
            yield ast.unparse(node), value


def _scope(function: Any) -> dict[str, Any]:
    if inspect.isclass(function):
        return vars(inspect.getmodule(function))
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    return function.__globals__ | {name: cell.cell_contents for name, cell in cells}


def _value(node: ast.AST, scope: dict[str, Any]) -> Any:
    """What a name stands for, or an attribute of one of our modules; None for all else."""
    if isinstance(node, ast.Name):
        return scope.get(node.id)
    owner = _value(node.value, scope) if isinstance(node, ast.Attribute) else None
    ours = isinstance(owner, ModuleType) and owner.__name__.partition(".")[0] == PROJECT
    return getattr(owner, node.attr, None) if ours else None


@cache  # one function is part of many kernels
def tree(text: str) -> str:
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
