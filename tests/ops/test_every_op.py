"""What every op promises: one test a promise. What differs from op to op is in about.py."""
import subprocess
import sys
from dataclasses import replace
from functools import cache, partial

import pytest
import torch
from about import ABOUT, ARRAY, asked, cases, rows
from common import (
    INF,
    NAN,
    ROW_OPS,
    both,
    every_dtype,
    every_op,
    exchanged,
    made,
    needs_triton,
    results,
    tensors,
    views,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import OPS, runtime
from kernels.bits import check_invariance, elements_differ, same_bits
from kernels.lab.records import ROOT
from kernels.op import DTYPES

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # rows that overflow on purpose


def test_every_op_is_in_the_table():
    assert ABOUT.keys() == ROW_OPS.keys()
    assert all(about.points.keys() <= asked | {"streams"} for about in ABOUT.values())


def called(op, name):
    """An implementation, or one schedule."""
    return partial(op.run_schedule, ABOUT[op.name].schedule) if name == "schedule" else op.implementation(name)


def last_size(point):
    """The width of a row of x, for a seed."""
    return int(point.split()[1].removesuffix(",bias").removesuffix(",residual").rpartition("=")[2])


def picked(result, which):
    return tuple(r[which] for r in results(result))


# the specification against a pencil


@every_op
def test_the_specification_is_the_pencil(op):
    about = ABOUT[op.name]

    @settings(deadline=None, max_examples=about.examples[0])
    @given(about.arguments(op, st.just(2), about.widest[0], "cpu"))
    def check(given_):
        assert same_bits(op.python(*given_), about.pencil(op, *given_))
    check()


@cases("pencil")
def test_the_specification_is_the_pencil_for_adversarial_rows(op, point):
    for kind in (None, *ABOUT[op.name].kinds):
        given_ = made(op, point, device="cpu", kind=kind)
        assert same_bits(op.python(*given_), ABOUT[op.name].pencil(op, *given_)), kind


@cases("threads")
def test_the_specification_ignores_the_thread_count(op, point):
    given_, before, found = made(op, point, device="cpu"), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(op.python(*given_))
    finally:
        torch.set_num_threads(before)
    assert same_bits(found[0], found[1]) and same_bits(found[0], found[2])


# schedules against the specification


@needs_triton
@every_op
def test_triton_is_python(op):
    about = ABOUT[op.name]

    @settings(deadline=None, max_examples=about.examples[1])
    @given(about.arguments(op, st.integers(1, 3 if about.slow else 5), about.widest[1]))
    def check(given_):
        assert same_bits(op.triton(*given_), op.python(*given_))
    check()


@needs_triton
@cases("widths")
def test_triton_is_python_at_every_width(op, point):
    given_ = made(op, point, last_size(point))
    assert same_bits(op.triton(*given_), op.python(*given_))


@needs_triton
@cases("schedules")
def test_every_schedule_is_python(op, point):
    """In the interpreter, those that differ in more than warps, which it does not have."""
    _, shape, dtype = point.split()
    given_, found = made(op, point), op.schedules(shape, DTYPES[dtype])
    wanted = op.python(*given_)
    for schedule in found if runtime.HAS_GPU else dict.fromkeys(replace(s, warps=4) for s in found):
        assert same_bits(op.run_schedule(schedule, *given_), wanted), schedule


@needs_triton
@cases("hostile")
def test_triton_is_python_for_adversarial_rows(op, point):
    """All kinds in one batch, one under the other."""
    about = ABOUT[op.name]
    batches = [made(op, point, kind=kind) for kind in about.kinds]
    given_ = tuple(torch.cat(parts) if i in op.per_token and parts[0] is not None else parts[0]
                   for i, parts in enumerate(zip(*batches, strict=True)))
    call = partial(op.run_schedule, about.hostile_schedule) if about.hostile_schedule else op.triton
    result, wanted, count = call(*given_), op.python(*given_), len(batches[0][0])
    assert [kind for i, kind in enumerate(about.kinds) if not same_bits(*(
        picked(r, slice(i * count, (i + 1) * count)) for r in (result, wanted)))] == []


@every_dtype
@every_op
def test_schedules_of_choice_are_all_tested(op, dtype):
    shapes, tokens = ABOUT[op.name].choices
    for shape in shapes:
        chosen = {op.schedule(count, shape, dtype) for count in tokens}
        assert chosen <= {str(s) for s in op.schedules(shape, dtype)}, shape


# nothing against the batch


@cases("batches", "python", "triton")
def test_a_row_ignores_its_batch(op, name, point):
    """Alone, in batches of any size, first, last, reversed, repeated."""
    report = check_invariance(op.implementation(name), made(op, point), op.per_token)
    assert report, str(report)


@both
@every_op
def test_any_choice_of_rows_keeps_their_bits(op, name):
    about = ABOUT[op.name]
    given_ones = name == "triton" and about.slow
    calls = [partial(op.run_schedule, s) for s in about.several] if given_ones else [op.implementation(name)]

    @settings(deadline=None, max_examples=about.examples[2])
    @given(rows(op, st.integers(1, 9), about.widest[2]), st.sampled_from(calls), st.data())
    def check(given_, call, data):
        chosen = data.draw(st.lists(st.integers(0, len(given_[0]) - 1), min_size=1, max_size=12))
        report = check_invariance(call, given_, op.per_token, [torch.tensor(chosen)])
        assert report, str(report)
    check()


@cases("hostile batches", "python", "triton")
def test_adversarial_rows_ignore_their_batch(op, name, point):
    for kind in ABOUT[op.name].kinds:
        report = check_invariance(op.implementation(name), made(op, point, kind=kind), op.per_token)
        assert report, f"{kind}: {report}"


def beside_bad_rows(op, given_, *bad):
    """The arguments with every second row of the first bad, and every fourth of the others; and the clean rows."""
    given_ = tuple(a.clone() if i in op.per_token and a is not None else a for i, a in enumerate(given_))
    clean = set(range(len(given_[0])))
    for i in op.per_token:
        spoiled = range(0, len(given_[0]), 4) if i else range(1, len(given_[0]), 2)
        for n, row in enumerate(spoiled if given_[i] is not None else ()):
            given_[i][row] = bad[n % len(bad)]
            clean -= {row}
    return given_, sorted(clean)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@cases("neighbours", "python", "triton")
def test_bad_neighbours_do_not_reach_a_row(op, name, point, bad):
    call, given_ = op.implementation(name), made(op, point)
    wanted, (given_, clean) = call(*given_), beside_bad_rows(op, given_, bad)
    result = call(*given_)
    assert len(clean) >= 2 and same_bits(picked(result, clean), picked(wanted, clean))
    assert ABOUT[op.name].spoiled(results(result)[0][1::2]).all()


@needs_triton
@cases("neighbours")
def test_bad_neighbours_do_not_reach_a_row_of_the_same_program(op, point):
    given_, about = made(op, point), ABOUT[op.name]
    wanted, (given_, clean) = op.python(*given_), beside_bad_rows(op, given_, NAN, INF, -INF)
    for schedule in (*about.several, *about.kernels) if "inner" not in point else (about.schedule,):
        result = op.run_schedule(schedule, *given_)
        assert same_bits(picked(result, clean), picked(wanted, clean)), schedule
        assert about.spoiled(results(result)[0][1::2]).all(), schedule


# strides


@cases("strides", "python", "triton", "schedule")
def test_strides_do_not_matter(op, name, point):
    """Of each tensor alone, and of all at once."""
    call, given_ = called(op, name), made(op, point)
    wanted = op.python(*given_)
    for i, tensor in enumerate(given_):
        for how, view in views(tensor).items() if isinstance(tensor, torch.Tensor) else ():
            assert same_bits(view, tensor) and view.is_neg() == ("negated" in how)
            assert tensor.dim() == 1 or tensor.shape[1] == 1 or not view.is_contiguous() or view.is_neg()
            result = call(*exchanged(given_, i, view))
            assert same_bits(result, wanted), how
            assert name == "python" or all(r.is_contiguous() for r in results(result)), how
    for of_x in ("transposed", "every second row"):
        mixed = (views(a)["misaligned" if i else of_x] if isinstance(a, torch.Tensor) else a
                 for i, a in enumerate(given_))
        assert same_bits(call(*mixed), wanted), of_x


@cases("plain", "python", "triton")
def test_inputs_are_left_alone_and_outputs_are_new(op, name, point):
    given_ = made(op, point)
    before = [t.clone() for t in tensors(given_)]
    result, again = (op.implementation(name)(*given_) for _ in range(2))
    assert same_bits(result, again) and same_bits(tuple(tensors(given_)), tuple(before))
    places = [t.data_ptr() for t in (*tensors(given_), *results(result), *results(again))]
    assert len(set(places)) == len(places)


# accuracy


@cases("accuracy", "cuda", "python", "triton", "split", "tiled")
def test_accuracy_against_float64(op, name, point):
    given_ = made(op, point, last_size(point))
    result = op.implementation(name)(*given_)
    assert all(r.dtype == given_[0].dtype for r in results(result))
    for error, allowed in ABOUT[op.name].errors(op, name, result, *given_):
        assert (error <= allowed).all(), (error / allowed).max().item()


@every_op
def test_the_tolerance_is_tight_enough_to_notice_a_rounding(op):
    """Inverse test."""
    point, rounded_twice = ABOUT[op.name].rounded_twice
    given_ = [a for a in made(op, point) if a is not None]
    (error, allowed), = ABOUT[op.name].errors(op, "python", rounded_twice(op, *given_), *given_)
    assert (error > allowed).any()


# bad input and gradients


def refused(op):
    """case -> (changes, error, message): tensors that no op takes, and what else this one does not."""
    good = ABOUT[op.name].good[0]
    x, *others = [name for name, a in good.items() if isinstance(a, torch.Tensor)]
    found = {f"no {x}": ({x: None}, TypeError, rf"{x} .*NoneType"),
             f"{x} a list": ({x: [[1.0] * 4]}, TypeError, rf"{x} .*list"),
             f"{x} an array": ({x: ARRAY}, TypeError, rf"{x} .*ndarray"),
             f"{x} sparse": ({x: good[x].cpu().to_sparse()}, TypeError, rf"{x} .*sparse_coo")}
    found |= {f"{x} of {dtype}": ({x: good[x].to(dtype)}, TypeError, rf"{x} .*float32.*{dtype}")
              for dtype in (torch.int32, torch.bool, torch.float64, torch.complex64)}
    found["all elsewhere"] = ({n: good[n].to("meta") for n in (x, *others)}, ValueError, rf"{x} .*meta")
    for n in others:
        found |= {f"{n} of integers": ({n: good[n].long()}, TypeError, rf"{n}.*int64"),
                  f"{n} of another dtype": ({n: good[n].bfloat16()}, TypeError, rf"{n}.*float32.*bfloat16"),
                  f"{n} in float16": ({n: good[n].half()}, TypeError, rf"{n}.*float16"),
                  f"{n} elsewhere": ({n: good[n].to("meta")}, ValueError, rf"{n}.*meta"),
                  f"{n} a number": ({n: 1.0}, TypeError, rf"{n}.*float")}
    if "weight" in others:
        found["no weight"] = ({"weight": None}, TypeError, r"weight.*NoneType")
    return found | ABOUT[op.name].bad


every_refusal = pytest.mark.parametrize(("op", "case"), [
    pytest.param(op, case, id=f"{op.name}-{case}") for op in ROW_OPS.values() for case in refused(op)])


@cache
def good_results(op, name):
    """What good arguments give; and now plans are kept for what is like the bad ones."""
    call = called(OPS[op], name)
    return call, [results(call(**good)) for good in ABOUT[op].good]


def is_refused(op, name, case):
    changes, error, message = refused(op)[case]
    with pytest.raises(error, match=message):
        good_results(op.name, name)[0](**{**ABOUT[op.name].good[0], **changes})


@both
@every_refusal
def test_bad_input_is_named(op, name, case):
    is_refused(op, name, case)


@needs_triton
@every_refusal
def test_bad_input_to_one_schedule_is_named(op, case):
    is_refused(op, "schedule", case)


@both
@every_op
def test_good_input_passes_where_bad_input_is_refused(op, name):
    """The cases above differ from this one by what they name, and by nothing else."""
    for good, found in zip(ABOUT[op.name].good, good_results(op.name, name)[1], strict=True):
        wanted = results(op.cuda(**{n: a for n, a in good.items() if n != "order"}))
        assert [r.shape for r in found] == [w.shape for w in wanted]


@needs_triton
@every_op
def test_gradients_are_refused_rather_than_dropped(op):
    given_ = made(op, ABOUT[op.name].points["plain"][-1])
    for i, a in enumerate(given_):
        if isinstance(a, torch.Tensor):
            arguments = exchanged(given_, i, a.clone().requires_grad_())
            if ABOUT[op.name].backward:
                assert op.triton(*arguments).requires_grad
            else:
                with pytest.raises(RuntimeError, match=rf"{op.name}\.triton.*no_grad"):
                    op.triton(*arguments)
            with torch.no_grad():
                assert same_bits(op.triton(*arguments), op.python(*arguments))


# under torch.compile


@needs_triton
@every_op
def test_the_custom_ops_keep_torchs_contract(op, monkeypatch):
    monkeypatch.undo()  # opcheck looks at torch.empty itself
    custom = getattr(torch.ops.same_bits, op.name)
    for arguments in ABOUT[op.name].custom():
        torch.library.opcheck(custom.default, arguments)
        assert same_bits(tuple(custom(*arguments)), op.python(*arguments))


def norms(run, x, weight, residual):
    """A reshape before, another norm after."""
    y, stream = run("rms_norm", x[:, None].reshape(-1, weight.shape[0]), weight, residual, 1e-5)
    return run("rms_norm", y, weight), stream


def softmaxes(run, x, dim):
    return run("log_softmax", run("softmax", x[:, None].reshape(-1, x.shape[-1])), 0)


def sums(run, x, dim):
    """A centred row, a view before, other reductions after."""
    centred = x - run("mean", x, -1, keepdim=True)
    return run("sum", centred.view(-1, 4, x.shape[-1] // 4), (1, 2)), run("mean", x), run("sum", centred, dim=0)


def two_products(run, x, weight, bias):
    return run("matmul", run("matmul", x, weight, bias), weight.t())


def gates(run, gate_up):
    """A result doubled before it is gated again."""
    return run("swiglu", run("swiglu", gate_up).repeat(1, 2))


def through(name):
    return lambda op, *arguments, **named: OPS[op].implementation(name)(*arguments, **named)


BLOCKS = {"rms_norm": (norms, ("6 D=200,residual", "3 D=200,residual"), ("64 D=4096,residual", "500 D=4096,residual")),
          "softmax": (softmaxes, ("4 D=30", "2 D=30"), ("8 D=1000", "600 D=1000")),
          "sum": (sums, ("6 D=200", "3 D=200"), ("64 D=4096", "500 D=4096")),
          "swiglu": (gates, ("6 F=30", "3 F=30"), ("64 F=4096", "500 F=4096")),
          "matmul": (two_products, ("6 N=10,K=24,bias", "3 N=10,K=24,bias"), ())}


def keeps_the_bits(name, points, dtype, monkeypatch, **options):
    monkeypatch.undo()
    torch._dynamo.reset()
    block = BLOCKS[name][0]
    compiled = torch.compile(partial(block, through("triton")), fullgraph=True, **options)
    for point in points:
        given_ = made(OPS[name], f"{point} {dtype}")
        assert same_bits(compiled(*given_), block(through("python"), *given_)), point


@needs_triton
@pytest.mark.parametrize(("block", "dtype", "dynamic"), [
    (block, dtype, dynamic) for block in BLOCKS for dtype in ("bfloat16", "float32") for dynamic in (False, True)
    if block != "softmax" or (dtype, dynamic) == ("bfloat16", True)])  # whose 34 programs take the interpreter long
def test_torch_compile_keeps_the_bits(block, dtype, dynamic, monkeypatch):
    keeps_the_bits(block, BLOCKS[block][1], dtype, monkeypatch, backend="aot_eager", dynamic=dynamic)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("block", [block for block in BLOCKS if BLOCKS[block][2]])
def test_inductor_keeps_the_bits_on_a_gpu(block, dtype, monkeypatch):
    keeps_the_bits(block, BLOCKS[block][2], dtype, monkeypatch)


# on a GPU


@pytest.mark.gpu
@cases("gpu schedules")
def test_every_schedule_is_python_on_a_gpu(op, point):
    """Portable inputs, every adversarial kind, and zeros; always 37 rows, so that one compilation serves them all."""
    found = {kind: made(op, point, 1, kind=kind) for kind in (None, *ABOUT[op.name].kinds)}
    found["zeros"] = tuple(torch.full_like(a, -0.0) if i in op.per_token and a is not None else a
                           for i, a in enumerate(found[None]))
    wanted = {kind: op.python(*given_) for kind, given_ in found.items()}
    for schedule in op.schedules(point.split()[1], found[None][0].dtype):
        for kind, given_ in found.items():
            assert same_bits(op.run_schedule(schedule, *given_), wanted[kind]), (str(schedule), kind)


@pytest.mark.gpu
@cases("gpu batches")
def test_triton_is_python_for_every_batch_on_a_gpu(op, point):
    """Each batch size with its own schedule, from the front and from the end."""
    given_ = made(op, point, 1)
    wanted, most = op.python(*given_), len(given_[0])
    for count in (1, 2, 3, 5, 8, 16, 17, 31, 32, 33, 64, 65, 100, 127, 128, 131, 132, 133, 192, 193, 264, 511, 512, 528,
                  700, 1024, 1056, 2111, 2112, 3000, 4096, 4224, 8448):
        for part in (slice(0, count), slice(most - count, most)) if count <= most else ():
            assert same_bits(op.triton(*op.take(given_, part)), picked(wanted, part)), part
    report = check_invariance(op.triton, given_, op.per_token)
    assert report, str(report)


@pytest.mark.gpu
@cases("gpu specified")
def test_a_cpu_and_a_gpu_specify_the_same_bits(op, point):
    count, rest = point.split(" ", 1)
    for kind in (None, *ABOUT[op.name].kinds):
        few = f"{count if kind is None else min(int(count), 200)} {rest}"
        here, there = (op.python(*made(op, few, 3, device, kind)) for device in ("cpu", "cuda"))
        assert same_bits(here, there), f"{kind}: {elements_differ(here, there)} elements differ"


@pytest.mark.gpu
@pytest.mark.parametrize(("op", "case"), [(op, i) for op in ROW_OPS.values() for i in range(len(ABOUT[op.name].far))],
                         ids=lambda value: getattr(value, "name", value))
def test_strides_beyond_32_bits_on_a_gpu(op, case):
    point, schedules = ABOUT[op.name].far[case]
    (x, *rest), stride = made(op, point), 2**31 + 8
    if torch.cuda.mem_get_info()[0] < 3 * stride * 2:
        pytest.skip("needs 13 GB of free GPU memory")
    apart = torch.empty(stride + x.shape[1], dtype=x.dtype, device=x.device).as_strided(x.shape, (stride, 1))
    apart.copy_(x)
    wanted = op.python(x, *rest)
    assert same_bits(op.triton(apart, *rest), wanted)
    for schedule in schedules:
        assert same_bits(op.run_schedule(schedule, apart, *rest), wanted), schedule


@pytest.mark.gpu
@cases("graphs")
def test_a_graph_replays_the_same_bits_on_a_gpu(op, point):
    """Captured once, replayed on other numbers in the same place."""
    static = made(op, point)
    assert same_bits(op.triton(*static), op.python(*static))  # loads the modules before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = op.triton(*static)
    for seed in (0, 10, 20):
        fresh = made(op, point, seed)
        for place, fresh_numbers in zip(tensors(static), tensors(fresh), strict=True):
            place.copy_(fresh_numbers)
        for result in results(captured):
            result.fill_(NAN)
        graph.replay()
        assert same_bits(captured, op.python(*fresh))


IN_A_COLD_PROCESS = """
import torch
from kernels import OPS
from kernels.bits import as_tuple, same_bits

op = OPS[{op!r}]
arguments = op.inputs({rows}, {shape!r}, torch.{dtype}, "cuda")
eager = op.triton(*arguments)
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    captured = op.triton(*arguments)
for tensor in as_tuple(captured):
    tensor.zero_()
graph.replay()
torch.cuda.synchronize()
assert same_bits(captured, eager) and same_bits(captured, op.python(*arguments))
print("the same bits")
"""


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in ROW_OPS if "graphs" in ABOUT[name].points])
def test_the_second_call_of_a_process_can_be_captured(name):
    count, shape, dtype = ABOUT[name].points["graphs"][0].split()
    code = IN_A_COLD_PROCESS.format(op=name, rows=count, shape=shape, dtype=dtype)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "the same bits", done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in ROW_OPS if "streams" in ABOUT[name].points])
