"""The matrix product: what it alone has. Its order, named or not, exact sums, gradients, launches and generated code.

What every op promises is in test_every_op.py. In Triton's interpreter a 16-bit product is NumPy's, whose rounding is
not a tensor core's: such tests use sums that are exact in any order.
"""
import math
import re
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import pytest
import torch
from common import HERE, INF, NAN, both, every_dtype, needs_compiler, needs_triton, whole_inputs
from compiling import compile_ahead
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import exact_product
from reference import product as pencil

from kernels import OPS, bits, runtime
from kernels.bits import check_invariance, digest, elements_differ, portable, same_bits
from kernels.lab.proofs.generated_code import Job
from kernels.lab.sweep.widget import TokenSweep
from kernels.op import DTYPES, Shape
from kernels.ops.matmul import choice, contenders
from kernels.ops.matmul import plan as matmul_plan
from kernels.ops.matmul import schedule as schedules
from kernels.ops.matmul.counters import Counters
from kernels.ops.matmul.descriptors import leading
from kernels.ops.matmul.order import Order, order
from kernels.ops.matmul.order import chain as one_chain
from kernels.ops.matmul.product import Product
from kernels.ops.matmul.schedule import Schedule, Unsuitable
from kernels.ops.matmul.steps import kind_of, steps

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # overflows on purpose

OP = OPS["matmul"]
KINDS = ("cancellation", "wide", "subnormal", "signed_zero", "huge")
SMALL = [Schedule("pointer", 16, 16, 16, 1, 2, 1), Schedule("pointer", 16, 32, 64, 4, 3, 2, swap=True),
         Schedule("pointer", 32, 16, 32, 2, 2, 8)]


def inputs(tokens, shape, dtype=torch.bfloat16, seed=0, device=HERE):
    return OP.inputs(tokens, shape, dtype, device, seed)


# the order


@given(n=st.integers(1, 20_000), k=st.integers(0, 40_000))
def test_segments_cover_k_once(n, k):
    segments, length = order(n, k)
    assert segments == 1 and length == k or (segments - 1) * length < k <= segments * length
    assert 1 <= segments <= max(8, math.ceil(k / 8192))


@given(n=st.integers(1, 20_000), k=st.integers(1, 40_000))
def test_segments_suit_every_tile(n, k):
    """A segment is several blocks of k of any schedule, so that no compiler can take its chain for a single product."""
    segments, length = order(n, k)
    assert segments == 1 or length % 256 == 0 and length >= 512 and (n < 2048 or k > 8192)
    assert length <= 8192


def test_the_order_of_shapes_that_matter():
    """Written out, because changing one changes recorded bits."""
    wanted = {(4096, 4096): (1, 4096), (6144, 4096): (1, 4096), (28672, 4096): (1, 4096), (128256, 4096): (1, 4096),
              (4096, 14336): (2, 7168), (8192, 28672): (4, 7168), (7168, 8192): (1, 8192), (7168, 8193): (2, 4352),
              (8192, 1024): (1, 1024), (2049, 8192): (1, 8192), (2048, 8192): (1, 8192), (1280, 8192): (2, 4096),
              (1024, 4096): (2, 2048), (512, 4096): (4, 1024), (256, 4096): (8, 512), (64, 8192): (8, 1024),
              (40, 1200): (3, 512), (40, 512): (1, 512), (40, 513): (2, 512),
              (9, 1200): (3, 512)}
    assert {sizes: order(*sizes) for sizes in wanted} == wanted


# the specification against a pencil


@pytest.mark.parametrize("k, starts", [(1, [0]), (37, [0]), (512, [0]), (515, [0, 512]), (1100, [0, 512, 1024])])
def test_the_float32_specification_is_the_pencil(k, starts):
    for shape in (f"N=3,K={k}", f"N=3,K={k},bias"):
        given_ = inputs(2, shape, torch.float32, device="cpu")
        assert same_bits(OP.python(*given_), pencil(OP, *given_, starts))


def test_segments_are_not_one_chain():
    """Inverse test: where the order cuts k, one chain over it gives other bits."""
    for dtype in DTYPES.values():
        x, weight, _ = inputs(1, "N=128,K=1024", dtype, device="cpu")
        bias = -OP.python(x, weight)[0]  # takes away what is rounded and leaves the last bits of the sum
        assert elements_differ(OP.python(x, weight, bias), OP.python(x, weight, bias, (1, 1024))) > 20


ORDERS = ((1, 320), (5, 64), (4, 96), (3, 128), (2, 160), (2, 192))


@every_dtype
def test_an_order_that_is_named_is_kept(dtype):
    """One chain over k is that chain and no segment; other orders are the pencil's."""
    x, weight, bias = inputs(2, "N=3,K=320,bias", dtype, device="cpu")
    for segments, length in ORDERS:
        wanted = pencil(OP, x, weight, bias, [*range(0, 320, length)])
        assert same_bits(OP.python(x, weight, bias, (segments, length)), wanted)
        assert same_bits(OP.python(x, weight, bias, [segments, length]), wanted)
    chain = torch.zeros(2, 3) + one_chain(x, weight)
    assert same_bits(OP.python(x, weight, None, (1, 320)), chain.to(dtype))
    assert same_bits(OP.python(x, weight, bias, (1, 320)), (chain + bias.float()).to(dtype))
    assert same_bits(OP.python(x, weight, bias), OP.python(x, weight, bias, order(3, 320)))


