"""The products' figures: their words and titles say what is in the data, every line is there, nothing is clipped."""
import io
import json

import numpy as np
import pytest

from figures import matmul_roofline, matmul_speed
from kernels import matmul
from kernels.lab import records, style

TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
SPEED = {"cuda": 1.0, "triton": 1.02, "frozen": 0.5, "cublas_no_split_k": 0.9, "tiled": 0.7}


def point(name, shape, tokens):
    work = matmul.work(tokens, shape)
    us = max(work.bytes / 4e6, work.flops / 7e8) / SPEED[name]
    return {"op": "matmul", "implementation": name, "dtype": "bfloat16", "shape": shape, "tokens": tokens,
            "clock": "cold", "us_p50": us, "gbytes_per_s": work.bytes / us / 1e3, "tflops": work.flops / us / 1e6,
            "same_bits": name != "cuda" or tokens > 64}


def write(folder, points):
    records.TOKEN_SWEEP.merge(folder / "h200", points)
    (folder / "h200" / "machine.json").write_text(json.dumps({
        "device": "NVIDIA H200", "torch": "2.11.0", "copy_gbytes_per_s": 4000.0, "matmul_tflops": 700.0}))


@pytest.fixture
def data(tmp_path):
    write(tmp_path, [point(name, shape, tokens) for name in SPEED for shape in matmul.shapes for tokens in TOKENS])
    return tmp_path


@pytest.fixture(autouse=True)
def theme():
    style.theme()


def line(axes, name):
    return next(drawn for drawn in axes.lines if drawn.get_label() == style.CONTENDERS[name][3])


def panels(figure):
    return [axes for axes in figure.axes if axes.axison]


def test_a_panel_for_every_weight_and_a_line_for_every_contender(data):
    figure = matmul_speed.draw(data)
    titles = [axes.get_title(loc="left") for axes in panels(figure)]
    sizes = [[int(part[2:]) for part in shape.split(",")] for shape in matmul.shapes]
    assert [title.partition("  ")[0] for title in titles] == ["{:,} x {:,}".format(*two) for two in sizes]
    for axes in panels(figure):
        assert axes.lines[0].get_ydata() == [1, 1]
        for name in set(SPEED) - {"cuda"}:
            np.testing.assert_array_equal(line(axes, name).get_xdata(), TOKENS)
            np.testing.assert_allclose(line(axes, name).get_ydata(), SPEED[name], rtol=1e-4)


def test_the_lowest_panel_of_each_column_names_its_tokens(data):
    figure = matmul_speed.draw(data)
    panels = [a for a in figure.axes if a.axison]
    named = [a for a in panels if a.get_xlabel()]
    assert {a.get_subplotspec().colspan.start for a in named} == {a.get_subplotspec().colspan.start for a in panels}
    assert all(any(t.label1.get_visible() for t in a.xaxis.get_major_ticks()) for a in named)


def test_the_speed_figure_says_what_its_rows_say(data):
    figure = matmul_speed.draw(data)
    assert figure.get_suptitle() == ("Fixed order, free schedule: 1.02 of cuBLAS' speed in the geometric mean; "
                                     "one frozen schedule: 0.50")
    caption = figure.get_supxlabel()
    assert "bits moved: cuda at 55 of 121 points" in caption and "NVIDIA H200" in caption
    assert "same bits: tiled, cublas_no_split_k, frozen, triton" in caption


def test_bits_that_moved_are_told_of_every_contender(data):
    write(data, [point("triton", "N=512,K=4096", 8) | {"same_bits": False}])
    caption = matmul_speed.draw(data).get_supxlabel()
    assert "triton at 1 of 121 points" in caption and "same bits: tiled, cublas_no_split_k, frozen" in caption


def test_the_roofline_has_its_ceilings_and_stays_below(data):
    figure = matmul_roofline.draw(data)
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "4,096 x 4,096  attention's output", "28,672 x 4,096  gate and up", "1,280 x 8,192  70B / 8: q, k, v"]
    for axes, shape in zip(figure.axes, matmul_roofline.SHAPES, strict=True):
        most = next(drawn for drawn in axes.lines if drawn.get_label() == "Measured ceilings").get_ydata()
        work = [matmul.work(tokens, shape) for tokens in TOKENS]
        np.testing.assert_allclose(most, [min(w.flops / w.bytes * 4, 714) for w in work])  # the fastest, not 700
        for name in matmul_roofline.NAMES:
            np.testing.assert_array_equal(line(axes, name).get_xdata(), TOKENS)
        assert (line(axes, "frozen").get_ydata() < most).all()
    assert figure.get_suptitle() == ("Fixed order, 11 weights: 102% to 102% of a copy's speed at 1 token, "
                                     "100% to 100% of the fastest product at 4096")


