"""Certificates: schedules of the matrix product whose bits were compared with those of one trusted schedule.

The trusted schedule is held to the specification on a few elements, every other one to the trusted schedule on whole
results, over adversarial inputs. Schedules are compared in processes of their own, because a kernel that hangs or
reads outside its arguments breaks the process it runs in. Rows go to certificates.csv.

    python -m kernels certificates            prove again what this GPU's table chooses; `tune` proves what it stores
    python -m kernels certificates --model    and all that its model of time may choose, at two weights
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
from functools import cache

import torch

from ... import bits, runtime, tables
from ...launch import Step
from ...op import DTYPES, Shape, dtype_name
from ...ops.matmul import cost
from ...ops.matmul.op import matmul as op
from ...ops.matmul.order import LEAVES, shared_order, specified
from ...ops.matmul.schedule import Schedule
from ...ops.matmul.shared_schedule import SECTION
from .. import closure, provenance, records
from .expected import expected
from .generated_code import bare_ptx

TRUSTED = Schedule("pointer", 32, 32, 32, warps=4, stages=2)
ROWS = 259  # of an input to prove on: whole tiles of every schedule, and three more
STREAM_ROWS, PROGRAMS = 1283, 132  # enough tiles that programs carry chains over to one another; of those, at most
SECTIONS = {"matmul": 1, SECTION: LEAVES}  # of a GPU's table: the most GPUs that may share a product's order
KINDS = ("portable", "residue", "cancellation", "wide", "subnormal", "signed_zero")
CERTIFICATES = records.Table(
    "certificates.csv",
    ("op", "dtype", "shape", "schedule", "tokens", "input", "digest", "trusted", "ptx", "triton", "recorded_at",
     "source"),
    ("op", "dtype", "shape", "schedule", "tokens", "input"),
)


@cache
def _weight(n: int, k: int, dtype: torch.dtype, device) -> torch.Tensor:
    return op.inputs(0, Shape(N=n, K=k), dtype, device)[1]


@cache
def _case(n: int, k: int, dtype: torch.dtype, kind: str, device, rows: int = ROWS, gpus: int = 1
          ) -> tuple[tuple, torch.Tensor]:
    """Arguments of this kind of input, and the trusted schedule's result for them.

    `residue` subtracts the rounded product again, as a bias: what is left are the last bits of the sum in float32,
    which the rounding to 16 bits would hide.
    """
    weight, bias, wanted = _weight(n, k, dtype, device), None, shared_order(n, k, gpus)
    if kind == "portable":
        x = op.inputs(rows, Shape(N=1, K=k), dtype, device)[0]
    elif kind == "residue":
        x = op.inputs(1, Shape(N=1, K=k), dtype, device)[0].repeat(rows, 1)
        bias = -op.run_schedule(TRUSTED, x[:1], weight, None, wanted)[0]
    else:
        x = bits.adversarial(kind, rows, k, dtype, device, 7)
    return (x, weight, bias, wanted), op.run_schedule(TRUSTED, x, weight, bias, wanted)


def stand_in(n: int, k: int, gpus: int = 1) -> tuple[int, int]:
    """A weight with the order and the remainders of (n, k), small enough for every process to hold."""
    short = k if k <= 4096 or shared_order(n, k, gpus).segments > 1 else 4096 + k % 512
    return n if n <= 4096 else 4096 + n % 256, short


def shape_of(n: int, k: int, gpus: int = 1) -> str:
    """What rows and tables call a weight in the order that so many GPUs can share, such as N=4096,K=4096,gpus=8."""
    return str(Shape(N=n, K=k) if gpus == 1 else Shape(N=n, K=k, gpus=gpus))


def prove(schedule: Schedule, n: int, k: int, dtype: torch.dtype, device, gpus: int = 1,
          kinds: Iterable[str] | None = None) -> None:
    """Compare the schedule with the trusted one, over adversarial inputs, in the order that `gpus` (1 or 8) can share.

    `kinds` of inputs: KINDS where none are named.

    Raises whatever the schedule raises, and RuntimeError if a bit moved.
    """
    n, k = stand_in(n, k, gpus)
    for kind in kinds or KINDS:
        given, trusted = _case(n, k, dtype, kind, device, rows_of(schedule, n), gpus)
        if not bits.same_bits(op.run_schedule(schedule, *given), trusted):
            raise RuntimeError(f"{schedule} moved bits of {kind} inputs")


def certificates(schedule: Schedule, n: int, k: int, dtype: torch.dtype, device, gpus: int = 1) -> list[dict]:
    """What `prove` compares, as rows of certificates.csv: one a kind of input. Raises RuntimeError if a bit moved."""
    prove(schedule, n, k, dtype, device, gpus)
    n, k = stand_in(n, k, gpus)
    rows = rows_of(schedule, n)
    same = {"op": "matmul", "dtype": dtype_name(dtype), "shape": shape_of(n, k, gpus), "schedule": str(schedule),
            "tokens": rows, "trusted": str(TRUSTED), "recorded_at": records.now()}
    steps = provenance.launches(op, str(schedule), same["dtype"], same["shape"], rows)
    same |= {"ptx": ptx(steps, device), "triton": records.this_machine()["triton"],
             "source": closure.of_launches(steps)}
    results = {kind: op.run_schedule(schedule, *_case(n, k, dtype, kind, device, rows, gpus)[0]) for kind in KINDS}
    return [{**same, "input": kind, "digest": bits.digest(y)} for kind, y in results.items()]


def ptx(steps: list[Step], device) -> str:
    """The hash of the PTX that this GPU's Triton makes of these launches; "" on a CPU, whose interpreter makes none."""
    if torch.device(device).type != "cuda":
        return ""
    index = torch.device(device).index or 0
    return closure.digest(*(bare_ptx(step.compiled(index).kernel.asm["ptx"]) for step in steps))


