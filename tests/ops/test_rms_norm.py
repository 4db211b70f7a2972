"""RMSNorm: the specification against a pencil, its schedules against the specification, and nothing against the batch.

Tests without the mark `gpu` run where they are: on a GPU the compiled kernels, elsewhere Triton's interpreter.
"""
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import OPS, runtime
from kernels.bits import ADVERSARIAL, adversarial, check_invariance, elements_differ, portable, same_bits
from kernels.lab.records import ROOT
from kernels.op import DTYPES, Shape
from kernels.ops.rms_norm import Schedule, run_schedule

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # rows that overflow on purpose

OP = OPS["rms_norm"]
SPLIT = OP.extras["split"]
HERE = runtime.device()

every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
both = pytest.mark.parametrize("name", ["python", pytest.param("triton", marks=pytest.mark.skipif(
    bool(runtime.WHY_NOT), reason=runtime.WHY_NOT or "Triton runs here"))])
with_residual = pytest.mark.parametrize("residual", ["", ",residual"], ids=["plain", "residual"])
needs_triton = pytest.mark.skipif(bool(runtime.WHY_NOT), reason=runtime.WHY_NOT or "Triton runs here")

WIDTHS = (1, 2, 3, 5, 31, 64, 100, 255, 256, 257, 512, 1000, 1023, 1024, 1025, 2047, 3000, 4096, 5120, 8191, 16384,
          16385, 20000, 65535, 65536)
dtypes = st.sampled_from(list(DTYPES.values()))


def inputs(tokens, shape, dtype=torch.bfloat16, seed=0, device=HERE):
    return OP.inputs(tokens, shape, dtype, device, seed)


def hostile(kind, tokens, shape, dtype, seed=0, device=HERE):
    """The op's inputs with every per-token argument made of an adversarial kind."""
    made = inputs(tokens, shape, dtype, seed, device)
    return tuple(adversarial(kind, *a.shape, dtype, device, seed + i) if i in OP.per_token and a is not None else a
                 for i, a in enumerate(made))


def first(result):
    return result[0] if isinstance(result, tuple) else result


# the specification against a pencil


def pencil(x, weight, residual, eps):
    """The docstring of kernels/ops/rms_norm.py in NumPy, row by row; torch only rounds to 16 bits."""
    def rounded(numbers):
        return torch.from_numpy(numbers).to(x.dtype)

    ys, streams = [], []
    for i in range(len(x)):
        row = x[i].float().numpy() if residual is None else x[i].float().numpy() + residual[i].float().numpy()
        h = rounded(row).float().numpy()
        squares = np.append(h * h, np.zeros(-len(h) % 1024, np.float32)).reshape(-1, 1024)
        sums = squares[0]
        for chunk in squares[1:]:
            sums = sums + chunk
        while len(sums) > 1:
            sums = np.array([sums[j] + sums[j + 1] for j in range(0, len(sums), 2)])
        mean = sums[0] * np.float32(1 / len(h))
        scale = np.float32(1) / np.sqrt(mean + np.float32(eps))
        ys.append(rounded((h * scale) * weight.float().numpy()))
        streams.append(rounded(row))
    return torch.stack(ys) if residual is None else (torch.stack(ys), torch.stack(streams))


@settings(deadline=None)
@given(width=st.integers(1, 5000), residual=st.booleans(), dtype=dtypes, seed=st.integers(0, 10**6),
       eps=st.sampled_from([1e-6, 1e-5, 1e-12, 0.1, 3.0]))
def test_the_specification_is_the_pencil(width, residual, dtype, seed, eps):
    given_ = inputs(2, Shape(D=width, residual=True) if residual else Shape(D=width), dtype, seed, "cpu")
    assert same_bits(OP.python(*given_, eps), pencil(*given_, eps))


@every_dtype
@pytest.mark.parametrize("kind", ADVERSARIAL)
def test_the_specification_is_the_pencil_for_adversarial_rows(kind, dtype):
    for shape in ("D=1300", "D=700,residual"):
        given_ = hostile(kind, 6, shape, dtype, device="cpu")
        assert same_bits(OP.python(*given_), pencil(*given_, 1e-6))


def test_square_roots_are_correctly_rounded():
    """A CPU's float32 square root may be one ulp off; 20 000 rows of one number each would show it."""
    x = portable(20_000, 1, seed=9)
    root = torch.from_numpy(np.sqrt((x * x + torch.tensor(1e-6)).numpy()))
    assert same_bits(OP.python(x, torch.ones(1)), x * (1.0 / root))


