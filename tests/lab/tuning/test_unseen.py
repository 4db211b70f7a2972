"""Unseen weights: in no table and in no fit; timed in sweeps, with what tuning keeps; told in words."""
from argparse import Namespace
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import torch

from kernels import runtime, tables
from kernels.lab import older, records
from kernels.lab.tuning import cost_design as design
from kernels.lab.tuning import unseen, unseen_times
from kernels.lab.tuning.unseen_times import PASSES, UNSEEN, Measuring
from kernels.lab.tuning.unseen_weights import MODELS, counts, points
from kernels.op import Shape
from kernels.ops.matmul import learned
from kernels.ops.matmul.schedule import Schedule

CPU = torch.device("cpu")
NAMES = ("cuda", "triton", "frozen", "online")
SMALL = [("bfloat16", "N=24,K=32", 3), ("bfloat16", "N=24,K=32", 5), ("bfloat16", "N=20,K=36", 3)]
needs_triton = pytest.mark.skipif(bool(runtime.WHY_NOT), reason=runtime.WHY_NOT or "Triton runs here")


# which weights


def test_forty_weights_are_in_no_table_and_were_not_fitted():
    weights = [weight for model in MODELS.values() for weight in model]
    assert len(set(weights)) == len(weights) >= 40
    tabled = {sizes for path in tables.FOLDER.glob("*.json") if not path.stem.endswith("_cost")
              for dtypes in tables.load(path.stem, Schedule.parse).values() for shapes in dtypes.values()
              for sizes in shapes}
    assert tabled and tabled.isdisjoint(weights) and set(design.FITTED + design.POINTERS_ALONE).isdisjoint(weights)


def test_token_counts_are_off_powers_of_two():
    assert len(counts("bfloat16")) == 8 and all(count & (count - 1) for count in counts("bfloat16"))
    assert set(counts("float16")) < set(counts("bfloat16"))


def test_the_points_of_a_weight_follow_each_other():
    every = points()
    assert len(set(every)) == len(every) > 8 * 40 and {p[0] for p in every} == {"float16", "bfloat16"}
    changes = sum(a[:2] != b[:2] for a, b in pairwise(every))
    assert changes + 1 == len({p[:2] for p in every})  # so that a weight is made once a sweep


# measuring


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """SMALL points on a CPU, in the interpreter."""
    monkeypatch.setattr(unseen_times, "counts", lambda dtype: (3, 5))
    few = SMALL[:2]
    assert Measuring(tmp_path, few, NAMES, 1, CPU).run(600, print)
    return tmp_path, few


@needs_triton
def test_rows_are_those_of_a_token_sweep(measured):
    folder, few = measured
    rows = UNSEEN.read(folder)
    assert UNSEEN.columns == records.TOKEN_SWEEP.columns and len(rows) == len(NAMES) * len(few)
    assert (rows.repeats == PASSES).all() and set(rows.implementation) == set(NAMES)
    ours = rows[rows.implementation.isin(["triton", "online"])]
    assert ours.same_bits.all() and ours.schedule.notna().all() and not older.mark(rows).older.any()
    assert ours.groupby(["shape", "tokens"]).digest.nunique().max() == 1  # tuning changes no bit
    assert not learned.LEARNED  # and what it learned is not told to `triton`
    assert unseen.left(SMALL, NAMES, folder, 1) == SMALL[2:] and unseen.left(SMALL, NAMES, folder, 2) == SMALL


@needs_triton
@pytest.mark.parametrize("again, timed", [(False, SMALL[2:]), (True, SMALL)])
def test_points_that_are_recorded_are_timed_again_if_wanted(again, timed, measured, monkeypatch):
    other = ("bfloat16", "N=28,K=32", 3)
    monkeypatch.setattr(unseen, "points", lambda dtypes: [*SMALL, other])
    monkeypatch.setattr(unseen, "MODELS", {name: [tuple(Shape.parse(p[1]).values()) for p in found]
                                           for name, found in (("small", SMALL), ("other", [other]))})
    a = Namespace(models=["small"], dtypes=["bfloat16"], again=again, repeats=1)
    assert unseen._wanted(a, NAMES, measured[0]) == timed


