"""Sum and mean: the specification against a pencil, its schedules against the specification, any dims against torch.

Tests without the mark `gpu` run where they are: on a GPU the compiled kernels, elsewhere Triton's interpreter.
"""
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from kernels import OPS, runtime
from kernels.arithmetic.sums import tree_width
from kernels.bits import ADVERSARIAL, adversarial, check_invariance, portable, same_bits
from kernels.lab.proofs.generated_code import TARGETS, Job, compile_ahead
from kernels.op import DTYPES, Shape
from kernels.ops.mean import ENOUGH_PROGRAMS, Schedule, _dims, _schedule, _view, run_schedule

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # rows that overflow on purpose

SUM, MEAN = OPS["sum"], OPS["mean"]
HERE = runtime.device()

every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
needs_triton = pytest.mark.skipif(bool(runtime.WHY_NOT), reason=runtime.WHY_NOT or "Triton runs here")
both = pytest.mark.parametrize("name", ["python", pytest.param("triton", marks=needs_triton)])
both_ops = pytest.mark.parametrize("op", [SUM, MEAN], ids=["sum", "mean"])
dtypes = st.sampled_from(list(DTYPES.values()))
WIDTHS = (1, 2, 3, 31, 64, 255, 256, 257, 1000, 1023, 1024, 1025, 2047, 3000, 8191, 16384, 16385, 65535, 65536)


def inputs(tokens, shape, dtype=torch.bfloat16, seed=0, device=HERE):
    return SUM.inputs(tokens, shape, dtype, device, seed)


def hostile(kind, tokens, shape, dtype, seed=0, device=HERE):
    x, dim = inputs(tokens, shape, dtype, seed, device)
    return adversarial(kind, tokens, x[0].numel(), dtype, device, seed).view(x.shape), dim


def numbers(shape, dtype=torch.float32, seed=0, device=HERE):
    return portable(1, math.prod(shape), dtype, device, seed).view(shape)


# the specification against a pencil


def pencil(x, dim, keepdim, mean):
    """The docstring of kernels/ops/mean.py in NumPy, row by row; torch only rounds to 16 bits."""
    given = () if dim is None else dim if isinstance(dim, tuple) else (dim,)
    reduced = sorted(d % x.dim() for d in given) if given and x.dim() else list(range(x.dim()))
    kept = [i for i in range(x.dim()) if i not in reduced]
    count = math.prod(x.shape[i] for i in reduced)
    rows = np.transpose(x.float().numpy(), (*kept, *reduced)).reshape(-1, count)
    results = []
    for row in rows:
        width = min(1024, 1 << (count - 1).bit_length())
        columns = np.zeros(width, np.float32)
        for j in range(width):
            column = [*row[j::width], *([np.float32(0)] if j >= count % width > 0 else [])]
            columns[j] = column[0]
            for number in column[1:]:
                columns[j] = columns[j] + number
        while len(columns) > 1:
            columns = np.array([columns[j] + columns[j + 1] for j in range(0, len(columns), 2)])
        total = columns[0] + np.float32(0)
        results.append(total * np.float32(1 / count) if mean else total)
    shape = [1 if i in reduced else n for i, n in enumerate(x.shape) if keepdim or i not in reduced]
    return torch.from_numpy(np.array(results, np.float32)).to(x.dtype).view(shape)


@st.composite
def tensors_and_dims(draw, longest=1500):
    """(shape, dim): up to four dimensions, one of them long, and any way to name some of them."""
    shape = draw(st.lists(st.integers(1, 5), max_size=4))
    if shape and draw(st.booleans()):
        shape[draw(st.integers(0, len(shape) - 1))] = draw(st.integers(1, longest))
    every = range(len(shape)) if shape else [0]
    chosen = draw(st.lists(st.sampled_from(every), unique=True))
    named = tuple(d - draw(st.sampled_from([0, max(len(shape), 1)])) for d in chosen)
    return tuple(shape), draw(st.sampled_from([None, named, named[0]] if named else [None, ()]))


@settings(deadline=None)
@given(case=tensors_and_dims(3000), keepdim=st.booleans(), mean=st.booleans(), dtype=dtypes, seed=st.integers(0, 10**6))
def test_the_specification_is_the_pencil(case, keepdim, mean, dtype, seed):
    x = numbers(case[0], dtype, seed, "cpu")
    assert same_bits((MEAN if mean else SUM).python(x, case[1], keepdim), pencil(x, case[1], keepdim, mean))


