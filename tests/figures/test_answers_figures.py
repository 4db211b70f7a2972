"""Answers and speed side by side, and the tree: what is drawn is what was recorded, and what is not is said."""
import json
from collections import Counter

import pytest

from figures import answer_tree, answers
from figures.page import PAGES
from kernels.lab import records, style
from kernels.lab.serving import recorded, speed
from kernels.lab.serving.served import Served

TEXTS = (b"self.one", b"self.two", b"selfless")


def served(*numbers: int) -> Served:
    """Answers of these frequencies, each with two digests of its logits where it can have two."""
    found: Counter = Counter()
    for text, number in zip(TEXTS, numbers, strict=False):
        for i in range(number):
            found[tuple(text), f"{text!r} {i % 2}"] += 1
    return Served(found)


ONE = Served(Counter({(tuple(TEXTS[0]), "0"): 1000}))


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "cpu-mine"
    folder.mkdir()
    (folder / "machine.json").write_text(json.dumps({"device": "AMD EPYC, 1 threads", "torch": "2.13.0"}))
    for ops, found in (("default", served(990, 8, 2)), ("tiled", ONE)):
        for temperature in (0.0, 0.8):
            recorded._write(folder, ("byte", ops, "random 0", temperature), found)
            recorded._write_row(folder, ("byte", ops, recorded.EVERY, temperature), found)
    style.theme()
    return tmp_path


@pytest.fixture
def with_a_gpu(data):
    rows = [speed.row("llama-3.1-8b", ops, cell, [slower * (1 + cell.batch)])
            for cell in speed.cells("cuda") for ops, slower in (("default", 1.0), ("invariant", 0.8), ("frozen", 2.0))]
    speed.SERVING.merge(data / "h200", rows)
    (data / "h200" / "machine.json").write_text(json.dumps({"device": "NVIDIA H200", "torch": "2.11.0"}))
    return data


def said(figure) -> str:
    return " ".join([figure.get_suptitle(), figure.get_supxlabel()]).replace("\n", " ")


def test_answers_alone_are_drawn_where_no_gpu_recorded_its_speed(data):
    figure = answers.draw(data)
    assert len(figure.axes) == 1 and "no GPU has recorded it yet" in said(figure) and "AMD EPYC" in said(figure)
    assert figure.get_suptitle().replace("\n", " ") == ("One prompt, 1,000 requests: 3 answers with default ops, 1 "
                                                        "answer with tiled ops")
    points = {(line.get_label(), float(line.get_xdata()[0])) for line in figure.axes[0].lines
              if line.get_label() in ("_answers", "_digests")}
    assert points == {("_answers", 3.0), ("_digests", 6.0), ("_answers", 1.0), ("_digests", 1.0)}
    assert {text.get_text() for text in figure.axes[0].texts} == {"3 and 6", "1"}
    assert [tick.get_text() for tick in figure.axes[0].get_yticklabels()] == [
        "default, greedy", "tiled, greedy", "default, temperature 0.8", "tiled, temperature 0.8"]


def test_speed_stands_beside_them_as_a_share_of_the_defaults(with_a_gpu):
    figure = answers.draw(with_a_gpu)
    _, decode, prefill = figure.axes
    lines = {line.get_label(): line for line in decode.lines}
    assert set(lines) == {"default", "invariant, 1,024 tokens", "invariant, 8,192 tokens", "frozen, 1,024 tokens",
                          "frozen, 8,192 tokens"}
    assert list(lines["invariant, 1,024 tokens"].get_ydata()) == pytest.approx([1.25] * 6, rel=1e-4)
    assert list(lines["frozen, 8,192 tokens"].get_ydata()) == pytest.approx([0.5] * 4, rel=1e-4)
    assert {line.get_label(): len(line.get_xdata()) for line in prefill.lines} == {"default": 2, "invariant": 5,
                                                                                   "frozen": 5}
    assert "at 1.25 of the default's speed (1.25 to 1.25)" in said(figure) and "H200" in said(figure)
    assert "1.25 of the default's speed" in answers.words(with_a_gpu)


