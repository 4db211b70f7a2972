"""One sequence in seven ways: every way computes each position once, from the right keys; and what the pictures say."""
from __future__ import annotations

import re
from fractions import Fraction
from functools import partial

import matplotlib as mpl
import numpy as np
import pytest
import torch

from kernels import bits, elementary, runtime
from kernels.arithmetic.ex2 import PLACES, ex2, explain
from kernels.lab.attention import chart, measure
from kernels.lab.notebook import exercises
from kernels.lab.sweep import TokenSweep
from kernels.ops.attention import Sequences, attention_decode, attention_prefill, order

NAMES = ["whole prefill", "chunked prefill", "prefill, then decode", "in shuffled pages", "among strangers",
         "in reverse order", "after a prefix-cache hit"]


def inputs(n=50, shape="H=2,KV=1,D=16", device="cpu"):
    return attention_prefill.inputs(n, shape, device=device)[:3]


# seven ways


def test_the_specification_has_one_digest_in_all_ways_and_over_several_leaves():
    q, k, v = inputs(290)
    specified = partial(order.specified, leaf=128)
    ways = measure.seven_ways(specified, q, k, v, 286, (20, 100, 140))
    assert [way.name for way in ways] == NAMES
    assert {way.digest for way in ways} == {bits.digest(specified(q, k, v, Sequences([290], [290])))}


@pytest.mark.skipif(bool(runtime.WHY_NOT), reason=runtime.WHY_NOT or "Triton runs here")
def test_the_schedule_has_the_specifications_digest_in_all_ways():
    q, k, v = inputs(12, device=runtime.device())
    ways = measure.seven_ways(attention_prefill.triton, q, k, v, 11, (5,), page=4)
    assert {way.digest for way in ways} == {bits.digest(order.specified(q, k, v, Sequences([12], [12], q.device)))}


@pytest.mark.parametrize("page", [1, 7, 16, 64])
def test_every_way_computes_each_position_once(page):
    q, k, v = inputs()
    for way in measure.seven_ways(order.specified, q, k, v, 40, (5, 20), page):
        covered = [*range(way.given), *(i for begin, end in way.spans for i in range(begin, end))]
        assert covered == list(range(50)), way.name
        assert way.result.shape == q.shape and way.result.isfinite().all()
        assert way.given % page == 0


def test_an_attention_that_counts_its_queries_or_sequences_is_caught():
    """Inverse test: a call whose bits follow how many queries, sequences or pages it was given."""
    def moving(q, k, v, sequences, by):
        return order.specified(q, k, v, sequences) * (1 + by(sequences) / 16)

    for by, moved in ((lambda s: len(s), {4, 5}), (lambda s: s.pages is not None, {3, 6}),
                      (lambda s: s.tokens == 1, {2}), (lambda s: s.tokens == 20, {1})):
        ways = measure.seven_ways(partial(moving, by=by), *inputs(), 40, (5, 20))
        first = by(Sequences([50], [50]))
        differ = {i for i, way in enumerate(ways) if way.digest != ways[0].digest}
        assert first in (0, 1, False) and differ == moved


def test_strangers_and_spare_pages_hold_what_must_not_be_read():
    seen = []

    def call(q, k, v, sequences):
        seen.append((k.isnan().any().item(), sequences))
        return order.specified(q, k, v, sequences)

    measure.seven_ways(call, *inputs(), 40, (5, 20))
    assert [s for nan, s in seen if nan] == [s for _, s in seen if s.pages is not None or len(s) > 1]
    forth, back = (s for _, s in seen if len(s) > 1)
    assert forth.keys.tolist() == back.keys.tolist()[::-1] and len(set(forth.queries.tolist())) == 4


@pytest.mark.parametrize(("prompt", "chunks", "said"), [
    (0, (5,), "prompt must be from 1 to 49, got 0"), (50, (5,), "prompt must be from 1 to 49, got 50"),
    (40, (), "chunks must be at least 1"), (40, (5, 0), r"leave a rest of 50 positions, got \(5, 0\)"),
    (40, (50,), "leave a rest"),
])
def test_bad_sizes_are_named(prompt, chunks, said):
    with pytest.raises(ValueError, match=said):
        measure.seven_ways(order.specified, *inputs(), prompt, chunks)


@pytest.mark.parametrize("keys", [1, 127, 128, 300, 1024])
def test_a_leaf_by_hand_has_the_specifications_bits(keys):
    q, k, v, _ = attention_decode.inputs(1, f"H=4,KV=1,D=16,context={keys}")
    m, total, acc = measure.leaf_by_hand(q[0], k[0, :, 0], v[0, :, 0])
    y, lse = attention_decode.python(q, k, v, Sequences([1], [keys]), lse=True)
    assert bits.same_bits((acc * (1 / total)[:, None]).bfloat16(), y[0])
    assert bits.same_bits(elementary.fma(m, elementary.LN2, elementary.log(total)), lse[0])


