"""Sum and mean: what they alone have. Any dims, which layouts are read in place, corners, and their kernels' code.

What every op promises is in test_every_op.py.
"""
import itertools
import math

import pytest
import torch
from common import HERE, both, dtypes, every_dtype, needs_triton, numbers, tensors_and_dims, waits_first
from compiling import compile_ahead
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from kernels import OPS, runtime
from kernels.arithmetic.sums import tree_width
from kernels.bits import check_invariance, same_bits
from kernels.lab.proofs.generated_code import TARGETS, Job
from kernels.op import DTYPES, Shape
from kernels.ops.mean.order import dims_of
from kernels.ops.mean.schedule import ENOUGH_PROGRAMS, Schedule, choose
from kernels.ops.mean.view import view_of

SUM, MEAN = OPS["sum"], OPS["mean"]
both_ops = pytest.mark.parametrize("op", [SUM, MEAN], ids=["sum", "mean"])


def inputs(tokens, shape, dtype=torch.bfloat16, seed=0, device=HERE):
    return SUM.inputs(tokens, shape, dtype, device, seed)


# any dims, against torch


def ways(dims):
    """Every way to name dimensions: none, one, some in any order, from the front and from the end."""
    some = [c for n in range(1, dims + 1) for c in itertools.permutations(range(dims), n)]
    return [None, (), *range(-dims, dims), *some, *(tuple(d - dims for d in c) for c in some)]


@both
@pytest.mark.parametrize(("op", "shapes"), [(SUM, ((2, 3, 4), (1, 5))), (MEAN, ((2, 4), (3,)))], ids=["sum", "mean"])
def test_any_dims_are_torchs(op, shapes, name):
    """Shape, dtype and value; whole numbers, so that every order gives one sum."""
    for shape in shapes:
        x = torch.arange(math.prod(shape), dtype=torch.bfloat16, device=HERE).view(shape)
        for dim in ways(len(shape)):
            for keepdim in (False, True):
                result, wanted = op.implementation(name)(x, dim, keepdim), op.cuda(x, dim, keepdim)
                assert same_bits(result, wanted), (shape, dim, keepdim)
    assert op.implementation(name)(x).shape == ()


@both
@settings(deadline=None, max_examples=15)
@given(case=tensors_and_dims(), keepdim=st.booleans(), mean=st.booleans(), dtype=dtypes)
def test_results_look_like_torchs(name, case, keepdim, mean, dtype):
    x, op = numbers(case[0], dtype), MEAN if mean else SUM
    result, wanted = op.implementation(name)(x, case[1], keepdim), op.cuda(x, case[1], keepdim)
    assert (result.shape, result.dtype, result.device) == (wanted.shape, wanted.dtype, wanted.device)
    assert result.is_contiguous()
    torch.testing.assert_close(result.double(), op.cuda(x.double(), case[1], keepdim), atol=2e-3, rtol=2e-2)


@both
def test_the_names_of_dims_do_not_matter(name):
    call, x = MEAN.implementation(name), numbers((3, 30, 50))
    assert same_bits(call(x, (2, 1)), call(x, (1, 2))) and same_bits(call(x, [-1, 1]), call(x, (1, 2)))
    assert same_bits(call(x, ()), call(x)) and same_bits(call(x, (0, 1, 2)), call(x))
    assert same_bits(call(x, 1), call(x, -2)) and same_bits(call(x, (1,)), call(x, 1))
    assert same_bits(call(x), call(x.flatten(), 0)) and same_bits(call(x, (1, 2)), call(x.flatten(1), 1))
    assert same_bits(call(x, (0, 2)), call(x.transpose(0, 1).flatten(1), 1))


def special(*values):
    return torch.tensor(values, device=HERE)


@both
def test_sums_at_the_corners(name):
    """As kernels/ops/mean/order.py says of each."""
    total, mean = SUM.implementation(name), MEAN.implementation(name)
    inf, nan = float("inf"), float("nan")
    for zeros in (1, 2, 3, 1024, 1025, 2048):
        assert same_bits(total(torch.full((zeros,), -0.0, device=HERE)), special(0.0)[0])
        assert same_bits(mean(torch.full((zeros, 2), -0.0, device=HERE), 0), special(0.0, 0.0))
    assert same_bits(total(special(3.0, -3.0)), special(0.0)[0])
    assert same_bits(total(special([1.0, inf], [nan, 1.0], [inf, -inf], [-inf, 2.0]), 1), special(inf, nan, nan, -inf))
    assert same_bits(mean(special([1.0, inf], [nan, 1.0], [inf, -inf], [-inf, 2.0]), 1), special(inf, nan, nan, -inf))
    half = torch.full((2, 3), 40000.0, dtype=torch.float16, device=HERE)
    assert same_bits(total(half, 1), torch.full((2,), inf, dtype=torch.float16, device=HERE))
    assert same_bits(mean(half, 1), half[:, 0])
    large = torch.full((2,), 3e38, device=HERE)
    assert same_bits(total(large), special(inf)[0]) and same_bits(mean(large), special(inf)[0])
    tiny = torch.full((3,), 2.0**-149, device=HERE)
    assert same_bits(total(tiny), special(3 * 2.0**-149)[0]) and same_bits(mean(tiny), special(2.0**-149)[0])


