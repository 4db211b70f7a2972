"""Attention's kernels: the specification's bits from every schedule, in the interpreter or on a GPU; and the calls."""
from functools import cache, partial

import pytest
import torch
from common import HERE, INF, NAN, both, needs_triton
from hypothesis import given, settings
from hypothesis import strategies as st
from made import batch, one

from kernels.bits import check_invariance, digest, same_bits
from kernels.ops.attention import Sequences, attention_chunk, attention_decode, attention_prefill, choice, join
from kernels.ops.attention import schedule as schedules
from kernels.ops.attention.call import Attention, Plan, launches
from kernels.ops.attention.form import Form
from kernels.ops.attention.order import LEAF, specified
from kernels.ops.attention.schedule import Schedule
from kernels.ops.attention.work import work_of

pytestmark = pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")  # NumPy's, of a row of NaN
SMALL = 256  # keys a leaf, which the interpreter can wait for
CALL = Attention("attention_of_small_leaves", SMALL)
OPS = (attention_decode, attention_prefill, attention_chunk)
every_op = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
every_schedule = pytest.mark.parametrize("schedule", schedules.tested(), ids=str)
WALK, SPREAD = Schedule("walk", 16, 4, 3), Schedule("spread", 16, 4, 3)
ON_HOPPER = schedules.HOPPER, schedules.HOPPER_FEW, schedules.HOPPER_MANY


def small(*arguments):
    return specified(*arguments, leaf=SMALL)


@needs_triton
@every_schedule
def test_every_schedule_is_the_specification(schedule):
    """Two heads on one, on both sides of a leaf's edge; NaN and Inf wherever no key lies."""
    given_ = batch([one(260, width=16)], [(250, 260)], capacity=300)
    assert same_bits(CALL.run_schedule(schedule, *given_, 0, True), small(*given_, 0, True))


@needs_triton
@pytest.mark.parametrize(("stages", "parts"), [(1, 1), (2, 4), (4, 8)])
def test_scores_made_by_a_launch_of_their_own_keep_the_bits(stages, parts):
    """One leaf, whose result is the second launch's, and two; pages, a window, columns that are not there."""
    schedule = Schedule("blocks", 16, 4, stages, parts)
    for given_, window in ((batch([one(200, width=16)], [(197, 200)], capacity=300), 0),
                           (batch([one(300, 4, 2, 5), one(257, 4, 2, 5)], [(299, 300), (254, 257)], 100), 150)):
        assert same_bits(CALL.run_schedule(schedule, *given_, window, True), small(*given_, window, True))


@needs_triton
@pytest.mark.parametrize(("leaves", "joined"), [(1, 1), (2, 4), (8, 2)])
def test_leaves_loaded_together_are_joined_in_their_order(leaves, joined, monkeypatch):
    """Rows of one program that see one leaf more than others, and fewer leaves than are loaded at once."""
    monkeypatch.setattr(join, "batch_and_rows", lambda work, kv_heads: (leaves, joined))
    call = Attention(f"attention_joined_{leaves}_{joined}", 128)
    given_ = batch([one(300, 4, 2, 5), one(515, 4, 2, 5)], [(299, 300), (510, 515)])
    for window in (0, 150):
        wanted = specified(*given_, window, True, leaf=128)
        assert same_bits(call.run_schedule(SPREAD, *given_, window, True), wanted)


@pytest.mark.parametrize(("queries", "keys", "rows", "wanted"), [
    ([1], [9000], 64, (8, 1)), ([1, 1], [300, 65536], 64, (16, 1)), ([64], [4160], 64, (8, 1)),
    ([128], [4224], 128, (8, 4)), ([256], [65536], 128, (16, 4)), ([1] * 100, [2000] * 100, 16, (8, 1)),
    ([1] * 128, [2000] * 128, 16, (8, 4))])
def test_how_many_leaves_and_rows_are_joined_together(queries, keys, rows, wanted):
    """32 heads on 8: four rows a program where there are many, sixteen leaves at once if one sequence has many."""
    assert join.batch_and_rows(work_of(Sequences(queries, keys), rows, 4, 0, True, LEAF), 8) == wanted


def test_a_program_joins_no_more_rows_than_a_tile_has():
    work = work_of(Sequences([1] * 600, [2000] * 600), 16, 1, 0, True, LEAF)
    assert join.batch_and_rows(work, 8) == (8, 1)


