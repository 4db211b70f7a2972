"""Rollbacks counted and drawn, and a mix of requests: predictions by pencil, measurements that are what they say."""
import matplotlib as mpl
import pandas as pd
import pytest
import torch

from kernels.lab import records
from kernels.lab.serving import measure as serving
from kernels.lab.verifying import chart, explore, measure
from kernels.lab.verifying.explore import Costs, Mix, Served
from kernels.lab.verifying.measure import ROLLBACKS
from kernels.lab.verifying.widget import MixExplorer
from kernels.model import Llama

TINY = Llama("tiny", dtype=torch.float32, device="cpu")
COSTS = Costs(step_ms=10.0, fixed_step_ms=12.0, pass_ms=20.0)
FEW = {"group": 2, "size": 2, "count": 12}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """A model that takes no time, and no times kept from another one."""
    monkeypatch.setattr(serving, "_loaded", lambda dtype, device: TINY)
    timed = explore.costs, explore.measured
    for kept in timed:
        kept.cache_clear()
    yield
    for kept in timed:
        kept.cache_clear()


def rows(*found):
    """window, tokens, drafts, flips, recomputed, and tokens and flips before and behind the first flip."""
    names = ("window", "tokens", "drafts", "flips", "recomputed", "first_tokens", "first_flips", "later_tokens",
             "later_flips")
    table = pd.DataFrame([dict(zip(names, row, strict=True)) for row in found])
    return table.assign(share=table.recomputed / table.tokens)


# rollbacks

def test_a_row_counts_what_the_engine_did():
    """Two answers of 12: each third draft is perturbed, and spans end where the answer does."""
    row = measure.rollbacks([4], flip_every=3, **FEW).iloc[0]
    engine, answers = measure.served(4, flip_every=3, **FEW)
    assert row.tokens == engine.verified == 24 and row.flips == sum(request.flips for request in answers) > 4
    assert row.drafts == engine.drafts and row.share == row.recomputed / 24
    assert row.first_flips == 2 and row.later_flips == row.flips - 2
    assert row.first_tokens == sum(request.flipped_at[0] + 1 for request in answers)
    assert row.first_tokens + row.later_tokens == 24
    assert (row.model, row.verifier, row["dtype"], row.window, row.group) == ("tiny", "default", "float32", 4, 2)


def test_requests_are_held_out_text_of_lengths_that_differ():
    _, answers = measure.served(4, group=2, size=4, count=2)
    lengths = [len(request.prompt) for request in answers]
    assert lengths == [lengths[0] - less for less in (0, 7, 14, 21)] and lengths[-1] > 10
    assert all(bytes(request.prompt) in serving.held_out() for request in answers)


def test_without_flips_the_first_span_is_the_whole_answer(monkeypatch):
    row = measure.rollbacks([4], temperature=0.0, **FEW).iloc[0]
    assert row.flips == row.recomputed == row.later_tokens == 0 and row.first_tokens == 24


@pytest.mark.parametrize(("flip", "window", "share"), [(0.0, 8, 0.0), (1.0, 8, 7.0), (0.5, 2, 1 / 3)])
def test_the_predicted_share_by_pencil(flip, window, share):
    assert measure.predicted_share(flip, window) == pytest.approx(share)


def test_the_command_records_each_window(tmp_path, capsys):
    asked = ["--windows", "4", "8", "--requests", "2", "--tokens", "8", "--out", str(tmp_path), "--machine", "here"]
    assert measure.main(asked) == 0
    table = ROLLBACKS.read(tmp_path / "here")
    assert table.window.tolist() == [4, 8] and set(table.tokens) == {16}
    assert "W=8: " in capsys.readouterr().err


