"""How every op is called: plans kept under all that decides them, launches as data, and launches on a GPU that is
played: its compiled kernels run in Triton's interpreter, on the addresses that they are given."""
import ctypes
import inspect
import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kernels import OPS, launch, runtime
from kernels.bits import portable, same_bits
from kernels.launch import Step, Tiles
from kernels.op import DTYPES
from kernels.ops.matmul import choice
from kernels.ops.matmul import plan as matmul_plan
from kernels.ops.matmul import schedule as products
from kernels.ops.rotary import into, rotary_into

needs_triton = pytest.mark.skipif(bool(runtime.WHY_NOT), reason=runtime.WHY_NOT or "Triton runs here")
needs_interpreter = pytest.mark.skipif(runtime.where() != "INTERPRETER", reason="the GPU is played by the interpreter")
# attention's calls take Sequences, and rotary's places in a table: they are tested in tests/ops
ROW_OPS = {name: op for name, op in OPS.items() if not name.startswith(("attention", "rotary"))}
every_op = pytest.mark.parametrize("op", ROW_OPS.values(), ids=ROW_OPS)
SUM, MEAN, SOFTMAX, NORM, MATMUL, SWIGLU, ROTARY = (OPS[name] for name in (
    "sum", "mean", "softmax", "rms_norm", "matmul", "swiglu", "rotary"))
SHAPES = {"rms_norm": "D=40,residual", "matmul": "N=5,K=18,bias", "swiglu": "F=40"}
FIRST = {"swiglu": "gate_up"}  # what the first argument is called where it is not x


def arguments_of(op, tokens=3, dtype=torch.float32, seed=0):
    return op.inputs(tokens, SHAPES.get(op.name, "D=40"), dtype, runtime.device(), seed)


@pytest.fixture(autouse=True)
def no_plan_is_kept():
    for op in OPS.values():
        op.call.plans.clear()
    yield
    for op in OPS.values():
        op.call.plans.clear()


# a launch as data


@pytest.mark.skipif(not runtime.HAS_TRITON, reason="a stand-in does not say its arguments' names")
@pytest.mark.parametrize(("pointers", "scalars", "constants"), [
    ({"y_ptr": None, "x_ptr": None}, {"n": 1}, {"BLOCK": 2}), ({"x_ptr": None}, {"n": 1}, {"BLOCK": 2}),
    ({"x_ptr": None, "y_ptr": None}, {"BLOCK": 2}, {"n": 1}),
    ({"x_ptr": None, "y_ptr": None}, {"n": 1}, {"BLOCK": 2, "PDL": False})])
def test_a_step_refuses_arguments_that_are_not_its_kernels_in_order(pointers, scalars, constants):
    kernel = SimpleNamespace(arg_names=["x_ptr", "y_ptr", "n", "BLOCK", "PDL"])
    assert Step(kernel, 1, {"x_ptr": None, "y_ptr": None}, {"n": 1}, {"BLOCK": 2}, {}).arguments(True) == (1, 2, True)
    with pytest.raises(TypeError, match="takes x_ptr, y_ptr, n, BLOCK, PDL, got .*PDL"):
        Step(kernel, 1, pointers, scalars, constants, {})


@needs_triton
def test_examples_stand_for_tiles_numbers_and_nothing():
    def laid_out(descriptor):
        return "laid out", descriptor

    tiles = Tiles(torch.bfloat16, (300, 64), (72, 1), (16, 32))
    step = Step("kernel", 4, {"a": tiles, "b": replace(tiles, layout=laid_out), "c": torch.bfloat16, "d": None,
                              "e": torch.int32}, {}, {}, {"num_warps": 2})
    a, (how, b), c, d, e = step.examples("cpu")
    assert (how, d, c.dtype, e.dtype) == ("laid out", None, torch.bfloat16, torch.int32)
    for descriptor in (a, b):
        assert (descriptor.shape, descriptor.strides, descriptor.block_shape) == ([300, 64], [72, 1], [16, 32])
        assert descriptor.base.dtype == torch.bfloat16
    assert [t.data_ptr() % 16 for t in (c, e)] == [0, 0]
    *_, c, d, e = step.examples("cpu", (True, True, False, True, True))
    assert (c.data_ptr() % 16, d, e.data_ptr() % 16) == (2, None, 0)
    assert step.compile_options(True) == {"enable_fp_fusion": False, "launch_pdl": True, "num_warps": 2}


