"""Find the fastest schedules of the matrix product on this GPU, prove their bits, and keep them.

    python -m kernels.lab.tune --shape 4096,4096 28672,4096 --tokens 1 16 64 256 1024 4096

Candidates of all shapes compile in processes of their own, which also compare each with one trusted schedule on
inputs made to hurt: one that does not compile, fails or moves a bit is left out and said so. The rest are timed
`cold`, in turns. The best go to data/schedules/<gpu>.json, what was compared to data/<machine>/certificates.csv.
"""
from __future__ import annotations

import argparse
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache, partial
from itertools import product
from pathlib import Path

import torch
from filelock import FileLock

from .. import bits, runtime, schedules
from ..matmul import _inputs, order, run_schedule
from ..matmul import matmul as op
from ..op import DTYPES, Shape, dtype_name
from ..schedules import Schedule
from . import bench, records

TOKENS = (1, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
TRUSTED = Schedule("pointer", 32, 32, 32, warps=4, stages=2)
ROWS = 259  # of an input to prove on: whole tiles of every schedule, and three more
KINDS = ("portable", "residue", "cancellation", "wide", "subnormal", "signed_zero")
CERTIFICATES = records.Table(
    "certificates.csv",
    ("op", "dtype", "shape", "schedule", "tokens", "input", "digest", "trusted", "recorded_at", "source"),
    ("op", "dtype", "shape", "schedule", "tokens", "input"),
)
_ROOT = Path(__file__).resolve().parents[2]
_SHARED = 227 * 1024  # bytes of shared memory a block of sm_90 may use


def candidates(n: int, k: int, tokens: int, dtype=torch.bfloat16, tma: bool = True) -> list[Schedule]:
    """Schedules worth timing for this many tokens, few enough to compile in seconds; `tma`: the GPU has bulk copies.

    The lists below hold what came within 8 % of the best at some shape of an H200, and what was not tried there.
    """
    if dtype == torch.float32:
        found = list(_float32(tokens))
    elif tokens <= 64:
        found = [*_few_by_pointer(tokens), *(_few_by_tma(tokens) if tma else ())]
    else:
        found = [*_many_by_pointer(tokens, tma), *(_many_by_tma(tokens) if tma else ()),
                 *(_hopper(tokens) if tma else ())]
    cut, length = order(n, k)
    found = [s for s in found if s.block_k <= k and (cut == 1 or length % s.block_k == 0 and not s.pingpong)]
    if cut > 1 and tokens <= 1024:
        parallel = [replace(s, split=True) for s in found if not (s.persistent or s.store)]
        found = parallel + [s for s in found if tokens > 256 or s.persistent]
    return list(dict.fromkeys(s for s in found if s.shared_bytes * dtype.itemsize // 2 <= _SHARED))


# rows of the weight, block_k, warps, stages
_POINTERS_32 = ((16, 128, 2, 4), (16, 128, 2, 6), (16, 256, 2, 3), (16, 256, 2, 4), (16, 256, 2, 6), (16, 512, 2, 4),
                (32, 128, 2, 3), (32, 128, 2, 4), (32, 128, 2, 6), (32, 128, 4, 6), (32, 256, 2, 4), (32, 256, 4, 4),
                (32, 256, 4, 6), (32, 512, 4, 4), (64, 128, 4, 3), (64, 128, 4, 4))
_POINTERS_64 = ((16, 128, 4, 6), (16, 256, 4, 3), (16, 256, 4, 4), (32, 128, 4, 6), (32, 256, 4, 4), (64, 128, 4, 6))


def _few_by_pointer(tokens):
    """Up to 64 tokens: the weights' way from memory is all that counts."""
    m = max(16, 1 << (tokens - 1).bit_length())
    for rows, block_k, warps, stages in _POINTERS_32 if m <= 32 else _POINTERS_64:
        yield Schedule("pointer", m, rows, block_k, warps, stages, 1, swap=True)


def _few_by_tma(tokens):
    m = max(16, 1 << (tokens - 1).bit_length())
    for rows, block_k, stages in ((64, 64, 4), (64, 64, 8), (64, 128, 4), (64, 128, 6), (64, 128, 8), (64, 256, 3),
                                  (64, 256, 4), (128, 64, 4), (128, 64, 6), (128, 64, 8), (128, 128, 3), (128, 128, 4),
                                  (128, 256, 3)):
        yield Schedule("tma", m, rows, block_k, 4, stages, 1, swap=True)
    for rows, block_k, stages in ((16, 128, 8), (32, 64, 8), (32, 128, 4), (32, 128, 6), (32, 128, 8), (32, 256, 3),
                                  (32, 256, 4), (64, 64, 8), (64, 128, 6)):
        if m == 64:  # as high as an instruction of the tensor core, so no side needs to be swapped
            yield Schedule("tma", m, rows, block_k, 4, stages, 1)
    for rows, warps, stages in ((64, 4, 4), (64, 4, 8), (128, 4, 4), (128, 8, 4)):
        yield Schedule("hopper", m, rows, 128, warps, stages, 1, swap=True, persistent=True)


def _many_by_pointer(tokens, tma):
    """More than 64 tokens: tiles for the tensor cores."""
    tiles = ((64, 64, 4), (64, 64, 6), (64, 128, 4), (128, 64, 4), (128, 128, 4))
    for m, n, stages in tiles if tokens <= 256 or not tma else tiles[-1:]:
        yield Schedule("pointer", m, n, 64, 8 if m * n == 128 * 128 else 4, stages)


# block_m, block_n: (block_k, stages)
_NARROW = {(64, 64): ((64, 4), (64, 6), (64, 8), (64, 12), (128, 3), (128, 4), (128, 6)),
           (64, 128): ((64, 4), (64, 6), (64, 8), (128, 3), (128, 4)),
           (128, 64): ((64, 3), (64, 4), (64, 6), (64, 8), (128, 4))}
_NARROWER = {(64, 32): ((64, 8), (128, 4), (128, 6), (128, 8)), (128, 32): ((64, 8), (128, 4), (128, 5))}
_SQUARE = {(128, 128): ((64, 3), (64, 4), (64, 6), (128, 3))}


def _many_by_tma(tokens):
    tiles = {**(_NARROWER if tokens <= 256 else {}), **(_NARROW if tokens <= 1024 else {}), **_SQUARE}
    for (m, n), rest in tiles.items():
        for block_k, stages in rest:
            yield Schedule("tma", m, n, block_k, 8 if m * n == 128 * 128 else 4, stages)
    for m, n, stages in ((64, 64, 6), (64, 64, 8), (128, 64, 6), (64, 128, 6), (128, 128, 3)):
        if tokens <= 128:
            yield Schedule("tma", m, n, 64, 8 if m * n == 128 * 128 else 4, stages, 1, swap=True)
    if tokens < 256:
        return
    for stages, group in product((3, 4), (4, 8, 16)):
        yield Schedule("tma", 128, 256, 64, 8, stages, group, persistent=True, flatten=True)
    for group in (4, 8, 16):
        yield Schedule("tma", 128, 256, 64, 8, 3, group, persistent=True, flatten=True, store=True)
    yield Schedule("tma", 128, 256, 64, 8, 3, 8, persistent=True, specialize=True)
    for group in (8, 16):
        yield Schedule("tma", 256, 128, 64, 8, 4, group, persistent=True, flatten=True)
    yield Schedule("tma", 256, 128, 64, 8, 4, 8)
    yield Schedule("tma", 128, 128, 64, 8, 6, 8, persistent=True, flatten=True)
    yield Schedule("tma", 128, 128, 64, 8, 4, 8, persistent=True, flatten=True, store=True)


# the side shared out among the warps, the other, block_k, warps, stages, store
_TOGETHER = ((64, 64, 128, 4, 6, False), (128, 64, 64, 8, 6, False), (128, 64, 64, 8, 8, False),
             (128, 64, 128, 8, 4, False), (128, 128, 64, 8, 6, False), (128, 128, 64, 8, 4, True))
_TOGETHER_WIDE = ((128, 256, 64, 8, 4, False), (128, 256, 64, 8, 3, True), (192, 128, 64, 12, 4, False),
                  (192, 128, 64, 12, 4, True), (192, 128, 64, 12, 5, False), (192, 64, 64, 12, 6, True))
_IN_TURNS = ((64, 256, 4, True), (64, 256, 5, False), (128, 128, 5, True), (128, 128, 6, False))


def _hopper(tokens):
    """Loads in a warp of their own, with either side as the one that is shared out among the warps."""
    for high, wide, block_k, warps, stages, store in (*_TOGETHER, *(_TOGETHER_WIDE if tokens >= 256 else ())):
        fixed = {"persistent": True, "store": store}
        yield Schedule("hopper", high, wide, block_k, warps, stages, 8, **fixed)
        yield Schedule("hopper", wide, high, block_k, warps, stages, 8, swap=True, **fixed)
    for high, wide, stages, store in _IN_TURNS if tokens >= 256 else ():
        fixed = {"persistent": True, "store": store, "pingpong": True}
        yield Schedule("hopper", high, wide, 64, 8, stages, 8, **fixed)
        yield Schedule("hopper", wide, high, 64, 8, stages, 8, swap=True, **fixed)


def _float32(tokens):
    sizes = ((16, 32), (16, 64), (32, 32)) if tokens <= 64 else ((64, 64), (64, 128), (128, 128), (32, 64))
    for (m, n), block_k, warps, stages in product(sizes, (16, 32), (4, 8), (2, 3)):
        yield Schedule("pointer", m, n, block_k, warps, stages)


# proving


@cache
def _weight(n: int, k: int, dtype: torch.dtype, device) -> torch.Tensor:
    return _inputs(0, Shape(N=n, K=k), dtype, device)[1]


@cache
def _case(n: int, k: int, dtype: torch.dtype, kind: str, device) -> tuple[tuple, str]:
    """Arguments of this kind of input, and the digest of what the trusted schedule makes of them.

    `residue` takes the rounded product away again as a bias: what is left are the last bits of the sum in float32,
    which the rounding to 16 bits would hide.
    """
    weight, bias = _weight(n, k, dtype, device), None
    if kind == "portable":
        x = _inputs(ROWS, Shape(N=1, K=k), dtype, device)[0]
    elif kind == "residue":
        x = _inputs(1, Shape(N=1, K=k), dtype, device)[0].repeat(ROWS, 1)
        bias = -run_schedule(TRUSTED, x[:1], weight, None)[0]
    else:
        x = bits.adversarial(kind, ROWS, k, dtype, device, 7)
    return (x, weight, bias), bits.digest(run_schedule(TRUSTED, x, weight, bias))


def stand_in(n: int, k: int) -> tuple[int, int]:
    """A weight with the order and the remainders of (n, k), small enough for every process to hold."""
    if order(n, k)[0] > 1:
        return n, k
    return n if n <= 4096 else 4096 + n % 256, k if k <= 4096 else 4096 + k % 512


def prove(schedule: Schedule, n: int, k: int, dtype: torch.dtype, device) -> list[dict]:
    """Certificates: the schedule's digest and the trusted one's, over inputs made to hurt. It may not differ.

    Raises whatever the schedule raises, and RuntimeError if a bit moved.
    """
    found, (n, k) = [], stand_in(n, k)
    names = {"op": "matmul", "dtype": dtype_name(dtype), "shape": f"N={n},K={k}", "schedule": str(schedule),
             "tokens": ROWS, "trusted": str(TRUSTED)}
    for kind in KINDS:
        given, trusted = _case(n, k, dtype, kind, device)
        digest = bits.digest(run_schedule(schedule, *given))
        if digest != trusted:
            raise RuntimeError(f"{schedule} moved bits of {kind} inputs")
        found.append({**names, "input": kind, "digest": digest})
    return found


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
    from ..matmul import _chain

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
            answer = prove(Schedule.parse(job["schedule"]), job["n"], job["k"], DTYPES[job["dtype"]], runtime.device())
            torch.cuda.synchronize()
        except Exception as error:  # noqa: BLE001 - one candidate's failure is that candidate's answer
            answer = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        print(json.dumps(answer), file=out, flush=True)


class _Process:
    """One worker: it is killed and started again when a job hangs or breaks it."""

    def __init__(self):
        self.start()

    def start(self):
        self.process = subprocess.Popen([sys.executable, "-m", "kernels.lab.tune", "--worker"], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=_ROOT,
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
    """Each job's certificates, or a line of text that says why it has none, in the order of the jobs.

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


def best_schedule(ranked: list) -> tuple[Schedule, float]:
    """The fastest schedule of ours and its time over the default's (above 1: faster than the default)."""
    times = dict(ranked)
    schedule = next(s for s, _ in ranked if s != "cuda")
    return schedule, times["cuda"] / times[schedule]


# keeping


def store(name: str, dtype: str, shape: str, chosen: dict[int, Schedule], folder=None) -> Path:
    """Write the best schedules of one shape into the table of GPU `name`; what else it holds stays."""
    folder = Path(folder or schedules.FOLDER)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    with FileLock(folder / f"{name}.json.lock"):
        table = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        machine = records.this_machine()
        table.update(machine=machine["device"], triton=machine["triton"], torch=machine["torch"])
        shapes = table.setdefault("matmul", {}).setdefault(dtype, {})
        shapes[shape] = {str(tokens): str(schedule) for tokens, schedule in sorted(chosen.items())}
        records.write_atomic(path, json.dumps(table, indent=1) + "\n")
    schedules.forget()
    return path


def proved(points: dict, dtype: torch.dtype, workers: int | None = None,
           progress: Callable[[str], None] = print) -> dict[tuple, list[dict]]:
    """(schedule, n, k of its stand-in) -> certificates, of every candidate that keeps its bits; the rest is said.

    `points` are {(n, k, tokens): candidates}. Raises RuntimeError if the trusted schedule is not the specification's.
    """
    device = runtime.device()
    every = list(dict.fromkeys((s, *stand_in(n, k)) for (n, k, _), found in points.items() for s in found))
    for n, k in dict.fromkeys(key[1:] for key in every):
        check_trusted(n, k, dtype, device)
    jobs = [{"schedule": str(s), "n": n, "k": k, "dtype": dtype_name(dtype)} for s, n, k in every]
    answers = prove_all(jobs, workers or max(1, min(16, (os.cpu_count() or 2) - 1)),
                        progress=_bar("compiled and compared", progress))
    for (schedule, n, k), answer in zip(every, answers, strict=True):
        if not isinstance(answer, list):
            progress(f"  left out at N={n} K={k}: {schedule}: {answer}")
    stamp = {"recorded_at": records.now(), "source": records.source()}
    return {key: [{**row, **stamp} for row in answer] for key, answer in zip(every, answers, strict=True)
            if isinstance(answer, list)}


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
            best, ratio = best_schedule(ranked)
        except (RuntimeError, StopIteration) as error:  # out of memory, or no schedule left
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
    parser = argparse.ArgumentParser(prog="python -m kernels.lab.tune", description=__doc__.splitlines()[0])
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
    dtype, tma = DTYPES[a.dtype], runtime.has_pdl(runtime.device().index)
    points = {(n, k, count): candidates(n, k, count, dtype, tma) for n, k in shapes for count in sorted(set(a.tokens))}
    good = proved(points, dtype, a.workers)
    CERTIFICATES.merge(folder, [row for rows in good.values() for row in rows])
    print(f"{sum(map(len, good.values()))} certificates in {folder}")
    for n, k in shapes:
        chosen = tune(n, k, dtype, points, good)
        path = store(schedules.slug(runtime.device().index), a.dtype, f"N={n},K={k}", chosen, Path(a.out) / "schedules")
        print(f"N={n} K={k}: {len(chosen)} schedules in {path}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
