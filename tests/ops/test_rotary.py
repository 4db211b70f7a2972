"""Rotary positions: what every op promises, for rows that have places in a table."""
import numpy as np
import pytest
import torch
from common import (
    HERE,
    INF,
    NAN,
    both,
    every_dtype,
    exchanged,
    needs_compiler,
    needs_triton,
    numbers,
    rounds_every_product,
    waits_first,
)
from compiling import compile_ahead
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import OPS, runtime
from kernels.bits import ADVERSARIAL, adversarial, check_invariance, same_bits
from kernels.lab.proofs.generated_code import TARGETS, jobs
from kernels.op import DTYPES
from kernels.ops.rotary.op import Schedule

OP = OPS["rotary"]


def inputs(tokens, shape="H=3,D=16,context=9", dtype=torch.float32, seed=0, device=HERE, kind=None):
    x, table, positions = OP.inputs(tokens, shape, dtype, device, seed)
    if kind is not None:
        x = adversarial(kind, tokens, x[0].numel(), dtype, device, seed).view(x.shape)
    return x, table, positions


def pencil(x, table, positions):
    """One pair after the other, in NumPy."""
    rows, half = x.float().numpy(), x.shape[2] // 2
    y = np.zeros_like(rows)
    for row, position in enumerate(positions.tolist()):
        for i in range(half):
            cos, sin = table[position, i].numpy(), table[position, half + i].numpy()
            a, b = rows[row, :, i], rows[row, :, half + i]
            y[row, :, i] = a * cos - b * sin
            y[row, :, half + i] = b * cos + a * sin
    return torch.from_numpy(y).to(x.dtype)


sizes = st.tuples(st.integers(1, 9), st.integers(1, 40), st.integers(1, 50))
some_inputs = st.builds(lambda tokens, s, dtype, seed: inputs(
    tokens, f"H={s[0]},D={2 * s[1]},context={s[2]}", dtype, seed, "cpu"),
    st.integers(1, 5), sizes, st.sampled_from(list(DTYPES.values())), st.integers(0, 10**6))


# the specification


@settings(deadline=None, max_examples=60)
@given(some_inputs)
def test_the_specification_is_the_pencil(given_):
    assert same_bits(OP.python(*given_), pencil(*given_))


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("kind", ADVERSARIAL)
@every_dtype
def test_the_specification_is_the_pencil_for_adversarial_rows(dtype, kind):
    given_ = inputs(6, "H=3,D=16,context=9", dtype, 1, "cpu", kind)
    assert same_bits(OP.python(*given_), pencil(*given_))


@every_dtype
@pytest.mark.parametrize("name", ["cuda", "python", pytest.param("triton", marks=needs_triton)])
def test_a_row_is_turned_as_complex_numbers_are(name, dtype):
    """Against float64: half an ulp of the dtype, and three roundings of float32 before it."""
    x, _, positions = inputs(20, "H=4,D=32,context=64", dtype)
    angle = torch.arange(64, dtype=torch.float64)[:, None] * 3.0 ** -torch.arange(16, dtype=torch.float64)
    table = torch.cat([angle.cos(), angle.sin()], -1).float().to(HERE)
    turn = torch.complex(*(part.double()[positions][:, None] for part in table.chunk(2, -1)))
    wanted = torch.complex(*(part.double() for part in x.chunk(2, -1))) * turn
    wanted = torch.cat([wanted.real, wanted.imag], -1)
    y, size = OP.implementation(name)(x, table, positions), x.double().abs().max()
    assert y.dtype == dtype and y.is_contiguous()
    assert ((y.double() - wanted).abs() <= torch.finfo(dtype).eps / 2 * wanted.abs() + 3 * 2.0**-24 * size).all()


def test_the_specification_ignores_the_thread_count():
    given_, before, found = inputs(3000, "H=8,D=64,context=900", device="cpu"), torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(OP.python(*given_))
    finally:
        torch.set_num_threads(before)
    assert same_bits(*found)