# the exponential unit's errors


@pytest.mark.parametrize("sign", [1, -1])
def test_errors_are_those_of_ex2_in_every_cell(sign):
    errors = measure.unit_errors(sign, 64)
    assert errors.shape == (64, 3) and bool((errors.diff(dim=1) >= 0).all())
    assert torch.allclose(errors[:, 1].mean(), measure.unit_errors(sign, 1)[0, 1])
    cell = 37
    place = torch.arange(cell * PLACES // 64, (cell + 1) * PLACES // 64, 4099)
    x = sign * place.double() / PLACES
    ulp = 2.0**-23 if sign > 0 else 2.0**-24
    mine = (ex2(x.float()).double() - torch.exp2(x)) / ulp
    assert errors[cell, 0] <= mine.min() and mine.max() <= errors[cell, 2]
    assert mine.max() - mine.min() > 0.5 * (errors[cell, 2] - errors[cell, 0])


def test_an_error_by_exact_arithmetic():
    x = -0.640625 - 3 * 2.0**-23
    table = explain(x)
    cells = measure.unit_errors(-1, 1 << 10)
    cell = cells[int(-x * (1 << 10))]
    exact = Fraction(2**x)  # float64, 2**-29 of an ulp away
    error = float((Fraction(table["result"]) - exact) * 2**24)
    assert cell[0] <= error <= cell[2]


@pytest.mark.parametrize(("sign", "cells", "said"), [(0, 512, "sign must be 1 or -1"), (1, 3, "cells must divide"),
                                                     (1, 0, "cells must divide")])
def test_bad_cells_and_signs_are_named(sign, cells, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        measure.unit_errors(sign, cells)


# the pictures


@pytest.fixture(scope="module")
def ways():
    return measure.seven_ways(order.specified, *inputs(), 40, (5, 20))


def moved(ways):
    return [*ways[:2], measure.Way("moved", ((0, 50),), ways[0].result + 1), *ways[3:]]


def test_the_bars_cover_the_spans_and_the_digests_stand_beside_them(ways):
    axes = chart.ways_chart(ways, "Here.").axes[0]
    drawn = {(bar.get_x(), bar.get_width()) for bar in axes.patches if abs(bar.get_y() + 0.31 - 1) < 1e-6}
    assert drawn == {(0, 5), (5, 20), (25, 25)}
    texts = [text.get_text() for text in axes.texts]
    assert texts.count(f"{ways[0].digest[:12]}  ✓") == 7 and "11 calls" in texts
    assert axes.get_title(loc="left") == "One sequence, 7 ways, one digest"


def test_a_moved_digest_is_crossed_counted_and_said(ways):
    odd = moved(ways)
    axes = chart.ways_chart(odd).axes[0]
    assert [text.get_text() for text in axes.texts].count(f"{odd[2].digest[:12]}  ✗") == 1
    assert chart.ways_claim(odd) == "One sequence, 7 ways, 2 digests"


def test_the_words_name_every_way(ways):
    words = chart.ways_words(ways)
    for said in (*NAMES, "3 calls of 5, 20, 25", "for positions 32 to 49, those before for another request", "11 calls",
                 ways[0].digest[:12]):
        assert said in words


@pytest.mark.parametrize(("position", "window", "expected"), [
    (0, 0, [0]), (127, 0, [0]), (128, 0, [1, 0]), (300, 0, [2, 1, 0]), (300, 1, [2]), (300, 45, [2]), (300, 46, [2, 1]),
    (300, 9999, [2, 1, 0])])
def test_blocks_are_those_that_the_query_sees_newest_first(position, window, expected):
    assert chart.blocks(position, window) == expected
    oldest = max(position - window + 1, 0) if window else 0
    assert expected == sorted({key // order.BLOCK for key in range(oldest, position + 1)}, reverse=True)


def test_the_picture_of_the_order_numbers_the_blocks_and_shades_what_is_seen():
    axes = chart.key_order((1500, 300), window=400).axes[0]
    numbers = {text.get_position()[0]: text.get_text() for text in axes.texts if text.get_position()[1] == 1}
    assert numbers == {64.0: "3", 192.0: "2", 320.0: "1"}
    seen = sorted((bar.get_x(), bar.get_width()) for bar in axes.patches
                  if bar.get_facecolor()[3] == 1 and abs(bar.get_y() + 0.35) < 1e-6)
    assert seen[0][0] == 1101 and sum(width for _, width in seen) == 400
    assert "query at 300 takes 3 blocks, from 2 down to 0" in chart.key_order_words((1500, 300), 400)


def test_the_units_chart_says_what_was_measured():
    errors = [measure.unit_errors(sign, 64) for sign in (-1, 1)]
    figure = chart.unit_chart(*errors)
    assert [axes.get_title(loc="left")[:8] for axes in figure.axes] == ["Negative", "Positive"]
    line = figure.axes[0].lines[0]
    assert np.allclose(line.get_ydata(), errors[0][:, 1]) and np.allclose(line.get_xdata()[0], -0.5 / 64)
    for error in errors:
        assert f"{error[:, 0].min():+.2f} to {error[:, 2].max():+.2f} ulps" in chart.unit_words(*errors)


@pytest.mark.parametrize("which", ["ways", "moved", "many", "order", "unit"])
def test_no_texts_overlap_and_nothing_is_cut_off(which, ways):
    many = [measure.Way(f"way {i}", ((0, 1500),), torch.zeros(1500)) for i in range(7)]
    figure = {"ways": lambda: chart.ways_chart(ways, "The specification, on a CPU."),
              "moved": lambda: chart.ways_chart(moved(ways)), "many": lambda: chart.ways_chart(many),
              "order": lambda: chart.key_order((300, 1500, 2600)),
              "unit": lambda: chart.unit_chart(*(measure.unit_errors(sign, 64) for sign in (-1, 1)))}[which]()
    figure.draw_without_rendering()
    beyond = {label for axes in figure.axes for label in axes.get_yticklabels()
              if not min(axes.get_ylim()) <= label.get_position()[1] <= max(axes.get_ylim())}  # not drawn
    texts = [t for t in figure.findobj(mpl.text.Text) if t.get_visible() and t.get_text() and t not in beyond]
    found = [t.get_window_extent() for t in texts]
    width, height = figure.canvas.get_width_height()
    assert len(found) > 10
    assert all(b.x0 >= -1 and b.x1 <= width + 1 and b.y0 >= -1 and b.y1 <= height + 1 for b in found)
    assert not [(t.get_text(), u.get_text()) for i, (t, a) in enumerate(zip(texts, found, strict=True))
                for u, b in zip(texts[i + 1:], found[i + 1:], strict=True)
                if a.x0 < b.x1 - 1 and b.x0 < a.x1 - 1 and a.y0 < b.y1 - 1 and b.y0 < a.y1 - 1]


# the widget


@pytest.mark.parametrize("name", ["attention_prefill", "attention_chunk", "attention_decode"])
def test_without_a_gpu_the_sweep_opens_at_a_small_shape_in_bfloat16(name, monkeypatch):
    monkeypatch.setattr(runtime, "HAS_GPU", False)
    widget = TokenSweep(name)
    assert widget.dtype.value == "bfloat16" and widget.shape.value.startswith("H=2,KV=1,D=16")
    widget.op.value = "rms_norm"
    assert widget.dtype.value == "float32"
    widget.op.value = name
    assert widget.dtype.value == "bfloat16" and widget.shape.value.startswith("H=2,KV=1,D=16")


# the notebook's exercises: wrong answers get the hint that fits


def joined(newer, older, fused=True, swapped=False):
    (M, L, A), (m, total, acc) = (older, newer) if swapped else (newer, older)
    top = torch.maximum(M, m)
    a, c = ex2(M - top), ex2(m - top)
    if not fused:
        return top, L * a + total * c, A * a[:, None] + acc * c[:, None]
    return top, elementary.fma(L, a, total * c), elementary.fma(A, a[:, None], acc * c[:, None])


def only_sums(newer, older):
    return *joined(newer, older)[:2], joined(newer, older, fused=False)[2]


def added(newer, older):
    return torch.maximum(newer[0], older[0]), newer[1] + older[1], newer[2] + older[2]


@pytest.mark.parametrize(("name", "answer", "hint"), [
    ("05.1", partial(joined, fused=False), "L has other bits"),
    ("05.1", partial(joined, swapped=True), "L has other bits"),
    ("05.1", only_sums, "A has other bits"),
    ("05.1", added, "rescale each to M first"),
    ("05.1", lambda newer, older: newer, "M is the larger"),
    ("05.1", lambda newer, older: newer[0], "three tensors"),
    ("05.2", ("ac", "bc"), "a's edges lie at absolute positions"), ("05.2", ("bc", "bc"), "when the batch grows"),
    ("05.2", ("c", "c"), "b's parts are a quarter"), ("05.2", ("c", "b"), "c's parts have equal lengths"),
    ("05.4", -0.052734375, "none apart"), ("05.4", 0.25, "between -1 and 0"), ("05.4", -0.5, "errs downward"),
    ("05.4", -0.1, "ValueError: x must be a finite float32 number"),
])
def test_wrong_answers_get_a_hint(name, answer, hint, capsys):
    assert exercises.passes(name, answer) is False
    exercises.grade(name, answer)
    assert hint in capsys.readouterr().out
