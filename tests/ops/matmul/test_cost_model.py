"""The model of time: what it chooses can be carried out, what it knows is data, and it costs nothing to ask."""
import itertools
import json
import time
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernels import matmul, runtime, tables
from kernels.lab import provenance
from kernels.lab.tuning import cost_design as design
from kernels.op import DTYPES
from kernels.ops.matmul import choice, copies, cost, op, plan, schedule, trial
from kernels.ops.matmul.order import order
from kernels.ops.matmul.plan import Plan
from kernels.ops.matmul.product import Product
from kernels.ops.matmul.schedule import SHARED, Schedule, rule
from kernels.ops.matmul.steps import steps
from kernels.ops.matmul.ways import Form, Sizes, suits, unevenness, units, variants

TABLED = Schedule("pointer", 16, 32, 128, warps=4, stages=4, group=1, swap=True, split=True)
FORM = Form.of(5376, 2816, 200, torch.bfloat16)


def written(folder, name="h200", **changes):
    """The rough model as a GPU's file."""
    tiles = {name: {str(s): [float(v) for v in tile] for s, tile in design.rough_tiles(DTYPES[name]).items()}
             for name in ("bfloat16", "float32")}
    text = json.dumps({"rates": design.ROUGH._asdict(), "tiles": tiles, **changes})
    (folder / f"{name}_cost.json").write_text(text)


@pytest.fixture
def on_an_h200(monkeypatch, tmp_path):
    """GPU 0 is an H200 whose tables are in tmp_path."""
    monkeypatch.setattr(tables, "FOLDER", tmp_path)
    monkeypatch.setattr(tables, "slug", lambda index: "h200")
    for module in (schedule, choice):
        monkeypatch.setattr(module, "gpu", lambda index: ((9, 0), 132) if index >= 0 else ((0, 0), 1))
    forget()
    yield tmp_path
    forget()


def forget():
    tables.forget()
    cost.quantities.cache_clear()


# which schedules


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(n=st.integers(1, 70_000), k=st.integers(1, 20_000), tokens=st.integers(1, 20_000),
       dtype=st.sampled_from(list(DTYPES.values())))
def test_what_it_expects_to_be_fast_can_be_carried_out(n, k, tokens, dtype, on_an_h200):
    written(on_an_h200)
    form = Form.of(n, k, tokens, dtype)
    found = cost.best(form, 10, 0)
    assert found and len(set(found)) == len(found) <= 10
    p = Product(tokens, n, k, dtype, (k, 1), (k, 1), order(n, k), False)
    for s in found:
        assert s.kind == "pointer" or form.bulk
        assert s.shared_bytes * dtype.itemsize // 2 + (s.waiting_bytes if p.cut and not s.split else 0) <= SHARED
        assert p.carried_out(s) == s  # no switch that says nothing
        assert not runtime.HAS_TRITON or steps(s, p)
    first = copies.offered(p, choice.choose("matmul", f"N={n},K={k}", dtype, tokens, 0))[:choice.EXPECTED]
    assert not runtime.HAS_TRITON or all(steps(s, p) for s in first)


def test_the_fastest_comes_first(on_an_h200):
    written(on_an_h200)
    known, found = cost.quantities(0), cost.best(FORM, 1000, 0)
    ways = known.ways["bfloat16"]
    us = dict(zip(ways.schedules, cost.predicted(ways, FORM, known.rates), strict=True))
    times = [us[s] for s in found]
    assert times == sorted(times) and cost.best(FORM, 1, 0) == found[:1]
    assert times[0] == min(us[s] for s in us if suits(Sizes.of(s), FORM))


def test_every_way_is_a_schedule_of_its_tile():
    tiles = [*design.rough_tiles(torch.bfloat16), *design.rough_tiles(torch.float32)]
    ways = list(itertools.chain.from_iterable(map(variants, tiles)))
    assert len(set(ways)) == len(ways) and {Schedule.parse(str(s)) for s in ways} == set(ways)
    assert set(tiles) <= set(ways)


