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
from functools import partial

from ... import OPS, runtime
from ...arithmetic.sums import tree_width
from ...op import DTYPES, Shape
from ...ops.mean import _inner_kernel, _rows_kernel, _split_kernel, _stream_kernel
from ...ops.rms_norm import _resident_kernel, _streaming_kernel
from ...ops.softmax import SEGMENT, WHOLE, _columns_kernel, _finish_kernel
from ...ops.softmax import _resident_kernel as _softmax_resident_kernel
from ...ops.softmax import _stream_kernel as _softmax_stream_kernel
from .. import provenance

TARGETS = (80, 90, 100)
_POINTERS = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32"}
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
    return [Job(op, str(Shape.parse(shape)), dtype, str(schedule), target, **options)
            for schedule in OPS[op].schedules(shape, DTYPES[dtype]) for target in targets]


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
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True, env={**os.environ, "TRITON_INTERPRET": "0"}, cwd=provenance.ROOT)
    process.stdin.write(json.dumps([asdict(job) for job in share]))
    process.stdin.close()
    process.stdin = None
    return process


def _rms_norm(shape, schedule, target):
    """The kernel, its constants by name and its warps, as kernels/ops/rms_norm.py launches it."""
    width = shape["D"]
    constants = {"D": width, "WIDTH": tree_width(width), "HAS_RESIDUAL": bool(shape.get("residual")),
                 "PDL": target >= 90, "ROWS": schedule.rows, "CHUNKS": schedule.streaming}
    return _streaming_kernel if schedule.streaming else _resident_kernel, constants, schedule.warps


def _mean(shape, schedule, target):
    """As kernels/ops/mean.py launches it; of a split, the first launch: the second is another schedule."""
    length, inner = shape["D"], shape.get("inner", 1)
    width = tree_width(length)
    constants = {"WIDTH": width, "CHUNKS": -(-length // width), "ROWS": schedule.rows, "FLIGHT": schedule.flight,
                 "COLUMNS": schedule.columns, "PARTS": schedule.parts, "PDL": target >= 90,
                 **({"inner": 1, "stride": 1} if inner == 1 else {})}
    kernels = {"rows": _rows_kernel, "stream": _stream_kernel, "inner": _inner_kernel, "split": _split_kernel}
    return kernels[schedule.kind], constants, schedule.warps


def _softmax(logarithm, shape, schedule, target):
    """As kernels/ops/softmax.py launches it; of a `columns` schedule, the first launch."""
    width = tree_width(shape["D"])
    chunks = -(-shape["D"] // width)
    constants = {"WIDTH": width, "CHUNKS": chunks if chunks <= WHOLE else 0, "ROWS": schedule.rows,
                 "SEGMENT": SEGMENT, "SEGMENTS": schedule.flight, "COLUMNS": schedule.columns, "LOG": logarithm,
                 "PDL": target >= 90}
    kernels = {"resident": _softmax_resident_kernel, "stream": _softmax_stream_kernel, "columns": _columns_kernel}
    return kernels[schedule.kind], constants, schedule.warps


def _softmax_finish(logarithm, shape, schedule, target):
    """The second launch of a `columns` schedule."""
    return _finish_kernel, {"WIDTH": tree_width(shape["D"]), "CHUNKS": schedule.chunks, "LOG": logarithm,
                            "PDL": target >= 90}, 4


_LAUNCHES = {"rms_norm": _rms_norm, "sum": _mean, "mean": _mean, "softmax": partial(_softmax, False),
             "log_softmax": partial(_softmax, True)}
_SECOND_LAUNCHES = {"softmax": partial(_softmax_finish, False), "log_softmax": partial(_softmax_finish, True)}


def _compile(job: Job, sass: bool) -> dict:
    if job.op == "matmul":
        from .generated_code_matmul import compile_schedule

        return _code(compile_schedule(job.shape, job.dtype, job.schedule, job.target), sass)
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    shape = Shape.parse(job.shape)
    schedules = {str(s): s for s in OPS[job.op].schedules(job.shape, DTYPES[job.dtype])}
    launches = _SECOND_LAUNCHES if job.second else _LAUNCHES
    fn, constants, warps = launches[job.op](shape, schedules[job.schedule], job.target)
    signature = {name: "constexpr" if name in constants else _type(name, job.dtype) for name in fn.arg_names}
    # What the launch specialises on for a fresh, contiguous input: aligned pointers, and sizes if they divide.
    divide = shape["D"] % 16 == 0 and shape.get("inner", 16) % 16 == 0
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(fn.arg_names)
               if name.endswith("_ptr") or (divide and name.endswith(("stride", "length", "inner"))
                                            and name not in constants)}
    source = ASTSource(fn, signature, {n: v for n, v in constants.items() if n in signature}, aligned)
    options = {"num_warps": warps, "enable_fp_fusion": job.fusion, "launch_pdl": job.target >= 90}
    return _code(runtime.triton.compile(source, target=GPUTarget("cuda", job.target, 32), options=options), sass)


def _code(kernel, sass: bool) -> dict:
    code = re.split(r"^\s*\.(?:file|section)\b", kernel.asm["ptx"], maxsplit=1, flags=re.M)[0]
    return {"ptx": code, "sass": kernel.asm["sass"] if sass else "", "shared_bytes": kernel.metadata.shared}


def _type(name: str, dtype: str) -> str:
    if name.endswith("_ptr"):
        return _POINTERS["float32" if name in ("sums_ptr", "columns_ptr") else dtype]
    return "fp32" if name in ("eps", "scale") else "i32"


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