@every_dtype
@pytest.mark.parametrize("kind", ADVERSARIAL)
def test_the_specification_is_the_pencil_for_adversarial_rows(kind, dtype):
    for shape in ("D=1300", "D=64", "D=130,inner=3"):
        x, dim = hostile(kind, 6, shape, dtype, device="cpu")
        assert same_bits(SUM.python(x, dim), pencil(x, dim, False, False))
        assert same_bits(MEAN.python(x, dim), pencil(x, dim, False, True))


def test_the_specification_ignores_the_thread_count():
    (x, dim), before = inputs(300, "D=3000", torch.float32, device="cpu"), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(SUM.python(x, dim))
    finally:
        torch.set_num_threads(before)
    assert same_bits(results[0], results[1]) and same_bits(results[0], results[2])


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
    """As kernels/ops/mean.py says of each."""
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


@needs_triton
@settings(deadline=None, max_examples=30)
@given(case=tensors_and_dims(2500), keepdim=st.booleans(), mean=st.booleans(), dtype=dtypes, seed=st.integers(0, 10**6))
def test_triton_is_python(case, keepdim, mean, dtype, seed):
    x, op = numbers(case[0], dtype, seed), MEAN if mean else SUM
    assert same_bits(op.triton(x, case[1], keepdim), op.python(x, case[1], keepdim))


@needs_triton
@pytest.mark.parametrize("width", WIDTHS)
def test_triton_is_python_at_every_width(width):
    x, dim = inputs(1 if width > 65535 else 2, f"D={width}")
    assert same_bits(SUM.triton(x, dim), SUM.python(x, dim))


@needs_triton
@pytest.mark.parametrize(("shape", "dtype"), [
    ("D=3", "float32"), ("D=96", "bfloat16"), ("D=1000", "float16"), ("D=2500", "bfloat16"), ("D=17000", "float32"),
    ("D=3,inner=5", "bfloat16"), ("D=20,inner=11", "float16"), ("D=1100,inner=2", "float32")])
def test_every_schedule_is_python(shape, dtype):
    x, dim = inputs(2, shape, DTYPES[dtype])
    wanted = SUM.python(x, dim), MEAN.python(x, dim)
    for i, schedule in enumerate(SUM.schedules(shape, DTYPES[dtype])):
        assert same_bits(run_schedule(schedule, x, dim, mean=bool(i % 2)), wanted[i % 2]), schedule


@needs_triton
@every_dtype
@pytest.mark.parametrize("kind", ADVERSARIAL)
def test_triton_is_python_for_adversarial_rows(kind, dtype):
    for shape in ("D=1300", "D=512", "D=1030,inner=3"):
        x, dim = hostile(kind, 5, shape, dtype)
        assert same_bits(MEAN.triton(x, dim), MEAN.python(x, dim))


def test_schedules_of_choice_are_all_tested():
    tokens = (*range(1, 600, 7), 1000, 4096, 5000, 10**5, 10**6)
    for width in (1, 3, 17, 100, 129, 512, 513, 1000, 2000, 8192, 16384, 16385, 65535, 65536, 10**6, 2**24):
        for inner in ("", ",inner=2", ",inner=9", ",inner=64", ",inner=1000", ",inner=8192"):
            for dtype in DTYPES.values():
                tested = {str(s) for s in SUM.schedules(f"D={width}{inner}", dtype)}
                chosen = {SUM.schedule(t, f"D={width}{inner}", dtype) for t in tokens}
                assert chosen <= tested, (width, inner, chosen - tested)


def programs(outer, length, inner=1, itemsize=2):
    """How many programs the schedule of choice launches first."""
    s = _schedule(outer, length, inner, itemsize)
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
        assert _schedule(tokens, 8192, 1, dtype.itemsize).kind == "rows"
        assert programs(tokens, 8192, 1, dtype.itemsize) == tokens


@needs_triton
def test_a_schedule_that_does_not_fit_is_refused():
    x = numbers((3, 4, 5))
    for schedule in (Schedule("rows", 4), Schedule("stream", 4)):
        with pytest.raises(ValueError, match=r"last in memory; dim 1 of shape \(3, 4, 5\).*inner or a split"):
            run_schedule(schedule, x, 1)
        assert same_bits(run_schedule(schedule, x, 2), SUM.python(x, 2))