def rows_of(schedule: Schedule, n: int) -> int:
    """Of an input to prove a schedule on, with a weight of n rows."""
    if schedule.lockstep:  # as many tiles of tokens as give every program a chain
        return schedule.block_m * -(-PROGRAMS // -(-n // schedule.block_n)) + 3
    return STREAM_ROWS if schedule.stream else ROWS


def check_trusted(n: int, k: int, dtype: torch.dtype, device, tokens: int = 3, columns: int = 64, gpus: int = 1
                  ) -> None:
    """Hold the trusted schedule to the specification on a few elements. Raises RuntimeError if they differ."""
    n, k = stand_in(n, k, gpus)
    for kind in KINDS:
        (x, weight, bias, wanted), _ = _case(n, k, dtype, kind, device, rows_of(TRUSTED, n), gpus)
        y = op.run_schedule(TRUSTED, x, weight, bias, wanted)[:tokens, :columns]
        few = x[:tokens], weight[:columns], None if bias is None else bias[:columns]
        if not bits.same_bits(y, specified(*few, wanted)):  # the whole weight's order: fewer rows would have another
            raise RuntimeError(f"the trusted schedule and the specification differ on {kind} inputs at N={n}, K={k}")


# compiling and comparing in processes


class _Process:
    """One worker: it is killed and started again when a job hangs or breaks it."""

    def __init__(self):
        self.start()

    def start(self):
        command = [sys.executable, "-m", "kernels.lab.proofs.certificates", "--worker"]
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

    A job is a dict with the arguments of `prove` as text and numbers: schedule, n, k, dtype, gpus and kinds. Jobs still
    waiting at `deadline` (of time.monotonic) are not begun.
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


def _worker() -> None:
    """Jobs as JSON lines from stdin, one answer a line to stdout; anything else that prints goes to stderr."""
    out, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        job = json.loads(line)
        try:
            prove(Schedule.parse(job["schedule"]), job["n"], job["k"], DTYPES[job["dtype"]], runtime.device(),
                  job.get("gpus", 1), job.get("kinds"))
            torch.cuda.synchronize()
            answer = ""
        except Exception as error:  # noqa: BLE001 - one candidate's failure is that candidate's answer
            answer = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        print(json.dumps(answer), file=out, flush=True)


def stored(table: dict) -> list[dict]:
    """A job of `prove_all` for each schedule that a GPU's table chooses, of either order."""
    chosen = {(str(schedule), n, k, dtype, gpus) for section, gpus in SECTIONS.items()
              for dtype, shapes in table.get(section, {}).items() for (n, k), column in shapes.items()
              for schedule in column.values()}
    return [dict(zip(("schedule", "n", "k", "dtype", "gpus"), choice, strict=True)) for choice in sorted(chosen)]


def record(folder, workers: int | None = None, of_the_model: bool = False) -> tuple[int, list[str]]:
    """Prove the schedules that this GPU's table chooses, into folder/certificates.csv: how many, and what went wrong.

    With `of_the_model`, also those that its model of time may choose.
    """
    device, wrong, count = runtime.device(), [], 0
    jobs = stored(tables.of_gpu(device.index, Schedule.parse))
    jobs += expected(cost.quantities(device.index), rows_of) if of_the_model else []
    for n, k, dtype, gpus in {(*stand_in(j["n"], j["k"], j["gpus"]), j["dtype"], j["gpus"]) for j in jobs}:
        check_trusted(n, k, DTYPES[dtype], device, gpus=gpus)
    for job, answer in zip(jobs, prove_all(jobs, workers or max(1, min(16, (os.cpu_count() or 2) - 1))), strict=True):
        if answer:
            wrong.append(f"{shape_of(job['n'], job['k'], job['gpus'])} {job['schedule']}: {answer}")
            continue
        rows = certificates(Schedule.parse(job["schedule"]), job["n"], job["k"], DTYPES[job["dtype"]], device,
                            job["gpus"])
        CERTIFICATES.merge(folder, rows)
        count += 1
    return count, wrong


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels certificates", description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="store_true", help="prove all that the model of time may choose, too")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--out", default=records.DATA, help="the data folder")
    parser.add_argument("--machine", help="the folder's name under it (default: from the device)")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    a = parser.parse_args(argv)
    if a.worker:
        _worker()
        return 0
    if not runtime.HAS_GPU:
        print("error: schedules are proved on a CUDA GPU, and there is none here", file=sys.stderr)
        return 1
    try:
        folder = records.open_machine(a.out, a.machine)
        count, wrong = record(folder, a.workers, a.model)
        records.note_machine(folder, CERTIFICATES.file)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(*wrong, f"proved {count} of {count + len(wrong)} schedules in {folder / CERTIFICATES.file}", sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
