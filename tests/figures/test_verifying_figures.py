"""Rollbacks, and when to verify: what is drawn is what was recorded; the claim is of the numbers, on every machine."""
import json

import pytest

from figures import rollbacks, verify_or_invariant
from figures.page import PAGES
from kernels.lab import records, style
from kernels.lab.verifying.explore import MIX
from kernels.lab.verifying.measure import ROLLBACKS

SHARES = (0.0, 0.25, 0.5, 1.0)
OPS = {"loose": "default", "verified": "default", "invariant": "invariant", "frozen": "frozen"}
GPU, CPU = {"device": "NVIDIA H200", "torch": "2.11.0"}, {"device": "AMD EPYC, 1 threads", "torch": "2.13.0"}


def machine(data, name, about):
    (data / name).mkdir(exist_ok=True)
    (data / name / "machine.json").write_text(json.dumps(about))
    return data / name


def mix(folder, speeds, model="llama-3.1-8b", shares=SHARES, **of):
    """Tokens a second of each way, at each share."""
    common = {"model": model, "batch": 32, "window": 64, "group": 8, "tokens": 128, "recorded_at": "2026",
              "source": "x"}
    MIX.merge(folder, [common | of | {
        "way": way, "ops": OPS.get(way) if model != "byte" else "tiled" if way == "invariant" else "default",
        "share": share, "tokens_per_s": speed, "held_back_ms": 200 * share if way == "verified" else 0.0,
        "predicted_tokens_per_s": float("nan") if way == "frozen" else 1.1 * speed, "predicted_held_back_ms": 0.0}
        for way, every in speeds.items() for share, speed in zip(shares, every, strict=True)])


