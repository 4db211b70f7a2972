"""The atlas: what moves is found to move, what cannot is not, and what was recorded obeys its own rules."""
import dataclasses
import importlib
import itertools
import json
import re
from contextlib import contextmanager, nullcontext
from functools import partial

import pandas as pd
import pytest
import torch

import figures
from kernels import bits, rms_norm, runtime
from kernels.lab import records
from kernels.lab.atlas import cases, properties
from kernels.lab.atlas import chart as atlas_chart
from kernels.lab.atlas import measure as atlas
from kernels.lab.atlas.cases import Case, _last, _prefill_or_decode
from kernels.lab.atlas.measure import ATLAS, CASES, PROPERTIES
from kernels.op import Shape

DEVICE = runtime.device()
ROWS = ("batch", "position", "neighbours")


def case(call, arguments="M,D", size="M=12,D=300", name="made_up", **options):
    return Case(name, arguments, size, size, call, **options)


def verdict(call, property, **options):
    return atlas.test(case(call, **options), "float32", property)["verdict"]


# --- what moves is found


def test_a_sum_split_by_the_batch_moves_with_the_batch_alone():
    split = case(rms_norm.implementation("split"), "M,D D", "M=32,D=1024")
    row = atlas.test(split, "float32", "batch")
    assert row["verdict"] == "varies" and row["trials"] >= 20 and row["distinct"] >= 2
    assert 0 < row["share_differ"] < 1 and row["largest_ulp"] >= 1
    for property in ("run", "position", "neighbours"):
        assert atlas.test(split, "float32", property)["verdict"] == "same", property


def test_a_specification_moves_with_nothing():
    given = case(rms_norm.python, "M,D D", "M=12,D=1000")
    for property in PROPERTIES[:4]:
        row = atlas.test(given, "float32", property)
        assert (row["verdict"], row["share_differ"], row["largest_ulp"], row["distinct"]) == ("same", 0, 0, 1), property
        assert row["trials"] >= 20


