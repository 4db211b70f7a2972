"""A sweep of two shapes and two dtypes: each row has the digest, rates, schedule and source of its own point."""
from collections import Counter
from dataclasses import replace
from itertools import product

import pandas as pd
import pytest
import torch

from kernels import bits, rms_norm, softmax
from kernels.lab import bench, older, provenance, records
from kernels.lab.sweep import measure as sweep
from kernels.op import DTYPES

CPU = torch.device("cpu")
OP = replace(rms_norm, schedule=lambda tokens, shape, dtype: chosen(tokens, shape, dtype))  # another at each count


def chosen(tokens, shape, dtype):
    return str(rms_norm.schedules(shape, dtype)[tokens + dtype.itemsize])

SHAPES, NAMES, TOKENS = ("D=32", "D=48,residual"), ("float32", "bfloat16"), (1, 3)
CLOCKS = ("graph", "call")
SAMPLES = ([1.0, 10.0, 100.0], [2.0, 20.0, 200.0])  # of the first pass and of the second, whose median is 15


def wanted(op=OP, **changes):
    options = {"tokens": TOKENS, "implementations": ("cuda", "python", "triton"), "dtypes": NAMES, "shapes": SHAPES,
               "clocks": CLOCKS, "passes": 2, "repeats": 3, "device": CPU}
    return sweep.Sweep(op, **(options | changes))


def tensors(arguments):
    return tuple(a for a in arguments if a is not None)


@pytest.fixture
def measured(monkeypatch):
    """What was timed: (inputs, clock, options) of each call. Times are SAMPLES, a microsecond longer on `graph`."""
    calls, passes = [], Counter()

    def measure(contenders, inputs, clock, **options):
        calls.append((inputs, clock, options))
        point = clock, bits.digest(tensors(inputs(0)))
        passes[point] += 1
        us = [us + (clock == "graph") for us in SAMPLES[(passes[point] - 1) % 2]]
        return {name: bench.Timing(us) for name in contenders}

    for named in ("clocks", "known"):
        monkeypatch.setattr(bench, named, lambda device: CLOCKS)
    monkeypatch.setattr(bench, "measure", measure)
    return calls


def recorded(folder, **changes):
    """The table that a sweep leaves, point after point."""
    for rows in sweep.sweep(wanted(**changes), done=records.TOKEN_SWEEP.read(folder), progress=False):
        records.TOKEN_SWEEP.merge(folder, rows)
    return records.TOKEN_SWEEP.read(folder)


def test_every_row_is_that_of_its_own_point(measured, tmp_path):
    rows = recorded(tmp_path)
    assert len(rows) == 2 * 2 * 2 * 3 * 2  # dtypes, shapes, token counts, implementations, clocks
    for r in rows.itertuples():
        dtype, width, residual = DTYPES[r.dtype], 32 if r.shape == "D=32" else 48, "residual" in r.shape
        given = rms_norm.inputs(r.tokens, r.shape, dtype)
        assert r.digest == bits.digest(rms_norm.implementation(r.implementation)(*given))[:16]
        moved = ((4 if residual else 2) * r.tokens + 1) * width * dtype.itemsize
        us = 15.0 + (r.clock == "graph")
        assert (r.us_p50, r.repeats) == (us, 6) and r.us_p05 < r.us_p20 < us < r.us_p80 < r.us_p95
        assert r.gbytes_per_s == pytest.approx(moved / (us * 1e-6) / 1e9, rel=1e-5)
        assert r.tflops == pytest.approx((5 if residual else 4) * r.tokens * width / (us * 1e-6) / 1e12, rel=1e-5)
        assert r.schedule == chosen(r.tokens, r.shape, dtype) if r.implementation == "triton" else pd.isna(r.schedule)
        assert r.source == provenance.of_row(rms_norm, r.implementation, r.dtype, r.shape, r.tokens, r.clock,
                                             r.schedule) and r.same_bits and r.elements_differ == 0


def test_a_point_is_timed_on_its_own_inputs(measured):
    list(sweep.sweep(wanted(passes=1), progress=False))
    points = list(product(NAMES, SHAPES, TOKENS))
    assert len(measured) == 2 * len(points)
    for i, (dtype, shape, tokens) in enumerate(points):
        for inputs, clock, options in measured[2 * i : 2 * i + 2]:
            assert clock in CLOCKS and options == {
                "device": CPU, "set_bytes": rms_norm.work(tokens, shape, DTYPES[dtype]).bytes, "repeats": 3}
            for seed in (0, 5):
                expected = rms_norm.inputs(tokens, shape, DTYPES[dtype], CPU, seed)
                assert bits.same_bits(tensors(inputs(seed)), tensors(expected))