def test_the_specification_ignores_the_thread_count():
    given_, before = inputs(300, "D=3000,residual", device="cpu"), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(OP.python(*given_))
    finally:
        torch.set_num_threads(before)
    assert same_bits(results[0], results[1]) and same_bits(results[0], results[2])


# schedules against the specification


@needs_triton
@settings(deadline=None, max_examples=40)
@given(rows=st.integers(1, 5), width=st.integers(1, 3000), residual=st.booleans(), dtype=dtypes,
       seed=st.integers(0, 10**6), eps=st.sampled_from([1e-6, 1e-5, 0.5]))
def test_triton_is_python(rows, width, residual, dtype, seed, eps):
    given_ = inputs(rows, Shape(D=width, residual=True) if residual else Shape(D=width), dtype, seed)
    assert same_bits(OP.triton(*given_, eps), OP.python(*given_, eps))


@needs_triton
@pytest.mark.parametrize("width", WIDTHS)
def test_triton_is_python_at_every_width(width):
    for residual in ("", ",residual"):
        given_ = inputs(2, f"D={width}{residual}")
        assert same_bits(OP.triton(*given_), OP.python(*given_))


@needs_triton
@every_dtype
@pytest.mark.parametrize("shape", ["D=3", "D=96,residual", "D=1000", "D=2500,residual", "D=17000"])
def test_every_schedule_is_python(shape, dtype):
    given_ = inputs(7, shape, dtype)
    wanted = OP.python(*given_)
    for schedule in OP.schedules(shape, dtype):
        assert same_bits(run_schedule(schedule, *given_), wanted), schedule


@needs_triton
@every_dtype
@pytest.mark.parametrize("kind", ADVERSARIAL)
def test_triton_is_python_for_adversarial_rows(kind, dtype):
    for shape in ("D=1300", "D=600,residual"):
        given_ = hostile(kind, 9, shape, dtype)
        assert same_bits(OP.triton(*given_), OP.python(*given_))


@needs_triton
def test_schedules_of_choice_are_all_tested():
    for width in (1, 3, 17, 100, 128, 129, 500, 1000, 1024, 2000, 4096, 8192, 16384, 16385, 70000):
        for dtype in DTYPES.values():
            tested = {str(s) for s in OP.schedules(f"D={width}", dtype)}
            chosen = {OP.schedule(tokens, f"D={width}", dtype) for tokens in (*range(1, 3000, 13), 10**5, 10**6)}
            assert chosen <= tested, (width, chosen - tested)


# nothing against the batch


@both
@every_dtype
@pytest.mark.parametrize("shape", ["D=96,residual", "D=1000", "D=2100,residual"])
def test_a_row_ignores_its_batch(name, dtype, shape):
    """Alone, in batches of any size, first, last, reversed, repeated."""
    report = check_invariance(OP.implementation(name), inputs(13, shape, dtype), OP.per_token)
    assert report, str(report)


@both
@settings(deadline=None, max_examples=25)
@given(data=st.data(), tokens=st.integers(1, 9), width=st.integers(1, 1500), residual=st.booleans(), dtype=dtypes)
def test_any_choice_of_rows_keeps_their_bits(name, data, tokens, width, residual, dtype):
    chosen = data.draw(st.lists(st.integers(0, tokens - 1), min_size=1, max_size=12))
    given_ = inputs(tokens, Shape(D=width, residual=True) if residual else Shape(D=width), dtype)
    report = check_invariance(OP.implementation(name), given_, OP.per_token, [torch.tensor(chosen)])
    assert report, str(report)


@both
@every_dtype
def test_a_row_keeps_its_bits_at_every_position(name, dtype):
    x, weight, residual = inputs(6, "D=1100,residual", dtype)
    alone = OP.implementation(name)(x[:1], weight, residual[:1])
    for position in range(6):
        order = torch.tensor([1, 2, 3, 4, 5])
        order = torch.cat([order[:position], torch.tensor([0]), order[position:]])
        together = OP.implementation(name)(x[order], weight, residual[order])
        assert same_bits(tuple(t[position : position + 1] for t in together), alone)


@both
@every_dtype
@pytest.mark.parametrize("kind", ADVERSARIAL)
def test_adversarial_rows_ignore_their_batch(name, dtype, kind):
    report = check_invariance(OP.implementation(name), hostile(kind, 7, "D=600,residual", dtype), OP.per_token)
    assert report, str(report)


@both
@every_dtype
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_bad_neighbours_do_not_reach_a_row(name, dtype, bad):
    x, weight, residual = inputs(8, "D=300,residual", dtype)
    wanted = OP.implementation(name)(x, weight, residual)
    x[1::2], residual[::4] = bad, bad
    clean = [2, 6]
    spoiled = OP.implementation(name)(x, weight, residual)
    assert same_bits(tuple(t[clean] for t in spoiled), tuple(t[clean] for t in wanted))
    assert not first(spoiled)[1].isfinite().any()


