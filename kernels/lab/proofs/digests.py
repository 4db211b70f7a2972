"""Digests: a machine's bits over thousands of rows, small enough to commit and to redo anywhere.

    python -m kernels digests                  record this machine into data/<machine>/digests.csv
    python -m kernels digests softmax mean     the same, these ops alone
    python -m kernels digests --check          redo every recorded digest here, with the specification,
                                               and those in token sweeps that are quickly redone
    python -m kernels digests --check --every 8    every eighth of them

A GPU records `triton`, after finding `python` on the same GPU equal to it; a CPU records `python`.
"""
from __future__ import annotations

import argparse
import operator
import sys
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from functools import cache
from pathlib import Path

import torch

from ... import OPS, bits, runtime
from ...op import DTYPES, Op, Shape
from ...ops.all_reduce import all_reduce
from ...ops.matmul.shared import joined
from .. import older, provenance, records
from .certificates import CERTIFICATES

DIGESTS = records.Table(
    "digests.csv",
    ("op", "implementation", "dtype", "shape", "rows", "seed", "input", "schedule", "digest", "recorded_at", "source"),
    ("op", "implementation", "dtype", "shape", "rows", "seed", "input"),
)
ROWS, ADVERSARIAL_ROWS, MANY_ROWS = 256, 32, 4096  # a CPU redoes them in about ten seconds
_RMS_NORM_WIDTHS = (4096, 5120, 7168, 8192, 1000, 20000)
_SOFTMAX_SHAPES = ("D=100", "D=333", "D=1000", "D=32000", "D=40000")
_MATMUL_SHAPES = ("N=8,K=256", "N=4,K=520", "N=48,K=512", "N=33,K=72,bias", "N=16,K=1200,bias", "N=8,K=4096",
                 "N=8,K=512,gpus=8", "N=4,K=530,bias,gpus=8")
_SUM_SHAPES = ("D=8192", "D=1000", "D=333", "D=20001", "D=1100,inner=8")
_ROTARY_SHAPES = ("H=5,D=128,context=1000", "H=3,D=64,context=4096", "H=2,D=80,context=333")
_SWIGLU_SHAPES = ("F=14336", "F=512", "F=1000", "F=77")
SHAPES = {"rms_norm": tuple(f"D={width}{residual}" for width in _RMS_NORM_WIDTHS for residual in ("", ",residual")),
          "softmax": _SOFTMAX_SHAPES, "log_softmax": _SOFTMAX_SHAPES, "sum": _SUM_SHAPES, "mean": _SUM_SHAPES,
          "matmul": _MATMUL_SHAPES, "rotary": _ROTARY_SHAPES, "swiglu": _SWIGLU_SHAPES}
_MANY_SHAPES = {"rms_norm": ("D=4096,residual", "D=1000"), "sum": ("D=1000", "D=333"), "mean": ("D=1000", "D=333"),
                "softmax": ("D=100", "D=333"), "log_softmax": ("D=100", "D=333"),
                "matmul": ("N=8,K=256", "N=4,K=520"), "rotary": ("H=3,D=64,context=4096", "H=2,D=80,context=333"),
                "swiglu": ("F=512", "F=77")}
MANY = {(op, shape, dtype) for op, shapes in _MANY_SHAPES.items() for shape in shapes
        for dtype in ("bfloat16", "float32")}
FEW_ROWS, FEW_ADVERSARIAL_ROWS = 8, 3  # a CPU takes 0.1 us for an exponential
# attention: (shape, rows) of sequences that cross blocks and leaves; a row is a query, of all heads
QUERIES = {"attention_decode": (("H=8,KV=2,D=128,context=1500", 2), ("H=4,KV=1,D=64,context=2100", 2)),
           "attention_prefill": (("H=4,KV=2,D=128", 260), ("H=4,KV=1,D=80", 150)),
           "attention_chunk": (("H=4,KV=2,D=128,context=1000", 40), ("H=4,KV=2,D=64,context=2040", 16))}
