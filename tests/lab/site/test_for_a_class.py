"""What a class gets: the paths of TEACHING.md, copies without solutions, slides; and where the repository is."""
import json
import re

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from kernels.__main__ import VERBS
from kernels.lab.notebook import run
from kernels.lab.site import address, cells, pictures, slides, staging, student, teaching

SOLVED = ("Text.\n\n<details><summary>Solution</summary>\n\n```python\n# solution 00.1\nanswer = 3\n```\n\n</details>"
          "\n\nMore.")
PIXEL = ("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==")


def picture(words="A chart."):
    return new_output("display_data", {"image/png": PIXEL, "text/plain": words}, metadata={"image/png": {"alt": words}})


def widget(source):
    return new_code_cell(source, outputs=[new_output("execute_result", {"text/plain": pictures.NOTE},
                                                     execution_count=1)])


# The paths.

@pytest.mark.parametrize("path", teaching.PATHS)
def test_the_minutes_of_a_path_add_up(path):
    steps = teaching.steps(path)
    assert len(steps) >= 10 and sum(step.minutes for step in steps) == teaching.MINUTES[path]
    assert all(step.todo and step.sections or step.todo == "" for step in steps)


def test_every_section_that_the_plan_names_is_there():
    named = set(teaching.LINK.findall(teaching.TEACHING.read_text(encoding="utf-8")))
    found = {(path.name, place) for path in run.find(["all"]) for _, place in teaching.anchors(run.read(path))}
    assert len(named) > 15 and named - found == set()


def test_every_exercise_that_the_plan_sets_is_there():
    text = teaching.TEACHING.read_text(encoding="utf-8")
    named = set(re.findall(r"^\| (\d\d\.\d) \|", text, re.M)) | set(re.findall(r"[Ee]xercise (\d\d\.\d)", text))
    found = {number for path in run.find(["all"]) for cell in run.read(path).cells
             for number in re.findall(r"^\*\*(\d\d\.\d)\*\*", cell.source, re.M)}
    assert len(named) >= 6 and named - found == set()


def test_an_unknown_path_is_named():
    with pytest.raises(ValueError, match="path must be one of 90 minutes, Half a day, .* got 'a week'"):
        teaching.steps("a week")


def test_the_time_of_cells_is_that_of_their_section(tmp_path):
    nb = new_notebook(cells=[
        new_markdown_cell("# T\n\ntext\n\n## One's 1"), new_code_cell("import time; time.sleep(0.3)"),
        new_markdown_cell("## Two"), new_code_cell("1 + 1"), new_code_cell("2")])
    found = teaching.seconds(nb, tmp_path, "t.ipynb")
    assert set(found) == {"One's-1", "Two"} and found["One's-1"] >= 0.3 > 0 < found["Two"]


# Copies without solutions.

def test_copies_have_no_solution_and_no_output(tmp_path):
    copies = student.build(tmp_path / "out")
    assert [path.name for path in copies] == [path.name for path in run.find(["all"])]
    for path, mine in zip(run.find(["all"]), copies, strict=True):
        text, before = mine.read_text(encoding="utf-8"), run.read(path)
        assert cells.solutions(before) >= 2 and "# solution" not in text and "<summary>Solution" not in text
        nb = nbformat.reads(text, as_version=4)
        nbformat.validate(nb)
        assert [c.source for c in nb.cells if c.cell_type == "code"] == \
               [c.source for c in before.cells if c.cell_type == "code"]
        assert not any(c.outputs or c.execution_count for c in nb.cells if c.cell_type == "code")
    assert not (tmp_path / "out" / "TEACHING.md").exists() and (tmp_path / "out" / "GLOSSARY.md").exists()


def test_what_stands_around_a_solution_stays():
    nb = cells.without_solutions(new_notebook(cells=[new_markdown_cell(SOLVED), new_markdown_cell(
        "<details><summary>Solution</summary>\n\nx\n\n</details>"), new_code_cell("answer = ...")]))
    assert [cell.source for cell in nb.cells] == ["Text.\n\nMore.", "answer = ..."]


