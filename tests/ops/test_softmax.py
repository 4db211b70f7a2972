"""softmax and log_softmax: what they alone have. Segments, dimensions, corners, gradients and their kernels' code.

What every op promises is in test_every_op.py. Sizes are small: Triton's interpreter takes a tenth of a second or more
a program.
"""
import math
import re
import warnings
from dataclasses import replace

import pytest
import torch
from common import HERE, INF, NAN, both, every_dtype, needs_triton, views, waits_first
from compiling import compile_ahead
from reference import SOFTMAX as TOLERANCE
from reference import softmax as pencil

from kernels import OPS, runtime
from kernels.arithmetic.elementary import exp, log
from kernels.arithmetic.sums import ordered_sum, tree_width
from kernels.bits import check_invariance, elements_differ, same_bits
from kernels.lab.proofs.generated_code import TARGETS, Job
from kernels.op import DTYPES, Shape
from kernels.ops.softmax import Schedule, order

SOFTMAX, LOG = OPS["softmax"], OPS["log_softmax"]
every_op = pytest.mark.parametrize("op", [SOFTMAX, LOG], ids=["softmax", "log_softmax"])


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


@pytest.fixture
def short_segments(monkeypatch):
    """Rows of more than 2 chunks in segments of 2, so that a short row has several; no plan of others is kept."""
    for file in ("order", "schedule", "kernels"):
        for name in ("WHOLE", "SEGMENT"):
            monkeypatch.setattr(f"kernels.ops.softmax.{file}.{name}", 2)
    for op in (SOFTMAX, LOG):
        op.call.plans.clear()
    yield
    for op in (SOFTMAX, LOG):
        op.call.plans.clear()


# the specification against a pencil


def test_three_numbers_by_hand():
    """Four columns, the last of -inf: its largest is the lowest float32, and it adds +0."""
    x = torch.tensor([1.0, 3.0, 2.0])
    a, b, c = exp(torch.tensor([-2.0, 0.0, -1.0]))
    total = (a + b) + (c + 0.0)
    assert b == 1.0
    assert same_bits(SOFTMAX.python(x), torch.stack([f * (1.0 / total) for f in (a, b, c)]))
    assert same_bits(LOG.python(x), torch.stack([v - log(total) for v in (x - 3.0)]))


@every_op
@pytest.mark.parametrize("width", [32768, 32769, 42000])
def test_the_specification_of_long_rows_is_the_pencil(op, width):
    x = torch.cat([numbers(1, width, device="cpu").sort().values, rising(1, width, device="cpu")])
    assert same_bits(op.python(x), pencil(op, x))


@every_op
def test_32_chunks_are_still_one_segment(op):
    """The seed is chosen so that segments of 8 would move bits."""
    x = rising(1, 32 * 1024, seed=8, device="cpu")
    assert same_bits(op.python(x), pencil(op, x)) and elements_differ(pencil(op, x), pencil(op, x, whole=31)) > 0


@every_op
@pytest.mark.parametrize(("x", "whole", "segment", "others"), [
    (FEW_CHUNKS, 32, 8, [1, 2, 4, 8]), (SHORT_SEGMENTS, 2, 2, [1, 3, 4, 8, 99]), (LONG, 32, 8, [4, 16, 32, 99])],
    ids=["one segment", "segments of 2", "segments of 8"])
def test_other_segments_move_bits(op, x, whole, segment, others):
    """Inverse test: the rows that kernels are tested with tell every other length of segments from the right one."""
    wanted = pencil(op, x, whole=whole, segment=segment)
    assert whole == 2 or same_bits(op.python(x), wanted)
    for other in others:
        assert elements_differ(wanted, pencil(op, x, whole=1, segment=other)) > 0, other


# an unrounded result of 16-bit numbers


@both
@every_op
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_result_in_float32_is_that_of_the_numbers_in_float32(op, name, dtype):
    x = numbers(5, 70, dtype)
    wanted = op.python(x.float())
    assert same_bits(op.implementation(name)(x, -1, torch.float32), wanted) and wanted.dtype == torch.float32
    assert same_bits(op.implementation(name)(x.t(), 0, dtype=torch.float32), wanted.t())
    assert same_bits(op.implementation(name)(x, -1, dtype=dtype), op.python(x))
    assert op.implementation(name)(x[:0], dtype=torch.float32).dtype == torch.float32


@needs_triton
@every_op
def test_every_kind_leaves_float32_unrounded(op):
    x = numbers(2, 130, torch.bfloat16)
    for schedule in (Schedule("resident", 4), Schedule("stream", 4), Schedule("columns", 4, columns=64)):
        assert same_bits(op.run_schedule(schedule, x, -1, torch.float32), op.python(x.float())), schedule


@both
@every_op
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, "float32", int])
def test_a_result_of_another_dtype_is_refused(op, name, dtype):
    with pytest.raises(TypeError, match="dtype must be None, x's torch.bfloat16 or torch.float32"):
        op.implementation(name)(numbers(2, 8, torch.bfloat16), -1, dtype)


