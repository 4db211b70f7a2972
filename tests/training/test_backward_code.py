"""The code of backward passes, compiled ahead of time: nothing is fused, flushed or added but what is written so."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kernels import runtime
from kernels.lab.proofs.generated_code import WITHOUT_LINES, Code, Job
from kernels.lab.records import ROOT

pytestmark = pytest.mark.skipif(not runtime.HAS_TRITON, reason="compiling ahead of time needs Triton")

NAMES = ("attention", "attention of 128", "rms_norm", "rms_norm of 5000", "swiglu", "cross_entropy")
JOBS = [(name, target) for name in NAMES for target in (80, 90)]


@pytest.fixture(scope="module")
def compiled():
    """(name, target) -> [(Code, warps) of each launch]"""
    environment = {**os.environ, "TRITON_INTERPRET": "0", **WITHOUT_LINES, "PYTHONPATH": str(ROOT)}
    script = Path(__file__).with_name("ahead_of_time.py")
    done = subprocess.run([sys.executable, str(script)], input=json.dumps(JOBS), cwd=ROOT, env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {job: [(Code(Job(job[0], "", "", "", job[1]), ptx, shared_bytes=shared), warps)
                  for ptx, shared, warps in launches]
            for job, launches in zip(JOBS, json.loads(done.stdout), strict=True)}


def codes(compiled, *names):
    return [(job, number, code) for job, launches in compiled.items() if not names or job[0] in names
            for number, (code, _) in enumerate(launches)]


ATTENTION = ("attention", "attention of 128")


def test_every_pass_compiles_for_its_target(compiled):
    assert set(compiled) == set(JOBS) and all(f".target sm_{job[1]}" in code.ptx for job, _, code in codes(compiled))
    assert {job: len(launches) for job, launches in compiled.items()} == {
        job: 2 if job[0] in ATTENTION else 1 for job in JOBS}


def test_the_only_approximate_instruction_is_ex2_of_attention(compiled):
    for job, number, code in codes(compiled):
        wanted = {"ex2.approx.ftz.f32"} if job[0] in ATTENTION else set()
        assert set(code.approximate) == wanted and code.flushes == len(code.approximate), (job, number)


def test_fused_multiply_adds_are_those_of_the_order(compiled):
    """One a weight of attention, 9 an exponential, none in RMSNorm."""
    for job, number, code in codes(compiled):
        if job[0] in ATTENTION:
            assert code.fused == code.count(r"ex2\.approx\.ftz\.f32"), (job, number)
        elif job[0].startswith("rms_norm"):
            assert code.fused == 0, job
        else:
            numbers = 8 if job[0] == "swiglu" else 2  # a thread's of 1024 on 128 threads, of 256 on as many
            assert code.fused == 9 * numbers, (job, code.fused)


def test_sums_of_attention_are_chains_of_the_tensor_core(compiled):
    """Nothing is added to a product behind it: of the kernel of keys, one 0 + scale is the only addition."""
    for job, number, code in codes(compiled, *ATTENTION):
        products = re.findall(r"\b(mma\.sync|wgmma\.mma_async)[\w.]*?\.(m\d+n\d+k\d+)[\w.]*", code.ptx)
        assert products and {shape[shape.index("k"):] for _, shape in products} == {"k16"}, job
        assert {kind for kind, _ in products} == {"wgmma.mma_async" if job[1] == 90 else "mma.sync"}, job
        assert code.float_adds <= 1 if number == 1 else code.float_adds >= 6, (job, number, code.float_adds)


def test_no_number_is_added_by_atomics(compiled):
    assert not [job for job, _, code in codes(compiled) if re.search(r"\b(atom|red)\.", code.ptx)]


def test_memory_fits_a_small_gpu(compiled):
    assert all(code.shared_bytes <= 163 * 1024 for _, _, code in codes(compiled))
    assert all(code.shared_bytes <= 99 * 1024 for _, _, code in codes(compiled, "attention"))


def test_launches_wait_before_they_touch_memory(compiled):
    for job, _, code in codes(compiled):
        wait, launch = (code.ptx.find(f"griddepcontrol.{what}") for what in ("wait", "launch_dependents"))
        touches = [code.ptx.index(what) for what in ("ld.global", "st.global", "cp.async") if what in code.ptx]
        assert -1 < wait < min(*touches, launch) if job[1] >= 90 else wait == launch == -1, job