@needs_triton
@every_dtype
def test_schedules_keep_an_order_that_is_named(dtype):
    """In turn, on the same tensors: the next call is not taken for the last one."""
    x, weight, bias = inputs(3, "N=5,K=128,bias", dtype)
    wanted = {given_: OP.python(x, weight, bias, given_) for given_ in ((1, 128), (2, 64), (2, 96))}
    assert len({digest(y) for y in wanted.values()}) == 3 or dtype != torch.float32
    for given_ in (*wanted, (2, 64), (1, 128)):
        assert same_bits(OP.triton(x, weight, bias, given_), wanted[given_]), given_
    for split, given_ in ((False, (2, 64)), (False, (2, 96)), (True, (2, 64)), (True, (2, 96))):
        schedule = Schedule("pointer", 16, 16, 32, 4, 2, split=split)
        assert same_bits(OP.run_schedule(schedule, x, weight, bias, [*given_]), wanted[given_]), (schedule, given_)


def test_the_bias_is_added_before_the_only_rounding():
    x, weight, bias = inputs(64, "N=32,K=64,bias", device="cpu")
    late = OP.python(x, weight) + bias
    assert elements_differ(OP.python(x, weight, bias), late) > 0


# schedules against the specification


@needs_triton
@settings(deadline=None, max_examples=8)
@given(m=st.integers(1, 20), n=st.integers(1, 20), k=st.integers(1, 20), bias=st.booleans(),
       schedule=st.sampled_from(SMALL), seed=st.integers(0, 99))
def test_float32_schedules_are_python(m, n, k, bias, schedule, seed):
    given_ = inputs(m, Shape(N=n, K=k, bias=True) if bias else Shape(N=n, K=k), torch.float32, seed)
    assert same_bits(OP.run_schedule(schedule, *given_), OP.python(*given_))


@needs_triton
@pytest.mark.parametrize("split", [False, True], ids=["in sequence", "side by side"])
def test_float32_segments_are_python(split):
    given_ = inputs(3, "N=5,K=514,bias", torch.float32)
    assert same_bits(OP.run_schedule(Schedule("pointer", 16, 16, 64, 4, 2, split=split), *given_), OP.python(*given_))


@needs_triton
@every_dtype
@pytest.mark.parametrize("m, n, k", [(18, 20, 40), (3, 5, 530), (200, 2100, 64)])
def test_every_schedule_gives_exact_sums(m, n, k, dtype):
    """Tiles, masks, segments and biases of every schedule, on numbers whose sums are exact in any order."""
    if not runtime.HAS_GPU:  # the interpreter takes a millisecond a program, and float32 one k at a time
        m, n, k = min(m, 18), min(n, 20), min(k, 18 if dtype == torch.float32 else 530)
    given_ = whole_inputs(m, n, k, dtype)
    wanted = exact_product(*given_).to(dtype)
    assert same_bits(OP.python(*given_), wanted)
    found = OP.schedules(f"N={n},K={k}", dtype)
    if k == 530 and not runtime.HAS_GPU:  # a second each: bfloat16 has one half of them, float16 the other
        found = found[dtype == torch.float16 :: 2]
    for schedule in found:
        if schedule.kind == "pointer" or runtime.HAS_GPU:
            assert same_bits(OP.run_schedule(schedule, *given_), wanted), schedule


@needs_triton
@settings(deadline=None, max_examples=15)
@given(m=st.integers(1, 40), n=st.integers(1, 70), k=st.integers(1, 600), bias=st.booleans(),
       dtype=st.sampled_from([torch.bfloat16, torch.float16]))
def test_triton_gives_exact_sums_at_any_size(m, n, k, bias, dtype):
    given_ = whole_inputs(m, n, k, dtype, bias)
    assert same_bits(OP.triton(*given_), exact_product(*given_).to(dtype))


# nothing against the batch


