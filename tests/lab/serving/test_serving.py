"""One request in many batches: what is generated, compared, drawn, and moved by a slider without a browser."""
from __future__ import annotations

import re

import pytest
import torch

from kernels import bits
from kernels.lab.notebook import exercises
from kernels.lab.serving import chart, measure
from kernels.lab.serving.measure import Answer
from kernels.lab.serving.widget import BATCHES, BatchSlider
from kernels.lab.widgets.parts import png
from kernels.model import Llama, Sampler, steps

TINY = Llama("tiny", dtype=torch.float32, device="cpu")


def made(text: bytes, size=1, ops="default", moved=0.0):
    return Answer(ops, size, text, torch.full((len(text), 4), 1.0 + moved))


@pytest.fixture
def tiny(monkeypatch):
    """The widget and the pictures with a model that takes no time, and no answer kept from another model."""
    monkeypatch.setattr(measure, "_loaded", lambda dtype, device: TINY)
    measure.answer.cache_clear()
    yield TINY
    measure.answer.cache_clear()


# what is generated

def test_a_batch_of_one_is_what_greedy_decoding_gives():
    texts, logits = measure.generate(TINY, [b"def f(x):"], 6)
    assert list(texts[0]) == steps.greedy(TINY, b"def f(x):", 6)
    assert logits.shape == (1, 6, 256) and logits[0].argmax(-1).tolist() == list(texts[0])


def test_each_logit_is_that_of_the_text_before_it():
    prompts = [b"import", b"x = [1, 2"]
    texts, logits = measure.generate(TINY.using("tiled"), prompts, 4)
    for prompt, text, row in zip(prompts, texts, logits, strict=True):
        whole = steps.logits(TINY.using("tiled"), prompt + text[:-1])
        assert bits.same_bits(whole[len(prompt) - 1:], row)


def test_a_seeded_request_has_its_text_in_any_batch():
    model, sampler = TINY.using("tiled"), Sampler(temperature=1.0, top_p=0.9)
    prompts = [b"class A:", b"import os", b"#"]
    texts, _ = measure.generate(model, prompts, 5, sampler, seeds=[3, 4, 5])
    for i, prompt in enumerate(prompts):
        assert measure.generate(model, [prompt], 5, sampler, seeds=[3 + i])[0] == [texts[i]]
    assert measure.generate(model, prompts[:1], 5, sampler, seeds=[9])[0] != texts[:1]


@pytest.mark.parametrize(("prompts", "count", "said"), [
    ([b"a"], 0, "count must be a whole number of at least 1, got 0"),
    ([], 1, "at least one prompt, got none"),
    ([b"a", b""], 1, "at least one token"),
    ([b"a" * 1020], 5, "context of 1024 tokens"),
])
def test_bad_requests_are_named(prompts, count, said):
    with pytest.raises(ValueError, match=said):
        measure.generate(TINY, prompts, count)


def test_neighbours_differ_from_one_another_and_a_larger_batch_keeps_the_smaller_ones():
    batch = measure.requests(64)
    assert batch[0] == measure.REQUEST and len(set(batch)) == 64
    assert {len(prompt) for prompt in batch} == {len(measure.REQUEST)}
    assert measure.requests(8) == batch[:8] and measure.requests(1) == [measure.REQUEST]


@pytest.mark.parametrize("size", [0, 2.0, 10**6])
def test_a_size_that_there_is_not_is_named(size):
    with pytest.raises(ValueError, match=rf"size must be a whole number from 1 to \d+, got {size}"):
        measure.requests(size)


def test_the_model_is_the_trained_one():
    """Inverse of random weights: what it predicts of real source is far better than chance, 8 bits a byte."""
    text = measure.requests(2, b"x" * 200)[1]
    logits = steps.logits(measure.byte_model(dtype=torch.float32, device="cpu"), text)[:-1].float()
    nats = -logits.log_softmax(-1).gather(-1, torch.tensor(list(text))[1:, None]).mean().item()
    assert 0 < nats / 0.6931 < 3


def test_flipping_seeds_are_those_for_which_the_sampler_chooses_two_tokens():
    alone = torch.tensor([0.3, 1.0, -2.0, 0.1])
    beside = alone + torch.tensor([0.0, 0.02, 0.0, -0.01])
    found = measure.flipping_seeds(alone, beside, 7, tries=3000)
    seeds, at = torch.arange(3000), torch.full((3000,), 7)
    sampler = Sampler(temperature=1.0)
    one, other = (sampler(row.expand(3000, -1).contiguous(), at, seeds) for row in (alone, beside))
    assert 0 < len(found) < 100 and found.tolist() == seeds[one != other].tolist()
    assert not len(measure.flipping_seeds(alone, alone, 7, tries=3000))


def test_a_model_that_does_not_move_has_no_flipping_seed(tiny, monkeypatch):
    monkeypatch.setattr(measure, "byte_model", lambda ops: tiny.using("tiled"))
    assert measure.flipping_seed(3, b"def f") == 0


# what is compared

def test_layers_are_those_of_the_prompt_alone_with_a_fixed_order():
    model, prompts = TINY.using("tiled"), [b"def f", b"import sys", b"x ="]
    alone, beside = (measure.rows_by_layer(model, some) for some in (prompts[:1], prompts))
    assert list(alone) == ["embedding", "layer 0", "layer 1", "logits"]
    assert bits.same_bits(alone, beside)
    assert bits.same_bits(alone["logits"], steps.logits(model, prompts[0])[-1:])
    assert bits.same_bits(alone["embedding"][0], TINY.embedding[ord("f")])


