"""Find the fastest schedules of the matrix product on this GPU, prove their bits, and keep them.

    python -m kernels tune --shape 4096,4096 28672,4096 --tokens 1 16 64 256 1024 4096
    python -m kernels tune --best 24    what the model of time expects to be fastest, in place of lists of candidates
    python -m kernels tune --gpus 8 --shape 4096,4096 4096,14336    the order that up to eight GPUs can share

Candidates of all shapes are compiled and compared with a trusted schedule (proofs/certificates.py): one that does
not compile, fails or moves a bit is left out, with a line that says why. The rest are timed `cold` and interleaved.
The best go to data/schedules/<gpu>.json, what they were compared on to data/<machine>/certificates.csv.
"""
from __future__ import annotations

import argparse
import json
import math
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache, partial
from pathlib import Path

import torch
from filelock import FileLock

from ... import bits, runtime, tables
from ...op import DTYPES, Shape, dtype_name
from ...ops.matmul import cost
from ...ops.matmul.choice import choose
from ...ops.matmul.op import matmul as op
from ...ops.matmul.order import shared_order
from ...ops.matmul.schedule import Schedule
from ...ops.matmul.ways import Form
from .. import bench, records
from ..proofs.certificates import CERTIFICATES, SECTIONS, TRUSTED, certificates, check_trusted, prove_all, stand_in
from .candidates import candidates
from .shared_candidates import shared_candidates

