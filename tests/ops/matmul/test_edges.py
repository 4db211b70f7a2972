"""Products at the edge: rows that bulk copies cannot follow, sizes that are no multiples of 16, k that ends early."""
import re
from dataclasses import replace
from itertools import product as every

import pytest
import torch
from common import HERE, INF, NAN, every_dtype, needs_compiler, needs_triton, numbers, seeds
from compiling import compile_ahead
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import OPS, runtime
from kernels.bits import adversarial, same_bits
from kernels.lab.proofs.certificates import TRUSTED
from kernels.lab.proofs.generated_code import Job
from kernels.ops.matmul import copies, units
from kernels.ops.matmul import schedule as schedules
from kernels.ops.matmul.order import Order, Tree, chain, order, shared_order, specified
from kernels.ops.matmul.plan import Plan
from kernels.ops.matmul.product import Product
from kernels.ops.matmul.schedule import SHARED, Schedule, Unsuitable
from kernels.ops.matmul.steps import steps
from kernels.ops.matmul.ways import Form, Sizes, suits

OP = OPS["matmul"]
BULK = Schedule("tma", 128, 128, 64, warps=8, stages=4)
PLAIN = Schedule("pointer", 16, 16, 32, warps=4, stages=2)


def product(m=300, n=1000, k=1001, dtype=torch.bfloat16, **changes):
    return replace(Product(m, n, k, dtype, (k, 1), (k, 1), Order(1, k), False), **changes)


def laid_out(rows, how):
    """The same numbers: contiguous, with columns apart, turned, or as columns of a wider matrix."""
    if how == "turned":
        return rows.t().contiguous().t()
    wide = torch.full((len(rows), 2 * rows.shape[1]), NAN, dtype=rows.dtype, device=rows.device)
    place = {"apart": wide[:, ::2], "columns": wide[:, 3 : 3 + rows.shape[1]]}.get(how)
    return rows if place is None else place.copy_(rows)


# zeros behind k


@settings(max_examples=30, deadline=None)
@given(k=st.integers(1, 40), more=st.integers(1, 40), seed=seeds, kind=st.sampled_from(
    ("cancellation", "wide", "subnormal", "signed_zero", "huge")), dtype=st.sampled_from(
    (torch.float32, torch.bfloat16, torch.float16)))
def test_zeros_behind_k_leave_every_bit(k, more, seed, kind, dtype):
    """Of a chain that is added to +0, as each one is; with NaN and infinities among the numbers too."""
    x, weight = adversarial(kind, 4, k, dtype, "cpu", seed), adversarial(kind, 3, k, dtype, "cpu", seed + 1)
    x[1, seed % k], x[2, seed % k], weight[2, seed % k] = NAN, INF, -INF
    x[3] = -0.0
    short, long = (0.0 + chain(*(torch.nn.functional.pad(t, (0, zeros)) for t in (x, weight))) for zeros in (0, more))
    assert same_bits(short, long)


# copies


@needs_triton
@pytest.mark.parametrize("how", ["contiguous", "turned", "apart", "columns"])
@every_dtype
def test_copies_keep_the_bits_of_the_specification(how, dtype):
    """-0, NaN and infinity among the numbers; segments in sequence, side by side and added by a second kernel."""
    m, n, k = 5, 7, 130
    x, weight = (adversarial("signed_zero", rows, k, dtype, HERE, rows) for rows in (m, n))
    x[1:4] += numbers((3, k), dtype, 3)
    x[2, 1], x[3, -1], weight[3] = NAN, INF, numbers((k,), dtype, 4)
    for given_order, how_split in ((None, {}), ((2, 96), {}), ((2, 96), {"split": True}),
                                   ((2, 96), {"split": True, "reduce": True, "swap": True})):
        wanted = specified(x, weight, None, given_order)
        schedule = replace(PLAIN, copy=True, **how_split)
        assert same_bits(OP.run_schedule(schedule, laid_out(x, how), laid_out(weight, how), None, given_order), wanted)


@needs_triton
@pytest.mark.parametrize("m, n, k, of", [(3, 70, 37, (True, True)), (65, 1, 130, (True, False)),
                                         (2, 66, 64, (False, True))], ids=str)