def split_by_tokens(x, weight):
    """What a library may do: few rows, more segments. The same accuracy, other bits for other batches."""
    parts = max(1, 64 // len(x))
    return sum(a @ b.t() for a, b in zip(x.tensor_split(parts, -1), weight.tensor_split(parts, -1), strict=True))


def test_the_check_notices_a_split_that_follows_the_tokens():
    """Inverse test."""
    x, weight, _ = inputs(64, "N=64,K=512", torch.float32, device="cpu")
    assert not check_invariance(split_by_tokens, (x, weight))


@both
@every_dtype
@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_bad_row_of_the_weight_stays_in_its_column(name, dtype, bad):
    x, weight, bias = inputs(6, "N=10,K=24,bias", dtype)
    wanted = OP.implementation(name)(x, weight, bias)
    x[1::2], weight[3] = bad, bad
    y = OP.implementation(name)(x, weight, bias)
    columns = [i for i in range(10) if i != 3]
    assert same_bits(y[::2][:, columns], wanted[::2][:, columns])
    assert not y[1::2].isfinite().any() and not y[:, 3].isfinite().any()


# shapes


@both
@every_dtype
def test_rows_at_one_address_are_rows(name, dtype):
    x, weight, _ = whole_inputs(1, 20, 24, dtype)
    wanted = exact_product(x, weight).to(dtype).expand(4, 20)
    assert same_bits(OP.implementation(name)(x.expand(4, 24), weight), wanted)
    assert same_bits(OP.implementation(name)(x.repeat(4, 1), weight), wanted)


@both
@pytest.mark.parametrize("leading", [(), (6,), (2, 3), (1, 6, 1)])
def test_leading_dimensions_are_rows(name, leading):
    call = OP.implementation(name)
    x, weight, bias = whole_inputs(math.prod(leading), 10, 30)
    y = call(x.view(*leading, 30), weight, bias)
    assert y.shape == (*leading, 10) and y.is_contiguous()
    assert same_bits(y.view(-1, 10), call(x, weight, bias))
    if len(leading) > 1:
        turned = x.view(*leading, 30).transpose(0, 1)
        assert same_bits(call(turned, weight, bias), y.transpose(0, 1))


@both
@every_dtype
def test_nothing_to_multiply(name, dtype):
    """No tokens, no weight rows, or sums of no products, which are zero and then the bias."""
    call = OP.implementation(name)
    _, weight, bias = whole_inputs(1, 10, 30, dtype)
    assert call(weight.new_zeros(0, 30), weight, bias).shape == (0, 10)
    assert call(weight.new_zeros(2, 0, 30), weight).shape == (2, 0, 10)
    assert call(weight.new_zeros(3, 30), weight[:0]).shape == (3, 0)
    for given_bias in (None, bias):
        y = call(weight.new_zeros(3, 0), weight[:, :0], given_bias)
        assert same_bits(y, weight.new_zeros(3, 10) if given_bias is None else bias.expand(3, 10) + 0)


# schedules that do not suit


@needs_triton
def test_a_schedule_that_cannot_keep_the_order_is_refused():
    with pytest.raises(Unsuitable, match="block_k must divide the order's segments of 512"):
        OP.run_schedule(Schedule("pointer", 16, 16, 1024), *whole_inputs(2, 8, 600))
    with pytest.raises(Unsuitable, match="at least twice in sequence"):
        OP.run_schedule(Schedule("pointer", 16, 16, 512), *whole_inputs(2, 8, 600))


@needs_triton
@pytest.mark.skipif(runtime.HAS_GPU, reason="without a GPU")
def test_bulk_copies_are_refused_by_the_interpreter():
    with pytest.raises(Unsuitable, match="pointer alone.*tma"):
        OP.run_schedule(Schedule("tma", 64, 64, 64), *whole_inputs(2, 64, 64))


def product(given_, **changes):
    """300 tokens and a weight of 512 rows in bfloat16."""
    return replace(Product(300, 512, 4096, torch.bfloat16, (4096, 1), (4096, 1), Order(*given_), False), **changes)


@needs_triton
def test_groups_that_take_turns_are_refused_what_they_cannot_do():
    """Two accumulators, for a chain and the segments before it, do not fit a group that has a whole tile."""
    turns = Schedule("hopper", 128, 128, 64, 8, 4, persistent=True, pingpong=True)
    for given_, schedule in (((4, 1024), turns), ((1, 4096), replace(turns, warps=12)),
                             ((1, 4096), replace(turns, block_n=256)), ((1, 4096), replace(turns, split=True))):
        with pytest.raises(Unsuitable, match="take turns|kind hopper"):
            kind_of(schedule, product(given_)).suits(schedule, product(given_))
    kind_of(turns, product((1, 4096))).suits(turns, product((1, 4096)))


@needs_triton
@pytest.mark.parametrize("schedule", [
    "256x160x64 warps=8 stages=2", "128x160x64 warps=4 stages=2", "128x256x64 warps=4 stages=2",
    "128x256x64 warps=8 stages=4"])
def test_a_tile_whose_sums_find_no_room_is_refused(schedule):
    with pytest.raises(Unsuitable, match="no room"):
        steps(Schedule.parse(f"hopper {schedule} group=8 persistent"), product((4, 1024)))


LOCKSTEP = Schedule.parse("hopper 128x256x64 warps=8 stages=4 group=8 persistent stream lockstep")


@needs_triton
@pytest.mark.parametrize("m, n, programs", [(128, 40_000, 132), (200, 40_000, 132), (420, 28_672, 132),
                                            (900, 34_816, 128), (2300, 4096, 126)])
def test_in_lockstep_as_many_programs_walk_each_tile_of_tokens(m, n, programs):
    (step,) = steps(LOCKSTEP, product((1, 4096), m=m, n=n))
    assert step.programs == programs and step.constants["STREAM"] == 2 and programs % -(-m // 128) == 0
    (step,) = steps(replace(LOCKSTEP, lockstep=False), product((1, 4096), m=m, n=n))
    assert step.programs == 132 and step.constants["STREAM"] is True


@needs_triton
@pytest.mark.parametrize("m, n", [(200, 256 * 65), (128, 256 * 131), (17_000, 40_000)])
def test_chains_in_lockstep_need_one_for_every_program(m, n):
    """Fewer would be cut twice; more tiles of tokens than multiprocessors would wait for programs that do not run."""
    p = product((1, 4096), m=m, n=n)
    with pytest.raises(Unsuitable, match="where every program runs and has one"):
        steps(LOCKSTEP, p)
    steps(LOCKSTEP, replace(p, m=min(m, 200), n=n + 256))


# gradients


@both
@every_dtype
def test_gradients_are_products_in_the_same_order(name, dtype):
    if runtime.HAS_GPU or name == "python" or dtype == torch.float32:
        x, weight, bias = (t.requires_grad_() for t in inputs(9, "N=14,K=12,bias", dtype))
        dy = portable(9, 14, dtype, HERE, 5)
    else:
        x, weight, bias = (t.requires_grad_() for t in whole_inputs(9, 14, 12, dtype))
        dy = whole_inputs(9, 1, 14, dtype)[0]
    OP.implementation(name)(x.view(3, 3, 12), weight, bias).backward(dy.view(3, 3, 14))
    with torch.no_grad():
        ones = torch.ones(1, 9, dtype=dtype, device=HERE)
        assert same_bits(x.grad, OP.python(dy, weight.t()))
        assert same_bits(weight.grad, OP.python(dy.t(), x.t(), None, (1, 9)))
        assert same_bits(bias.grad, OP.python(dy.t(), ones, None, (1, 9))[:, 0])


@both
def test_gradients_against_float64(name):
    x, weight, bias = (t.requires_grad_() for t in inputs(7, "N=10,K=11,bias", torch.float32))
    dy = portable(7, 10, torch.float32, HERE, 5)
    OP.implementation(name)(x, weight, bias).backward(dy)
    wide = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    torch.nn.functional.linear(*wide).backward(dy.double())
    for ours, exactly in zip((x, weight, bias), wide, strict=True):
        torch.testing.assert_close(ours.grad.double(), exactly.grad, rtol=1e-5, atol=1e-6)


@both
def test_only_wanted_gradients_are_made(name):
    x, weight, bias = inputs(3, "N=4,K=5,bias", torch.float32)
    OP.implementation(name)(x, weight.requires_grad_(), bias).sum().backward()
    assert weight.grad is not None and x.grad is None and bias.grad is None
    with torch.no_grad():
        assert not OP.implementation(name)(x, weight, bias).requires_grad


# under torch.compile


@needs_triton
def test_a_compiled_call_has_the_same_bits_and_gradients():
    def call(x, weight, bias):
        return OP.triton(x, weight, bias) * 2

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=False)
    results = []
    for function in (call, compiled):
        given_ = tuple(t.requires_grad_() for t in inputs(5, "N=6,K=8,bias", torch.float32))
        y = function(*given_)
        y.square().sum().backward()
        results.append((y.detach(), *(t.grad for t in given_)))
    assert same_bits(*results)


# the launch path


class Fake:
    """Stands in for a schedule made ready: those in `broken` do not compile."""

    broken: tuple = ()

    def __init__(self, product, schedule, index):
        if schedule in self.broken:
            raise RuntimeError(f"out of resource: shared memory, {schedule}")
        self.schedule = schedule

    def __call__(self, *call):
        self.call = call


def test_a_schedule_that_does_not_run_gives_way_to_the_next(monkeypatch):
    monkeypatch.setattr(matmul_plan, "Chosen", Fake)
    matmul_plan._passed_over.cache_clear()
    plan = matmul_plan.Plan(*whole_inputs(3, 8, 16), (1, 16))
    plan.wanted = SMALL
    monkeypatch.setattr(Fake, "broken", tuple(SMALL[:2]))
    with pytest.warns(RuntimeWarning, match="(16x16x16|16x32x64).*shared memory.*same bits"):
        assert plan._first_that_runs(0, 1, 2, 3, 4, HERE).schedule == SMALL[2]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it has been said
        assert plan._first_that_runs(0, 1, 2, 3, 4, HERE).schedule == SMALL[2]
    monkeypatch.setattr(Fake, "broken", tuple(SMALL))
    with pytest.warns(RuntimeWarning), pytest.raises(RuntimeError, match="no schedule.*16x16x16.*shared memory"):
        plan._first_that_runs(0, 1, 2, 3, 4, HERE)
    plan.forced = True
    with pytest.raises(RuntimeError, match="^out of resource"):
        plan._first_that_runs(0, 1, 2, 3, 4, HERE)


def test_no_memory_is_not_a_reason_to_keep_a_slower_schedule(monkeypatch):
    def no_memory(product, schedule, index):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(matmul_plan, "Chosen", no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        matmul_plan.Plan(*whole_inputs(3, 8, 16), (1, 16))._first_that_runs(0, 1, 2, 3, 4, HERE)


def test_tensor_cores_older_than_the_specification_are_warned_of(monkeypatch):
    matmul_plan._add_otherwise.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 0))
    with pytest.warns(RuntimeWarning, match="older than Hopper.*other bits"):
        matmul_plan._add_otherwise(0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        matmul_plan._add_otherwise(1)
    matmul_plan._add_otherwise.cache_clear()


@needs_triton
@pytest.mark.parametrize("schedule, sides", [
    ("tma 64x32x64 warps=4 stages=3 group=8", [("x", 64), ("weight", 32)]),
    ("tma 64x32x64 warps=4 stages=3 group=8 persistent store", [("x", 64), ("weight", 32), ("y", 64)]),
    ("hopper 64x32x64 warps=4 stages=3 group=8 persistent", [("x", 64), ("weight", 32), None]),
    ("hopper 64x80x64 warps=4 stages=3 group=8 persistent", [("x", 64), ("weight", 64), ("weight", 16)]),
    ("hopper 80x64x64 warps=4 stages=3 group=8 swap persistent", [("weight", 64), ("x", 64), ("x", 16)])])
def test_a_launch_with_bulk_copies_describes_each_side_once_an_address(schedule, sides, monkeypatch):
    class Launched:
        described = staticmethod(tuple)

        def __call__(self, *given):
            seen.append(given)

    seen, s = [], Schedule.parse(schedule)
    monkeypatch.setattr(matmul_plan, "current_stream", lambda index: "stream")
    chosen = object.__new__(matmul_plan.Chosen)
    chosen.schedule, chosen.index, chosen.described = s, 0, {}
    chosen.leading = leading(steps(s, product((1, 4096)))[0])
    assert [tiles and (name, tiles.block[0]) for name, tiles in chosen.leading] == sides
    chosen.launch = Launched()
    for px in (16, 32, 16):
        chosen._launch_bulk(0, px, 48, "bias", 64, "work", "counters")
    stream, *described, bias, work, counters = seen[0]
    assert (stream, bias, work, counters) == ("stream", "bias", "work", "counters")
    y = [] if s.store else [described.pop()] if s.kind == "tma" else [described.pop(3)]
    size = {"x": [300, 4096], "weight": [512, 4096], "y": [300, 512]}
    assert [d and d.shape for d in described] == [side and size[side[0]] for side in sides] and y in ([], [64])
    assert all(d is None or d.strides == [d.shape[1], 1] for d in described)
    at = {"x": 16, "weight": 48, "y": 64}
    assert all(d is None or d.data_ptr() == d.base.data_ptr() == at[side[0]]
               for d, side in zip(described, sides, strict=True))
    assert seen[1][1] != seen[0][1] or seen[1][2] != seen[0][2]
    assert seen[2][1] is seen[0][1] and seen[2][2] is seen[0][2] and len(chosen.described) == 2
    with pytest.raises(Unsuitable, match="aligned to 16 bytes"):
        chosen._launch_bulk(8, 16, 48, "bias", 64, "work", "counters")


def fake_banks(monkeypatch, capturing=(False,)):
    real = torch.zeros
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda index: None)
    monkeypatch.setattr(torch, "zeros", lambda *size, dtype, device: real(*size, dtype=dtype))
    return Counters()


