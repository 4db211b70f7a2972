"""A laptop recomputes a GPU: a model's digests, layer by layer, redone here and compared with the record.

    python -m kernels verify                    redo all that is recorded: two minutes on two cores
    python -m kernels verify --form window      64 tokens of real text as one window: seconds
    python -m kernels verify --record           write this machine's digests into data/<machine>/model_digests.csv

A GPU records what its schedules give. To redo, a CPU uses the specification; where there is a GPU, its schedules are
held to the record too. The status is 1 if one digest differs. What the forms are: model_forms.py, beside this file.
"""
from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import pandas as pd
import torch

from ... import runtime
from .. import provenance, records
from . import model_forms
from .model_forms import CASES, FOLDER, FORMS, Case, Run, run

MODEL_DIGESTS = records.Table(
    "model_digests.csv",
    ("model", "shared", "form", "tokens", "part", "implementation", "digest", "text", "recorded_at", "source"),
    ("model", "shared", "form", "tokens", "part"),
)
_TEXT_OF = "tokens"  # the part whose row holds the text that `greedy` chose
SPECIFICATION, SCHEDULES = "python", "triton"
_WHY = {"weights": "the weights are not those of the record", "prompt": "the text is not that of the record",
        "tokens": "every logit agrees, and another token was chosen"}


@dataclass(frozen=True)
class Part:
    """One digest of a run: as recorded and as it came out here; '' where there is none."""

    name: str
    recorded: str
    here: str

    @property
    def same(self) -> bool:
        return self.recorded == self.here


@dataclass(frozen=True)
class Verdict:
    """One case redone: its parts in the order of the forward. True if all are as recorded."""

    machine: str
    case: Case
    parts: tuple[Part, ...]
    recorded_text: str
    run: Run

    def __bool__(self):
        return all(part.same for part in self.parts)

    @property
    def why(self) -> str:
        """What differs first, in a sentence; '' if nothing does."""
        first = next((part for part in self.parts if not part.same), None)
        if first is None:
            return ""
        if not first.recorded:
            return f"{self.case}: {self.machine} has no record of {first.name}"
        what = _WHY.get(first.name, f"{first.name} is the first part whose bits differ from {self.machine}'s")
        return f"{self.case}: {what}: recorded {first.recorded[:16]}, here {first.here[:16] or 'none'}"


def record(folder, device=None, model=FOLDER) -> int:
    """Run every case and write its digests to folder/model_digests.csv; how many there are.

    Raises RuntimeError, and writes nothing, if a window and its cached decode steps differ in a digest.
    """
    device, rows = torch.device(device or runtime.device()), []
    runs = {case: run(case, device, model) for case in CASES}
    for case, done in runs.items():
        one_by_one = runs.get(Case(case.model, case.shared, "decode", case.tokens), done)
        if case.form == "window" and one_by_one.digests != done.digests:
            raise RuntimeError(f"{case} and as decode steps differ on {device}; nothing is recorded")
        rows += _rows(case, done, SCHEDULES if device.type == "cuda" else SPECIFICATION)
    MODEL_DIGESTS.merge(folder, rows)
    return len(rows)


def _rows(case: Case, done: Run, implementation: str) -> Iterator[dict]:
    for name, digest in done.digests.items():
        yield {**vars(case), "part": name, "implementation": implementation, "digest": digest,
               "text": done.text if name == _TEXT_OF else "", "recorded_at": records.now(),
               "source": provenance.source(model_forms.__file__)}


def recorded(machine: str | None = None, out=records.DATA) -> pd.DataFrame:
    """One machine's record, by default that of the first that has one (a GPU of this suite's, if any has).

    Raises FileNotFoundError where there is none, ValueError for a file that is damaged or holds unknown runs.
    """
    if not records.machines(MODEL_DIGESTS.file, out):
        raise FileNotFoundError(f"no machine has recorded {MODEL_DIGESTS.file} in {out}: on a GPU, "
                                "python -m kernels verify --record")
    rows = records.load(MODEL_DIGESTS, machine, out)
    rows = rows.assign(text=rows.text.astype(object).fillna(""))
    where = f"{out}/{rows.machine.iloc[0] if len(rows) else machine}/{MODEL_DIGESTS.file}"
    if not len(rows):
        raise ValueError(f"{where} holds no rows: record again")
    for row in rows.itertuples():
        if Case(row.model, row.shared, row.form, row.tokens) not in CASES:
            raise ValueError(f"{where}: no run of this suite is {row.model}, shared={row.shared}, {row.form} of "
                             f"{row.tokens} tokens")
        if not isinstance(row.digest, str) or len(row.digest) != 64:
            raise ValueError(f"{where}: {row.part} of {row.form} must have a digest of 64 hex digits, got "
                             f"{row.digest!r}")
    return rows