FEW = {(op, shape) for op in ("softmax", "log_softmax") for shape in ("D=32000", "D=40000")} | {("swiglu", "F=14336")}


@dataclass(frozen=True)
class Case:
    """One input, named so that any machine can make it again: the fields are columns of digests.csv."""

    op: str
    dtype: str
    shape: str
    rows: int
    seed: int
    input: str


def cases(op: Op, seed: int = 0) -> Iterator[Case]:
    """Every case of an op: its shapes, dtypes, portable inputs and each adversarial kind; attention has two seeds."""
    if op.name in QUERIES:
        yield from (Case(op.name, dtype, shape, rows, seed + i, "portable") for shape, rows in QUERIES[op.name]
                    for dtype in ("bfloat16", "float16") for i in range(2))
        return
    for shape in SHAPES.get(op.name, op.shapes):
        for dtype in DTYPES:
            few = (op.name, shape) in FEW
            rows = FEW_ROWS if few else MANY_ROWS if (op.name, shape, dtype) in MANY else ROWS
            yield Case(op.name, dtype, shape, rows, seed, "portable")
            for kind in bits.ADVERSARIAL:
                yield Case(op.name, dtype, shape, FEW_ADVERSARIAL_ROWS if few else ADVERSARIAL_ROWS, seed, kind)


def arguments(case: Case, device="cpu") -> tuple:
    """The op's own inputs; attention's result has lse besides, which is float32.

    For an adversarial kind, each per-token argument i of numbers is made with seed + i instead; places stay.
    """
    op, dtype, portable = OPS[case.op], DTYPES[case.dtype], case.input == "portable"
    made = list(op.inputs(case.rows, Shape.parse(case.shape), dtype, device, case.seed))
    if case.op in QUERIES:
        made += [0, True]  # no window, with lse
    for i in () if portable else op.per_token:
        if made[i] is not None and made[i].is_floating_point():
            row = made[i].shape[1:]
            hard = bits.adversarial(case.input, case.rows, row.numel(), dtype, device, case.seed + i)
            made[i] = hard.unflatten(1, row)
    return tuple(made)


@cache
def specified(case: Case) -> str:
    """The digest that the specification gives on this machine's CPU."""
    return bits.digest(OPS[case.op].python(*arguments(case)))


def measured(case: Case, device) -> dict:
    """One row: the digest of `triton` on a GPU, or of `python` on a CPU. Raises RuntimeError if the two differ."""
    op, given = OPS[case.op], arguments(case, device)
    result, implementation, schedule = op.python(*given), "python", ""
    if torch.device(device).type == "cuda":
        specification, result, implementation = result, op.triton(*given), "triton"
        schedule = op.schedule(case.rows, case.shape, DTYPES[case.dtype])
        if not bits.same_bits(specification, result):
            count = bits.elements_differ(specification, result)
            raise RuntimeError(f"{case}: triton and python differ on this GPU in {count} elements; nothing is recorded")
    return {**vars(case), "implementation": implementation, "schedule": schedule, "digest": bits.digest(result),
            "recorded_at": records.now(),
            "source": provenance.of_row(op, implementation, case.dtype, case.shape, case.rows, schedule=schedule)}


def record(folder, device=None, ops=tuple(OPS)) -> int:
    """Measure every case of these ops and write them to folder/digests.csv, op by op; how many there are."""
    device, count = device or runtime.device(), 0
    for op in ops:
        rows = [measured(case, device) for case in cases(OPS[op])]
        DIGESTS.merge(folder, rows)
        count += len(rows)
    return count


def check(out=records.DATA, every: int = 1) -> tuple[int, list[str]]:
    """Redo every n-th digest recorded under `out` on this CPU: how many these are, and one line for each that differs.
    """
    count, wrong = 0, []
    for path in sorted(Path(out).glob(f"*/{DIGESTS.file}")):
        for row in DIGESTS.read(path.parent)[::every].itertuples():
            case = Case(row.op, row.dtype, row.shape, int(row.rows), int(row.seed), row.input)
            count += 1
            if specified(case) != row.digest:
                wrong.append(f"{path.parent.name} {' '.join(map(str, astuple(case)))}: recorded {row.digest}, "
                             f"here {specified(case)}")
    return count, wrong