def test_the_specification_has_a_gradient_that_turns_back():
    x, table, positions = inputs(5)
    given_, dy = x.clone().requires_grad_(), numbers(x.shape, seed=3)
    found, = torch.autograd.grad(OP.python(given_, table, positions), given_, dy)
    back = torch.cat([table[:, :8], -table[:, 8:]], -1)
    assert same_bits(found, OP.python(dy, back, positions))


# schedules


@needs_triton
@settings(deadline=None, max_examples=25)
@given(some_inputs)
def test_triton_is_python(given_):
    given_ = tuple(t.to(HERE) for t in given_)
    assert same_bits(OP.triton(*given_), OP.python(*given_))


@needs_triton
@pytest.mark.parametrize("shape", ["H=1,D=2,context=3", "H=9,D=80,context=7", "H=40,D=128,context=33"])
@every_dtype
def test_every_schedule_is_python(shape, dtype):
    given_ = inputs(2, shape, dtype)
    for schedule in OP.schedules(shape, dtype):
        assert same_bits(OP.run_schedule(schedule, *given_), OP.python(*given_)), schedule


@needs_triton
@every_dtype
def test_adversarial_rows_are_pythons(dtype):
    for kind in ADVERSARIAL:
        given_ = inputs(6, dtype=dtype, kind=kind)
        assert same_bits(OP.triton(*given_), OP.python(*given_)), kind


@every_dtype
def test_schedules_of_choice_are_all_tested(dtype):
    for heads in (1, 2, 3, 5, 8, 40, 100):
        for width in (2, 16, 64, 80, 128, 256):
            shape = f"H={heads},D={width},context=4"
            tested = [str(s) for s in OP.schedules(shape, dtype)]
            assert OP.schedule(7, shape, dtype) in tested and len(set(tested)) == len(tested)


@both
@every_dtype
def test_a_row_ignores_its_batch(name, dtype):
    report = check_invariance(OP.implementation(name), inputs(9, dtype=dtype), OP.per_token)
    assert report, str(report)


@both
def test_any_choice_of_rows_keeps_their_bits(name):
    chosen = [torch.tensor(rows) for rows in ([0], [8, 8, 3], [7, 1, 0, 2, 5, 6, 4, 3, 8])]
    report = check_invariance(OP.implementation(name), inputs(9, "H=2,D=80,context=30"), OP.per_token, chosen)
    assert report, str(report)


@both
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_bad_neighbours_reach_no_row_and_no_head(name, bad):
    x, table, positions = inputs(4, "H=3,D=10,context=7")
    wanted = OP.implementation(name)(x, table, positions)
    x[1], x[2, 1, 3] = bad, bad
    found = OP.implementation(name)(x, table, positions)
    assert same_bits(found[[0, 3]], wanted[[0, 3]]) and same_bits(found[2, ::2], wanted[2, ::2])
    assert not found[1].isfinite().any()
    assert (~found[2, 1].isfinite()).nonzero().flatten().tolist() == [3, 8]


# strides, places and nothing at all


def views(x):
    """The same numbers (T, H, D) behind other strides."""
    tokens, heads, width = x.shape
    wide = torch.full((tokens, heads + 3, width), NAN, dtype=x.dtype, device=x.device)
    apart = torch.full((2 * tokens, heads, 2 * width), NAN, dtype=x.dtype, device=x.device)
    wide[:, 1 : 1 + heads], apart[::2, :, ::2] = x, x
    return {"heads of a wider tensor": wide[:, 1 : 1 + heads], "every second number": apart[::2, :, ::2],
            "heads first": x.transpose(0, 1).contiguous().transpose(0, 1), "negated": torch._neg_view(-x),
            "one row for all": x[:1].expand(x.shape)}