def redo(form: str = "window", shared: int = 1, tokens: int | None = None, machine: str | None = None, device="cpu",
         out=records.DATA, model=FOLDER) -> Verdict:
    """Redo one form and compare it with a machine's record; on a CPU by the specification alone.

    tokens   of the run, by default the most that this form has
    model    the folder of the byte model

    Raises ValueError for a run that there is not; see `recorded` and `model_forms.run` for the rest.
    """
    wanted = [case for case in CASES if (case.form, case.shared) == (form, shared) and tokens in (None, case.tokens)]
    if not wanted:
        raise ValueError(f"there is no {form!r} with shared={shared!r} and tokens={tokens!r}: form must be one of "
                         f"{', '.join(FORMS)}, shared 1 or 8, tokens those of model_forms.CASES")
    case = max(wanted, key=lambda case: case.tokens)
    return compared(recorded(machine, out), case, run(case, device, model))


def compared(rows: pd.DataFrame, case: Case, done: Run) -> Verdict:
    """A run beside what one machine recorded of the case."""
    mine = rows[(rows.model == case.model) & (rows.shared == case.shared) & (rows.form == case.form)
                & (rows.tokens == case.tokens)]
    there = dict(zip(mine.part, mine.digest, strict=True))
    parts = tuple(Part(name, there.get(name, ""), done.digests.get(name, "")) for name in {**done.digests, **there})
    return Verdict(rows.machine.iloc[0], case, parts, "".join(mine.text), done)


def verify(tables: Iterable[pd.DataFrame], forms: Iterable[str] = FORMS, device="cpu", model=FOLDER
           ) -> Iterator[Verdict]:
    """Redo every case of these forms, once each, and compare it with every machine's record (`recorded`)."""
    tables = list(tables)
    for case in (case for case in CASES if case.form in set(forms)):
        done = run(case, device, model)
        yield from (compared(rows, case, done) for rows in tables)


def _table(verdict: Verdict, by: str) -> str:
    lines = [f"{verdict.case}: {verdict.machine}'s record, {by} here, {verdict.run.seconds:.1f} s"]
    for part in verdict.parts:
        sign = "✓" if part.same else "✗ differs"
        lines.append(f"  {part.name:10}  {part.recorded[:16]:16}  {part.here[:16]:16}  {sign}")
    if verdict.run.text:
        lines.append(f"  text        {verdict.run.text}")
    if verdict.recorded_text != verdict.run.text:
        lines.append(f"  recorded    {verdict.recorded_text}")
    return "\n".join(lines) + "\n"


def _checked(a: argparse.Namespace) -> int:
    names = [a.machine] if a.machine else records.machines(MODEL_DIGESTS.file, a.out) or [None]
    tables = [recorded(name, a.out) for name in names]
    devices = dict.fromkeys([a.device] if a.device else [str(runtime.device()), "cpu"])
    verdicts = []
    for device in devices:
        by = "the specification on a CPU" if torch.device(device).type == "cpu" else f"schedules on {device}"
        for verdict in verify(tables, a.form or FORMS, device, a.folder):
            print(_table(verdict, by), flush=True)
            verdicts.append(verdict)
    wrong = [verdict.why for verdict in verdicts if not verdict]
    print(*wrong, f"{len(verdicts) - len(wrong)} of {len(verdicts)} runs have every digest as recorded", sep="\n")
    return 1 if wrong else 0


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels verify", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="record this machine instead of redoing a record")
    parser.add_argument("--form", nargs="+", choices=FORMS, help="redo these alone (default: all)")
    parser.add_argument("--machine", help="whose record, or the folder's name to record into")
    parser.add_argument("--out", default=records.DATA, help="the data folder")
    parser.add_argument("--folder", default=FOLDER, help="the byte model's folder (default: data/models/byte)")
    parser.add_argument("--device", help="where to run, such as cpu (default: the GPU, if there is one, "
                                         "and to redo a CPU as well)")
    a = parser.parse_args(argv)
    if not a.record:
        return _checked(a)
    if a.form:
        parser.error("--record records every form; leave --form out")
    folder = records.open_machine(a.out, a.machine)
    print(f"recorded {record(folder, a.device, a.folder)} digests in {folder / MODEL_DIGESTS.file}")
    records.note_machine(folder, MODEL_DIGESTS.file)
    return 0