def test_threads_on_streams_of_their_own_never_share_counters(monkeypatch):
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(40):
            counters = fake_banks(monkeypatch)
            with ThreadPoolExecutor(8) as pool:
                found = list(pool.map(partial(counters.take, 0, count=100), range(8)))
            bank = counters.banks[0][0]
            first, end = bank.data_ptr(), bank.data_ptr() + 4 * counters.BANK
            assert len(set(found)) == 8 and all(first <= a < end for a in found) and not counters.full
            monkeypatch.undo()
    finally:
        sys.setswitchinterval(before)


def test_a_bank_is_made_in_a_thread_of_its_own(monkeypatch):
    """torch.compile's graphs take what a thread allocates while they warm up into a pool of theirs."""
    counters, makers = fake_banks(monkeypatch), []
    make = counters._make
    counters._make = lambda index: (makers.append(threading.get_ident()), make(index))[1]
    assert counters.take(0, 1, 4) and makers and threading.get_ident() not in makers


def test_each_gpu_has_a_bank_of_its_own(monkeypatch):
    counters, made = fake_banks(monkeypatch), []
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, dtype, device: made.append((size, dtype, str(device))) or zeros(
        *size, dtype=dtype, device=device))
    for index in (1, 0, 1):
        address = counters.take(index, 7, 4)
        bank = counters.banks[index][0]
        assert bank.data_ptr() <= address < bank.data_ptr() + 4 * counters.BANK and not bank.any()
    assert made == [((counters.BANK,), torch.int32, f"cuda:{index}") for index in (1, 0)]