def test_a_verifier_is_named_as_such(data):
    recorded._write(data / "cpu-mine", ("byte", "verified", "random 0", 0.0), ONE)
    recorded._write_row(data / "cpu-mine", ("byte", "verified", recorded.EVERY, 0.0), ONE)
    assert "3 answers with default ops, 1 answer with tiled ops, 1 answer with a verifier" in said(answers.draw(data))
    assert "byte with a verifier, greedy: 1 answer and 1 digest of logits" in answers.words(data)
    figure = answer_tree.draw(data)
    assert figure.axes[2].get_title(loc="left").startswith("a verifier: 1,000 requests, 1 answer")
    figure.draw_without_rendering()
    assert figure._suptitle.get_window_extent().x1 <= figure.bbox.x1, "a claim of several ops takes two lines"


def test_a_part_of_a_gpus_speed_is_shown_as_far_as_it_goes(data):
    cell = speed.Cell("decode", 1, 1024)
    speed.SERVING.merge(data / "h200", [speed.row(model, ops, cell, [1.0]) for model in ("byte", "llama-3.1-8b")
                                        for ops in ("default", "invariant")])
    speed.SERVING.merge(data / "h200", [speed.row("llama-3.1-8b", "frozen", speed.Cell("prefill", 1, 512), [1.0])])
    (data / "h200" / "machine.json").write_text(json.dumps({"device": "NVIDIA H200"}))
    figure = answers.draw(data)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["Answers", "Decode"], "prefill has no default"
    assert "llama-3.1-8b, random weights, on the H200" in said(figure)


def test_a_cpus_speed_is_not_shown_for_a_gpus(data):
    speed.SERVING.merge(data / "cpu-mine", [speed.row("byte", "default", speed.Cell("decode", 1, 8), [1.0])])
    assert len(answers.draw(data).axes) == 1


def test_the_tree_is_of_greedy_answers_of_each_set_of_ops(data):
    figure = answer_tree.draw(data)
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "default ops: 1,000 requests, 3 answers, 6 digests of logits",
        "tiled ops: 1,000 requests, 1 answer, 1 digest of logits"]
    red = [text.get_text() for text in figure.axes[0].texts if text.get_bbox_patch()]
    assert red == ["l", "t"] or red == ["t", "l"]
    words = answer_tree.words(data)
    assert "'self.one' 990 times, 'self.two' 8 times, 'selfless' 2 times" in words
    assert "they differ first at token 5" in words


@pytest.mark.parametrize("size", PAGES)
@pytest.mark.parametrize("draw", [answers.draw, answer_tree.draw])
def test_every_size_holds_its_letters(draw, size, with_a_gpu):
    figure = draw(with_a_gpu, page=PAGES[size])
    figure.draw_without_rendering()
    for legend in figure.legends:
        box = legend.get_window_extent()
        assert box.x1 <= figure.bbox.x1 and all(axes.get_window_extent().y0 > box.y1 for axes in figure.axes)
    for axes in figure.axes:
        for text in axes.texts:
            box = text.get_window_extent()
            assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1, text.get_text()


def test_without_a_record_it_says_so(tmp_path):
    for module in (answers, answer_tree):
        with pytest.raises(FileNotFoundError, match=r"no answers\.csv is recorded"):
            module.draw(tmp_path)
    folder = tmp_path / "mine"
    recorded._write(folder, ("byte", "default", "random 0", 0.0), served(2))
    (folder / "machine.json").write_text("{}")
    for module in (answers, answer_tree):
        with pytest.raises(ValueError, match="no load is recorded whole for mine"):
            module.draw(tmp_path)


def test_a_model_without_letters_has_no_tree(tmp_path):
    folder = tmp_path / "h200"
    many = Served(Counter({((5, 128000), "0"): 3}))
    recorded._write(folder, ("llama-3.1-8b", "default", "random 0", 0.0), many)
    recorded._write_row(folder, ("llama-3.1-8b", "default", recorded.EVERY, 0.0), many)
    (folder / "machine.json").write_text(json.dumps({"device": "NVIDIA H200"}))
    assert answers.draw(tmp_path).axes
    with pytest.raises(ValueError, match="no answers of the byte model are recorded for h200"):
        answer_tree.draw(tmp_path)
    assert records.machines(recorded.ANSWERS.file, tmp_path) == ["h200"]


def test_what_was_timed_in_another_run_is_named(with_a_gpu):
    assert "of other runs" not in said(answers.draw(with_a_gpu))
    rows = speed.SERVING.read(with_a_gpu / "h200")
    one = rows[(rows.ops == "frozen") & (rows.context == 512)]
    speed.SERVING.merge(with_a_gpu / "h200", one.assign(recorded_at="2020-01-01T00:00:00Z"))
    assert "; frozen of other runs than invariant." in said(answers.draw(with_a_gpu))
