"""Exercises: what the notebooks' stubs call with their answers.

A notebook's stub leaves `answer = ...` and calls `grade`, which prints and never raises, so Run All goes on:

    answer = ...
    grade("03.1", answer)

A checker takes the answer, returns None if it is right, and otherwise raises AssertionError whose message is a hint.
The checkers are in answers/, one file a notebook.
A folded solution is a markdown cell with <details> around a ```python block that begins `# solution 03.1` and
sets `answer`; the tests run it.
"""
from __future__ import annotations

import dis
import pkgutil
from collections.abc import Callable
from importlib import import_module
from inspect import isfunction

from . import answers

CHECKERS: dict[str, Callable] = {}  # by exercise; the files in answers/ fill it when they are imported
_CONSTANT = {"RESUME", "NOP", "LOAD_CONST", "RETURN_CONST", "RETURN_VALUE", "COPY_FREE_VARS"}


def exercise(name: str) -> Callable:
    """Register the decorated checker as exercise `name`, such as "03.1": notebook 03, first exercise."""
    def register(checker):
        if name in CHECKERS:
            raise ValueError(f"there are two exercises {name}")
        CHECKERS[name] = checker
        return checker
    return register


def checkers() -> dict[str, Callable]:
    """Every exercise's checker by name. Imports the files in answers/, which need this module, at the first call."""
    for file in pkgutil.iter_modules(answers.__path__):
        import_module(f"{answers.__name__}.{file.name}")
    return CHECKERS


def grade(name: str, answer) -> None:
    """Print whether the answer is right, a hint if it is not, or that there is none yet. Never raises."""
    if name not in checkers():
        print(f"There is no exercise {name}; there are {', '.join(sorted(checkers())) or 'none'}.")
    elif _unanswered(answer):
        print(f"○ Exercise {name}: not answered yet. Replace the ... and run the cell again.")
    else:
        hint = _hint(name, answer)
        print(f"✗ Exercise {name}: {hint}" if hint else f"✓ Exercise {name}: well done.")


def passes(name: str, answer) -> bool | None:
    """Whether the answer is right; None if there is none yet. Raises KeyError for an unknown exercise."""
    if name not in checkers():
        raise KeyError(f"there is no exercise {name}; there are {sorted(checkers())}")
    return None if _unanswered(answer) else _hint(name, answer) is None


def _hint(name: str, answer) -> str | None:
    try:
        checkers()[name](answer)
    except AssertionError as error:
        return str(error) or "not yet; look again at the question."
    except Exception as error:  # noqa: BLE001 - whatever an answer raises is a hint to its author
        return f"your answer raised {type(error).__name__}: {error}"
    return None


def _unanswered(answer) -> bool:
    """Whether this is the stub: an Ellipsis, or a function that does nothing but return None or an Ellipsis."""
    if not isfunction(answer):
        return answer is ...
    constants = set(answer.__code__.co_consts) - {answer.__doc__}
    return constants <= {None, ...} and {i.opname for i in dis.get_instructions(answer)} <= _CONSTANT
