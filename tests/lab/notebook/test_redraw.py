"""Cells that draw recorded data print the same on every machine: what is committed is what they print now."""
import html
import importlib
import re

import nbformat
import pytest

from kernels.lab.notebook import run

DRAWN = [(path, cell) for path in run.find(["all"]) for cell in run.read(path).cells
         if cell.cell_type == "code" and cell.source.startswith("from figures import")]


def test_there_are_such_cells():
    assert len(DRAWN) >= 4 and all(cell.outputs for _, cell in DRAWN)


@pytest.mark.parametrize("path, cell", DRAWN, ids=lambda value: getattr(value, "stem", "cell"))
def test_the_committed_output_has_the_words_of_today(path, cell):
    """Red? Run python -m kernels notebooks redraw all"""
    alias = dict(part.split(" as ")[::-1] if " as " in part else (part.strip(),) * 2
                 for part in re.match(r"from figures import (.+)", cell.source)[1].split(", "))
    named = re.findall(r"show\((\w+)\.draw\(\), (\w+)\.words\(\)\)", cell.source)
    assert named and all(drawn == said for drawn, said in named)
    texts = "".join("".join(output.data.get("text/html", "")) for output in cell.outputs if "data" in output)
    for name, _ in named:
        assert html.escape(importlib.import_module(f"figures.{alias[name].strip()}").words()) in texts


def test_only_drawing_cells_are_executed(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "faults", lambda nb: [])
    made = [nbformat.v4.new_code_cell(source) for source in (
        "kept = 1\nprint('first')", "raise ValueError", "from figures import adder\nprint(kept, bool(adder))")]
    made[2].outputs, made[2].execution_count = [nbformat.v4.new_output("stream", text="old")], 3
    path = tmp_path / "09_toy.ipynb"
    path.write_text(nbformat.writes(nbformat.v4.new_notebook(cells=made)))
    run.redraw(path, timeout=60)
    cells = run.read(path).cells
    assert cells[2].outputs[0]["text"] == "1 True\n" and not cells[0].outputs and not cells[1].outputs


def test_a_notebook_without_such_cells_stays(tmp_path):
    path = tmp_path / "09_toy.ipynb"
    path.write_text(text := nbformat.writes(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")])))
    run.redraw(path)
    assert path.read_text() == text