def test_nothing_is_chosen_where_there_is_nothing_to_multiply(on_an_h200):
    written(on_an_h200)
    for empty in ({"n": 0}, {"k": 0}, {"tokens": 0}):
        assert cost.best(FORM._replace(**empty), 3, 0) == []


# the time of a call


def test_more_work_takes_longer(on_an_h200):
    written(on_an_h200)
    known = cost.quantities(0)
    ways = known.ways["bfloat16"]

    def us(**changes):
        return cost.predicted(ways, FORM._replace(segments=1, length=FORM.k, **changes), known.rates)
    for more in ({"k": 2 * FORM.k}, {"n": 4 * FORM.n}, {"tokens": 40 * FORM.tokens}):
        assert (us(**more) > us()).all(), more
    assert (us(sms=66) >= us()).all()


def test_pointers_take_longer_the_less_a_load_brings(on_an_h200):
    written(on_an_h200)
    known = cost.quantities(0)
    ways, loads = known.ways["bfloat16"], [unevenness(k) for k in (2056, 2052, 2050)]
    assert 0 == unevenness(2048) == unevenness(32, 4096) < loads[0] < loads[1] < loads[2] == unevenness(2049)
    assert unevenness(2048, 1004) == loads[1]  # rows that begin 1004 numbers apart
    times = [cost.predicted(ways, FORM._replace(uneven=u), known.rates) for u in (0.0, *loads)]
    pointers = ways.sizes.pointer.astype(bool)
    for less, more in itertools.pairwise(times):
        assert (less[pointers] < more[pointers]).all() and (less[~pointers] == more[~pointers]).all()


def test_programs_walk_tiles_in_waves():
    s = Sizes.of(Schedule("hopper", 128, 128, 64, warps=8, stages=6, persistent=True))
    form = Form.of(128 * 132, 4096, 128, torch.bfloat16)
    assert units(s, form) == 132 and units(s, form._replace(tokens=129)) == 264
    whole, more = (cost.amounts(s, form._replace(n=n), 1) for n in (128 * 132, 128 * 133))
    assert (whole.full.times, whole.last.times) == (1, 0) and (more.full.times, more.last.times) == (1, 1)
    assert more.last.memory < more.full.memory / 100  # one tile of 133


STREAMS = Schedule.parse("hopper 128x256x64 warps=8 stages=3 group=8 persistent store stream")
LOCKED = replace(STREAMS, lockstep=True)


@pytest.mark.parametrize("schedule, n, tokens, apart", [
    (STREAMS, 28672, 420, True), (STREAMS, 28672, 128, False), (STREAMS, 1024, 420, False),
    (LOCKED, 28672, 420, False), (replace(STREAMS, stream=False), 28672, 420, False)])
def test_streams_read_a_large_weight_more_than_once_unless_in_lockstep(schedule, n, tokens, apart):
    s, form, tile = Sizes.of(schedule), Form.of(n, 8192, tokens, torch.bfloat16), design.rough(schedule)
    work = cost.amounts(s, form, 1)
    once, twice = (cost.microseconds(work, tile, design.ROUGH._replace(apart=times)) for times in (1.0, 2.0))
    assert work.apart == apart and (twice > once) == apart


@pytest.mark.parametrize("n, tokens, programs", [
    (28672, 420, 132), (28672, 600, 130), (40960, 128, 0), (2048, 420, 0), (28672, 128 * 133, 0)])
def test_in_lockstep_each_tile_of_tokens_has_as_many_programs(n, tokens, programs):
    s, form = Sizes.of(LOCKED), Form.of(n, 8192, tokens, torch.bfloat16)
    product = Product(tokens, n, 8192, torch.bfloat16, (8192, 1), (8192, 1), order(n, 8192), False)
    assert bool(suits(s, form)) == bool(programs)
    if programs:
        assert cost.amounts(s, form, 1).full.times == units(s, form) / programs
        assert product.programs(LOCKED) == programs <= product.units(LOCKED)


# choosing


