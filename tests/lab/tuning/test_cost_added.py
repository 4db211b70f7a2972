"""Tiles that came later: what is timed at points that were recorded without them, and when a time is comparable."""
from functools import partial
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from kernels import runtime
from kernels.lab.proofs.generated_code import Job, compile_ahead
from kernels.lab.tuning import cost_added, cost_fit, cost_times
from kernels.lab.tuning import cost_design as design
from kernels.lab.tuning.cost_added import Todo, beside, part_of, wanting
from kernels.lab.tuning.cost_times import COST_TIMES
from kernels.ops.matmul.schedule import SHARED, Schedule
from kernels.ops.matmul.ways import Sizes

FIRST, LATER = (Schedule("pointer", 16, width, 16, warps=1, stages=2) for width in (16, 32))
POINT, ANCHORS = ("float32", 20, 24, 3), {"cuda": 10.0, str(FIRST): 20.0}


@pytest.fixture
def one_added(monkeypatch):
    """A design in which LATER alone came later."""
    monkeypatch.setattr(design, "added", lambda: frozenset({LATER}))


def row(schedule, us, point=POINT) -> dict:
    dtype, n, k, tokens = point
    return {"dtype": dtype, "shape": f"N={n},K={k}", "tokens": tokens, "schedule": str(schedule), "us_p50": us,
            "repeats": 5, "same_bits": True, "recorded_at": "2026-01-01T00:00:00Z"}


def table(*rows) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=COST_TIMES.columns)


def test_a_recorded_point_wants_only_what_came_later(one_added):
    other = Schedule("pointer", 32, 32, 16, warps=1, stages=2)
    points = {POINT: [FIRST, other, LATER], ("float32", 20, 24, 5): [FIRST, LATER]}
    recorded = table(row("cuda", 10.0), row(FIRST, 20.0), row(Schedule(), 30.0))
    todo = wanting(points, recorded)
    assert todo == {POINT: Todo([LATER], ANCHORS), ("float32", 20, 24, 5): Todo([FIRST, LATER], {})}
    assert todo[POINT].contenders == [LATER, FIRST]
    assert list(wanting(points, table(*recorded.to_dict("records"), row(LATER, 9.0)))) == [("float32", 20, 24, 5)]


def test_a_new_time_is_scaled_by_what_was_timed_again():
    """The GPU takes 1.02 times and 1.05 times as long as then: the new one would have taken less."""
    kept, = beside([row("cuda", 10.2), row(FIRST, 21.0), row(LATER, 40.0)], ANCHORS)
    assert kept["schedule"] == str(LATER) and kept["us_p50"] == pytest.approx(40.0 / (1.02 * 1.05) ** 0.5)
    fresh = [row("cuda", 10.2), row(LATER, 40.0)]
    assert beside(fresh, {}) == fresh


@pytest.mark.parametrize("cuda, first, said", [
    (11.2, 22.4, "not as fast as when"), (8.9, 17.8, "not as fast as when"), (10.5, 20.0, "do not agree"),
    (10.0, None, "not as fast as when")])
def test_a_gpu_that_is_not_as_fast_as_then_gives_no_rows(cuda, first, said):
    rows = [row("cuda", cuda), row(LATER, 40.0), *([row(FIRST, first)] if first else [])]
    with pytest.raises(ValueError, match=said):
        beside(rows, ANCHORS)


def test_a_point_without_two_anchors_gives_no_rows():
    with pytest.raises(ValueError, match="not as fast"):
        beside([row("cuda", 10.0), row(LATER, 40.0)], {"cuda": 10.0})


def test_parts_share_the_weights():
    points = cost_times.wanted(26)
    parts = [part_of(points, (i, 4)) for i in (1, 2, 3, 4)]
    assert sorted(p for part in parts for p in part) == sorted(points) and part_of(points, (1, 1)) == points
    weights = [{point[:3] for point in part} for part in parts]
    assert all(not a & b for i, a in enumerate(weights) for b in weights[:i])
    assert max(map(len, parts)) < 1.3 * min(map(len, parts))


@pytest.mark.parametrize("text", ["0/4", "5/4", "4", "1/x"])
def test_a_part_that_is_none_is_refused(text):
    with pytest.raises(SystemExit):
        cost_times.main(["--part", text])