def test_the_roofline_claims_of_every_weight_and_names_the_ceiling(data):
    slow, fast = point("triton", "N=512,K=4096", 1), point("cublas_no_split_k", "N=1024,K=4096", 64)
    write(data, [slow | {"gbytes_per_s": slow["gbytes_per_s"] / 10}, fast | {"tflops": 850.25}])
    figure = matmul_roofline.draw(data)
    assert "N=512,K=4096" not in matmul_roofline.SHAPES
    assert figure.get_suptitle().startswith("Fixed order, 11 weights: 10% to 102% of a copy's speed at 1 token, 84%")
    named = "the fastest product that is recorded, 850 TFLOP/s: cublas_no_split_k, 1,024 x 4,096, 64 tokens"
    assert named in figure.get_supxlabel() and named in matmul_roofline.words(data)
    assert "3 of 11" in figure.get_supxlabel() and "both axes logarithmic" in figure.get_supxlabel()


def test_the_ceiling_may_be_the_large_product(data):
    (data / "h200" / "machine.json").write_text(json.dumps({
        "device": "NVIDIA H200", "torch": "2.11.0", "copy_gbytes_per_s": 4000.0, "matmul_tflops": 900.0}))
    assert "900 TFLOP/s: the large one of machine.json" in matmul_roofline.draw(data).get_supxlabel()


@pytest.mark.parametrize("module", [matmul_speed, matmul_roofline])
def test_the_same_bytes_twice_and_no_text_outside(module, data):
    drawn = []
    for _ in range(2):
        figure, file = module.draw(data), io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
        drawn.append(file.getvalue())
        figure.draw_without_rendering()
        for axes in figure.axes:
            texts = [axes._left_title, axes.xaxis.label] if axes.axison else []
            for text in [*texts, *(axes.get_legend().get_texts() if axes.get_legend() else [])]:
                box = text.get_window_extent()
                assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0, text.get_text()
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("module", [matmul_speed, matmul_roofline])
def test_without_rows_it_says_how_to_record_them(module, tmp_path):
    write(tmp_path, [point("cuda", "N=4096,K=4096", 1) | {"clock": "graph"}])
    with pytest.raises(ValueError, match="python -m kernels sweep matmul"):
        module.draw(tmp_path)


def test_what_the_words_say_is_in_the_recorded_rows():
    rows, machine = matmul_speed.recorded(records.DATA)
    speed = matmul_speed.relative(rows)
    assert sorted(speed.index.unique("shape")) == sorted(matmul.shapes) and len(matmul.shapes) == 11
    assert speed.index.unique("tokens").max() == 4096 and speed.index.unique("tokens").min() == 1
    assert speed.triton.between(0.8, 1.25).mean() > 0.75, "stays near the grey line"
    assert (speed.frozen < 1).mean() > 0.9, "lies below it nearly everywhere"
    assert rows[rows.implementation.isin(["triton", "frozen"])].same_bits.all()
    shown = rows[rows["shape"].isin(matmul_roofline.SHAPES)].pivot(
        index=["shape", "tokens"], columns="implementation", values="tflops")
    most = np.concatenate([matmul_roofline.ceiling(shape, shown.loc[shape].index, machine)
                           for shape in shown.index.unique("shape")])
    assert (shown.triton <= 1.05 * most).all(), "at most a few per cent above"
    assert ((shown.frozen < shown.triton).mean() > 0.9) and ((shown.tiled < shown.triton).mean() > 0.7)


@pytest.mark.parametrize("figure", [matmul_speed, matmul_roofline])
def test_a_contender_of_another_run_than_the_default_is_named(figure, data):
    at = {"recorded_at": "2026-11-28T22:00:00Z"}
    write(data, [point(name, shape, tokens) | at for name in SPEED for shape in matmul.shapes for tokens in TOKENS])
    assert "another run" not in figure.draw(data).get_supxlabel()
    write(data, [point(name, shape, tokens) | {"recorded_at": "2026-11-30T16:00:00Z"} for name in ("cuda", "triton")
                 for shape in matmul.shapes for tokens in TOKENS if tokens >= 512])
    said = figure.draw(data).get_supxlabel()
    lacking = "cublas_no_split_k, frozen, tiled" if figure is matmul_speed else "frozen, tiled"
    assert f"timed in another run than the default: {lacking} at 512 to 4096 tokens" in said