def test_several_streams_at_once_on_a_gpu(name):
    """A workspace belongs to one call and one stream."""
    op = OPS[name]
    work = [made(op, point, int(point.split()[0])) for point in ABOUT[name].points["streams"]]
    wanted = [op.python(*given_) for given_ in work]
    streams, found = [torch.cuda.Stream() for _ in work], []
    torch.cuda.synchronize()
    for _ in range(30):
        for i, (stream, given_) in enumerate(zip(streams, work, strict=True)):
            with torch.cuda.stream(stream):
                found.append((i, op.triton(*given_)))
    torch.cuda.synchronize()
    assert len(found) == 120 and all(same_bits(result, wanted[i]) for i, result in found)


def norms_in_turn(run, x, weight, residual, put=lambda place, tensor: tensor):
    y, stream = x.clone(), residual.clone()
    for _ in range(40):
        new_y, new_stream = run("rms_norm", y, weight, stream)
        y, stream = put(y, new_y), put(stream, new_stream)
    return y, stream


def softmaxes_in_turn(run, x, dim):
    for _ in range(6):
        x = run("log_softmax", run("softmax", x))
    return x


def sums_in_turn(run, x, dim):
    return run("mean", run("mean", run("sum", x, 1), 1), 0)


def gates_in_turn(run, gate_up):
    for _ in range(20):
        gate_up = run("swiglu", gate_up).repeat(1, 2)
    return gate_up