@needs_triton
def test_a_sweep_ends_when_its_time_is_over(tmp_path, monkeypatch):
    monkeypatch.setattr(unseen_times, "counts", lambda dtype: (3, 5))
    assert not Measuring(tmp_path, SMALL, ("cuda",), 1, CPU).run(0, print)
    assert not len(UNSEEN.read(tmp_path))


@needs_triton
def test_a_contender_that_fails_is_told_and_the_others_go_on(tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("no schedule runs")
    monkeypatch.setattr(unseen_times, "counts", lambda dtype: (3, 5))
    measuring, said = Measuring(tmp_path, SMALL[:1], ("cuda", "frozen"), 1, CPU), []
    measuring.op.extras["frozen"] = broken
    measuring.run(600, said.append)
    assert list(UNSEEN.read(tmp_path).implementation) == ["cuda"]
    assert any("frozen: RuntimeError: no schedule runs" in line for line in said)


@needs_triton
def test_all_that_may_run_at_a_point_is_made_ready(monkeypatch):
    seen = []
    monkeypatch.setattr(unseen_times, "good_kernels", lambda found, workers, progress: seen.append(found) or set())
    wrong = unseen_times.prepare(SMALL, CPU, 2)
    assert set(seen[0]) == {("bfloat16", 24, 32, 3), ("bfloat16", 24, 32, 5), ("bfloat16", 20, 36, 3)}
    for (_, n, k, tokens), schedules in seen[0].items():
        first = unseen_times.matmul.schedule(tokens, Shape(N=n, K=k), torch.bfloat16)
        assert str(schedules[0]) == first and schedules[-1] == unseen_times.FROZEN
        assert len(schedules) == 3
    assert len(wrong) == 9 and wrong[0][0] == ("bfloat16", 24, 32, 3)


# in words


def recorded(**speeds) -> pd.DataFrame:
    """Rows in which each contender has this speed at each of two weights."""
    return pd.DataFrame([{"dtype": "bfloat16", "shape": shape, "tokens": 3, "implementation": name,
                          "us_p50": 10.0 if name == "cuda" else 10.0 / speed, "schedule": f"{name} at {shape}"}
                         for i, shape in enumerate(("N=8,K=16", "N=8,K=17", "N=9,K=16"))
                         for name, speed in (("cuda", 1), *((name, values[i]) for name, values in speeds.items()))])


def test_the_words_tell_means_and_the_slowest():
    said = list(unseen.words(recorded(triton=(0.5, 0.9, 2.0), frozen=(1, 1, 1)), worst=2))
    assert said[2].startswith("triton, bfloat16, k a multiple of 8: 1.000 of the default's speed in the geometric mean "
                              "of 2 points, 0.50 at worst (N=8,K=16 3), below 0.80 at 1, 0.85 at 1, 0.90 at 1")
    assert said[3].startswith("triton, bfloat16, other k: 0.900 of the default's speed in the geometric mean of 1 p")
    assert said[4:] == ["slowest of triton:", "  0.50  bfloat16 N=8,K=16 3  triton at N=8,K=16",
                        "  0.90  bfloat16 N=8,K=17 3  triton at N=8,K=17"]


def test_a_point_without_the_default_has_no_speed():
    rows = recorded(triton=(1, 1, 1))
    table = unseen.speeds(rows[~((rows.implementation == "cuda") & (rows["shape"] == "N=8,K=16"))])
    assert np.isnan(table.triton[("bfloat16", "N=8,K=16", 3)]) and table.triton.notna().sum() == 2


def test_the_command_needs_a_gpu_and_can_say_what_is_recorded(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(runtime, "HAS_GPU", False)
    assert unseen.main(["--out", str(tmp_path)]) == 1 and "there is no CUDA GPU here" in capsys.readouterr().err
    rows = recorded(triton=(0.5, 0.9, 2.0)).assign(op="matmul", clock="cold")
    UNSEEN.merge(tmp_path / "h200", rows)
    assert unseen.main(["--out", str(tmp_path), "--say"]) == 0 and "slowest of triton" in capsys.readouterr().out