@pytest.mark.skipif(bool(runtime.WHY_NOT), reason=runtime.WHY_NOT or "Triton runs here")
def test_a_point_gets_what_came_later_beside_what_it_has(one_added, tmp_path, monkeypatch):
    monkeypatch.setattr(runtime, "device", partial(torch.device, "cpu"))
    monkeypatch.setattr(cost_added, "NEAR", 1e9)  # this machine's clock may say anything
    monkeypatch.setattr(cost_added, "AGREE", 1e9)
    cost_times.measure(tmp_path, {POINT: [FIRST]}, 100, 2, print)
    first = COST_TIMES.read(tmp_path)
    assert cost_times.measure(tmp_path, {POINT: [FIRST, LATER]}, 100, 2, print) == 3
    rows = COST_TIMES.read(tmp_path).set_index("schedule")
    assert rows.us_p50[first.schedule].tolist() == first.us_p50.tolist()  # the anchors' rows stay
    assert rows.us_p50[str(LATER)] > 0 and rows.same_bits[str(LATER)]
    said = []
    monkeypatch.setattr(cost_added, "NEAR", 1 + 1e-9)
    cost_times.measure(tmp_path / "b", {POINT: [FIRST]}, 100, 2, print)
    assert cost_times.measure(tmp_path / "b", {POINT: [LATER]}, 100, 2, said.append) == 2
    assert any("not as fast as when" in line for line in said)


@pytest.mark.skipif(bool(runtime.WHY_NOT), reason=runtime.WHY_NOT or "Triton runs here")
def test_the_command_times_a_part_and_only_what_is_wanted(one_added, tmp_path, monkeypatch, capsys):
    """Two weights, of which the first was recorded: each part has one, and compiles no kernel of the other."""
    points, asked = {POINT: [FIRST, LATER], ("float32", 24, 40, 2): [FIRST, LATER]}, []
    monkeypatch.setattr(runtime, "device", partial(torch.device, "cpu"))
    monkeypatch.setattr(cost_added, "NEAR", 1e9)
    monkeypatch.setattr(cost_added, "AGREE", 1e9)
    cost_times.measure(tmp_path / "here", {POINT: [FIRST]}, 100, 2, print)
    monkeypatch.setattr(cost_times, "runtime", SimpleNamespace(HAS_GPU=True, device=runtime.device))
    monkeypatch.setattr(cost_times, "wanted", lambda most, dtypes: points)
    monkeypatch.setattr(cost_times, "good_kernels", lambda found, workers, say: asked.append(found) or {
        cost_times.kernel_of(*p[:3], s) for p, schedules in found.items() for s in schedules})
    command = ["--out", str(tmp_path), "--machine", "here", "--repeats", "2", "--part"]
    assert cost_times.main([*command, "1/2"]) == 0 and asked.pop() == {POINT: [LATER, FIRST]}
    assert "1 points, 1 schedules to time" in capsys.readouterr().out
    assert cost_times.main([*command, "2/2"]) == 0 and list(asked.pop()) == [("float32", 24, 40, 2)]
    rows = COST_TIMES.read(tmp_path / "here")
    assert sorted(rows[["shape", "schedule"]].value_counts()) == [1] * 6
    assert cost_times.main([*command, "1/1"]) == 0 and asked.pop() == {}
    assert len(COST_TIMES.read(tmp_path / "here")) == 6


# the fit


def test_a_tile_that_was_not_timed_is_not_known():
    timed, other = Schedule.parse("hopper 256x192x64 warps=8 stages=3 group=8 persistent store"), Schedule()
    point = ("bfloat16", 2560, 6400, 2600)
    rows = table(row("cuda", 10.0, point), row(timed, 20.0, point), row(other, 20.0, point))
    assert timed in design.added() and cost_fit.measured_tiles(rows, "bfloat16") == [timed]
    assert cost_fit.timed(rows, "bfloat16").rows.schedule.tolist() == [str(timed)]


# the tiles


def test_what_came_later_is_new():
    first = {str(s) for s in design.rough_tiles(torch.bfloat16)} - set(map(str, design.added()))
    assert len(first) == len(list(filter(None, design.TILES.split("\n"))))
    assert all(s.shared_bytes <= SHARED for s in design.added())


def test_twelve_warps_have_no_room_for_the_sums_of_two_large_segments():
    """Each has 160 registers: 96 for a chain, 96 for the sums before it."""
    three, two = (Schedule.parse(f"hopper 192x{wide}x64 warps={warps} stages=3 group=8 persistent store")
                  for wide, warps in ((192, 12), (128, 8)))
    assert three.waiting_bytes and not Sizes.of(three).sequence and not two.waiting_bytes and Sizes.of(two).sequence
    assert not Schedule.parse("hopper 192x128x64 warps=12 stages=4 group=8 persistent store").waiting_bytes


@pytest.mark.skipif(not runtime.HAS_TRITON, reason="compiles")
@pytest.mark.parametrize("line", [
    "hopper 256x192x64 warps=8 stages=3 group=8 persistent store",
    "hopper 192x128x64 warps=8 stages=5 group=8 swap persistent store pingpong",
    "hopper 144x192x64 warps=12 stages=5 group=8 swap persistent store"])
def test_the_largest_have_room_in_shared_memory(line):
    """With what turns results into whole lines, which a schedule does not count."""
    assert Schedule.parse(line) in design.added()
    code, = compile_ahead([Job("matmul", "N=4608,K=3584,bias", "bfloat16", line, 90)], workers=1)
    assert 0 < code.shared_bytes <= SHARED
