"""Find the fastest schedules of the matrix product on this GPU, prove their bits, and keep them.

    python -m kernels tune --shape 4096,4096 28672,4096 --tokens 1 16 64 256 1024 4096

Candidates of all shapes compile in processes of their own, which also compare each with one trusted schedule on
inputs made to hurt: one that does not compile, fails or moves a bit is left out and said so. The rest are timed
`cold`, in turns. The best go to data/schedules/<gpu>.json, what they were compared on to
data/<machine>/certificates.csv.
"""
from __future__ import annotations

import argparse
import json
import math
import os
import queue
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache, partial
from pathlib import Path

import torch
from filelock import FileLock

from ... import bits, runtime
from ...op import DTYPES, Shape, dtype_name
from ...ops.matmul import schedule as schedules
from ...ops.matmul.op import _inputs, order, run_schedule
from ...ops.matmul.op import matmul as op
from ...ops.matmul.schedule import Schedule
from .. import bench, provenance, records
from .candidates import candidates

TOKENS = (1, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
TRUSTED = Schedule("pointer", 32, 32, 32, warps=4, stages=2)
ROWS = 259  # of an input to prove on: whole tiles of every schedule, and three more
FEW, NEARLY = 64, 1.03  # so many tokens, and how much slower a schedule with pointers may be for them
STREAM_ROWS = 1283  # enough tiles that programs hand chains on
KINDS = ("portable", "residue", "cancellation", "wide", "subnormal", "signed_zero")
CERTIFICATES = records.Table(
    "certificates.csv",
    ("op", "dtype", "shape", "schedule", "tokens", "input", "digest", "trusted", "recorded_at", "source"),
    ("op", "dtype", "shape", "schedule", "tokens", "input"),
)


# proving


@cache
def _weight(n: int, k: int, dtype: torch.dtype, device) -> torch.Tensor:
    return _inputs(0, Shape(N=n, K=k), dtype, device)[1]


@cache
def _case(n: int, k: int, dtype: torch.dtype, kind: str, device, rows: int = ROWS) -> tuple[tuple, torch.Tensor]:
    """Arguments of this kind of input, and what the trusted schedule makes of them.

    `residue` takes the rounded product away again as a bias: what is left are the last bits of the sum in float32,
    which the rounding to 16 bits would hide.
    """
    weight, bias = _weight(n, k, dtype, device), None
    if kind == "portable":
        x = _inputs(rows, Shape(N=1, K=k), dtype, device)[0]
    elif kind == "residue":
        x = _inputs(1, Shape(N=1, K=k), dtype, device)[0].repeat(rows, 1)
        bias = -run_schedule(TRUSTED, x[:1], weight, None)[0]
    else:
        x = bits.adversarial(kind, rows, k, dtype, device, 7)
    return (x, weight, bias), run_schedule(TRUSTED, x, weight, bias)


def stand_in(n: int, k: int) -> tuple[int, int]:
    """A weight with the order and the remainders of (n, k), small enough for every process to hold."""
    short = k if k <= 4096 or order(n, k)[0] > 1 else 4096 + k % 512
    return n if n <= 4096 else 4096 + n % 256, short


def prove(schedule: Schedule, n: int, k: int, dtype: torch.dtype, device) -> None:
    """Compare the schedule with the trusted one, over inputs made to hurt.

    Raises whatever the schedule raises, and RuntimeError if a bit moved.
    """
    n, k = stand_in(n, k)
    for kind in KINDS:
        given, trusted = _case(n, k, dtype, kind, device, STREAM_ROWS if schedule.stream else ROWS)
        if not bits.same_bits(run_schedule(schedule, *given), trusted):
            raise RuntimeError(f"{schedule} moved bits of {kind} inputs")


def certificates(schedule: Schedule, n: int, k: int, dtype: torch.dtype, device) -> list[dict]:
    """What `prove` compares, as rows of digests: one a kind of input. Raises RuntimeError if a bit moved."""
    prove(schedule, n, k, dtype, device)
    (n, k), rows = stand_in(n, k), STREAM_ROWS if schedule.stream else ROWS
    same = {"op": "matmul", "dtype": dtype_name(dtype), "shape": f"N={n},K={k}", "schedule": str(schedule),
            "tokens": rows, "trusted": str(TRUSTED), "recorded_at": records.now(), "source": provenance.of_op(op)}
    return [{**same, "input": kind, "digest": bits.digest(run_schedule(schedule, *_case(n, k, dtype, kind, device,
                                                                                       rows)[0]))} for kind in KINDS]


def check_trusted(n: int, k: int, dtype: torch.dtype, device, tokens: int = 3, columns: int = 64) -> None:
    """Hold the trusted schedule to the specification on a few elements. Raises RuntimeError if they differ."""
    n, k = stand_in(n, k)
    for kind in KINDS:
        (x, weight, bias), _ = _case(n, k, dtype, kind, device)
        y = run_schedule(TRUSTED, x, weight, bias)[:tokens, :columns]
        if not bits.same_bits(y, _elements(x[:tokens], weight, bias, columns)):
            raise RuntimeError(f"the trusted schedule and the specification differ on {kind} inputs at N={n}, K={k}")


def _elements(x, weight, bias, columns):
    """The specification's first columns: the order follows the whole weight's rows, so cut as that one is."""
    from ...ops.matmul.op import _chain

    segments, length = order(*weight.shape)
    columns = min(columns, len(weight))
    total = torch.zeros(len(x), columns, dtype=torch.float32, device=x.device)
    for start in range(0, segments * length, length):
        total = total + _chain(x[:, start : start + length], weight[:columns, start : start + length])
    return (total if bias is None else total + bias[:columns].float()).to(x.dtype)


# compiling and proving in processes


def _worker() -> None:
    """Jobs as JSON lines from stdin, one answer a line to stdout; anything else that prints goes to stderr."""
    out, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        job = json.loads(line)
        try:
            prove(Schedule.parse(job["schedule"]), job["n"], job["k"], DTYPES[job["dtype"]], runtime.device())
            torch.cuda.synchronize()
            answer = ""
        except Exception as error:  # noqa: BLE001 - one candidate's failure is that candidate's answer
            answer = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        print(json.dumps(answer), file=out, flush=True)


class _Process:
    """One worker: it is killed and started again when a job hangs or breaks it."""

    def __init__(self):
        self.start()

    def start(self):
        command = [sys.executable, "-m", "kernels.lab.tuning.tune", "--worker"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.DEVNULL, text=True, cwd=records.ROOT,
                                        env={**os.environ, "TRITON_INTERPRET": "0"})

    def ask(self, job: dict, limit_s: float):
        timer = threading.Timer(limit_s, self.process.kill)
        timer.start()
        try:
            self.process.stdin.write(json.dumps(job) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        timer.cancel()
        answer = json.loads(line) if line else "the process died or took too long"
        if not line or "CUDA error" in answer or "illegal" in answer:  # a broken context fails every later job
            self.stop()
            self.start()
        return answer

    def stop(self):
        self.process.kill()
        self.process.communicate()


def prove_all(jobs: list[dict], workers: int, limit_s: float = 60, deadline: float | None = None,
              progress: Callable[[int, int], None] = lambda done, total: None) -> list:
    """A line of text for each job that says what is wrong with it, "" if it keeps its bits, in the order of the jobs.

    Jobs still waiting at `deadline` (of time.monotonic) are not begun.
    """
    waiting, answers, finished = queue.SimpleQueue(), ["not begun in time"] * len(jobs), [0]
    for number in range(len(jobs)):
        waiting.put(number)

    def work():
        process = _Process()
        try:
            while deadline is None or time.monotonic() < deadline:
                number = waiting.get_nowait()
                left = limit_s if deadline is None else min(limit_s, max(deadline - time.monotonic(), 1))
                answers[number] = process.ask(jobs[number], left)
                finished[0] += 1
                progress(finished[0], len(jobs))
        except queue.Empty:
            pass
        finally:
            process.stop()

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(workers, len(jobs)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


# timing


def fastest(n: int, k: int, tokens: int, dtype: torch.dtype, found: Iterable[Schedule], device, finalists: int = 6,
            repeats: int = 15, weights: Callable[[int], torch.Tensor] | None = None) -> list:
    """(schedule, us a call) of the finalists, fastest first, `cold` and in turns; F.linear is among them as 'cuda'.

    A finalist that differs from the trusted schedule at this very size is left out. `weights` gives the i-th weight.
    """
    shape = Shape(N=n, K=k)
    weights = weights or cache(lambda i: _inputs(0, shape, dtype, device, 3 * i)[1])
    inputs = cache(lambda i: (_inputs(tokens, Shape(N=1, K=k), dtype, device, 3 * i)[0], weights(i)))
    contenders = {schedule: partial(run_schedule, schedule) for schedule in found}
    time_them = partial(bench.measure, inputs=inputs, clock=bench.clocks(device)[0], device=device,
                        set_bytes=op.work(tokens, shape, dtype).bytes)
    wanted = run_schedule(TRUSTED, *inputs(0))
    first = [s for s, _ in _ranked(time_them(contenders, repeats=3))[:finalists]
             if bits.same_bits(run_schedule(s, *inputs(0)), wanted)]
    return _ranked(time_them({"cuda": op.cuda, **{s: contenders[s] for s in first}}, repeats=repeats))


def _ranked(timings) -> list:
    good = [(name, t.percentiles()["us_p50"]) for name, t in timings.items() if isinstance(t, bench.Timing)]
    return sorted(good, key=lambda pair: pair[1])


def best_schedule(ranked: list, tokens: int = FEW + 1) -> tuple[Schedule, float]:
    """The fastest schedule of ours and its time over the default's (above 1: faster than the default).

    For few tokens one with pointers is taken if it is nearly as fast: bulk copies need descriptors at each new address,
    which takes the host some microseconds.
    """
    times = dict(ranked)
    ours = [s for s, _ in ranked if s != "cuda"]
    plain = [s for s in ours if s.kind == "pointer" and times[s] <= NEARLY * times[ours[0]]] if tokens <= FEW else []
    schedule = (plain or ours)[0]
    return schedule, times.get("cuda", math.nan) / times[schedule]


# keeping


def store(name: str, dtype: str, shape: str, chosen: dict[int, Schedule], folder=None) -> Path:
    """Write the best schedules of one shape into the table of GPU `name`; what else it holds stays.

    A damaged table is moved aside, to `<name>.json.damaged`.
    """
    folder = Path(folder or schedules.FOLDER)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    with FileLock(folder / f"{name}.json.lock"):
        table = _table(path)
        machine = records.this_machine()
        table.update(machine=machine["device"], triton=machine["triton"], torch=machine["torch"])
        shapes = table.setdefault("matmul", {}).setdefault(dtype, {})
        column = {int(tokens): text for tokens, text in shapes.get(shape, {}).items()}
        column.update((tokens, str(schedule)) for tokens, schedule in chosen.items())
        shapes[shape] = {str(tokens): text for tokens, text in sorted(column.items())}
        records.write_atomic(path, json.dumps(table, indent=1) + "\n")
    schedules.forget()
    return path


def _table(path: Path) -> dict:
    if not path.exists():
        return {}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        schedules.load(path.stem, path.parent)
    if not said:
        return json.loads(path.read_text(encoding="utf-8"))
    aside = path.with_suffix(".json.damaged")
    path.replace(aside)
    print(f"{path} is damaged and is now {aside}")
    return {}


def proved(points: dict, dtype: torch.dtype, workers: int | None = None,
           progress: Callable[[str], None] = print) -> set[tuple]:
    """(schedule, n, k of its stand-in) of every candidate that keeps its bits; the rest is said.

    `points` are {(n, k, tokens): candidates}. Raises RuntimeError if the trusted schedule is not the specification's.
    """
    device = runtime.device()
    every = list(dict.fromkeys((s, *stand_in(n, k)) for (n, k, _), found in points.items() for s in found))
    for n, k in dict.fromkeys(key[1:] for key in every):
        check_trusted(n, k, dtype, device)
    seen = Counter()  # a schedule compiles once, whichever its shapes: others wait until it has
    every.sort(key={key: seen.update([key[0]]) or seen[key[0]] for key in every}.get)
    jobs = [{"schedule": str(s), "n": n, "k": k, "dtype": dtype_name(dtype)} for s, n, k in every]
    answers = prove_all(jobs, workers or max(1, min(16, (os.cpu_count() or 2) - 1)),
                        progress=_bar("compiled and compared", progress))
    for (schedule, n, k), answer in zip(every, answers, strict=True):
        if answer:
            progress(f"  left out at N={n} K={k}: {schedule}: {answer}")
    return {key for key, answer in zip(every, answers, strict=True) if not answer}


def tune(n: int, k: int, dtype: torch.dtype, points: dict, good, progress: Callable[[str], None] = print) -> dict:
    """{tokens: the best schedule} of one shape, of `points` {(n, k, tokens): candidates} those that are in `good`.

    A token count at which nothing could be timed is left out and said so. Needs a CUDA GPU.
    """
    device, chosen = runtime.device(), {}
    weights = cache(lambda i: _inputs(0, Shape(N=n, K=k), dtype, device, 3 * i)[1])
    for (_, _, count), found in ((p, f) for p, f in points.items() if p[:2] == (n, k)):
        try:
            ranked = fastest(n, k, count, dtype, [s for s in found if (s, *stand_in(n, k)) in good], device,
                             weights=weights)
            best, ratio = best_schedule(ranked, count)
        except (RuntimeError, IndexError) as error:  # out of memory, or no schedule left
            progress(f"  N={n} K={k} tokens={count}: nothing measured: {type(error).__name__}: {error}")
            continue
        chosen[count] = best
        if device.type == "cuda":
            torch.cuda.empty_cache()  # every schedule's graph had memory of its own
        progress(f"  N={n} K={k} tokens={count:5}: {dict(ranked)[best]:8.2f} us, {ratio:.2f} x the default's speed, "
                 f"{best}")
    return chosen


def _bar(what: str, write: Callable[[str], None], parts: int = 20) -> Callable[[int, int], None]:
    def show(done, total):
        if done * parts // total != (done - 1) * parts // total:
            filled = done * parts // total
            write(f"[{'#' * filled}{'.' * (parts - filled)}] {done}/{total} {what}")
    return show


def _shape(text: str) -> tuple[int, int]:
    parts = text.split(",")
    if len(parts) != 2 or not all(p.strip().isdigit() and int(p) for p in parts):
        raise argparse.ArgumentTypeError(f"a shape must read like 4096,14336 (N,K), got {text!r}")
    return int(parts[0]), int(parts[1])


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels tune", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=_shape, nargs="+", help="N,K of each weight (default: the op's own)")
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--out", default=records.DATA, help="the data folder")
    parser.add_argument("--machine", help="the folder's name under it (default: from the device)")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    a = parser.parse_args(argv)
    if a.worker:
        _worker()
        return 0
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
    tma = runtime.has_pdl(device.index)
    points = {(n, k, count): candidates(n, k, count, dtype, tma) for n, k in shapes for count in sorted(set(a.tokens))}
    good = proved(points, dtype, a.workers)
    for n, k in shapes:
        chosen = tune(n, k, dtype, points, good)
        if not chosen:
            continue
        rows = [row for s in dict.fromkeys(chosen.values()) for row in certificates(s, n, k, dtype, device)]
        CERTIFICATES.merge(folder, rows)
        path = store(schedules.slug(device.index), a.dtype, f"N={n},K={k}", chosen, Path(a.out) / "schedules")
        print(f"N={n} K={k}: {len(chosen)} schedules in {path}, {len(rows)} certificates in {folder}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
