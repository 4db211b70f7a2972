"""Random products: does any schedule, for however many tokens, move one bit of the trusted schedule's?

    python -m kernels products                               100 000 cases into data/<machine>/products.csv
    python -m kernels products --part 1/4 --seconds 100      a quarter, for one of four GPUs; goes on from what is there

A case is a weight, an input, a number of tokens and a schedule. Its rows are compared with those that the trusted
schedule (certificates.py) has for more tokens of the same input. Kernels are compiled for a kind of weights: what N and
K leave when divided by a span, the dtype, a bias or none, k cut or not. A form is a kind and a schedule; there are at
most --forms of them, compiled in processes of their own. A CPU runs schedules by pointer in Triton's interpreter.
"""
from __future__ import annotations

import argparse
import math
import os
import sys
import time
from functools import partial
from itertools import groupby
from random import Random
from typing import NamedTuple

import torch

from ... import bits, runtime
from ...op import DTYPES, Shape
from ...ops.matmul.op import matmul as op
from .. import bench, closure, provenance, records
from ..command import part
from .certificates import check_trusted, prove_all
from .products_drawn import ON_CPU, ON_GPU, Form, Kind, Scale, case_of, forms, tokens_of

PRODUCTS = records.Table(
    "products.csv",
    ("seed", "form", "dtype", "weights", "bias", "segments", "schedule", "cases", "differ", "first", "triton",
     "recorded_at", "source"), ("seed", "form"))
DRAWS = 2  # token counts of each schedule on one weight and input


class Tally(NamedTuple):
    """Of one form: cases, how many differ, the first that does, in words, (n, k, tokens) of the largest, and the error
    that ended them."""

    cases: int
    differ: int
    first: str
    largest: tuple[int, int, int]
    error: Exception | None = None


