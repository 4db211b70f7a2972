"""Exercises: what the notebooks' stubs call with their answers.

A notebook's stub calls `grade`, which prints and never raises, so Run All goes on:

    answer = ...                    def pairs(x):
    grade("03.1", answer)               ...

                                    grade("00.2", pairs)

A checker takes the answer, returns None if it is right, and otherwise raises AssertionError whose message is a hint.
The checkers are in answers/, one file a notebook. What is wrong with every answer of that kind (no `return`, another
number of arguments, an exception of its own) is said here, once.
A folded solution is a markdown cell with <details> around a ```python block that begins `# solution 03.1` and
sets the name that the exercise asks for; the tests run it.
"""
from __future__ import annotations

import inspect
import json
import pkgutil
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from . import answers, run
from .written import Called, Raised, describe, has_no_return, is_stub

UNSAID = "another kind of answer"
KINDS = {"number": "find a value", "write": "write a function", "open": "many answers are right"}
_LINE = re.compile(r"^([✓✗]) Exercise (\d\d[a-z]?\.\d+):", re.M)


@dataclass(frozen=True)
class Exercise:
    """`asks`: the name that the stub sets, or the call that it defines, such as "pairs(x)". `wants`: what that is."""

    name: str
    checker: Callable
    asks: str = "answer"
    wants: str = UNSAID
    kind: str = "number"
    none: bool = False  # whether the function may return None

    @property
    def target(self) -> str:
        """The name in the stub and in the solution."""
        return self.asks.partition("(")[0]

    def form(self) -> str:
        """What is asked for, in words."""
        return f"a function `{self.asks}`" if "(" in self.asks else self.wants


CHECKERS: dict[str, Exercise] = {}  # by exercise; the files in answers/ fill it when they are imported
_graded: dict[str, bool] = {}  # what this kernel has graded


def exercise(name: str, asks: str = "answer", wants: str = UNSAID, kind: str = "",
             none: bool = False) -> Callable:
    """Register the decorated checker as exercise `name`, such as "03.1": notebook 03, first exercise.

    `kind` is one of KINDS: "write" where a call is asked for, "number" else, if it is not named.
    """
    kind = kind or ("write" if "(" in asks else "number")
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")

    def register(checker):
        if name in CHECKERS:
            raise ValueError(f"there are two exercises {name}")
        CHECKERS[name] = Exercise(name, checker, asks, wants, kind, none)
        return checker
    return register


def checkers() -> dict[str, Exercise]:
    """Every exercise by name. Imports the files in answers/, which need this module, at the first call."""
    for file in pkgutil.iter_modules(answers.__path__):
        import_module(f"{answers.__name__}.{file.name}")
    return CHECKERS


def grade(name: str, answer) -> None:
    """Print whether the answer is right, a hint if it is not, or that there is none yet. Never raises."""
    if name not in checkers():
        print(f"There is no exercise {name}; there are {', '.join(sorted(checkers())) or 'none'}.")
        return
    passed, said = _verdict(checkers()[name], answer)
    if passed is not None:
        _graded[name] = passed
    print(f"{ {True: '✓', False: '✗', None: '○'}[passed] } Exercise {name}: {said}")


def passes(name: str, answer) -> bool | None:
    """Whether the answer is right; None if there is none yet. Raises KeyError for an unknown exercise."""
    if name not in checkers():
        raise KeyError(f"there is no exercise {name}; there are {sorted(checkers())}")
    return _verdict(checkers()[name], answer)[0]


def _verdict(asked: Exercise, answer) -> tuple[bool | None, str]:
    if is_stub(answer):
        todo = f"Write {asked.asks}" if "(" in asked.asks else "Replace the ..."
        return None, f"not answered yet. {todo} and run the cell again."
    hint = _wrong_form(asked, answer) or _hint(asked, answer)
    return not hint, hint or "well done."


def _wrong_form(asked: Exercise, answer) -> str:
    """What is wrong before any check of what it computes; '' if nothing is."""
    if "(" in asked.asks and not callable(answer):
        return f"{asked.form()} is asked for, and this is {describe(answer)}."
    if not _as_function(asked, answer):
        return (f"{asked.wants} is asked for, and this is a function: answer with what it returns."
                if callable(answer) else "")
    if has_no_return(answer):
        return f"{asked.target} computes, but returns nothing: end it with `return` and the result."
    return _wrong_arguments(asked, answer) if "(" in asked.asks else ""


def _as_function(asked: Exercise, answer) -> bool:
    """Whether the checker calls the answer: where a call is asked for, or nothing is said of the form."""
    return "(" in asked.asks or (asked.wants == UNSAID and callable(answer))


def _wrong_arguments(asked: Exercise, answer) -> str:
    names = asked.asks.partition("(")[2].rstrip(")").split(", ")
    try:
        signature = inspect.signature(answer)
    except (TypeError, ValueError):  # a function written in C need not have one
        return ""
    try:
        signature.bind(*names)
    except TypeError:
        return f"it is called as {asked.asks}, and yours takes {signature}."
    return ""


def _hint(asked: Exercise, answer) -> str:
    """What the checker says of it; '' if it is right."""
    called = Called(answer, asked.target, asked.none) if _as_function(asked, answer) else None
    try:
        asked.checker(answer if called is None else called)
    except Raised as raised:
        return str(raised)
    except AssertionError as error:
        return str(error) or "not yet; look again at the question."
    except Exception as error:  # noqa: BLE001 - the checker could not use what it was given
        return _unusable(asked, answer, called, error)
    return ""


def _unusable(asked: Exercise, answer, called: Called | None, error: Exception) -> str:
    why = f"({type(error).__name__}: {error})"
    if called is None:
        return f"{asked.wants} is asked for, and this is {describe(answer)}. {why}"
    return f"{asked.asks} should return {asked.wants}, and returned {describe(called.last)}. {why}"


def progress(folder=run.NOTEBOOKS) -> None:
    """Print each notebook's exercises: ✓ done, ✗ tried, ○ open, by the saved notebooks and by this kernel."""
    seen = _saved(Path(folder)) | _graded
    mark = {True: "✓", False: "✗", None: "○"}
    by_notebook: dict[str, list[str]] = {}
    for name in sorted(checkers()):
        by_notebook.setdefault(name.partition(".")[0], []).append(f"{mark[seen.get(name)]} {name}")
    for number, line in by_notebook.items():
        print(f"notebook {number}: {'  '.join(line)}")
    done = sum(seen.get(name) is True for name in checkers())
    print(f"{done} of {len(checkers())} exercises done")


def _saved(folder: Path) -> dict[str, bool]:
    """What the notebooks' saved outputs say of exercises; a file that is no notebook says nothing."""
    found = {}
    for path in sorted(folder.glob("*.ipynb")):
        try:
            cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
            texts = ["".join(output.get("text", "")) for cell in cells for output in cell.get("outputs", [])]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
        found |= {name: tick == "✓" for text in texts for tick, name in _LINE.findall(text)}
    return found
