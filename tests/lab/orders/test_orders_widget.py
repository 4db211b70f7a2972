"""The pictures of rounding and of sums, and SumOrders without a browser."""
import asyncio
import re
import threading

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import torch

from kernels.lab.orders import chart as orders_chart
from kernels.lab.orders import measure as orders
from kernels.lab.orders.widget import LENGTHS, SumOrders
from kernels.lab.widgets.base import SETTLE_SECONDS
from kernels.lab.widgets.parts import png
from kernels.op import DTYPES


def boxes(figure):
    """Where every text of the figure is drawn."""
    figure.draw_without_rendering()
    texts = [t for t in figure.findobj(mpl.text.Text) if t.get_visible() and t.get_text()]
    inside = [t for t in texts if not t.axes or not hidden_tick(t)]
    return [t.get_window_extent() for t in inside]


def hidden_tick(text):
    """Whether this is the label of a tick beyond the axis' limits, or of an inner panel: none of them is drawn."""
    axes = text.axes
    labels = axes.get_xticklabels()
    if text not in labels:
        return False
    low, high = axes.get_xlim()
    return not axes.xaxis.get_tick_params()["labelbottom"] or not low <= text.get_position()[0] <= high


def overlapping(found):
    return [(a, b) for i, a in enumerate(found) for b in found[i + 1:]
            if a.x0 < b.x1 - 0.5 and b.x0 < a.x1 - 0.5 and a.y0 < b.y1 - 0.5 and b.y0 < a.y1 - 0.5]


def heights(axes):
    return np.array([bar.get_height() for bar in axes.patches])


# The charts.

@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_number_line_has_every_number_and_no_other(dtype):
    every = torch.arange(1 << 15).to(torch.int16).view(dtype).double()
    wanted = every[(every >= 250) & (every <= 262)].tolist()
    assert orders_chart.representable(dtype, 250, 262) == wanted
    drawn = orders_chart.number_line().axes[1].collections[0 if dtype == torch.bfloat16 else 1]
    assert [segment[0][0] for segment in drawn.get_segments()] == wanted


def test_the_small_format_is_drawn_whole():
    every = torch.arange(128, dtype=torch.uint8).view(torch.float8_e5m2).double()
    segments = orders_chart.number_line().axes[0].collections[0].get_segments()
    assert [segment[0][0] for segment in segments] == every[every <= 16].tolist()


def test_too_many_numbers_are_not_listed():
    with pytest.raises(ValueError, match="too many numbers of float32 from 250 to 262"):
        orders_chart.representable(torch.float32, 250, 262)


@pytest.mark.parametrize(("n", "dtype", "spread", "positive"), [
    (8, torch.float32, 8, False), (64, torch.float16, 24, False), (300, torch.bfloat16, 0, True)])
def test_every_sum_is_in_the_histogram_and_where_it_belongs(n, dtype, spread, positive):
    x = orders.numbers(n, dtype, spread, positive)
    rows = orders.permutations(n) if n <= 8 else orders.shuffles(n, 500)
    found = orders.distribution(x, rows)
    figure = orders_chart.distribution_chart(found, x)
    assert len(figure.axes) == len(found)
    for axes, sums in zip(figure.axes, found.values(), strict=True):
        errors = orders.errors(sums, x).numpy()
        assert heights(axes).sum() == pytest.approx(1), "a sum lies outside the bins"
        middle = np.array([bar.get_x() + bar.get_width() / 2 for bar in axes.patches])
        half = (middle[1] - middle[0]) / 2
        assert (middle * heights(axes)).sum() == pytest.approx(errors.mean(), abs=half)
        filled = int((heights(axes) > 0).sum())
        assert len(axes.collections[0].get_segments()) == filled, "a tick under every bar, however low"


def test_one_ulp_one_bar():
    x = orders.numbers(8, spread=8)
    axes = orders_chart.distribution_chart({"every": orders.every_order(x)}, x).axes[0]
    assert (heights(axes) > 0).sum() == 12
    assert axes.patches[0].get_width() == pytest.approx(0.9)


@pytest.mark.parametrize("n, dtype", [(8, torch.float32), (4096, torch.float16)])
def test_the_caption_says_what_the_ticks_are(n, dtype):
    figure = orders_chart.study(n, dtype, spread=8)[0]
    bars = figure.axes[0].patches
    width = bars[1].get_x() - bars[0].get_x()
    said = figure.get_supxlabel().splitlines()
    assert len(said) == 2 and said[1] == f"A tick below the bars: a bin, {width:g} ulp wide, that holds a sum"


def test_verdicts_say_how_many_results_there_are():
    x = orders.numbers(64)
    figure = orders_chart.distribution_chart(orders.distribution(x, orders.shuffles(64, 100)), x)
    said = {axes.get_ylabel(): " ".join(t.get_text() for t in axes.texts) for axes in figure.axes}
    table = orders.summary(orders.distribution(x, orders.shuffles(64, 100)), x)
    for kind, line in table.iterrows():
        results = int(line["different results"])
        assert said[kind].startswith(f"✗ {results} results off by up to" if results > 1 else "✓ 1 result off by")


