"""The figure of unseen weights: its steps and means are the rows', the slowest is named, words say what is drawn."""
import json

import numpy as np
import pytest

from figures import matmul_unseen
from figures.page import PAGES
from kernels.lab import style
from kernels.lab.tuning.unseen_times import UNSEEN

SHAPES = ("N=3072,K=2048", "N=32,K=2880", "N=8192,K=28672", "N=1111,K=3001")
TOKENS = (3, 56, 900)
SPEED = {"cuda": 1.0, "triton": 0.98, "frozen": 0.5, "online": 1.04}


@pytest.fixture
def data(tmp_path):
    """Speeds that are known: `triton` is slowest at one point."""
    style.theme()
    rows = [{"op": "matmul", "implementation": name, "dtype": dtype, "shape": shape, "tokens": tokens, "clock": "cold",
             "us_p50": 100 / (0.7 if (name, shape, tokens) == ("triton", SHAPES[1], 900) else speed), "repeats": 15,
             "same_bits": True} for name, speed in SPEED.items() for shape in SHAPES for tokens in TOKENS
            for dtype in ("bfloat16", "float16")]
    UNSEEN.merge(tmp_path / "h200", rows)
    (tmp_path / "h200" / "machine.json").write_text(json.dumps({"device": "NVIDIA H200", "torch": "2.11.0"}))
    return tmp_path


def test_the_steps_are_the_share_of_points_below(data):
    left, right = matmul_unseen.draw(data).axes
    lines = {line.get_label(): line for line in left.lines}
    for name, look in matmul_unseen.LOOKS.items():
        x, y = lines[look["label"]].get_xydata().T
        wanted = np.sort([0.7] * (name == "triton") + [SPEED[name]] * (12 - (name == "triton")))
        np.testing.assert_allclose(x[1:], wanted, rtol=1e-4)
        np.testing.assert_allclose(y, np.arange(13) / 12)
    means = {line.get_label(): line for line in right.lines}["Chosen untimed"]
    np.testing.assert_allclose(means.get_ydata(), [0.98, 0.98, (0.98**3 * 0.7) ** 0.25], rtol=1e-4)


def test_the_slowest_point_is_named_with_the_model_that_has_it(data):
    figure = matmul_unseen.draw(data)
    said, = (text for text in figure.axes[1].texts)
    assert said.get_text() == "slowest: 32 x 2,880" and said.xy == (900, pytest.approx(0.7, rel=1e-4))
    assert "slowest chosen untimed: 32 x 2,880 (gpt-oss-20b) at 900: 0.70; " in figure.get_supxlabel()
    assert "The slowest: 32 x 2,880 (gpt-oss-20b) at 900: 0.70" in matmul_unseen.words(data)


def test_the_title_and_the_caption_say_what_the_rows_say(data):
    figure = matmul_unseen.draw(data)
    mean = (0.98**11 * 0.7) ** (1 / 12)
    assert figure.get_suptitle() == (f"Weights in no table: {mean:.2f} of cuBLAS' speed; tuned while it runs: 1.04; "
                                     "one frozen schedule: 0.50")
    caption = figure.get_supxlabel()
    assert "medians of at least 15 samples" in caption
    assert "4 weights of other models, x 3 token counts" in caption and "NVIDIA H200" in caption
    assert "chosen untimed, median 0.98, below 0.90 at 1 of 12 points" in caption and "bfloat16" in caption


def test_what_is_not_recorded_is_said(data, tmp_path):
    rows = UNSEEN.read(data / "h200")
    UNSEEN.merge(tmp_path / "part" / "h200", rows[rows.implementation.isin(["cuda", "triton"])])
    (tmp_path / "part" / "h200" / "machine.json").write_text("{}")
    figure = matmul_unseen.draw(tmp_path / "part")
    assert "not recorded: frozen, online" in figure.get_supxlabel() and "tuned" not in figure.get_suptitle()


@pytest.mark.parametrize("size", PAGES)
def test_it_is_drawn_for_every_page(size, data):
    assert len(matmul_unseen.draw(data, page=PAGES[size]).axes) == 2


def test_without_rows_it_says_how_to_record_them(data, tmp_path):
    rows = UNSEEN.read(data / "h200")
    less = tmp_path / "less"
    UNSEEN.merge(less / "h200", rows[rows.implementation == "cuda"])
    (less / "h200" / "machine.json").write_text("{}")
    with pytest.raises(ValueError, match="no unseen weight is recorded beside cuda's.*python -m kernels unseen"):
        matmul_unseen.draw(less)