def test_the_picture_says_what_the_rows_hold():
    table = rows((4, 1000, 1100, 10, 15, 400, 4, 600, 6), (16, 1000, 1300, 10, 80, 500, 5, 500, 5))
    figure = chart.rollbacks_chart(table, pd.DataFrame({"window": [16, 64], "share": [3.9, 16.6]}))
    left, right = figure.axes
    assert list(left.lines[0].get_ydata()) == pytest.approx([1.5, 8.0])
    rate = 20 / (1085 + 1220)
    assert list(left.lines[1].get_ydata()) == pytest.approx([100 * measure.predicted_share(rate, w) for w in (4, 16)])
    assert list(right.lines[0].get_ydata()) == [100, 100] and list(right.lines[1].get_ydata()) == [100, 100]
    assert "1.5% with windows of 4, 8.0% with windows of 16" in chart.rollbacks_words(table)


def test_the_drawing_of_a_pass_says_what_leaves():
    assert [chart.kept(drafts, (5, 6, 7)) for drafts in ((5, 6, 7), (5, 9, 7), (9, 6, 7))] == [3, 2, 1]
    figure = chart.protocol_chart((5, 9, 7), (5, 6, 8))
    boxes = {(text.get_position(), text.get_text()): text.get_bbox_patch() for text in figure.axes[0].texts}
    assert [boxes[(x, -2), str(token)].get_facecolor()[:3] for x, token in enumerate((5, 6, 8))] \
        == [mpl.colors.to_rgb(chart._BOXES[state][0]) for state in ("kept", "replaced", "dropped")]
    assert ((0, -1), "last") in boxes and ((1, -1), "5") in boxes and ((2, -1), "9") in boxes
    title = figure.axes[0].get_title(loc="left")
    assert "1 of 3 drafts are kept (green), draft 2 is replaced (red), 1 are dropped" in title
    assert chart.protocol_claim((5, 6), (5, 6)) == "All 2 drafts are kept"


# a mix

def test_the_prediction_by_pencil():
    """8 requests, half of them sure, W = 16, G = 4: 16 steps and one pass for 8 x 16 tokens."""
    found = explore.predicted(Mix(8, 0.5, 16, 4), COSTS)
    assert found["loose"].tokens_per_s == pytest.approx(800)
    assert found["invariant"].tokens_per_s == pytest.approx(1e3 * 8 / 12)
    assert found["verified"].tokens_per_s == pytest.approx(1e3 * 128 / 180)
    assert found["verified"].held_back_ms == pytest.approx(7.5 * 10 + 20)
    with_flips = explore.predicted(Mix(8, 0.5, 16, 4), COSTS, flip=1.0)["verified"]
    assert with_flips.tokens_per_s == pytest.approx(1e3 * (4 * 16 + 4) / 180), "each pass keeps one token of a request"
    nobody = explore.predicted(Mix(8, 0.0, 16, 4), COSTS)
    assert nobody["verified"] == nobody["loose"]


@pytest.mark.parametrize(("fields", "said"), [
    ({"batch": 0}, "batch must be a whole number of at least 1, got 0"), ({"group": 0}, "group"),
    ({"window": 1.5}, "window must be a whole number of at least 1, got 1.5"), ({"share": 1.1}, "share must lie in"),
])
def test_a_mix_that_cannot_be_is_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        Mix(**fields)


def test_what_is_measured_is_served_as_it_says(monkeypatch):
    mix, seen = Mix(3, 0.7, 4, 2, count=6), []
    made = explore._engine
    monkeypatch.setattr(explore, "_engine", lambda *a: seen.append(made(*a)) or seen[-1])
    found = {way: explore.measured(mix, way) for way in explore.WAYS}
    assert [engine.model.ops_name for engine in seen] == ["default", "default", "tiled"]
    assert seen[1].verified == 2 * 6 and seen[1].passes and found["verified"].held_back_ms > 0
    assert all(served.tokens_per_s > 0 for served in found.values()) and found["loose"].held_back_ms == 0
    with pytest.raises(ValueError, match="way must be one of loose, verified, invariant, got 'fast'"):
        explore.measured(mix, "fast")