@needs_triton
def test_launches_are_kept_under_all_that_shapes_them():
    """64 sequences of four leaves and 256 of one have as many leaves, and are joined by as many programs."""
    plan = Plan(CALL, *good().values(), SPREAD)
    for count, keys in ((64, 4 * SMALL), (256, SMALL)):
        q, k = (torch.empty(count, *size, 64, dtype=torch.bfloat16, device="meta") for size in ((32,), (keys, 8)))
        sequences = Sequences([1] * count, [keys] * count)
        form = Form.of(q, k, k, sequences, 0, False)
        ready = plan._ready_to_launch(SPREAD, form, sequences)
        assert [launch.step for launch, _ in ready.launches] == launches(SPREAD, form, sequences, SMALL)[0]


@needs_triton
@settings(deadline=None, max_examples=5)
@given(st.data())
def test_triton_is_the_specification(data):
    heads, kv_heads = data.draw(st.sampled_from([(1, 1), (4, 2), (3, 1)]))
    dtype, width = data.draw(st.sampled_from([torch.bfloat16, torch.float16])), data.draw(st.sampled_from([5, 64, 70]))
    window, page = data.draw(st.sampled_from([0, 1, 150])), data.draw(st.sampled_from([None, 16, 100]))
    ends = data.draw(st.lists(st.sampled_from([1, 2, 127, 128, 129, 255, 256, 257, 300]), min_size=1, max_size=2))
    spans = [(end - min(end, data.draw(st.sampled_from([0, 1, 3]))), end) for end in ends]
    given_ = batch([one(end, heads, kv_heads, width, dtype, seed=i) for i, end in enumerate(ends)], spans, page)
    schedule = data.draw(st.sampled_from([WALK, SPREAD]))
    assert same_bits(CALL.run_schedule(schedule, *given_, window, True), small(*given_, window, True))


@needs_triton
@pytest.mark.parametrize(("page", "window", "queries"), [(None, 0, 1), (16, 0, 3), (None, 20, 3), (100, 150, 1)])
def test_a_newest_block_of_few_keys_keeps_the_bits(page, window, queries):
    """Alone in its leaf, in front of others, or alone of all: up to 32 keys are multiplied as 32, others as 128."""
    ends = [1, 15, 17, 32, 33, 129, 160, 161, SMALL, SMALL + 1, SMALL + 33, 2 * SMALL + 2]
    given_ = batch([one(n, 2, 1, 24, seed=n) for n in ends], [(n - min(n, queries), n) for n in ends], page)
    for schedule in (WALK, Schedule("walk", 16, 4, 2)):
        assert same_bits(CALL.run_schedule(schedule, *given_, window, True), small(*given_, window, True))


@needs_triton
def test_every_way_to_compute_a_sequence_gives_one_digest():
    whole, call = one(140, width=8), Attention("attention_of_leaves_of_one_block", 128)
    wanted = digest(specified(*batch([whole], [(0, 140)]), leaf=128))
    ways = {"whole": [(Schedule("walk", 128, 8, 2), [(0, 140)], {})],
            "chunks": [(Schedule("walk", 64, 4, 2), [(0, 100)], {}), (Schedule("spread", 64, 4, 2), [(100, 140)], {})],
            "pages and decode": [(Schedule("walk", 64, 4, 1), [(0, 60), (60, 126)], {"page_size": 16}),
                                 (SPREAD, [(i, i + 1) for i in (126, 127, 128)], {"page_size": 16}),
                                 (WALK, [(129, 140)], {})]}
    for name, parts in ways.items():
        found = [call.run_schedule(s, *batch([whole] * len(spans), spans, **kind)) for s, spans, kind in parts]
        assert digest(torch.cat(found)) == wanted, name


@needs_triton
def test_a_score_that_is_no_number_and_a_row_that_sees_nothing():
    q, k, v = one(200, 1, 1, 8)
    q, k = q.abs() + 1, k.clone()
    k[:150], k[180, 0, 0], k[190] = -INF, NAN, INF
    given_ = batch([(q, k, v)], [(145, 200)])
    for schedule in (WALK, SPREAD):
        y, lse = found = CALL.run_schedule(schedule, *given_, 0, True)
        assert same_bits(found, small(*given_, 0, True))
        assert not y[:5].any() and (lse[:5] == -INF).all() and y[5:35].isfinite().all() and y[35:].isnan().all()