def compared(seed: int, of_kind: list[Form], cases: int, scale: Scale, device, until: float = float("inf")
             ) -> list[Tally]:
    """What `cases` cases of each form give, or as many as begin before `until` of time.monotonic.

    The forms share a kind; one that fails keeps the cases it had, and the others go on. Nothing waits for the GPU
    before the last case.
    """
    kind, given, flags, failed = of_kind[0].kind, [], [], {}
    rows = max(scale.most(f.schedule) for f in of_kind)
    for number in range(-(-cases // DRAWS)):
        if time.monotonic() > until:
            break
        draw = Random(f"{seed} {kind} {number}")
        case = case_of(draw, kind, rows, scale, device)
        for form in of_kind * DRAWS:
            tokens = tokens_of(draw, form, scale)  # for one that failed too: the others' cases stay the same
            if form.number in failed:
                continue
            try:
                y = op.run_schedule(form.schedule, case.x[:tokens], case.weight, case.bias)
            except Exception as error:  # noqa: BLE001 - one form's failure must not cost the others
                failed[form.number] = bench.without_frames(error)
                continue
            flags.append((bits.bits(y) != bits.bits(case.trusted[:tokens])).sum())
            given.append((form.number, number, tokens, case.weight.shape))
    differ = torch.stack(flags).tolist() if flags else []
    found = list(zip(given, differ, strict=True))
    return [_tally(seed, form, rows, scale, device, [f for f in found if f[0][0] == form.number],
                   failed.get(form.number)) for form in of_kind]


def _tally(seed, form, rows, scale, device, found, error) -> Tally:
    moved = [(count, *which[1:3]) for which, count in found if count]
    largest = max(((*weight, tokens) for (_, _, tokens, weight), _ in found), key=math.prod, default=(0, 0, 0))
    first = _told_or_not(seed, form, rows, scale, device, *moved[0]) if moved else ""
    return Tally(len(found), len(moved), first, largest, error)


def _told_or_not(seed, form, rows, scale, device, count, number, tokens) -> str:
    try:
        return told(seed, form, rows, scale, device, count, number, tokens)
    except Exception as error:  # noqa: BLE001 - that bits moved is known without it
        return (f"{form.kind} case {number} tokens={tokens} {form.schedule}: {count} elements; computed again: "
                f"{type(error).__name__}: {str(error)[:200]}")


def told(seed: int, form: Form, rows: int, scale: Scale, device, count: int, number: int, tokens: int) -> str:
    """A case that differs, computed again, with the first element in which it does."""
    case = case_of(Random(f"{seed} {form.kind} {number}"), form.kind, rows, scale, device)
    y, wanted = op.run_schedule(form.schedule, case.x[:tokens], case.weight, case.bias), case.trusted[:tokens]
    at = (bits.bits(y) != bits.bits(wanted)).nonzero()
    where = (f"row {at[0][0]}, column {at[0][1]}: {y[tuple(at[0])].item()!r} for {wanted[tuple(at[0])].item()!r}"
             if len(at) else "not when computed again")
    return f"{case.what} case {number} tokens={tokens} {form.schedule}: {count} elements; {where}"


def row_of(seed: int, form: Form, tally: Tally) -> dict:
    """The row of a form. Its source is that of the largest case: in lockstep a schedule refuses other token counts."""
    kind, (n, k, tokens) = form.kind, tally.largest
    shape = Shape(N=n, K=k, bias=True) if kind.bias else Shape(N=n, K=k)
    ran = n and k and tokens  # else nothing was launched
    launched = provenance.launches(op, str(form.schedule), kind.dtype, shape, tokens) if ran else []
    return {"seed": seed, "form": form.number, "dtype": kind.dtype, "bias": kind.bias,
            "weights": f"N {_sizes(kind, 0)}, K {_sizes(kind, 1)}", "segments": "several" if kind.cut else "one",
            "schedule": str(form.schedule), "cases": tally.cases, "differ": tally.differ, "first": tally.first,
            "triton": runtime.triton.__version__, "recorded_at": records.now(), "source": closure.of_launches(launched)}


def _sizes(kind: Kind, side: int) -> str:
    return " ".join(map(str, sorted({sizes[side] for sizes in kind.sizes})))


# the command


def jobs(found: list[Form]) -> list[dict]:
    """What certificates.prove_all compiles and compares for these forms, each at the largest weight of its kind."""
    return [{"schedule": str(f.schedule), "n": f.kind.sizes[-1][0], "k": f.kind.sizes[-1][1], "dtype": f.kind.dtype,
             "kinds": ["residue" if f.kind.bias else "portable"]} for f in found]


def left(found: list[Form], seed: int, cases: int, folder) -> list[list[Form]]:
    """The forms of each kind that has one without as many cases in the file."""
    rows = PRODUCTS.read(folder)
    done = {(form, schedule) for form, schedule, count in zip(rows.form, rows.schedule, rows.cases, strict=True)
            if count >= cases} if len(rows := rows[rows.seed == seed]) else set()
    kinds = [list(group) for _, group in groupby(found, lambda f: f.kind)]
    return [group for group in kinds if any((f.number, str(f.schedule)) not in done for f in group)]


def record(folder, a, scale: Scale, device) -> tuple[int, int, list[str]]:
    """Compile, compare and write, until all is done or the time is over: cases, how many differ, what went wrong."""
    say, number, of = partial(print, flush=True), *a.part
    every = forms(a.seed, a.forms, scale, runtime.HAS_GPU and runtime.has_pdl(device.index))
    kinds = list(dict.fromkeys(f.kind for f in every))[number - 1::of]
    each = -(-a.cases // len(every))
    todo, wrong = left([f for f in every if f.kind in kinds], a.seed, each, folder), []
    if runtime.HAS_GPU:
        todo, wrong = _compiled(todo, a.workers, device)
        say(*wrong, f"{sum(map(len, todo))} forms compiled and compared, {len(wrong)} failed", sep="\n")
    cases, differ, begun = 0, 0, time.monotonic()
    for i, group in enumerate(todo):
        try:
            tallies = compared(a.seed, group, each, scale, device, begun + a.seconds)
        except Exception as error:  # noqa: BLE001 - one kind's failure must not cost the others
            wrong.append(f"{group[0].kind}: {type(error).__name__}: {str(error)[:200]}")
            continue
        rows, bad = _rows(a.seed, group, tallies)
        PRODUCTS.merge(folder, rows)
        cases, differ = cases + sum(t.cases for t in tallies), differ + sum(t.differ for t in tallies)
        wrong += [*bad, *(t.first for t in tallies if t.differ)]
        say(f"{i + 1} of {len(todo)} kinds: {cases:,} cases in {time.monotonic() - begun:.0f} s, {differ} differ")
    return cases, differ, wrong


def _rows(seed: int, group: list[Form], tallies: list[Tally]) -> tuple[list[dict], list[str]]:
    """The rows of these forms, and in words what failed: a form, or its row."""
    rows, wrong = [], []
    for form, tally in zip(group, tallies, strict=True):
        errors = [tally.error] if tally.error else []
        try:
            rows += [row_of(seed, form, tally)] if tally.cases else []
        except Exception as error:  # noqa: BLE001 - as in `compared`
            errors.append(error)
        wrong += [f"{form.kind} {form.schedule}: {type(e).__name__}: {str(e)[:200]}" for e in errors]
    return rows, wrong


def _compiled(todo: list[list[Form]], workers, device) -> tuple[list[list[Form]], list[str]]:
    """The forms that compile and run, and what is wrong with the others.

    Raises RuntimeError where the trusted schedule is not the specification's.
    """
    found = [f for group in todo for f in group]
    for kind in dict.fromkeys(f.kind for f in found):
        check_trusted(*kind.sizes[-1], DTYPES[kind.dtype], device)
    answers = prove_all(jobs(found), workers or max(1, min(16, (os.cpu_count() or 2) - 1)))
    bad = {f.number: f"{f.kind} {f.schedule}: {answer}" for f, answer in zip(found, answers, strict=True) if answer}
    good = [[f for f in group if f.number not in bad] for group in todo]
    return [group for group in good if group], list(bad.values())


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels products", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100_000, help="in all parts together (default: 100 000)")
    parser.add_argument("--forms", type=int, default=400, help="the most kernels that are compiled (default: 400)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=600, help="of comparing, after the kernels are compiled")
    parser.add_argument("--part", type=part, default=(1, 1), help="such as 1/4: the first of four GPUs' share")
    parser.add_argument("--workers", type=int, help="processes that compile")
    parser.add_argument("--out", default=records.DATA, help="the data folder")
    parser.add_argument("--machine", help="the folder's name under it (default: from the device)")
    a = parser.parse_args(argv)
    if a.cases < 1 or a.forms < 1:
        parser.error(f"--cases and --forms must be at least 1, got {a.cases} and {a.forms}")
    folder = records.open_machine(a.out, a.machine)
    cases, differ, wrong = record(folder, a, ON_GPU if runtime.HAS_GPU else ON_CPU, runtime.device())
    records.note_machine(folder, PRODUCTS.file)
    print(*wrong, f"{differ} of {cases:,} cases differ", sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