def test_the_share_of_drafts_that_flipped_is_of_those_that_were_looked_at(monkeypatch):
    engine, submitted, asked = explore._engine, explore._submitted, []

    def faulty(*a):
        made = engine(*a)
        made.flip_every = 3
        return made
    monkeypatch.setattr(explore, "_engine", faulty)
    monkeypatch.setattr(explore, "_submitted", lambda *a: asked.extend(submitted(*a)) or asked)
    found = explore.measured(Mix(2, 1.0, 4, 2, count=9), "verified")
    flips, kept = sum(request.flips for request in asked), sum(len(request.held_back) for request in asked)
    assert flips and kept and found.flipped == flips / (flips + kept)


def test_ways_take_turns_and_the_median_pass_counts(monkeypatch):
    turns, rates = [], iter(range(1, 100))
    monkeypatch.setattr(explore, "costs", lambda *_: COSTS)
    monkeypatch.setattr(explore, "_ready", lambda mix, way, ops: (way, ops))
    monkeypatch.setattr(explore, "_served", lambda engine, mix, way: turns.append((mix.share, *engine))
                        or Served(rate := next(rates), 5.0, rate / 100))
    rows = explore.record(Mix(8, 0.5, 16, 4), (0.5, 1.0), ["frozen", "tiled"])
    half, flipped = next(rows)
    assert flipped == 0.06, "of the pass of the median rate"
    asked = [("loose", None), ("verified", None), ("invariant", None), ("invariant", "frozen")]
    assert turns == [(0.5, *each) for each in asked] * 3, "a share is whole before the next one begins"
    assert half.tokens_per_s.tolist() == [5, 6, 7, 8], "of 1 5 9, 2 6 10 and so on"
    (every, _), = rows
    assert every.tokens_per_s.tolist() == [17, 18, 19, 20] and set(every.held_back_ms) == {5.0}
    for share, some in ((0.5, half), (1.0, every)):
        assert list(zip(some.share, some.way, some.ops, strict=True)) == [
            (share, *row) for row in (("loose", "default"), ("verified", "default"), ("invariant", "tiled"),
                                      ("frozen", "frozen"))]
        assert some.predicted_tokens_per_s.isna().tolist() == [False, False, False, True]
    assert every.predicted_tokens_per_s[1] == pytest.approx(explore.predicted(
        Mix(8, 1.0, 16, 4), COSTS)["verified"].tokens_per_s)
    assert explore._arguments(["--ops", "frozen"]).ops == ["frozen"]


def test_a_mix_that_was_cut_short_goes_on_where_it_stopped(monkeypatch, tmp_path):
    served = []

    def serve(engine, mix, way):
        served.append(mix.share)
        if len(served) == stop:
            raise RuntimeError("stopped")
        return Served(1.0)
    monkeypatch.setattr(explore, "costs", lambda *_: COSTS)
    monkeypatch.setattr(explore, "_ready", lambda *_: None)
    monkeypatch.setattr(explore, "_served", serve)
    asked = ["--batch", "2", "--shares", "0", "0.5", "1", "--out", str(tmp_path), "--machine", "here"]
    stop = 10
    with pytest.raises(RuntimeError, match="stopped"):
        explore.main(asked)
    assert set(explore.MIX.read(tmp_path / "here").share) == {0.0} and records.read_machine(tmp_path / "here")
    stop = 0
    for words, shares in (([], [0.5, 1.0]), ([], []), (["--tokens", "64"], [0.0, 0.5, 1.0]), (["--windows", "8"],
                          [0.0, 0.5, 1.0]), (["--ops", "frozen"], [0.0, 0.5, 1.0]), (["--again"], [0.0, 0.5, 1.0])):
        served.clear()
        assert explore.main([*asked, *words]) == 0 and sorted(set(served)) == shares, words
    served.clear()
    monkeypatch.setattr(explore.provenance, "source", lambda *_: "0123456789ab")
    assert explore.main(asked) == 0 and len(served) == 27


