"""What the mode costs: titles and words of the rows there are, each way told apart, the same bytes twice."""
import json
import math

import pandas as pd
import pytest

import figures
from figures import mode_cost
from figures.page import PAGES
from kernels.lab import style
from kernels.lab.moving.cost import MODE_COST

WHOLE, EAGER = "under the mode, compiled whole", "under the mode, eager"


def row(how, ops, tokens, us, **more):
    return {"model": "llama-3.1-8b", "how": how, "ops": ops, "dtype": "bfloat16", "tokens": tokens, "us_p05": 0.9 * us,
            "us_p20": us, "us_p50": us, "us_p80": us, "us_p95": 1.1 * us, "repeats": 11, "same_bits": ops != "default",
            "recorded_at": "", "source": "", **more}


def point(how, tokens, default, mode, **more):
    return [row(how, "default", tokens, default, **more), row(how, "invariant", tokens, mode, **more)]


EVERY = [*point("whole", 1, 5000, 4500), *point("whole", 512, 14000, 15400), *point("compiled", 1, 12000, 15000),
         *point("eager", 1, 30000, 36000), *point("eager", 2048, 60000, 60000), *point("batches", 64, 1, 900)]


@pytest.fixture
def recorded(tmp_path):
    """recorded(rows): the data folder of a machine that recorded these."""
    style.theme()

    def write(rows):
        MODE_COST.merge(tmp_path / "h200", rows)
        (tmp_path / "h200" / "machine.json").write_text(json.dumps({"device": "NVIDIA H200"}))
        return tmp_path
    return write


def lines(axes):
    return {line.get_label(): dict(zip(line.get_xdata(), line.get_ydata(), strict=True)) for line in axes.lines}


def test_the_title_is_of_the_rows(recorded):
    data = recorded(EVERY)
    assert mode_cost.draw(data).get_suptitle().replace("\n", " ") == (
        "Compiled whole, a model under the mode takes 0.90 to 1.10 times the default's time; compiled by layers 1.25; "
        "eager 1.00 to 1.20")
    recorded(point("whole", 16, 5000, 10000))
    assert "takes 0.90 to 2.00 times" in mode_cost.words(data)


def test_each_way_has_its_times_and_its_share(recorded):
    left, right = mode_cost.draw(recorded(EVERY)).axes
    assert lines(left)[WHOLE] == {1: 4.5, 512: 15.4} and lines(left)["default, eager"] == {1: 30, 2048: 60}
    assert lines(right)[WHOLE] == pytest.approx({1: 0.9, 512: 1.1}) and lines(right)[EAGER] == {1: 1.2, 2048: 1}
    assert {line.get_color() for line in left.lines} == {style.GREEN, style.BLUE}
    looks = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in left.lines}
    assert len(looks) == len(left.lines) == 6 and len(left.collections) == 6, "no two lines alike, a band each"
    assert left.get_xscale() == left.get_yscale() == right.get_xscale() == "log"
    (one,) = [line for line in right.lines if line.get_color() == style.GREEN]
    assert set(one.get_ydata()) == {1}


def test_a_way_that_is_absent_is_not_drawn_and_named(recorded):
    figure = mode_cost.draw(recorded([*EVERY[:4], *EVERY[-2:]]))
    assert not [label for axes in figure.axes for label in lines(axes) if "eager" in label or "layers" in label]
    assert "layers" not in figure.get_suptitle() and "eager" not in figure.get_suptitle()
    assert "not recorded: compiled by layers, eager" in figure.get_supxlabel()


def test_a_point_that_lacks_a_contender_is_left_out(recorded):
    data = recorded([*EVERY, row("whole", "default", 64, 1), row("compiled", "invariant", 4, 1),
                     *point("eager", 16, math.nan, 7)])
    left, right = mode_cost.draw(data).axes
    assert not {4, 16, 64} & {count for axes in (left, right) for line in lines(axes).values() for count in line}
    assert {tick.get_text() for tick in right.get_xticklabels()} == {"1", "512", "2048"}


@pytest.mark.parametrize("rows", [EVERY[-2:], [row("eager", "default", 1, 5)], [row("whole", "invariant", 1, 5)]])
def test_without_a_pair_there_is_nothing_to_draw(recorded, rows):
    with pytest.raises(ValueError, match="no forward is recorded with and without the mode for any machine"):
        mode_cost.draw(recorded(rows))


def test_models_and_dtypes_are_not_mixed(recorded):
    figure = mode_cost.draw(recorded([*EVERY, *point("eager", 1, 1, 9, model="tiny"),
                                      *point("eager", 1, 1, 9, dtype="float32")]))
    assert "eager 1.00 to 1.20" in figure.get_suptitle().replace("\n", " ")
    assert "llama-3.1-8b's shape in transformers, bfloat16" in figure.get_supxlabel()


def test_words_have_the_title_the_points_and_the_caption(recorded):
    data = recorded(EVERY)
    words, figure = mode_cost.words(data), mode_cost.draw(data)
    assert words.startswith(figure.get_suptitle().replace("\n", " "))
    assert words.endswith(" ".join(figure.get_supxlabel().split()))
    assert "Compiled whole, 5.0 and 4.5 at 1 (0.90 times), 14.0 and 15.4 at 512 (1.10 times). " in words
    for part in ("NVIDIA H200", "medians of 11 rounds", "band 5-95 %",
                 "other bits at 5 of 5 points by default, and at none under the mode"):
        assert part in words


def test_one_slow_round_does_not_flatten_the_chart_and_is_told(recorded):
    slow = row("whole", "default", 1, 5000) | {"us_p95": 9e5}
    figure = mode_cost.draw(recorded([*EVERY, slow, row("eager", "invariant", 1, 36000, same_bits=False)]))
    assert figure.axes[0].get_ylim()[1] < 100
    caption = " ".join(figure.get_supxlabel().split())
    assert "the slowest 95th percentile is 900.0 ms" in caption and "and at 1 under the mode" in caption


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("rows", [EVERY, EVERY[:2], pd.DataFrame(EVERY).iloc[6:8]], ids=["ways", "point", "eager"])
def test_every_page_shows_all_and_hides_none(recorded, page, rows):
    figure = mode_cost.draw(recorded(rows), page=PAGES[page])
    figure.draw_without_rendering()
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 and figure.bbox.y0 <= box.y0
    for axes in figure.axes:
        assert axes.get_window_extent().y0 > box.y1
        (x0, x1), (y0, y1) = axes.get_xlim(), axes.get_ylim()
        for label, drawn in lines(axes).items():
            assert label.startswith("_") or all(x0 < x < x1 and y0 < y < y1 for x, y in drawn.items())


def test_two_drawings_have_the_same_bytes(recorded):
    data = recorded(EVERY)
    assert figures.render("mode_cost", data=data) == figures.render("mode_cost", data=data)