@pytest.mark.skipif(not runtime.HAS_TRITON, reason="schedules of kind hopper are written in Gluon")
@every_op
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_schedule_names_its_kernels_arguments(op, dtype):
    """Without memory: tensors of the device meta say all that a launch takes from them."""
    shapes = (*op.shapes, "D=1000", "D=40000", *["D=300,inner=50"] * (op in (SUM, MEAN)))
    shapes = ("N=640,K=1200,bias", "N=40,K=1536", "N=4096,K=4096") if op is MATMUL else shapes
    shapes = (*op.shapes, "F=1000", "F=3") if op is SWIGLU else shapes
    kinds = set()
    for shape in shapes:
        arguments = op.inputs(300, shape, dtype, "meta")
        schedules = choice.tested(*arguments[1].shape, dtype) if op is MATMUL else op.schedules(shape, dtype)
        for schedule in schedules:
            try:
                steps = op.call.launches(schedule, *arguments)
            except products.Unsuitable:
                assert op is MATMUL and schedule.kind != "pointer", schedule
                continue
            kinds.add(getattr(schedule, "kind", None))
            assert 1 <= len(steps) <= 2 and all(step.programs >= 1 for step in steps), schedule
            for step in steps:
                assert (*step.pointers, *step.scalars, *step.constants, "PDL") == tuple(step.kernel.arg_names)
                assert all(isinstance(value, (int, float)) for value in step.scalars.values()), schedule
            assert "y_ptr" in steps[-1].pointers or "y" in steps[-1].pointers, schedule
    every = {"matmul": {"pointer", "hopper"} if dtype.itemsize == 2 else {"pointer"},
             **dict.fromkeys(("rms_norm", "swiglu"), {None}),
             **dict.fromkeys(("sum", "mean"), {"rows", "stream", "split", "inner"})}
    assert kinds == every.get(op.name, {"resident", "stream", "columns"})


# the look-up of a plan


@needs_triton
@every_op
def test_plans_are_kept_under_all_that_decides_them(op):
    def kept_after(*arguments):
        op.triton(*arguments)
        return len(op.call.plans)

    x, *rest = arguments_of(op)
    more = arguments_of(op, tokens=4)
    wide = torch.zeros(3, x.shape[1] + 8, dtype=x.dtype, device=x.device)[:, :x.shape[1]].copy_(x)
    assert [kept_after(x, *rest), kept_after(x, *rest), kept_after(*arguments_of(op, seed=1))] == [1, 1, 1]
    assert [kept_after(*more), kept_after(wide, *rest), kept_after(*arguments_of(op, dtype=torch.float16))] == [2, 3, 4]
    assert kept_after(x, *rest) == 4 and kept_after(wide, *rest) == 4
    assert same_bits(op.triton(x, *rest), op.triton(wide, *rest))


@needs_triton
def test_numbers_that_are_equal_but_not_of_one_class_have_plans_of_their_own():
    x, weight, residual = arguments_of(NORM)
    for eps in (1, 1.0, 1, 1.0):
        assert same_bits(NORM.triton(x, weight, residual, eps), NORM.python(x, weight, residual, eps))
    assert len(NORM.call.plans) == 2
    for op, good, bad in ((SOFTMAX, (1,), [(True,), (1.0,)]), (SUM, (1, True), [(True, True), (1.0, True), (1, 1)])):
        op.triton(x, *good)
        for arguments in bad:
            with pytest.raises(TypeError, match="dim|keepdim"):
                op.triton(x, *arguments)
        assert len(op.call.plans) == 1