@needs_triton
@every_dtype
def test_bad_neighbours_do_not_reach_a_row_of_the_same_program(dtype):
    x, weight, residual = inputs(8, "D=300,residual", dtype)
    wanted = OP.python(x, weight, residual)
    x[1::2] = float("nan")
    for rows in (2, 4):
        y, stream = run_schedule(Schedule(rows, 4), x, weight, residual)
        assert same_bits((y[::2], stream[::2]), (wanted[0][::2], wanted[1][::2]))


def views(x):
    """The same numbers behind other strides: name -> view of a larger or turned tensor."""
    rows, width = x.shape
    wide, tall, apart, turned = (torch.full(size, float("nan"), dtype=x.dtype, device=x.device) for size in (
        (rows, width + 24), (2 * rows, width), (rows, 2 * width), (width, rows)))
    wide[:, 8 : 8 + width], tall[::2], apart[:, ::2], turned[:] = x, x, x, x.t()
    odd = torch.full((rows, width + 3), float("nan"), dtype=x.dtype, device=x.device)
    odd[:, 1 : 1 + width] = x
    return {"columns of a wider tensor": wide[:, 8 : 8 + width], "every second row": tall[::2],
            "every second column": apart[:, ::2], "transposed": turned.t(), "misaligned": odd[:, 1 : 1 + width]}


@both
@every_dtype
@pytest.mark.parametrize("width", [70, 1040])
def test_strides_do_not_matter(name, dtype, width):
    call = OP.implementation(name)
    x, weight, residual = inputs(6, f"D={width},residual", dtype)
    wanted, plain = call(x, weight, residual), call(x, weight)
    for how, view in views(x).items():
        assert same_bits(view, x) and not view.is_contiguous()
        assert same_bits(call(view, weight), plain), how
        assert same_bits(call(view, weight, residual), wanted), how
    for how, view in views(residual).items():
        assert same_bits(call(x, weight, view), wanted), how
    assert same_bits(call(views(x)["transposed"], weight, views(residual)["misaligned"]), wanted)
    assert same_bits(call(views(x)["every second row"], weight, views(residual)["misaligned"]), wanted)
    for how, view in views(weight[None]).items():
        assert same_bits(call(x, view[0], residual), wanted), how
        if name == "triton":
            assert same_bits(run_schedule(Schedule(1, 4), x, view[0], residual), wanted), how


@both
@pytest.mark.parametrize("leading", [(), (6,), (2, 3), (1, 6, 1), (2, 1, 3)])
def test_leading_dimensions_are_rows(name, leading):
    call = OP.implementation(name)
    x, weight, residual = inputs(math.prod(leading), "D=130,residual")
    wanted = call(x, weight, residual)
    folded = call(x.view(*leading, 130), weight, residual.view(*leading, 130))
    assert all(t.shape == (*leading, 130) and t.is_contiguous() for t in folded)
    assert same_bits(tuple(t.view(-1, 130) for t in folded), wanted)
    assert same_bits(call(x.view(*leading, 130), weight).view(-1, 130), call(x, weight))


@both
def test_leading_dimensions_may_be_strided(name):
    call = OP.implementation(name)
    x, weight, residual = inputs(24, "D=130,residual")
    x, residual = x.view(4, 6, 130), residual.view(4, 6, 130)
    for cut in (lambda t: t[:, ::2], lambda t: t.transpose(0, 1), lambda t: t[..., ::2], lambda t: t[1:3, 2:5, :66]):
        part = (cut(x), weight[: cut(x).shape[-1]], cut(residual))
        assert same_bits(call(*part), call(*(t.contiguous() for t in part)))
    row = x[0, :1]
    assert same_bits(call(row.expand(5, 130), weight), call(row.repeat(5, 1), weight))


@both
@every_dtype
@with_residual
@pytest.mark.parametrize("leading", [(0,), (2, 0), (0, 3)])
def test_zero_tokens_give_an_empty_result(name, dtype, residual, leading):
    weight = portable(1, 40, dtype, HERE)[0]
    x = torch.zeros(*leading, 40, dtype=dtype, device=HERE)
    result = OP.implementation(name)(x, weight, x.clone() if residual else None)
    assert isinstance(result, tuple) == bool(residual)
    for tensor in result if residual else (result,):
        assert (tensor.shape, tensor.dtype, tensor.device) == (x.shape, dtype, x.device)