def test_a_copy_has_every_number_in_its_place(m, n, k, of, monkeypatch):
    p = product(m, n, k, torch.float32)
    monkeypatch.setattr(Product, "apart", of)
    wide = copies.width(p)
    x, weight = numbers((m, k), seed=1), numbers((n, k), seed=2)
    to = [torch.full((rows, wide), 7.0, device=HERE) for rows in (m, n)]
    memory = {"x_ptr": x, "weight_ptr": weight, "x_copy_ptr": to[0], "weight_copy_ptr": to[1]}
    run(copies.step(p), memory)
    for rows, copy, copied in zip((x, weight), to, of, strict=True):
        assert same_bits(copy, torch.nn.functional.pad(rows, (0, wide - k)) if copied else torch.full_like(copy, 7.0))
    assert copies.sizes(p) == (of[0] * m * wide, of[1] * n * wide) and wide % 64 == 0 and k <= wide < k + 64


def run(step, memory):
    if not runtime.HAS_GPU:
        step.interpret(memory)
        return
    pointers = [memory[name].data_ptr() for name in step.pointers]
    step.compiled(HERE.index)(runtime.current_stream(HERE.index), *pointers)
    torch.cuda.synchronize()


def test_copies_are_of_rows_that_begin_amid_a_line():
    rows = {strides: product(k=1000, x_strides=strides, weight_strides=(1024, 1)) for strides in (
        (1000, 1), (1001, 1), (1024, 1), (1088, 1), (1, 300), (2048, 2), (64, 1), (1004, 1))}
    assert {s: p.apart for s, p in rows.items()} == {s: (s not in ((1024, 1), (1088, 1)), False) for s in rows}
    assert {s for s, p in rows.items() if p.followed} == {(1000, 1), (1024, 1), (1088, 1)}
    assert product(k=1004, dtype=torch.float32).followed and not product(k=1004).followed
    p = product(k=1024, weight_strides=(1, 1000))
    assert p.apart == (False, True) and copies.copied(p).apart == (False, False) and copies.copied(p).followed
    assert copies.copied(p).x_strides == (1024, 1) and copies.sizes(p) == (0, 1000 * 1024)
    assert p.carried_out(replace(BULK, copy=True)).copy and product().carried_out(replace(BULK, copy=True)).copy
    assert not product(k=1024).carried_out(replace(BULK, copy=True)).copy


@needs_triton
def test_a_copy_is_launched_before_and_its_numbers_are_read():
    first, second = steps(replace(BULK, copy=True), product())
    assert first.kernel is copies.copy_kernel and first.programs == (5 + 16) * 16
    bulk = [tiles for name, tiles in second.pointers.items() if name.endswith("_desc")]
    assert {t.strides for t in bulk} == {(1024, 1)} and {t.shape for t in bulk} == {(300, 1001), (1000, 1001)}
    _, pointer = steps(replace(PLAIN, copy=True), product(k=1024, weight_strides=(1, 1000)))
    assert dict(pointer.named) == {"weight_ptr": "weight_copy_ptr"} and pointer.scalars["K"] == 1024
    assert len(steps(replace(BULK, split=True, reduce=True, copy=True), product(order=Order(2, 512)))) == 3


def test_copies_are_offered_where_tokens_are_many():
    found = [BULK, PLAIN]
    copied = [replace(BULK, copy=True), PLAIN]
    assert copies.offered(product(), found) == copies.offered(product(weight_strides=(1, 1000)), found) == copied
    for p in (product(copies.MANY), product(k=1000), product(dtype=torch.float32)):
        assert copies.offered(p, found) == found


# narrow weights


@pytest.mark.parametrize("n, tokens, said", [
    (128, 2000, "tma 64x128x64 warps=4 stages=4 group=8 split reduce"),
    (128, 8192, "tma 64x128x64 warps=4 stages=4 group=8"), (8, 8192, "tma 64x16x128 warps=4 stages=4 group=8"),
    (32, 2000, "tma 64x32x128 warps=4 stages=4 group=8 split reduce"),
    (512, 2000, "tma 64x128x64 warps=4 stages=4 group=8"), (1, 8192, "tma 64x16x128 warps=4 stages=4 group=8")])
