"""How long a notebook takes to read: the rule behind the minutes in each opening and in README.

150 words of prose a minute, 6 seconds a line of code, half a minute for each figure and each listing that a cell shows.
Folded solutions and the work on exercises are not counted. Rounded up to 5 minutes.
"""
from __future__ import annotations

import math
import re

WORDS_A_MINUTE, LINE_SECONDS, LOOK_SECONDS, STEP = 150, 6, 30, 5
STATED = re.compile(r"\b(\d+) minutes of reading")
_FOLDED = re.compile(r"<details.*?</details>", re.S)
_TARGET = re.compile(r"\]\((?:[^()\"]|\"[^\"]*\")*\)")
_LOOK = re.compile(r"\bshow(?:_source|_texts)?\(")


def prose(nb) -> str:
    """The notebook's prose without the targets and titles of its links."""
    return without_targets(" ".join(cell.source for cell in nb.cells if cell.cell_type == "markdown"))


def without_targets(text: str) -> str:
    """Markdown in which links have their text alone."""
    return _TARGET.sub("]", text)


def minutes(nb) -> int:
    """Minutes to read the notebook by the rule above, from its sources alone."""
    code = [cell.source.strip() for cell in nb.cells if cell.cell_type == "code"]
    words = len(_FOLDED.sub("", prose(nb)).split())
    seconds = (words / WORDS_A_MINUTE * 60 + LINE_SECONDS * sum(len(source.splitlines()) for source in code)
               + LOOK_SECONDS * sum(len(_LOOK.findall(source)) for source in code))
    return STEP * math.ceil(seconds / 60 / STEP)


def state(nb) -> None:
    """Write the minutes into the notebook's opening, where it names some."""
    if nb.cells and nb.cells[0].cell_type == "markdown":
        nb.cells[0].source = STATED.sub(f"{minutes(nb)} minutes of reading", nb.cells[0].source)


def stated(nb) -> int | None:
    """The minutes that the opening names."""
    found = STATED.search(nb.cells[0].source) if nb.cells else None
    return int(found[1]) if found else None
