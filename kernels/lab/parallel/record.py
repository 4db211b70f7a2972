"""A table that rank 0 writes, each row as soon as it is measured, while the other ranks go on."""
from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from ...model.parallel import Ranks
from ...ops.all_reduce import ranks as words
from .. import provenance, records


class Record:
    """Rows of one table; without a folder they go nowhere.

    folder  of this machine, or None
    done    the keys that this very code has recorded there, on all ranks alike; none if `again`
    """

    def __init__(self, table: records.Table, source: str, ranks: Ranks, folder=None, again: bool = False):
        self.table, self.folder, self.first, self.written = table, folder, ranks.first, 0
        mine = _recorded(table, source, folder) if folder and self.first and not again else frozenset()
        self.done: frozenset[tuple] = words.told_objects(mine, ranks.group)[0]
        if folder and self.first:
            with all_threads():
                records.note_machine(folder, table.file)

    def keep(self, rows: Sequence[dict]) -> None:
        if self.folder and self.first:
            self.table.merge(self.folder, rows)
            self.written += len(rows)

    def __str__(self):
        return f"recorded {self.written} rows in {self.folder / self.table.file}" if self.folder else "recorded nothing"


def _recorded(table, source, folder) -> frozenset[tuple]:
    rows = table.read(folder)
    same = rows[rows.source.isin(provenance.known_as(source))] if len(rows) else rows
    return frozenset(same[list(table.key)].itertuples(index=False, name=None))


@contextmanager
def all_threads() -> Iterator[None]:
    """A rank has one thread; the machine's name says how many there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def opened(out, name: str | None):
    """This machine's folder, as `records.open_machine` gives it."""
    with all_threads():
        return records.open_machine(out, name)
