"""Schedules as data: their text, the shipped tables, and a choice that never fails for want of a table."""
import json
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import runtime, tables
from kernels.op import DTYPES
from kernels.ops.matmul import choice, cost, shared_schedule
from kernels.ops.matmul import schedule as schedules
from kernels.ops.matmul.choice import choose
from kernels.ops.matmul.order import order, shared_order
from kernels.ops.matmul.product import Product
from kernels.ops.matmul.schedule import KINDS, SHARED, Schedule, rule
from kernels.ops.matmul.shared_schedule import SECTION, choose_shared, suits_leaves
from kernels.ops.matmul.steps import steps

FAST = Schedule("tma", 128, 256, 64, warps=8, stages=4, persistent=True, flatten=True)
SLOW = Schedule("pointer", 16, 32, 128, warps=4, stages=4, group=1, swap=True, split=True)
def made(*sizes, lockstep=False, **switches):
    """A schedule, in lockstep only if it streams."""
    streams = switches.get("stream", False) and switches["persistent"]
    return Schedule(*sizes, **switches, lockstep=lockstep and streams)


many = st.sampled_from(KINDS).flatmap(lambda kind: st.builds(
    made, st.just(kind), st.integers(1, 512), st.integers(1, 512), st.integers(16, 512), st.integers(1, 16),
    st.integers(1, 9), st.integers(1, 64), **{name: st.booleans() for name in schedules._SWITCHES[kind]}))


def written(folder, **table):
    (folder / "h200.json").write_text(json.dumps({"machine": "NVIDIA H200", "triton": "3.6.0", **table}))
    return folder


def shapes(**choices):
    return {"bfloat16": {shape.replace("_", "=").replace("x", ",K="): column for shape, column in choices.items()}}


@pytest.fixture
def on_an_h200(monkeypatch, tmp_path):
    """GPU 0 is an H200 whose tables are in tmp_path."""
    monkeypatch.setattr(tables, "FOLDER", tmp_path)
    monkeypatch.setattr(tables, "slug", lambda index: "h200")
    for module in (schedules, shared_schedule, choice):
        monkeypatch.setattr(module, "gpu", lambda index: ((9, 0), 132))
    forget()
    yield tmp_path
    forget()


def forget():
    tables.forget()
    cost.quantities.cache_clear()


@given(many)
def test_a_schedule_is_its_text(schedule):
    assert Schedule.parse(str(schedule)) == schedule


def test_a_switch_that_a_kind_would_ignore_is_refused():
    for kind, switch in (("pointer", "persistent"), ("pointer", "store"), ("tma", "stream"), ("hopper", "flatten")):
        with pytest.raises(ValueError, match=f"kind {kind} has no {switch}; it has swap, split"):
            Schedule(kind, **{switch: True})


@pytest.mark.parametrize("others", [{}, {"stream": True}, {"persistent": True}])
def test_lockstep_is_a_way_to_stream(others):
    with pytest.raises(ValueError, match="lockstep is a way to stream, by persistent programs, got hopper"):
        Schedule("hopper", lockstep=True, **others)
    assert Schedule("hopper", persistent=True, stream=True, lockstep=True).lockstep


def test_the_text_is_what_the_docstring_shows():
    assert str(replace(SLOW, block_k=256, stages=5)) == "pointer 16x32x256 warps=4 stages=5 group=1 swap split"
    assert str(FAST) == "tma 128x256x64 warps=8 stages=4 group=8 persistent flatten"


@pytest.mark.parametrize("text", ["", "pointer", "pointer 16x32 warps=4 stages=5 group=1", None, 7,
                                  "pointer 16x32x256 warps=4 stages=5 group=1 sideways",
                                  "pointer 16x32x256 warps=four stages=5 group=1"])
def test_other_text_is_refused(text):
    with pytest.raises(ValueError, match="a schedule must read like"):
        Schedule.parse(text)


@pytest.mark.parametrize("change, message", [({"kind": "magic"}, "kind.*pointer, tma.*'magic'"),
                                             ({"block_k": 8}, "block_k.*at least 16.*8"),
                                             ({"warps": 0}, "warps.*at least 1.*0"),
                                             ({"stages": 2.0}, r"stages.*2\.0")])
def test_sizes_that_cannot_be_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        replace(FAST, **change)


def test_shared_memory_is_counted():
    assert FAST.shared_bytes == 4 * 64 * (128 + 256) * 2


# choosing


@settings(max_examples=60)
@given(n=st.integers(1, 200_000), k=st.integers(1, 20_000), tokens=st.integers(1, 20_000),
       dtype=st.sampled_from(list(DTYPES.values())))