TOKENS = (1, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
FEW, NEARLY = 64, 1.03  # up to FEW tokens, a schedule with pointers may take NEARLY times as long as the fastest


def expected(n: int, k: int, tokens: int, dtype: torch.dtype, index: int, most: int) -> list[Schedule]:
    """The `most` schedules that the model expects to be fastest on GPU `index`, and the one that is chosen today.

    Raises ValueError where this GPU has no such model.
    """
    found = cost.best(Form.of(n, k, tokens, dtype), most, index)
    if not found:
        raise ValueError("there is no model of time for this GPU: python -m kernels.lab.tuning.cost_fit, or no --best")
    return list(dict.fromkeys([*found, next(choose("matmul", Shape(N=n, K=k), dtype, tokens, index))]))


# timing


def fastest(n: int, k: int, tokens: int, dtype: torch.dtype, found: Iterable[Schedule], device, finalists: int = 6,
            repeats: int = 15, weights: Callable[[int], torch.Tensor] | None = None, gpus: int = 1) -> list:
    """(schedule, us a call) of the finalists, fastest first, `cold` and interleaved; F.linear is among them as 'cuda'.

    A finalist that differs from the trusted schedule at this very size is left out. `weights` gives the i-th weight.
    """
    shape = Shape(N=n, K=k)
    weights = weights or cache(lambda i: op.inputs(0, shape, dtype, device, 3 * i)[1])
    x = partial(op.inputs, tokens, Shape(N=1, K=k), dtype, device)
    inputs = cache(lambda i: (x(3 * i)[0], weights(i), None, shared_order(n, k, gpus)))
    contenders = {schedule: partial(op.run_schedule, schedule) for schedule in found}
    time_them = partial(bench.measure, inputs=inputs, clock=bench.clocks(device)[0], device=device,
                        set_bytes=op.work(tokens, shape, dtype).bytes)
    wanted = op.run_schedule(TRUSTED, *inputs(0))
    first = [s for s, _ in _ranked(time_them(contenders, repeats=3))[:finalists]
             if bits.same_bits(op.run_schedule(s, *inputs(0)), wanted)]
    default = {"cuda": lambda x, weight, *_: op.cuda(x, weight)}
    return _ranked(time_them(default | {s: contenders[s] for s in first}, repeats=repeats))


def _ranked(timings) -> list:
    good = [(name, t.percentiles()["us_p50"]) for name, t in timings.items() if isinstance(t, bench.Timing)]
    return sorted(good, key=lambda pair: pair[1])


def best_schedule(ranked: list, tokens: int = FEW + 1) -> tuple[Schedule, float]:
    """The fastest schedule of ours, and its speed relative to the default's (above 1: faster).

    For few tokens a schedule with pointers is taken if it is nearly as fast: bulk copies need descriptors at each new
    address, which take the host some microseconds.
    """
    times = dict(ranked)
    ours = [s for s, _ in ranked if s != "cuda"]
    plain = [s for s in ours if s.kind == "pointer" and times[s] <= NEARLY * times[ours[0]]] if tokens <= FEW else []
    schedule = (plain or ours)[0]
    return schedule, times.get("cuda", math.nan) / times[schedule]


# keeping


def store(name: str, dtype: str, shape: str, chosen: dict[int, Schedule], folder=None, section="matmul") -> Path:
    """Write the best schedules of one shape into a section of GPU `name`'s table; its other shapes stay.

    A damaged table is moved aside, to `<name>.json.damaged`.
    """
    folder = Path(folder or tables.FOLDER)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    with FileLock(folder / f"{name}.json.lock"):
        table = _table(path)
        machine = records.this_machine()
        table.update(machine=machine["device"], triton=machine["triton"], torch=machine["torch"])
        shapes = table.setdefault(section, {}).setdefault(dtype, {})
        column = {int(tokens): text for tokens, text in shapes.get(shape, {}).items()}
        column.update((tokens, str(schedule)) for tokens, schedule in chosen.items())
        shapes[shape] = {str(tokens): text for tokens, text in sorted(column.items())}
        records.write_atomic(path, json.dumps(table, indent=1) + "\n")
    tables.forget()
    return path


def _table(path: Path) -> dict:
    if not path.exists():
        return {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tables.load(path.stem, Schedule.parse, path.parent)
    if not caught:
        return json.loads(path.read_text(encoding="utf-8"))
    aside = path.with_suffix(".json.damaged")
    path.replace(aside)
    print(f"{path} is damaged and is now {aside}")
    return {}


def proved(points: dict, dtype: torch.dtype, workers: int | None = None,
           progress: Callable[[str], None] = print, gpus: int = 1) -> set[tuple]:
    """(schedule, n, k of its stand-in) of every candidate that keeps its bits; the others get a line of progress.

    `points` are {(n, k, tokens): candidates}. Raises RuntimeError if the trusted schedule is not the specification's.
    """
    device = runtime.device()
    every = list(dict.fromkeys((s, *stand_in(n, k, gpus)) for (n, k, _), found in points.items() for s in found))
    for n, k in dict.fromkeys(key[1:] for key in every):
        check_trusted(n, k, dtype, device, gpus=gpus)
    seen = Counter()  # a schedule compiles once, whichever its shapes: others wait until it has
    every.sort(key={key: seen.update([key[0]]) or seen[key[0]] for key in every}.get)
    jobs = [{"schedule": str(s), "n": n, "k": k, "dtype": dtype_name(dtype), "gpus": gpus} for s, n, k in every]
    answers = prove_all(jobs, workers or max(1, min(16, (os.cpu_count() or 2) - 1)),
                        progress=_bar("compiled and compared", progress))
    for (schedule, n, k), answer in zip(every, answers, strict=True):
        if answer:
            progress(f"  left out at N={n} K={k}: {schedule}: {answer}")
    return {key for key, answer in zip(every, answers, strict=True) if not answer}


def tune(n: int, k: int, dtype: torch.dtype, points: dict, good, progress: Callable[[str], None] = print,
         gpus: int = 1) -> dict:
    """{tokens: the best schedule} of one shape, of `points` {(n, k, tokens): candidates} those that are in `good`.

    A token count at which nothing could be timed is left out, with a line of progress. Needs a CUDA GPU.
    """
    device, chosen = runtime.device(), {}
    weights = cache(lambda i: op.inputs(0, Shape(N=n, K=k), dtype, device, 3 * i)[1])
    for (_, _, count), found in ((p, f) for p, f in points.items() if p[:2] == (n, k)):
        try:
            kept = [s for s in found if (s, *stand_in(n, k, gpus)) in good]
            ranked = fastest(n, k, count, dtype, kept, device, weights=weights, gpus=gpus)
            best, ratio = best_schedule(ranked, count)
        except (RuntimeError, IndexError) as error:  # out of memory, or no schedule left
            progress(f"  N={n} K={k} tokens={count}: nothing measured: {type(error).__name__}: {error}")
            continue
        chosen[count] = best
        if device.type == "cuda":
            torch.cuda.empty_cache()  # the memory of every schedule's graph
        progress(f"  N={n} K={k} tokens={count:5}: {dict(ranked)[best]:8.2f} us, {ratio:.2f} x the default's speed, "
                 f"{best}")
    return chosen


def _bar(what: str, write: Callable[[str], None], parts: int = 20) -> Callable[[int, int], None]:
    def show(done, total):
        if done * parts // total != (done - 1) * parts // total:
            filled = done * parts // total
            write(f"[{'#' * filled}{'.' * (parts - filled)}] {done}/{total} {what}")
    return show


def n_and_k(text: str) -> tuple[int, int]:
    """N and K of an argument such as 4096,14336."""
    parts = text.split(",")
    if len(parts) != 2 or not all(p.strip().isdigit() and int(p) for p in parts):
        raise argparse.ArgumentTypeError(f"a shape must read like 4096,14336 (N,K), got {text!r}")
    return int(parts[0]), int(parts[1])


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels tune", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=n_and_k, nargs="+", help="N,K of each weight (default: the op's own)")
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--gpus", type=int, choices=sorted(SECTIONS.values()), default=1,
                        help="the most GPUs that may ever share the order (default: 1)")
    parser.add_argument("--best", type=int, help="time so many that the model of time expects to be fastest, and those "
                        "chosen today, in place of the lists of candidates")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--out", default=records.DATA, help="the data folder")
    parser.add_argument("--machine", help="the folder's name under it (default: from the device)")
    a = parser.parse_args(argv)
    if a.best is not None and (a.best < 1 or a.gpus > 1):
        print("error: --best takes a number from 1, and the model of time knows the order of one GPU alone",
              file=sys.stderr)
        return 1
    if not runtime.HAS_GPU:
        print("error: schedules are tuned on a CUDA GPU, and there is none here", file=sys.stderr)
        return 1
    try:
        folder = records.open_machine(a.out, a.machine)
        _tune_all(a, a.shape or [tuple(Shape.parse(s).values()) for s in op.shapes], folder)
        records.note_machine(folder, CERTIFICATES.file)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _tune_all(a, shapes, folder):
    dtype, device = DTYPES[a.dtype], runtime.device()
    tma, section = runtime.has_pdl(device.index), next(name for name, gpus in SECTIONS.items() if gpus == a.gpus)
    found = partial(candidates if a.gpus == 1 else shared_candidates, tma=tma)
    if a.best:
        found = partial(expected, index=device.index, most=a.best)
    points = {(n, k, count): found(n, k, count, dtype) for n, k in shapes for count in sorted(set(a.tokens))}
    good = proved(points, dtype, a.workers, gpus=a.gpus)
    for n, k in shapes:
        chosen = tune(n, k, dtype, points, good, gpus=a.gpus)
        if not chosen:
            continue
        rows = [row for s in dict.fromkeys(chosen.values()) for row in certificates(s, n, k, dtype, device, a.gpus)]
        CERTIFICATES.merge(folder, rows)
        path = store(runtime.slug(device.index), a.dtype, f"N={n},K={k}", chosen, Path(a.out) / "schedules", section)
        print(f"N={n} K={k}: {len(chosen)} schedules in {path}, {len(rows)} certificates in {folder}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