@needs_triton
@pytest.mark.parametrize("op", [SUM, MEAN], ids=["sum", "mean"])
def test_dims_may_be_a_list_of_integers_and_of_nothing_else(op):
    x = portable(6, 20, device=runtime.device()).view(2, 3, 20)
    schedule = op.call.Schedule("split", 1, flight=4, columns=64)
    for call in (op.triton, lambda *arguments: op.run_schedule(schedule, *arguments)):
        for dims in ([1], [0, 1], [], [-1, 1]):
            assert same_bits(call(x, dims), call(x, tuple(dims))) and same_bits(call(x, dims), op.python(x, dims))
        for bad in ([True], (True,), [1.0], [0, True], [[1]], ["1"]):
            with pytest.raises(TypeError, match="dim must be None, an int or a tuple of ints, got"):
                call(x, bad)
    assert len(op.call.plans) == 8


@needs_triton
@every_op
def test_a_schedule_has_a_plan_of_its_own(op):
    arguments = arguments_of(op)
    first, second = list(op.schedules(SHAPES.get(op.name, "D=40"), torch.float32))[:2]
    wanted = op.python(*arguments)
    for count, schedule in ((1, first), (1, first), (2, second), (2, first)):
        assert same_bits(op.run_schedule(schedule, *arguments), wanted)
        assert len(op.call.plans) == count
    assert same_bits(op.triton(*arguments), wanted) and len(op.call.plans) == 3


@needs_triton
@pytest.mark.parametrize(("op", "other"), [(op, other) for op, other in itertools.permutations(ROW_OPS.values(), 2)
                                           if op.call.Schedule is not other.call.Schedule], ids=lambda op: op.name)
def test_a_schedule_of_another_op_is_refused_by_name(op, other):
    schedule = other.schedules(SHAPES.get(other.name, "D=40"), torch.float32)[0]
    for wrong, shown in ((schedule, f"Schedule {type(schedule).__name__}"), (str(schedule), "str '")):
        with pytest.raises(TypeError, match=rf"schedule must be a Schedule of {op.name}, got {shown}"):
            op.run_schedule(wrong, *arguments_of(op))
    assert not op.call.plans


@needs_triton
@every_op
def test_a_lazily_negated_argument_is_read_as_its_negative(op):
    arguments = arguments_of(op)
    schedule = op.schedules(SHAPES.get(op.name, "D=40"), torch.float32)[0]
    for i, a in enumerate(arguments):
        if isinstance(a, torch.Tensor):
            given = (*arguments[:i], torch._neg_view(a), *arguments[i + 1:])
            wanted = op.python(*arguments[:i], -a, *arguments[i + 1:])
            assert same_bits(op.triton(*given), wanted) and same_bits(op.run_schedule(schedule, *given), wanted)
    assert len(op.call.plans) == 2


@needs_triton
@every_op
def test_a_gradient_is_refused_or_made(op):
    x, *rest = arguments_of(op)
    x.requires_grad_()
    if op is MATMUL:
        assert op.triton(x, *rest).requires_grad
        return
    with pytest.raises(RuntimeError, match=rf"{op.name}\.triton has no backward yet: call it under torch\.no_grad\(\)"):
        op.triton(x, *rest)
    for calm in (torch.no_grad(), torch.inference_mode()):
        with calm:
            assert same_bits(op.triton(x, *rest), op.python(x, *rest))


@every_op
def test_what_is_written_out_can_be_read(op):
    """By inspect, in tracebacks, and with the names and defaults of the specification."""
    source, one = inspect.getsource(op.triton), inspect.getsource(op.call.run_schedule)
    x = FIRST.get(op.name, "x")
    assert source.startswith(f"def triton({x}") and "plans.get(key)" in source and "differentiate" in source
    assert one.startswith(f"def run_schedule(schedule, {x}") and "plans.get(key)" in one and "differentiate" not in one
    triton, python = (inspect.signature(call).parameters for call in (op.triton, op.python))
    assert [(p.name, p.default) for p in triton.values()] == [(p.name, p.default) for p in python.values()]
    assert op.triton.__doc__ and op.triton.__doc__ == op.call.__doc__


