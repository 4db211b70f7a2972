"""Copies of the notebooks for a class: without solutions and without outputs.

    python -m kernels student            every notebook, into build/student
    python -m kernels student 00 01      these

The copies take the place of notebooks/ in a student's clone: links lead to the same files. The graders stay.
"""
from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from .. import records
from ..notebook import run
from .cells import without_solutions

OUT = records.ROOT / "build" / "student"


def build(out=OUT, names=("all",)) -> list[Path]:
    """Write the copies, and the texts beside the notebooks but TEACHING.md. ValueError for a solution not folded."""
    out = Path(out)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    copies = []
    for path in run.find(list(names)):
        copies.append(out / path.name)
        copies[-1].write_text(run.as_text(copy(run.read(path))), encoding="utf-8")
    for path in run.NOTEBOOKS.glob("*.md"):
        if path.name != "TEACHING.md":  # it has the answers
            shutil.copy(path, out / path.name)
    return copies


def copy(nb):
    """The notebook, changed in place, as a student gets it."""
    without_solutions(nb)
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return nb


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels student", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=["all"], help="notebooks: numbers, or all (default)")
    parser.add_argument("--out", type=Path, default=OUT, help="the folder to write, which is emptied first")
    a = parser.parse_args(argv)
    if a.out.resolve() == run.NOTEBOOKS:
        raise ValueError(f"--out must be another folder than that of the notebooks, got {a.out}")
    if a.out.exists() and any(path.suffix not in (".ipynb", ".md") for path in a.out.iterdir()):
        raise ValueError(f"--out must be a folder of earlier copies or an empty one, got {a.out}")
    for path in build(a.out, a.names):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