@pytest.mark.parametrize("name", ["python", *(pytest.param(n, marks=needs_triton) for n in ("triton", "schedule"))])
@every_dtype
def test_strides_do_not_matter(name, dtype):
    def call(*given_):
        return OP.run_schedule(Schedule(2, 4), *given_) if name == "schedule" else OP.implementation(name)(*given_)

    x, table, positions = inputs(4, "H=3,D=16,context=9", dtype)
    for how, view in views(x).items():
        wanted = OP.python(view.clone() if "negated" not in how else x, table, positions)
        assert same_bits(call(view, table, positions), wanted), how
    apart = torch.zeros(18, 32, device=HERE)
    apart[::2, ::2] = table
    many = torch.stack([positions, positions + 1], -1)
    assert same_bits(call(x, apart[::2, ::2], many[:, 0]), OP.python(x, table, positions))


@both
def test_inputs_are_left_alone_and_outputs_are_new(name):
    given_ = inputs(3)
    before = [t.clone() for t in given_]
    first, second = OP.implementation(name)(*given_), OP.implementation(name)(*given_)
    assert same_bits(given_, tuple(before)) and same_bits(first, second)
    assert len({t.data_ptr() for t in (*given_, first, second)}) == 5


@both
@every_dtype
@pytest.mark.parametrize("size", [(0, 3, 16), (2, 0, 16)])
def test_nothing_gives_an_empty_result(name, dtype, size):
    table, positions = inputs(size[0])[1:]
    y = OP.implementation(name)(torch.zeros(size, dtype=dtype, device=HERE), table, positions)
    assert (y.shape, y.dtype, y.device) == (size, dtype, HERE)


# bad input

X, TABLE, POSITIONS = inputs(3)
GOOD = {"x": X, "table": TABLE, "positions": POSITIONS}
BAD = {
    "no x": ({"x": None}, TypeError, "x must be a tensor, got NoneType"),
    "x of integers": ({"x": X.long()}, TypeError, "x .*float32.*int64"),
    "x of two dimensions": ({"x": X[:, 0]}, ValueError, r"x .*\(T, H, D\).*\(3, 16\)"),
    "x of odd width": ({"x": X[..., :15]}, ValueError, r"even D, got \(3, 3, 15\)"),
    "x sparse": ({"x": X.cpu().to_sparse()}, TypeError, "x .*sparse_coo"),
    "x of another width": ({"x": X[..., :14]}, ValueError, r"table .*\(context, 14\).*\(9, 16\)"),
    "table a list": ({"table": [[1.0]]}, TypeError, "table .*list"),
    "table in float64": ({"table": TABLE.double()}, TypeError, "table .*float32.*float64"),
    "table in bfloat16": ({"table": TABLE.bfloat16()}, TypeError, "table .*float32.*bfloat16"),
    "table elsewhere": ({"table": TABLE.to("meta")}, ValueError, "table .*meta"),
    "table of one dimension": ({"table": TABLE[0]}, ValueError, r"table .*\(context, 16\).*\(16,\)"),
    "table of no position": ({"table": TABLE[:0]}, ValueError, r"table .*\(0, 16\)"),
    "positions a list": ({"positions": [0, 1, 2]}, TypeError, "positions .*list"),
    "positions of int32": ({"positions": POSITIONS.int()}, TypeError, "positions .*int64.*int32"),
    "positions too few": ({"positions": POSITIONS[:2]}, ValueError, r"positions .*\(3,\).*\(2,\)"),
    "positions in a column": ({"positions": POSITIONS[:, None]}, ValueError, r"positions .*\(3, 1\)"),
    "positions elsewhere": ({"positions": POSITIONS.to("meta")}, ValueError, "positions .*meta"),
    "everything elsewhere": ({n: t.to("meta") for n, t in GOOD.items()}, ValueError, "x .*CPU or a CUDA GPU.*meta")}


