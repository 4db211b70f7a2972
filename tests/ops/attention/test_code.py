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
         (str(schedules.BLOCKS), 90, 80, 16, 100, "float16"),
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


def makes_scores_alone(job, number):
    """Whether a launch does nothing but scores: no weights, no sums."""
    return Schedule.parse(job[0]).kind == "blocks" and number == 0


def takes_leaves(job, number):
    """Whether a launch takes rows through the blocks of leaves."""
    return number == (1 if Schedule.parse(job[0]).kind == "blocks" else 0)


def test_every_schedule_compiles(compiled):
    assert {job[:2] for job in compiled} >= {(str(s), target) for s in schedules.tested() for target in TARGETS}
    assert all(f".target sm_{job[1]}" in code.ptx for job, _, code in all_codes(compiled))


def test_the_only_approximate_instruction_is_ex2_and_nothing_else_flushes(compiled):
    for job, number, code in all_codes(compiled):
        assert set(code.approximate) == (set() if makes_scores_alone(job, number) else {"ex2.approx.ftz.f32"}), job
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
        assert set(fused) == (set() if makes_scores_alone(job, number) else {"fma.rn.f32"}), (job, number)
        if job[2] != 128 or not takes_leaves(job, number):
            continue
        scores = (8 if number else 2) * held(schedule, 128)  # eight blocks written out, or two loops, one masked
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


TOUCHES = re.compile(r"\b(?:ld|st|cp|red|atom)\.(?:\w+\.)*global[\w.]*")
SETS = re.compile(r"[\w.]+\s+(\{[^{}]*\}|%\w+)(?:\|%\w+)?\s*,(.*)", re.DOTALL)  # what a statement sets, and from what


def touched(ptx):
    """(instruction, the registers of its address) of each that touches global memory."""
    found = [(TOUCHES.search(statement), statement) for statement in ptx.split(";")]
    return [(what[0], set(re.findall(r"%\w+", statement[statement.index("["):statement.index("]")])))
            for what, statement in found if what]


def depend_on(parameter, ptx):
    """The registers whose numbers come from a kernel's parameter."""
    found = set()
    for made in filter(None, map(SETS.search, ptx.split(";"))):
        if re.search(rf"_param_{parameter}\b", made[2]) or found & set(re.findall(r"%\w+", made[2])):
            found |= set(re.findall(r"%\w+", made[1]))
    return found


def test_launches_wait_before_they_touch_memory(compiled):
    """An op's first launch touches none before, so that all before the op has ended when the second begins.

    That one and the third may read before, but nothing that the launches before them write: the launch that joins reads
    its five or six numbers of work, and the second of kind blocks values too, not through L1, which may hold old ones.
    """
    for job, number, code in all_codes(compiled):
        waits, launches = (code.ptx.count(f"griddepcontrol.{what}") for what in ("wait", "launch_dependents"))
        if job[1] < 90:
            assert waits == launches == 0, job
            continue
        before, behind = code.ptx.split("griddepcontrol.wait", 1)
        assert "griddepcontrol.launch_dependents" not in before, (job, number)
        early, values = touched(before), number and takes_leaves(job, number)
        part = depend_on(5 if values else 0, code.ptx)  # what the launch before leaves
        assert all(what.startswith("ld") and not address & part for what, address in early), (job, number, early)
        assert not number or any(address & part for what, address in touched(behind) if what.startswith("ld")), job
        assert len([what for what, _ in early if not values or ".cg" not in what]) <= (16 if values else 6 if number
                                                                                      else 0), (job, number, early)
        assert not values or any(".cg" in what for what, _ in early), job