FEEDS = [
    *(("rms_norm", feed, point) for feed in (norms_in_turn, partial(norms_in_turn, put=lambda place, t: place.copy_(t)))
      for point in ("1 D=4096,residual bfloat16", "33 D=8192,residual bfloat16", "2048 D=4096,residual bfloat16",
                    "300 D=20000,residual bfloat16", "5000 D=96,residual bfloat16")),
    *(("softmax", softmaxes_in_turn, point) for point in ("300 D=1000 float32", "4 D=40000 float32",
                                                          "300 D=40000 float32")),
    *(("swiglu", gates_in_turn, point) for point in ("1 F=14336 bfloat16", "300 F=1000 float32",
                                                     "4096 F=512 bfloat16")),
    *(("sum", sums_in_turn, f"{n} D={d},inner={inner} float32") for n, d, inner in (
        (64, 70, 90), (4, 2000, 64), (2, 70000, 2), (1, 3, 100000)))]


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "feed", "point"), FEEDS)
def test_calls_that_feed_each_other_wait_for_each_other_on_a_gpu(name, feed, point):
    """A kernel may start before the one ahead has ended: it must not read what is not yet written, and nothing may be
    overwritten while it is still read."""
    op, given_ = OPS[name], made(OPS[name], point)
    wanted = feed(through("python"), *given_)
    for _ in range(80):
        assert same_bits(feed(through("triton"), *given_), wanted)
    places, found = [t.clone() for t in tensors(given_)], []
    rest = given_[len(places):]
    for seed in range(40):
        for place, tensor in zip(places, tensors(given_), strict=True):
            place.copy_(tensor).mul_(2.0**-seed)
        found.append(op.triton(*places, *rest))
    assert all(same_bits(result, op.python(*(t * 2.0**-seed for t in tensors(given_)), *rest))
               for seed, result in enumerate(found))


@pytest.mark.gpu
@cases("elsewhere")
def test_another_gpu_than_the_current_one(op, point):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    result = results(op.triton(*made(op, point, device="cuda:1")))
    assert result[0].device == torch.device("cuda:1") and torch.cuda.current_device() == 0
    assert same_bits(result, op.python(*made(op, point, device="cpu")))


@pytest.mark.gpu
@cases("elsewhere")
def test_a_tensor_on_the_cpu_beside_a_gpu_is_refused(op, point):
    with pytest.raises((ValueError, runtime.Unavailable), match="(?i)cpu"):
        op.triton(*made(op, point, device="cpu"))