# a launch


class Played:
    """A compiled kernel: notes what it is given, and runs in Triton's interpreter on these addresses."""

    notes: list = []

    def __init__(self, kernel, programs, examples, arguments, **options):
        self.kernel, self.programs, self.examples, self.arguments = kernel, programs, examples, arguments
        assert options["enable_fp_fusion"] is False

    def __call__(self, stream, *pointers):
        assert stream == "the stream of GPU 0"
        for example, pointer in zip(self.examples, pointers, strict=True):
            assert example.data_ptr() % 16 or not pointer % 16, "compiled for a multiple of 16"
        self.notes.append(dict(zip(self.kernel.arg_names, pointers, strict=False)))
        tensors = [torch.frombuffer((ctypes.c_char * 8).from_address(pointer), dtype=example.dtype)
                   for example, pointer in zip(self.examples, pointers, strict=True)]
        with np.errstate(all="ignore"):
            self.kernel[(self.programs,)](*tensors, *self.arguments)


@pytest.fixture
def gpu(monkeypatch):
    """GPU 0, on which every tensor lies. -> what was launched: the kernel's pointers by name."""
    empty, zeros = torch.empty, torch.zeros(64, dtype=torch.int32)
    monkeypatch.setattr(torch, "empty", lambda *size, device=None, **kwargs: empty(*size, **kwargs))
    monkeypatch.setattr(torch.Tensor, "get_device", lambda tensor: 0)
    monkeypatch.setattr(Played, "notes", [])
    monkeypatch.setattr(launch, "Compiled", Played)
    monkeypatch.setattr(launch, "has_pdl", lambda index: False)
    for module in (launch, matmul_plan):
        monkeypatch.setattr(module, "current_device", lambda: 0)
        monkeypatch.setattr(module, "current_stream", lambda index: f"the stream of GPU {index}")
    monkeypatch.setattr(matmul_plan, "multiprocessors", lambda index: 132)
    monkeypatch.setattr(matmul_plan, "_add_otherwise", lambda index: None)
    monkeypatch.setattr(matmul_plan, "COUNTERS", SimpleNamespace(take=lambda index, stream, count: zeros.data_ptr()))
    return Played.notes


def moved(tensor, by):
    """The same numbers `by` elements after an address that is a multiple of 16."""
    flat = torch.zeros(tensor.numel() + by, dtype=tensor.dtype)
    flat[by:] = tensor.reshape(-1)
    return flat[by:].view(tensor.shape)


LAUNCHED = [(NORM, "D=5,residual"), (NORM, "D=5"), (SOFTMAX, "D=5"), (OPS["log_softmax"], "D=5"), (SUM, "D=70"),
            (MEAN, "D=3,inner=5"), (MEAN, "D=1100"), (MATMUL, "N=5,K=20,bias"), (MATMUL, "N=5,K=520")]
OF_ONE_KIND = [(SWIGLU, "F=70"), (ROTARY, "H=3,D=10,context=7")]


@needs_interpreter
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["float16", "float32"])
@pytest.mark.parametrize(("op", "shape"), LAUNCHED, ids=lambda value: getattr(value, "name", value))
def test_a_launch_hands_a_kernel_its_pointers_in_order(gpu, op, shape, dtype):
    """Every kernel and switch, where pointers are multiples of 16 and where one is not; the same plan serves both."""
    arguments = op.inputs(2, shape, dtype)
    if op is MATMUL:  # NumPy's product: whole numbers have one sum
        arguments = tuple(a if a is None else (a * 4).round() for a in arguments)
    schedules = {}
    for schedule in op.schedules(shape, dtype):
        steps = op.call.launches(schedule, *arguments)
        schedules[str([(s.kernel, [c for c in s.constants.values() if type(c) is bool]) for s in steps])] = schedule
    wanted, which = op.python(*arguments), [i for i, a in enumerate(arguments) if isinstance(a, torch.Tensor)]
    for schedule, i in zip(schedules.values(), itertools.cycle(which), strict=False):
        for given in (arguments, (*arguments[:i], moved(arguments[i], 1), *arguments[i + 1:]), arguments):
            assert same_bits(op.run_schedule(schedule, *given), wanted), (schedule, i)
    assert 2 <= len(schedules) == len(op.call.plans)


