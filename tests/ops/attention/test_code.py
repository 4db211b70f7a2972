"""The code of attention's kernels, compiled ahead of time: what the order fuses is fused, and nothing else."""
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from common import needs_compiler

from kernels.lab.proofs.generated_code import WITHOUT_LINES, Code, Job
from kernels.lab.records import ROOT
from kernels.ops.attention import schedule as schedules
from kernels.ops.attention.schedule import Schedule

pytestmark = needs_compiler

TARGETS = (80, 90)
JOBS = [(str(s), target, 128, 0, 0, "bfloat16") for s in schedules.tested() for target in TARGETS]
JOBS += [("walk 16 warps=4 stages=3", 90, 80, 16, 100, "float16"),  # pages, a window, columns that are not there
         ("spread 16 warps=4 stages=3", 80, 64, 16, 100, "float16"),
         (str(schedules.HOPPER), 90, 64, 0, 0, "bfloat16"), (str(schedules.HOPPER_FEW), 90, 128, 16, 0, "bfloat16"),
         (str(schedules.HOPPER_MANY), 90, 64, 0, 0, "float16")]


@pytest.fixture(scope="module")
def compiled():
    """job -> Code of each launch."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", **WITHOUT_LINES, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, str(Path(__file__).with_name("ahead.py"))], input=json.dumps(JOBS), cwd=ROOT,
                          env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {job: [Code(Job("attention", "", job[5], job[0], job[1]), ptx, shared_bytes=shared) for ptx, shared in codes]
            for job, codes in zip(JOBS, json.loads(done.stdout), strict=True)}


def all_codes(compiled):
    return [(job, number, code) for job, codes in compiled.items() for number, code in enumerate(codes)]


def test_every_schedule_compiles(compiled):
    assert {job[:2] for job in compiled} >= {(str(s), target) for s in schedules.tested() for target in TARGETS}
    assert all(f".target sm_{job[1]}" in code.ptx for job, _, code in all_codes(compiled))


def test_the_only_approximate_instruction_is_ex2_and_nothing_else_flushes(compiled):
    for job, number, code in all_codes(compiled):
        assert set(code.approximate) == {"ex2.approx.ftz.f32"}, (job, number)
        assert code.flushes == len(code.approximate), (job, number)


FUSED_IN_LOG = 10  # eight coefficients, f * f * q + f, n ln 2 + log m; then M ln 2 + log L


def held(schedule, columns):
    """How many of a tile's rows, and of so many of its columns, one thread holds; where the compiler chooses so."""
    return schedule.rows * columns // (32 * schedule.warps)


def test_fused_multiply_adds_are_those_of_the_order(compiled):
    """One of each number of p, one of each lane, one of each number that joins, and those of a row's logarithm."""
    for job, number, code in all_codes(compiled):
        schedule = Schedule.parse(job[0])
        fused = Counter(re.findall(r"\b(?:fma|mad)\.[\w.]*f(?:16|32|64)\w*", code.ptx))
        assert set(fused) == {"fma.rn.f32"}, (job, number)
        if job[2] != 128 or number:
            continue
        scores = 2 * held(schedule, 128)  # two loops, one masked
        least = scores + (held(schedule, 128) if schedule.kind == "walk" else 0)
        assert least < fused["fma.rn.f32"] <= least + 2 * 4 * 16 + 16 * (FUSED_IN_LOG + 2), (job, fused)


def test_lanes_are_added_in_pairs(compiled):
    """31 additions a lane and row in each of the two loops, where one thread holds a lane; 3 at a leaf's end."""
    for job, number, code in all_codes(compiled):
        schedule = Schedule.parse(job[0])
        if number or job[2] != 128:
            continue
        lanes = held(schedule, 128) // 32
        assert code.float_adds >= 2 * 31 * max(lanes, 1) or schedule.rows == 16, (job, code.float_adds)


def test_products_are_chains_of_the_tensor_core(compiled):
    """Each block's values are added to what the blocks before it gave: nothing is added to a product behind it."""
    for job, codes in compiled.items():
        schedule, ptx = Schedule.parse(job[0]), codes[0].ptx
        products = re.findall(r"\b(mma\.sync|wgmma\.mma_async)[\w.]*?\.(m\d+n\d+k\d+)[\w.]*", ptx)
        assert products and {shape[shape.index("k"):] for _, shape in products} == {"k16"}, job
        wide = job[1] == 90 and schedule.rows >= 64 and schedule.warps >= 4
        if schedule.kind in schedules.ON_HOPPER:
            assert "wgmma.wait_group" in ptx and "cp.async.bulk.tensor" in ptx, job
        assert {kind for kind, _ in products} == {"wgmma.mma_async" if wide else "mma.sync"}, job


def test_memory_fits(compiled):
    for job, number, code in all_codes(compiled):
        schedule = Schedule.parse(job[0])
        most = 227 if schedule.kind in schedules.ON_HOPPER else 99 if schedule.stages == 1 else 163
        assert code.shared_bytes <= most * 1024, (job, number, code.shared_bytes)


def test_launches_wait_before_they_touch_memory(compiled):
    """But for the line of work, which no launch writes: the launch that joins reads its five or six numbers before."""
    for job, number, code in all_codes(compiled):
        waits, launches = (code.ptx.count(f"griddepcontrol.{what}") for what in ("wait", "launch_dependents"))
        if job[1] < 90:
            assert waits == launches == 0, job
            continue
        wait = code.ptx.index("griddepcontrol.wait")
        before = Counter(re.findall(r"\b(?:ld|st|cp|red|atom)\.(?:\w+\.)*global\w*", code.ptx[:wait]))
        read = sum(n for what, n in before.items() if what.startswith("ld"))
        assert sum(before.values()) == read <= (6 if number else 0), (job, number, before)
        assert waits >= 1 and (launches == 0 or wait < code.ptx.index("griddepcontrol.launch_dependents")), job
