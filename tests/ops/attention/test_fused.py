"""Kinds blocks and spread in one launch: the specification's bits, from counters that are zero before and after."""
import ctypes
from functools import partial
from operator import itemgetter

import pytest
import torch
from common import needs_triton
from hypothesis import given, settings
from hypothesis import strategies as st
from made import batch, one

from kernels import runtime
from kernels.bits import same_bits
from kernels.ops.attention import Sequences, attention_decode, fused, ready
from kernels.ops.attention import schedule as schedules
from kernels.ops.attention.call import Attention, Plan, launches
from kernels.ops.attention.form import Form
from kernels.ops.attention.order import specified
from kernels.ops.attention.schedule import Schedule
from kernels.ops.matmul.counters import COUNTERS, Counters

SMALL = 256  # keys a leaf, which the interpreter can wait for
CALL = Attention("attention_of_small_fused_leaves", SMALL)
SPLIT = Schedule("blocks", 16, 4, 2, 4, True), Schedule("spread", 16, 2, 2, 2, True)  # other shares and parts
interpreted = pytest.mark.skipif(runtime.where() != "INTERPRETER", reason="it reads what Triton's interpreter leaves")
every_fused = pytest.mark.parametrize("schedule", [*schedules.FUSED, *SPLIT], ids=str)


def memory_of(schedule, q, k, v, sequences, window, counters, leaf=SMALL):
    """(the launch, what its pointers point to) in the interpreter, with counters of ours."""
    form = Form.of(q.float(), k.float(), v.float(), sequences, window, True, adder="bfloat16")
    (step,), work = launches(schedule, form, sequences, leaf)
    assert fused.counters(schedule, form, work) <= len(counters)
    pages = work.tiles if sequences.table is None else sequences.put(sequences.table)
    return step, {"q_ptr": q.float(), "k_ptr": k.float(), "v_ptr": v.float(), "pages_ptr": pages,
                  "leaves_ptr": work.leaves, "part_ptr": torch.full((max(step.leaves, 1),), float("nan")),
                  "counter_ptr": counters, "o_ptr": torch.empty(q.shape), "lse_ptr": torch.empty(q.shape[:2])}


ONE_LEAF = batch([one(200, 2, 1, 8)], [(197, 200)], capacity=300)
EDGE = batch([one(700, 2, 1, 5)], [(510, 514)], 100)  # rows on both sides of a leaf's edge, in pages
TWO = batch([one(300, 2, 1, 8), one(257, 2, 1, 8)], [(299, 300), (254, 257)])
MANY = batch([one(n, 2, 1, 8, seed=n) for n in (*range(20, 53), 130)], [(n - 1, n) for n in (*range(20, 53), 130)])


@interpreted
@every_fused
def test_calls_in_a_row_share_counters_which_each_leaves_at_zero(schedule):
    counters = torch.zeros(64, dtype=torch.int32)
    for given_, window in ((EDGE, 0), (ONE_LEAF, 0), (TWO, 150), (EDGE, 0)):
        step, memory = memory_of(schedule, *given_, window, counters)
        step.interpret(memory)
        wanted = specified(*given_, window, True, leaf=SMALL)
        assert same_bits((memory["o_ptr"].bfloat16(), memory["lse_ptr"]), wanted)
        assert not counters.any()


@interpreted
@pytest.mark.parametrize("schedule", [Schedule("blocks", 16, 4, 1, 1, True), schedules.FUSED[1]], ids=str)
def test_lines_of_no_rows_count_nothing(schedule):
    """35 leaves of 128 keys, of which one sequence has two, and a line that fills them up to 36."""
    around = torch.full((192,), 7, dtype=torch.int32)
    counters = around[32:160].zero_()
    step, memory = memory_of(schedule, *MANY, 0, counters, leaf=128)
    step.interpret(memory)
    assert same_bits(memory["o_ptr"].bfloat16(), specified(*MANY, leaf=128)) and not counters.any()
    assert (around[:32] == 7).all() and (around[160:] == 7).all()
    assert (memory["leaves_ptr"][:, 2] == 0).any()


@needs_triton
@settings(deadline=None, max_examples=5)
@given(st.data())
def test_fused_schedules_are_the_specification(data):
    heads, kv_heads = data.draw(st.sampled_from([(1, 1), (4, 2), (3, 1)]))
    dtype, width = data.draw(st.sampled_from([torch.bfloat16, torch.float16])), data.draw(st.sampled_from([5, 64, 70]))
    window, page = data.draw(st.sampled_from([0, 1, 150, 600])), data.draw(st.sampled_from([None, 16, 100]))
    ends = data.draw(st.lists(st.sampled_from([1, 129, 255, 256, 257, 300, 513]), min_size=1, max_size=2))
    spans = [(end - min(end, data.draw(st.sampled_from([0, 1, 3]))), end) for end in ends]
    given_ = batch([one(end, heads, kv_heads, width, dtype, seed=i) for i, end in enumerate(ends)], spans, page)
    schedule = data.draw(st.sampled_from([*schedules.FUSED, *SPLIT]))
    wanted = specified(*given_, window, True, leaf=SMALL)
    assert same_bits(CALL.run_schedule(schedule, *given_, window, True), wanted)


@needs_triton
@pytest.mark.parametrize("schedule", schedules.FUSED, ids=str)
def test_more_than_eight_leaves_are_joined_in_their_order(schedule):
    given_ = batch([one(1200, 2, 1, 5)], [(1151, 1153)])
    call = Attention(f"attention_of_{schedule.kind}_fused_of_one_block", 128)
    assert same_bits(call.run_schedule(schedule, *given_, 0, True), specified(*given_, 0, True, leaf=128))