@pytest.mark.parametrize("how", ["python", *(pytest.param(n, marks=needs_triton) for n in ("triton", "schedule"))])
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(how, case):
    """Also where a plan is kept for good input of the same form."""
    def call(**given_):
        arguments = tuple(given_.values())
        return OP.run_schedule(Schedule(1, 1), *arguments) if how == "schedule" else OP.implementation(how)(*arguments)

    changes, error, message = BAD[case]
    assert call(**GOOD).shape == X.shape
    with pytest.raises(error, match=message):
        call(**{**GOOD, **changes})


@both
@pytest.mark.skipif(runtime.HAS_GPU, reason="a GPU's host does not look")
@pytest.mark.parametrize(("place", "shown"), [(9, "[0-9]+..9"), (-1, "-1..[0-9]"), (2**40, "[0-9]..1099511627776")])
def test_a_position_outside_the_table_is_an_error_on_a_cpu(name, place, shown):
    positions = POSITIONS.clone()
    call = OP.implementation(name)
    call(X, TABLE, positions)
    positions[1] = place
    with pytest.raises(ValueError, match=rf"positions must lie in 0\.\.8, the table's rows, got {shown}"):
        call(X, TABLE, positions)


@pytest.mark.skipif(runtime.where() != "INTERPRETER", reason="the interpreter does not run here")
def test_a_position_outside_the_table_gives_nan_in_the_kernel_and_reads_nothing():
    """As it does on a GPU, whose host does not look."""
    step = OP.call.launches(Schedule(2, 4), *GOOD.values())[0]
    y = torch.zeros(3, 3, 16)
    step.interpret({"x_ptr": X, "table_ptr": TABLE, "positions_ptr": torch.tensor([9, 1, -2**40]), "y_ptr": y})
    assert y[[0, 2]].isnan().all() and same_bits(y[1:2], OP.python(X[1:2], TABLE, torch.tensor([1])))


@needs_triton
def test_a_gradient_is_refused_rather_than_dropped():
    for i in (0, 1):
        given_ = exchanged((X, TABLE, POSITIONS), i, (X, TABLE)[i].clone().requires_grad_())
        with pytest.raises(RuntimeError, match=r"rotary\.triton has no backward yet.*no_grad"):
            OP.triton(*given_)
        with torch.no_grad():
            assert same_bits(OP.triton(*given_), OP.python(*given_))


@needs_triton
def test_tensors_without_memory_are_refused_by_name():
    from torch._subclasses import FakeTensorMode

    OP.triton(X, TABLE, POSITIONS)
    for i, name in enumerate(GOOD):
        given_ = exchanged((X, TABLE, POSITIONS), i, FakeTensorMode().from_tensor((X, TABLE, POSITIONS)[i]))
        with pytest.raises(TypeError, match=f"{name} is a FakeTensor"):
            OP.triton(*given_)
    with pytest.raises(RuntimeError, match="rotary.triton cannot run under a transform"):
        torch.func.vmap(lambda x: OP.triton(x, TABLE, POSITIONS))(X[None])


# torch.compile


@needs_triton
def test_the_custom_op_keeps_torchs_contract(monkeypatch):
    monkeypatch.undo()  # opcheck looks at torch.empty itself
    for given_ in (inputs(3), inputs(3, dtype=torch.float16), inputs(0)):
        torch.library.opcheck(torch.ops.same_bits.rotary.default, given_)
        assert same_bits(torch.ops.same_bits.rotary(*given_)[0], OP.python(*given_))


@both
def test_torch_compile_keeps_the_bits(name, monkeypatch):
    monkeypatch.undo()
    torch._dynamo.reset()
    call = OP.implementation(name)

    def twice(x, table, positions):
        return call(call(x * 2, table, positions), table, positions.flip(0))

    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    given_ = inputs(4, dtype=torch.bfloat16)
    assert same_bits(compiled(*given_), twice(*given_))


# the code that a compiler makes of it