def test_the_table_comes_first_then_the_model_then_the_rule(on_an_h200):
    column = {"bfloat16": {"N=4096,K=4096": {"16": str(TABLED)}}}
    (on_an_h200 / "h200.json").write_text(json.dumps({"matmul": column}))

    def found(n):
        return list(choice.choose("matmul", f"N={n},K=4096", torch.bfloat16, 200, 0))
    guessed = {n: list(rule(n, 4096, torch.bfloat16, 200, 0)) for n in (4096, 5000)}
    assert found(5000) == [TABLED, *guessed[5000]]  # no model: the nearest weight of the table
    written(on_an_h200)
    forget()
    for n in (4096, 5000):
        expected = cost.best(Form.of(n, 4096, 200, torch.bfloat16), choice.EXPECTED, 0)
        known = [TABLED] * (n == 4096) + expected
        assert found(n)[:len(known)] == known and set(found(n)[len(known):]) == set(guessed[n]) - set(known)
    assert list(choice.choose("matmul", "N=5000,K=4096", torch.bfloat16, 200, -1)) == [
        *rule(5000, 4096, torch.bfloat16, 200, -1)]


def test_rows_that_bulk_copies_cannot_read_are_copied_where_the_model_expects_it_to_pay(on_an_h200):
    written(on_an_h200)
    few, many = (list(choice.choose("matmul", "N=4100,K=2050", torch.bfloat16, count, 0)) for count in (1, 2000))
    assert few[0].kind == "pointer" and many[0].kind != "pointer"
    for tokens in (1, copies.MANY, 2000):
        found = list(choice.choose("matmul", "N=4100,K=2050", torch.bfloat16, tokens, 0))[:choice.EXPECTED]
        assert all(s.copy == (s.kind != "pointer") for s in found)
        p = Product(tokens, 4100, 2050, torch.bfloat16, (2050, 1), (2050, 1), order(4100, 2050), False)
        assert copies.offered(p, found) == found
        assert cost.best(choice._form(4100, 2050, tokens, p.dtype, 0), choice.EXPECTED, 0) == found
    form = choice._form(4100, 2050, 5, torch.bfloat16, 0)
    assert (form.bulk, form.copied) == (True, 4 * 2050 * (4100 + 5))
    assert not choice._form(4100, 2056, 5, torch.bfloat16, 0).copied


def test_slow_pointers_make_copies_pay_for_few_tokens(on_an_h200):
    """With pointers as slow as 2 bytes a load make them, and a memory that makes copies cheap."""
    tiles = {str(s): [*tile[:-2], 30.0, tile[-1]] for s, tile in design.rough_tiles(torch.bfloat16).items()}
    written(on_an_h200, tiles={"bfloat16": tiles})
    found = list(choice.choose("matmul", "N=4100,K=2050", torch.bfloat16, 24, 0))
    assert found[0].kind != "pointer" and found[0].copy


@pytest.mark.skipif(not runtime.HAS_TRITON, reason="asks what is launched")
def test_the_op_names_the_copies_that_it_takes(on_an_h200, monkeypatch):
    written(on_an_h200)
    monkeypatch.setattr(op, "_index", lambda: 0)
    named, plain = (matmul.schedule(2000, shape, torch.bfloat16) for shape in ("N=4100,K=2050,bias", "N=4096,K=2048"))
    assert Schedule.parse(named).copy and not Schedule.parse(plain).copy
    assert len(provenance.launches(matmul, named, "bfloat16", "N=4100,K=2050", 2000)) == 2  # the copy, and the product


def test_copies_take_time(on_an_h200):
    written(on_an_h200)
    known = cost.quantities(0)
    ways, form = known.ways["bfloat16"], FORM._replace(copied=4 * FORM.k * (FORM.n + FORM.tokens))
    more = cost.predicted(ways, form, known.rates) - cost.predicted(ways, FORM, known.rates)
    bulk = ~ways.sizes.pointer.astype(bool)
    assert (more[~bulk] == 0).all()
    assert more[bulk] == pytest.approx(form.copied / known.rates.memory + known.rates.more)


