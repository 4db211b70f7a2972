"""Every figure on paper and on a slide: its size, legible letters, nothing outside, nothing over something else."""
import importlib
import io
import itertools
import re
from functools import cache

import pandas as pd
import pytest
from matplotlib.text import Text
from PIL import Image

import figures
from figures.__main__ import main
from figures.page import PAGES
from kernels.lab import records, style

SIZED = [name for name in PAGES if name != "screen"]
EVERY = list(itertools.product(SIZED, figures.names()))
NO_LEGEND = {"adder", "answer_tree", "atlas"}  # they write their words at the place that is meant


@cache
def drawn(name, size):
    """The figure, laid out."""
    style.theme()
    figure = importlib.import_module(f"figures.{name}").draw(page=PAGES[size])
    figure.draw_without_rendering()
    return figure


def texts(figure):
    """What is written in it; of the ticks, those in view."""
    unseen = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
                if not axes.axison or not low <= tick.get_loc() <= high:
                    unseen |= {tick.label1, tick.label2}
    return [text for text in figure.findobj(Text) if text not in unseen and text.get_visible() and text.get_text()]


@pytest.mark.parametrize("size, name", EVERY)
def test_letters_are_legible_inside_and_apart(size, name):
    figure, page = drawn(name, size), PAGES[size]
    found = texts(figure)
    assert len(found) > 8
    boxes = [(text.get_text(), text.get_window_extent()) for text in found]
    for text, box in boxes:
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1, f"{text!r} goes over the side"
        assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1, f"{text!r} goes over the top or bottom"
    for (one, a), (other, b) in itertools.combinations(boxes, 2):
        across, down = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        assert across <= 1 or down <= 2, f"{one!r} and {other!r} overlap by {across:.1f} x {down:.1f} pixels"
    least = {"single": 5, "double": 4.5, "slide": 8}[size]  # points, as written
    assert min(text.get_fontsize() for text in found) * page.scale >= least


def legends(figure):
    return [*figure.legends, *(axes.get_legend() for axes in figure.axes if axes.get_legend())]


@pytest.mark.parametrize("size", SIZED)
def test_every_figure_but_these_has_a_legend(size):
    assert {name for name in figures.names() if not legends(drawn(name, size))} == NO_LEGEND


@pytest.mark.parametrize("size, name", [(size, name) for size, name in EVERY if name not in NO_LEGEND])
def test_no_legend_hides_a_line_or_leaves_its_place(size, name):
    figure = drawn(name, size)
    boxes = [legend.get_window_extent() for legend in legends(figure)]
    for box in boxes:
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 and figure.bbox.y0 <= box.y0
    for axes in figure.axes:
        for line in axes.lines if axes.axison else ():
            for x, y in line.get_transform().transform(line.get_xydata()):
                assert not any(box.contains(x, y) for box in boxes), f"{line.get_label()} runs under a legend"


@pytest.mark.parametrize("name", figures.names())
def test_the_same_bytes_twice(name):
    assert figures.render(name, "single") == figures.render(name, "single")


@pytest.mark.parametrize("size, name", EVERY)
def test_it_is_as_large_as_it_says(size, name):
    width, height = PAGES[size].scale * drawn(name, size).get_size_inches()
    assert width == pytest.approx(PAGES[size].inches)
    assert (width / height == pytest.approx(16 / 9)) if PAGES[size].tall else height <= 10, "one page"


@pytest.mark.parametrize("size", SIZED)
def test_what_is_written_has_that_size(size):
    files, page = figures.render("adder", size), PAGES[size]
    width, height = (pixels / page.dpi for pixels in Image.open(io.BytesIO(files["png"])).size)
    assert width == pytest.approx(page.inches, abs=0.01)
    points = [float(found) for found in re.findall(rb'(?:width|height)="([\d.]+)pt"', files["svg"][:1000])]
    assert points == pytest.approx([72 * width, 72 * height], abs=0.6)


def test_the_sizes_are_those_that_papers_and_slides_have():
    assert {name: page.inches for name, page in PAGES.items()} == pytest.approx(
        {"screen": None, "single": 3.5, "double": 7.2, "slide": 13.333}, abs=0.001)


def test_the_claim_is_the_same_at_every_size():
    for name in set(figures.names()) - {"adder", "atlas", "rms_norm_bandwidth"}:
        claims = {" ".join(drawn(name, size).get_suptitle().split()) for size in PAGES}
        assert len(claims) == 1, claims


def test_the_command_draws_into_a_folder_of_the_size(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("figures.__main__.FOLDER", tmp_path)
    assert main(["adder", "--size", "single", "--check"]) == 1 and not list(tmp_path.iterdir())
    assert main(["adder", "--size", "single"]) == 0
    assert sorted(path.name for path in (tmp_path / "single").iterdir()) == ["adder.png", "adder.svg"]
    assert main(["adder", "--size", "single", "--check"]) == 0
    assert main(["adder", "--size", "slide", "--machine", "h200"]) == 0
    assert (tmp_path / "h200" / "slide" / "adder.svg").exists()
    assert "README" not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["adder", "--size", "poster"])


def test_an_unknown_size_is_named():
    with pytest.raises(ValueError, match="size must be one of screen, single, double, slide, got 'poster'"):
        figures.render("adder", "poster")


def test_a_small_atlas_counts_what_never_moved_in_one_line():
    screen, single, slide = ([text.get_text() for text in texts(drawn("atlas", size))]
                             for size in ("screen", "single", "slide"))
    heading = next(text for text in screen if text.startswith("Never moved"))
    still = int(re.search(r"\((\d+)\)", heading)[1])
    assert f"{heading}, not listed" in single
    assert {"softmax", "argmax"} <= set(screen) and not {"softmax", "argmax"} & set(single)
    assert {"mm", "linear", "cumsum"} <= set(single)
    named = [set(some) - {text for text in some if " " in text} for some in (screen, single)]
    assert len(named[0] - named[1] - {"fp32", "bf16"}) >= still
    assert heading in slide and not {"mm", "linear"} & set(slide)


def test_a_line_of_the_slide_counts_its_ops():
    from kernels.lab.atlas import chart

    tables = importlib.import_module("figures.atlas")._tables(records.DATA)
    machine, rows = next(iter(tables.items()))
    ops = chart.in_groups(pd.concat(tables.values()))["Move with the batch"]
    moved = rows[rows.op.isin(ops)].query("property == 'batch' and dtype == 'float32' and verdict == 'varies'")
    assert len(moved) > 20 and f"{len(moved)}" in [text.get_text() for text in texts(drawn("atlas", "slide"))], machine