def test_a_bank_that_finds_no_memory_says_so(monkeypatch):
    counters = fake_banks(monkeypatch)

    def no_memory(index):
        raise torch.OutOfMemoryError("CUDA out of memory")

    counters._make = no_memory
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        counters.take(0, 1, 4)
    assert not counters.banks and not counters.lock.locked()


def test_counters_belong_to_one_stream_or_one_captured_call(monkeypatch):
    capturing = [False]
    counters = fake_banks(monkeypatch, capturing)
    capturing[0] = True
    assert counters.take(0, 7, 10) == 0  # no bank yet, and a capture cannot make one
    capturing[0] = False
    first, other = counters.take(0, 7, 10), counters.take(0, 8, 10)
    assert counters.take(0, 7, 4000) == first and abs(other - first) >= 4 * counters.SLICE
    capturing[0] = True
    captured = [counters.take(0, 7, 97) for _ in range(3)]
    assert len({first, other, *captured}) == 5
    assert all(b - a == 400 for a, b in zip(captured, captured[1:], strict=False))
    while counters.take(0, 7, 4000):
        pass
    capturing[0] = False
    assert counters.take(0, 7, 10) == first  # makes a new bank for captures to come, and keeps the old one's slices
    capturing[0] = True
    assert counters.take(0, 7, 10) != 0 and len(counters.full) == 1


# the code the compiler makes


CODE = [Job("matmul", shape, dtype, schedule, target) for shape, dtype, schedule, target in (
    ("N=4096,K=4096", "bfloat16", "pointer 16x32x256 warps=4 stages=4 group=1 swap", 90),
    ("N=1024,K=4096", "bfloat16", "pointer 16x32x256 warps=4 stages=4 group=1 swap split", 90),
    ("N=1024,K=4096", "float16", "pointer 32x64x64 warps=4 stages=3 group=8", 80),
    ("N=512,K=4096", "bfloat16", "pointer 128x128x64 warps=8 stages=3 group=8", 90),
    ("N=1024,K=4096", "bfloat16", "tma 128x128x64 warps=8 stages=4 group=8", 90),
    ("N=1024,K=4096", "bfloat16", "tma 128x128x64 warps=8 stages=4 group=8 split", 90),
    ("N=4096,K=4096,bias", "float16", "tma 128x256x64 warps=8 stages=4 group=8 persistent flatten", 90),
    ("N=4096,K=4096", "bfloat16", "hopper 192x128x64 warps=12 stages=4 group=8 persistent", 90),
    ("N=512,K=4096", "bfloat16", "hopper 128x128x64 warps=8 stages=4 group=8 swap persistent", 90),
    ("N=512,K=4096,bias", "bfloat16", "hopper 128x192x64 warps=12 stages=4 group=8 swap persistent store", 90),
    ("N=4096,K=4096", "float16", "hopper 128x256x64 warps=8 stages=3 group=8 persistent store", 90),
    ("N=4096,K=4096", "bfloat16", "hopper 64x256x64 warps=8 stages=5 group=8 persistent pingpong", 90),
    ("N=4096,K=4096,bias", "float16", "hopper 128x128x64 warps=8 stages=5 group=8 swap persistent store pingpong", 90),
    ("N=4096,K=4096,bias", "bfloat16", "hopper 192x128x64 warps=8 stages=5 group=8 swap persistent store pingpong", 90),
    ("N=4096,K=4096", "bfloat16", "hopper 256x192x64 warps=8 stages=3 group=8 persistent store", 90),
    ("N=4096,K=4096", "float16", "hopper 144x192x64 warps=12 stages=5 group=8 swap persistent store", 90),
    ("N=4096,K=4096", "bfloat16", "hopper 128x256x64 warps=8 stages=4 group=8 persistent stream", 90),
    ("N=13312,K=3328", "bfloat16", "hopper 128x256x64 warps=8 stages=4 group=8 persistent stream lockstep", 90),
    ("N=4096,K=14336", "bfloat16", "hopper 128x256x64 warps=8 stages=3 group=8 persistent store", 90),
    ("N=4096,K=14336,bias", "float16", "hopper 256x128x64 warps=8 stages=3 group=8 swap persistent", 90),
    ("N=4096,K=14336", "bfloat16", "hopper 128x192x64 warps=8 stages=4 group=8 persistent", 90),
    ("N=1280,K=8192,bias", "bfloat16", "hopper 128x160x64 warps=8 stages=6 group=8 persistent", 90),
    ("N=4096,K=4096", "bfloat16", "hopper 80x64x64 warps=4 stages=6 group=8 swap persistent store", 90),
    ("N=1280,K=8192", "bfloat16", "hopper 128x128x64 warps=8 stages=6 group=8 split persistent reduce stream", 90),
    ("N=1280,K=8192,bias", "bfloat16", "tma 128x64x64 warps=4 stages=6 group=8 split reduce", 90),
    ("N=512,K=4096", "float32", "pointer 64x64x16 warps=4 stages=3 group=8 split reduce", 80),
    ("N=1024,K=4096", "float32", "pointer 32x32x32 warps=4 stages=2 group=8", 90),
    ("N=4096,K=4096,bias", "float32", "pointer 64x64x16 warps=4 stages=3 group=8", 80),
    ("N=1024,K=4096", "bfloat16", "pointer 64x64x64 warps=4 stages=3 group=8", 100))]