@both
@with_residual
def test_inputs_are_left_alone_and_outputs_are_new(name, residual):
    given_ = inputs(4, f"D=200{residual}")
    before = [t.clone() for t in given_ if t is not None]
    result = OP.implementation(name)(*given_)
    again = OP.implementation(name)(*given_)
    assert same_bits(result, again)
    assert all(same_bits(a, b) for a, b in zip((t for t in given_ if t is not None), before, strict=True))
    places = [t.data_ptr() for t in (*given_, *(result if residual else (result,))) if t is not None]
    assert len(set(places)) == len(places)


# accuracy


# Largest error relative to |y|: half an ulp of the dtype for the last rounding, and a little for float32 before it.
TOLERANCE = {"bfloat16": 2.0**-8 * 1.001, "float16": 2.0**-11 * 1.005, "float32": 2.0**-24 * 16}


def exact(x, weight, residual, eps=1e-6):
    """In float64, from the stream rounded to the dtype, as every implementation has it."""
    stream = x if residual is None else (x.double() + residual.double()).to(x.dtype)
    h = stream.double()
    return h / torch.sqrt(h.square().mean(-1, keepdim=True) + eps) * weight.double()


@every_dtype
@with_residual
@pytest.mark.parametrize("name", ["cuda", "python", "triton", "split"])
@pytest.mark.parametrize("width", [1, 77, 1024, 3000])
def test_accuracy_against_float64(name, dtype, residual, width):
    if name == "triton" and runtime.WHY_NOT:
        pytest.skip(runtime.WHY_NOT)
    given_ = inputs(20, f"D={width}{residual}", dtype, seed=width)
    result, wanted = OP.implementation(name)(*given_), exact(*given_)
    error = (first(result).double() - wanted).abs()
    allowed = TOLERANCE[str(dtype).removeprefix("torch.")] * wanted.abs()
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert first(result).dtype == dtype
    assert (error <= allowed + smallest / 2).all(), (error / wanted.abs()).max().item()
    if residual:
        total = given_[0].double() + given_[2].double()
        assert ((result[1].double() - total).abs() <= torch.finfo(dtype).eps / 2 * total.abs()).all()


def test_the_tolerance_is_tight_enough_to_notice_a_rounding():
    """Inverse test: rounding to bfloat16 before the weight, as some kernels do, exceeds the table."""
    x, weight, _ = inputs(20, "D=1024")
    twice = (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)).bfloat16() * weight
    wanted = exact(x, weight, None)
    assert ((twice.double() - wanted).abs() > TOLERANCE["bfloat16"] * wanted.abs()).any()


# bad input


def good():
    x, weight, residual = inputs(3, "D=16,residual", torch.float32)
    return {"x": x, "weight": weight, "residual": residual, "eps": 1e-6}


def like(size, dtype=torch.float32, device=HERE):
    return torch.ones(size, dtype=dtype, device=device)


BAD = {
    "weight of another width": ({"weight": like(8)}, ValueError, r"weight.*\(16,\).*\(8,\)"),
    "weight with two dimensions": ({"weight": like((1, 16))}, ValueError, r"weight.*\(1, 16\)"),
    "x of another width": ({"x": like((3, 8))}, ValueError, r"weight.*\(8,\).*\(16,\)"),
    "x without a width": ({"x": like((3, 0)), "weight": like(0), "residual": None}, ValueError, r"x .*\(3, 0\)"),
    "x a single number": ({"x": like(()), "residual": None}, ValueError, r"x .*\(\)"),
    "x of integers": ({"x": like((3, 16), torch.int32)}, TypeError, r"x .*float32.*int32"),
    "x in float64": ({"x": like((3, 16), torch.float64)}, TypeError, r"x .*float64"),
    "x complex": ({"x": like((3, 16), torch.complex64)}, TypeError, r"x .*complex64"),
    "weight of integers": ({"weight": like(16, torch.int64)}, TypeError, r"weight.*int64"),
    "weight of another dtype": ({"weight": like(16, torch.bfloat16)}, TypeError, r"weight.*float32.*bfloat16"),
    "residual of another dtype": ({"residual": like((3, 16), torch.float16)}, TypeError, r"residual.*float16"),
    "residual with fewer rows": ({"residual": like((2, 16))}, ValueError, r"residual.*\(3, 16\).*\(2, 16\)"),
    "residual of another width": ({"residual": like((3, 15))}, ValueError, r"residual.*\(3, 15\)"),
    "residual of one row": ({"residual": like(16)}, ValueError, r"residual.*\(16,\)"),
    "x on another device": ({"x": like((3, 16), device="meta"), "residual": None}, ValueError, r"weight.*meta"),
    "weight on another device": ({"weight": like(16, device="meta")}, ValueError, r"weight.*meta"),
    "residual on another device": ({"residual": like((3, 16), device="meta")}, ValueError, r"residual.*meta"),
    "everything on another device": ({"x": like((3, 16), device="meta"), "weight": like(16, device="meta"),
                                      "residual": None}, ValueError, r"x .*meta"),
    "x a list": ({"x": [[1.0] * 16] * 3, "residual": None}, TypeError, r"x .*list"),
    "x an array": ({"x": np.ones((3, 16), np.float32), "residual": None}, TypeError, r"x .*ndarray"),
    "no weight": ({"weight": None}, TypeError, r"weight.*NoneType"),
    "residual a number": ({"residual": 1.0}, TypeError, r"residual.*float"),
    "eps zero": ({"eps": 0.0}, ValueError, r"eps.*0"),
    "eps negative": ({"eps": -1e-6}, ValueError, r"eps.*-1e-06"),
    "eps nan": ({"eps": float("nan")}, ValueError, r"eps.*nan"),
    "eps infinite": ({"eps": float("inf")}, ValueError, r"eps.*inf"),
}