@needs_triton
def test_a_program_waits_for_programs_of_lower_numbers_alone():
    """A tile's scores come before its values: programs in their order find every counter where they want it."""
    step, memory = memory_of(schedules.FUSED[0], *TWO, 0, torch.zeros(64, dtype=torch.int32))
    made, leaves = step.scalars["scores"], step.scalars["leaves"]
    parts, pieces = step.constants["PARTS"], SMALL // step.constants["PIECE"]
    assert made == leaves * pieces and step.programs == made + leaves * parts
    waits = {made + leaf * parts + part: range(leaf * pieces, (leaf + 1) * pieces)
             for leaf in range(leaves) for part in range(parts)}
    assert [*waits] == [*range(made, step.programs)] and all(max(of) < who for who, of in waits.items())


@needs_triton
def test_more_counters_than_a_stream_has_are_refused():
    q, k = (torch.empty(700, *size, 64, dtype=torch.bfloat16, device="meta") for size in ((32,), (600, 8)))
    sequences = Sequences([1] * 700, [600] * 700)
    plan = Plan(CALL, *batch([one(6, 4, 2, 8)], [(5, 6)]), 0, False, schedules.FUSED[0])
    with pytest.raises(ValueError, match=rf"at most {Counters.SLICE} counters, these sequences need \d+"):
        plan._ready_to_launch(schedules.FUSED[0], Form.of(q, k, k, sequences, 0, False), sequences)


@needs_triton
@pytest.mark.parametrize("left", [4096, 0])
def test_a_call_counts_in_its_streams_counters_or_in_zeros_of_its_own(left, monkeypatch):
    """0: a graph is captured, and no counters are left."""
    given_, schedule = batch([one(600, 4, 2, 8)], [(599, 600)]), schedules.FUSED[0]
    form = Form.of(*given_, 0, False)
    made = Plan(CALL, *given_, 0, False, schedule)._ready_to_launch(schedule, form, given_[3])
    asked, seen = [], []
    monkeypatch.setattr(ready, "current_stream", lambda index: 77)
    monkeypatch.setattr(COUNTERS, "take", lambda *asks: asked.append(asks) or left)
    names = itemgetter("counter_ptr", "part_ptr")
    count = made.counters

    def launch(low, address, part):
        seen.append((address, part, [] if left else [*(ctypes.c_int32 * count).from_address(address)]))
    made.launches = [(launch, names)]
    made(16, 32, 48, 64, 80, torch.device("cpu", 0))
    assert asked == [(0, 77, count)] and count == 3 * 2 * (1 + 4)  # leaves x heads of k, for scores and four shares
    (address, part, held), = seen
    assert part and address != part and (address == left if left else address and held == [0] * count)


@pytest.mark.parametrize("given_", [dict(kind="walk", fused=True), dict(kind="spread", fused=1)])
def test_what_cannot_be_fused_is_named(given_):
    with pytest.raises(ValueError, match="fused must be True or False"):
        Schedule(**given_)


# on a GPU


def few(context, requests=2):
    return attention_decode.inputs(requests, f"H=8,KV=2,D=128,context={context}", torch.bfloat16, "cuda")


def counters_are_zero() -> bool:
    torch.cuda.synchronize()
    return all(not bank[0].any() for bank in COUNTERS.banks.values())


@pytest.mark.gpu
@every_fused
def test_calls_that_feed_each_other_on_many_streams_on_a_gpu(schedule):
    run = partial(attention_decode.run_schedule, schedule)
    for context in (700, 3000):
        q, k, v, s = few(context)

        def fed(run, x, k=k, v=v, s=s):
            for _ in range(20):
                x = run(x, k, v, s)
            return x
        wanted = fed(specified, q)
        streams = [torch.cuda.Stream() for _ in range(4)]
        torch.cuda.synchronize()
        found = []
        for stream in streams * 10:
            with torch.cuda.stream(stream):
                found.append(fed(run, q))
        torch.cuda.synchronize()
        assert all(same_bits(y, wanted) for y in found) and counters_are_zero()


@pytest.mark.gpu
@every_fused
def test_a_graph_of_many_calls_replays_the_same_bits_on_a_gpu(schedule):
    run = partial(attention_decode.run_schedule, schedule)
    for context in (700, 3000):
        static = few(context)
        run(*static)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = [run(*static) for _ in range(30)]
        for seed in range(20):
            fresh = attention_decode.inputs(2, f"H=8,KV=2,D=128,context={context}", torch.bfloat16, "cuda", seed)
            for place, numbers in zip(static[:3], fresh[:3], strict=True):
                place.copy_(numbers)
            graph.replay()
            wanted = specified(*fresh)
            assert all(same_bits(y, wanted) for y in captured)
        assert counters_are_zero()


@pytest.mark.gpu
@every_fused
def test_fused_schedules_are_the_specification_on_a_gpu(schedule):
    """More programs than a GPU holds at a time, among them; lengths, pages and windows as they come."""
    for requests, lengths, page, window in ((40, (100, 1024, 3000), None, 0), (3, (1, 1025, 5000), 16, 0),
                                            (4, (2047, 2500), None, 1500), (1, (8192,), 64, 0)):
        whole = [one(lengths[i % len(lengths)], 8, 2, 128, seed=i) for i in range(requests)]
        spans = [(len(w[0]) - 1, len(w[0])) for w in whole]
        given_ = batch(whole, spans, page)
        wanted = specified(*given_, window, True)
        for _ in range(20):
            assert same_bits(attention_decode.run_schedule(schedule, *given_, window, True), wanted)
    assert counters_are_zero()