@every_op
def test_a_result_in_float32_has_the_gradient_of_a_cast(op):
    x, y = (numbers(3, 40, torch.bfloat16, device="cpu").requires_grad_() for _ in range(2))
    weight = numbers(3, 40, seed=1, device="cpu")
    (op.python(x, -1, torch.float32) * weight).sum().backward()
    (op.python(y.float()) * weight).sum().backward()
    assert x.grad.dtype == torch.bfloat16 and same_bits(x.grad, y.grad)


# schedules against the specification


CHAINED = (Schedule("resident", 4), Schedule("resident", 4, rows=2), Schedule("stream", 4),
           Schedule("stream", 4, flight=4), Schedule("columns", 4, columns=512, chunks=2))


@needs_triton
@every_op
@pytest.mark.parametrize("schedule", CHAINED, ids=str)
def test_schedules_of_several_chunks_are_python(op, schedule):
    """10 chunks: one segment of the order, but more than a stream with one segment in flight has at once."""
    x = FEW_CHUNKS.repeat(schedule.rows, 1).to(HERE)
    assert same_bits(op.run_schedule(schedule, x), op.python(x))


@needs_triton
@every_op
@pytest.mark.parametrize("schedule", [
    Schedule("stream", 4, flight=1), Schedule("stream", 4, flight=2),
    Schedule("columns", 4, flight=4, columns=1024, chunks=4)], ids=str)
def test_segmented_schedules_are_python(op, schedule, short_segments):
    x = SHORT_SEGMENTS.to(HERE)
    assert same_bits(op.run_schedule(schedule, x), op.python(x))


@needs_triton
@pytest.mark.parametrize(("op", "schedule"), [
    (SOFTMAX, Schedule("columns", 4, flight=4, columns=1024, chunks=32)), (LOG, Schedule("stream", 4, flight=2))],
    ids=["softmax by columns", "log_softmax in a stream"])
def test_a_long_row_is_python(op, schedule):
    x = LONG.to(HERE)
    assert same_bits(op.run_schedule(schedule, x), op.python(x))


@needs_triton
def test_a_resident_schedule_refuses_a_long_row():
    with pytest.raises(ValueError, match="rows=1 warps=4.*32768.*32769"):
        SOFTMAX.run_schedule(Schedule("resident", 4), numbers(1, 32769))


# nothing against the batch


@every_op
def test_a_long_row_ignores_its_batch(op):
    report = check_invariance(op.python, (torch.cat([numbers(2, 33000), rising(2, 33000)]),),
                              batches=[slice(i, i + 1) for i in range(4)] + [torch.tensor([3, 1, 0])])
    assert report, str(report)


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


@needs_triton
@every_op
@pytest.mark.parametrize("schedule", [Schedule("resident", 4, rows=2), Schedule("stream", 4),
                                      Schedule("columns", 4, columns=64)], ids=str)
def test_each_kernel_reads_rows_in_place(op, schedule):
    x = numbers(2, 40)
    for how in ("columns of a wider tensor", "every second row"):
        assert same_bits(op.run_schedule(schedule, views(x)[how]), op.python(x)), how
    assert same_bits(op.run_schedule(schedule, x[:1].expand(2, 40)), op.python(x[:1]).repeat(2, 1))
    x = x[:, :2].contiguous()
    assert same_bits(op.run_schedule(schedule, x.t(), 0), op.python(x).t())


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
        result = op.run_schedule(schedule, x)
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
    result = op.run_schedule(Schedule("stream", 4, flight=2), x)
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


def test_the_docstring_states_the_table():
    said = " ".join(order.__doc__.partition("Accuracy")[2].split())
    largest, powers = numbers(20, 33000).abs().max().item(), re.findall(r"2\*\*(-\d+)", said)
    table = [math.floor(math.log2(TOLERANCE[op][dtype])) for op in ("softmax", "log_softmax")
             for dtype in ("float32", "float16", "bfloat16")]
    assert [int(power) for power in powers[:6]] == table and 12 < largest <= 16 and "numbers up to 16" in said


@every_dtype
@pytest.mark.parametrize("width", [1, 2, 100, 1024, 5000, 40000])
def test_rows_sum_to_one(dtype, width):
    x = numbers(10, width, dtype, seed=1)
    allowed = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    for total in (SOFTMAX.python(x).double().sum(-1), LOG.python(x.float()).double().exp().sum(-1)):
        assert ((total - 1).abs() <= allowed).all()


# gradients


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
    assert [c.job for c in codes if not waits_first(c)] == []


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
def test_corners_and_rising_rows_are_python_in_every_schedule_on_a_gpu(op, width, dtype):
    dtype = DTYPES[dtype]
    x = torch.cat([rising(GPU_ROWS - 14, width, dtype), numbers(14, width, dtype, 1)])
    x[-14:, :5] = torch.tensor(list(CORNERS.values()), device=HERE)[:, :width].to(dtype)
    wanted = op.python(x)
    for schedule in op.schedules(f"D={width}", dtype):
        result = op.run_schedule(schedule, x)
        assert same_bits(result, wanted), (str(schedule), elements_differ(result, wanted))


@pytest.mark.gpu
@every_op
@pytest.mark.parametrize("width", [1, 33, 1000, 1025, 3000, 8192, 32769, 128256])
def test_triton_is_python_on_a_gpu(op, width):
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.cat([numbers(20, width, dtype, width), rising(GPU_ROWS - 20, width, dtype, width)])
        assert same_bits(op.triton(x), op.python(x))


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