@needs_interpreter
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["float16", "float32"])
@pytest.mark.parametrize(("op", "shape"), OF_ONE_KIND, ids=lambda value: getattr(value, "name", value))
def test_a_launch_of_one_kernel_hands_it_its_pointers_in_order(gpu, op, shape, dtype):
    """As above, for ops whose schedules differ in sizes alone."""
    arguments = op.inputs(2, shape, dtype)
    wanted = op.python(*arguments)
    for i in range(len(arguments)):
        for given in (arguments, (*arguments[:i], moved(arguments[i], 1), *arguments[i + 1:]), arguments):
            assert same_bits(op.triton(*given), wanted), i
    assert len(op.call.plans) == 1 and gpu[0]["x_ptr"] == arguments[0].data_ptr() != gpu[1]["x_ptr"]


@needs_interpreter
def test_a_rotation_with_a_cache_is_checked_once_and_kept(gpu, monkeypatch):
    """But not for tensors of another form, nor where a gradient is asked for."""
    monkeypatch.setattr(into, "_LAUNCHES", type(into._LAUNCHES)())
    checked, check = [], into._check_into
    monkeypatch.setattr(into, "_check_into", lambda *given: checked.append(given) or check(*given))
    for by in (0, 1, 0):
        x, table, positions = ROTARY.inputs(3, "H=6,D=8,context=7", torch.float16)
        qkv, slots, kv = moved(x, by), torch.tensor([4, -1, 2]), torch.zeros(5, 4, 8, dtype=torch.float16)
        assert rotary_into(qkv, table, positions, slots, kv, 2) is None
        assert same_bits(qkv[:, :4], ROTARY.python(x[:, :4], table, positions)) and same_bits(qkv[:, 4:], x[:, 4:])
        assert same_bits(kv[[4, 2]], qkv[[0, 2], 2:]) and not kv[[0, 1, 3]].any()
        assert list(gpu[-1].values()) == [t.data_ptr() for t in (qkv, table, positions, slots, kv)]
    assert len(checked) == len(into._LAUNCHES) == 1
    for wrong, error in (((qkv, table, positions, slots, kv, 3), ValueError),
                         ((qkv.requires_grad_(), table, positions, slots, kv, 2), RuntimeError)):
        with pytest.raises(error):
            rotary_into(*wrong)
    assert len(checked) == 3 and len(into._LAUNCHES) == 1 and len(gpu) == 3


@needs_interpreter
@every_op
def test_each_pointer_that_is_no_multiple_of_16_is_told(gpu, op):
    """After a call whose pointers all are: what was compiled for it must not be launched."""
    arguments = arguments_of(op, dtype=torch.float16)
    if op is MATMUL:
        arguments = tuple((a * 4).round() for a in arguments)
    schedule = op.schedules(SHAPES.get(op.name, "D=40"), torch.float16)[0]
    for given in (arguments, arguments[:2]) if op in (NORM, MATMUL) else (arguments,):
        wanted = op.python(*given)
        for i, a in enumerate(given):
            if isinstance(a, torch.Tensor):
                for place in (given, (*given[:i], moved(a, 1), *given[i + 1:])):
                    assert same_bits(op.run_schedule(schedule, *place), wanted), i


@needs_interpreter
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["float16", "float32"])
@pytest.mark.parametrize("schedule", [NORM.call.Schedule(1, 4), NORM.call.Schedule(2, 4), NORM.call.Schedule(1, 4, 1),
                                      NORM.call.Schedule(1, 4, 4)], ids=str)
