"""One prompt among strangers: loads from a seed, answers that are counted, the tree, the score, the record."""
from __future__ import annotations

import re
from collections import Counter

import pytest
import torch

from kernels.lab.notebook import exercises
from kernels.lab.serving import loads, measure, recorded, score, tree
from kernels.lab.serving.loads import Server
from kernels.lab.serving.served import Served, first_difference, sampler_of, serve
from kernels.lab.serving.widget import ServerSettings
from kernels.lab.widgets.parts import png
from kernels.model import Llama

TINY = Llama("tiny", dtype=torch.bfloat16, device="cpu")
CROWD = loads.crowd(TINY.config, 3, 3, count=10, spread=4)


def got(answers: dict[bytes, int], digest="") -> Served:
    return Served(Counter({(tuple(answer), digest or str(answer)): number for answer, number in answers.items()}))


# loads

def test_a_load_follows_from_its_seed_alone():
    assert loads.random_load(TINY.config, 3) == loads.random_load(TINY.config, 3) != loads.random_load(TINY.config, 4)
    assert loads.crowd(TINY.config, seed=1).calls != loads.crowd(TINY.config, seed=2).calls


def test_twenty_loads_mix_all_that_a_server_does():
    many = [loads.random_load(TINY.config, seed) for seed in range(20)]
    assert sum(load.copies for load in many) == 1000
    for field in ("page_size", "max_batch", "chunk", "sharing", "speculate", "pages"):
        assert len({getattr(load.server, field) for load in many}) > 1, field
    calls = [call for load in many for call in load.calls]
    ours, strangers = ([call for call in calls if (call.seed is None) == wanted] for wanted in (True, False))
    assert {(call.prompt, call.count, call.cancelled) for call in ours} == {(tuple(loads.PROMPT), loads.COUNT, None)}
    assert len({len(call.prompt) for call in strangers}) > 40 and {call.count for call in strangers} >= {1, 20}
    assert 0.1 < sum(call.cancelled is not None for call in strangers) / len(strangers) < 0.3
    begin_alike = sum(call.prompt[:16] == tuple(loads.PROMPT[:16]) for call in strangers)
    assert 0.1 < begin_alike / len(strangers) < 0.4
    assert all(list(load.calls) == sorted(load.calls, key=lambda call: call.arrives) for load in many)


def test_a_load_of_a_model_whose_tokens_are_no_bytes_stays_in_its_vocabulary():
    config = recorded.model_of("tiny", "default", torch.device("cpu")).config
    wide = type(config)(**{**vars(config), "vocab_size": 1000})
    calls = loads.random_load(wide, 0).calls
    assert 256 < max(max(call.prompt) for call in calls) < 1000


@pytest.mark.parametrize(("given", "said"), [
    ({"copies": 0}, "copies must be a whole number of at least 1, got 0"),
    ({"strangers": -1}, "strangers must be a whole number of at least 0, got -1"),
    ({"count": 1.5}, "count must be a whole number of at least 1, got 1.5"),
    ({"spread": 0}, "spread must be a whole number of at least 1, got 0")])
def test_a_load_that_cannot_be_is_named(given, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        loads.crowd(TINY.config, **given)


# what is served and counted

def test_a_fixed_order_gives_one_answer_whatever_the_server_does():
    """Few pages preempt, drafts are verified, a prefix is shared; the counts show that it happened."""
    model, total = TINY.using("tiled"), Served()
    for knobs in ({"chunk": 3}, {"pages": 18, "page_size": 8, "max_batch": 8}, {"max_batch": 1}, {"speculate": 3}):
        total += serve(model, CROWD.on(**knobs))
    assert (total.requests, len(total.answers), len(total.digests)) == (12, 1, 1)
    assert {len(answer) for answer in total.answers} == {10} and total.counts["tokens found in the cache"] > 0
    assert total.counts["preemptions"] > 0 and total.counts["drafts"] > 0 and total.counts["requests"] == 24


def test_other_noise_and_other_weights_are_noticed():
    """Inverse of the claim: the counting sees what does move."""
    model, few = TINY.using("tiled"), loads.crowd(TINY.config, 1, 0, count=5)
    both = serve(model, few, sampler_of(0.8)) + serve(model, few, sampler_of(1.0))
    assert len(both.digests) == 2 >= len(both.answers)
    other = Llama("tiny", ops="tiled", dtype=torch.bfloat16, device="cpu", seed=1)
    assert len((serve(model, few) + serve(other, few)).digests) == 2


def test_a_request_of_ours_that_fails_is_not_counted_as_an_answer():
    broken = Llama("tiny", ops="tiled", dtype=torch.bfloat16, device="cpu")
    broken.head = torch.full_like(broken.head, float("nan"))
    with pytest.raises(RuntimeError, match="its logits are not numbers"):
        serve(broken, CROWD)


@pytest.mark.parametrize(("answers", "first"), [
    ([b"abc"], None), ([b"abc", b"abc"], None), ([b"abc", b"abd"], 2), ([b"abc", b"xbc", b"abd"], 0),
    ([b"abc", b"ab"], 2), ([], None)])
def test_the_first_difference_of_answers(answers, first):
    assert first_difference(map(tuple, answers)) == first


def test_answers_are_those_of_all_digests_the_most_frequent_first():
    some = Served(Counter({(tuple(b"ab"), "1"): 2, (tuple(b"ab"), "2"): 3, (tuple(b"ac"), "3"): 4}))
    assert some.answers == {tuple(b"ab"): 5, tuple(b"ac"): 4} and list(some.answers)[0] == tuple(b"ab")
    assert some.digests == {"1", "2", "3"} and some.requests == 9 and some.first_difference == 1
    assert str(some) == "9 requests, 2 answers, 3 digests of logits"
    assert str(Served(Counter({((1,), "a"): 1}))) == "1 request, 1 answer, 1 digest of logits"


# the record

@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "_loaded", lambda dtype, device: TINY)
    return tmp_path


