"""One model on several GPUs: points without a second number of GPUs are compared with none, and their time is drawn."""
import json

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from figures import tensor_parallel
from figures.page import PAGES
from kernels.lab import style
from kernels.lab.parallel import chart
from kernels.lab.parallel.measure import TENSOR_PARALLEL


def row(model, ops, gpus, phase, batch, ms):
    digest = "a0b1c2d3" if ops == "invariant" else f"{gpus:x}f00{batch:04}"
    return {"model": model, "ops": ops, "gpus": gpus, "phase": phase, "batch": batch, "context": 512, "ms_p05": ms,
            "ms_p50": ms, "ms_p95": ms, "logit_digest": digest * 8, "recorded_at": "", "source": ""}


@pytest.fixture
def data(tmp_path):
    style.theme()
    rows = [row("byte", ops, gpus, "decode", 1, 1.0 if ops == "default" else 0.5) for ops in chart.LINES
            for gpus in (1, 2)]
    rows += [row("llama-3.1-8b", ops, 2, "decode", batch, 10.0 if ops == "default" else 8.0) for ops in chart.LINES
             for batch in (1, 8)]
    TENSOR_PARALLEL.merge(tmp_path / "h200", rows)
    (tmp_path / "h200" / "machine.json").write_text(json.dumps({"device": "NVIDIA H200"}))
    return tmp_path


def test_a_point_on_one_number_of_gpus_has_no_verdict(data):
    rows = chart.recorded("h200", data)
    assert set(chart.compared(rows).model) == {"byte"} and set(chart.alone(rows).model) == {"llama-3.1-8b"}
    assert chart.claim(rows) == "One model on 1, 2 GPUs: default ops 2 digests, invariant ops 1 digest"
    left, right, _ = tensor_parallel.draw(data).axes
    assert len(left.texts) == 4 and len(right.lines) == 2
    assert "On 2 GPUs alone: 2 of 3 points" in chart.caption(rows, "NVIDIA H200")


def test_every_points_time_stands_beside_the_defaults(data):
    third = tensor_parallel.draw(data).axes[2]
    names = [label.get_text() for label in third.get_yticklabels()]
    assert names == ["byte: decode of 1 behind 512", "8B: decode of 1 behind 512", "8B: decode of 8 behind 512"]
    found = {line.get_label(): list(zip(line.get_xdata(), line.get_ydata(), strict=True)) for line in third.lines}
    assert found["invariant / default, on 1"] == [(0.5, 0)]
    assert found["invariant / default, on 2"] == [(0.5, 0), (0.8, 1), (0.8, 2)]
    assert "byte, decode 0.50; llama-3.1-8b, decode 0.80." in tensor_parallel.words(data)


@pytest.mark.parametrize("page", PAGES)
def test_it_is_drawn_for_every_page(page, data):
    assert len(tensor_parallel.draw(data, page=PAGES[page]).axes) == 3


def test_without_a_second_number_of_gpus_all_are_compared(data):
    rows = chart.recorded("h200", data)
    alone = rows[rows.gpus == 2]
    assert len(chart.compared(alone)) == len(alone) and not len(chart.alone(alone))
    assert chart.claim(alone) == "One model on 2 GPUs"
    assert chart.claim(rows[rows.gpus == 1]) == "One model on one GPU"
    assert chart.claim(rows[rows.gpus == 1].assign(cpu=True)) == "One model on one process"


def test_more_numbers_of_gpus_than_marks_and_rows_of_one_ops_are_drawn(data):
    rows = chart.recorded("h200", data)
    many = pd.concat([rows[rows.gpus == 1].assign(gpus=gpus) for gpus in (1, 2, 4, 8, 16)])
    axes = plt.figure().subplots(1, 2)
    chart.ratios(axes[0], many)
    chart.ratios(axes[1], rows[rows.ops == "default"])
    assert len(axes[0].lines) == 6 and len(axes[1].lines) == 1  # and the default's own
    plt.close("all")
