"""The window charts: the published chart's form, every curve told apart, nothing clipped, the same bytes twice."""
import io
import json

import pandas as pd
import pytest

from figures import verify_cost
from kernels.lab import records, style
from kernels.lab.window import chart as window_chart
from kernels.lab.window.measure import VERIFY_COST, WINDOWS

PAPER = (18.9, 18.9, 19.0, 19.0, 19.2, 20.6, 28.5)
GRAPH = (6.7, 6.75, 6.9, 7.6, 9.6, 14.7, 27.2)
FLOOR = (3.55, 3.56, 3.60, 3.66, 5.11, 9.97, 19.7)


def rows(*curves, spread=1.05):
    """One row a window for each (curve, ops, medians)."""
    return pd.DataFrame([
        {"curve": curve, "ops": ops, "tokens": t, "prefix": 0, "group": 1, "ms_p05": ms / 1.02, "ms_p50": ms,
         "ms_p95": spread * ms, "ms_per_token_p50": ms / t, "floor_ms": floor, "recorded_at": "", "source": ""}
        for curve, ops, times in curves for t, ms, floor in zip(WINDOWS, times, FLOOR, strict=True)])


EVERY = rows(("graph", "invariant", [0.8 * t for t in GRAPH]), ("paper", "default", PAPER),
             ("graph", "default", GRAPH), ("paper", "invariant", [0.9 * t for t in PAPER]))


@pytest.fixture
def data(tmp_path):
    VERIFY_COST.merge(tmp_path / "h200", EVERY)
    (tmp_path / "h200" / "machine.json").write_text(json.dumps({
        "device": "NVIDIA H200", "verify_cost_model": "llama-3.1-8b", "copy_gbytes_per_s": 4252.0,
        "matmul_tflops": 735.0}))
    return tmp_path


@pytest.fixture(autouse=True)
def theme():
    style.theme()


def line(axes, label):
    return next(drawn for drawn in axes.lines if drawn.get_label() == label)


def labels(axes):
    return [entry.get_text() for entry in axes.get_legend().get_texts()]


def saved(figure, kind):
    file = io.BytesIO()
    figure.savefig(file, format=kind, metadata={"Date": None} if kind == "svg" else {"Software": None})
    return file.getvalue()


def test_the_left_panel_is_the_published_chart(data):
    left = verify_cost.draw(data).axes[0]
    assert (left.get_xlabel(), left.get_ylabel()) == ("Number of Tokens", "Latency per Token (ms)")
    assert [tick.get_text() for tick in left.get_xticklabels()] == ["16", "32", "64", "128", "256", "512"]
    assert [tick.get_text() for tick in left.get_yticklabels()][:5] == ["0.0", "0.2", "0.4", "0.6", "0.8"]
    ours = line(left, "paper: eager")
    assert (ours.get_color(), ours.get_marker()) == (style.BLUE, "o")
    assert list(ours.get_xdata()) == [0, 1, 2, 3, 4, 5]  # evenly spaced
    assert list(ours.get_ydata()) == pytest.approx([ms / t for ms, t in zip(PAPER[:6], WINDOWS[:6], strict=True)])
    published = line(left, "LLM-42 (H100 PCIe)")
    assert list(published.get_ydata()) == [0.76, 0.38, 0.19, 0.10, 0.05, 0.04]
    assert published.get_markerfacecolor() == "none" and published.get_linestyle() == "None"
    (area,) = green_areas(left)
    assert area.get_paths()[0].get_extents().y1 == pytest.approx(0.76), "under the published points, not under ours"


def green_areas(axes):
    return [area for area in axes.collections
            if style.sns.color_palette([area.get_facecolor()[0]]).as_hex()[0] == style.GREEN]


def test_readers_passes_get_no_green_area():
    left = window_chart.window_chart(rows(("paper", "default", PAPER))).axes[0]
    assert len(left.collections) == 1 and not green_areas(left)


def test_no_two_curves_and_no_two_bands_have_one_colour(data):
    right = verify_cost.draw(data).axes[1]
    assert len({drawn.get_color() for drawn in right.lines}) == len(right.lines)
    bands = {(tuple(band.get_facecolor()[0]), band.get_hatch()) for band in right.collections}
    assert len(bands) == 4 and len({colour for colour, _ in bands}) == 4
    assert sum(hatch is not None for _, hatch in bands) == 2, "of invariant ops"