def test_a_new_form_is_chosen_for_in_under_a_millisecond(on_an_h200):
    """The fastest of many: other processes share this machine's cores."""
    written(on_an_h200)
    cost.best(FORM, 3, 0)
    seconds = []
    for tokens in range(100, 300):
        start = time.perf_counter()
        cost.best(Form.of(5376, 2816, tokens, torch.bfloat16), 3, 0)
        seconds.append(time.perf_counter() - start)
    assert sorted(seconds)[len(seconds) // 10] < 1e-3


@pytest.mark.skipif(not runtime.HAS_TRITON, reason="calls a schedule")
def test_a_form_is_chosen_for_once(monkeypatch):
    calls = []
    monkeypatch.setattr(plan, "choose", lambda *given: calls.append(given) or choice.choose(*given))
    x, weight, _ = matmul.inputs(3, "N=21,K=37", torch.bfloat16, runtime.device())
    for _ in range(3):
        matmul.triton(x, weight)
    assert len(calls) == 1


def test_tuning_tries_what_the_model_expects(on_an_h200, monkeypatch):
    written(on_an_h200)
    monkeypatch.setattr(trial, "_runs", lambda s, p, index: True)
    x, weight = (torch.empty(rows, 2816, dtype=torch.bfloat16) for rows in (200, 5376))
    made = object.__new__(Plan)  # without a GPU there is none for bulk copies
    made.index, made.product, made.wanted = 0, Product.of(x, weight, None, None), []
    assert set(trial.candidates(made, 4)) == set(cost.best(FORM, 4, 0))


# data


def test_no_file_is_no_model_and_no_reason_to_warn(on_an_h200):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cost.best(FORM, 3, 0) == cost.best(FORM, 3, -1) == [] and cost.load("h200") is None


def test_a_relative_of_the_gpu_serves(on_an_h200, monkeypatch):
    written(on_an_h200, "h100")
    assert cost.best(FORM, 1, 0)
    forget()
    monkeypatch.setattr(tables, "slug", lambda index: "a100")
    assert cost.best(FORM, 1, 0) == []


RATES = design.ROUGH._asdict()
DAMAGED = {"not JSON": "{\"rates\": ", "not an object": "[1]", "no rates": json.dumps({"tiles": {}}),
           "a rate too few": json.dumps({"rates": {k: v for k, v in RATES.items() if k != "cut"}, "tiles": {}}),
           "a rate of another name": json.dumps({"rates": RATES | {"speed": 1}, "tiles": {}}),
           "no tiles": json.dumps({"rates": RATES}),
           "a list of tiles": json.dumps({"rates": RATES, "tiles": {"bfloat16": [1]}}),
           "a tile of another form": json.dumps({"rates": RATES, "tiles": {"bfloat16": {"fast": [1] * 7}}}),
           "a number too few": json.dumps({"rates": RATES, "tiles": {"bfloat16": {str(TABLED): [1] * 6}}}),
           "words for numbers": json.dumps({"rates": RATES, "tiles": {"bfloat16": {str(TABLED): ["a"] * 7}}}),
           "a rate of nothing": json.dumps({"rates": RATES | {"memory": 0}, "tiles": {}}),
           "a tile of no programs": json.dumps({"rates": RATES, "tiles": {"bfloat16": {str(TABLED): [1] * 6 + [0]}}}),
           "a number that is none": json.dumps({"rates": RATES | {"l2": float("nan")}, "tiles": {}})}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_file_costs_speed_and_says_so(case, on_an_h200):
    (on_an_h200 / "h200_cost.json").write_text(DAMAGED[case])
    with pytest.warns(RuntimeWarning, match=r"h200_cost\.json cannot be used.*slower.*bits do not change"):
        found = list(choice.choose("matmul", "N=5376,K=2816", torch.bfloat16, 200, 0))
    assert found == list(rule(5376, 2816, torch.bfloat16, 200, 0))