def test_a_prompt_without_a_byte_before_its_last_is_named():
    with pytest.raises(ValueError, match="at least 2 bytes each, got 1"):
        measure.rows_by_layer(TINY, [b"def f", b"x"])


def test_the_table_has_a_line_a_layer_and_a_column_a_size(tiny):
    table = measure.layer_table("tiled", (1, 3), b"def f")
    assert list(table.index) == ["embedding", "layer 0", "layer 1", "logits"] and list(table) == [1, 3]
    assert (table[1] == table[3]).all() and table[1].nunique() == 4


def test_a_fixed_order_keeps_text_and_digest(tiny):
    one, three = measure.answers("tiled", (1, 3), b"def f", 4)
    assert one.digest == three.digest and one.differs_from(three) is None and three.size == 3
    best = one.logits.sort(-1, descending=True).values
    assert measure.smallest_lead(one) == (best[:, 0] - best[:, 1]).min().item()


@pytest.mark.parametrize(("a", "b", "first"), [(b"abc", b"abc", None), (b"abc", b"abd", 2), (b"abc", b"xbc", 0)])
def test_the_first_difference(a, b, first):
    assert made(a).differs_from(made(b)) == first


# what is drawn

def test_letters_behind_the_first_difference_stand_on_red():
    figure = chart.batches_chart([[made(b"ab c\n"), made(b"abd\n\n", 8, moved=1)]])
    flipped = [t.get_text() for t in figure.axes[0].texts if len(t.get_text()) == 1 and t.get_bbox_patch()]
    assert flipped == list("d↵↵")
    said = [t.get_text() for t in figure.axes[0].texts if len(t.get_text()) > 1]
    assert said[0] == "alone" and said[2] == "one of 8" and said[1].endswith("✓") and said[3].endswith("✗")


def test_a_long_name_of_a_machine_stays_inside_the_figure():
    figure = chart.batches_chart([[made(b"abc"), made(b"abc", 2, moved=1)]], caption="A processor " * 12)
    figure.canvas.draw()
    box = figure._supxlabel.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and "\n" in figure._supxlabel.get_text()


def test_a_moved_digest_is_red_where_the_text_stands():
    figure = chart.batches_chart([[made(b"abc"), made(b"abc", 2, moved=1)]])
    assert not [t for t in figure.axes[0].texts if len(t.get_text()) == 1 and t.get_bbox_patch()]
    assert [t.get_text()[-1] for t in figure.axes[0].texts if t.get_bbox_patch()] == ["✓", "✗"]


def test_the_claim_counts():
    parts = [[made(b"ab"), made(b"ab", 2, moved=1)], [made(b"ab", ops="tiled"), made(b"ab", 2, "tiled")]]
    assert chart.claim(parts) == "default: 1 text, 2 digests; tiled: 1 text, 1 digest"
    words = chart.batches_words(parts)
    assert chart.claim(parts) in words and "tiled ops, one of 2: 'ab', logits " in words


def test_every_byte_is_one_letter():
    assert chart.shown(bytes(range(256))) == "".join(chart.shown(bytes([b])) for b in range(256))
    assert len(chart.shown(bytes(range(256)))) == 256 and chart.shown(b"a\n\t\x00\xff") == "a↵⇥··"


# the widget

def test_it_is_a_thin_shell(tiny):
    widget = BatchSlider(b"def f", 4)
    figure, words = chart.study(1, False, b"def f", 4)
    assert widget.chart.value == png(figure) and "default: 1 text, 1 digest" in widget.words.value
    assert repr(widget) == "BatchSlider(b'def f'): run this cell in JupyterLab to use it"


def test_slider_and_button_redraw(tiny):
    widget = BatchSlider(b"def f", 4)
    alone = widget.chart.value
    widget.size.value = 4
    assert widget.chart.value == png(chart.study(4, False, b"def f", 4)[0]) != alone
    widget.fixed.value = True
    fixed = measure.fixed_ops()
    assert widget.chart.value == png(chart.study(4, True, b"def f", 4)[0])
    assert f"{fixed}: 1 text, 1 digest" in widget.words.value and widget.errors.value == ""


def test_the_slider_draws_once_when_let_go_and_its_sizes_fit(tiny):
    widget = BatchSlider(b"def f", 2)
    assert not widget.size.continuous_update and widget.size.options == BATCHES
    assert len(measure.requests(max(BATCHES))) == max(BATCHES)


def test_a_bad_prompt_is_named(tiny):
    with pytest.raises(ValueError, match="prompt must have 1 to 4096 bytes, got 0"):
        BatchSlider(b"")


# the exercises

@pytest.mark.parametrize(("name", "wrong", "hint"), [
    ("06.1", {"linear"}, "add up many"), ("06.1", {"linear", "swiglu"}, "element by element"),
    ("06.1", {"linear", "rotary"}, "two numbers"), ("06.1", {"matmul"}, "the steps are called"),
])
def test_a_wrong_answer_gets_its_hint(name, wrong, hint, capsys):
    exercises.grade(name, wrong)
    assert re.search(hint, capsys.readouterr().out)
