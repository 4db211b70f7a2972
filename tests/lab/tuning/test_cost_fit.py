"""The fit finds the quantities that made the times, says how well it chooses, and writes what the ops read."""
import json
import re
from functools import partial
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from kernels import runtime
from kernels.lab.tuning import cost_design as design
from kernels.lab.tuning import cost_fit, cost_times
from kernels.lab.tuning.cost_times import COST_TIMES, candidates
from kernels.op import DTYPES, Shape
from kernels.ops.matmul import cost
from kernels.ops.matmul.schedule import Schedule
from kernels.ops.matmul.ways import Form

WEIGHTS = (*design.FITTED[::4], design.CHECKED[0], design.CHECKED[3])
COUNTS = (7, 48, 128, 300, 1000, 2600)


def rows_of(points, dtype="bfloat16") -> pd.DataFrame:
    """Rows of cost_times.csv without times."""
    found = [(dtype, str(Shape(N=n, K=k)), tokens, str(s)) for n, k, tokens in points
             for s in candidates(n, k, tokens, DTYPES[dtype], 16)]
    rows = pd.DataFrame(found, columns=["dtype", "shape", "tokens", "schedule"])
    return rows.assign(us_p50=1.0, repeats=5, same_bits=True, registers=np.nan, shared_bytes=np.nan,
                       recorded_at="2026-01-01T00:00:00Z")


def truth(data: cost_fit.Timed, seed=3) -> cost_fit.Fitted:
    """Quantities that the fit does not begin with."""
    draw = np.random.default_rng(seed)
    rough = [design.rough(tile)[:-1] for tile in data.tiles]
    moved = np.array(rough).T * draw.uniform(0.6, 1.6, (len(design.rough(data.tiles[0])) - 1, len(rough)))
    rates = cost.Rates(*np.array(design.ROUGH) * draw.uniform(0.7, 1.3, len(design.ROUGH)))
    return cost_fit.Fitted(rates, cost.Tile(*moved, data.held), data.tiles)


@pytest.fixture(scope="module")
def made():
    """Times that a model of its own made, with 2% of noise, and what was fitted to them but for CHECKED weights."""
    rows = rows_of((n, k, tokens) for n, k in WEIGHTS for tokens in COUNTS)
    data = cost_fit.timed(rows, "bfloat16")
    noise = np.random.default_rng(0).lognormal(0, 0.02, len(rows))
    rows = data.rows.assign(us_p50=cost_fit.predicted(truth(data), data) * noise)
    default = rows.groupby(["dtype", "shape", "tokens"], as_index=False).us_p50.min().assign(schedule="cuda")
    fitted = cost_fit.fit(cost_fit.timed(rows[~rows["shape"].map(cost_fit.is_checked)], "bfloat16"), steps=1200)
    return SimpleNamespace(rows=rows, default=default, fitted=fitted)


def test_the_fit_finds_what_made_the_times(made):
    data = cost_fit.timed(made.rows, "bfloat16")
    error = np.log(cost_fit.predicted(made.fitted, data) / data.rows.us_p50)
    checked = data.rows["shape"].map(cost_fit.is_checked).to_numpy()
    assert checked.any() and np.median(np.abs(error[~checked])) < 0.025 and np.median(np.abs(error[checked])) < 0.05


def test_what_it_chooses_is_nearly_the_fastest_for_weights_it_never_saw(made):
    chosen = cost_fit.choices(made.fitted, cost_fit.timed(made.rows, "bfloat16"), made.default)
    lost = chosen[chosen.checked.astype(bool)].eval("us / best")
    assert len(lost) == 2 * len(COUNTS) and (lost >= 1).all() and np.exp(np.log(lost).mean()) < 1.03
    rough = cost_fit.Fitted(design.ROUGH, cost.Tile(*np.array([design.rough(t) for t in made.fitted.tiles]).T),
                            made.fitted.tiles)
    unfitted = cost_fit.choices(rough, cost_fit.timed(made.rows, "bfloat16"), made.default).eval("us / best")
    assert np.log(unfitted).mean() > 3 * np.log(lost).mean()  # so the bar above is not met by any model


def test_the_words_tell_what_the_choice_costs():
    chosen = pd.DataFrame({"us": [2.0, 4.0], "best": [1.0, 4.0], "cuda": [1.0, 8.0]})
    assert re.match(r"2 points: 1\.414 times the fastest's time.* 2\.00 at worst; 1\.000 of the default's speed \(the "
                    r"fastest: 1\.414\), 0\.50 at worst, below 0\.95 at 1 and below 0\.85 at 1", cost_fit.words(chosen))