# nothing against the batch


@both
@every_dtype
@pytest.mark.parametrize("shape", ["D=96", "D=2100", "D=90,inner=6"])
def test_a_row_ignores_its_batch(name, dtype, shape):
    """Alone, in batches of any size, first, last, reversed, repeated."""
    report = check_invariance(MEAN.implementation(name), inputs(7, shape, dtype), MEAN.per_token)
    assert report, str(report)


@both
@settings(deadline=None, max_examples=20)
@given(data=st.data(), tokens=st.integers(1, 7), width=st.integers(1, 1500), dtype=dtypes)
def test_any_choice_of_rows_keeps_their_bits(name, data, tokens, width, dtype):
    chosen = data.draw(st.lists(st.integers(0, tokens - 1), min_size=1, max_size=9))
    given_ = inputs(tokens, Shape(D=width), dtype)
    report = check_invariance(MEAN.implementation(name), given_, (0,), [torch.tensor(chosen)])
    assert report, str(report)


@both
@pytest.mark.parametrize("kind", ADVERSARIAL)
def test_adversarial_rows_ignore_their_batch(name, kind):
    report = check_invariance(SUM.implementation(name), hostile(kind, 5, "D=600", torch.float32), (0,))
    assert report, str(report)


@both
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("shape", ["D=300", "D=70,inner=9"])
def test_bad_neighbours_do_not_reach_a_row(name, shape, bad):
    x, dim = inputs(6, shape, torch.float32)
    wanted = SUM.implementation(name)(x, dim)
    x[1::2] = bad
    spoiled = SUM.implementation(name)(x, dim)
    assert same_bits(spoiled[::2], wanted[::2]) and not spoiled[1::2].isfinite().any()


@needs_triton
@every_dtype
def test_bad_neighbours_do_not_reach_a_row_of_the_same_program(dtype):
    x, dim = inputs(8, "D=300", dtype)
    wanted = SUM.python(x, dim)
    x[1::2] = float("nan")
    for rows in (2, 4):
        assert same_bits(run_schedule(Schedule("rows", 4, rows=rows), x, dim)[::2], wanted[::2])
    beside = x.t().contiguous()  # the rows as neighbouring columns
    for schedule in (Schedule("inner", 4, columns=8, parts=8), Schedule("inner", 8, columns=16, flight=2)):
        assert same_bits(run_schedule(schedule, beside, 0)[::2], wanted[::2])