def test_the_rule_gives_narrow_weights_narrow_tiles(n, tokens, said, monkeypatch):
    """In sequence as soon as they fill the GPU: side by side, a second kernel adds sums that are larger than x."""
    monkeypatch.setattr(schedules, "gpu", lambda index: ((9, 0), 132))
    assert str(next(schedules.rule(n, 4096, torch.bfloat16, tokens, 0))) == said
    monkeypatch.setattr(schedules, "gpu", lambda index: ((8, 0), 108))
    assert {s.kind for s in schedules.rule(n, 4096, torch.bfloat16, tokens, 0)} == {"pointer"}


# units


def test_units_are_what_triton_does_not_see():
    assert [units.unit(n) for n in (16, 32, 8, 24, 1016, 12, 2, 50257, 1)] == [1, 1, 8, 8, 8, 4, 2, 1, 1]
    assert units.unit(1016, 1008) == 8 and units.unit(1016, 1020) == 4 and units.unit(16, 8) == 8


@needs_triton
def test_only_products_that_need_it_are_told():
    """The table's weights run the code that was measured for them."""
    for p, kind, told in ((product(n=1024, k=1024), "pointer", {}), (product(n=1000, k=1024), "tma", {"N_UNIT": 8}),
                          (product(n=1024, k=1016), "pointer", {"N_UNIT": 1, "K_UNIT": 8}),
                          (product(n=1024, k=1016), "tma", {}), (product(n=1001, k=1001), "pointer", {}),
                          (product(n=1004, k=1008, x_strides=(1, 300)), "pointer", {"N_UNIT": 4, "K_UNIT": 1}),
                          (product(n=1000, k=1024), "hopper", {"N_UNIT": 8})):
        (step,) = steps(Schedule(kind, 128, 128, 64, 8, 3), p)
        assert {name: n for name, n in step.constants.items() if name.endswith("_UNIT")} == told
        assert step.kernel.fn.__module__.endswith("units") == bool(told)


@needs_triton
@pytest.mark.parametrize("n, k", [(7, 40), (12, 24), (10, 36), (40, 50), (24, 12)])
@every_dtype
def test_what_is_told_moves_no_bit(n, k, dtype):
    given_ = OP.inputs(3, f"N={n},K={k},bias", dtype, HERE)
    for swap in (False, True):
        assert same_bits(OP.run_schedule(replace(PLAIN, swap=swap), *given_), OP.python(*given_))


@needs_compiler
def test_sizes_of_eight_are_read_and_stored_sixteen_bytes_at_a_time():
    """Inverse in the last: of an odd k no two numbers lie at a multiple of four bytes in every row."""
    split = "pointer 16x32x256 warps=4 stages=4 group=1 swap split"
    work = [Job("matmul", shape, "bfloat16", schedule, 90) for shape, schedule in (
        ("N=1000,K=1016", split), ("N=1000,K=1016", "tma 128x128x64 warps=8 stages=4 group=8"),
        ("N=1000,K=1016", "hopper 128x128x64 warps=8 stages=4 group=8 persistent store"),
        ("N=1000,K=1020", split), ("N=1000,K=1017", split))]
    codes = compile_ahead(work)
    reads = [re.findall(r"cp\.async\.c[ag]\.shared\.global .*?, 0x(\w+), ", code.ptx) for code in codes]
    assert set(reads[0]) == {"10"} and not reads[4] and set(reads[3]) == {"8"}
    assert [min(code.global_loads, default=16) for code in codes] == [16, 16, 16, 16, 2]
    for code in codes[1:3]:
        assert "st.global.v4.b32" in code.ptx and "st.global.b16" not in code.ptx


TALL = Schedule("tma", 256, 128, 64, warps=8, stages=4, group=16, persistent=True, flatten=True)


LESS, WIDE = replace(TALL, stages=3), replace(TALL, block_m=128, block_n=256)


@needs_triton
@pytest.mark.parametrize("n, s, room", [(5003, TALL, False), (5002, TALL, True), (5003, LESS, True),
                                        (5003, WIDE, True)])
def test_results_of_an_odd_n_need_room(n, s, room):
    p, form = product(2300, n, 4104), Form.of(n, 4104, 2300, torch.bfloat16)
    assert bool(suits(Sizes.of(s), form)) == room
    if room:
        assert len(steps(s, p)) == 1
    else:
        with pytest.raises(Unsuitable, match="no room for results of an odd N"):
            steps(s, p)