def check_sweeps(out=records.DATA, every: int = 1) -> tuple[int, list[str]]:
    """Redo on this CPU every n-th of the `quick_points`: how many these are, and one line for each that differs."""
    points, wrong = quick_points(out)[::every], []
    for machine, row in points:
        if redo(row) != row.digest:
            wrong.append(f"{machine} {row.op} {row.dtype} {row.shape} {row.tokens} tokens: recorded {row.digest}, "
                         f"here {redo(row)}")
    return len(points), wrong


def quick_points(out=records.DATA, most_bytes: int = 1 << 22) -> list[tuple]:
    """The `sweep_points` that touch up to `most_bytes`."""
    ops = {**OPS, all_reduce.name: all_reduce}
    return [(machine, row) for machine, row in sweep_points(out)
            if ops[row.op].work(row.tokens, row.shape, DTYPES[row.dtype]).bytes <= most_bytes]


def sweep_points(out=records.DATA) -> list[tuple]:
    """(machine, row) of every point at which a GPU's token sweep recorded `triton`: 16 digits of a digest."""
    found = []
    for machine in records.machines(out=out):
        rows = records.load(machine=machine, out=out)
        rows = rows[(rows.implementation == "triton") & (not machine.startswith("cpu"))]
        found += [(machine, row) for row in rows.drop_duplicates(["op", "dtype", "shape", "tokens"]).itertuples()]
    return found


def redo(row) -> str:
    """The digest that the specification gives on this machine's CPU at one point of a token sweep."""
    if row.op == all_reduce.name:  # every GPU's part is made here, and none is sent
        parts = [all_reduce.inputs(row.tokens, row.shape, rank=i)[0] for i in range(Shape.parse(row.shape)["gpus"])]
        return bits.digest(joined(parts, None, DTYPES[row.dtype]))[:16]
    op = OPS[row.op]
    return bits.digest(op.python(*op.inputs(row.tokens, row.shape, DTYPES[row.dtype])))[:16]


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels digests", description=__doc__.splitlines()[0])
    parser.add_argument("ops", nargs="*", metavar="op", help=f"which to record: {', '.join(OPS)} (default: all)")
    parser.add_argument("--out", default=records.DATA, help="the data folder")
    parser.add_argument("--machine", help="the folder's name under it (default: from the device)")
    parser.add_argument("--check", action="store_true", help="redo what is recorded instead of recording")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="redo every N-th alone")
    a = parser.parse_args(argv)
    if a.every < 1:
        parser.error(f"--every must be at least 1, got {a.every}")
    if unknown := set(a.ops) - set(OPS):
        parser.error(f"op must be one of {', '.join(OPS)}, got {', '.join(sorted(unknown))}")
    try:
        if a.check:
            return _report(a.out, *map(operator.add, check(a.out, a.every), check_sweeps(a.out, a.every)))
        folder = records.open_machine(a.out, a.machine)
        print(f"recorded {record(folder, ops=a.ops or tuple(OPS))} digests in {folder / DIGESTS.file}")
        records.note_machine(folder, DIGESTS.file)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _report(out, count: int, wrong: list[str]) -> int:
    print(*wrong, sep="\n", end="\n" if wrong else "")
    print(f"{count - len(wrong)} of {count} digests reproduced on a CPU ({torch.backends.cpu.get_cpu_capability()})")
    for table in (records.TOKEN_SWEEP, DIGESTS, CERTIFICATES):
        print(*(f"older code: {line}\n" for line in older.listed(table, out)), sep="", end="")
    return 1 if wrong or not count else 0


if __name__ == "__main__":
    sys.exit(main())