def test_bits_are_compared_within_a_shape_and_dtype(measured, monkeypatch):
    """A contender whose first two numbers follow the number of rows, for one shape and dtype alone."""
    def moves(x, weight, residual=None):
        y = x.clone()
        if x.shape[1] == 48 and x.dtype == torch.float32:
            y[0, :2] += len(x)
        return y

    for shapes in (SHAPES, SHAPES[1:]):
        given = wanted(replace(OP, extras={"moves": moves}), implementations=("moves",), shapes=shapes)
        rows = [r for point in sweep.sweep(given, progress=False) for r in point]
        assert {(r["dtype"], r["shape"], r["tokens"]): (r["same_bits"], r["elements_differ"]) for r in rows} == {
            point: (False, 2) if point == ("float32", "D=48,residual", 1) else (True, 0)
            for point in product(NAMES, shapes, TOKENS)}


def test_a_contender_that_refuses_a_point_is_told_once_and_not_in_every_pass(measured, monkeypatch):
    """Of each point, of each clock, and of another kind of error."""
    def refuses(x, weight, residual=None):
        calls.append(len(x))
        raise TypeError("no") if len(calls) == 2 * len(TOKENS) * 4 else RuntimeError("not " + "again" * len(calls))

    calls, told, given = [], [], wanted(replace(OP, extras={"refuses": refuses}), implementations=("refuses", "python"),
                                        passes=3)
    rows = [r for point in sweep.sweep(given, on_error=lambda *of: told.append(of), progress=False) for r in point]
    assert {r["implementation"] for r in rows} == {"python"} and len(calls) == 3 * len(EVERY)
    places = [f"refuses at {tokens} tokens, {shape}, {dtype}" for dtype, shape, tokens in EVERY]
    assert [where for where, _ in told] == [*places, places[-1]] and isinstance(told[-1][1], TypeError)

    told.clear()
    timed = bench.measure
    monkeypatch.setattr(bench, "measure", lambda *given, **options: timed(*given, **options) | {"cuda": KeyError("no")})
    list(sweep.sweep(wanted(passes=3), on_error=lambda where, error: told.append(where), progress=False))
    assert told == [f"cuda at {tokens} tokens, {shape}, {dtype}, {clock}" for dtype, shape, tokens in EVERY
                    for clock in CLOCKS]


# resumed


def todo(done, **changes):
    return sweep.to_measure(wanted(**changes), done)


EVERY = list(product(NAMES, SHAPES, TOKENS))
POINT = ("bfloat16", "D=32", 3)


def at(done, point):
    return (done.dtype == point[0]) & (done["shape"] == point[1]) & (done.tokens == point[2])


def test_points_of_other_code_are_measured_again(measured, tmp_path, monkeypatch):
    done = recorded(tmp_path)
    assert todo(done) == [] and todo(done, again=True) == EVERY == todo(None)
    one = at(done, POINT) & (done.implementation == "python") & (done.clock == "call")
    for stale in (done.assign(source=done.source.mask(one, "0" * 12)), done[~one]):
        assert todo(stale) == [POINT]
        assert todo(stale, implementations=("cuda", "triton")) == todo(stale, clocks=("graph",)) == []
    stale = done.assign(source="0" * 12)
    assert todo(stale) == EVERY
    monkeypatch.setattr(older, "is_older", lambda row: row.source != "0" * 12)
    assert todo(stale) == []


def test_points_with_too_few_samples_are_measured_again(measured, tmp_path):
    done = recorded(tmp_path)
    assert todo(done, passes=2, repeats=3) == [] and todo(done, passes=1) == []
    assert todo(done, passes=3) == EVERY == todo(done, repeats=4)
    few = done.assign(repeats=done.repeats.mask(at(done, POINT), 5))
    assert todo(few) == [POINT]


def test_a_sweep_of_changed_code_replaces_the_rows_of_the_old(measured, tmp_path):
    done = recorded(tmp_path)
    records.TOKEN_SWEEP.merge(tmp_path, done[at(done, POINT)].assign(source="0" * 12, digest="f" * 16))
    assert at(records.TOKEN_SWEEP.read(tmp_path).query("source == '000000000000'"), POINT).all()
    before = len(measured)
    again = recorded(tmp_path)
    assert len(measured) - before == 2 * 2 and len(again) == len(done)  # clocks, passes
    assert again.drop(columns="recorded_at").equals(done.drop(columns="recorded_at"))


def test_the_largest_count_recorded_is_that_of_the_op_the_shape_and_the_dtype(measured, tmp_path):
    done = recorded(tmp_path)
    assert sweep.largest_recorded(wanted(), done) == 3
    for change in ({"op": "softmax"}, {"shape": "D=64"}, {"dtype": "float16"}, {"implementation": "split"}):
        further = pd.concat([done, done.iloc[:1].assign(tokens=512, **change)])
        assert sweep.largest_recorded(wanted(), further) == 3, change
        assert todo(further) == []
    assert sweep.largest_recorded(wanted(), done[done.op == softmax.name]) == 0


def test_each_clock_has_rows_of_its_own(measured, tmp_path):
    rows = recorded(tmp_path)
    assert Counter(rows.clock) == {clock: len(rows) // 2 for clock in CLOCKS}
    assert set(rows[rows.clock == "graph"].us_p50) == {16.0} and set(rows[rows.clock == "call"].us_p50) == {15.0}