@both
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(name, case):
    changes, error, message = BAD[case]
    with pytest.raises(error, match=message):
        OP.implementation(name)(**{**good(), **changes})


@pytest.mark.parametrize("case", BAD)
def test_bad_input_to_one_schedule_is_named(case):
    changes, error, message = BAD[case]
    with pytest.raises(error, match=message):
        run_schedule(Schedule(1, 4), **{**good(), **changes})


@both
def test_good_input_passes_where_bad_input_is_refused(name):
    """The cases above differ from this one by what they name, and by nothing else."""
    assert first(OP.implementation(name)(**good())).shape == (3, 16)


@needs_triton
@pytest.mark.parametrize("which", ["x", "weight", "residual"])
def test_gradients_are_refused_rather_than_dropped(which):
    arguments = good()
    arguments[which].requires_grad_()
    with pytest.raises(RuntimeError, match="no_grad"):
        OP.triton(**arguments)
    with torch.no_grad():
        assert same_bits(OP.triton(**arguments), OP.python(**arguments))


def test_the_specification_has_gradients():
    arguments = good()
    tensors = [arguments[name].requires_grad_() for name in ("x", "weight", "residual")]
    y, stream = OP.python(**arguments)
    (y.sum() + stream.sum()).backward()
    assert all(t.grad.isfinite().all() and t.grad.any() for t in tensors)


# the split schedule, which moves bits


def test_the_split_schedule_moves_bits():
    """Inverse test: the check fails on a sum whose parts depend on the batch."""
    report = check_invariance(SPLIT, inputs(64, "D=4096", torch.float32), OP.per_token)
    assert not report
    assert (report.first.batch, report.first.row, report.first.output) == ("rows 0:1", 0, 0)
    assert report.elements_differ > report.elements / 100 and report.largest_ulp >= 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_the_split_schedule_moves_few_bits_of_16(dtype):
    """Rounding to 16 bits hides nearly all of it: why a digest covers thousands of rows."""
    report = check_invariance(SPLIT, inputs(64, "D=4096", dtype), OP.per_token)
    assert 0 < report.elements_differ < report.elements / 1000


def test_the_split_schedule_cuts_fewer_parts_for_more_rows():
    given_ = inputs(128, "D=4096", torch.float32)
    assert same_bits(SPLIT(*given_), SPLIT(*given_, parts=1))
    assert same_bits(SPLIT(*OP.take(given_, slice(0, 4))), SPLIT(*OP.take(given_, slice(0, 4)), parts=32))
    assert elements_differ(SPLIT(*given_, parts=1), SPLIT(*given_, parts=32)) > 0


# the custom op


@needs_triton
@pytest.mark.parametrize("leading", [(4,), (2, 3), (0,)])
def test_the_custom_ops_keep_torchs_contract(leading, monkeypatch):
    monkeypatch.undo()  # opcheck looks at torch.empty itself
    x, weight, residual = (t.view(*leading, 48) if t.dim() == 2 else t for t in inputs(
        math.prod(leading), "D=48,residual", torch.float32))
    torch.library.opcheck(torch.ops.same_bits.rms_norm.default, (x, weight, 1e-6))
    torch.library.opcheck(torch.ops.same_bits.add_rms_norm.default, (x, weight, residual, 1e-6))


@needs_triton
def test_the_custom_ops_are_the_specification():
    x, weight, residual = inputs(5, "D=48,residual")
    assert same_bits(torch.ops.same_bits.rms_norm(x, weight, 1e-5), OP.python(x, weight, eps=1e-5))
    assert same_bits(torch.ops.same_bits.add_rms_norm(x, weight, residual, 1e-5), OP.python(x, weight, residual, 1e-5))


