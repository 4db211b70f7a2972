"""The picture of a tensor core's addition shows what the addition does; its widget is a thin shell over it."""
import asyncio
import re
import threading
from fractions import Fraction

import matplotlib as mpl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from figures import adder as figure_module
from kernels.arithmetic import tensor_core
from kernels.arithmetic.tensor_core import AMPERE, HOPPER, explain
from kernels.lab.adder import chart as adder_chart
from kernels.lab.adder.chart import ADDERS, EXPONENTS, PRODUCTS, example, in_words, picture, study
from kernels.lab.adder.widget import START, AdderSteps
from kernels.lab.notebook import exercises
from kernels.lab.widgets.base import SETTLE_SECONDS
from kernels.lab.widgets.parts import png

SHOWN = ((START, -2), ((16, -40, -40, None), -40), ((0, 0, 0, 0), 0), ((-5, -40, 2, -1), None),
         ((-20, -22, -24, -26), 16), ((-40, -40, -40, -40), None), ((None, None, None, None), 3))
exponents = st.none() | st.integers(EXPONENTS[0], EXPONENTS[-1])
adders = st.sampled_from(list(ADDERS.values()))


# what the drawn digits say


def numbers(figure, table):
    """Every drawn line's number, read back from its cells: height -> (the blue digits alone, all of them)."""
    axes = figure.axes[0]
    blue = {mpl.colors.to_rgba(fill) for fill, _ in adder_chart._KEPT.values()}
    negative = {text.get_position()[1] for text in axes.texts if text.get_text() == "−"}
    kept = {(round(bar.get_x() + 0.46), round(bar.get_y() + 0.4, 1)): bar.get_facecolor() in blue
            for bar in axes.patches}
    found: dict[float, tuple[Fraction, Fraction]] = {}
    for text in axes.texts:
        place, y = text.get_position()
        if (place, y) in kept:
            value = int(text.get_text()) * Fraction(2) ** (table["exponent"] - place) * (-1 if y in negative else 1)
            some, every = found.get(y, (0, 0))
            found[y] = some + value * kept[place, y], every + value
    return found


@pytest.mark.parametrize("adder", ADDERS.values(), ids=list(ADDERS))
@pytest.mark.parametrize(("given", "accumulator"), SHOWN)
def test_blue_digits_are_what_the_adder_keeps(given, accumulator, adder):
    table = explain(*example(given, accumulator), adder)
    drawn = numbers(picture(table, adder), table)
    finest = Fraction(2) ** (table["exponent"] - adder.fraction_bits - adder_chart._BELOW)
    for y, term in enumerate(table["terms"]):
        kept, every = drawn.get(y, (0, 0))
        assert kept == Fraction(term["kept"])
        assert abs(Fraction(term["value"]) - every) < finest, "digits up to the picture's edge are all drawn"
    kept, every = drawn.get(PRODUCTS + 1.3, (0, 0))
    assert kept == Fraction(table["result"]) and every == Fraction(table["sum"])


def test_a_wrong_digit_is_noticed():
    """Inverse test: a picture of another addition."""
    table, other = explain(*example(START, -2)), explain(*example(START, -3))
    assert numbers(picture(table, HOPPER), table) != numbers(picture(other, HOPPER), other)


@settings(deadline=None, max_examples=100)
@given(st.lists(exponents, min_size=PRODUCTS, max_size=PRODUCTS), exponents, adders)
def test_examples_have_the_exponents_asked_for_and_the_chains_result(given, accumulator, adder):
    a, b, start = example(given, accumulator)
    table = explain(a, b, start, adder)
    assert [term["exponent"] for term in table["terms"][1:]] == given
    assert table["terms"][0]["exponent"] == (adder.zero_exponent if accumulator is None else accumulator)
    result = tensor_core.chain(a[None], b[None], adder, torch.tensor([[start]])).item()
    assert result == table["result"]


def test_significands_leave_no_factor_to_rounding():
    a, b, start = example((0, 0, 0, 0), 0)
    assert list(zip(a.tolist(), b.tolist(), strict=True)) == list(adder_chart._FACTORS)
    assert Fraction(start) == adder_chart._ACCUMULATOR
    assert int(adder_chart._ACCUMULATOR * 2**23).bit_length() == 24


# words and looks


@pytest.mark.parametrize(("given", "accumulator", "adder", "said"), [
    (START, -2, HOPPER, "2 of 5 terms kept whole, 2 cut, 1 lost: the line is 25 bits below the largest exponent"),
    ((16, -40, -40, None), -40, AMPERE,
     "1 of 4 terms kept whole, 0 cut, 3 lost: the line is 24 bits below the largest exponent"),
])
def test_the_claim_counts_what_became_of_the_terms(given, accumulator, adder, said):
    figure = study(given, accumulator, adder)[0]
    assert figure.axes[0].get_title(loc="left") == said
    assert study(given, accumulator, adder, title="Mine")[0].axes[0].get_title(loc="left") == "Mine"


def test_the_words_name_every_fate():
    words = study((3, -14, None, -27), 3)[1]
    for said in ("accumulator, 11.4485, is kept whole", "product 1, -0.000125442, is cut by", "product 2, 0, is zero",
                 "product 3, 1.18202e-08, is lost whole", "25 places below 2 to the 3"):
        assert said in words, said