def rolled(folder, flips, **of):
    """Of 1,000 tokens for each window -> flips; each flip drops half a window."""
    common = {"model": "byte", "verifier": "default", "dtype": "bfloat16", "temperature": 1.0, "group": 4,
              "requests": 16, "tokens": 1000, "first_flips": 2, "first_tokens": 400, "later_tokens": 600,
              "recorded_at": "2026", "source": "x"}
    ROLLBACKS.merge(folder, [common | of | {
        "window": window, "flips": count, "recomputed": count * window // 2, "share": count * window / 2000,
        "drafts": 1000 + count * window // 2, "later_flips": count - 2} for window, count in flips.items()])


@pytest.fixture
def data(tmp_path):
    style.theme()
    folder = machine(tmp_path, "h200", GPU)
    mix(folder, {"loose": [6000] * 4, "verified": [5900, 5000, 4500, 4000], "invariant": [6100] * 4,
                 "frozen": [4800] * 4})
    rolled(folder, {4: 10, 16: 12, 64: 10})
    return tmp_path


def said(figure) -> str:
    return " ".join([figure.get_suptitle(), figure.get_supxlabel()]).replace("\n", " ")


def lines(axes) -> dict[str, list[tuple[float, float]]]:
    return {line.get_label(): list(zip(*map(list, line.get_data()), strict=True)) for line in axes.lines}


# when to verify

def test_each_way_is_a_line_over_the_share(data):
    figure = verify_or_invariant.draw(data)
    found = lines(figure.axes[0])
    assert found["verified"] == [(0, 5900), (25, 5000), (50, 4500), (100, 4000)]
    assert [y for _, y in found["frozen: one schedule for all"]] == [4800] * 4
    assert {label for label in found if not label.startswith("_")} == {
        "loose: default ops, nobody verified", "verified", "invariant ops for all", "frozen: one schedule for all",
        "predicted from one step and one pass"}
    assert found["_verified, predicted"] == [(x, pytest.approx(1.1 * y)) for x, y in found["verified"]]
    assert {label for label in found if "_" in label} == {f"_{way}, predicted" for way in ("loose", "verified",
                                                                                          "invariant")}
    assert figure.axes[0].get_ylim()[0] == 0 and "H200" in said(figure) and "llama-3.1-8b" in said(figure)


def test_the_claim_is_of_shares_above_none(data):
    """At a share of 0 nobody is verified, and the default's speed is no win."""
    assert "Verification wins nowhere: 0.66 to 0.82 of the tokens a second" in said(verify_or_invariant.draw(data))


@pytest.mark.parametrize(("verified", "claim"), [
    ([7000, 7000, 6500, 6200], "Verification serves 1.02 to 1.15 times the tokens of invariant ops, at every share"),
    ([7000, 7000, 6500, 6000], "Verification serves more tokens than invariant ops up to 50% of deterministic"),
    ([7000, 6000, 6500, 6000], "Verification serves more tokens than invariant ops at 50%"),
    ([7000, 6100, 6000, 5900], "Verification wins nowhere: 0.97 to 1.00 of the tokens")])
def test_the_claim_says_where_verification_wins(verified, claim, data):
    mix(data / "h200", {"verified": verified})
    assert claim in said(verify_or_invariant.draw(data)) and claim in verify_or_invariant.words(data)


def test_without_both_there_is_no_claim_of_either(tmp_path):
    mix(machine(tmp_path, "mine", CPU), {"loose": [6000] * 4, "verified": [5900] * 4}, model="byte")
    assert verify_or_invariant.draw(tmp_path).get_suptitle() == \
        "What loose and deterministic requests together get a second"


def test_a_model_of_real_size_comes_first_and_a_gpu_before_a_cpu(data):
    mix(data / "h200", {"loose": [1] * 6, "verified": [1] * 6, "invariant": [1] * 6}, model="byte",
        shares=(0.0, 0.1, 0.2, 0.3, 0.4, 0.5))
    mix(machine(data, "cpu-avx2", CPU), {"loose": [9] * 4, "verified": [8] * 4, "invariant": [4] * 4}, model="byte")
    assert "llama-3.1-8b" in said(verify_or_invariant.draw(data))
    there = said(verify_or_invariant.draw(data, "cpu-avx2"))
    assert "The trained byte model, AMD EPYC" in there and "The invariant ops are `tiled`" in there
    assert "2.00 times the tokens of tiled ops, at every share" in there
    assert "the time of one thread" in there and "held back" not in verify_or_invariant.words(data, "cpu-avx2")


def test_experiments_are_not_mixed(data):
    mix(data / "h200", {"loose": [1, 2], "verified": [1, 2]}, shares=(0.0, 1.0), window=16)
    assert lines(verify_or_invariant.draw(data).axes[0])["verified"][0] == (0, 5900)


def test_the_words_hold_the_numbers(data):
    words = verify_or_invariant.words(data)
    assert "verified 5,900 at 0%, 5,000 at 25%, 4,500 at 50%, 4,000 at 100%" in words
    assert "held back 117 ms in the mean" in words, "of shares above none"


def test_the_axis_ends_where_the_measurement_does(data):
    mix(data / "h200", {"loose": [1] * 5, "verified": [1] * 5, "invariant": [2] * 5},
        shares=(0.0, 0.2, 0.4, 0.6, 0.75), window=16)
    figure = verify_or_invariant.draw(data)
    assert figure.axes[0].get_xlim() == (-2, 77) and "Shares above 75% were not measured." in said(figure)


def test_a_step_that_was_timed_too_slow_is_said(data):
    assert "too low" not in said(verify_or_invariant.draw(data))
    rows = MIX.read(data / "h200")
    MIX.merge(data / "h200", rows.assign(predicted_tokens_per_s=rows.tokens_per_s / 5))
    assert "timed 5.0 times as long as steps at work" in said(verify_or_invariant.draw(data))


def test_random_weights_are_said_to_flip(data):
    assert "drafts flip far more often" in said(verify_or_invariant.draw(data))
    mix(machine(data, "cpu-avx2", CPU), {"loose": [9] * 4, "verified": [8] * 4, "invariant": [4] * 4}, model="byte")
    assert "flip far" not in said(verify_or_invariant.draw(data, "cpu-avx2"))


# rollbacks

def test_shares_and_spans_are_those_of_the_rows(data):
    figure = rollbacks.draw(data)
    left, right = map(lines, figure.axes)
    assert left["measured here"] == [(4, 2.0), (16, 9.6), (64, 32.0)]
    assert left["LLM-42, Llama-3.1-8B (H100 PCIe)"][0] == (16, 3.9)
    assert right["up to the first flip"] == [(window, 200) for window in (4, 16, 64)]
    assert right["behind it, up to the next"] == [(4, 75), (16, 60), (64, 75)]
    assert figure.get_suptitle() == \
        "Tokens decoded again: 2.0% with windows of 4, 32.0% with windows of 64"
    assert "H200" in said(figure) and "bfloat16" in said(figure) and "3,000 tokens" in said(figure)
    words = rollbacks.words(data)
    assert "4: 2.0%, 10 flips" in words and "16: 3.9%" in words and "behind it 69" in words


def test_one_experiment_is_drawn_the_one_with_the_most_windows(data):
    rolled(data / "h200", {4: 900}, dtype="float32")
    rolled(data / "h200", {4: 0, 16: 2, 64: 2}, temperature=0.5)
    assert lines(rollbacks.draw(data).axes[0])["measured here"][0] == (4, 2.0)


def test_of_several_machines_the_one_with_most_windows_is_drawn_and_the_others_are_told(data):
    rolled(machine(data, "cpu-avx2", CPU), {4: 1, 16: 2, 64: 3, 128: 4})
    rolled(data / "h200", {4: 0, 16: 0, 64: 0})
    figure = rollbacks.draw(data)
    assert len(lines(figure.axes[0])["measured here"]) == 4 and "AMD EPYC" in said(figure)
    drafts = 3 * 1000
    assert f"On the H200, W = 4 and 16 and 64: 0 of {drafts:,} drafts flipped." in said(figure)
    assert "On the" not in said(rollbacks.draw(data, "h200")), "a machine that is named speaks alone"


def test_without_a_flip_the_panel_says_so(tmp_path):
    rolled(machine(tmp_path, "h200", GPU), {16: 0, 64: 0}, first_flips=0, first_tokens=1000, later_tokens=0)
    rows = ROLLBACKS.read(tmp_path / "h200")
    ROLLBACKS.merge(tmp_path / "h200", rows.assign(later_flips=0))
    figure = rollbacks.draw(tmp_path)
    assert [text.get_text() for text in figure.axes[1].texts] == ["no flip in 2,000 tokens"]
    assert not len(figure.axes[1].get_yticks()) and "no flip in 2,000 tokens" in rollbacks.words(tmp_path)


def test_one_window_and_no_flips_are_drawn(tmp_path):
    rolled(machine(tmp_path, "mine", CPU), {8: 2})
    assert "0.8% with windows of 8" in said(rollbacks.draw(tmp_path))


# both

@pytest.mark.parametrize("module, what, command", [
    (verify_or_invariant, "mix", "mix"), (rollbacks, "rollback", "rollbacks")])
def test_without_a_record_it_says_so(module, what, command, tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"no {command}\.csv is recorded for any machine"):
        module.draw(tmp_path)
    table = MIX if what == "mix" else ROLLBACKS
    (machine(tmp_path, "mine", CPU) / table.file).write_text(",".join(table.columns) + "\n")
    with pytest.raises(ValueError, match=f"no {what} is recorded for any machine .*: python -m kernels {command}"):
        module.draw(tmp_path)
    with pytest.raises(FileNotFoundError, match=rf"no {command}\.csv is recorded for yours"):
        module.words(tmp_path, "yours")


@pytest.mark.parametrize("size", PAGES)
@pytest.mark.parametrize("module", [rollbacks, verify_or_invariant])
def test_every_size_holds_its_letters_and_its_legend_hides_nothing(module, size, data):
    figure = module.draw(data, page=PAGES[size])
    figure.draw_without_rendering()
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 and figure.bbox.y0 <= box.y0
    for axes in figure.axes:
        assert axes.get_window_extent().y0 > box.y1
    assert records.machines(MIX.file, data) == ["h200"]