def test_a_record_holds_each_load_and_their_union_and_is_resumed(folder, monkeypatch):
    plan, said = recorded.Plan("byte", ("default", "tiled"), 2, 2, 3, (0.0,)), []
    rows = recorded.record(plan, folder, said=said.append)
    assert tuple(rows) == recorded.ANSWERS.columns and len(rows) == 6 and len(said) == 6
    every = rows[rows.load == recorded.EVERY].set_index("ops")
    assert every.requests.tolist() == [4, 4] and every.answers.tiled == every.logit_digests.tiled == 1
    texts = recorded.TEXTS.read(folder)
    assert texts.groupby("ops").requests.sum().to_dict() == {"default": 4, "tiled": 4}
    served_again = []
    monkeypatch.setattr(recorded, "serve", lambda *given: served_again.append(given))
    recorded.record(plan, folder, said=said.append)
    assert not served_again, "what this code has recorded is not served again"


def test_a_load_that_is_served_again_takes_the_place_of_its_old_answers(folder):
    key = ("byte", "default", "random 0", 0.0)
    recorded._write(folder, key, got({b"ab": 1, b"ac": 2}))
    recorded._write(folder, ("byte", "default", "random 1", 0.0), got({b"ab": 4}))
    recorded._write(folder, ("byte", "default", "random 0", 0.8), got({b"xy": 9}))
    recorded._write(folder, key, got({b"ab": 3}))
    assert recorded.recorded(folder, "byte", "default", 0.0).answers == {tuple(b"ab"): 7}
    assert recorded.recorded(folder, "byte", "default", 0.0, 1).requests == 3
    rows = recorded.ANSWERS.read(folder)
    row = rows[rows.temperature == 0].set_index("load").loc["random 0"]
    assert (row.requests, row.answers) == (3, 1) and row.first_difference != row.first_difference


@pytest.mark.parametrize(("model", "answer"), [("byte", bytes(range(256))), ("byte", b"\n\"'\x00\xff"),
                                               ("llama-3.1-8b", (5, 128000))])
def test_an_answer_is_read_as_it_was_written(model, answer, tmp_path):
    recorded._write(tmp_path, (model, "default", "random 0", 0.8), Served(Counter({(tuple(answer), "00ab"): 1})))
    assert list(recorded.recorded(tmp_path, model, "default", 0.8).answers) == [tuple(answer)]


@pytest.mark.parametrize(("given", "said"), [
    ({"number": 0}, "loads must be at least 1 and requests at least 2 a load, got 0 and 50"),
    ({"copies": 1}, "requests at least 2 a load, got 20 and 1"),
    ({"temperatures": (-1.0,)}, "temperature must lie in")])
def test_a_plan_that_cannot_be_is_named(given, said):
    with pytest.raises(ValueError, match=said):
        recorded.Plan("byte", ("default",), **given)


# the tree

def test_the_tree_writes_once_what_answers_share():
    lines = tree.branches({tuple(b"abcd"): 5, tuple(b"abXY"): 2, tuple(b"abXZ"): 1, tuple(b"Qbcd"): 1})
    assert [(line.line, line.start, line.letters, line.number, line.leaves) for line in lines] == [
        (0, 0, "abcd", 5, None), (1, 2, "XY", 2, 0), (2, 3, "Z", 1, 1), (3, 0, "Qbcd", 1, 0)]


