"""The code the compiler makes of each schedule: the additions that the order asks for, and nothing fused."""
from dataclasses import replace
from math import ceil, log2

import pytest
from compiling import compile_ahead

from kernels import OPS, runtime
from kernels.arithmetic.sums import CHUNK, tree_width
from kernels.lab import provenance
from kernels.lab.proofs.generated_code import TARGETS, TOKENS, Job, jobs
from kernels.op import DTYPES, Shape
from kernels.ops.matmul.schedule import Schedule
from kernels.ops.rms_norm import rms_norm

pytestmark = pytest.mark.skipif(not runtime.HAS_TRITON, reason="compiling ahead of time needs Triton")

CASES = (("D=8192,residual", "bfloat16"), ("D=5120,residual", "float32"), ("D=1000", "bfloat16"),
         ("D=20000,residual", "float16"))
NARROW = jobs("rms_norm", "D=96,residual", "bfloat16", targets=(90,))
ODD = [Job("rms_norm", "D=1001,residual", dtype, schedule, target) for dtype in ("bfloat16", "float32")
       for schedule in ("rows=1 warps=4", "stream=4 warps=16") for target in TARGETS]


@pytest.fixture(scope="module")
def compiled():
    """Every schedule of every case for every target, compiled once."""
    return compile_ahead([job for shape, dtype in CASES for job in jobs("rms_norm", shape, dtype)] + NARROW + ODD)


def schedule_of(job):
    return {str(s): s for s in rms_norm.schedules(job.shape, DTYPES[job.dtype])}[job.schedule]


def per_thread_of(job):
    """How many of a chunk's columns one thread holds, over all its rows."""
    schedule, width = schedule_of(job), tree_width(Shape.parse(job.shape)["D"])
    return schedule.rows * width // (32 * schedule.warps)