def test_counts_agree_with_check_invariance():
    """The same rows in the same batches, counted by the suite's other means."""
    call = rms_norm.implementation("split")
    given = dataclasses.replace(case(call, "M,D D", "M=40,D=500"), few=True)
    row = atlas.test(given, "float32", "batch")
    seeds = range(row["trials"] // 3)
    reports = [bits.check_invariance(call, given.inputs(torch.float32, DEVICE, seed), (0,),
                                     [slice(0, n) for n in properties.FEW_BATCHES]) for seed in seeds]
    assert row["trials"] == sum(r.trials for r in reports) and row["trials"] >= 20
    assert row["largest_ulp"] == max(r.largest_ulp for r in reports)
    assert row["share_differ"] == sum(r.elements_differ for r in reports) / sum(r.elements for r in reports)


def test_a_result_that_follows_its_place_moves_with_position():
    def placed(x):
        return x + torch.arange(len(x), device=x.device)[:, None]

    assert verdict(placed, "position") == "varies"
    assert verdict(placed, "batch") == verdict(placed, "neighbours") == "same"


@pytest.mark.parametrize("content", ["other", "zero", "huge", "nan"])
def test_a_result_that_sees_its_neighbours_moves_with_them(content):
    assert verdict(lambda x: x + 0 * x.sum(), "neighbours", contents=("nan",)) == "varies"
    assert verdict(lambda x: x + x.mean(), "neighbours", contents=(content,)) == "varies"
    assert verdict(lambda x: 2 * x, "neighbours", contents=(content,)) == "same"


def test_every_call_of_a_counter_is_another_result():
    calls = itertools.count()
    row = atlas.test(case(lambda x: x + next(calls)), "float32", "run")
    assert row["verdict"] == "varies" and row["trials"] >= 40
    assert row["distinct"] == row["trials"] / properties.SEEDS + 1


def test_lengths_that_a_backend_lacks_are_left_out():
    def even(q, k, v):
        if k.shape[2] % 2:
            raise runtime.Unavailable("even lengths only")
        return q * k.shape[2]

    shapes = {"arguments": "M,H,T,D M,H,T,D M,H,T,D", "query": _prefill_or_decode}
    assert verdict(even, "query", size="M=1,H=1,T=64,D=8", **shapes) == "varies"
    assert verdict(even, "query", size="M=1,H=1,T=63,D=8", **shapes) == "not here: even lengths only"


def test_more_trials_are_made_when_asked_for():
    assert atlas.test("sum", "float32", "run", trials=33)["trials"] >= 66
    assert atlas.test("sum", "float32", "position", trials=50)["trials"] >= 50


def test_other_numbers_of_queries():
    size = {"arguments": "M,T,D", "size": "M=2,T=40,D=8", "query": _last(1)}
    assert verdict(lambda x: x * (1 + x.shape[1]), "query", **size) == "varies"
    assert verdict(lambda x: x * 3, "query", **size) == "same"
    assert verdict(lambda x: x * 3, "query") == "not applicable"


@pytest.mark.skipif(runtime.HAS_GPU, reason="a GPU's ops do not run on CPU threads")
def test_threads_are_changed_and_given_back():
    before = torch.get_num_threads()
    assert verdict(lambda x: x * torch.get_num_threads(), "threads") == "varies"

    def fails(x):
        if torch.get_num_threads() != 1:
            raise RuntimeError("no")
        return x

    assert verdict(fails, "threads") == "error: RuntimeError: no"
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("before, few, counts", [
    (1, False, [2, 3, 4]), (2, False, [2, 3, 4]), (8, False, [2, 3, 4, 8]), (1, True, [2]), (2, True, [2]),
    (6, True, [6])])
def test_thread_counts_on_a_machine_of_any_size(before, few, counts, monkeypatch):
    """Alone, then by each count; whatever the machine has, more than one thread is tried, and its own count."""
    set_to, threads = [], [before]

    def set_threads(count):
        set_to.append(count)
        threads[0] = count

    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[0])
    monkeypatch.setattr(torch, "set_num_threads", set_threads)
    tally = properties.Tally()
    given = case(lambda x: x * threads[0], few=few)
    properties._threads(given, torch.float32, torch.device("cpu"), tally, trials=5)
    rounds = max(properties.SEEDS, -(-5 // len(counts)))
    assert set_to == [1, *counts] * rounds + [before]
    assert tally.trials == rounds * len(counts) >= 5 and tally.columns()["distinct"] == 1 + len(counts)


@pytest.mark.gpu
def test_a_graph_replays_the_bits_of_the_eager_call_and_a_host_call_is_no_part_of_it():
    calls = itertools.count()
    assert atlas.test("mm", "bfloat16", "graph")["verdict"] == "same"
    assert atlas.test("mm", "bfloat16", "threads")["verdict"] == "not applicable"
    assert verdict(lambda x: x + next(calls), "graph") == "varies"
    assert verdict(lambda x: x * x.sum().item(), "graph").startswith("not here: cannot be captured")


@pytest.mark.parametrize("fails", [True, False])
def test_a_capture_leaves_the_callers_stream_the_current_one(fails, monkeypatch):
    """On a GPU that is played: a capture that ends with an error leaves its own stream, as with torch."""
    class Stream:
        def wait_stream(self, other):
            pass

    @contextmanager
    def capture(graph, capture_error_mode):
        now[0] = Stream()
        yield
        now[0] = callers

    def call(x):
        if fails and now[0] is not callers:
            raise RuntimeError("not while a stream is captured\nand more")
        return x

    callers = Stream()
    now = [callers]
    for name, value in {"Stream": Stream, "stream": nullcontext, "CUDAGraph": object, "graph": capture,
                        "current_stream": lambda: now[0], "set_stream": partial(now.__setitem__, 0)}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    with pytest.raises(runtime.Unavailable, match="^cannot be captured: not while a stream is captured$") \
            if fails else nullcontext():
        assert properties._captured(call, (3,))[0] == 3
    assert now == [callers]


def test_a_difference_seen_once_is_not_recorded_as_a_finding():
    calls = itertools.count()
    row = atlas.test(case(lambda x: x + (next(calls) == 0)), "float32", "run")
    assert row["verdict"] == f"error: bits moved once and not in {properties.SECOND_LOOKS} further measurements"


def test_a_difference_seen_once_and_once_more_is_a_finding(monkeypatch):
    """In the first measurement and in the third, and in no other."""
    measured = iter([1, 0, 1, 0, 0, 0])

    def some(given, dtype, device, tally, trials):
        tally.trials, tally.differ = trials, next(measured)

    monkeypatch.setitem(properties._MEASURES, "run", some)
    assert verdict(lambda x: x, "run") == "varies"


def test_signed_zero_counts_and_the_payload_of_a_nan_does_not():
    def zeros(x):
        return torch.zeros_like(x).copysign(x.new_tensor(1.0 if len(x) == 12 else -1.0))

    row = atlas.test(case(zeros), "float32", "batch")
    assert row["verdict"] == "varies" and row["largest_ulp"] == 0 and row["share_differ"] == 1

    def nans(x):
        payload = torch.full(x.shape, 0x7FC00000 + len(x), dtype=torch.int32, device=x.device)
        return payload.view(torch.float32)

    assert verdict(nans, "batch") == "same"


# --- ops that a machine lacks, names that do not exist


def _lacking(x):
    raise runtime.Unavailable("no such kernel")


def _without_half(x):
    raise RuntimeError('"thing" not implemented for \'BFloat16\'')


def _broken(x):
    raise IndexError("out of\nbounds")


@pytest.mark.parametrize("call, found", [
    (_lacking, "not here: no such kernel"), (_without_half, "not here: \"thing\" not implemented for 'BFloat16'"),
    (_broken, "error: IndexError: out of")])
def test_what_an_op_raises_becomes_a_row(call, found):
    row = atlas.test(case(call), "float32", "batch")
    assert row["verdict"] == found and row["trials"] == 0
    assert tuple(row) == ATLAS.columns


def test_what_a_case_says_it_lacks_is_a_row():
    row = atlas.test(case(lambda x: x, lacks={"run": "it waits"}), "float32", "run")
    assert row["verdict"] == "not here: it waits" and row["trials"] == 0


def test_a_backend_of_attention_is_tested_or_said_to_be_missing():
    for name in ("efficient", "cudnn"):
        found = atlas.test(f"sdpa[{name},decode]", "bfloat16", "run")["verdict"]
        if DEVICE.type == "cpu":
            assert found == f"not here: no {name} kernel for this device and dtype"
        else:
            assert found in ("same", "varies") or found.startswith("not here: no")


@pytest.mark.parametrize("arguments, named", [
    (("mmm", "float32", "run"), "op"), (("mm", "float64", "run"), "dtype"), (("mm", "float32", "luck"), "property")])
def test_an_unknown_name_is_named(arguments, named):
    wrong = arguments[["op", "dtype", "property"].index(named)]
    with pytest.raises(ValueError, match=f"{named} must be one of .*got '{wrong}'"):
        atlas.test(*arguments)
    with pytest.raises(ValueError, match=f"{named} must be one of"):
        atlas.verdict("any", *arguments)


def test_too_few_trials_are_refused():
    with pytest.raises(ValueError, match="trials must be at least 1, got 0"):
        atlas.test("mm", "float32", "run", trials=0)


# --- the table of ops


def test_the_table_has_forty_ops_with_names_of_their_own():
    assert len(CASES) >= 40 and len(set(atlas.names())) == len(CASES)


def small(given: Case) -> Case:
    """The same op at sizes of at most 32, of which the largest fifty of 64 can be taken."""
    size = Shape(**{name: min(value, 64 if name == "V" else 32) for name, value in Shape.parse(given.cpu).items()})
    return dataclasses.replace(given, cpu=str(size), gpu=str(size))


@pytest.mark.parametrize("given", CASES, ids=lambda c: c.name)
def test_arguments_are_as_declared(given):
    given, dtype, cpu = small(given), torch.bfloat16, torch.device("cpu")
    first, again, other = (given.inputs(dtype, cpu, seed) for seed in (0, 0, 1))
    assert bits.same_bits(first, again)
    assert not any(a.data_ptr() == b.data_ptr() for a, b in zip(first, again, strict=True))
    batch = {first[i].shape[0] for i in given.per_row}
    assert len(batch) <= 1
    for i, (a, b) in enumerate(zip(first, other, strict=True)):
        moved_with_the_seed = i in given.per_row or not given.per_row
        assert moved_with_the_seed != bits.same_bits(a, b), i
        assert a.dtype == (dtype if a.is_floating_point() else torch.int64)


def test_whole_numbers_stay_below_their_bound(monkeypatch):
    given = case(lambda i: i, "M,T:V", "M=8,T=500,V=7")
    (index,) = given.inputs(torch.float32, "cpu")
    assert index.min() == 0 and index.max() == 6
    (zero,) = given.inputs(torch.float32, "cpu", content="zero")
    assert not zero.any()
    almost = torch.full((8, 500), 1 - 2.0**-24)  # one more rounds to two
    monkeypatch.setattr(cases, "_portable", lambda *_: almost)
    assert given.inputs(torch.float32, "cpu")[0].max() == 6


@pytest.mark.parametrize("dtype, properties", [("float32", ("run", "neighbours", "query")), ("bfloat16", ("run",))])
def test_every_op_runs_here_or_says_why_not(dtype, properties):
    """At small sizes; compiled ops apart, for each costs a compilation."""
    for given in CASES:
        for property in () if given.few else properties:
            found = atlas.test(small(given), dtype, property, trials=2)["verdict"]
            assert found.partition(":")[0] in ("same", "varies", "not applicable", "not here"), (given.name, property)


def test_a_compiled_op_runs_here_or_says_why_not():
    (given,) = [c for c in CASES if c.name == "compile(softmax)"]
    found = atlas.test(small(given), "float32", "position", trials=1)["verdict"]
    assert found in ("same", "varies") or found.startswith("not here: torch.compile")


# --- recording


COMMAND = ["--ops", "sum", "amax", "--dtypes", "float32", "--properties", "run", "position"]


def _main(folder, *more):
    return atlas.main([*COMMAND, "--out", str(folder), "--machine", "here", *more])


def test_recording_resumes_where_it_was(tmp_path, monkeypatch, capsys):
    measured, real = [], atlas.test
    monkeypatch.setattr(atlas, "test", lambda *cell, **options: measured.append(cell) or real(*cell, **options))
    assert _main(tmp_path) == 0
    assert len(measured) == 4 and "4 cells measured, 0 were recorded already" in capsys.readouterr().out
    assert _main(tmp_path) == 0 and len(measured) == 4
    assert _main(tmp_path, "--again") == 0 and len(measured) == 8
    assert _main(tmp_path, "--trials", "45") == 0 and len(measured) == 12
    assert (ATLAS.read(tmp_path / "here").trials >= 45).all()
    monkeypatch.setattr(atlas, "source", lambda: "0" * 12)
    assert _main(tmp_path, "--trials", "45") == 0 and len(measured) == 16
    machine = json.loads((tmp_path / "here" / "machine.json").read_text())
    assert machine["device"] == records.device_name() and ATLAS.file in machine["command"]


def test_an_error_or_another_size_is_measured_again(tmp_path):
    rows = [atlas.test(op, "float32", "run") for op in ("sum", "amax", "mean")]
    rows[0]["verdict"] = "error: it was unwell"
    rows[1]["shape"] = "M=1,V=2"
    done = ATLAS.merge(tmp_path, rows)
    again = [row["op"] for row in atlas.atlas(atlas.cells(["sum", "amax", "mean"], ["float32"], ["run"]), done)]
    assert again == ["sum", "amax"]


def test_what_has_no_comparisons_here_is_not_measured_again(tmp_path):
    nowhere = "threads" if runtime.HAS_GPU else "graph"
    done = ATLAS.merge(tmp_path, [atlas.test("sum", "float32", nowhere)])
    assert done.verdict.tolist() == ["not applicable"] and done.trials.tolist() == [0]
    assert list(atlas.atlas(atlas.cells(["sum"], ["float32"], [nowhere]), done)) == []


def test_ctrl_c_keeps_what_was_measured_and_the_same_command_goes_on(tmp_path, monkeypatch, capsys):
    real, left = atlas.test, iter([True, True, True])

    def interrupted(*cell, **options):
        if not next(left, None):
            raise KeyboardInterrupt
        return real(*cell, **options)

    monkeypatch.setattr(atlas, "test", interrupted)
    assert _main(tmp_path) == 130 and "the same command goes on" in capsys.readouterr().err
    assert len(ATLAS.read(tmp_path / "here")) == 3
    monkeypatch.setattr(atlas, "test", real)
    assert _main(tmp_path) == 0 and "1 cells measured, 3 were" in capsys.readouterr().out


def test_a_wrong_name_on_the_command_line_is_told(tmp_path, capsys):
    assert atlas.main(["--ops", "nothing", "--out", str(tmp_path)]) == 2
    assert "got 'nothing'" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_graphs_are_measured_last():
    properties = [cell[2] for cell in atlas.cells(["mm", "sum"])]
    assert properties.index("graph") == len(properties) - properties.count("graph")


def test_the_latest_row_counts(tmp_path):
    old, new = (atlas.test("sum", "float32", "run") for _ in range(2))
    old.update(shape="M=1,D=2", verdict="varies", recorded_at="2000-01-01T00:00:00Z")
    ATLAS.merge(tmp_path / "here", [old, new])
    records.note_machine(tmp_path / "here", ATLAS.file)
    assert atlas.machines(tmp_path) == ["here"] and len(atlas.recorded("here", tmp_path)) == 1
    assert atlas.verdict("here", "sum", "float32", "run", tmp_path) == new["verdict"]
    assert atlas.verdict("here", "sum", "bfloat16", "run", tmp_path) == "not recorded"


# --- what was recorded


@pytest.mark.parametrize("machine", atlas.machines())
def test_recorded_rows_obey_the_rules(machine):
    rows = atlas.recorded(machine)
    assert set(rows.op) == set(atlas.names())
    cells = list(rows[["op", "dtype", "property"]].itertuples(index=False, name=None))
    assert set(cells) == set(atlas.cells()) and len(cells) == len(set(cells))
    kinds = rows.verdict.str.partition(":")[0]
    assert set(kinds) <= {"same", "varies", "not applicable", "not here"}, "an error was recorded"
    same, varies = rows[kinds == "same"], rows[kinds == "varies"]
    assert same.op.nunique() >= 40 and len(varies) >= 20
    assert (same.trials >= 20).all() and (same.share_differ == 0).all() and (same.distinct == 1).all()
    assert (varies.trials >= 20).all() and (varies.share_differ > 0).all() and (varies.distinct >= 2).all()
    runs = same[same.property == "run"].trials
    assert (runs >= (40 if machine.startswith("cpu") else 200)).all(), "as data/README.md says"
    absent = rows[kinds.isin(["not applicable", "not here"])]
    assert (absent.trials == 0).all() and absent[["share_differ", "largest_ulp", "distinct"]].isna().all(axis=None)
    assert rows.verdict[kinds == "not here"].map(lambda text: len(text.partition(": ")[2]) > 5).all()
    assert rows.source.map(lambda text: bool(re.fullmatch("[0-9a-f]{12}", text))).all()


@pytest.mark.parametrize("machine", atlas.machines())
def test_recorded_rows_hang_together(machine):
    """An order-free op never moves, and what applies to a CPU or to a GPU alone is recorded there alone."""
    rows = atlas.recorded(machine)
    assert set(rows[(rows.op == "amax")].verdict) <= {"same", "not applicable"}
    elsewhere = "graph" if machine.startswith("cpu") else "threads"
    assert set(rows[rows.property == elsewhere].verdict) <= {"not applicable"} | {
        v for v in rows.verdict if v.startswith("not here")}
    tested = rows[rows.verdict.isin(["same", "varies"])]
    assert set(tested.property) == set(PROPERTIES) - {elsewhere}


# --- the figure


def _row(op, property, verdict, dtype="float32", share=0.25):
    return {"op": op, "dtype": dtype, "shape": "M=1", "property": property, "verdict": verdict, "share_differ": share,
            "largest_ulp": 1, "distinct": 2, "trials": 20, "recorded_at": records.now(), "source": "0" * 12}


def test_ops_are_grouped_by_what_moves_them():
    rows = pd.DataFrame([
        _row("mm", "run", "same"), _row("mm", "batch", "varies"), _row("sum", "run", "varies"),
        _row("sum", "batch", "varies"), _row("linear", "query", "varies"), _row("mean", "threads", "varies"),
        _row("amax", "batch", "same"), _row("exp", "graph", "varies"), _row("bmm", "neighbours", "varies"),
        _row("bmm", "batch", "varies"), _row("sort", "run", "not here: why")])
    groups = [["sum"], ["bmm", "mm"], ["linear"], ["mean"], ["exp"], ["amax"], ["sort"]]
    assert list(atlas_chart.in_groups(rows).values()) == groups
    assert atlas_chart.counts(rows, "batch") == (3, 4)
    assert atlas_chart.counts(atlas_chart.steady(rows), "batch") == (2, 3)
    words = atlas_chart.words({"here": rows})
    assert "batch 3 of 4" in words and "batch 2 of 3 without the ops that race" in words


def test_ops_that_draw_random_numbers_are_apart():
    rows = pd.DataFrame([_row("mm", "batch", "same"), _row("dropout", "batch", "varies"),
                         _row("multinomial", "position", "varies")])
    assert atlas_chart.in_groups(rows)[atlas_chart.DRAWING] == ["multinomial", "dropout"]
    assert atlas_chart.counts(atlas_chart.steady(rows), "batch") == (0, 1)
    seeded = {case.name for case in CASES if "random numbers" in case.lacks.get("graph", "")}
    assert seeded == set(atlas_chart.RANDOM)


def test_a_part_of_the_rows_keeps_the_groups_of_the_whole():
    rows = pd.DataFrame([_row("mm", "run", "same"), _row("mm", "batch", "varies"), _row("amax", "run", "same")])
    some = rows[rows.verdict == "same"]
    assert "Move with the batch (1)" not in _texts(atlas_chart.atlas_chart({"here": some}))
    whole = _texts(atlas_chart.atlas_chart({"here": some}, groups=atlas_chart.in_groups(rows)))
    assert "Move with the batch (1)" in whole and "Never moved in these tests (1)" in whole and "batch" not in whole


@pytest.mark.parametrize("value, text", [(1, "100"), (0.642, "64"), (0.0231, "2.3"), (0.0996, "10"), (0.0082, ".8"),
                                         (0.00951, "1.0"), (0.0009, ".09"), (0.000949, ".09"), (0.00095, ".1"),
                                         (0.00009, "<.01"), (1e-9, "<.01")])
def test_shares_fit_into_a_cell(value, text):
    assert atlas_chart.share(value) == text


def _many():
    return pd.DataFrame([_row(f"op{i}", name, "same") for i in range(80) for name in ("run", "batch")])


def test_a_long_table_has_two_halves_with_heads_of_their_own_or_one_column():
    halves, one = (atlas_chart.atlas_chart({"here": _many()}, halves=halves) for halves in (True, False))
    assert [text for text in _texts(halves) if text.startswith("here")] == ["here", "here, continued"]
    assert [text for text in _texts(one) if text.startswith("here")] == ["here"]
    assert one.get_figwidth() < 7 < halves.get_figwidth() and {"op0", "op79"} <= set(_texts(one))


def test_a_chart_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no row"):
        atlas_chart.atlas_chart({})


def _texts(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_the_figure_draws_one_machine_and_two(tmp_path):
    drawing = importlib.import_module("figures.atlas")
    one = tmp_path / "cpu-x"
    ATLAS.merge(one, [_row("mm", p, "varies", d) for p in ("run", "batch", "threads") for d in atlas.RECORDED_DTYPES])
    records.note_machine(one, ATLAS.file)
    alone = _texts(drawing.draw(tmp_path))
    assert "threads" in alone and "graph" not in alone and alone.count("25") == 6
    two = tmp_path / "h200"
    ATLAS.merge(two, [_row("mm", "graph", "same"), _row("sum", "batch", "not here"), _row("sum", "run", "error: x")])
    (two / "machine.json").write_text('{"device": "NVIDIA H200", "torch": "2.11.0+cu130"}')
    both = _texts(drawing.draw(tmp_path))
    assert {"graph", "H200, torch 2.11.0"} < set(both) and both.count("25") == 6 and both.count("!") == 1
    with pytest.raises(FileNotFoundError, match="atlas.csv"):
        drawing.draw(tmp_path / "empty")


def test_the_title_and_the_words_are_the_data():
    drawing = importlib.import_module("figures.atlas")
    readme = (records.ROOT / "README.md").read_text(encoding="utf-8").partition("[The atlas]")[2].splitlines()[0]
    title, second = _texts(drawing.draw())[:2]
    assert "race from run to run" in second and "random" in second
    for machine in atlas.machines()[:2]:
        rows = atlas.recorded(machine)
        batch = rows[(rows.property == "batch") & (rows.op.isin(atlas.names()))]
        moved, tested = (set(batch.op[batch.verdict.isin(some)]) for some in (["varies"], ["varies", "same"]))
        assert f"batch {len(moved)} of {len(tested)}," in drawing.words()
        left_out = set(rows.op[(rows.property == "run") & (rows.verdict == "varies")]) | {"multinomial", "dropout"}
        claim = f"{len(moved - left_out)} of {len(tested - left_out)}"
        assert claim in title and f"batch {claim} without" in drawing.words() and claim in readme
    assert "atlas" in figures.names()