@pytest.mark.parametrize(("given", "accumulator"), SHOWN)
def test_no_texts_overlap_and_nothing_is_cut_off(given, accumulator):
    figure = study(given, accumulator)[0]
    figure.draw_without_rendering()
    texts = [t for t in figure.findobj(mpl.text.Text) if t.get_visible() and t.get_text()]
    found = [t.get_window_extent() for t in texts]
    width, height = figure.canvas.get_width_height()
    assert len(found) > 10 and all(b.x0 >= -1 and b.x1 <= width + 1 and b.y0 >= -1 and b.y1 <= height + 1
                                   for b in found)
    clashes = [(t.get_text(), u.get_text()) for i, (t, a) in enumerate(zip(texts, found, strict=True))
               for u, b in zip(texts[i + 1:], found[i + 1:], strict=True)
               if a.x0 < b.x1 - 1 and b.x0 < a.x1 - 1 and a.y0 < b.y1 - 1 and b.y0 < a.y1 - 1]
    assert not clashes


@pytest.mark.parametrize(("arguments", "said"), [
    (((1, 2, 3),), "exponents must be 4, one a product, got 3"),
    (((1, 2, 3, 17),), "exponents must be None or a whole number from -40 to 16, got 17"),
    (((1, 2, 3, 0.5),), "exponents must be None .* got 0.5"),
    (((1, 2, 3, 4), True), "accumulator must be None .* got True"),
])
def test_bad_exponents_are_named(arguments, said):
    with pytest.raises(ValueError, match=said):
        example(*arguments)


def test_the_figure_is_this_picture_and_its_words():
    table = explain(*example(figure_module.EXPONENTS, figure_module.ACCUMULATOR))
    assert in_words(table, HOPPER) == figure_module.words()
    assert figure_module.draw().axes[0].get_title(loc="left") == adder_chart.claim(table, HOPPER)


# the widget


def test_it_is_a_thin_shell():
    widget = AdderSteps()
    figure, words = study(START, -2)
    assert widget.chart.value == png(figure) and words in widget.words.value
    assert repr(widget) == "AdderSteps((3, -6, -14, -27), -2, 'Hopper'): run this cell to use it"


def test_every_control_redraws_the_picture():
    widget, seen = AdderSteps(), set()
    seen.add(widget.chart.value)
    for control, value in (*((slider, 1 - i) for i, slider in enumerate(widget.sliders)), (widget.zeros[1], True),
                           (widget.zeros[-1], True), (widget.adder, "Ampere")):
        control.value = value
        seen.add(widget.chart.value)
    assert len(seen) == 9
    assert widget.exponents == [1, None, -1, -2, None]
    assert widget.chart.value == png(study([1, None, -1, -2], None, AMPERE)[0])


def test_a_sum_of_zeros_is_said_and_the_picture_stays():
    widget = AdderSteps((2, None, None, None), None)
    before = widget.chart.value
    widget.zeros[0].value = True
    assert "all five are zero" in widget.errors.value and widget.chart.value == before
    widget.zeros[-1].value = False
    assert widget.errors.value == "" and widget.chart.value != before


def test_sliders_reach_every_exponent_and_draw_once_when_let_go():
    widget = AdderSteps()
    assert not any(slider.continuous_update for slider in widget.sliders)
    assert {(slider.min, slider.max) for slider in widget.sliders} == {(EXPONENTS[0], EXPONENTS[-1])}


def test_many_changes_on_another_thread_are_drawn_once_and_by_its_own_thread(monkeypatch):
    drawn = []

    async def in_a_notebook():
        widget = AdderSteps()
        monkeypatch.setattr(widget, "_draw", lambda: drawn.append((threading.get_ident(), widget.exponents[0])))
        other = threading.Thread(target=lambda: [widget.sliders[0].set_trait("value", e) for e in range(5)])
        other.start()
        other.join()
        await asyncio.sleep(4 * SETTLE_SECONDS)

    asyncio.run(in_a_notebook())
    assert drawn == [(threading.get_ident(), 4)]


@pytest.mark.parametrize(("arguments", "said"), [
    (((1, 2, 3, 99),), "exponents must be None or a whole number"),
    ((START, -2, "Pascal"), "adder must be one of Hopper, Ampere, got 'Pascal'"),
])
def test_bad_input_of_the_widget_is_named(arguments, said):
    with pytest.raises(ValueError, match=re.compile(said)):
        AdderSteps(*arguments)


# the notebook's exercises: wrong answers get the hint that fits


def split_k(x, weight, block):
    pairs = zip(x.split(block, dim=1), weight.split(block, dim=1), strict=True)
    return sum(tensor_core.chain(a, b) for a, b in pairs)


@pytest.mark.parametrize(("name", "answer", "hint"), [
    ("04.1", (512, 2048), "how many tiles are 512"),
    ("04.1", (8, 8), "segments"),
    ("04.2", (-24, -25), "p = -24: adding that leaves 1.0"),
    ("04.2", (-22, -25), "p = -22: adding half of that still changes"),
    ("04.2", (-23, -26), "m = -26: subtracting that leaves 1.0"),
    ("04.2", (-23, -23), "m = -23: subtracting half of that still changes"),
    ("04.3", split_k, "does each block start where the last one stopped"),
    ("04.3", lambda x, weight, block: x.float() @ weight.float().T, "other bits"),
    ("04.3", lambda x, weight, block: x @ weight.T, "float32 of shape"),
    ("04.3", lambda x, weight, block: tensor_core.chain(weight, x).T[:, :1].expand(8, 24), "not the product"),
])
def test_wrong_answers_get_a_hint(name, answer, hint, capsys):
    assert exercises.passes(name, answer) is False
    exercises.grade(name, answer)
    assert hint in capsys.readouterr().out