def block(x, weight, residual):
    """What surrounds a norm in a model: a reshape before, another norm after."""
    y, stream = OP.triton(x.reshape(-1, weight.shape[0]), weight, residual, 1e-5)
    return OP.triton(y, weight), stream


def block_in_python(x, weight, residual):
    y, stream = OP.python(x.reshape(-1, weight.shape[0]), weight, residual, 1e-5)
    return OP.python(y, weight), stream


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_torch_compile_keeps_the_bits(dtype, dynamic, monkeypatch):
    monkeypatch.undo()
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for tokens in (6, 3):
        x, weight, residual = inputs(tokens, "D=200,residual", dtype)
        assert same_bits(compiled(x.view(tokens, 1, 200), weight, residual), block_in_python(x, weight, residual))


# on a GPU


GPU_WIDTHS = (1, 2, 3, 33, 96, 127, 128, 500, 1000, 1023, 1024, 1025, 1536, 2048, 4096, 5000, 5120, 7168, 8191, 8192,
              12288, 16384, 16385, 20000, 28672, 65535, 65536, 131072)
GPU_CASES = (("D=3", "float32"), ("D=100,residual", "bfloat16"), ("D=1000", "float16"), ("D=1025,residual", "float16"),
             ("D=4096", "bfloat16"), ("D=5120,residual", "float32"), ("D=8192,residual", "bfloat16"),
             ("D=20000,residual", "bfloat16"), ("D=20001", "float32"))
GPU_ROWS = 37  # one number throughout, so that a schedule compiled once serves every input


@pytest.mark.gpu
@pytest.mark.parametrize(("shape", "dtype"), GPU_CASES)
def test_every_schedule_is_python_on_a_gpu(shape, dtype):
    """Portable inputs and every adversarial kind."""
    dtype = DTYPES[dtype]
    cases = {"portable": inputs(GPU_ROWS, shape, dtype, 1)}
    cases |= {kind: hostile(kind, GPU_ROWS, shape, dtype, 1) for kind in ADVERSARIAL}
    wanted = {kind: OP.python(*arguments) for kind, arguments in cases.items()}
    for schedule in OP.schedules(shape, dtype):
        for kind, arguments in cases.items():
            assert same_bits(run_schedule(schedule, *arguments), wanted[kind]), (str(schedule), kind)


@pytest.mark.gpu
@with_residual
@pytest.mark.parametrize("width", GPU_WIDTHS)
def test_triton_is_python_at_every_width_on_a_gpu(width, residual):
    dtype = list(DTYPES.values())[width % 3]
    given_ = inputs(GPU_ROWS, f"D={width}{residual}", dtype, width)
    assert same_bits(OP.triton(*given_), OP.python(*given_))


@pytest.mark.gpu
@pytest.mark.parametrize(("shape", "dtype"), [
    ("D=96,residual", "bfloat16"), ("D=1000", "float32"), ("D=4096,residual", "bfloat16"), ("D=5120", "float16"),
    ("D=8192,residual", "bfloat16"), ("D=8192", "float32"), ("D=20000,residual", "float16")])
def test_triton_is_python_for_every_batch_on_a_gpu(shape, dtype):
    given_ = inputs(4096, shape, DTYPES[dtype], 1)
    wanted = OP.python(*given_)
    for tokens in (1, 2, 3, 5, 8, 31, 32, 33, 100, 127, 128, 511, 512, 700, 1024, 2111, 2112, 3000, 4096):
        result = OP.triton(*OP.take(given_, slice(0, tokens)))
        part = tuple(t[:tokens] for t in wanted) if isinstance(wanted, tuple) else wanted[:tokens]
        assert same_bits(result, part), tokens
    report = check_invariance(OP.triton, given_, OP.per_token)
    assert report, str(report)