@pytest.fixture(scope="module")
def compiled():
    return compile_ahead(CODE)


def names(codes):
    return [f"sm_{c.job.target} {c.job.shape} {c.job.dtype} {c.job.schedule}" for c in codes]


def outputs(job):
    """How many elements of y one thread's code holds: of every group of four warps, where each has code of its own."""
    s = Schedule.parse(job.schedule)
    return s.block_m * s.block_n * (1 + s.pingpong) // (32 * (4 if s.kind == "hopper" else s.warps))


def chains(code):
    """(heads, lengths): where a chain of multiply-adds enters the loop's body, and how many follow in sequence."""
    found = re.findall(r"mma\.sync\S+\s+\{([^}]*)\}, *\{[^}]*\}, *\{[^}]*\}, *\{([^}]*)\}", code.ptx)
    found = found or re.findall(r"wgmma\.mma_async\S+\s+\{([^}]*)\}()", code.ptx)
    found = [(made, taken or made) for made, taken in found]
    found = found or re.findall(r"fma\.rn\.f32\s+(%\w+), %\w+, %\w+, (%\w+);", code.ptx)
    lengths: dict[str, list] = {}
    for made, taken in found:
        head, length = lengths.pop(taken.replace(" ", ""), (taken, 0))
        lengths[made.replace(" ", "")] = (head, length + 1)
    return {head for head, _ in lengths.values()}, sorted({length for _, length in lengths.values()})


