"""The handout: one page, the same bytes, nothing over something else, and what it says is so."""
import itertools
import re

import pytest
import torch
from matplotlib.text import Text

from figures import FOLDER, handout
from kernels.arithmetic.sums import ordered_sum
from kernels.lab.notebook import run
from kernels.lab.sources import PROPERTIES


@pytest.fixture(scope="module")
def page():
    figure = handout.draw()
    figure.draw_without_rendering()
    return figure


@pytest.fixture(scope="module")
def files():
    return handout.render()


def test_bytes_are_those_in_the_repository(files):
    for kind, content in files.items():
        assert content == (FOLDER / f"handout.{kind}").read_bytes(), f"handout.{kind}: run `make figures`"


def test_the_pdf_is_one_page_of_a4_without_a_date():
    pdf = (FOLDER / "handout.pdf").read_bytes()
    assert pdf.startswith(b"%PDF-") and len(re.findall(rb"/Type /Page\b(?!s)", pdf)) == 1
    box = re.search(rb"/MediaBox \[ 0 0 ([\d.]+) ([\d.]+) \]", pdf).groups()
    assert [float(side) for side in box] == pytest.approx([72 * side for side in handout.A4], abs=0.1)
    assert b"CreationDate" not in pdf and b"/FlateDecode" not in pdf, "a compressor's bytes differ between machines"


def test_nothing_leaves_the_page_or_lies_over_something_else(page):
    boxes = [(text.get_text(), text.get_window_extent()) for text in page.findobj(Text)
             if text.get_text() and (text.axes is None or text.axes.axison or text in text.axes.texts)]
    assert len(boxes) > 40
    for text, box in boxes:
        assert page.bbox.x0 < box.x0 and box.x1 < page.bbox.x1, f"{text!r} goes over the side"
        assert page.bbox.y0 + 20 < box.y0 and box.y1 < page.bbox.y1, f"{text!r} goes over the top or bottom"
    for (one, a), (other, b) in itertools.combinations(boxes, 2):
        across, down = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        assert across <= 1 or down <= 2, f"{one!r} and {other!r} overlap by {across:.1f} x {down:.1f} pixels"


def test_it_has_the_words_the_properties_and_the_rungs(page):
    said = " ".join(" ".join(text.get_text().split()) for text in page.findobj(Text))
    for wanted in (*handout.WORDS, *handout.WORDS.values(), *PROPERTIES, *PROPERTIES.values(), *handout.LADDER):
        assert " ".join(wanted.split()) in said, wanted
    assert len(handout.WORDS) == len(handout.LADDER) == 6 and len(PROPERTIES) == 3


def test_the_words_and_the_rungs_are_those_of_notebook_00():
    prose = "\n".join(cell.source for cell in run.read(run.find(["00"])[0]).cells if cell.cell_type == "markdown")
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", prose)
    table = set(re.findall(r"^\| \*\*(\w+)\*\* \|", plain, re.M))
    assert table == set(handout.WORDS)
    rungs = re.findall(r"^(\d)\. \*\*(.+?)\*\*", plain, re.M)
    assert [int(number) for number, _ in rungs] == list(range(1, 7))
    for (_, rung), ours in zip(rungs, handout.LADDER, strict=True):
        assert rung.split(",")[0].split()[:3] == ours.split(",")[0].split()[:3]


def test_the_sum_of_the_tree_is_that_of_the_suites_order(page):
    numbers = torch.tensor(handout.NUMBERS, dtype=torch.float32)
    root = ordered_sum(numbers).item()
    straight = 0.0
    for number in numbers:
        straight = (torch.tensor(straight) + number).item()
    assert root != straight and root != sum(handout.NUMBERS)
    assert root == 1 + 2.0**-22 and straight == 1.0
    assert "In pairs their sum is 1 + 4e, from left to right it is 1." in handout.words_of_the_tree()
    assert "1 + 4e" in [text.get_text() for text in page.findobj(Text)]


def test_the_same_bytes_twice(files):
    assert handout.render() == files


def test_check_notices_a_changed_byte(files, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(handout, "render", lambda: files)
    assert handout.main(["--out", str(tmp_path)]) == 0 and handout.main(["--out", str(tmp_path), "--check"]) == 0
    whole = bytearray((tmp_path / "handout.pdf").read_bytes())
    whole[len(whole) // 2] ^= 1
    (tmp_path / "handout.pdf").write_bytes(whole)
    assert handout.main(["--out", str(tmp_path), "--check"]) == 1 and "changed" in capsys.readouterr().out
    assert (tmp_path / "handout.pdf").read_bytes() == whole, "it writes nothing"