@pytest.mark.gpu
@every_dtype
@with_residual
@pytest.mark.parametrize("width", [1, 100, 1000, 4096, 5120, 8192, 20000, 65536])
def test_a_cpu_and_a_gpu_specify_the_same_bits(width, dtype, residual):
    rows = min(2000, 1_000_000 // width)
    here, there = (OP.python(*inputs(rows, f"D={width}{residual}", dtype, 3, device)) for device in ("cpu", "cuda"))
    assert same_bits(here, there), f"{elements_differ(here, there)} elements differ"


@pytest.mark.gpu
@every_dtype
@pytest.mark.parametrize("kind", ADVERSARIAL)
def test_a_cpu_and_a_gpu_specify_the_same_bits_for_adversarial_rows(kind, dtype):
    for shape in ("D=4096", "D=1000,residual"):
        here, there = (OP.python(*hostile(kind, 200, shape, dtype, 3, device)) for device in ("cpu", "cuda"))
        assert same_bits(here, there), f"{elements_differ(here, there)} elements differ"


@pytest.mark.gpu
@pytest.mark.parametrize(("width", "dtype"), [(1, "bfloat16"), (33, "bfloat16"), (999, "float32"), (4095, "bfloat16"),
                                              (4096, "bfloat16"), (8192, "float32"), (20001, "float16")])
def test_misaligned_pointers_on_a_gpu(width, dtype):
    """Rows of odd widths and tensors that begin anywhere: one plan must serve every alignment in turn."""
    x, weight, residual = inputs(GPU_ROWS, f"D={width},residual", DTYPES[dtype])
    wanted = OP.python(x, weight, residual)

    def shifted(tensor, by):
        flat = torch.full((tensor.numel() + by,), float("nan"), dtype=tensor.dtype, device=tensor.device)
        flat[by:] = tensor.reshape(-1)
        return flat[by:].view(tensor.shape)

    for by in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (3, 1, 2), (8, 1, 0), (0, 0, 0)):
        moved = tuple(shifted(tensor, n) for tensor, n in zip((x, weight, residual), by, strict=True))
        assert same_bits(OP.triton(*moved), wanted), by
        assert same_bits(run_schedule(Schedule(1, 16, 4), *moved), wanted), by


@pytest.mark.gpu
@pytest.mark.parametrize("width", [128, 4095, 4096, 20000])
def test_slices_that_begin_at_the_second_row_on_a_gpu(width):
    x, weight, residual = inputs(40, f"D={width},residual")
    y, stream = OP.python(x, weight, residual)
    for start in range(1, 9):
        assert same_bits(OP.triton(x[start:], weight, residual[start:]), (y[start:], stream[start:]))
        assert same_bits(OP.triton(x[start:], weight, residual[:-start]),
                         OP.python(x[start:], weight, residual[:-start]))


@pytest.mark.gpu
def test_strides_beyond_32_bits_on_a_gpu():
    stride, width = 2**31 + 8, 1000
    if torch.cuda.mem_get_info()[0] < 3 * stride * 2:
        pytest.skip("needs 13 GB of free GPU memory")
    x, weight, _ = inputs(2, f"D={width}")
    flat = torch.empty(stride + width, dtype=x.dtype, device=x.device)
    apart = flat.as_strided((2, width), (stride, 1))
    apart.copy_(x)
    wanted = OP.python(x, weight)
    for schedule in (Schedule(1, 4), Schedule(2, 4), Schedule(1, 16, 4)):
        assert same_bits(run_schedule(schedule, apart, weight), wanted), schedule
    assert same_bits(OP.triton(apart, weight), wanted)


@pytest.mark.gpu
def test_more_than_two_billion_elements_on_a_gpu():
    rows, width = 2**31 // 8192 + 70, 8192
    if torch.cuda.mem_get_info()[0] < 5 * rows * width:
        pytest.skip("needs 11 GB of free GPU memory")
    tail, weight, _ = inputs(64, f"D={width}")
    x = torch.zeros(rows, width, dtype=tail.dtype, device=tail.device)
    x[-64:] = tail
    y = OP.triton(x, weight)
    assert same_bits(y[-64:], OP.python(tail, weight))
    assert not y[:-64].any()


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 64, 3000])
def test_a_graph_replays_the_same_bits_on_a_gpu(tokens):
    """Captured once, replayed on other numbers in the same place."""
    static = inputs(tokens, "D=4096,residual", seed=0)
    assert same_bits(OP.triton(*static), OP.python(*static))  # loads the module before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = OP.triton(*static)
    for seed in (0, 10, 20):
        fresh = inputs(tokens, "D=4096,residual", seed=seed)
        for place, numbers in zip(static, fresh, strict=True):
            place.copy_(numbers)
        for tensor in captured:
            tensor.fill_(float("nan"))
        graph.replay()
        assert same_bits(captured, OP.python(*fresh))


IN_A_COLD_PROCESS = """
import torch
from kernels import rms_norm
from kernels.bits import same_bits

arguments = rms_norm.inputs(64, "D=4096,residual", torch.bfloat16, "cuda")
eager = rms_norm.triton(*arguments)
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    captured = rms_norm.triton(*arguments)
for tensor in captured:
    tensor.zero_()
graph.replay()
torch.cuda.synchronize()
assert same_bits(captured, eager) and same_bits(captured, rms_norm.python(*arguments))
print("the same bits")
"""