@needs_compiler
def test_the_room_is_what_a_compiler_takes():
    less, wide = compile_ahead([Job("matmul", "N=5003,K=4104", "bfloat16", str(s), 90, tokens=2300)
                                for s in (LESS, WIDE)])
    assert TALL.shared_bytes + less.shared_bytes - LESS.shared_bytes > SHARED  # the tiles, and what is beyond them
    assert max(less.shared_bytes, wide.shared_bytes) <= SHARED


# on a GPU


EDGES = [(1000, 1016), (1000, 1001), (130, 4100), (8, 4096), (1, 2050), (128, 4096), (2050, 1030), (517, 1537)]
WAYS = """
pointer 64x64x64 warps=4 stages=4 group=8
pointer 16x32x256 warps=4 stages=4 group=1 swap
pointer 64x64x64 warps=4 stages=4 group=8 split
tma 64x16x64 warps=4 stages=4 group=8 split
tma 128x128x64 warps=8 stages=4 group=8 split reduce
hopper 128x128x64 warps=8 stages=4 group=8 persistent store
hopper 64x64x64 warps=4 stages=6 group=8 persistent split reduce
hopper 128x256x64 warps=8 stages=3 group=8 persistent
"""


@pytest.mark.gpu
@pytest.mark.parametrize("n, k", EDGES)
def test_edges_have_the_trusted_schedules_bits(n, k):
    for m, kind in every((1, 77, 300), ("cancellation", "signed_zero", "wide")):
        x, weight = (adversarial(kind, rows, k, torch.bfloat16, HERE, rows) for rows in (m, n))
        x[0, -1], x[m // 2, 0] = NAN, INF
        wanted = OP.run_schedule(TRUSTED, x, weight)
        assert same_bits(wanted[:1, :4], specified(x[:1], weight[:4], None, order(n, k)))
        for line in WAYS.strip().splitlines():
            p = Product.of(x, weight, None, None)
            schedule = replace(Schedule.parse(line), copy=True)
            if p.cut or not schedule.split:
                assert same_bits(OP.run_schedule(schedule, x, weight), wanted), (m, kind, line)
        assert same_bits(OP.triton(x, weight), wanted)


ONE_TILE = ("pointer 64x16x64 warps=4 stages=2 group=1", "pointer 64x16x64 warps=4 stages=2 group=1 swap",
            "tma 64x16x64 warps=4 stages=2 group=1 copy", "tma 64x16x64 warps=4 stages=2 group=1 persistent store copy",
            "hopper 64x16x64 warps=4 stages=4 group=1 persistent copy")


@needs_compiler
def test_a_bias_is_added_behind_the_tensor_core_where_k_is_one():
    work = [Job("matmul", f"N={n},K=1,bias", "bfloat16", s, 90, second="copy" in s) for s in ONE_TILE for n in (64, 66)
            if n == 64 or "store" not in s]  # which asks for rows of whole 16 bytes
    for code in compile_ahead(work):
        assert code.float_adds >= 64 * 16 // 128, code.job  # one of every sum, in 128 threads


@pytest.mark.gpu
@pytest.mark.parametrize("n", [128, 130, 131])
def test_a_bias_is_added_behind_the_tensor_core_where_k_is_one_on_a_gpu(n):
    x, weight = (adversarial("wide", rows, 1, torch.bfloat16, HERE, rows) for rows in (300, n))
    bias = OP.inputs(1, f"N={n},K=1,bias", torch.bfloat16, HERE)[2]
    wanted = specified(x.cpu(), weight.cpu(), bias.cpu(), order(n, 1))
    for s in (TRUSTED, *(Schedule.parse(line) for line in ONE_TILE if n == 128 or "store" not in line)):
        assert same_bits(OP.run_schedule(s, x, weight, bias).cpu(), wanted), s
    assert same_bits(OP.triton(x, weight, bias).cpu(), wanted)


@pytest.mark.gpu
def test_a_trees_schedules_read_copies_too():
    x, weight, _ = OP.inputs(200, "N=96,K=1001", torch.bfloat16, HERE)
    tree = shared_order(96, 1001)
    wanted = OP.run_schedule(TRUSTED, x, weight, None, tree)
    assert isinstance(tree, Tree) and same_bits(OP.triton(x, weight, None, tree), wanted)
    plan = Plan(x, weight, None, tree)
    assert any(s.copy for s in plan.wanted)