@pytest.mark.parametrize("cell", [new_code_cell("# solution 00.1\nanswer = 3"),
                                  new_markdown_cell("```python\n# Solution 00.1\n```")])
def test_a_solution_that_is_not_folded_is_refused(cell):
    with pytest.raises(ValueError, match="a solution must be folded in <details>.*olution 00.1' in cell"):
        cells.without_solutions(new_notebook(cells=[cell]))


@pytest.mark.parametrize("verb, words", [("student", ["--out", str(run.NOTEBOOKS)]), ("student", ["--out", "{folder}"]),
                                         ("slides", ["--out", "{folder}"])])
def test_a_folder_of_the_readers_is_not_emptied(verb, words, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    main = {"student": student.main, "slides": slides.main}[verb]
    with pytest.raises(ValueError, match="--out must be "):
        main([word.format(folder=tmp_path) for word in words])
    assert (tmp_path / "thesis.tex").read_text() == "mine" and run.find(["00"])


# Pictures for widgets.

def test_a_widget_shows_the_chart_that_it_opens_on():
    nb = pictures.with_pictures(new_notebook(cells=[widget("from kernels.lab.orders import SumOrders\nSumOrders()")]))
    image, line = nb.cells[0].outputs
    assert image.data["image/png"].startswith("iVBORw0KGgo") and len(image.data["image/png"]) > 20_000
    assert image.metadata["image/png"]["alt"].startswith("The widget as it opens. ")
    assert "Run the notebook to use it" in line.data["text/html"]


def test_a_widget_of_the_readers_own_machine_shows_the_chart_before_it():
    nb = pictures.with_pictures(new_notebook(cells=[new_code_cell("show()", outputs=[picture("One request.")]),
                                                    widget("BatchSlider(seed=seed)")]))
    assert nb.cells[1].outputs[0].data["image/png"] == PIXEL
    assert nb.cells[1].outputs[0].metadata["image/png"]["alt"] == "One request."


@pytest.mark.parametrize("source", ["NoSuchWidget()", "BatchSlider(seed=seed)", "x = 1", "sweep = TokenSweep"])
def test_a_widget_without_a_picture_is_named(source):
    with pytest.raises(ValueError, match=f"widget must be one of TokenSweep, .*{re.escape(source)}"):
        pictures.with_pictures(new_notebook(cells=[widget(source)]))


def test_every_widget_of_the_notebooks_is_known():
    known = {*pictures.WIDGETS, *pictures.OF_THIS_MACHINE}
    made = [cell.source.strip().splitlines()[-1] for path in run.find(["all"]) for cell in run.read(path).cells
            if pictures.is_widget(cell)]
    assert len(made) >= 8 and {line.partition("(")[0] for line in made} <= known


# Links of staged texts.

@pytest.mark.parametrize("text, up, wanted", [
    ("see `kernels/ops/rms_norm.py`", "../", "see [`kernels/ops/rms_norm.py`](../kernels/ops/rms_norm.py.md)"),
    ("see `kernels/no_such.py`", "", "see `kernels/no_such.py`"),
    ("```\n`kernels/op.py`\n```", "", "```\n`kernels/op.py`\n```"),
    ("[c](../README.md#the-notebooks)", "../", "[c](../index.md#the-notebooks)"),
    ("[d](README.md)", "../", "[d](README.md)"), ("[d](data/README.md)", "", "[d](data/README.md)"),
    ("[r](README.md#limits)", "", "[r](index.md#limits)"),
    ("[s](02_a.ipynb#13.-Dynamic-batching)", "../", "[s](02_a.ipynb#13-dynamic-batching)"),
    ("[s](03_a.ipynb#A-GPU's-bits,-here) [t](GLOSSARY.md#L2)", "../",
     "[s](03_a.ipynb#a-gpus-bits-here) [t](GLOSSARY.md#L2)")])
def test_links_lead_to_pages_of_the_site(text, up, wanted):
    assert staging.linked(text, up, sources=True) == wanted


# Slides.

def test_a_heading_begins_a_slide():
    nb = cells.as_slides(new_notebook(cells=[
        new_markdown_cell("# T\n\ntext"), new_code_cell("a"), new_markdown_cell("more"),
        new_markdown_cell("end\n\n## Next\n\n```\n## no heading\n```"), new_code_cell("b", outputs=[picture()]),
        new_code_cell("c", outputs=[picture()])]))
    kinds = [(cell.source.splitlines()[0], cell.metadata.slideshow["slide_type"]) for cell in nb.cells]
    assert kinds == [("# T", "slide"), ("a", "-"), ("more", "subslide"), ("end", "subslide"), ("## Next", "slide"),
                     ("b", "-"), ("c", "subslide")]
    assert len({cell.id for cell in nb.cells}) == len(nb.cells)


def test_a_link_to_a_deck_leads_there_and_another_is_text():
    nb = cells.relinked(new_notebook(cells=[new_markdown_cell(
        '[01 · Add](01_add.ipynb#x) [row](GLOSSARY.md#row "What it is.") [web](https://example.org) [here](#here)')]),
        {"01_add.ipynb": "01_add.html"})
    assert nb.cells[0].source == "[01 · Add](01_add.html) row [web](https://example.org) [here](#here)"


@pytest.mark.browser
def test_a_deck_opens_without_a_network_and_leads_on_by_keyboard(page, tmp_path):
    path, = slides.build(tmp_path / "slides", ("00",))
    text = path.read_text(encoding="utf-8")
    assert "reveal.js 5.2" in text and pictures.NOTE not in text and '<script src' not in text
    page.set_viewport_size({"width": 1280, "height": 800})
    page.goto(path.as_uri())
    page.wait_for_function("Reveal.isReady()")
    total = page.evaluate("Reveal.getTotalSlides()")
    assert 15 <= total <= 60
    for _ in range(3):
        page.keyboard.press("Space")
    assert page.evaluate("Reveal.getSlidePastCount()") == 3
    assert page.locator("section.present section.present").first.bounding_box()["width"] > 900
    assert page.evaluate("document.querySelectorAll('details[open]').length") == 0, "solutions are folded"


def test_a_script_stays_as_it_is_but_for_an_end_tag(tmp_path, monkeypatch):
    (tmp_path / "_static" / "revealjs").mkdir(parents=True)
    (tmp_path / "_static" / "revealjs" / "a.js").write_text('describe("<script>1</script>"); // a script')
    monkeypatch.setattr(slides, "files", lambda package: tmp_path)
    assert slides._reveal("a.js") == 'describe("<script>1<\\/script>"); // a script'


def test_a_template_of_another_form_is_refused():
    for text in ("no link", '<link href="inside/dist/reveal.css"><link href="inside/dist/reveal.css">'):
        with pytest.raises(RuntimeError, match="must link dist/reveal.css once"):
            slides.inlined(text, "dist/reveal.css")


# The address.

def test_the_address_is_one_setting(tmp_path, monkeypatch):
    monkeypatch.setattr(address, "CITATION", tmp_path / "CITATION.cff")
    (tmp_path / "CITATION.cff").write_text("title: x\n")
    assert address.known() is None
    (tmp_path / "CITATION.cff").write_text('title: x\nrepository-code: "https://example.org/a/b"\n')
    assert address.known() == address.Address("https://example.org/a/b")
    assert address.known("https://example.org/c/d.git").path == "c/d"


@pytest.mark.parametrize("url", ["example.org/a/b", "https://example.org/a", "git@example.org:a/b"])
def test_an_address_of_another_form_is_refused(url):
    with pytest.raises(ValueError, match="must look like https://HOST/OWNER/NAME, got '" + re.escape(url)):
        address.Address(url)


def test_the_commands_are_listed():
    assert {"site", "slides", "student", "teaching"} <= set(VERBS)


def test_a_notebook_without_an_address_invites_nowhere():
    nb = new_notebook(cells=[new_markdown_cell("# T\n\ntext")])
    assert "Binder" not in json.dumps(staging.notebook(nb, run.NOTEBOOKS / "t.ipynb", None, False))
