"""softmax and log_softmax: the specification against a pencil, schedules against it, and nothing against the batch.

Tests without the mark `gpu` run where they are: on a GPU the compiled kernels, elsewhere Triton's interpreter, for
which the sizes are small: it takes a tenth of a second or more a program.
"""
import math
import re
import subprocess
import sys
import warnings
from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import OPS, runtime
from kernels.arithmetic.elementary import exp, log
from kernels.arithmetic.sums import ordered_sum, tree_width
from kernels.bits import ADVERSARIAL, adversarial, check_invariance, elements_differ, same_bits
from kernels.lab.proofs.generated_code import TARGETS, Job, compile_ahead
from kernels.lab.records import ROOT
from kernels.op import DTYPES, Shape
from kernels.ops.softmax import Schedule, run_schedule

MODULE = import_module("kernels.ops.softmax")  # the package's name `softmax` is the op
SOFTMAX, LOG = OPS["softmax"], OPS["log_softmax"]
HERE = runtime.device()
INF, NAN = math.inf, math.nan

every_op = pytest.mark.parametrize("op", [SOFTMAX, LOG], ids=["softmax", "log_softmax"])
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
both = pytest.mark.parametrize("name", ["python", pytest.param("triton", marks=pytest.mark.skipif(
    bool(runtime.WHY_NOT), reason=runtime.WHY_NOT or "Triton runs here"))])
needs_triton = pytest.mark.skipif(bool(runtime.WHY_NOT), reason=runtime.WHY_NOT or "Triton runs here")
dtypes, ops = st.sampled_from(list(DTYPES.values())), st.sampled_from([SOFTMAX, LOG])


def numbers(rows, width, dtype=torch.float32, seed=0, device=HERE):
    return SOFTMAX.inputs(rows, Shape(D=width), dtype, device, seed)[0]


def rising(rows, width, dtype=torch.float32, seed=0, device=HERE):
    """Numbers below 2 in one column, rising from chunk to chunk, and the others masked.

    Where other columns are added, or one number exceeds the rest, another order in a column seldom shows.
    """
    x = torch.full((rows, width), -INF, dtype=dtype, device=device)
    x[:, ::1024] = (numbers(rows, width, dtype, seed, device)[:, ::1024] / 8).sort().values
    return x


# One segment of 10 chunks, 9 chunks in segments of 2 (see short_segments), and the shortest row in segments of 8, its
# last number alone in a chunk. The seeds are chosen so that any other segments would move bits.
FEW_CHUNKS, SHORT_SEGMENTS, LONG = (rising(rows, width, seed=seed, device="cpu") for rows, width, seed in (
    (1, 9300, 6), (2, 9000, 19), (1, 32769, 43)))


def hostile(width, dtype, device=HERE):
    """Three rows of each adversarial kind, one under the other."""
    return torch.cat([adversarial(kind, 3, width, dtype, device) for kind in ADVERSARIAL])


def run(op, schedule, x, dim=-1):
    return run_schedule(schedule, x, dim, logarithm=op is LOG)


@pytest.fixture
def short_segments(monkeypatch):
    """Rows of more than 2 chunks in segments of 2, so that a short row has several: for `python` and run_schedule."""
    monkeypatch.setattr(MODULE, "WHOLE", 2)
    monkeypatch.setattr(MODULE, "SEGMENT", 2)


# the specification against a pencil


def e(x):
    return exp(torch.from_numpy(np.atleast_1d(x))).numpy().reshape(np.shape(x))