@pytest.mark.parametrize(("counts", "text"), [
    ([76, 1], "The same 4,096 numbers in other orders: 1 to 76 different sums"),
    ([3, 3], "The same 4,096 numbers in other orders: 3 sums"),
    ([1], "The same 4,096 numbers in other orders: 1 sum"),
])
def test_the_claim_is_what_the_table_says(counts, text):
    assert orders_chart.claim(pd.DataFrame({"different results": counts}), 4096) == text


def test_the_words_hold_the_numbers():
    words = orders_chart.study(3, torch.float32, ["pairwise", "fixed point"])[1]
    assert words == ("Histograms of sums of the same 3 float32 numbers in other orders, by distance from the exact sum "
                     "in ulps. pairwise: different results 2, largest error 0.5 ulp; fixed point: different results 1, "
                     "largest error 0.5 ulp.")


@pytest.mark.parametrize("figure", [
    lambda: orders_chart.number_line(),
    lambda: orders_chart.study(4096)[0],
    lambda: orders_chart.study(4096, torch.bfloat16, positive=True, spread=24)[0],
    lambda: orders_chart.study(4096, torch.float16, spread=8)[0],
    lambda: orders_chart.study(2, torch.float16, spread=24)[0],
    lambda: orders_chart.study(16, kinds=["fixed point"])[0],
], ids=["number-line", "4096", "stuck", "far-off", "two", "one-kind"])
def test_no_texts_overlap_and_nothing_is_cut_off(figure):
    figure = figure()
    found = boxes(figure)
    assert len(found) > 5 and not overlapping(found)
    width, height = figure.canvas.get_width_height()
    assert all(b.x0 >= -1 and b.x1 <= width + 1 and b.y0 >= -1 and b.y1 <= height + 1 for b in found)


def test_overlaps_are_found():
    """Inverse test: a title too many."""
    figure = orders_chart.study(4, kinds=["pairwise"])[0]
    figure.axes[0].text(0, 0.5, "over here", transform=figure.axes[0].transAxes)
    figure.axes[0].text(0.01, 0.5, "and here", transform=figure.axes[0].transAxes)
    assert overlapping(boxes(figure))


# The widget.

def test_it_is_a_thin_shell():
    widget = SumOrders(16, "bfloat16")
    figure, words = orders_chart.study(16, torch.bfloat16)
    assert widget.chart.value == png(figure)
    assert words in widget.words.value.replace("&#x27;", "'")
    assert repr(widget) == "SumOrders(16, 'bfloat16'): run this cell in JupyterLab to use it"


def test_every_control_redraws_the_chart():
    widget, seen = SumOrders(16), set()
    seen.add(widget.chart.value)
    for control, value in ((widget.length, 64), (widget.dtype, "float16"), (widget.spread, 12),
                           (widget.positive, True), (widget.seed, 3), (widget.kinds["split"], False)):
        control.value = value
        seen.add(widget.chart.value)
    assert len(seen) == 7
    others = [name for name in orders.KINDS if name != "split"]
    assert widget.chart.value == png(orders_chart.study(64, torch.float16, others, 8, True, 3)[0])


def test_no_way_to_add_is_said_and_the_chart_stays():
    widget = SumOrders(4)
    for name in list(widget.kinds)[:-1]:
        widget.kinds[name].value = False
    before = widget.chart.value
    widget.kinds["fixed point"].value = False
    assert "choose at least one way to add" in widget.errors.value and widget.chart.value == before
    widget.kinds["Kahan"].value = True
    assert widget.errors.value == "" and widget.chart.value != before


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_widest_spread_can_be_drawn(dtype):
    widest = SumOrders(2).spread.max - 4
    for length in LENGTHS:
        x = orders.numbers(length, DTYPES[dtype], widest)
        table = orders.summary(orders.distribution(x, orders.shuffles(length, 5)), x)
        assert np.isfinite(table["worst error (ulp)"]).all(), length


def test_sliders_draw_once_when_let_go():
    widget = SumOrders(2)
    assert not any(w.continuous_update for w in (widget.length, widget.spread, widget.seed))


def test_many_changes_on_another_thread_are_drawn_once_and_by_its_own_thread(monkeypatch):
    drawn = []

    async def in_a_notebook():
        widget = SumOrders(2)
        monkeypatch.setattr(widget, "_draw", lambda: drawn.append((threading.get_ident(), widget.seed.value)))
        other = threading.Thread(target=lambda: [widget.seed.set_trait("value", seed) for seed in range(1, 6)])
        other.start()
        other.join()
        await asyncio.sleep(4 * SETTLE_SECONDS)

    asyncio.run(in_a_notebook())
    assert drawn == [(threading.get_ident(), 5)]


@pytest.mark.parametrize(("arguments", "said"), [
    ((9,), "length must be one of 2, 3, .* got 9"),
    ((8, "float64"), "dtype must be one of bfloat16, .* got 'float64'"),
])
def test_bad_input_is_named(arguments, said):
    with pytest.raises(ValueError, match=re.compile(said)):
        SumOrders(*arguments)