def test_there_is_a_schedule_for_everything(n, k, tokens, dtype):
    found = list(choose("matmul", f"N={n},K={k}", dtype, tokens))
    assert found and len(set(found)) == len(found)
    assert found[-1] == Schedule("pointer", 32, 32, 32, warps=4, stages=2)  # runs wherever Triton does
    segments, length = order(n, k)
    assert all(segments == 1 or length % s.block_k == 0 for s in found)
    assert all(s.kind == "pointer" for s in found)  # where no GPU is named, none with bulk copies


def test_the_rule_uses_bulk_copies_only_where_there_are_some(monkeypatch):
    for capability, kinds in (((8, 0), {"pointer"}), ((9, 0), {"pointer", "tma"}), ((7, 5), {"pointer"})):
        monkeypatch.setattr(schedules, "gpu", lambda index, capability=capability: (capability, 108))
        found = [s for tokens in (1, 64, 512, 8192) for s in rule(8192, 8192, torch.bfloat16, tokens, 0)]
        assert {s.kind for s in found} == kinds
        assert max(s.shared_bytes for s in found) <= {(9, 0): 227, (8, 0): 163}.get(capability, 99) * 1024


def test_the_measured_schedule_comes_first(on_an_h200):
    written(on_an_h200, matmul=shapes(N_4096x4096={"16": str(SLOW), "512": str(FAST)}))
    first = {tokens: next(choose("matmul", "N=4096,K=4096", torch.bfloat16, tokens, 0))
             for tokens in (1, 16, 17, 512, 513, 100_000)}
    assert first == {1: SLOW, 16: SLOW, 17: FAST, 512: FAST, 513: FAST, 100_000: FAST}
    assert next(choose("matmul", "N=4096,K=4096", torch.float16, 1, 0)) == SLOW  # as fast as bfloat16
    assert next(choose("matmul", "N=4096,K=4096", torch.float32, 1, 0)) != SLOW
    assert next(choose("matmul", "N=4096,K=4096", torch.bfloat16, 1, -1)) != SLOW


def test_a_near_shape_serves_and_a_far_one_does_not(on_an_h200):
    odd = replace(SLOW, stages=7)
    written(on_an_h200, matmul=shapes(N_4096x4096={"16": str(SLOW)}, N_8192x4096={"16": str(odd)}))
    def first(n, k):
        return next(choose("matmul", f"N={n},K={k}", torch.bfloat16, 4, 0))
    assert (first(5000, 4096), first(7000, 4096)) == (SLOW, odd)
    assert {first(40_000, 4096), first(4096, 16_384)}.isdisjoint({SLOW, odd})
    assert first(2048, 4096) == first(4096, 2048) == SLOW and first(2048, 2048) != SLOW  # half in one size, not in two


def test_a_relative_of_the_gpu_serves(on_an_h200, monkeypatch):
    written(on_an_h200, matmul=shapes(N_4096x4096={"16": str(SLOW)}))
    for name, serves in (("h100", True), ("gh200", True), ("a100", False)):
        monkeypatch.setattr(tables, "slug", lambda index, name=name: name)
        forget()
        assert (next(choose("matmul", "N=4096,K=4096", torch.bfloat16, 4, 0)) == SLOW) == serves


# a tree's schedules


@given(n=st.integers(1, 20_000), k=st.integers(1, 40_000), tokens=st.integers(1, 10_000), dtype=st.sampled_from(
    list(DTYPES.values())), capability=st.sampled_from([(0, 0), (8, 0), (9, 0), (10, 0)]))
def test_the_rule_suits_the_leaves_of_any_weight(n, k, tokens, dtype, capability):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_schedule, "gpu", lambda index: (capability, 132))
        found = list(choose_shared(f"N={n},K={k}", dtype, tokens))
    tree, last = shared_order(n, k), found[-1]
    assert all(suits_leaves(s, tree.length) for s in found) and len(set(found)) == len(found)
    assert str(last) == "pointer 32x32x32 warps=4 stages=2 group=8"
    runs = {"pointer", *["tma"] * (capability >= (9, 0)), *["hopper"] * (capability == (9, 0))}
    assert {s.kind for s in found} <= runs
    assert dtype != torch.float32 or {s.kind for s in found} == {"pointer"}


def test_a_trees_schedules_have_a_section_of_their_own(on_an_h200):
    ours = replace(SLOW, split=False)
    written(on_an_h200, matmul=shapes(N_4096x4096={"16": str(FAST)}),
            matmul_shared=shapes(N_4096x4096={"16": str(ours)}))
    assert next(choose_shared("N=4096,K=4096", torch.bfloat16, 4, 0)) == ours
    assert next(choose("matmul", "N=4096,K=4096", torch.bfloat16, 4, 0)) == FAST
    assert next(choose_shared("N=256,K=512", torch.bfloat16, 4, -1)) not in (ours, FAST)