def test_every_answer_can_be_read_off_the_tree():
    answers = {tuple(text): number for number, text in enumerate((b"aaaa", b"aaab", b"abaa", b"abab", b"baaa"), 1)}
    lines, texts = tree.branches(answers), []
    for line in lines:
        texts.append((texts[line.leaves][: line.start] if line.leaves is not None else "") + line.letters)
    assert sorted(zip(texts, (line.number for line in lines), strict=True)) == sorted(
        (bytes(answer).decode(), number) for answer, number in answers.items())


def test_the_first_letter_of_a_branch_alone_stands_on_red_and_the_rest_is_counted():
    figure = tree.tree_chart({"default": got({b"abc": 4, b"abd": 2, b"xyz": 1, b"xyy": 1}), "tiled": got({b"abc": 8})},
                             most=2)
    top, below = figure.axes
    assert [text.get_text() for text in top.texts if text.get_bbox_patch()] == ["d"]
    assert not [text for text in below.texts if text.get_bbox_patch()]
    assert "and 2 more answers, of 2 requests" in [text.get_text() for text in top.texts]
    assert figure.get_suptitle().replace("\n", " ") == ("One prompt, 8 requests: 4 answers with default, 1 answer with "
                                                        "tiled")
    words = tree.tree_words({"default": got({b"abc": 4, b"abd": 2})})
    assert "they differ first at token 3" in words and "'abc' 4 times, 'abd' 2 times" in words


# the score

def test_a_score_is_that_of_the_whole_window_and_no_size_moves_it_with_a_fixed_order():
    model = TINY.using("tiled")
    found = score.scores(model, (1, 2, 3), windows=3, length=6)
    assert len(set(found.values())) == 1
    text, nats = measure.held_out(), []
    for i in range(3):
        piece = torch.tensor([list(text[i * (len(text) // 3) :][:6])])
        rows = model(piece, model.cache(1, 6), logits="all")[0, :-1].float().log_softmax(-1)
        nats += rows.gather(1, piece[0, 1:, None]).flatten().tolist()
    assert found[1] == pytest.approx(-sum(nats) / len(nats) / 0.693147, rel=1e-4)
    assert score.score(Llama("tiny", ops="tiled", device="cpu", seed=2), 1, 3, 6) != found[1], "another model's"


@pytest.mark.parametrize(("given", "said"), [
    ((0,), "size must be a whole number from 1 to 8, got 0"), ((17,), "from 1 to 8, got 17"),
    ((1, 2, 1), "length must be a whole number from 2"), ((1, 0), "from 1 to 0, got 1")])
def test_a_score_that_cannot_be_is_named(given, said):
    with pytest.raises(ValueError, match=said):
        score.score(TINY, *given)


# the widget

@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(measure, "_loaded", lambda dtype, device: TINY)
    tree._served.cache_clear()
    yield ServerSettings(3, 4)
    tree._served.cache_clear()


def test_each_knob_reaches_the_server_and_no_knob_an_answer_with_the_order_fixed(small):
    small.fixed.value = True
    for knob, value in ((small.chunk, 5), (small.batch, 1), (small.pages, 24), (small.drafts, 4),
                        (small.sharing, False)):
        knob.value = value
        assert "4 requests, 1 answer, 1 digest of logits" in small.words.value and small.errors.value == ""
    server = Server(pages=24, page_size=8, max_batch=1, budget=64, chunk=5, sharing=False, speculate=4)
    assert small.chart.value == png(tree.study(server, True, 3, 4)[0])
    assert tree._served.cache_info().currsize >= 6, "each setting was served"
    small.fixed.value = False
    assert "default ops, once alone and 3 times among strangers" in small.words.value


@pytest.mark.parametrize(("given", "said"), [((0, 4), "copies must be a whole number of at least 1, got 0"),
                                             ((2, 0), "count must be a whole number of at least 1, got 0")])
def test_numbers_that_cannot_be_are_named(given, said):
    with pytest.raises(ValueError, match=said):
        ServerSettings(*given)


# the exercises

@pytest.mark.parametrize(("name", "wrong", "hint"), [
    ("06.2", 40, "without the prefix cache"), ("06.2", 13, "is not full"), ("06.2", 12, "more than one page"),
    ("06.2", 21, "can be shared"), ("06.2", "many", "a whole number is asked for"),
    ("06.3", lambda chosen, drafts: chosen, "before it were right"),
    ("06.3", lambda chosen, drafts: chosen[: sum(a == b for a, b in zip(chosen, drafts, strict=False))] or chosen[:1],
     "one token is missing"),
    ("06.4", lambda tokens: 32, "two in five"), ("06.4", lambda tokens: "x", "from 0 to 255"),
])
def test_a_wrong_answer_gets_its_hint(name, wrong, hint, capsys):
    exercises.grade(name, wrong)
    assert re.search(hint, capsys.readouterr().out)