def pencil(op, x, whole=32, segment=8):
    """The docstring of kernels/ops/softmax.py in NumPy, row by row; torch only rounds to 16 bits."""
    one, rows = np.float32(1), []
    for row in x.float().numpy():
        width = next((2**i for i in range(10) if 2**i >= len(row)), 1024)
        chunks = np.full((-(-len(row) // width), width), -np.inf, np.float32)
        chunks.flat[:len(row)] = row
        size = len(chunks) if len(chunks) <= whole else segment
        m, s = np.full(width, np.finfo(np.float32).min), np.zeros(width, np.float32)
        for i in range(0, len(chunks), size):
            larger = np.max([m, *chunks[i : i + size]], axis=0)
            s = s * e(m - larger)
            m = larger
            for chunk in chunks[i : i + size]:
                s = s + e(chunk - m)
        shares = s * e(m - m.max())
        while len(shares) > 1:
            shares = np.array([shares[j] + shares[j + 1] for j in range(0, len(shares), 2)])
        if op is LOG:
            y = (chunks - m.max()) - log(torch.from_numpy(shares)).numpy()
        else:
            y = e(chunks - m) * (e(m - m.max()) * (one / shares[0]))
        rows.append(torch.from_numpy(y.reshape(-1)[: len(row)]).to(x.dtype))
    return torch.stack(rows)


def test_three_numbers_by_hand():
    """Four columns, the last of -inf: its largest is the lowest float32, and it adds +0."""
    x = torch.tensor([1.0, 3.0, 2.0])
    a, b, c = exp(torch.tensor([-2.0, 0.0, -1.0]))
    total = (a + b) + (c + 0.0)
    assert b == 1.0
    assert same_bits(SOFTMAX.python(x), torch.stack([f * (1.0 / total) for f in (a, b, c)]))
    assert same_bits(LOG.python(x), torch.stack([v - log(total) for v in (x - 3.0)]))


@settings(deadline=None, max_examples=60)
@given(op=ops, width=st.integers(1, 5000), dtype=dtypes, seed=st.integers(0, 10**6))
def test_the_specification_is_the_pencil(op, width, dtype, seed):
    x = numbers(2, width, dtype, seed, "cpu")
    assert same_bits(op.python(x), pencil(op, x))


@every_op
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # the pencil meets inf - inf
def test_the_specification_is_the_pencil_for_adversarial_rows(op):
    for dtype in DTYPES.values():
        for width in (700, 2300):
            x = hostile(width, dtype, "cpu")
            assert same_bits(op.python(x), pencil(op, x))


@every_op
@pytest.mark.parametrize("width", [32768, 32769, 42000])
def test_the_specification_of_long_rows_is_the_pencil(op, width):
    x = torch.cat([numbers(1, width, device="cpu").sort().values, rising(1, width, device="cpu")])
    assert same_bits(op.python(x), pencil(op, x))


@every_op
@pytest.mark.parametrize(("x", "whole", "segment", "others"), [
    (FEW_CHUNKS, 32, 8, [1, 2, 4, 8]), (SHORT_SEGMENTS, 2, 2, [1, 3, 4, 8, 99]), (LONG, 32, 8, [4, 16, 32, 99])],
    ids=["one segment", "segments of 2", "segments of 8"])
def test_other_segments_move_bits(op, x, whole, segment, others):
    """Inverse test: the rows that kernels are tested with tell every other length of segments from the right one."""
    wanted = pencil(op, x, whole, segment)
    assert whole == 2 or same_bits(op.python(x), wanted)
    for other in others:
        assert elements_differ(wanted, pencil(op, x, 1, other)) > 0, other


@every_op
def test_the_specification_ignores_the_thread_count(op):
    x, before = numbers(30, 3000, device="cpu"), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(op.python(x))
    finally:
        torch.set_num_threads(before)
    assert same_bits(results[0], results[1]) and same_bits(results[0], results[2])


# schedules against the specification


def kinds(op, shape, dtype):
    """The schedules that differ in more than warps, which an interpreter does not have."""
    return dict.fromkeys(replace(s, warps=4) for s in op.schedules(shape, dtype))


@needs_triton
@settings(deadline=None, max_examples=10)
@given(op=ops, rows=st.integers(1, 3), width=st.integers(1, 2100), dtype=dtypes, seed=st.integers(0, 10**6))
def test_triton_is_python(op, rows, width, dtype, seed):
    x = numbers(rows, width, dtype, seed)
    assert same_bits(op.triton(x), op.python(x))


@needs_triton
@every_op
@pytest.mark.parametrize("width", [1, 2, 3, 127, 128, 1000, 1023, 1024, 1025])
def test_triton_is_python_at_every_width(op, width):
    x = numbers(1, width, torch.bfloat16, seed=width)
    assert same_bits(op.triton(x), op.python(x))


@needs_triton
@every_op
@pytest.mark.parametrize(("rows", "shape", "dtype"), [(3, "D=3", torch.float16), (2, "D=40", torch.bfloat16)])
def test_every_schedule_is_python(op, rows, shape, dtype):
    x = numbers(rows, Shape.parse(shape)["D"], dtype)
    wanted = op.python(x)
    assert {s.kind for s in kinds(op, shape, dtype)} == {"resident", "stream", "columns"}
    for schedule in kinds(op, shape, dtype):
        assert same_bits(run(op, schedule, x), wanted), schedule


CHAINED = (Schedule("resident", 4), Schedule("resident", 4, rows=2), Schedule("stream", 4),
           Schedule("stream", 4, flight=4), Schedule("columns", 4, columns=512, chunks=2))


@needs_triton
@every_op
@pytest.mark.parametrize("schedule", CHAINED, ids=str)
def test_schedules_of_several_chunks_are_python(op, schedule):
    """10 chunks: one segment of the order, but more than a stream with one segment in flight has at once."""
    x = FEW_CHUNKS.repeat(schedule.rows, 1).to(HERE)
    assert same_bits(run(op, schedule, x), op.python(x))


@needs_triton
@every_op
@pytest.mark.parametrize("schedule", [
    Schedule("stream", 4, flight=1), Schedule("stream", 4, flight=2),
    Schedule("columns", 4, flight=4, columns=1024, chunks=4)], ids=str)
def test_segmented_schedules_are_python(op, schedule, short_segments):
    x = SHORT_SEGMENTS.to(HERE)
    assert same_bits(run(op, schedule, x), op.python(x))


@needs_triton
@pytest.mark.parametrize(("op", "schedule"), [
    (SOFTMAX, Schedule("columns", 4, flight=4, columns=1024, chunks=32)), (LOG, Schedule("stream", 4, flight=2))],
    ids=["softmax by columns", "log_softmax in a stream"])
def test_a_long_row_is_python(op, schedule):
    x = LONG.to(HERE)
    assert same_bits(run(op, schedule, x), op.python(x))


@needs_triton
@every_op
def test_triton_is_python_for_adversarial_rows(op):
    for dtype in (torch.float32, torch.float16):
        x = hostile(200, dtype)
        result, wanted = run(op, Schedule("resident", 4, rows=16), x), op.python(x)
        assert [kind for i, kind in enumerate(ADVERSARIAL) if not same_bits(
            result[3 * i : 3 * i + 3], wanted[3 * i : 3 * i + 3])] == []


@every_op
@every_dtype
def test_schedules_of_choice_are_all_tested(op, dtype):
    for width in (1, 3, 17, 100, 128, 129, 500, 1000, 1024, 2000, 8192, 8193, 32000, 32768, 32769, 128256):
        tested = {str(s) for s in op.schedules(f"D={width}", dtype)}
        chosen = {op.schedule(tokens, f"D={width}", dtype) for tokens in (*range(1, 3000, 13), 10**5, 10**6)}
        assert chosen <= tested, (width, chosen - tested)


@needs_triton
def test_a_resident_schedule_refuses_a_long_row():
    with pytest.raises(ValueError, match="rows=1 warps=4.*32768.*32769"):
        run_schedule(Schedule("resident", 4), numbers(1, 32769))


# nothing against the batch


@every_op
@every_dtype
@pytest.mark.parametrize("width", [40, 1000, 2100])
def test_a_row_ignores_its_batch(op, dtype, width):
    """Alone, in batches of any size, first, last, reversed, repeated."""
    report = check_invariance(op.python, (numbers(7, width, dtype),))
    assert report, str(report)


@every_op
def test_a_long_row_ignores_its_batch(op):
    report = check_invariance(op.python, (torch.cat([numbers(2, 33000), rising(2, 33000)]),),
                              batches=[slice(i, i + 1) for i in range(4)] + [torch.tensor([3, 1, 0])])
    assert report, str(report)


@needs_triton
@every_op
def test_a_row_ignores_its_batch_in_a_kernel(op):
    report = check_invariance(op.triton, (numbers(4, 1025, torch.bfloat16),))
    assert report, str(report)


@needs_triton
@settings(deadline=None, max_examples=10)
@given(data=st.data(), op=ops, tokens=st.integers(1, 9), width=st.integers(1, 300), dtype=dtypes)
def test_any_choice_of_rows_keeps_their_bits(data, op, tokens, width, dtype):
    """Several rows a program: every position in it, and every neighbour."""
    chosen = data.draw(st.lists(st.integers(0, tokens - 1), min_size=1, max_size=9))
    schedule = data.draw(st.sampled_from([Schedule("resident", 4, rows=rows) for rows in (4, 8, 16)]))
    report = check_invariance(lambda x: run(op, schedule, x), (numbers(tokens, width, dtype),),
                              batches=[torch.tensor(chosen)])
    assert report, str(report)


@needs_triton
@every_op
@pytest.mark.parametrize("schedule", [None, Schedule("resident", 4, rows=4), Schedule("stream", 4),
                                      Schedule("columns", 4, columns=64)], ids=str)
def test_bad_neighbours_do_not_reach_a_row(op, schedule):
    x = numbers(6, 60)
    wanted = op.python(x)
    for row, bad in ((1, NAN), (2, INF), (4, -INF)):
        x[row] = bad
    spoiled = op.python(x) if schedule is None else run(op, schedule, x)
    clean = [0, 3, 5]
    assert same_bits(spoiled[clean], wanted[clean])
    assert spoiled[[1, 2, 4]].isnan().all()


def split(x):
    """What a library does: the sum of exponentials cut into as many parts as leave no core idle."""
    exponentials = exp(x - x.amax(-1, keepdim=True))
    total = sum(ordered_sum(part) for part in exponentials.tensor_split(max(1, 64 // len(x)), dim=-1))
    return exponentials / total


def test_a_split_sum_of_exponentials_moves_bits():
    """Inverse test: the check fails on a sum whose parts depend on the batch."""
    report = check_invariance(split, (numbers(64, 1024),), batches=[slice(0, n) for n in (1, 4, 16)])
    assert not report and report.elements_differ > report.elements / 100
    assert torch.allclose(split(numbers(3, 1024)), SOFTMAX.python(numbers(3, 1024)), rtol=1e-5, atol=0)


# dimensions and strides


@both
@every_op
@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2, -3])
def test_every_dimension(op, name, dim):
    x = numbers(2, 6, torch.bfloat16).view(2, 3, 2)
    result = op.implementation(name)(x, dim)
    assert (result.shape, result.dtype, result.is_contiguous()) == (x.shape, x.dtype, True)
    assert same_bits(result, op.python(x.movedim(dim, -1).contiguous()).movedim(-1, dim))
    assert torch.allclose(result.float(), op.cuda(x.float(), dim), rtol=2**-7, atol=1e-30)


@both
@every_op
def test_the_last_dimension_is_the_default(op, name):
    x = numbers(3, 5)
    assert same_bits(op.implementation(name)(x), op.implementation(name)(x, 1))
    assert not same_bits(op.implementation(name)(x), op.implementation(name)(x, 0))


@both
@every_op
def test_a_tensor_without_dimensions_is_a_row_of_one_number(op, name):
    x = torch.tensor(3.5, device=HERE)
    for dim in (0, -1):
        assert same_bits(op.implementation(name)(x, dim), torch.tensor(0.0 if op is LOG else 1.0, device=HERE))


@both
@every_op
@every_dtype
@pytest.mark.parametrize(("shape", "dim"), [((0, 5), -1), ((3, 0), -1), ((3, 0), 0), ((2, 0, 4), 2), ((0,), 0)])
def test_nothing_gives_nothing(op, name, dtype, shape, dim):
    result = op.implementation(name)(torch.empty(shape, dtype=dtype, device=HERE), dim)
    assert (result.shape, result.dtype, result.device) == (torch.Size(shape), dtype, HERE)


def views(x):
    """name -> the same numbers as x (rows, width), behind other strides."""
    rows, width = x.shape
    wide, tall, apart, turned, odd = (torch.full(size, NAN, dtype=x.dtype, device=x.device) for size in (
        (rows, width + 24), (2 * rows, width), (rows, 2 * width), (width, rows), (rows, width + 3)))
    wide[:, 8 : 8 + width], tall[::2], apart[:, ::2], turned[:], odd[:, 1 : 1 + width] = x, x, x, x.t(), x
    return {"columns of a wider tensor": wide[:, 8 : 8 + width], "every second row": tall[::2],
            "every second column": apart[:, ::2], "transposed": turned.t(), "misaligned": odd[:, 1 : 1 + width]}


@both
@every_op
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("width", [1, 70])
def test_strides_do_not_matter(op, name, dtype, width):
    x = numbers(2, width, dtype)
    wanted = op.python(x)
    for how, view in views(x).items():
        assert same_bits(view, x)
        result = op.implementation(name)(view)
        assert same_bits(result, wanted) and result.is_contiguous(), how


@needs_triton
@every_op
@pytest.mark.parametrize("schedule", [Schedule("resident", 4, rows=2), Schedule("stream", 4),
                                      Schedule("columns", 4, columns=64)], ids=str)
def test_each_kernel_reads_rows_in_place(op, schedule):
    x = numbers(2, 40)
    for how in ("columns of a wider tensor", "every second row"):
        assert same_bits(run(op, schedule, views(x)[how]), op.python(x)), how
    assert same_bits(run(op, schedule, x[:1].expand(2, 40)), op.python(x[:1]).repeat(2, 1))
    x = x[:, :2].contiguous()
    assert same_bits(run(op, schedule, x.t(), 0), op.python(x).t())


@both
@every_op
def test_views_that_only_say_so(op, name):
    """Expanded, lazily negated, folded, and with dimensions of one element whose strides mean nothing."""
    call, x = op.implementation(name), numbers(3, 20, torch.bfloat16)
    assert same_bits(call(x[1].expand(3, 20)), call(x[1]).repeat(3, 1))
    assert same_bits(call(x[:, :1].expand(3, 20)), call(x[:, :1].repeat(1, 20)))
    negated = torch._neg_view(x)
    assert negated.is_neg() and same_bits(call(negated), call(-x))
    assert same_bits(call(x.as_strided((1, 20), (7, 1))), call(x[:1]))
    assert same_bits(call(x.as_strided((3, 1), (20, 9))), call(x[:, :1].clone()))
    assert same_bits(call(x.view(3, 1, 20)[:, :, ::2], -1), call(x[:, ::2]).view(3, 1, 10))
    overlapping = x.flatten().as_strided((3, 20), (5, 1))
    assert same_bits(call(overlapping), call(overlapping.clone()))


@needs_triton
@every_op
def test_one_schedule_of_a_lazily_negated_view(op):
    x = numbers(2, 20)
    assert same_bits(run(op, Schedule("resident", 4), torch._neg_view(x)), op.python(-x))


@both
@every_op
def test_inputs_are_left_alone_and_outputs_are_new(op, name):
    x = numbers(3, 50)
    before = x.clone()
    first, second = op.implementation(name)(x), op.implementation(name)(x)
    assert same_bits(first, second) and same_bits(x, before)
    assert len({t.data_ptr() for t in (x, first, second)}) == 3


# corners


LOWEST, HIGHEST = torch.finfo(torch.float32).min, torch.finfo(torch.float32).max
CORNERS = {
    "zeros": [0.0, -0.0, 0.0, -0.0, 0.0],
    "masked in part": [1.0, -INF, 2.0, -INF, -INF],
    "masked but one": [-INF, -INF, -3.0, -INF, -INF],
    "masked": [-INF] * 5,
    "+inf": [1.0, INF, 2.0, -INF, 0.0],
    "+inf alone": [INF] * 5,
    "NaN": [1.0, NAN, 2.0, 3.0, 0.0],
    "NaN among infinities": [-INF, NAN, INF, -INF, 0.0],
    "lowest": [LOWEST] * 5,
    "highest": [HIGHEST] * 5,
    "lowest and highest": [LOWEST, HIGHEST, 0.0, 1.0, HIGHEST],
    "lowest and masked": [LOWEST, -INF, LOWEST, -INF, -INF],
    "subnormal": [1e-45, 1e-40, -1e-45, 0.0, 1e-38],
    "beyond the exponential's range": [0.0, -86.0, -88.0, -103.9, -104.1],
}


@every_op
@pytest.mark.parametrize("case", CORNERS)
def test_corners_are_torchs(op, case):
    x = torch.tensor(CORNERS[case])
    result, wanted = op.python(x), op.cuda(x)
    assert torch.equal(result.isnan(), wanted.isnan()) and (wanted.isnan().all() or not wanted.isnan().any())
    assert torch.allclose(result, wanted, rtol=1e-6, atol=1e-44, equal_nan=True)


@every_op
def test_exact_results_at_the_corners(op):
    nothing, everything = (-INF, 0.0) if op is LOG else (0.0, 1.0)
    for row, wanted in (([-INF, -INF, -3.0, -INF], [nothing, nothing, everything, nothing]),
                        ([HIGHEST, LOWEST, 0.0, -INF], [everything, nothing if op is SOFTMAX else -INF,
                                                        nothing if op is SOFTMAX else LOWEST, nothing]),
                        ([LOWEST], [everything])):
        assert same_bits(op.python(torch.tensor(row)), torch.tensor(wanted))
    for value in (LOWEST, HIGHEST, 0.0):
        assert same_bits(SOFTMAX.python(torch.full((8,), value)), torch.full((8,), 0.125))


@needs_triton
@every_op
@pytest.mark.parametrize(("schedule", "names"), [
    (Schedule("resident", 4, rows=16), list(CORNERS)),
    (Schedule("stream", 4), ["masked in part", "masked", "+inf", "NaN"]),
    (Schedule("columns", 4, columns=8), ["masked", "lowest and highest", "NaN among infinities"])], ids=str)
def test_corners_are_the_same_in_a_kernel_and_raise_no_warning(op, schedule, names):
    x = torch.tensor([CORNERS[name] for name in names], device=HERE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = run(op, schedule, x)
    wanted = op.python(x)
    assert [name for i, name in enumerate(names) if not same_bits(result[i], wanted[i])] == []


@needs_triton
@every_op
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_one_bad_number_in_a_segmented_row(op, bad, short_segments):
    """In the last segment; another row is masked up to there."""
    x = numbers(2, 2500)
    x[0, -1] = bad
    x[1, :-1] = -INF
    result = run(op, Schedule("stream", 4, flight=2), x)
    assert same_bits(result, op.python(x))
    assert result[0].isnan().all() if bad != -INF else result[0].isfinite()[:-1].all()
    assert result[1, -1] == (0.0 if op is LOG else 1.0)


@every_op
@pytest.mark.parametrize(("width", "padded"), [
    (3, 4), (5, 900), (700, 1024), (1000, 3000), (5000, 32768), (8000, 40000)])
def test_masked_numbers_at_the_end_change_nothing(op, width, padded):
    """Up to 8 chunks even a segmented row has the bits of the row without its masked end."""
    x = numbers(3, width)
    longer = torch.cat([x, torch.full((3, padded - width), -INF, device=HERE)], -1)
    result = op.python(longer)
    assert same_bits(result[:, :width], op.python(x))
    assert (result[:, width:] == (-INF if op is LOG else 0.0)).all()


@both
@every_op
def test_float16_overflows_nowhere(op, name):
    x = torch.tensor([[65504.0, -65504.0, 65504.0], [-65504.0, -65504.0, 6e-8]], dtype=torch.float16, device=HERE)
    wanted = op.cuda(x.double(), -1).half()
    assert torch.allclose(op.implementation(name)(x), wanted, rtol=2**-10, atol=0)


# accuracy


# Largest error: half an ulp of the dtype for the last rounding, and float32's before it, of which x - m, up to 32
# here, is the largest. Of softmax relative to y, of log_softmax relative to 1 + |y|.
TOLERANCE = {"softmax": {"bfloat16": 2.0**-8 * 1.001, "float16": 2.0**-11 * 1.01, "float32": 2.0**-24 * 32},
             "log_softmax": {"bfloat16": 2.0**-8 * 1.001, "float16": 2.0**-11 * 1.001, "float32": 2.0**-24 * 4}}


def worst(op, y, x):
    """The largest error in units of the tolerance; half the smallest subnormal number is forgiven."""
    wanted = op.cuda(x.double(), -1)
    info = torch.finfo(y.dtype)
    error = (y.double() - wanted).abs() - (info.smallest_normal * info.eps / 2 if op is SOFTMAX else 0.0)
    size = wanted.abs() + (1.0 if op is LOG else 0.0)
    return (error / (size * TOLERANCE[op.name][str(y.dtype).removeprefix("torch.")])).max().item()


@every_op
@every_dtype
@pytest.mark.parametrize("width", [1, 77, 1024, 3000, 33000])
def test_accuracy_against_float64(op, dtype, width):
    x = numbers(20 if width < 33000 else 4, width, dtype, seed=width)
    assert worst(op, op.python(x), x) <= 1


def test_the_docstring_states_the_table():
    said = " ".join(import_module("kernels.ops.softmax").__doc__.partition("Accuracy")[2].split())
    largest, powers = numbers(20, 33000).abs().max().item(), re.findall(r"2\*\*(-\d+)", said)
    table = [math.floor(math.log2(TOLERANCE[op][dtype])) for op in ("softmax", "log_softmax")
             for dtype in ("float32", "float16", "bfloat16")]
    assert [int(power) for power in powers[:6]] == table and 12 < largest <= 16 and "numbers up to 16" in said


@every_op
def test_the_tolerance_is_tight_enough_to_notice_a_rounding(op):
    """Inverse test: rounding x - m to bfloat16 exceeds the table."""
    x = numbers(20, 1000, torch.bfloat16)
    shifted = (x.float() - x.float().amax(-1, keepdim=True)).bfloat16().float()
    assert worst(op, op.cuda(shifted, -1).bfloat16(), x) > 1


@every_dtype
@pytest.mark.parametrize("width", [1, 2, 100, 1024, 5000, 40000])
def test_rows_sum_to_one(dtype, width):
    x = numbers(10, width, dtype, seed=1)
    allowed = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    for total in (SOFTMAX.python(x).double().sum(-1), LOG.python(x.float()).double().exp().sum(-1)):
        assert ((total - 1).abs() <= allowed).all()


# bad input and gradients


BAD = {
    "x of integers": ((torch.ones(3, dtype=torch.int32),), TypeError, r"x .*float32.*int32"),
    "x in float64": ((torch.ones(3, dtype=torch.float64),), TypeError, r"x .*float64"),
    "x complex": ((torch.ones(3, dtype=torch.complex64),), TypeError, r"x .*complex64"),
    "x a list": (([1.0, 2.0],), TypeError, r"x .*list"),
    "x an array": ((np.ones(3, np.float32),), TypeError, r"x .*ndarray"),
    "no x": ((None,), TypeError, r"x .*NoneType"),
    "x sparse": ((torch.eye(3).to_sparse(),), TypeError, r"x .*sparse"),
    "x elsewhere": ((torch.ones(3, device="meta"),), ValueError, r"x .*meta"),
    "dim beyond": ((torch.ones(2, 3), 2), ValueError, r"dim .* 2, got 2"),
    "dim before": ((torch.ones(2, 3), -3), ValueError, r"dim .* 2, got -3"),
    "dim of no dimensions": ((torch.tensor(1.0), 1), ValueError, r"dim .* 0, got 1"),
    "no dim": ((torch.ones(3), None), TypeError, r"dim .*None"),
    "dim a bool": ((torch.ones(2, 3), True), TypeError, r"dim .*True"),
    "dim a float": ((torch.ones(2, 3), 1.0), TypeError, r"dim .*1\.0"),
    "dim a tuple": ((torch.ones(2, 3), (0, 1)), TypeError, r"dim .*\(0, 1\)"),
    "dim a list": ((torch.ones(2, 3), [1]), TypeError, r"dim .*\[1\]"),
}


@both
@every_op
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(op, name, case):
    given_, error, message = BAD[case]
    call = op.implementation(name)
    call(torch.ones(2, 3, device=HERE), 1)  # a plan that a careless key would find
    with pytest.raises(error, match=message):
        call(*given_)


@pytest.mark.parametrize("case", BAD)
def test_bad_input_to_one_schedule_is_named(case):
    given_, error, message = BAD[case]
    with pytest.raises(error, match=message):
        run_schedule(Schedule("stream", 4), *given_)


@needs_triton
@every_op
def test_gradients_are_refused_rather_than_dropped(op):
    x = numbers(2, 5).requires_grad_()
    with pytest.raises(RuntimeError, match=rf"{op.name}\.triton.*no_grad"):
        op.triton(x)
    with torch.no_grad():
        assert same_bits(op.triton(x), op.python(x))


@every_op
@every_dtype
@pytest.mark.parametrize(("shape", "dim"), [((3, 2000), -1), ((5, 4, 3), 1), ((), 0), ((0, 4), 0), ((4, 0), 1)])
def test_the_specification_has_a_gradient(op, dtype, shape, dim):
    x = (numbers(1, max(math.prod(shape), 1), dtype)[0, : math.prod(shape)] / 8).view(shape)
    g = numbers(1, max(x.numel(), 1), dtype, seed=1)[0, : x.numel()].view(shape)
    ours, wide = x.clone().requires_grad_(), x.double().requires_grad_()
    y = op.python(ours, dim)
    assert same_bits(y, op.python(x, dim))
    y.backward(g)
    op.cuda(wide, dim).backward(g.double())
    assert ours.grad.dtype == dtype and ours.grad.shape == x.shape
    error, largest = (ours.grad.double() - wide.grad).abs(), wide.grad.abs().amax() if x.numel() else 0.0
    assert (error <= largest * {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]).all()


@every_op
def test_a_batch_does_not_move_the_gradient(op):
    def gradient(x, g):
        x = x.clone().requires_grad_()
        op.python(x).backward(g)
        return x.grad

    assert check_invariance(gradient, (numbers(6, 3000), numbers(6, 3000, seed=1)), (0, 1))


# the custom op


@needs_triton
@every_op
@pytest.mark.parametrize(("shape", "dim"), [((2, 3, 4), 1), ((0, 4), 1)])
def test_the_custom_ops_keep_torchs_contract(op, shape, dim, monkeypatch):
    monkeypatch.undo()  # opcheck looks at torch.empty itself
    x = numbers(1, math.prod(shape)).view(shape)
    torch.library.opcheck(getattr(torch.ops.same_bits, op.name).default, (x, dim))
    assert same_bits(getattr(torch.ops.same_bits, op.name)(x, dim), op.python(x, dim))


@needs_triton
def test_torch_compile_keeps_the_bits(monkeypatch):
    monkeypatch.undo()
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: LOG.triton(SOFTMAX.triton(x.reshape(-1, 30)), 0), fullgraph=True,
                             backend="aot_eager", dynamic=True)
    for rows in (2, 4):
        x = numbers(rows, 30, torch.bfloat16)
        assert same_bits(compiled(x.view(rows, 1, 30)), LOG.python(SOFTMAX.python(x), 0))


# the code the compiler makes of each kernel

COMPILED = [Job(op, shape, dtype, schedule, target, second=second) for op in ("softmax", "log_softmax")
            for shape, dtype, schedule, target, second in (
                ("D=2048", "bfloat16", "rows=1 warps=4", 90, False),
                ("D=2048", "float32", "rows=1 warps=4", 80, False),
                ("D=2000", "bfloat16", "rows=1 warps=4", 100, False),
                ("D=96", "float32", "stream=1 warps=4", 80, False),
                ("D=40000", "bfloat16", "stream=1 warps=8", 90, False),
                ("D=40000", "float32", "columns=32 flight=4 chunks=2 warps=1", 90, False),
                ("D=40000", "bfloat16", "columns=32 flight=4 chunks=2 warps=1", 90, True))]


@pytest.fixture(scope="module")
def compiled():
    """All of them, and the first again with the compiler free to fuse."""
    if not runtime.HAS_TRITON:
        pytest.skip("compiling ahead of time needs Triton")
    return compile_ahead([*COMPILED, replace(COMPILED[0], fusion=True)])


@pytest.fixture
def codes(compiled):
    return compiled[:-1]


def expected(job):
    """(exponentials, logarithms, additions) of a thread: from the order, and the columns a thread holds.

    It holds groups of neighbours of 16 bytes at most; 32 lanes lie side by side, then warps, then further groups.
    """
    shape, again = Shape.parse(job.shape), job.op == "softmax"  # exponentials are taken again for the results
    schedule = {str(s): s for s in OPS[job.op].schedules(shape, DTYPES[job.dtype])}[job.schedule]
    width, whole = tree_width(shape["D"]), shape["D"] <= 32 * tree_width(shape["D"])
    warps, by_columns = (4, False) if job.second else (schedule.warps, schedule.kind == "columns")
    held = max(1, (schedule.columns if by_columns else width) // (32 * warps))
    if job.second:
        added, exponentials = 0, held * schedule.chunks * again
    else:
        added = held * (-(-shape["D"] // width) if whole else 8 * schedule.flight)
        exponentials = added + (0 if whole else held * schedule.flight)
        exponentials += held * 8 * again if schedule.kind == "stream" else 0
    if by_columns:
        return exponentials, 0, exponentials + added
    together = min(16 // DTYPES[job.dtype].itemsize, held)
    groups = held // together
    tree = groups * (together - 1) + groups * 5 + int(math.log2(warps)) + groups - 1
    exponentials += held  # each column's share
    return exponentials, int(not again), exponentials + added + tree + (not again)


def test_nothing_is_fused_but_nine_multiply_adds_an_exponential_and_ten_a_logarithm(codes):
    """sm_100 fuses two numbers at once, sometimes with one of the two places unused."""
    for code in codes:
        exponentials, logarithms, _ = expected(code.job)
        packed = code.count(r"fma\.rn\.f32x2")
        assert code.fused <= 9 * exponentials + 10 * logarithms <= code.fused + packed, code.job
        assert not packed or code.job.target == 100


def test_additions_are_what_the_order_says(codes):
    """One in each exponential, one to add it, the tree, and one in the logarithm."""
    for code in codes:
        wanted = expected(code.job)[2]
        assert code.float_adds + code.packed_adds <= wanted <= code.float_adds + 2 * code.packed_adds, code.job
        assert not code.packed_adds or code.job.target == 100
    assert {c.job.target for c in codes} == set(TARGETS)


def test_nothing_is_approximate_or_flushed(codes):
    assert [c.job for c in codes if c.approximate or c.flushes or c.square_roots] == []
    for code in codes:
        divides = code.job.op == "softmax" and (code.job.second or "columns" not in code.job.schedule)
        assert code.divisions == divides, code.job


def test_rows_are_read_in_wide_pieces(codes):
    """16 bytes a load where a thread holds that many neighbours: 8 bytes for four of 2 bytes, 4 for one of 4."""
    widest = {(c.job.shape, c.job.dtype, c.job.schedule): max(c.global_loads) for c in codes if not c.job.second}
    assert widest == {
        ("D=2048", "bfloat16", "rows=1 warps=4"): 16, ("D=2048", "float32", "rows=1 warps=4"): 16,
        ("D=2000", "bfloat16", "rows=1 warps=4"): 16, ("D=96", "float32", "stream=1 warps=4"): 4,
        ("D=40000", "bfloat16", "stream=1 warps=8"): 8,
        ("D=40000", "float32", "columns=32 flight=4 chunks=2 warps=1"): 4}


def test_a_kernel_waits_for_the_one_before_it(codes):
    """Where kernels may overlap (sm_90 and later), nothing touches memory before the wait; elsewhere there is none."""
    for code in codes:
        waits = [code.ptx.find(f"griddepcontrol.{what}") for what in ("wait", "launch_dependents")]
        if code.job.target < 90:
            assert waits == [-1, -1], code.job
        else:
            memory = min(code.ptx.index("ld.global"), code.ptx.index("st.global"))
            assert -1 < waits[0] < memory and waits[0] < waits[1], code.job


def test_the_check_notices_fusion(compiled):
    """Inverse test: left to itself, the compiler fuses the last product of an exponential with what it is added to."""
    plain, fused = compiled[0], compiled[-1]
    assert fused.fused > plain.fused and fused.float_adds < plain.float_adds


# on a GPU


GPU_ROWS = 37
GPU_CASES = ((SOFTMAX, 1, "float32"), (LOG, 1000, "bfloat16"), (SOFTMAX, 1024, "float32"), (SOFTMAX, 32000, "bfloat16"),
             (SOFTMAX, 32768, "bfloat16"), (LOG, 32769, "float32"), (SOFTMAX, 128256, "bfloat16"),
             (SOFTMAX, 262144, "bfloat16"))  # few: a kernel of 32 chunks takes LLVM 9 s, and lengths share kernels


@pytest.mark.gpu
@pytest.mark.parametrize(("op", "width", "dtype"), GPU_CASES, ids=[f"{op.name}-{w}-{d}" for op, w, d in GPU_CASES])
def test_every_schedule_is_python_on_a_gpu(op, width, dtype):
    """Portable numbers, every adversarial kind and the corners, side by side in one batch."""
    dtype = DTYPES[dtype]
    x = torch.cat([rising(GPU_ROWS - 32, width, dtype), hostile(width, dtype), numbers(14, width, dtype, 1)])
    x[-14:, :5] = torch.tensor(list(CORNERS.values()), device=HERE)[:, :width].to(dtype)
    wanted = op.python(x)
    for schedule in op.schedules(f"D={width}", dtype):
        assert same_bits(run(op, schedule, x), wanted), (str(schedule), elements_differ(run(op, schedule, x), wanted))


@pytest.mark.gpu
@every_op
@pytest.mark.parametrize("width", [1, 33, 1000, 1025, 3000, 8192, 32769, 128256])
def test_triton_is_python_on_a_gpu(op, width):
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.cat([numbers(20, width, dtype, width), rising(GPU_ROWS - 20, width, dtype, width)])
        assert same_bits(op.triton(x), op.python(x))


@pytest.mark.gpu
@every_op
@pytest.mark.parametrize(("width", "tokens"), [(100, 9000), (1000, 4400), (40000, 300)])
def test_triton_is_python_for_every_batch_on_a_gpu(op, width, tokens):
    """Each batch size with its own schedule."""
    x = numbers(tokens, width, torch.bfloat16)
    wanted = op.python(x)
    for rows in (1, 2, 16, 17, 64, 65, 192, 193, 264, 528, 1056, 2112, 4224, 8448):
        if rows <= tokens:
            assert same_bits(op.triton(x[:rows]), wanted[:rows]), rows
            assert same_bits(op.triton(x[tokens - rows :]), wanted[tokens - rows :]), rows
    assert same_bits(op.triton(x.flip(0)), wanted.flip(0))


@pytest.mark.gpu
@every_op
@every_dtype
@pytest.mark.parametrize("width", [1, 100, 3000, 32000, 40000])
def test_a_cpu_and_a_gpu_specify_the_same_bits(op, width, dtype):
    for make in (lambda device: numbers(max(2, 60_000 // width), width, dtype, 3, device),
                 lambda device: hostile(min(width, 3000), dtype, device)):
        here, there = (op.python(make(device)) for device in ("cpu", "cuda"))
        assert same_bits(here, there), f"{elements_differ(here, there)} elements differ"


@pytest.mark.gpu
@every_op
@pytest.mark.parametrize("width", [1, 999, 4096, 40000, 40001])
def test_strides_and_misaligned_rows_on_a_gpu(op, width):
    """One plan serves every alignment in turn."""
    x = numbers(GPU_ROWS, width, torch.bfloat16)
    wanted = op.python(x)
    for how, view in views(x).items():
        assert same_bits(op.triton(view), wanted), how
    assert same_bits(op.triton(x[:1].expand(GPU_ROWS, width)), wanted[:1].expand(GPU_ROWS, width))
    assert same_bits(op.triton(x.t().contiguous(), 0), wanted.t())
    flat = torch.full((x.numel() + 8,), NAN, dtype=x.dtype, device=HERE)
    for by in (0, 1, 3, 8, 0):
        moved = flat[by : by + x.numel()].view(x.shape)
        moved.copy_(x)
        assert same_bits(op.triton(moved), wanted), by


@pytest.mark.gpu
def test_strides_beyond_32_bits_on_a_gpu():
    stride, width = 2**31 + 8, 33000
    if torch.cuda.mem_get_info()[0] < 3 * stride * 2:
        pytest.skip("needs 13 GB of free GPU memory")
    x = numbers(2, width, torch.bfloat16)
    flat = torch.zeros(stride + width, dtype=x.dtype, device=HERE)
    apart = flat.as_strided((2, width), (stride, 1))
    apart.copy_(x)
    for schedule in (Schedule("stream", 8), Schedule("columns", 1, flight=4, columns=32, chunks=2)):
        assert same_bits(run(SOFTMAX, schedule, apart), SOFTMAX.python(x)), schedule
    assert same_bits(run(SOFTMAX, Schedule("resident", 4, rows=2), apart[:, :1000]), SOFTMAX.python(x[:, :1000]))


@pytest.mark.gpu
@every_op
@pytest.mark.parametrize(("tokens", "width"), [(1, 1000), (300, 1000), (4, 40000), (100, 40000)])
def test_a_graph_replays_the_same_bits_on_a_gpu(op, tokens, width):
    """Captured once, replayed on other numbers in the same place."""
    x = numbers(tokens, width, torch.bfloat16)
    assert same_bits(op.triton(x), op.python(x))  # loads the module before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = op.triton(x)
    for seed in (0, 10, 20):
        x.copy_(numbers(tokens, width, torch.bfloat16, seed))
        captured.fill_(NAN)
        graph.replay()
        assert same_bits(captured, op.python(x))


IN_A_COLD_PROCESS = """
import torch
from kernels import log_softmax
from kernels.bits import same_bits

x, dim = log_softmax.inputs(4, "D=40000", torch.bfloat16, "cuda")
eager = log_softmax.triton(x)
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    captured = log_softmax.triton(x)
captured.zero_()
graph.replay()
torch.cuda.synchronize()
assert same_bits(captured, eager) and same_bits(captured, log_softmax.python(x))
print("the same bits")
"""


@pytest.mark.gpu
def test_the_second_call_of_a_process_can_be_captured():
    done = subprocess.run([sys.executable, "-c", IN_A_COLD_PROCESS], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "the same bits", done.stderr


@pytest.mark.gpu
def test_several_streams_at_once_on_a_gpu():
    """`columns` schedules have a workspace: each call and stream its own."""
    work = [(op, numbers(rows, width, torch.bfloat16, rows)) for op, rows, width in (
        (SOFTMAX, 4, 40000), (LOG, 7, 40000), (SOFTMAX, 600, 1000), (LOG, 100, 40000))]
    wanted = [op.python(x) for op, x in work]
    streams = [torch.cuda.Stream() for _ in work]
    torch.cuda.synchronize()
    results = []
    for _ in range(30):
        for i, (stream, (op, x)) in enumerate(zip(streams, work, strict=True)):
            with torch.cuda.stream(stream):
                results.append((i, op.triton(x)))
    torch.cuda.synchronize()
    assert len(results) == 120 and all(same_bits(result, wanted[i]) for i, result in results)


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "width"), [(300, 1000), (4, 40000), (300, 40000)])
def test_calls_that_feed_each_other_wait_for_each_other_on_a_gpu(tokens, width):
    """A kernel may start before the one ahead has ended; it must not read what is not yet written."""
    x = numbers(tokens, width)
    wanted = x
    for _ in range(6):
        wanted = LOG.python(SOFTMAX.python(wanted))
    for _ in range(5):
        y = x.clone()
        for _ in range(6):
            y = LOG.triton(SOFTMAX.triton(y))
        assert same_bits(y, wanted)


@pytest.mark.gpu
def test_inductor_keeps_the_bits_on_a_gpu(monkeypatch):
    monkeypatch.undo()
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: LOG.triton(SOFTMAX.triton(x.reshape(-1, 1000))), fullgraph=True)
    for tokens in (8, 600):
        x = numbers(tokens, 1000, torch.bfloat16)
        assert same_bits(compiled(x.view(tokens, 1, 1000)), LOG.python(SOFTMAX.python(x)))


@pytest.mark.gpu
def test_a_tensor_on_the_cpu_beside_a_gpu_is_refused():
    with pytest.raises((ValueError, runtime.Unavailable), match="(?i)cpu"):
        SOFTMAX.triton(numbers(3, 64, device="cpu"))


@pytest.mark.gpu
def test_another_gpu_than_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    for width in (1000, 40000):
        result = SOFTMAX.triton(numbers(9, width, torch.bfloat16, device="cuda:1"))
        assert result.device == torch.device("cuda:1") and torch.cuda.current_device() == 0
        assert same_bits(result, SOFTMAX.python(numbers(9, width, torch.bfloat16, device="cpu")))