@needs_triton
def test_strides_are_followed_and_odd_ones_copied():
    q, k, v, s = batch([one(130, 2, 2, 8)], [(127, 130)])
    wanted = small(q, k, v, s)
    both_ = torch.cat([k, v], 2)  # keys and values side by side, as a model's cache has them
    turned = k.transpose(1, 3).contiguous().transpose(1, 3)
    wide = torch.cat([q, q], 2)[:, :, :8]
    for keys, values in (both_.chunk(2, 2), (turned, v)):
        assert same_bits(CALL.run_schedule(WALK, wide, keys, values, s), wanted)


# what the calls take and refuse


def good():
    q, k, v, s = batch([one(6, 4, 2, 8), one(4, 4, 2, 8)], [(4, 6), (3, 4)])
    return {"q": q, "k": k, "v": v, "sequences": s, "window": 0, "lse": False}


def paged_good():
    q, k, v, s = batch([one(6, 4, 2, 8)], [(4, 6)], page_size=4)
    return {"q": q, "k": k, "v": v, "sequences": s}


def ones(*size, dtype=torch.bfloat16, device=HERE):
    return torch.ones(size, dtype=dtype, device=device)


BAD = {
    "no q": (dict(q=None), TypeError, "q .*NoneType"), "k a list": (dict(k=[[1.0]]), TypeError, "k .*list"),
    "float32": (dict(q=ones(3, 4, 8, dtype=torch.float32), k=ones(2, 6, 2, 8, dtype=torch.float32),
                     v=ones(2, 6, 2, 8, dtype=torch.float32)), TypeError, "q .*bfloat16 or float16.*float32"),
    "k of another dtype": (dict(k=ones(2, 6, 2, 8, dtype=torch.float16)), TypeError, "k .*bfloat16.*float16"),
    "v elsewhere": (dict(v=ones(2, 6, 2, 8, device="meta")), ValueError, "v .*meta"),
    "q of two dimensions": (dict(q=ones(3, 32)), ValueError, r"q .*\(T, H, D\), got \(3, 32\)"),
    "q too wide": (dict(q=ones(3, 4, 129)), ValueError, r"q .*128.*\(3, 4, 129\)"),
    "q without heads": (dict(q=ones(3, 0, 8)), ValueError, r"q .*\(3, 0, 8\)"),
    "k of another width": (dict(k=ones(2, 6, 2, 9)), ValueError, r"k .*Hkv, 8\).*\(2, 6, 2, 9\)"),
    "v of another shape": (dict(v=ones(2, 7, 2, 8)), ValueError, r"v .*\(2, 6, 2, 8\), got \(2, 7, 2, 8\)"),
    "heads that do not divide": (dict(k=ones(2, 6, 3, 8), v=ones(2, 6, 3, 8)), ValueError, "q .*3 heads, got 4"),
    "too many queries": (dict(q=ones(4, 4, 8)), ValueError, "q .*3 queries.*got 4"),
    "too few rows": (dict(k=ones(1, 6, 2, 8), v=ones(1, 6, 2, 8)), ValueError, r"k .*2 sequences, got shape \(1,"),
    "keys beyond the cache": (dict(k=ones(2, 5, 2, 8), v=ones(2, 5, 2, 8)), ValueError, "keys .*holds 5 a row, got 6"),
    "no sequences": (dict(sequences=None), TypeError, "sequences .*NoneType"),
    "sequences elsewhere": (dict(sequences=Sequences([2, 1], [6, 4], "meta")), ValueError, "sequences .*meta"),
    "a slot beyond": (dict(sequences=Sequences([2, 1], [6, 4], HERE, slots=[0, 2])), ValueError, "slots .*2, got 2"),
    "window negative": (dict(window=-1), ValueError, "window .*-1"), "window a bool": (dict(window=True), TypeError,
                                                                                       "window .*True"),
    "lse a number": (dict(lse=1), TypeError, "lse .*1")}


@cache
def called(name, implementation):
    """An implementation, with a plan kept for good input."""
    call = {op.name: op for op in OPS}[name].implementation(implementation)
    call(**good())
    return call


@both
@every_op
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(op, name, case):
    changes, error, message = BAD[case]
    call = called(op.name, name)
    with pytest.raises(error, match=message):
        call(**{**good(), **changes})


@both
@pytest.mark.parametrize(("sequences", "message"), [
    (([2], [6], HERE, [[0, 9]], 4), "pages .*4, got 9"), (([2], [6], HERE, [[0, 1, 2]], 2), "k .*pages of 2")])
def test_bad_pages_are_named(name, sequences, message):
    call = attention_decode.implementation(name)
    call(**paged_good())
    with pytest.raises(ValueError, match=message):
        call(**{**paged_good(), "sequences": Sequences(*sequences)})