def test_the_check_notices_a_sum_that_is_cut_by_the_batch():
    """Inverse test: as many parts as leave no core idle."""
    def cut(x, dim):
        return sum(SUM.python(part, dim) for part in x.tensor_split(max(1, 128 // len(x)), dim))

    report = check_invariance(cut, inputs(64, "D=4096", torch.float32), (0,))
    assert not report and report.first.row == 0
    assert report.elements_differ > report.elements / 10


# strides


def views(x):
    """The same numbers behind other strides: name -> view of a larger, turned, repeated or negated tensor."""
    rows, width = x.shape
    wide, apart, turned = (torch.full(size, float("nan"), dtype=x.dtype, device=x.device) for size in (
        (2 * rows, width + 24), (rows, 2 * width), (width, rows)))
    wide[::2, 8 : 8 + width], apart[:, ::2], turned[:] = x, x, x.t()
    return {"part of a wider tensor": wide[::2, 8 : 8 + width], "every second column": apart[:, ::2],
            "transposed": turned.t(), "negated": torch._neg_view(-x),
            "negated part": torch._neg_view(-wide)[::2, 8:-16]}


@both
@every_dtype
def test_strides_do_not_matter(name, dtype):
    call, x = MEAN.implementation(name), inputs(3, "D=70" if dtype == torch.float16 else "D=130", dtype)[0]
    wanted = [call(x, dim) for dim in (1, 0, None)]
    for how, view in views(x).items():
        assert same_bits(view, x) and (not view.is_contiguous() or view.is_neg())
        assert same_bits(tuple(call(view, dim) for dim in (1, 0, None)), tuple(wanted)), how
    if name == "triton":
        assert same_bits(run_schedule(Schedule("stream", 4), views(x)["negated part"], 1, mean=True), wanted[0])


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
    return _view(x, _dims(x, dim)).order is None


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
    view = _view(x, dims)
    memory = x if view.order is None else x.permute(view.order).contiguous()
    seen = memory.as_strided(view[:3], (view.outer_stride, view.stride, 1))
    kept = [i for i in range(x.dim()) if i not in dims]
    wanted = x.permute((*kept, *dims)).reshape(view.outer * view.inner, view.length)
    assert same_bits(seen.transpose(1, 2).reshape(-1, view.length), wanted)


@both
def test_inputs_are_left_alone_and_outputs_are_new(name):
    for dim in (0, 1, None):
        x = numbers((1, 1) if dim is None else (3, 30))
        before = x.clone()
        result, again = SUM.implementation(name)(x, dim), SUM.implementation(name)(x, dim)
        assert same_bits(result, again) and same_bits(x, before)
        assert len({x.data_ptr(), result.data_ptr(), again.data_ptr()}) == 3


# accuracy


# Half an ulp of the dtype for the last rounding, relative to |y|. Before it each of the tree's float32 additions, and
# the mean's factor and product, err by 2**-24 at most, relative to the sum of |x|.
TOLERANCE = {"bfloat16": 2.0**-8 * 1.001, "float16": 2.0**-11 * 1.005, "float32": 2.0**-24 * 1.001}


def allowed(x, wanted, scale):
    width = x.shape[-1]
    depth = math.ceil(width / 1024) - 1 + math.ceil(math.log2(min(width, 1024))) + 2
    smallest = torch.finfo(x.dtype).smallest_normal * torch.finfo(x.dtype).eps
    before = 1.01 * depth * 2.0**-24 * x.double().abs().sum(-1) * scale
    return TOLERANCE[str(x.dtype).removeprefix("torch.")] * wanted.abs() + before + smallest / 2


@both_ops
@every_dtype
@pytest.mark.parametrize("name", ["cuda", "python", "triton"])
@pytest.mark.parametrize("width", [1, 77, 1024, 3000])
def test_accuracy_against_float64(op, name, dtype, width):
    if name == "triton" and runtime.WHY_NOT:
        pytest.skip(runtime.WHY_NOT)
    x, dim = inputs(9, f"D={width}", dtype, seed=width)
    wanted = op.cuda(x.double(), dim)
    error = (op.implementation(name)(x, dim).double() - wanted).abs()
    assert (error <= allowed(x, wanted, 1 / width if op is MEAN else 1)).all()


def test_the_tolerance_is_tight_enough_to_notice_a_rounding():
    """Inverse test: rounding to bfloat16 between two chunks exceeds the table."""
    x, dim = inputs(64, "D=2048")
    twice = x[:, :1024].float().sum(1).bfloat16() + x[:, 1024:].float().sum(1).bfloat16()
    wanted = x.double().sum(dim)
    assert ((twice.double() - wanted).abs() > allowed(x, wanted, 1)).any()


# bad input


X = torch.ones(1, 4, device=HERE)
BAD = {
    "x a list": (([[1.0]],), TypeError, r"x .*list"),
    "x an array": ((np.ones((1, 4), np.float32), 1), TypeError, r"x .*ndarray"),
    "x an array, dims a tuple": ((np.ones((1, 4), np.float32), (1,)), TypeError, r"x .*ndarray"),
    "x of integers": ((X.int(), 1), TypeError, r"x .*float32.*int32"),
    "x of booleans": ((X.bool(), 1), TypeError, r"x .*float32.*bool"),
    "x in float64": ((X.double(), 1), TypeError, r"x .*float64"),
    "x complex": ((X.to(torch.complex64), 1), TypeError, r"x .*complex64"),
    "x sparse": ((X.cpu().to_sparse(), 1), TypeError, r"x .*sparse_coo"),
    "x on another device": ((X.to("meta"), 1), ValueError, r"x .*meta"),
    "dim too large": ((X, 2), ValueError, r"dim .*x, which has 2, got 2"),
    "dim too small": ((X, -3), ValueError, r"dim .*got -3"),
    "one of the dims too large": ((X, (0, 2)), ValueError, r"dim .*got \(0, 2\)"),
    "dim of a number": ((X[0, 0], 1), ValueError, r"dim .*which has 0, got 1"),
    "a dim twice": ((X, (0, 0)), ValueError, r"dim .*once, got \(0, 0\)"),
    "a dim twice, once from the end": ((X, (1, -1)), ValueError, r"dim .*once, got \(1, -1\)"),
    "the dim of a number twice": ((X[0, 0], (0, -1)), ValueError, r"dim .*once, got \(0, -1\)"),
    "dim a float": ((X, 1.0), TypeError, r"dim .*int.*got 1.0"),
    "dim a bool": ((X, True), TypeError, r"dim .*int.*got True"),
    "dims with a float": ((X, (0, 1.0)), TypeError, r"dim .*int.*got \(0, 1.0\)"),
    "dims with a bool": ((X, (False,)), TypeError, r"dim .*int.*got \(False,\)"),
    "dim a string": ((X, "1"), TypeError, r"dim .*got '1'"),
    "dim a set": ((X, {1}), TypeError, r"dim .*got {1}"),
    "dim a tensor": ((X, torch.tensor(1)), TypeError, r"dim .*tensor\(1\)"),
    "keepdim a number": ((X, 1, 1), TypeError, r"keepdim .*int"),
    "keepdim None": ((X, 1, None), TypeError, r"keepdim .*NoneType"),
}


@both
@both_ops
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(op, name, case):
    arguments, error, message = BAD[case]
    for good in ((X, 1, True), (X, 0), (X, (0, 1)), (X,)):  # what a cache may know must not let its like pass
        op.implementation(name)(*good)
    with pytest.raises(error, match=message):
        op.implementation(name)(*arguments)


@pytest.mark.parametrize("case", BAD)
def test_bad_input_to_one_schedule_is_named(case):
    arguments, error, message = BAD[case]
    with pytest.raises(error, match=message):
        run_schedule(Schedule("rows", 4), *arguments)


@needs_triton
@both_ops
def test_gradients_are_refused_rather_than_dropped(op):
    x = numbers((3, 16)).requires_grad_()
    with pytest.raises(RuntimeError, match=rf"{op.name}\.triton.*no_grad"):
        op.triton(x, 1)
    with torch.no_grad():
        assert same_bits(op.triton(x, 1), op.python(x, 1))


def test_the_specification_has_gradients():
    x = numbers((3, 5, 4)).requires_grad_()
    (MEAN.python(x, (0, 2)).sum() + 2 * SUM.python(x, 1).sum()).backward()
    assert same_bits(x.grad, torch.full_like(x, 1 / 12) + 2)


def test_pythons_own_sum_is_not_hidden():
    namespace = {}
    exec("from kernels import *", namespace)
    assert "sum" not in namespace and namespace["mean"] is MEAN
    assert kernels.sum is SUM and kernels.mean is MEAN


# the custom ops


@needs_triton
@pytest.mark.parametrize(("shape", "dims"), [((4, 48), [1]), ((2, 3, 8), [0, 2]), ((5,), []), ((), []), ((0, 4), [1])])
def test_the_custom_ops_keep_torchs_contract(shape, dims, monkeypatch):
    monkeypatch.undo()  # opcheck looks at torch.empty itself
    x = numbers(shape)
    for keepdim in (False, True):
        torch.library.opcheck(torch.ops.same_bits.sum.default, (x, dims, keepdim))
        assert same_bits(torch.ops.same_bits.mean(x, dims, keepdim), MEAN.python(x, tuple(dims), keepdim))
    torch.library.opcheck(torch.ops.same_bits.mean.default, (x, dims, False))


def block(total, mean, x):
    """What surrounds them in a model: a centred row, a view before, another reduction after."""
    centred = x - mean(x, -1, keepdim=True)
    return total(centred.view(-1, 4, x.shape[-1] // 4), (1, 2)), mean(x), total(centred, dim=0)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_torch_compile_keeps_the_bits(dtype, dynamic, monkeypatch):
    monkeypatch.undo()
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: block(SUM.triton, MEAN.triton, x), fullgraph=True, backend="aot_eager",
                             dynamic=dynamic)
    for tokens in (6, 3):
        x = inputs(tokens, "D=200", dtype)[0]
        assert same_bits(compiled(x), block(SUM.python, MEAN.python, x))


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
    """Where kernels may overlap (sm_90 and later), nothing touches memory before the wait; elsewhere there is none."""
    for code in compiled:
        waits = [code.ptx.find(f"griddepcontrol.{what}") for what in ("wait", "launch_dependents")]
        if code.job.target < 90:
            assert waits == [-1, -1], named([code])
        else:
            memory = min(code.ptx.index("ld.global"), code.ptx.index("st.global"))
            assert -1 < waits[0] < memory and waits[0] < waits[1], named([code])


# on a GPU


GPU_WIDTHS = (*WIDTHS, 33, 96, 128, 500, 1536, 2048, 4096, 5000, 5120, 8192, 12288, 20000, 28672, 131072, 10**6)
GPU_CASES = (("D=3", "float32"), ("D=100", "bfloat16"), ("D=1000", "float16"), ("D=1025", "float32"),
             ("D=4096", "bfloat16"), ("D=5120", "float32"), ("D=8192", "bfloat16"), ("D=20000", "bfloat16"),
             ("D=20001", "float32"), ("D=70000", "float16"), ("D=3,inner=5", "float32"), ("D=100,inner=64", "float16"),
             ("D=1000,inner=33", "bfloat16"), ("D=1024,inner=128", "float32"), ("D=5000,inner=48", "bfloat16"),
             ("D=20000,inner=3", "float32"))
GPU_ROWS = 37  # one number throughout, so that a schedule compiled once serves every input


@pytest.mark.gpu
@pytest.mark.parametrize(("shape", "dtype"), GPU_CASES)
def test_every_schedule_is_python_on_a_gpu(shape, dtype):
    """Portable inputs and every adversarial kind."""
    dtype = DTYPES[dtype]
    cases = {"portable": inputs(GPU_ROWS, shape, dtype, 1)}
    cases |= {kind: hostile(kind, GPU_ROWS, shape, dtype, 1) for kind in ADVERSARIAL}
    cases["zeros"] = (torch.full_like(cases["portable"][0], -0.0), cases["portable"][1])
    wanted = {kind: (SUM.python(*arguments), MEAN.python(*arguments)) for kind, arguments in cases.items()}
    for schedule in SUM.schedules(shape, dtype):
        for kind, (x, dim) in cases.items():
            found = run_schedule(schedule, x, dim), run_schedule(schedule, x, dim, mean=True)
            assert same_bits(found, wanted[kind]), (str(schedule), kind)


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
@pytest.mark.parametrize(("shape", "dtype"), [
    ("D=96", "bfloat16"), ("D=1000", "float32"), ("D=4096", "bfloat16"), ("D=5120", "float16"), ("D=8192", "bfloat16"),
    ("D=8192", "float32"), ("D=20000", "float16"), ("D=100,inner=40", "bfloat16"), ("D=1500,inner=16", "float32")])
def test_triton_is_python_for_every_batch_on_a_gpu(shape, dtype):
    x, dim = inputs(4096, shape, DTYPES[dtype], 1)
    wanted = SUM.python(x, dim)
    for tokens in (1, 2, 3, 5, 8, 31, 32, 33, 100, 127, 128, 131, 132, 133, 511, 700, 1024, 1056, 2111, 3000, 4096):
        assert same_bits(SUM.triton(x[:tokens], dim), wanted[:tokens]), tokens
    report = check_invariance(SUM.triton, (x, dim), SUM.per_token)
    assert report, str(report)


@pytest.mark.gpu
@every_dtype
@pytest.mark.parametrize("shape", ["D=1", "D=100", "D=1000", "D=8192", "D=20000", "D=65536", "D=1100,inner=8"])
def test_a_cpu_and_a_gpu_specify_the_same_bits(shape, dtype):
    rows = min(2000, 1_000_000 // Shape.parse(shape)["D"])
    for kind in ("portable", *ADVERSARIAL):
        here, there = (inputs(rows, shape, dtype, 3, device) if kind == "portable" else
                       hostile(kind, min(rows, 200), shape, dtype, 3, device) for device in ("cpu", "cuda"))
        assert same_bits(SUM.python(*here), SUM.python(*there)), kind
        assert same_bits(MEAN.python(*here), MEAN.python(*there)), kind


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
            assert same_bits(run_schedule(schedule, moved, dim), wanted), (by, str(schedule))


@pytest.mark.gpu
def test_strides_beyond_32_bits_on_a_gpu():
    stride, width = 2**31 + 8, 1000
    if torch.cuda.mem_get_info()[0] < 3 * stride * 2:
        pytest.skip("needs 13 GB of free GPU memory")
    x, _ = inputs(2, f"D={width}")
    apart = torch.empty(stride + width, dtype=x.dtype, device=x.device).as_strided((2, width), (stride, 1))
    apart.copy_(x)
    rows = [Schedule("rows", 4), Schedule("rows", 4, rows=2), Schedule("stream", 4), Schedule("split", 1, columns=32)]
    beside = [Schedule("inner", 4, columns=64, parts=2), Schedule("split", 1, columns=64, flight=4)]
    for dim, schedules in ((1, rows), (0, beside)):
        assert same_bits(SUM.triton(apart, dim), SUM.python(x, dim))
        for schedule in schedules:
            assert same_bits(run_schedule(schedule, apart, dim), SUM.python(x, dim)), schedule


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
        assert same_bits(run_schedule(schedule, x), SUM.python(short)), schedule
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


@pytest.mark.gpu
@pytest.mark.parametrize("shape", ["D=4096", "D=100000", "D=3000,inner=64", "D=100000,inner=2"])
@pytest.mark.parametrize("tokens", [1, 64])
def test_a_graph_replays_the_same_bits_on_a_gpu(tokens, shape):
    """Captured once, replayed on other numbers in the same place."""
    static, dim = inputs(tokens, shape, seed=0)
    assert same_bits(MEAN.triton(static, dim), MEAN.python(static, dim))  # loads the modules before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = MEAN.triton(static, dim)
    for seed in (0, 10, 20):
        static.copy_(inputs(tokens, shape, seed=seed)[0])
        captured.fill_(float("nan"))
        graph.replay()
        assert same_bits(captured, MEAN.python(static, dim))


@pytest.mark.gpu
def test_several_streams_at_once_on_a_gpu():
    shapes = ("D=4096", "D=100000", "D=1000", "D=20000,inner=8")
    work = [inputs(tokens, shape, seed=tokens) for tokens, shape in zip((700, 2, 3000, 3), shapes, strict=True)]
    wanted = [SUM.python(*arguments) for arguments in work]
    streams = [torch.cuda.Stream() for _ in work]
    torch.cuda.synchronize()
    results = []
    for _ in range(30):
        for i, (stream, arguments) in enumerate(zip(streams, work, strict=True)):
            with torch.cuda.stream(stream):
                results.append((i, SUM.triton(*arguments)))
    torch.cuda.synchronize()
    assert len(results) == 120 and all(same_bits(result, wanted[i]) for i, result in results)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(64, 70, 90), (4, 2000, 64), (2, 70000, 2), (1, 3, 100000)])
def test_calls_that_feed_each_other_wait_for_each_other_on_a_gpu(shape):
    """A kernel may start before the one ahead has ended; it must not read what is not yet written."""
    x = numbers(shape, torch.float32)
    wanted = MEAN.python(MEAN.python(SUM.python(x, 1), 1), 0)
    for dims in ((1, 1, 0), (1, 1, 0)):
        for _ in range(40):
            y = x
            for op, dim in zip((SUM, MEAN, MEAN), dims, strict=True):
                y = op.triton(y, dim)
            assert same_bits(y, wanted)
    place, results = torch.empty_like(x), []
    for seed in range(40):  # between other kernels: nothing may be overwritten while it is still read
        place.copy_(x).mul_(2.0**-seed)
        results.append(SUM.triton(place, 1))
    assert all(same_bits(y, SUM.python(x * 2.0**-seed, 1)) for seed, y in enumerate(results))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_inductor_keeps_the_bits_on_a_gpu(dtype, monkeypatch):
    monkeypatch.undo()
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: block(SUM.triton, MEAN.triton, x), fullgraph=True)
    for tokens in (64, 500):
        x = inputs(tokens, "D=4096", dtype)[0]
        assert same_bits(compiled(x), block(SUM.python, MEAN.python, x))


@pytest.mark.gpu
def test_a_tensor_on_the_cpu_beside_a_gpu_is_refused():
    with pytest.raises((ValueError, runtime.Unavailable), match="(?i)cpu"):
        SUM.triton(*inputs(3, "D=64", device="cpu"))


@pytest.mark.gpu
def test_another_gpu_than_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    for shape in ("D=4096", "D=100000"):
        x, dim = inputs(3, shape, device="cuda:1")
        result = SUM.triton(x, dim)
        assert result.device == torch.device("cuda:1") and torch.cuda.current_device() == 0
        assert same_bits(result, SUM.python(x.cpu(), dim))
