"""Compiles attention's kernels for a GPU that need not be here: jobs as JSON from stdin, their code to stdout.

A job is [schedule, target, width, page, window, dtype]; its code one entry a launch: [ptx, bytes of shared memory].
"""
import json
import sys

import torch
from triton.runtime import driver

from kernels.lab.proofs.generated_code import Absent, bare_ptx
from kernels.op import DTYPES
from kernels.ops.attention import Sequences, hopper, hopper_spread
from kernels.ops.attention.call import launches
from kernels.ops.attention.form import Form
from kernels.ops.attention.order import LEAF
from kernels.ops.attention.schedule import Schedule


def steps(schedule, width, page, window, dtype):
    """The launches for 4 queries on 4096 keys, 32 heads on 8."""
    pages = [list(range(4096 // page))] if page else None
    sequences = Sequences([4], [4096], pages=pages, page_size=page or None)
    q = torch.empty(4, 32, width, dtype=DTYPES[dtype], device="meta")
    k = torch.empty(*((4096 // page, page) if page else (1, 4096)), 8, width, dtype=DTYPES[dtype], device="meta")
    schedule, form = Schedule.parse(schedule), Form.of(q, k, k, sequences, window, True)
    if schedule.kind == "hopper":
        return hopper.steps(form, sequences, *k.shape[:2])
    if schedule.kind == "hopper_spread":
        return hopper_spread.planned(schedule, form, sequences, *k.shape[:2], LEAF)[0]
    return launches(schedule, form, sequences, LEAF)[0]


def compiled(schedule, target, width, page, window, dtype):
    driver.set_active(Absent(target))
    found = []
    for step in steps(schedule, width, page, window, dtype):
        given = (*step.examples("cpu"), *step.arguments(target >= 90))
        kernel = step.kernel.warmup(*given, grid=(1,), **step.compile_options(target >= 90))
        found.append([bare_ptx(kernel.asm["ptx"]), kernel.metadata.shared])
    return found


if __name__ == "__main__":
    out, sys.stdout = sys.stdout, sys.stderr
    json.dump([compiled(*job) for job in json.load(sys.stdin)], out)