def test_no_point_is_cut_off(data):
    left, right = verify_cost.draw(data).axes
    for axes in (left, right):
        (x0, x1), (y0, y1) = axes.get_xlim(), axes.get_ylim()
        for drawn in axes.lines:
            assert all(x0 <= x <= x1 for x in drawn.get_xdata()) and all(y0 <= y <= y1 for y in drawn.get_ydata())
    assert left.get_ylim()[1] > PAPER[0] / 16


def test_the_right_panel_holds_every_curve_undivided(data):
    right = verify_cost.draw(data).axes[1]
    assert right.get_xscale() == right.get_yscale() == "log"
    assert labels(right) == ["paper: eager", "paper, invariant ops", "graph: one CUDA graph", "graph, invariant ops",
                             "floor: the matrix products", "LLM-42 (H100 PCIe)"]
    assert list(line(right, "graph: one CUDA graph").get_ydata()) == pytest.approx(GRAPH, rel=1e-5)
    assert list(line(right, "floor: the matrix products").get_ydata()) == pytest.approx(FLOOR, rel=1e-5)
    assert list(line(right, "LLM-42 (H100 PCIe)").get_ydata()) == [12.195, 12.2, 12.226, 12.12, 13.431, 21.356]
    assert line(right, "paper, invariant ops").get_linestyle() == "--"


def test_the_legend_hides_no_line_and_lies_inside(data):
    figure = verify_cost.draw(data)
    figure.canvas.draw()
    for axes in figure.axes:
        box, frame = axes.get_legend().get_window_extent(), axes.get_window_extent()
        assert frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
        for drawn in axes.lines:
            points = axes.transData.transform(list(zip(drawn.get_xdata(), drawn.get_ydata(), strict=True)))
            assert not any(box.contains(x, y) for x, y in points), drawn.get_label()


def test_title_and_caption_say_what_was_measured(data):
    figure = verify_cost.draw(data)
    assert figure.get_suptitle() == ("128 tokens take 1.01 to 1.13 times as long as 16 in all 4 curves: "
                                     "one reading of the weights serves a window")
    caption = figure.get_supxlabel().replace("\n", " ")
    for part in ("llama-3.1-8b", "NVIDIA H200", "host wall time", "measured in that run", "H100 PCIe",
                 "5-95 % band", "empty prefix"):
        assert part in caption
    assert len(verify_cost.words(data)) > 200


def test_the_title_is_of_every_curve_and_of_none_that_is_not_there(data):
    VERIFY_COST.merge(data / "h200", rows(("graph", "invariant", [5, 5, 5, 15, 15, 15, 15])))
    assert verify_cost.draw(data).get_suptitle() == "128 tokens take 1.01 to 3.00 times as long as 16 in all 4 curves"
    one = EVERY[(EVERY.curve == "paper") & (EVERY.ops == "default")]
    assert verify_cost._claim(one).startswith("128 tokens take 1.01 times as long as 16: one reading")
    assert verify_cost._claim(one[one.tokens != 128]) == "What a window of tokens costs"


@pytest.mark.parametrize("kind", ["svg", "png"])
def test_two_drawings_have_the_same_bytes(data, kind):
    assert saved(verify_cost.draw(data), kind) == saved(verify_cost.draw(data), kind)


def test_without_a_record_it_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"verify_cost\.csv"):
        verify_cost.draw(tmp_path)


def test_one_slow_run_does_not_flatten_the_chart():
    left, right = window_chart.window_chart(rows(("paper", "default", PAPER), spread=500)).axes
    assert left.get_ylim()[1] < 2 * PAPER[0] / 16 and right.get_ylim()[1] < 10 * PAPER[-1]


def test_a_chart_of_nothing_says_so():
    nothing = pd.DataFrame(columns=list(VERIFY_COST.columns))
    figure = window_chart.window_chart(nothing, windows=(1, 4), title=window_chart.claim(nothing))
    assert all("no points yet" in [text.get_text() for text in axes.texts] for axes in figure.axes)
    assert figure.get_suptitle() == "Nothing measured yet"
    assert saved(figure, "png").startswith(b"\x89PNG")