def expected_additions(job):
    """(column by column, from there to the end): float32 additions a thread makes, from the order and the layout.

    A thread holds groups of neighbours of 16 bytes at most; 32 lanes lie side by side, then warps, then repeats.
    """
    schedule, shape = schedule_of(job), Shape.parse(job.shape)
    width, held = tree_width(shape["D"]), per_thread_of(job)
    chunks = schedule.streaming or ceil(shape["D"] / width)
    together = min(16 // DTYPES[job.dtype].itemsize, held)
    groups = held // together
    warps_in_row = min(schedule.warps, width // (32 * together))
    repeats = width // (32 * together * warps_in_row)
    rows = groups // repeats
    residual = chunks * held if shape.get("residual") and job.dtype == "float32" else 0  # else added in 16 bits
    columns = (chunks if schedule.streaming else chunks - 1) * held  # a loop starts from zeros
    tree = groups * (together - 1) + groups * 5 + int(log2(warps_in_row)) + rows * (repeats - 1)
    return residual + columns, tree + rows  # and one addition of eps a row


def test_a_product_in_lockstep_is_compiled_for_a_token_count_that_it_takes(monkeypatch):
    """An H200 chooses such schedules for many tokens; two rows of programs would lack chains at 300."""
    found = [Schedule.parse(f"hopper 192x192x64 warps=12 stages=4 group=8 persistent store stream{way}")
             for way in ("", " lockstep")]
    monkeypatch.setitem(OPS, "matmul", replace(OPS["matmul"], schedules=lambda shape, dtype: found))
    plain, locked = jobs("matmul", "N=7168,K=8192", "bfloat16", targets=(90,))
    assert plain.tokens == TOKENS < locked.tokens == 132 * 192
    for job in (plain, locked):
        assert provenance.launches(OPS[job.op], job.schedule, job.dtype, job.shape, job.tokens)
    assert jobs("matmul", "N=7168,K=8192", "bfloat16", targets=(90,), tokens=400)[1].tokens == 400


def names(codes):
    return [f"sm_{c.job.target} {c.job.shape} {c.job.dtype} {c.job.schedule}" for c in codes]


def test_every_schedule_compiles_for_every_target(compiled):
    assert {c.job.target for c in compiled} == set(TARGETS)
    for shape, dtype in CASES:
        made = {(c.job.schedule, c.job.target) for c in compiled if (c.job.shape, c.job.dtype) == (shape, dtype)}
        assert made == {(str(s), t) for s in rms_norm.schedules(shape, DTYPES[dtype]) for t in TARGETS}
    assert all(f".target sm_{c.job.target}" in c.ptx for c in compiled)


def test_nothing_is_fused(compiled):
    assert names(c for c in compiled if c.fused) == []


def test_no_subnormal_is_flushed(compiled):
    assert names(c for c in compiled if c.flushes) == []


def test_nothing_is_approximate(compiled):
    assert names(c for c in compiled if c.approximate) == []


def test_square_root_and_quotient_are_correctly_rounded(compiled):
    assert names(c for c in compiled if not c.square_roots) == []
    assert names(c for c in compiled if c.square_roots != c.divisions) == []


def exact(codes):
    """Where a warp's 32 lanes lie in one row and the pointers stay aligned, the layout decides every addition."""
    return [c for c in codes if c.job.shape not in ("D=96,residual", "D=1001,residual")]


def test_resident_schedules_add_exactly_what_the_order_says(compiled):
    checked = [c for c in exact(compiled) if c.job.target < 100 and not schedule_of(c.job).streaming]
    assert {names([c])[0]: c.float_adds for c in checked} == {
        names([c])[0]: sum(expected_additions(c.job)) for c in checked}
    assert len(checked) > 50


def test_streaming_schedules_add_exactly_what_the_order_says(compiled):
    """A loop may be unrolled n times; unrolled whole, it need not add its first chunk to zeros."""
    checked = [c for c in exact(compiled) if c.job.target < 100 and schedule_of(c.job).streaming]
    for code in checked:
        body, tail = expected_additions(code.job)
        rounds = ceil(Shape.parse(code.job.shape)["D"] / CHUNK / schedule_of(code.job).streaming)
        allowed = {n * body for n in range(1, rounds + 1)} | {rounds * body - per_thread_of(code.job)}
        assert code.float_adds - tail in allowed, names([code])
    assert len(checked) > 20


def test_packed_additions_leave_none_out(compiled):
    """sm_100 adds two numbers at once, sometimes with one of the two places unused."""
    checked = [c for c in exact(compiled) if c.job.target == 100 and not schedule_of(c.job).streaming]
    assert any(c.packed_adds for c in checked)
    for code in checked:
        wanted = sum(expected_additions(code.job))
        assert code.float_adds + code.packed_adds <= wanted <= code.float_adds + 2 * code.packed_adds, names([code])


def test_loads_are_16_bytes_wide(compiled):
    for code in compiled:
        if code.job.shape == "D=8192,residual" and code.job.schedule in ("rows=1 warps=4", "stream=4 warps=4"):
            assert set(code.global_loads) == {16}, names([code])


def test_a_misaligned_row_is_not_read_in_wide_pieces(compiled):
    """Rows of 1001 numbers start anywhere: a 16-byte load of them would fault."""
    odd = [c for c in compiled if c.job.shape == "D=1001,residual"]
    assert len(odd) == len(ODD)
    for code in odd:
        width = DTYPES[code.job.dtype].itemsize
        rows_are_read = code.global_loads[width]
        assert rows_are_read >= 2 * per_thread_of(code.job), names([code])


def test_a_streamed_row_is_all_written_before_it_is_read_back(compiled):
    """In rows of odd width a thread reads what another stored: the barriers of the sum must lie in between."""
    streamed = [c for c in compiled if "stream" in c.job.schedule and "residual" in c.job.shape]
    assert any(c.job in ODD for c in streamed)
    for code in streamed:
        first_pass = code.ptx[: code.ptx.index("sqrt.rn")]
        assert "bar.sync" in first_pass[first_pass.rindex("st.global") :], names([code])


def test_a_kernel_waits_for_the_one_before_it(compiled):
    """Where kernels may overlap (sm_90 and later), nothing touches memory before the wait; elsewhere there is none."""
    for code in compiled:
        waits = [code.ptx.find(f"griddepcontrol.{what}") for what in ("wait", "launch_dependents")]
        if code.job.target < 90:
            assert waits == [-1, -1], names([code])
        else:
            memory = min(code.ptx.index("ld.global"), code.ptx.index("st.global"))
            assert -1 < waits[0] < memory and waits[0] < waits[1], names([code])


def test_few_shuffles(compiled):
    """Lanes cost five exchanges a group, warps one a level: 7 for 1024 columns in 4 warps, against 50 the other way."""
    by_schedule = {c.job.schedule: c.shuffles for c in compiled if c.job.shape == "D=8192,residual"}
    assert [by_schedule[f"rows=1 warps={w}"] for w in (4, 8, 16)] == [7, 8, 9]
    assert [by_schedule[f"stream=4 warps={w}"] for w in (4, 16)] == [7, 9]


def test_schedules_of_choice_shuffle_little(compiled):
    """The schedules that `triton` really picks, at every token count."""
    for shape, dtype in {(c.job.shape, c.job.dtype) for c in compiled} - {(j.shape, j.dtype) for j in ODD}:
        chosen = {rms_norm.schedule(tokens, shape, DTYPES[dtype]) for tokens in (1, 64, 4096, 65536)}
        found = [c for c in compiled if (c.job.shape, c.job.dtype) == (shape, dtype) and c.job.schedule in chosen]
        assert found and names(c for c in found if c.shuffles > 16) == []


@pytest.fixture(scope="module")
def assembled():
    """One schedule down to SASS: for one chunk, for eight, and for eight with the compiler free to fuse."""
    return compile_ahead([Job("rms_norm", f"D={width},residual", "bfloat16", "rows=1 warps=4", 90, fusion)
                          for width, fusion in ((1024, False), (8192, False), (8192, True))], sass=True, workers=1)


def test_the_assembler_fuses_nothing_either(assembled):
    """sqrt.rn and div.rn become short programs with multiply-adds of their own: as many for 8 chunks as for one."""
    one, eight, _ = assembled
    assert one.sass_count("FFMA") == eight.sass_count("FFMA")
    assert eight.sass_count("FADD") - one.sass_count("FADD") == 7 * 8  # seven more chunks, eight columns a thread


def test_the_check_notices_fusion(assembled):
    """Inverse test: left to itself, the compiler fuses every square into the sum, and the counts say so."""
    _, plain, fused = assembled
    assert plain.fused == 0
    assert fused.fused == 7 * 8 + 1  # seven chunks after the first, eight columns a thread; mean + eps
    assert plain.float_adds - fused.float_adds == fused.fused
    assert fused.sass_count("FFMA") - plain.sass_count("FFMA") == fused.fused


def test_a_job_that_does_not_compile_says_why():
    with pytest.raises(RuntimeError, match="no such schedule"):
        compile_ahead([Job("rms_norm", "D=64", "bfloat16", "no such schedule", 90)])
