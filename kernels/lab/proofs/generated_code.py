"""Ahead-of-time compilation: the code a schedule becomes on a GPU that need not be here.

    python -m kernels code rms_norm D=8192,residual --dtype bfloat16 --targets 80 90 100

Compiling needs Triton and its ptxas, but no GPU and no driver. It runs in subprocesses, because without a
GPU this process has Triton's interpreter and a kernel cannot be both.
"""
from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, dataclass, field

from ... import OPS, runtime
from ...op import DTYPES, Shape
from .. import provenance

TOKENS, PROGRAMS = 300, 132  # of the arguments that are compiled for; of a launch, at most
TARGETS = (80, 90, 100)
WITHOUT_LINES = {"TRITON_DISABLE_LINE_INFO": "1"}  # a quarter of the time goes into what only a debugger reads
_BFLOAT16_ONES = {"1065369472", "16256", "0x3F803F80", "0x3F80"}  # two of them in 32 bits, or one


@dataclass(frozen=True)
class Job:
    """One schedule to compile: `schedule` is its name in op.schedules, `target` 80 for sm_80 and so on."""

    op: str
    shape: str
    dtype: str
    schedule: str
    target: int
    fusion: bool = False  # True only to see what the compiler would fuse if it were allowed to
    second: bool = False  # the second launch, of a schedule that has two
    tokens: int = TOKENS


