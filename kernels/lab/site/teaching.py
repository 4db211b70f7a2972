"""The paths of notebooks/TEACHING.md: their sections and minutes, and how long their cells run here.

    python -m kernels teaching              run the notebooks of the 90 minutes, section by section, and time them
    python -m kernels teaching "Half a day"

The notebooks are not changed.
"""
from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from dataclasses import dataclass
from datetime import datetime

from .. import records
from ..notebook import run
from .cells import FENCE

TEACHING = records.ROOT / "notebooks" / "TEACHING.md"
PATHS = ("90 minutes", "Half a day")
MINUTES = {"90 minutes": 90, "Half a day": 210}
MOST_SECONDS = 600  # that the cells of the 90 minutes may run, on two cores
_ROW = re.compile(r"^\|\s*(\d+) \| (.+?) \|\s*(.*?)\s*\|$", re.M)
LINK = re.compile(r"\]\((\d\d[a-z]?_\w+\.ipynb)#([^)\s]+)\)")


@dataclass(frozen=True)
class Step:
    """One line of a path: its minutes, its sections as (notebook's file name, anchor), and what to do."""

    minutes: int
    sections: tuple[tuple[str, str], ...]
    todo: str


def steps(path: str, text: str | None = None) -> list[Step]:
    """The lines of a path. ValueError for a path that TEACHING.md does not have."""
    text = TEACHING.read_text(encoding="utf-8") if text is None else text
    found = re.search(rf"^## {re.escape(path)}\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    if found is None or path not in PATHS:
        raise ValueError(f"path must be one of {', '.join(PATHS)}, each a section of {TEACHING.name}, got {path!r}")
    return [Step(int(minutes), tuple(LINK.findall(section)), todo)
            for minutes, section, todo in _ROW.findall(found[1])]


def notebooks(path: str) -> list[str]:
    """The files of the notebooks that a path walks through, in order."""
    return sorted({name for step in steps(path) for name, _ in step.sections})


def anchors(nb) -> list[tuple[int, str]]:
    """(index of the cell, anchor) of each heading."""
    found = []
    for index, cell in enumerate(nb.cells):
        if cell.cell_type == "markdown":
            found += [(index, anchor(line)) for line in re.findall(r"^#{1,3} (.+)$", FENCE.sub("", cell.source), re.M)]
    return found


def anchor(heading: str) -> str:
    """`2. Batch size` -> `2.-Batch-size`: where a link into a notebook leads, in JupyterLab and on GitHub.

    Capitals count. The site's pages have another name for it, which staging.py writes.
    """
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    return re.sub(r"[`*]", "", plain).strip().replace(" ", "-")


def seconds(nb, cwd, name: str, timeout: float = 600) -> dict[str, float]:
    """anchor of a section -> how long its cells ran, in seconds. Raises run.NotebookError where one fails."""
    times: Counter = Counter()
    ended = run.execute(nb, cwd, timeout, name, timing=True)
    places = anchors(ended)
    for index, cell in enumerate(ended.cells):
        when = cell.metadata.get("execution", {})
        if "shell.execute_reply" in when:
            took = datetime.fromisoformat(when["shell.execute_reply"]) - datetime.fromisoformat(
                when["iopub.status.busy"])
            times[next((place for at, place in reversed(places) if at <= index), "")] += took.total_seconds()
    return dict(times)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels teaching", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", nargs="?", default=PATHS[0], help=f"one of {', '.join(PATHS)} (default: {PATHS[0]})")
    a = parser.parse_args(argv)
    total = 0.0
    for name in notebooks(a.path):
        file = run.NOTEBOOKS / name
        found = seconds(run.read(file), file.parent, name)
        print(f"{name}: {sum(found.values()):.0f} s")
        print(*(f"{took:8.1f} s  {section}\n" for section, took in found.items()), sep="", end="")
        total += sum(found.values())
    print(f"{a.path}: the cells of {len(notebooks(a.path))} notebooks ran {total:.0f} s here")
    return 0


if __name__ == "__main__":
    sys.exit(main())
