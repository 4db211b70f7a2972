"""The glossary's file and links, and the minutes of reading: rules shown on small notebooks."""
from __future__ import annotations

import nbformat
import pytest

from kernels.lab.notebook import glossary, reading, run

TEXT = """# Glossary

### ulp

The step to the next number. More.

### tensor core

*also: MMA unit*

A part that "multiplies" `small` things.

### core

A part.
"""


@pytest.fixture
def known(tmp_path):
    path = tmp_path / "GLOSSARY.md"
    path.write_text(TEXT)
    return glossary.terms(path)


def test_an_entry_has_an_anchor_and_forms(known):
    core = known["tensor core"]
    assert core.anchor == "tensor-core" and core.forms == ("tensor core", "MMA unit")
    assert known["ulp"].definition.startswith("The step to the next number.")


@pytest.mark.parametrize(("text", "said"), [
    ("### Ulp\n\nA step.\n", "small letters, digits, spaces and hyphens, got 'Ulp'"),
    ("### c++\n\nA step.\n", r"got 'c\+\+'"),
    ("### ulp\n\nno stop\n", "must be a sentence that ends with a full stop"),
    ("### ulp\n", "entries \\['ulp'\\] have no definition"),
    ("### ulp\n\nA step.\n\n### ulp\n\nA step.\n", "two entries of one name"),
])
def test_an_entry_that_cannot_be_linked_is_refused(text, said, tmp_path):
    path = tmp_path / "GLOSSARY.md"
    path.write_text(text)
    with pytest.raises(ValueError, match=said):
        glossary.terms(path)


def test_the_suites_own_glossary_can_be_read():
    assert len(glossary.terms()) > 60 and {"warp", "ulp", "llm-42"} <= set(glossary.terms())


@pytest.mark.parametrize("source", ["`ulp`", "## An ulp", "```\nulp\n```", "<details>ulp</details>", "[ulp](x.md)",
                                    "![ulp](x.png)", "kernels/ulp/x", "ulp.py", "gulp", "core-ulp", "ulp-like"])
def test_what_is_no_prose_or_another_word_is_no_use(source, known):
    assert glossary.first_use(known["ulp"], [source]) is None
    assert list(glossary.faults([source], known)) == []


@pytest.mark.parametrize("source", ["an ulp.", "Ulps", "(ulp)", "**ulp**", "`x` ulp", "two ulps' width"])
def test_what_is_prose_is_a_use(source, known):
    assert glossary.first_use(known["ulp"], [source])
    (fault,) = glossary.faults([source], known)
    assert "first used without a link" in fault


def test_links_are_set_at_the_first_use_and_nowhere_else(known):
    sources = ["# A tensor core, [see](GLOSSARY.md)", "One ulp, then a tensor core.", "A core, an ulp, MMA units."]
    linked = glossary.link(sources, known)
    assert linked == ["# A tensor core, [see](GLOSSARY.md)",
                      "One [ulp](GLOSSARY.md#ulp), then a [tensor core](GLOSSARY.md#tensor-core).",
                      "A [core](GLOSSARY.md#core), an ulp, MMA units."]
    assert list(glossary.faults(linked, known)) == [] and glossary.link(linked, known) == linked


def test_a_link_that_came_too_late_or_is_stale_or_leads_nowhere_is_found(known):
    late = ["An ulp.", "Its [ulp](GLOSSARY.md#ulp)."]
    assert any("'ulp' is first used" in fault for fault in glossary.faults(late, known))
    assert glossary.link(late, known)[1] == "Its ulp."
    same_cell = ["An ulp, then its [ulp](GLOSSARY.md#ulp)."]
    assert any("'ulp' is first used" in fault for fault in glossary.faults(same_cell, known))
    assert any("is not as" in fault for fault in glossary.faults(['[ulp](GLOSSARY.md#ulp "Old.")'], known))
    assert any("#gone" in fault for fault in glossary.faults(["[x](GLOSSARY.md#gone)"], known))


def notebook(*cells):
    made = [nbformat.v4.new_markdown_cell(c) if kind == "m" else nbformat.v4.new_code_cell(c) for kind, c in cells]
    return nbformat.v4.new_notebook(cells=made)


def test_minutes_follow_words_lines_and_pictures():
    looks = "show(x)\nshow_source(y)"
    nb = notebook(("m", "About 99 minutes of reading. " + "word " * 145), ("c", "a\n" * 20), ("c", looks))
    # 150 words: 1 minute; 22 lines: 2.2 minutes; two looks: 1 minute
    assert reading.minutes(nb) == 5
    nb.cells[1].source = "a\n" * 40
    assert reading.minutes(nb) == 10
    nb.cells[1].source = ""
    hidden = '<details>{}</details> [x](GLOSSARY.md#x "{}")'.format("word " * 2000, "word " * 2000)
    nb.cells.append(nbformat.v4.new_markdown_cell(hidden))
    assert reading.minutes(nb) == 5


def test_a_notebook_in_normal_form_states_its_minutes():
    nb = notebook(("m", "# T\n\nAbout 99 minutes of reading."), ("m", "In 99 minutes of reading."))
    assert reading.stated(nb) == 99
    nb = run.normalise(nb)
    assert reading.stated(nb) == 5 and nb.cells[1].source == "In 99 minutes of reading."
    assert reading.stated(notebook(("m", "# T"))) is None and reading.stated(notebook()) is None


def test_the_command_links_a_notebook(tmp_path, monkeypatch, known):
    path = tmp_path / "01_x.ipynb"
    monkeypatch.setattr(glossary, "terms", lambda: known)
    path.write_text(run.as_text(notebook(("m", "An ulp."))))
    assert run.main(["check", str(path)]) == 1
    assert run.main(["clean", str(path)]) == 0
    assert 'An [ulp](GLOSSARY.md#ulp).' in run.read(path).cells[0].source