@both
@every_dtype
@pytest.mark.parametrize(("shape", "dim"), [
    ((0,), None), ((0,), 0), ((3, 0), 1), ((3, 0), 0), ((0, 3), 0), ((2, 0, 3), 1), ((2, 0, 3), (0, 2)), ((0, 4), 1),
    ((0, 0), (0, 1))])
def test_nothing_sums_to_zero_and_has_no_mean(name, dtype, shape, dim):
    x = torch.ones(shape, dtype=dtype, device=HERE)
    for op in (SUM, MEAN):
        for keepdim in (False, True):
            assert same_bits(op.implementation(name)(x, dim, keepdim), op.cuda(x, dim, keepdim))


@both
@both_ops
@every_dtype
def test_a_tensor_without_dimensions(op, name, dtype):
    for value in (3.0, -0.0, float("inf"), float("nan")):
        x = torch.tensor(value, dtype=dtype, device=HERE)
        for dim in (None, (), 0, -1, (0,), (-1,)):
            for keepdim in (False, True):
                assert same_bits(op.implementation(name)(x, dim, keepdim), x + 0.0)


# schedules against the specification


def programs(outer, length, inner=1, itemsize=2):
    """How many programs the schedule of choice launches first."""
    s = choose(outer, length, inner, itemsize)
    each = {"rows": s.rows, "stream": 1, "inner": s.columns, "split": s.columns}[s.kind]
    whole = {"rows": outer, "stream": outer, "inner": inner, "split": inner * tree_width(length)}[s.kind]
    return -(-whole // each) * (outer if s.kind in ("inner", "split") else 1)


def test_few_long_rows_are_not_left_to_one_program():
    assert programs(1, 2**24) >= 32 and programs(1, 2**31 + 8) >= 32
    for outer, length, inner in ((1, 2**20, 64), (1, 4096, 8192), (4, 2**22, 1), (1, 2**18, 1000), (8, 2**17, 16)):
        assert programs(outer, length, inner) >= ENOUGH_PROGRAMS // 2, (outer, length, inner)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_rows_of_8192_are_one_launch_at_every_token_count(dtype):
    for tokens in (1, 2, 16, 128, 4096, 65536):
        assert choose(tokens, 8192, 1, dtype.itemsize).kind == "rows"
        assert programs(tokens, 8192, 1, dtype.itemsize) == tokens


@needs_triton
def test_a_schedule_that_does_not_fit_is_refused():
    x = numbers((3, 4, 5))
    for schedule in (Schedule("rows", 4), Schedule("stream", 4)):
        with pytest.raises(ValueError, match=r"last in memory; dim 1 of shape \(3, 4, 5\).*inner or a split"):
            SUM.run_schedule(schedule, x, 1)
        assert same_bits(SUM.run_schedule(schedule, x, 2), SUM.python(x, 2))


# nothing against the batch


@needs_triton
@every_dtype
def test_bad_neighbours_do_not_reach_a_column_of_the_same_program(dtype):
    x, dim = inputs(8, "D=300", dtype)
    wanted = SUM.python(x, dim)
    x[1::2] = float("nan")
    beside = x.t().contiguous()  # the rows as neighbouring columns
    for schedule in (Schedule("inner", 4, columns=8, parts=8), Schedule("inner", 8, columns=16, flight=2)):
        assert same_bits(SUM.run_schedule(schedule, beside, 0)[::2], wanted[::2])


def test_the_check_notices_a_sum_that_is_cut_by_the_batch():
    """Inverse test: as many parts as leave no core idle."""
    def cut(x, dim):
        return sum(SUM.python(part, dim) for part in x.tensor_split(max(1, 128 // len(x)), dim))

    report = check_invariance(cut, inputs(64, "D=4096", torch.float32), (0,))
    assert not report and report.first.row == 0
    assert report.elements_differ > report.elements / 10


# strides


@both
def test_expanded_inputs_are_sums_of_copies(name):
    call, x = MEAN.implementation(name), numbers((1, 40))
    for view, dim in ((x.expand(9, 40), 0), (x.expand(9, 40), 1), (x.t().expand(40, 9), 1),
                      (x[0, 0].expand(6, 7), None), (x[:, :, None].expand(3, 40, 5), (0, 2))):
        assert same_bits(call(view, dim), call(view.contiguous(), dim))
    windows = x[0].unfold(0, 8, 1)  # each number in up to eight rows, at one address
    assert same_bits(call(windows, 1), call(windows.contiguous(), 1))
    assert same_bits(call(windows, 0), call(windows.contiguous(), 0))


def in_place(x, dim):
    return view_of(x, dims_of(x, dim)).order is None


def test_the_usual_layouts_are_read_in_place():
    x = torch.empty(4, 6, 8, 10)
    for dim in (0, 1, 2, 3, (0, 1), (1, 2), (2, 3), (1, 2, 3), (0, 1, 2), None):
        assert in_place(x, dim), dim
    assert in_place(x[0, 0].t(), 0) and in_place(x[0, 0].t(), 1)
    assert in_place(x[0, 0, :, 2:7], 1) and in_place(x[0, 0, :, 2:7], 0) and in_place(x[1:3], (2, 3))
    assert in_place(x.contiguous(memory_format=torch.channels_last), (2, 3))
    assert in_place(torch.empty(4, 1, 8), 1) and in_place(torch.empty(1, 6, 1, 8), (0, 2))
    assert not in_place(x, (0, 2)) and not in_place(x[..., ::2], 3) and not in_place(x[0, 0, :, :1].expand(8, 9), 1)
    assert not in_place(x[0, 0].t(), None), "the reduced dimensions in memory are not in x's order"


@settings(deadline=None, max_examples=200)
@given(data=st.data(), sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_a_view_names_every_number_at_its_place(data, sizes):
    """x, however strided, is the (outer, length, inner) that the kernels will read."""
    x = torch.arange(math.prod(sizes) * 16, dtype=torch.float32).view(*(2 * n for n in sizes), -1)[..., 0]
    for i in range(len(sizes)):
        cut = slice(sizes[i]) if data.draw(st.booleans()) else slice(0, None, 2)
        x = x[(*[slice(None)] * i, cut)]
    x = (x if data.draw(st.booleans()) else x.contiguous()).permute(data.draw(st.permutations(range(len(sizes)))))
    dims = tuple(sorted(data.draw(st.sets(st.sampled_from(range(len(sizes)))))))
    view = view_of(x, dims)
    memory = x if view.order is None else x.permute(view.order).contiguous()
    seen = memory.as_strided(view[:3], (view.outer_stride, view.stride, 1))
    kept = [i for i in range(x.dim()) if i not in dims]
    wanted = x.permute((*kept, *dims)).reshape(view.outer * view.inner, view.length)
    assert same_bits(seen.transpose(1, 2).reshape(-1, view.length), wanted)


def test_the_specification_has_gradients():
    x = numbers((3, 5, 4)).requires_grad_()
    (MEAN.python(x, (0, 2)).sum() + 2 * SUM.python(x, 1).sum()).backward()
    assert same_bits(x.grad, torch.full_like(x, 1 / 12) + 2)


def test_pythons_own_sum_is_not_hidden():
    namespace = {}
    exec("from kernels import *", namespace)
    assert "sum" not in namespace and namespace["mean"] is MEAN
    assert kernels.sum is SUM and kernels.mean is MEAN


# the generated code

AHEAD = {
    ("D=8192", "bfloat16", TARGETS): ("rows=1 warps=4", "rows=4 warps=8", "stream=4 warps=4",
                                      "split=32 flight=16 warps=1"),
    ("D=8192", "float32", TARGETS): ("rows=1 warps=8",),
    ("D=1000", "float16", (80, 90)): ("rows=1 warps=4", "stream=1 warps=16", "split=128 flight=4 warps=1"),
    ("D=20001", "float32", (90,)): ("stream=4 warps=16", "split=256 flight=2 warps=4"),
    ("D=4096,inner=64", "bfloat16", TARGETS): ("inner=32 parts=8 flight=1 warps=16",
                                               "inner=32 parts=8 flight=2 warps=16"),
    ("D=1030,inner=3", "float32", (80,)): ("inner=16 parts=1 flight=1 warps=8", "split=32 flight=16 warps=1"),
}


@pytest.fixture(scope="module")
def compiled():
    """Schedules of each kind, compiled once."""
    if not runtime.HAS_TRITON:
        pytest.skip("compiling ahead of time needs Triton")
    return compile_ahead([Job("sum", shape, dtype, schedule, target) for (shape, dtype, targets), schedules in
                          AHEAD.items() for schedule in schedules for target in targets])


def schedule_of(job):
    return {str(s): s for s in SUM.schedules(job.shape, DTYPES[job.dtype])}[job.schedule]


def named(codes):
    return [f"sm_{c.job.target} {c.job.shape} {c.job.dtype} {c.job.schedule}" for c in codes]


def test_every_kind_compiles_for_every_target(compiled):
    kinds = {(schedule_of(c.job).kind, c.job.target) for c in compiled}
    assert kinds >= {(kind, target) for kind in ("rows", "stream", "split", "inner") for target in TARGETS}


def test_nothing_is_fused_flushed_or_approximate(compiled):
    assert named(c for c in compiled if c.fused or c.flushes or c.approximate) == []


def additions_of(job):
    """Each chunk of a thread's columns, the tree, and +0: float32 additions a thread makes, from order and layout."""
    s, length = schedule_of(job), Shape.parse(job.shape)["D"]
    if s.kind == "split":
        return s.flight * max(1, s.columns // (32 * s.warps))
    width = tree_width(length)
    held = s.rows * width // (32 * s.warps)
    together = min(16 // DTYPES[job.dtype].itemsize, held) if length % 16 == 0 else 1
    warps_in_row = min(s.warps, width // (32 * together))
    groups, repeats = held // together, width // (32 * together * warps_in_row)
    rows = groups // repeats
    columns = (math.ceil(length / width) - 1 if s.kind == "rows" else s.flight) * held
    tree = groups * (together - 1) + groups * 5 + int(math.log2(warps_in_row)) + rows * (repeats - 1)
    return columns + tree + rows


def test_schedules_add_exactly_what_the_order_says(compiled):
    checked = [c for c in compiled if c.job.target < 100 and schedule_of(c.job).kind != "inner"]
    assert {named([c])[0]: c.float_adds for c in checked} == {named([c])[0]: additions_of(c.job) for c in checked}
    assert len(checked) > 15


def test_a_chunk_more_in_flight_is_so_many_additions_more(compiled):
    """Of an inner schedule: one addition for each number that a thread holds of a chunk, and nothing else."""
    for target in (80, 90):
        one, two = (c for c in compiled if c.job.shape == "D=4096,inner=64" and c.job.target == target)
        assert two.float_adds - one.float_adds == 1024 * 32 // (32 * 16)


def test_whole_rows_are_loaded_16_bytes_wide(compiled):
    for code in compiled:
        if code.job.shape == "D=8192" and code.job.schedule in ("rows=1 warps=4", "stream=4 warps=4"):
            assert set(code.global_loads) == {16}, named([code])
        if code.job.shape == "D=4096,inner=64":
            assert set(code.global_loads) == {16}, named([code])


def test_a_kernel_waits_for_the_one_before_it(compiled):
    assert named(c for c in compiled if not waits_first(c)) == []


# on a GPU


GPU_WIDTHS = (1, 2, 3, 31, 33, 64, 96, 128, 255, 256, 257, 500, 1000, 1023, 1024, 1025, 1536, 2047, 2048, 3000, 4096,
              5000, 5120, 8191, 8192, 12288, 16384, 16385, 20000, 28672, 65535, 65536, 131072, 10**6)
GPU_ROWS = 37  # one number throughout, so that a schedule compiled once serves every input


@pytest.mark.gpu
@pytest.mark.parametrize("width", GPU_WIDTHS)
def test_triton_is_python_at_every_width_on_a_gpu(width):
    for rows in (1, GPU_ROWS):
        x, dim = inputs(rows, f"D={width}", list(DTYPES.values())[width % 3], width)
        assert same_bits(SUM.triton(x, dim), SUM.python(x, dim))
        assert same_bits(MEAN.triton(x.t(), 0), MEAN.python(x, dim))
        assert same_bits(MEAN.triton(x, 0), MEAN.python(x, 0))


@pytest.mark.gpu
@settings(deadline=None, max_examples=300)
@given(case=tensors_and_dims(70000), keepdim=st.booleans(), mean=st.booleans(), dtype=dtypes)
def test_any_dims_on_a_gpu(case, keepdim, mean, dtype):
    x, op = numbers(case[0], dtype), MEAN if mean else SUM
    assert same_bits(op.triton(x, case[1], keepdim), op.python(x, case[1], keepdim))


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [0, 1, 2, 3, (0, 1), (0, 2), (1, 2), (1, 3), (2, 3), (0, 1, 2), (0, 2, 3), None])
def test_large_tensors_over_any_dims_on_a_gpu(dim):
    x = numbers((30, 70, 90, 110), torch.bfloat16)
    for view in (x, x.permute(3, 1, 0, 2), x[:, 1::2], x[..., 3:], x.contiguous(memory_format=torch.channels_last)):
        assert same_bits(MEAN.triton(view, dim), MEAN.python(view, dim))


@pytest.mark.gpu
@pytest.mark.parametrize(("shape", "dtype"), [("D=1", "bfloat16"), ("D=33", "bfloat16"), ("D=999", "float32"),
                                              ("D=4096", "bfloat16"), ("D=70001", "float16"), ("D=70000", "float32"),
                                              ("D=1024,inner=64", "bfloat16"), ("D=1025,inner=7", "float16")])
def test_misaligned_pointers_on_a_gpu(shape, dtype):
    """Rows of odd widths and tensors that begin anywhere: one plan must serve every alignment in turn."""
    x, dim = inputs(GPU_ROWS, shape, DTYPES[dtype])
    wanted = SUM.python(x, dim)
    for by in (0, 1, 8, 3, 16, 0):
        flat = torch.full((x.numel() + by,), float("nan"), dtype=x.dtype, device=x.device)
        flat[by:] = x.reshape(-1)
        moved = flat[by:].view(x.shape)
        assert same_bits(SUM.triton(moved, dim), wanted), by
        for schedule in SUM.schedules(shape, x.dtype)[-2:]:
            assert same_bits(SUM.run_schedule(schedule, moved, dim), wanted), (by, str(schedule))


@pytest.mark.gpu
@pytest.mark.parametrize("length", [2**31 + 1024, 2**31 - 5])
def test_two_billion_numbers_in_one_row_on_a_gpu(length):
    """Zeros, then a few numbers in the columns where a short row would have them."""
    if torch.cuda.mem_get_info()[0] < 3 * length:
        pytest.skip("needs 7 GB of free GPU memory")
    x = torch.zeros(length, dtype=torch.bfloat16, device=HERE)
    short = torch.zeros(4096 + length % 1024, dtype=torch.bfloat16, device=HERE)
    short[-3000:] = x[-3000:] = inputs(1, "D=3000")[0][0]
    assert same_bits(SUM.triton(x), SUM.python(short)) and SUM.triton(x) != 0
    for schedule in (Schedule("stream", 16, flight=4), Schedule("split", 4, columns=128, flight=16)):
        assert same_bits(SUM.run_schedule(schedule, x), SUM.python(short)), schedule
    if length % 64 == 0:
        beside = short.view(-1, 64)
        assert same_bits(SUM.triton(x.view(-1, 64), 0), SUM.python(torch.nn.functional.pad(
            beside, (0, 0, (length // 64 - len(beside)) % 1024, 0)), 0))


@pytest.mark.gpu
def test_more_than_two_billion_numbers_in_many_rows_on_a_gpu():
    rows, width = 2**31 // 8192 + 70, 8192
    if torch.cuda.mem_get_info()[0] < 3 * rows * width:
        pytest.skip("needs 7 GB of free GPU memory")
    tail, dim = inputs(64, f"D={width}")
    x = torch.zeros(rows, width, dtype=tail.dtype, device=tail.device)
    x[-64:] = tail
    y = MEAN.triton(x, dim)
    assert same_bits(y[-64:], MEAN.python(tail, dim)) and not y[:-64].any()
    padded = torch.nn.functional.pad(tail, (0, 0, (rows - 64) % 1024, 0))
    assert same_bits(SUM.triton(x, 0), SUM.python(padded, 0))


@pytest.mark.parametrize(("shape", "count"), [("D=1024", 2 * 1024), ("D=1000,inner=3", 2 * 1024 * 3)])
def test_the_first_launch_of_a_split_leaves_every_column_of_every_row(shape, count):
    split = Schedule("split", 1, columns=32, flight=4)
    first, second = MEAN.call.launches(split, *MEAN.inputs(2, shape, torch.float32, "meta"))
    assert first.leaves == count and second.leaves == 0