def test_another_machine_is_drawn_thin_and_named():
    other = EVERY.assign(machine="h200 · llama-3.1-8b")
    figure = window_chart.window_chart(rows(("paper", "default", [t / 10 for t in PAPER])), recorded=other,
                                       points=window_chart.published())
    for axes in figure.axes:
        assert "recorded, h200 · llama-3.1-8b" in labels(axes) and len(labels(axes)) == len(set(labels(axes)))
        assert {drawn.get_linewidth() for drawn in axes.lines} >= {1.1, 2.0}


@pytest.mark.parametrize(("ms", "said"), [
    ({16: 10.0}, "Curve paper: measure another window to compare"),
    ({1: 10.0, 8: 11.0, 64: 40.0}, "Curve paper: 8 tokens take 1.1 times and 64 tokens take 4 times as long as 1"),
    ({1: 10.0, 8: 12.0}, "Curve paper: 8 tokens take 1.2 times as long as 1"),
    ({1: 10.0, 8: 80.0, 9: 10.0}, "Curve paper: 9 tokens take 1 times as long as 1"),
])
def test_the_claim_is_what_the_rows_say(ms, said):
    table = pd.DataFrame([{"curve": "paper", "ops": "default", "tokens": t, "ms_p50": v} for t, v in ms.items()])
    assert window_chart.claim(table) == said


def test_published_points_of_another_form_are_refused(tmp_path):
    (tmp_path / "llm42").mkdir()
    (tmp_path / "llm42" / "verify_cost.csv").write_text("tokens,ms\n16,1\n")
    with pytest.raises(ValueError, match="lacks the columns logged_total_ms"):
        window_chart.published(tmp_path)
    assert len(window_chart.published(records.DATA)) == 6


# The pass at work, once it is recorded: a third panel, and nothing of it in the others.

def at_work(*cells):
    """A row for each (ops, window, prefix, ms)."""
    return pd.DataFrame([
        {"curve": "verify", "ops": ops, "tokens": window, "prefix": prefix, "group": 512 // window, "ms_p05": ms,
         "ms_p50": ms, "ms_p95": ms, "ms_per_token_p50": ms / 512, "floor_ms": 11.0 + prefix / 1024, "recorded_at": "",
         "source": ""} for ops, window, prefix, ms in cells])


REPLAYS = at_work(*((ops, window, prefix, ms + prefix / 800) for ops, ms in (("default", 19), ("invariant", 14),
                                                                             ("fused", 15.5))
                    for window in (16, 64, 512) for prefix in (1024, 4096)))


def test_passes_at_work_stand_in_a_panel_of_their_own(data):
    left, right = (saved_lines(axes) for axes in verify_cost.draw(data).axes)
    claim = verify_cost._claim(EVERY)
    lost = REPLAYS.assign(ms_p50=REPLAYS.ms_p50.where(~((REPLAYS.ops == "fused") & (REPLAYS.tokens == 16))))
    VERIFY_COST.merge(data / "h200", lost)
    figure = verify_cost.draw(data)
    assert [saved_lines(axes) for axes in figure.axes[:2]] == [left, right]
    third = figure.axes[2]
    assert list(line(third, "invariant ops behind 1024").get_xdata()) == [16, 64, 512]
    assert list(line(third, "fused ops behind 4096").get_xdata()) == [64, 512]
    assert list(line(third, "fused ops behind 4096: does not fit").get_xdata()) == [16]
    words = verify_cost.words(data)
    assert words.startswith(claim) and "fused ops, 32 windows of 16 behind 1024: does not fit" in words
    assert "invariant ops, 1 windows of 512 behind 4096: 19.1 of a floor of 15.0" in words


def saved_lines(axes):
    return [(drawn.get_label(), list(drawn.get_xdata()), list(drawn.get_ydata())) for drawn in axes.lines]


def test_fused_ops_are_told_apart_from_invariant_ones():
    table = rows(("graph", "invariant", GRAPH), ("graph", "fused", [1.1 * t for t in GRAPH]))
    axes = window_chart.window_chart(table).axes[0]
    one, other = line(axes, "graph, invariant ops"), line(axes, "graph, fused ops")
    assert one.get_color() != other.get_color() and window_chart.LOOKS["fused"] != (0, (4, 2))
