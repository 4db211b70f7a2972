"""The list of faults, and one of them planted in a copy of the tree."""
from __future__ import annotations

import csv
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
LIST = Path(__file__).with_name("faults.tsv")
_LEFT_OUT = (".git", ".venv", "build", "__pycache__", ".hypothesis", ".*_cache", "*.egg-info")


class Fault(NamedTuple):
    """One change that a test should notice.

    file   where, from the root of the tree
    old    text that stands there exactly once
    new    what takes its place
    tests  what should notice, as arguments of pytest
    """

    file: str
    old: str
    new: str
    tests: str

    def __str__(self):
        return f"{self.file}: {self.old.strip()}  ->  {self.new.strip() or '(nothing)'}"

    def planted_in(self, text: str) -> str:
        """The file's text with the fault. ValueError unless the old text stands there exactly once."""
        if (count := text.count(self.old)) != 1:
            raise ValueError(f"{self.file}: found {count} times instead of once: {self.old}")
        return text.replace(self.old, self.new)


def listed(path: Path = LIST) -> list[Fault]:
    """The faults of a list: four columns between tabs, one line a fault; lines that begin with # divide them."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    header, *rows = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    if tuple(header) != Fault._fields:
        raise ValueError(f"{path} must have the columns {', '.join(Fault._fields)}, got {', '.join(header)}")
    return [Fault(*row) for row in rows]


def copied(folder: Path, root: Path = ROOT) -> Path:
    """A copy of the tree in `folder`, without what git, a set-up and caches keep there."""
    return Path(shutil.copytree(root, folder / "tree", ignore=shutil.ignore_patterns(*_LEFT_OUT)))


@contextmanager
def planted(fault: Fault, tree: Path) -> Iterator[None]:
    """The fault stands in the tree for as long as this lasts."""
    path = tree / fault.file
    before = path.read_bytes()
    path.write_bytes(fault.planted_in(before.decode()).encode())
    try:
        yield
    finally:
        path.write_bytes(before)