def test_rms_norm_reads_x_and_residual_in_place_at_strides_of_their_own(gpu, schedule, dtype):
    """Rows of two chunks; the residual's rows are further apart than those of x."""
    x, weight, residual = NORM.inputs(3, "D=1030,residual", dtype)
    wide, apart = torch.zeros(3, 1040, dtype=dtype), torch.zeros(6, 1030, dtype=dtype)
    wide[:, :1030], apart[::2] = x, residual
    given = (wide[:, :1030], weight, apart[::2])
    for residual_too in (True, False):
        arguments = given if residual_too else given[:2]
        assert same_bits(NORM.run_schedule(schedule, *arguments), NORM.python(*arguments))
        assert gpu[-1]["x_ptr"] == wide.data_ptr()
    assert gpu[0]["residual_ptr"] == apart.data_ptr()


@needs_interpreter
def test_the_pointers_of_rms_norm(gpu):
    x, weight, residual = NORM.inputs(2, "D=40,residual", torch.float16)
    y, stream = NORM.triton(x, weight, residual)
    alone = NORM.triton(x, weight)
    both = [t.data_ptr() for t in (x, residual, weight, y, stream)]
    one = [t.data_ptr() for t in (x, x, weight, alone, alone)]
    assert gpu == [dict(zip(("x_ptr", "residual_ptr", "weight_ptr", "y_ptr", "stream_ptr"), pointers, strict=True))
                   for pointers in (both, one)]


@needs_interpreter
def test_the_second_launch_reads_what_the_first_one_leaves(gpu):
    x = portable(2, 40)
    y = SOFTMAX.run_schedule(SOFTMAX.call.Schedule("columns", 1, columns=16), x)
    first, second = gpu
    assert first["x_ptr"] == second["x_ptr"] == x.data_ptr() and second["y_ptr"] == y.data_ptr()
    assert first["columns_ptr"] == second["columns_ptr"] not in (x.data_ptr(), y.data_ptr())
    gpu.clear()
    y = MEAN.run_schedule(MEAN.call.Schedule("split", 1, flight=4, columns=32), x, 1)
    first, second = gpu
    assert first["x_ptr"] == x.data_ptr() and second == {"x_ptr": first["sums_ptr"], "y_ptr": y.data_ptr()}
    gpu.clear()
    weight = portable(5, 1024, seed=1)
    reduced = products.Schedule("pointer", 16, 16, 64, split=True, reduce=True)
    y = MATMUL.run_schedule(reduced, portable(2, 1024), weight)
    first, second = gpu
    assert first["weight_ptr"] == weight.data_ptr() and second["y_ptr"] == y.data_ptr()
    assert second["partial_ptr"] == first["partial_ptr"] != y.data_ptr()


@needs_interpreter
@every_op
def test_a_plan_that_is_kept_launches_without_another_check(gpu, op, monkeypatch):
    """But a call of another form is checked and has a plan of its own."""
    checked, check = [], op.call.check
    monkeypatch.setattr(op.call, "check", lambda *arguments: checked.append(arguments) or check(*arguments))
    schedule = op.schedules(SHAPES.get(op.name, "D=40"), torch.float32)[0]
    for tokens in (2, 2, 2, 3, 2):
        op.run_schedule(schedule, *arguments_of(op, tokens))
    if op is not MATMUL:  # whose plan checks by itself
        assert [len(arguments[0]) for arguments in checked] == [2, 3]
    assert len(op.call.plans) == 2
    with pytest.raises(TypeError, match=f"{FIRST.get(op.name, 'x')} must be one of"):
        op.run_schedule(schedule, *(a.double() if isinstance(a, torch.Tensor) else a for a in arguments_of(op)))
    assert len(op.call.plans) == 2


@needs_triton
def test_one_argument_that_must_be_copied_is_enough():
    """A plan that copies none would hand a GPU the pointer of a strided weight."""
    x, weight = torch.ones(2, 48), torch.ones(96)[::2]
    plan = OPS["rms_norm"].call.plan
    assert plan((x, weight, None, 1e-6)).copies
    assert plan((x.t().contiguous().t(), weight.contiguous(), None, 1e-6)).copies
    assert not plan((x, weight.contiguous(), None, 1e-6)).copies