@needs_triton
def test_a_schedule_of_another_op_is_refused():
    with pytest.raises(TypeError, match="Schedule of attention_decode, got str"):
        attention_decode.run_schedule("walk 16", **good())


@pytest.mark.parametrize(("text", "message"), [("walk 16", "schedule"), ("wade 16 warps=4 stages=2", "kind"),
                                               ("walk 24 warps=4 stages=2", "rows"), ("walk 16 warps=3 stages=2",
                                               "warps"), ("walk 16 warps=4 stages=2 parts=2", "parts")])
def test_a_schedule_is_checked(text, message):
    with pytest.raises(ValueError, match=message):
        Schedule.parse(text)


def test_schedules_are_lines_and_those_of_choice_are_tested():
    assert [Schedule.parse(str(s)) for s in schedules.tested()] == schedules.tested()
    for op, shape in zip(OPS, ("H=8,KV=2,D=64,context=5000", "H=8,KV=2,D=64", "H=8,KV=2,D=64,context=3000"),
                         strict=True):
        chosen = {op.schedule(n, shape, torch.bfloat16) for n in (1, 2, 9, 40, 300, 3000)}
        assert len(chosen) > 1 and chosen <= set(map(str, op.schedules(shape, torch.bfloat16)))


def test_a_small_gpu_gets_schedules_that_fit(monkeypatch):
    monkeypatch.setattr(choice, "is_small", lambda index: True)
    for op, tokens in ((attention_prefill, 1), (attention_prefill, 3000), (attention_decode, 2)):
        q, k, _, s = op.inputs(tokens, "H=8,KV=2,D=64,context=3000", torch.bfloat16, "meta")
        chosen = choice.choose(Form.of(q, k, k, s, 0, False), s)
        assert chosen.stages == 1 and chosen in schedules.tested()