def half_waits(job):
    """Whether half of a tile's sum of segments waits in shared memory, because its chains fill the registers."""
    s, shape = Schedule.parse(job.schedule), Shape.parse(job.shape)
    cut = order(shape["N"], shape["K"])[0] > 1
    return s.kind == "hopper" and cut and not s.split and outputs(job) > 96 * (s.warps // 4)


@needs_compiler
def test_every_kind_compiles_for_its_gpus(compiled):
    assert all(f".target sm_{c.job.target}" in c.ptx for c in compiled)
    assert {Schedule.parse(c.job.schedule).kind for c in compiled} == set(schedules.KINDS)
    assert all(c.shared_bytes <= 227 * 1024 for c in compiled)


@needs_compiler
def test_a_blocks_products_are_one_chain_for_each_accumulator(compiled):
    """As many products in sequence as the block of k has steps, and as many chains as accumulators."""
    for code in compiled:
        job, s = code.job, Schedule.parse(code.job.schedule)
        if job.target == 100:
            continue  # its tensor cores keep accumulators in a memory of their own
        heads, lengths = chains(code)
        assert lengths == [s.block_k // (1 if job.dtype == "float32" else 16)], (names([code]), lengths)
        instruction = 1 if job.dtype == "float32" else 4 if "mma.sync" in code.ptx else None
        high = s.block_n if s.swap else s.block_m  # a wgmma holds 64 of its rows for four warps
        hopper, wide = s.kind == "hopper", s.block_m if s.swap else s.block_n
        rows = high // 64 * (1 + s.pingpong) if hopper else high // (16 * s.warps)
        rows *= 1 + bool(wide & (wide - 1))  # two instructions side by side
        assert len(heads) == (outputs(job) // instruction if instruction else rows), (names([code]), len(heads))


@needs_compiler
def test_segments_and_biases_are_separate_additions(compiled):
    """One for the sum that starts from +0, one more inside the loop where it is cut, one for a bias; the half of a
    sum that waits in shared memory begins from +0 after the loop; none where another kernel adds."""
    for code in compiled:
        shape, s = Shape.parse(code.job.shape), Schedule.parse(code.job.schedule)
        if code.job.target == 100:
            continue
        cut = order(shape["N"], shape["K"])[0] > 1
        wanted = 1 + bool(shape.get("bias")) + (cut and not s.split and s.kind != "hopper")
        wanted = 0 if s.reduce else wanted + half_waits(code.job) / 2
        assert code.float_adds == wanted * outputs(code.job), names([code])


@needs_compiler
def test_nothing_else_rounds(compiled):
    for code in compiled:
        fused = code.fused if code.job.dtype == "float32" else 0
        assert fused == (outputs(code.job) * Schedule.parse(code.job.schedule).block_k if fused else 0), names([code])
        assert code.job.dtype == "float32" or code.fused == 0, names([code])
        assert code.count(r"mul(\.rn)?\.f32") == 0 and code.flushes == 0 and not code.approximate, names([code])
        assert not re.search(r"\btf32\b", code.ptx), names([code])


# the other contenders


@every_dtype
def test_tiled_ignores_the_batch(dtype):
    report = check_invariance(OP.extras["tiled"], inputs(150, "N=16,K=40", dtype), OP.per_token,
                              [slice(0, 1), slice(0, 127), slice(0, 129), slice(10, 140)])
    assert report, str(report)
    assert OP.extras["tiled"](*inputs(0, "N=16,K=40", dtype)[:2]).shape == (0, 16)


@needs_triton
def test_frozen_is_the_exact_product():
    given_ = whole_inputs(130, 40, 70)
    assert same_bits(OP.extras["frozen"](*given_), exact_product(*given_).bfloat16())


def test_no_split_k_is_refused_where_there_is_no_such_setting():
    with pytest.raises(runtime.Unavailable, match="float32"):
        OP.extras["cublas_no_split_k"](*inputs(2, "N=3,K=4", torch.float32))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_no_split_k_puts_the_setting_back(dtype, monkeypatch):
    switches, name = torch.backends.cuda.matmul, contenders._SWITCH[dtype]

    def settings():
        library = torch.backends.cuda.preferred_blas_library()
        return getattr(switches, name), getattr(switches, f"{name}_split_k"), library

    before, (x, weight, bias) = settings(), inputs(2, "N=64,K=4096,bias", dtype)
    for b in (None, bias):
        y = OP.extras["cublas_no_split_k"](x, weight, b)
        assert settings() == before
        torch.testing.assert_close(y.double(), exact_product(x, weight, b), rtol=2e-2, atol=2e-1)

    def fails(*_):
        raise RuntimeError("the library")

    monkeypatch.setattr(contenders.F, "linear", fails)
    with pytest.raises(RuntimeError, match="the library"):
        OP.extras["cublas_no_split_k"](x, weight, bias)
    assert settings() == before


def test_inputs_and_work_are_what_they_say():
    x, weight, bias = inputs(5, "N=6,K=7,bias", device="cpu")
    assert (x.shape, weight.shape, bias.shape) == ((5, 7), (6, 7), (6,))
    assert same_bits(inputs(3, "N=6,K=7", device="cpu")[0], x[:3]) and inputs(3, "N=6,K=7")[2] is None
    work = OP.work(5, "N=6,K=7", torch.bfloat16)
    assert (work.bytes, work.flops) == (2 * (35 + 42 + 30), 2 * 5 * 6 * 7)


@pytest.mark.skipif(runtime.HAS_GPU, reason="on a CPU")
def test_a_sweep_in_a_notebook_opens_on_a_weight_that_a_cpu_can_multiply():
    widget = TokenSweep("rms_norm")
    widget.op.value = "matmul"
    assert widget.shape.value == TokenSweep("matmul").shape.value == "N=32,K=64"
    assert set(OP.shapes) < set(widget.shape.options) and not elements_differ(
        OP.python(*inputs(2, widget.shape.value, torch.float32)), OP.triton(*inputs(2, "N=32,K=64", torch.float32)))


# on a GPU, the same assertions on rounded numbers


LARGE = ("N=4096,K=4096", "N=1024,K=4096", "N=512,K=1200", "N=100,K=1001", "N=333,K=72")


@pytest.mark.gpu
@every_dtype
@pytest.mark.parametrize("shape", LARGE)
def test_every_schedule_keeps_the_order_on_a_gpu(shape, dtype):
    x, weight, _ = inputs(150, shape, dtype)
    bias = portable(1, len(weight), dtype, HERE, 3)[0]
    columns = min(len(weight), 256)
    rows = torch.cat([x, *(bits.adversarial(kind, 4, x.shape[1], dtype, HERE) for kind in KINDS)])
    segments, length = order(*weight.shape)
    total = torch.zeros(len(rows), columns, device=HERE)
    for start in range(0, segments * length, length):
        total = total + one_chain(rows[:, start : start + length], weight[:columns, start : start + length])
    wanted = (total + bias[:columns].float()).to(dtype)
    last_bits = -OP.triton(x[:1], weight)[0]
    whole, residue, ran = None, OP.triton(x[:1], weight, last_bits), 0
    assert same_bits(residue[:, :columns], (total[:1] + last_bits[:columns].float()).to(dtype))
    for schedule in OP.schedules(shape, dtype):
        try:
            y = OP.run_schedule(schedule, rows, weight, bias)
        except Unsuitable:
            assert schedule.kind != "pointer"
            continue
        ran += 1
        whole = y if whole is None else whole
        assert same_bits(y[:, :columns], wanted), schedule
        assert same_bits(y, whole), schedule
        again = OP.run_schedule(schedule, x[:1].repeat(70, 1), weight, last_bits)
        assert same_bits(again, residue.expand(70, -1)), schedule
    assert ran >= 10


@pytest.mark.gpu
@pytest.mark.parametrize("units", [*range(1, 5), *range(131, 135), 200, *range(260, 266), *range(393, 398), 1000])
def test_chains_are_handed_on_for_any_number_of_tiles(units):
    """Shares that end with a tile, begin with one, or hold two whole ones."""
    x, weight, _ = inputs(64, f"N={16 * units},K={1024 if units > 128 else 512}")  # one chain each
    given_ = (x, weight, -OP.run_schedule(SMALL[2], x[:1], weight)[0])
    wanted = OP.run_schedule(SMALL[2], *given_)
    for _ in range(5):
        y = OP.run_schedule(Schedule("hopper", 64, 16, 64, 4, 8, persistent=True, stream=True), *given_)
        assert same_bits(y, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens, weights", [(40, 140), (70, 66), (130, 70), (130, 131), (300, 60), (1000, 30)])
@pytest.mark.parametrize("tile", ["64x16x64 warps=4", "64x64x64 warps=4", "32x64x64 warps=4"])
def test_chains_are_handed_on_in_lockstep(tokens, weights, tile):
    """For one tile of tokens and for several, of which the programs are no multiple."""
    swap = "swap " * tile.startswith("32")
    schedule = Schedule.parse(f"hopper {tile} stages=6 group=8 {swap}persistent stream lockstep")
    x, weight, _ = inputs(tokens, f"N={schedule.block_n * weights},K=512")
    given_ = (x, weight, -OP.run_schedule(SMALL[2], x[:1], weight)[0])
    wanted = OP.run_schedule(SMALL[2], *given_)
    for _ in range(5):
        assert same_bits(OP.run_schedule(schedule, *given_), wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("schedule", ["128x256x64 warps=8 stages=3 group=8 persistent store",
                                      "256x128x64 warps=8 stages=3 group=8 swap persistent"])
def test_half_of_the_sums_waits_for_every_tile_of_a_program(schedule):
    x, weight, _ = inputs(9000, "N=1024,K=4096")  # more than two tiles for each multiprocessor
    last_bits = -OP.run_schedule(SMALL[2], x[:1], weight)[0]
    wanted = OP.run_schedule(SMALL[2], x, weight, last_bits)
    assert same_bits(OP.run_schedule(Schedule.parse(f"hopper {schedule}"), x, weight, last_bits), wanted)


@pytest.mark.gpu
@every_dtype
@pytest.mark.parametrize("shape", LARGE)
def test_a_row_ignores_a_large_batch(shape, dtype):
    batches = [slice(0, n) for n in (1, 2, 15, 16, 17, 33, 64, 65, 128, 129, 300, 513, 1024)] + [slice(700, 1100)]
    report = check_invariance(OP.triton, inputs(1300, shape, dtype)[:2], OP.per_token, batches)
    assert report, str(report)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", ["N=1024,K=4096", "N=4096,K=4096"])
def test_a_captured_graph_has_the_same_bits(shape):
    """Replayed, and replayed beside other work on another stream: counters and workspaces are its own."""
    x, weight, _ = inputs(5, shape)
    wanted = OP.triton(x, weight)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        results = [OP.triton(x, weight) for _ in range(3)]
    beside = torch.cuda.Stream()
    for _ in range(20):
        for y in results:
            y.fill_(float("nan"))
        torch.cuda.synchronize()
        graph.replay()
        with torch.cuda.stream(beside):
            others = [OP.triton(x, weight) for _ in range(3)]
        torch.cuda.synchronize()
        assert all(same_bits(y, wanted) for y in (*results, *others))


@pytest.mark.gpu
def test_a_capture_without_counters_has_zeros_of_its_own(monkeypatch):
    x, weight, _ = inputs(5, "N=1024,K=4096")
    split = Schedule("pointer", 16, 32, 256, 4, 4, 1, swap=True, split=True)
    wanted = OP.run_schedule(split, x, weight)
    monkeypatch.setattr(Counters, "_cut", lambda *_: 0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [OP.run_schedule(split, x, weight) for _ in range(3)]
    for _ in range(3):
        for y in results:
            y.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert all(same_bits(y, wanted) for y in results)


@pytest.mark.gpu
@pytest.mark.parametrize("schedule", [
    "pointer 16x32x256 warps=4 stages=4 group=1 swap split", "tma 16x64x128 warps=4 stages=4 group=1 swap split",
    "hopper 64x128x64 warps=4 stages=6 group=8 persistent split reduce"])
def test_a_model_that_torch_captures_keeps_our_memory_out_of_the_graphs(schedule):
    """In a process of its own, whose first product is in that model: counters, and what a schedule compiles with."""
    code = f"""
import torch
from kernels import matmul
from kernels.bits import same_bits
from kernels.ops.matmul import plan
from kernels.ops.matmul.schedule import Schedule
plan.choose = lambda *_: iter([Schedule.parse({schedule!r})])
x, weight, _ = matmul.inputs(5, "N=1024,K=4096", torch.bfloat16, "cuda")
model = torch.compile(lambda x: matmul.triton(x, weight) * 2, mode="reduce-overhead", fullgraph=True)
with torch.no_grad():
    results = [model(x).clone() for _ in range(5)]
assert all(same_bits(y, matmul.triton(x, weight) * 2) for y in results)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.gpu
@every_dtype
def test_gradients_on_a_gpu(dtype):
    x, weight, bias = (t.requires_grad_() for t in inputs(300, "N=512,K=768,bias", dtype))
    dy = portable(300, 512, dtype, HERE, 5)
    OP.triton(x, weight, bias).backward(dy)
    with torch.no_grad():
        assert same_bits(x.grad, OP.python(dy, weight.t()))
        assert same_bits(weight.grad, OP.python(dy.t(), x.t(), None, (1, 300)))
        part = OP.triton(x[:40], weight, bias)
    assert same_bits(part, OP.triton(x, weight, bias)[:40].detach())


@pytest.mark.gpu
def test_a_compiled_model_changes_its_schedule_with_its_tokens():
    compiled = torch.compile(OP.triton, fullgraph=True, dynamic=True)
    x, weight, _ = inputs(600, "N=1024,K=4096")
    wanted = OP.triton(x, weight)
    for tokens in (1, 7, 16, 100, 600):
        assert same_bits(compiled(x[:tokens], weight), wanted[:tokens])
    assert len({str(next(choice.choose("matmul", "N=1024,K=4096", x.dtype, t, HERE.index))) for t in (1, 600)}) == 2
