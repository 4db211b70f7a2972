"""A recorded table as a file: its form, held to when it is read, and writers that wait for each other.

A file is written whole or not at all, and rows that are not replaced keep their cells as they are written.
"""
from __future__ import annotations

import csv
import errno
import io
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import pandas as pd
from filelock import FileLock

# columns of any table that hold numbers, or one of True and False; an empty cell is a value that was not measured
NUMBERS = frozenset((
    "tokens", "us_p05", "us_p20", "us_p50", "us_p80", "us_p95", "repeats", "gbytes_per_s", "tflops", "elements_differ",
    "rows", "seed", "prefix", "group", "ms_p05", "ms_p50", "ms_p95", "ms_per_token_p50", "floor_ms", "share_differ",
    "largest_ulp", "distinct", "trials", "k", "block", "fraction_bits", "outputs", "mismatches", "not_nearest", "nan",
    "infinite", "subnormal", "zero", "gpus", "batch", "context"))
TRUTHS = frozenset(("same_bits",))


@dataclass(frozen=True)
class Table:
    """The form of one CSV: its file name, its columns in order, and the columns that are its key."""

    file: str
    columns: tuple[str, ...]
    key: tuple[str, ...]

    def read(self, folder) -> pd.DataFrame:
        """The table in this folder; empty if there is none. Raises ValueError for a file of another form."""
        path, keys = Path(folder) / self.file, list(self.key)
        table = self._typed(self._cells(path))
        twice = table[table.duplicated(keys)]
        if len(twice):
            raise ValueError(f"{path}: two rows have the key {', '.join(map(str, twice[keys].iloc[0]))}")
        return table

    def merge(self, folder, rows, instead: Mapping = MappingProxyType({})) -> pd.DataFrame:
        """Write these rows (dicts or a DataFrame) over those with the same key; returns the whole table.

        instead  column -> value: rows that have all of these values go, whatever their keys

        Rows with other keys keep their cells as they are written. Raises ValueError for rows or a file of another
        form, OSError where it cannot be written; the file is then as it was.
        """
        path, keys = made(folder) / self.file, list(self.key)
        given = pd.DataFrame(rows, columns=list(self.columns))
        new = _parsed(given.to_csv(index=False, float_format="%.6g", lineterminator="\n"))[1:]
        self._hold(new, f"rows for {path}")
        with turn(path):
            cells = [*self._without(self._cells(path), instead), *new]
            table = self._typed(cells)
            table = table[~table.duplicated(keys, keep="last")].sort_values(keys, kind="stable")
            write_atomic(path, _comments(path) + _text([self.columns, *(cells[i] for i in table.index)]))
        return table.reset_index(drop=True)

    def _without(self, cells: list[list[str]], values: Mapping) -> list[list[str]]:
        """The rows that lack one of these values at least."""
        table = self._typed(cells)
        gone = [all(row[column] == value for column, value in values.items()) for _, row in table.iterrows()]
        return [row for row, out in zip(cells, gone, strict=True) if not (values and out)]

    def _cells(self, path: Path) -> list[list[str]]:
        """The rows of a file as they are written, without empty ones and comments. ValueError names what is wrong."""
        if not path.exists():
            return []
        try:
            header, *rows = _parsed(path.read_bytes().decode("utf-8-sig"))
        except (csv.Error, ValueError) as error:
            raise ValueError(f"{path} is not a readable CSV table: {error}") from None
        if tuple(header) != self.columns:
            odd = sorted(set(header) ^ set(self.columns)) or "the same columns in another order"
            raise ValueError(f"{path} is not a {self.file} of this suite: {odd}. Move it away and record again.")
        self._hold(rows, path)
        return rows

    def _hold(self, rows, where) -> None:
        for row in rows:
            for fault in self._faults(row):
                raise ValueError(f"{where}: {fault} in the row {','.join(row)[:60]}")

    def _faults(self, row: list[str]) -> Iterator[str]:
        if len(row) != len(self.columns):
            yield f"{len(row)} cells instead of {len(self.columns)}"
        for name, cell in zip(self.columns, row, strict=False):
            if not cell and name in self.key:
                yield f"{name} is empty"
            if cell and name in TRUTHS and cell.lower() not in ("true", "false"):
                yield f"{name} must be True or False, got {cell!r}"
            if cell and name in NUMBERS and not _is_number(cell):
                yield f"{name} must be a number such as 1.5, got {cell!r}"

    def _typed(self, cells: list[list[str]]) -> pd.DataFrame:
        if not cells:
            return pd.DataFrame(columns=list(self.columns))
        return pd.read_csv(io.StringIO(_text([self.columns, *cells])), dtype={"digest": str, "source": str})


def _parsed(text: str) -> list[list[str]]:
    """The cells of each line of a CSV, but for comments and for lines of nothing but commas. ValueError without any."""
    rows = [row for row in csv.reader(io.StringIO(text, newline=""), strict=True)
            if any(row) and not row[0].startswith("#")]
    if not rows or "\0" in text:
        raise ValueError("it holds bytes of value 0" if rows else "it is empty")
    return rows


def _text(rows) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    return out.getvalue()


def _comments(path: Path) -> str:
    """The lines of a file that begin with #; they stand first in what is written over it."""
    lines = path.read_text(encoding="utf-8-sig").splitlines() if path.exists() else []
    return "".join(f"{line}\n" for line in lines if line.startswith("#"))


def _is_number(cell: str) -> bool:
    try:
        return "_" not in cell and float(cell) is not None
    except ValueError:
        return False


def made(folder) -> Path:
    """This folder, made if it was not there. Raises OSError that names it."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        file = next((place for place in (Path(folder), *Path(folder).parents) if place.is_file()), None)
        why = f"{file} is a file" if file else error.strerror
        raise OSError(error.errno, f"{folder} cannot be a folder to write into: {why}") from None
    return Path(folder)


@contextmanager
def turn(path: Path) -> Iterator[None]:
    """Wait until no other process writes this file, and keep others waiting. Raises OSError that names it."""
    lock = FileLock(f"{path}.lock")
    try:
        lock.acquire()
    except (OSError, NotImplementedError) as error:
        why = getattr(error, "strerror", None) or error
        raise OSError(getattr(error, "errno", None) or errno.ENOLCK, f"could not write {path}: {why}") from None
    try:
        yield
    finally:
        lock.release()


def write_atomic(path: Path, content: str | bytes) -> None:
    """Replace the file whole, or leave it as it was and raise OSError that names it. Text is written in UTF-8."""
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            temporary = file.name
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        if temporary and os.path.exists(temporary):
            os.unlink(temporary)
        raise OSError(error.errno, f"could not write {path} (the file there is unchanged): {error.strerror}") from error