def test_windows_are_recorded_one_by_one_and_skipped_when_asked_again(monkeypatch, tmp_path):
    windows, real = [], measure.rollbacks

    def one(some, **of):
        windows.extend(some)
        if len(windows) == stop:
            raise RuntimeError("stopped")
        return real(some, **of)
    monkeypatch.setattr(measure, "rollbacks", one)
    asked = ["--windows", "2", "3", "--group", "2", "--requests", "2", "--tokens", "4", "--out", str(tmp_path),
             "--machine", "here"]
    stop = 2
    with pytest.raises(RuntimeError, match="stopped"):
        measure.main(asked)
    assert measure.ROLLBACKS.read(tmp_path / "here").window.tolist() == [2]
    stop = 0
    for words, found in (([], [3]), ([], []), (["--requests", "3"], [2, 3]), (["--requests", "3", "--tokens", "5"],
                         [2, 3]), (["--dtype", "bfloat16"], [2, 3]), (["--dtype", "bfloat16", "--again"], [2, 3])):
        windows.clear()
        assert measure.main([*asked, *words]) == 0 and windows == found, words


def test_an_engine_is_warm_before_it_serves(monkeypatch):
    warm = []
    monkeypatch.setattr(explore.Engine, "warm_up", lambda engine: warm.append(engine.tokens))
    explore.measured(Mix(2, 0.5, 4, 2, count=3), "verified")
    assert warm == [0]


def test_steps_are_timed_of_an_engine_that_is_warm(monkeypatch):
    def timed(step):
        step()
        did.append([len(request.tokens) for request in engines[0].scheduler.running])
        return 1.0

    def step(engine):
        served.append([len(request.tokens) for request in engine.scheduler.running])
        return step_as_ever(engine)

    did, served, engines, step_as_ever = [], [], [], explore.Engine.step
    monkeypatch.setattr(explore.Engine, "warm_up", lambda engine: engines.append(engine) or did.append(engine.tokens))
    monkeypatch.setattr(explore.Engine, "step", step)
    monkeypatch.setattr(explore, "_timed", timed)
    assert explore._step_ms(Mix(2, 0.5, 4, 2, count=12), "default", steps=3) == 1.0
    assert did[0] == 0 and len(did) == 1 + explore.WARM + 3
    assert served[: len(served) // 2] == served[len(served) // 2:]  # it met each length before
    assert not engines[0].scheduler.requests
    with pytest.raises(ValueError, match="count must be more than 5.* got 5"):
        explore._step_ms(Mix(2, 0.5, 4, 2, count=5), "default", steps=3)


def test_the_command_records_predicted_beside_measured(tmp_path):
    asked = ["--batch", "2", "--tokens", "6", "--shares", "0", "1", "--windows", "4", "--groups", "2", "--out",
             str(tmp_path), "--machine", "here"]
    assert explore.main(asked) == 0
    table = explore.MIX.read(tmp_path / "here")
    assert sorted(zip(table.way, table.share, strict=True)) == sorted((w, s) for w in explore.WAYS for s in (0.0, 1.0))
    assert (table.tokens_per_s > 0).all() and (table.predicted_tokens_per_s > 0).all()


def test_the_picture_of_a_mix_marks_what_was_measured(monkeypatch):
    monkeypatch.setattr(explore, "costs", lambda *_: COSTS)
    monkeypatch.setattr(explore, "measured", lambda mix, way: Served({"loose": 750, "verified": 500}.get(way, 600), 90))
    figure, words = chart.explored(16, 4, 0.5, 8, measure=True)
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert lines["verified, measured"].get_ydata() == [500] and lines["verified, measured"].get_xdata() == [50]
    assert lines["verified"].get_ydata()[10] == pytest.approx(1e3 * 128 / 180)
    assert "invariant is faster, 1.20 times (measured)" in words
    assert "held back 95 ms predicted, 90 ms measured" in words


def test_a_slider_moves_the_picture(monkeypatch):
    monkeypatch.setattr(explore, "costs", lambda *_: COSTS)
    made = MixExplorer()
    before = made.chart.value
    made.share.value = 100
    assert made.chart.value != before and "8 of 8 deterministic" in made.words.value and not made.errors.value
    made.measure.value = True
    assert "measured" in made.words.value
    with pytest.raises(ValueError, match="window must be"):
        MixExplorer(window=0)