@pytest.mark.parametrize("lockstep", [False, True])
def test_what_is_written_is_what_the_ops_read(lockstep, made, tmp_path):
    """Schedules in lockstep among it only if such were timed."""
    path = tmp_path / "h200_cost.json"
    cost_fit.write({"bfloat16": made.fitted}, {"device": "NVIDIA H200", "triton": "3.6.0"}, path, lockstep)
    known, form = cost.load("h200", tmp_path), Form.of(3328, 1792, 200, torch.bfloat16)
    assert json.loads(path.read_text())["device"] == "NVIDIA H200"
    ways = known.ways["bfloat16"]
    there = cost.Ways.of({t: cost.Tile(*(q[i] for q in made.fitted.tile)) for i, t in enumerate(made.fitted.tiles)},
                         lockstep)
    assert ways.schedules == there.schedules and any(s.lockstep for s in ways.schedules) == lockstep
    np.testing.assert_allclose(cost.predicted(ways, form, known.rates),
                               cost.predicted(there, form, made.fitted.rates), rtol=2e-3)


def test_the_command_fits_what_is_recorded(made, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "h200-2"
    COST_TIMES.merge(folder, pd.concat([made.rows, made.default.assign(repeats=5)]))
    monkeypatch.setattr(cost_fit, "fit", lambda data, rates=None: made.fitted)
    path = tmp_path / "schedules" / "h200_cost.json"
    path.parent.mkdir()
    command = ["--machine", "h200-2", "--out", str(tmp_path)]
    assert cost_fit.main([*command, "--check"]) == 0 and not path.exists()
    assert cost_fit.main(command) == 0 and path.exists()
    said = capsys.readouterr().out
    assert "bfloat16, not fitted: 12 points" in said and "bfloat16, fitted: " in said and str(path) in said
    assert cost_fit.main(["--machine", "h100", "--out", str(tmp_path)]) == 1
    assert "there is no cost_times.csv in" in capsys.readouterr().err


# what is timed


def test_every_weight_of_the_design_is_timed_at_many_token_counts():
    every = (*design.FITTED, *design.CHECKED, *design.POINTERS_ALONE, *design.POINTERS_LATER)
    assert len(set(every)) == len(every)
    weights = {point[1:3] for point in design.points() if point[0] == "bfloat16"}
    assert weights == set(every)
    assert all(len({p[3] for p in design.points() if p[1:3] == weight}) >= 7 for weight in weights)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_candidates_of_the_design_suit(dtype):
    for n, k, tokens in ((4352, 3840, 7), (384, 6144, 300), (1000, 1016, 48), (1024, 1001, 200)):
        found = candidates(n, k, tokens, DTYPES[dtype], 26)
        later = [s for s in found if s in design.added()]
        assert found and len(set(found)) == len(found) and len(later) <= 13 and len(found) - len(later) <= 26
        assert all(s.kind == "pointer" for s in found) or k * DTYPES[dtype].itemsize % 16 == 0


@pytest.mark.skipif(bool(runtime.WHY_NOT), reason=runtime.WHY_NOT or "Triton runs here")
def test_times_are_kept_and_not_taken_twice(tmp_path, monkeypatch):
    schedule = Schedule("pointer", 16, 16, 16, warps=1, stages=2)
    monkeypatch.setattr(runtime, "device", partial(torch.device, "cpu"))
    points = {("float32", 20, 24, tokens): [schedule] for tokens in (1, 3)}
    few = dict(list(points.items())[:1])
    assert cost_times.measure(tmp_path, few, 100, 2, print) == 2  # with the default
    first = COST_TIMES.read(tmp_path)
    assert cost_times.measure(tmp_path, points, 100, 2, print) == 4
    rows = COST_TIMES.read(tmp_path)
    assert set(rows.schedule) == {"cuda", str(schedule)} and rows.same_bits.notna().all() and (rows.us_p50 > 0).all()
    assert rows[rows.tokens == 1].us_p50.tolist() == first.us_p50.tolist()
    assert cost_times.measure(tmp_path, {("float32", 20, 24, 5): [schedule]}, 0, 2, print) == 4  # no time left