CASES = (("H=40,D=128,context=4096", "bfloat16"), ("H=5,D=80,context=100", "float32"))
MADE = [job for shape, dtype in CASES for job in jobs("rotary", shape, dtype, TARGETS if "H=40" in shape else (90,))]
PAIRS = {"H=40,D=128,context=4096": 64, "H=5,D=80,context=100": 64}  # columns of a head that a program holds
@pytest.fixture(scope="module")
def codes():
    return compile_ahead(MADE)


@needs_compiler
def test_kernels_wait_for_the_one_before_them(codes):
    assert [c.job for c in codes if not waits_first(c)] == []


@needs_compiler
def test_every_product_is_rounded_before_the_sum(codes):
    for code in codes:
        schedule = {str(s): s for s in OP.schedules(code.job.shape, DTYPES[code.job.dtype])}[code.job.schedule]
        rounds_every_product(code, schedule.heads * PAIRS[code.job.shape] // (32 * schedule.warps))
    assert {c.job.target for c in codes} == set(TARGETS)


# on a GPU

GPU_SHAPES = ("H=1,D=2,context=3", "H=5,D=80,context=1000", "H=40,D=128,context=4096", "H=16,D=64,context=131072")


@pytest.mark.gpu
@every_dtype
@pytest.mark.parametrize("shape", GPU_SHAPES)
def test_every_schedule_is_python_on_a_gpu(shape, dtype):
    for kind in (None, *ADVERSARIAL):
        given_ = inputs(37, shape, dtype, kind=kind)
        wanted = OP.python(*given_)
        assert same_bits(wanted.cpu(), OP.python(*(t.cpu() for t in given_))), kind
        for schedule in OP.schedules(shape, dtype):
            assert same_bits(OP.run_schedule(schedule, *given_), wanted), (str(schedule), kind)
        assert same_bits(OP.triton(*given_), wanted)


@pytest.mark.gpu
@every_dtype
def test_a_row_ignores_its_batch_on_a_gpu(dtype):
    given_ = inputs(4096, "H=40,D=128,context=4096", dtype)
    report = check_invariance(OP.triton, given_, OP.per_token)
    assert report, str(report)


@pytest.mark.gpu
def test_strides_and_misaligned_pointers_on_a_gpu():
    x, table, positions = inputs(9, "H=5,D=64,context=100", torch.bfloat16)
    wanted = OP.python(x, table, positions)
    for by in (0, 1, 3, 8, 0):
        moved = tuple(torch.zeros(t.numel() + by, dtype=t.dtype, device=HERE)[by:].view(t.shape).copy_(t)
                      for t in (x, table, positions))
        assert same_bits(OP.triton(*moved), wanted), by
    for how, view in views(x).items():
        assert same_bits(OP.triton(view, table, positions), OP.python(view, table, positions)), how


@pytest.mark.gpu
def test_a_position_outside_the_table_gives_nan_on_a_gpu_and_leaves_others_alone():
    x, table, positions = inputs(9)
    wanted = OP.python(x, table, positions)
    positions[[1, 4, 7]] = torch.tensor([9, -1, 2**40], device=HERE)
    for call in (OP.triton, OP.python):
        found = call(x, table, positions)
        assert found[[1, 4, 7]].isnan().all()
        assert same_bits(found[[0, 2, 3, 5, 6, 8]], wanted[[0, 2, 3, 5, 6, 8]])


@pytest.mark.gpu
def test_a_graph_replays_the_same_bits_on_a_gpu():
    static = inputs(16, "H=40,D=128,context=4096", torch.bfloat16)
    OP.triton(*static)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = OP.triton(*static)
    for seed in (0, 10):
        fresh = inputs(16, "H=40,D=128,context=4096", torch.bfloat16, seed)
        for place, new in zip(static, fresh, strict=True):
            place.copy_(new)
        graph.replay()
        assert same_bits(result, OP.python(*fresh))


@pytest.mark.gpu
def test_another_gpu_than_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    given_ = inputs(3, device="cuda:1")
    assert same_bits(OP.triton(*given_), OP.python(*given_)) and torch.cuda.current_device() == 0