@pytest.mark.gpu
def test_the_second_call_of_a_process_can_be_captured():
    done = subprocess.run([sys.executable, "-c", IN_A_COLD_PROCESS], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "the same bits", done.stderr


@pytest.mark.gpu
def test_several_streams_at_once_on_a_gpu():
    shapes = ("D=4096,residual", "D=8192,residual", "D=1000,residual", "D=20000,residual")
    work = [inputs(tokens, shape, seed=tokens) for tokens, shape in zip((700, 64, 3000, 9), shapes, strict=True)]
    wanted = [OP.python(*arguments) for arguments in work]
    streams = [torch.cuda.Stream() for _ in work]
    torch.cuda.synchronize()
    results = []
    for _ in range(30):
        for i, (stream, arguments) in enumerate(zip(streams, work, strict=True)):
            with torch.cuda.stream(stream):
                results.append((i, OP.triton(*arguments)))
    torch.cuda.synchronize()
    assert len(results) == 120 and all(same_bits(result, wanted[i]) for i, result in results)


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "width"), [(1, 4096), (33, 8192), (2048, 4096), (300, 20000), (5000, 96)])
def test_calls_that_feed_each_other_wait_for_each_other_on_a_gpu(tokens, width):
    """A kernel may start before the one ahead has ended; it must not read what is not yet written."""
    x, weight, residual = inputs(tokens, f"D={width},residual")
    want_y, want_stream = x, residual
    for _ in range(40):
        want_y, want_stream = OP.python(want_y, weight, want_stream)
    for _ in range(5):
        y, stream = x.clone(), residual.clone()
        for _ in range(40):
            y, stream = OP.triton(y, weight, stream)
        assert same_bits((y, stream), (want_y, want_stream))
    mixed_y, mixed_stream = x.clone(), residual.clone()
    for _ in range(40):  # in place, between other kernels: nothing may be overwritten while it is still read
        y, stream = OP.triton(mixed_y, weight, mixed_stream)
        mixed_y.copy_(y)
        mixed_stream.copy_(stream)
    assert same_bits((mixed_y, mixed_stream), (want_y, want_stream))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_inductor_keeps_the_bits_on_a_gpu(dtype, monkeypatch):
    monkeypatch.undo()
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True)
    for tokens in (64, 500):
        x, weight, residual = inputs(tokens, "D=4096,residual", dtype)
        assert same_bits(compiled(x.view(tokens, 1, 4096), weight, residual), block_in_python(x, weight, residual))


@pytest.mark.gpu
def test_the_split_schedule_moves_bits_on_a_gpu():
    assert not check_invariance(SPLIT, inputs(64, "D=4096,residual", torch.float32), OP.per_token)


@pytest.mark.gpu
@pytest.mark.parametrize("eps", [1, 2, 1.0, 1e-6, 1e-30])
def test_any_positive_eps_on_a_gpu(eps):
    given_ = inputs(5, "D=1000,residual")
    for _ in range(2):
        assert same_bits(OP.triton(*given_, eps), OP.python(*given_, eps))
        assert same_bits(OP.triton(*given_, float(eps)), OP.python(*given_, eps))


@pytest.mark.gpu
@pytest.mark.parametrize("which", ["x", "weight", "residual"])
def test_mixed_devices_are_named_on_a_gpu(which):
    arguments = good()
    arguments[which] = arguments[which].cpu()
    for call in (OP.triton, OP.python):
        with pytest.raises(ValueError, match=r"(weight|residual).*device.*c(uda|pu)"):
            call(**arguments)


@pytest.mark.gpu
@with_residual
def test_a_tensor_on_the_cpu_beside_a_gpu_is_refused(residual):
    with pytest.raises((ValueError, runtime.Unavailable), match="(?i)cpu"):
        OP.triton(*inputs(3, f"D=64{residual}", device="cpu"))


@pytest.mark.gpu
def test_another_gpu_than_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    given_ = inputs(33, "D=4096,residual", device="cuda:1")
    result = OP.triton(*given_)
    assert result[0].device == torch.device("cuda:1") and torch.cuda.current_device() == 0
    assert same_bits(result, OP.python(*inputs(33, "D=4096,residual", device="cpu")))


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_lazily_negated_argument_is_read_as_its_negative(which):
    op = OPS["rms_norm"]
    arguments = list(op.inputs(3, "D=100,residual", torch.float32))
    view = torch._neg_view(-arguments[which])
    assert view.is_neg()
    assert same_bits(op.triton(*arguments[:which], view, *arguments[which + 1:]), op.python(*arguments))