@pytest.mark.parametrize("n, k", [(4096, 4096), (256, 512), (256, 768), (100, 1001)])
def test_schedules_of_every_kind_are_tested_that_suit_the_leaves(n, k):
    found = shared_schedule.tested_shared(n, k, torch.bfloat16)
    assert {s.kind for s in found} == {"pointer", "tma", "hopper"} and len(set(found)) == len(found) > 12
    assert all(suits_leaves(s, shared_order(n, k).length) for s in found)
    assert {(s.split, s.reduce) for s in found} == {(False, False), (True, False), (True, True)}
    assert {s.kind for s in shared_schedule.tested_shared(n, k, torch.float32)} == {"pointer"}


# tables that cannot be used


DAMAGED = {
    "not JSON": "{\"matmul\": ",
    "not an object": "[1, 2]",
    "not text": "\udcff",
    "a shape of another form": json.dumps({"matmul": {"bfloat16": {"M=3": {"1": str(SLOW)}}}}),
    "a shape of nothing": json.dumps({"matmul": {"bfloat16": {"N=0,K=4": {"1": str(SLOW)}}}}),
    "a schedule of another form": json.dumps({"matmul": {"bfloat16": {"N=4096,K=4096": {"1": "fast"}}}}),
    "a token count that is none": json.dumps({"matmul": {"bfloat16": {"N=4096,K=4096": {"few": str(SLOW)}}}}),
    "a negative token count": json.dumps({"matmul": {"bfloat16": {"N=4096,K=4096": {"-3": str(SLOW)}}}}),
    "a token count of nothing": json.dumps({"matmul": {"bfloat16": {"N=4096,K=4096": {"0": str(SLOW)}}}}),
    "a switch that its kind has not": json.dumps(
        {"matmul": {"bfloat16": {"N=4096,K=4096": {"1": "pointer 16x16x64 warps=4 stages=2 group=1 persistent"}}}}),
    "too many brackets": "[" * 100_000,
    "no schedules": json.dumps({"matmul": {"bfloat16": {"N=4096,K=4096": {}}}}),
    "a list of schedules": json.dumps({"matmul": {"bfloat16": {"N=4096,K=4096": [str(SLOW)]}}}),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_table_costs_speed_and_says_so(case, on_an_h200):
    (on_an_h200 / "h200.json").write_bytes(DAMAGED[case].encode("utf-8", "surrogateescape"))
    lost = r"h200\.json cannot be used.*slower.*bits do not change.*kernels tune"
    with pytest.warns(RuntimeWarning, match=lost):
        found = list(choose("matmul", "N=4096,K=4096", torch.bfloat16, 4, 0))
    assert found == list(rule(4096, 4096, torch.bfloat16, 4, 0))


def test_no_table_is_no_reason_to_warn(on_an_h200):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tables.load("h200", Schedule.parse) == {}
        assert list(choose("matmul", "N=4096,K=4096", torch.bfloat16, 4, 0))


def test_shipped_tables_are_sound():
    """Every stored schedule suits its shape and token count: its block of k divides the order's segments, it fits in
    memory, and in lockstep every program has a chain."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shipped = [tables.load(path.stem, Schedule.parse) for path in sorted(tables.FOLDER.glob("*.json"))
                   if not path.stem.endswith("_cost")]
    assert shipped
    for table in shipped:
        assert {"matmul"} <= set(table) <= {"matmul", SECTION}
        for section, dtype, (n, k), column in ((s, d, shape, column) for s, dtypes in table.items()
                                               for d, columns in dtypes.items() for shape, column in columns.items()):
            which = order(n, k) if section == "matmul" else shared_order(n, k)
            for tokens, schedule in column.items():
                p = Product(tokens, n, k, DTYPES[dtype], (k, 1), (k, 1), which, False)
                assert which.segments == 1 or which.length % schedule.block_k == 0, (n, k, schedule)
                held = schedule.waiting_bytes if which.segments > 1 and not schedule.split else 0
                size = schedule.shared_bytes * DTYPES[dtype].itemsize // 2 + held
                assert size <= SHARED, (n, k, schedule)
                assert steps(schedule, p) if runtime.HAS_TRITON else p.carried_out(schedule)


@pytest.mark.gpu
def test_the_table_of_this_gpu_is_named_after_it():
    name = runtime.slug(runtime.device().index)
    assert name and name == name.lower() and " " not in name