@dataclass(frozen=True)
class Code:
    """The PTX of one job, and the SASS that ptxas made of it if it was asked for; properties count instructions."""

    job: Job
    ptx: str = field(repr=False)
    sass: str = field(default="", repr=False)
    shared_bytes: int = 0

    def count(self, instruction: str) -> int:
        """How often an instruction occurs in the PTX; `instruction` is a regular expression."""
        return len(re.findall(rf"(?<![\w.]){instruction}\b(?!\.)", self.ptx))

    @property
    def float_adds(self) -> int:
        """float32 additions, one number each."""
        return self.count(r"add(\.rn)?\.f32")

    @property
    def packed_adds(self) -> int:
        """float32 additions of two numbers at once (sm_100); a compiler may leave one of the two unused."""
        return self.count(r"add(\.rn)?\.f32x2")

    @property
    def fused(self) -> int:
        """Fused multiply-adds that skip a rounding. A factor of exactly 1 skips none: sm_80 adds bfloat16 that way."""
        ones = {register for register, value in re.findall(r"mov\.b(?:16|32)\s+(%\w+), (\w+);", self.ptx)
                if value in _BFLOAT16_ONES}
        factors = re.findall(r"\bfma\.rn\.bf16(?:x2)?\s+%\w+, (%?\w+), (%?\w+),", self.ptx)
        return self.count(r"(fma|mad)(\.\w+)*\.\w*f(16|32|64)(x2)?") - sum(bool(ones & set(f)) for f in factors)

    @property
    def flushes(self) -> int:
        """Instructions that flush subnormal numbers to zero."""
        return len(re.findall(r"\.ftz\b", self.ptx))

    @property
    def approximate(self) -> list[str]:
        """Approximate instructions: square roots, reciprocals, quotients, exponentials."""
        return re.findall(r"\b\w+(?:\.\w+)*\.(?:approx|full)(?:\.\w+)*", self.ptx)

    @property
    def square_roots(self) -> int:
        return self.count(r"sqrt\.rn\.f32")

    @property
    def divisions(self) -> int:
        return self.count(r"div\.rn\.f32")

    @property
    def shuffles(self) -> int:
        return self.count(r"shfl\.sync(\.\w+)*")

    @property
    def barriers(self) -> int:
        return self.count(r"(bar|barrier)(\.cta)?\.sync(\.aligned)?")

    @property
    def global_loads(self) -> dict[int, int]:
        """Bytes a load -> how many such loads from global memory."""
        found = re.findall(r"\bld\.global(?:\.[\w:]+)*?(?:\.v(\d))?\.[bfus](\d+)\b", self.ptx)
        return dict(Counter(int(vector or 1) * int(width) // 8 for vector, width in found))

    def sass_count(self, opcode: str) -> int:
        """How often an opcode such as FFMA occurs in the SASS."""
        return len(re.findall(rf"\b{opcode}\b", self.sass))

    def facts(self) -> dict:
        """The counts as one row of a table."""
        return {"float_adds": self.float_adds, "packed_adds": self.packed_adds, "fused": self.fused,
                "flushes": self.flushes, "approximate": len(self.approximate), "square_roots": self.square_roots,
                "divisions": self.divisions, "shuffles": self.shuffles, "barriers": self.barriers,
                "global_loads": self.global_loads}


def jobs(op: str, shape, dtype: str, targets=TARGETS, **options) -> list[Job]:
    """Every schedule of an op at one shape and dtype, for every target."""
    return [Job(op, str(Shape.parse(shape)), dtype, str(schedule), target, **{"tokens": _tokens(schedule), **options})
            for schedule in OPS[op].schedules(shape, DTYPES[dtype]) for target in targets]


def _tokens(schedule) -> int:
    """TOKENS, or as many as give every program of a product in lockstep a chain."""
    return PROGRAMS * schedule.block_m if getattr(schedule, "lockstep", False) else TOKENS


def compile_ahead(work: list[Job], sass: bool = False, workers: int = 2) -> list[Code]:
    """Compile these jobs in `workers` processes; the results in the order of the jobs.

    Raises runtime.Unavailable where Triton cannot be imported, RuntimeError with the compiler's words if a job
    does not compile.
    """
    if not runtime.HAS_TRITON:
        raise runtime.Unavailable(f"compiling ahead of time: {runtime.WHY_NOT}")
    shares = [work[i::workers] for i in range(workers) if work[i::workers]]
    running = [_start(share, sass) for share in shares]
    printed = [process.communicate() for process in running]
    for process, (_, errors) in zip(running, printed, strict=True):
        if process.returncode:
            raise RuntimeError(f"compiling ahead of time failed:\n{errors.strip()}")
    results = [json.loads(out) for out, _ in printed]
    return [Code(job, **results[i % workers][i // workers]) for i, job in enumerate(work)]


def _start(share, sass) -> subprocess.Popen:
    command = [sys.executable, "-m", "kernels.lab.proofs.generated_code", "--worker", *(["--sass"] if sass else [])]
    environment = {**os.environ, "TRITON_INTERPRET": "0", **WITHOUT_LINES}
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True, env=environment, cwd=provenance.ROOT)
    process.stdin.write(json.dumps([asdict(job) for job in share]))
    process.stdin.close()
    process.stdin = None
    return process


class Absent:
    """A GPU to compile for: Triton is told of one that is not there."""

    def __init__(self, target: int):
        self.target = target

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.target, 32)

    def get_current_device(self):
        return self.target  # Triton keeps one compiler a device

    def get_current_stream(self, device):
        return 0


def _compile(job: Job, sass: bool) -> dict:
    """As the op launches it, for contiguous, aligned arguments."""
    from triton.runtime import driver

    driver.set_active(Absent(job.target))
    step = provenance.launches(OPS[job.op], job.schedule, job.dtype, job.shape, job.tokens)[job.second]
    options = {**step.compile_options(job.target >= 90), "enable_fp_fusion": job.fusion}
    given = (*step.examples("cpu"), *step.arguments(job.target >= 90))
    return _code(step.kernel.warmup(*given, grid=(1,), **options), sass)


def bare_ptx(ptx: str) -> str:
    """PTX without what only a debugger reads: lines of source, comments, files."""
    code = re.split(r"^\s*\.(?:file|section)\b", ptx, maxsplit=1, flags=re.M)[0]
    lines = (re.sub(r"\s*//.*", "", line) for line in code.splitlines())
    return "\n".join(line for line in lines if line.strip() and not re.match(r"\s*\.loc\b", line))


def _code(kernel, sass: bool) -> dict:
    return {"ptx": bare_ptx(kernel.asm["ptx"]), "sass": kernel.asm["sass"] if sass else "",
            "shared_bytes": kernel.metadata.shared}


def _worker(sass: bool) -> None:
    """Jobs as JSON from stdin, their code as JSON to stdout; anything else a compiler prints goes to stderr."""
    out, sys.stdout = sys.stdout, sys.stderr
    json.dump([_compile(Job(**job), sass) for job in json.load(sys.stdin)], out)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels code", description=__doc__.splitlines()[0])
    parser.add_argument("op", nargs="?", choices=list(OPS), default="rms_norm")
    parser.add_argument("shape", nargs="?", default="D=8192,residual")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16")
    parser.add_argument("--targets", type=int, nargs="+", default=list(TARGETS))
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--sass", action="store_true", help=argparse.SUPPRESS)
    a = parser.parse_args(argv)
    if a.worker:
        _worker(a.sass)
        return 0
    for code in compile_ahead(jobs(a.op, a.shape, a.dtype, a.targets)):
        facts = ", ".join(f"{name} {value}" for name, value in code.facts().items())
        print(f"sm_{code.job.target} {code.job.schedule:18} {facts}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