def shares_on_hopper(monkeypatch, queries, keys, bulk=True, window=0, width=64, heads=32, page=None):
    """[(kind, which sequences)] of a call on sm_90 with 8 heads of keys."""
    monkeypatch.setattr(choice, "is_hopper", lambda index: True)
    monkeypatch.setattr(choice, "is_small", lambda index: False)
    q, k = (torch.empty(*s, width, dtype=torch.bfloat16, device="meta") for s in ((1, heads), (9, page or 8, 8)))
    pages = page and [range(-(-n // page)) for n in keys]
    form = Form.of(q, k, k, Sequences([1], [1], pages=page and [[0]], page_size=page), window, False)
    found = choice.shares(form, Sequences(queries, keys, pages=pages, page_size=page), 0, bulk)
    return [(schedule.kind, None if which is None else which.tolist()) for schedule, which in found]


def test_on_hopper_many_queries_walk_and_few_spread(monkeypatch):
    def kinds(*given, **named):
        return [kind for kind, _ in shares_on_hopper(monkeypatch, *given, **named)]
    assert kinds([4000], [4000]) == kinds([2000, 0, 3000], [2000, 50, 5000]) == kinds([4000], [4000], page=64) \
        == ["hopper"]
    assert kinds([5], [200]) == kinds([64], [9000]) == kinds([4] * 8, [8192] * 8) == kinds([5], [900], page=16) \
        == ["hopper_spread"]
    assert kinds([1] * 40, [5000] * 40) == kinds([1] * 128, [1025] * 128) == ["walk"]  # memory is busy anyway
    assert kinds([1] * 128, [1024] * 128) == kinds([1] * 8, [1025] * 8) == kinds([1] * 128, [1025] * 128, page=16) \
        == ["hopper_spread"]
    assert kinds([1] * 40, [5000] * 39 + [50000]) == ["hopper_spread"]
    for plain in (kinds([200], [200], bulk=False), kinds([200], [200], window=9), kinds([200], [200], width=68),
                  kinds([200], [200], page=24), kinds([1], [9000], heads=24), kinds([1] * 20, [3000] * 20, heads=24)):
        assert len(plain) == 1 and "hopper" not in plain[0]
    assert kinds([4000], [4000], heads=24) == ["hopper"]  # groups of three cannot be packed, heads alone can


def test_on_hopper_few_rows_on_few_leaves_have_scores_made_first(monkeypatch):
    """8 heads of keys and two leaves are 16 programs, where an H200 has 132. A leaf of few blocks is done sooner."""
    def kinds(*given, **named):
        return [kind for kind, _ in shares_on_hopper(monkeypatch, *given, **named)]
    assert kinds([1], [641]) == kinds([1], [2048]) == kinds([4], [900], page=16) == kinds([1, 2], [5, 641]) \
        == kinds([0, 1], [9000, 2000]) == ["blocks"]
    assert kinds([1], [2049]) == kinds([1, 1], [1025, 9]) == kinds([1] * 4, [1024] * 4) == kinds([5], [900]) \
        == ["hopper_spread"]
    assert kinds([1], [640]) == kinds([1, 2], [5, 640]) == kinds([0, 1], [9000, 512]) == kinds([4], [512], page=16) \
        == kinds([16], [200], heads=8) == ["hopper_spread"]


def test_on_hopper_a_mixed_batch_is_two_launches(monkeypatch):
    found = shares_on_hopper(monkeypatch, [1, 2000, 0, 1], [5000, 2000, 10, 3000])
    assert found == [("hopper", [False, True, False, False]), ("hopper_spread", [True, False, False, True])]


@both
@every_op
def test_gradients_are_refused(op, name):
    arguments = good()
    arguments["k"] = arguments["k"].requires_grad_()
    with pytest.raises(RuntimeError, match="no backward.*no_grad"):
        op.implementation(name)(**arguments)
    with torch.no_grad():
        assert not op.implementation(name)(**arguments).requires_grad


@needs_triton
def test_transforms_are_refused():
    arguments = good()
    with pytest.raises(RuntimeError, match="torch.func"):
        torch.func.vmap(lambda q: attention_decode.triton(q, *list(arguments.values())[1:4]))(arguments["q"][None])


@needs_triton
@every_op
def test_empty_calls_have_empty_results(op):
    cache = ones(1, 5, 2, 8)
    for s in (Sequences([0], [5], HERE), Sequences([0], [0], HERE)):
        y, lse = op.triton(ones(0, 4, 8), cache, cache, s, lse=True)
        assert y.shape == (0, 4, 8) and lse.shape == (0, 4) and lse.dtype == torch.float32
    assert op.triton(ones(0, 4, 8), cache[:0], cache[:0], Sequences([], [], HERE)).shape == (0, 4, 8)


@pytest.mark.parametrize("op", [attention_chunk], ids=lambda op: op.name)  # the three share one call
def test_torch_compile_keeps_the_bits(op, monkeypatch):
    monkeypatch.undo()
    torch._dynamo.reset()
    given_ = op.inputs(3, "H=2,KV=1,D=8,context=9")
    for name in ("python", "triton"):
        compiled = torch.compile(partial(op.implementation(name), lse=True), fullgraph=True, backend="aot_eager")
        assert same_bits(compiled(*given_), op.python(*given_, lse=True))
        other = op.take(given_, slice(0, 2))
        assert same_bits(compiled(*other), op.python(*other, lse=True))


@every_op
def test_the_default_computes_the_same_attention(op):
    for n, shape, window in ((5, "H=4,KV=2,D=16,context=40", 0), (1, "H=4,KV=2,D=16,context=40", 7)):
        q, k, v, s = op.inputs(n, shape, torch.float16)
        assert torch.allclose(op.cuda(q, k, v, s, window), op.python(q, k, v, s, window), atol=2e-3, rtol=2e-3)
    q, k, v, s = batch([one(40, 4, 2, dtype=torch.float16), one(9, 4, 2, dtype=torch.float16, seed=5)],
                       [(33, 40), (8, 9)])
    k, v = k.nan_to_num(0, 0, 0), v.nan_to_num(0, 0, 0)
    assert torch.allclose(op.cuda(q, k, v, s), op.python(q, k, v, s), atol=2e-3, rtol=2e-3)
    q, k, v, s = batch([one(40, 4, 2, dtype=torch.float16)] * 2, [(39, 40), (21, 22)], 16)
    assert torch.allclose(op.cuda(q, k, v, s), op.python(q, k, v, s), atol=2e-3, rtol=2e-3)


@every_op
def test_work_is_counted(op):
    work = op.work(3, "H=4,KV=2,D=8,context=5", torch.bfloat16)
    pairs = {"attention_decode": 3 * 5, "attention_prefill": 3 * 5 + 6, "attention_chunk": 3 * 5 + 6}[op.name]
    keys = {"attention_decode": 15}.get(op.name, 8)
    assert work.flops == 4 * pairs * 4 * 8 and work.bytes == 2 * 8 * (2 * 3 * 4 + 2 * keys * 2)


# on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("schedule", [*schedules.tested(), *ON_HOPPER], ids=str)
def test_every_schedule_is_the_specification_on_a_gpu(schedule):
    if schedule in ON_HOPPER and not schedules.is_hopper(torch.cuda.current_device()):
        pytest.skip("this GPU is not of sm_90")
    whole = [one(n, 8, 2, 128, seed=n) for n in (2500, 1100, 700)]
    given_ = batch(whole, [(2499, 2500), (1040, 1100), (200, 700)], capacity=2600)
    assert same_bits(attention_decode.run_schedule(schedule, *given_, 0, True), specified(*given_, 0, True))


@pytest.mark.gpu
@settings(deadline=None, max_examples=30)
@given(st.data())
def test_triton_is_the_specification_on_a_gpu(data):
    heads, kv_heads, width = data.draw(st.sampled_from([(8, 2, 128), (6, 2, 80), (4, 1, 64)]))
    window, page = data.draw(st.sampled_from([0, 0, 700])), data.draw(st.sampled_from([None, 16, 100]))
    edges = [e + d for e in (128, 1024, 2048) for d in (-1, 0, 1)]
    ends = data.draw(st.lists(st.one_of(st.sampled_from(edges), st.integers(1, 3300)), min_size=1, max_size=5))
    spans = [(end - min(end, data.draw(st.sampled_from([0, 1, 4, 16, 100]))), end) for end in ends]
    given_ = batch([one(end, heads, kv_heads, width, seed=i) for i, end in enumerate(ends)], spans, page)
    wanted = specified(*given_, window, True)
    hopper = [s for s in ON_HOPPER if schedules.is_hopper(torch.cuda.current_device()) and not window and page != 100
              and (s.kind == "hopper" or heads != 6)]
    for schedule in (WALK, SPREAD, Schedule("walk", 128, 8, 2), *hopper):
        assert same_bits(attention_decode.run_schedule(schedule, *given_, window, True), wanted), str(schedule)
    assert same_bits(attention_decode.triton(*given_, window, True), wanted)


@pytest.mark.gpu
def test_prefill_chunks_and_decode_are_one_on_a_gpu():
    given_ = attention_prefill.inputs(3000, "H=8,KV=2,D=128", torch.bfloat16, "cuda")
    rows = [slice(a, a + 1) for a in (0, 127, 128, 1023, 1024, 2999)] + [slice(0, 700), slice(700, 1800)]
    report = check_invariance(attention_prefill.triton, given_, attention_prefill.per_token, rows)
    assert report, str(report)
    few = torch.tensor([0, 1, 500, 1023, 1024, 2500])
    here = attention_prefill.inputs(3000, "H=8,KV=2,D=128", torch.bfloat16, "cpu")
    assert same_bits(attention_prefill.triton(*given_)[few],
                     attention_prefill.python(*attention_prefill.take(here, few)))


@pytest.mark.gpu
def test_a_graph_replays_the_same_bits_on_a_gpu():
    static = attention_decode.inputs(4, "H=8,KV=2,D=128,context=3000", torch.bfloat16, "cuda")
    attention_decode.triton(*static)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attention_decode.triton(*static)
    for seed in (3, 6):
        fresh = attention_decode.inputs(4, "H=8,KV=2,D=128,context=3000", torch.bfloat16, "cuda", seed)
        for place, numbers in zip(static[:3], fresh[:3], strict=True):
            place.copy_(numbers)
        graph.replay()
        assert same_bits(captured, specified(*fresh))


@pytest.mark.gpu
def test_a_capture_without_tables_is_refused_on_a_gpu():
    arguments = attention_decode.inputs(2, "H=8,KV=2,D=128,context=1234", torch.bfloat16, "cuda")
    with pytest.raises(RuntimeError, match="once before a graph"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        attention_decode.triton(*arguments)


@pytest.mark.gpu
def test_calls_that_feed_each_other_and_streams_on_a_gpu():
    q, k, v, s = attention_decode.inputs(4, "H=8,KV=2,D=128,context=3000", torch.bfloat16, "cuda")

    def fed(run, x):
        for _ in range(20):
            x = run(x, k, v, s)
        return x
    wanted = fed(specified, q)
    assert all(same_bits(fed(attention_decode.triton, q), wanted) for _ in range(20))
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    found = []
    for stream in streams * 5:
        with torch.cuda.stream(stream):
            found.append(fed(attention_decode.triton, q))
    torch.cuda.synchronize()
    assert all(same_bits(y, wanted) for y in found)
