"""The model of time's figure: its points are the rows, its words and title say what they are."""
import json

import numpy as np
import pandas as pd
import pytest

from figures import cost_model
from figures.page import PAGES
from kernels.lab import records, style
from kernels.lab.tuning import cost_design as design
from kernels.lab.tuning import cost_fit
from kernels.lab.tuning.cost_times import COST_TIMES, candidates
from kernels.op import DTYPES, Shape
from kernels.ops.matmul.cost import Tile

WEIGHTS = (*design.FITTED[:3], design.CHECKED[0])


@pytest.fixture
def data(tmp_path):
    """Times that the rough model made, and that model as what was fitted; at one point the choice is twice as slow."""
    style.theme()
    points = [(str(Shape(N=n, K=k)), tokens, str(s)) for n, k in WEIGHTS for tokens in (7, 300)
              for s in candidates(n, k, tokens, DTYPES["bfloat16"], 9)]
    rows = pd.DataFrame(points, columns=["shape", "tokens", "schedule"]).assign(
        dtype="bfloat16", us_p50=1.0, repeats=5, same_bits=True)
    rows = rows.assign(registers=np.nan, shared_bytes=np.nan)
    known = cost_fit.timed(rows, "bfloat16")
    fitted = cost_fit.Fitted(design.ROUGH, Tile(*np.array([design.rough(t)[:-1] for t in known.tiles]).T, known.held),
                             known.tiles)
    known.rows["us_p50"] = cost_fit.predicted(fitted, known)
    first = known.rows.loc[known.rows[known.rows["shape"] == str(Shape(N=2048, K=8192))].us_p50.idxmin()].name
    known.rows.loc[first, "us_p50"] *= 2
    default = known.rows.groupby(["dtype", "shape", "tokens"], as_index=False).us_p50.min().assign(schedule="cuda")
    COST_TIMES.merge(tmp_path / "h200", pd.concat([known.rows, default.assign(repeats=5)]))
    (tmp_path / "h200" / "machine.json").write_text(json.dumps({"device": "NVIDIA H200", "torch": "2.11.0"}))
    (tmp_path / "schedules").mkdir()
    cost_fit.write({"bfloat16": fitted}, {}, tmp_path / "schedules" / "h200_cost.json", False)
    return tmp_path


def test_every_time_is_a_point_and_the_choices_stand_out(data):
    figure = cost_model.draw(data)
    left, right = figure.axes
    rows, chosen, _ = cost_model.recorded(data)
    lines = {line.get_label(): line for line in left.lines}
    assert len(lines["every schedule"].get_xdata()) == len(rows)
    for checked, look in cost_model.LOOKS.items():
        mine = chosen[chosen.checked == checked]
        np.testing.assert_allclose(lines[f"chosen, {look['label']}"].get_xdata(), mine.us)
        assert len(mine) == 2 * (1 if checked else 3)
    steps = {line.get_label(): line.get_xdata() for line in right.lines}
    assert max(steps["weights that were fitted"][:-1]) < 1.01 < min(max(steps["weights that were not"][:-1]), 3)


def test_the_title_tells_of_weights_that_were_not_fitted(data):
    _, chosen, _ = cost_model.recorded(data)
    lost = (chosen.us / chosen.best)[chosen.checked.astype(bool)]
    mean = float(np.exp(np.log(lost).mean()))
    assert len(lost) == 2 and 1.05 < mean < 2
    figure = cost_model.draw(data)
    assert figure.get_suptitle() == (f"A schedule chosen by the model takes {mean:.2f} times the fastest's time, for "
                                     "weights that were not fitted")
    caption = figure.get_supxlabel()
    assert "4 weights, 8 points" in caption and "NVIDIA H200" in caption
    assert "weights that were not: 2 points" in cost_model.words(data)


@pytest.mark.parametrize("size", PAGES)
def test_it_is_drawn_for_every_page(size, data):
    assert len(cost_model.draw(data, page=PAGES[size]).axes) == 2


def test_without_a_table_or_a_model_it_says_how_to_make_them(data, tmp_path):
    (data / "schedules" / "h200_cost.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no h200_cost\.json in .*python -m kernels\.lab\.tuning\.cost_fit"):
        cost_model.draw(data)
    with pytest.raises(FileNotFoundError, match=r"no cost_times\.csv is recorded"):
        cost_model.draw(tmp_path / "none")


def test_what_the_recorded_model_chooses_for_weights_it_never_saw():
    _, chosen, _ = cost_model.recorded(records.DATA)
    lost = (chosen.us / chosen.best)[chosen.checked.astype(bool)]
    assert len(lost) >= 70 and np.exp(np.log(lost).mean()) < 1.05
