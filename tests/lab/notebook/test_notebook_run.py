"""The runner that executes and normalises notebooks, and the rules that notebooks are held to, shown failing."""
from __future__ import annotations

import base64
import json
import subprocess
import sys

import nbformat
import pytest
import test_notebooks as rules
from nbformat.v4 import new_code_cell as code
from nbformat.v4 import new_markdown_cell as words
from nbformat.v4 import new_output as output

from kernels.lab import records
from kernels.lab.notebook import run as notebook

# Normal form and its faults. The notebooks here are as a kernel leaves them, unless executed.

def made(*cells):
    nb = nbformat.v4.new_notebook(cells=list(cells))
    for count, cell in enumerate((c for c in nb.cells if c.cell_type == "code" and c.source), 1):
        cell.execution_count = count
    return nb


def printing(text):
    return code("print()", outputs=[output("stream", text=text)])


def image(data=b"png", **metadata):
    png = {"image/png": base64.b64encode(data).decode()}
    return code("show()", outputs=[output("display_data", data=png, metadata={"image/png": metadata})])


@pytest.fixture
def written(tmp_path):
    def write(nb, name="01_made.ipynb"):
        path = tmp_path / name
        nbformat.write(nb, path)
        return path
    return write


def test_normal_form_keeps_nothing_of_the_run_or_the_machine():
    nb = made(words("# T  \n"), printing("10%|#\r20%|##\rdone\n"))
    nb.metadata = {"widgets": {"state": 1}, "kernelspec": {"name": "mine"}, "language_info": {"version": "3.13.1"}}
    nb.cells[1].metadata = {"execution": {"iopub.status.busy": "2026-01-01T00:00:00"}, "tags": ["kept"]}
    nb = notebook.normalise(nb)
    kernel = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
    assert nb.metadata == {"kernelspec": kernel, "language_info": {"name": "python"}}
    assert nb.cells[0].source == "# T" and nb.cells[1].metadata == {"tags": ["kept"]}
    assert nb.cells[1].outputs[0].text == "done\n"
    assert notebook.faults(nb) == []


def widget(**data):
    view = {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}}
    return code("w", outputs=[output("display_data", data=view | data)])


@pytest.mark.parametrize(("data", "left"), [
    ({"text/plain": "VBox(children=())"}, [{"text/plain": "(a widget: run the notebook to use it)"}]),
    ({"text/plain": " 40%|####      | 4/10"}, []),
    ({"text/plain": "w", "image/png": "cG5n"}, [{"text/plain": "w", "image/png": "cG5n"}]),
])
def test_a_widget_leaves_its_image_or_a_note(data, left):
    nb = notebook.normalise(made(widget(**data)))
    assert [kept.data for kept in nb.cells[0].outputs] == left


def test_ids_stay_and_missing_or_double_ones_come_from_the_source(tmp_path):
    nb = json.loads(nbformat.writes(made(words("a"), words("b"), words("c"))))
    nb["cells"][0]["id"] = nb["cells"][1]["id"] = "mine"
    del nb["cells"][2]["id"]
    (tmp_path / "x.ipynb").write_text(json.dumps(nb))
    first, second = (notebook.normalise(notebook.read(tmp_path / "x.ipynb")) for _ in range(2))
    ids = [cell.id for cell in first.cells]
    assert ids[0] == "mine" and len(set(ids)) == 3
    assert ids == [cell.id for cell in second.cells]


@pytest.mark.parametrize(("cell", "fault"), [
    (printing("see /home/someone/x.py:3: UserWarning"), "/home/someone/x.py:3:"),
    (printing(f"{records.ROOT}/kernels/op.py"), f"{records.ROOT}/kernels/op.py"),
    (printing("C:\\Users\\me\\x.py"), "C:\\Users\\me\\x.py"),
    (printing("<function f at 0x7f12ab34cd56>"), "a memory address"),
    (image(), "an image without alt text"),
    (image(alt=" "), "an image without alt text"),
    (image(b"0" * 1_100_000, alt="big"), "1.1 MB"),
    (words("![](x.png)"), "an image without alt text"),
    (code("h", outputs=[output("display_data", data={"text/html": "<img src='x'>"})]), "an image without alt text"),
    (code("1/0", outputs=[output("error", ename="ZeroDivisionError")]), "an error output, ZeroDivisionError"),
])
def test_a_fault_names_its_cell(cell, fault):
    first = cell.source.splitlines()[0]
    found = notebook.faults(made(words("# Title"), cell))
    assert len(found) == 1
    assert found[0].startswith(f"cell 2 ({first!r}): ") and fault in found[0]


@pytest.mark.parametrize("cell", [
    printing("https://example.org/home/page and a/tmp/b, ratio 1/2, bits 0x7fffffff"), image(alt="A bar."),
    words("![A bar.](x.png)"), code(""), words("/home/me is fine in prose")])
def test_what_is_no_fault(cell):
    assert notebook.faults(notebook.normalise(made(cell))) == []


def test_cells_run_out_of_order_are_a_fault():
    nb = made(code("1"), code("2"))
    nb.cells[0].execution_count = 3
    assert notebook.faults(nb) == ["not executed top to bottom in one run"]


# The runner.

CELL = "from kernels.lab.notebook import *\nimport matplotlib.pyplot as plt\nbegin()"
DRAW = "figure, axes = plt.subplots()\nshow(figure, 'An empty frame.')"
WIDGET = "import ipywidgets\nipywidgets.IntSlider()"


def run(action, path, *options):
    return notebook.main([action, str(path), *options])


def test_run_leaves_the_same_file_twice_and_check_accepts_it(written, capsys):
    path = written(nbformat.v4.new_notebook(cells=[words("# T"), code(CELL), code(DRAW), code(WIDGET)]))
    assert run("check", path) == 1
    assert "not executed" in capsys.readouterr().err
    assert run("run", path) == 0
    first = path.read_bytes()
    nb = json.loads(first)
    assert first.endswith(b"}\n") and "widgets" not in nb["metadata"]
    assert [c.get("execution_count") for c in nb["cells"]] == [None, 1, 2, 3]
    assert "".join(nb["cells"][1]["outputs"][0]["text"]).startswith(("LIVE", "INTERPRETER", "RECORDED"))
    assert nb["cells"][2]["outputs"][0]["metadata"]["image/png"]["alt"] == "An empty frame."
    assert nb["cells"][3]["outputs"][0]["data"] == {"text/plain": ["(a widget: run the notebook to use it)"]}
    assert run("run", path) == run("check", path) == run("clean", path) == 0
    assert path.read_bytes() == first
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(("source", "options", "said"), [
    ("x = 1\nx / 0", [], "01_made.ipynb, cell 2 ('x = 1'): ZeroDivisionError: division by zero"),
    ("import time; time.sleep(60)", ["--timeout", "2"], "the notebook took longer than 2 s"),
    ("import os; os._exit(1)", [], "cell 2 ('import os; os._exit(1)'): the kernel died"),
    ("print('/home/me/x')", [], "cell 2 (\"print('/home/me/x')\"): a path of this machine in the output: /home/me/x"),
])
def test_a_failing_notebook_is_not_written(source, options, said, written, capsys):
    path = written(nbformat.v4.new_notebook(cells=[words("# T"), code(source)]))
    before = path.read_bytes()
    assert run("run", path, *options) == 1
    assert said in capsys.readouterr().err
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_clean_mends_what_a_hand_saved_and_check_says_so(written, capsys):
    path = written(made(words("# T"), printing("1\n")))
    text = path.read_text().replace('"metadata": {}', '"metadata": {"collapsed": true}')
    path.write_text(text)
    assert run("check", path) == 1
    assert "not in normal form" in capsys.readouterr().err
    assert run("clean", path) == run("check", path) == 0


@pytest.mark.parametrize("text", ["", "[1]", "{}", '{"nbformat": 3}', "not json"])
def test_an_unreadable_notebook_is_named(text, tmp_path, capsys):
    path = tmp_path / "02_bad.ipynb"
    path.write_text(text)
    assert run("clean", path) == 1
    assert "02_bad.ipynb is not a readable notebook" in capsys.readouterr().err
    assert path.read_text() == text


def test_notebooks_are_found_by_number_name_and_path(written, tmp_path):
    one, two = written(made(words("a"))), written(made(words("b")), "02_next.ipynb")
    written(made(words("c")), "draft.ipynb")
    assert notebook.find(["all"], tmp_path) == [one, two]
    assert notebook.find(["02", "01_made"], tmp_path) == [two, one]
    assert notebook.find([str(one)], tmp_path / "elsewhere") == [one]
    with pytest.raises(notebook.NotebookError, match="no notebook '99'; there are 01_made, 02_next"):
        notebook.find(["99"], tmp_path)


def test_the_command_runs_from_any_folder(written, tmp_path):
    written(made(words("# T"), printing("1\n")))
    command = [sys.executable, "-m", "kernels", "notebooks"]
    cleaned = subprocess.run([*command, "clean", "01_made.ipynb"], cwd=tmp_path, capture_output=True, text=True)
    assert (cleaned.returncode, cleaned.stderr) == (0, "")
    unknown = subprocess.run([*command, "run", "99"], cwd=tmp_path, capture_output=True, text=True)
    assert unknown.returncode == 2 and "no notebook '99'" in unknown.stderr


# The rules that notebooks are held to, shown failing.

OPENING = """# 01 · Add

Previous: [00](00_start_here.ipynb) · [Contents](../README.md#the-notebooks) · next: [02](02_next.ipynb)

**What you will do.** Add. **What you will see.** Sums. **What you will be able to do.** Add.
**What you need.** **Level:** low. 5 minutes of reading, 1 minute on a CPU, 1 minute on an H100."""
CLOSING = """## What you saw

Two is two, on this machine and on every other one. A whole number is added without rounding.

## Exercises

<details>

```python
# solution 01.1
answer = x + 2
```

</details>

## Further reading

Next: [02](02_next.ipynb)"""


@pytest.fixture
def walk(written, tmp_path):
    """A notebook that breaks no rule, its path and the walk it stands in."""
    (tmp_path / "README.md").write_text("## The notebooks\n")
    (tmp_path / "notebooks").mkdir()
    every = [tmp_path / "notebooks" / name for name in ("00_start_here.ipynb", "01_made.ipynb", "02_next.ipynb")]
    for path in every:
        path.touch()
    nb = made(words(OPENING), code("begin = int\nbegin()\nx = 2"), code('check("two", x == 2)'),
              code('answer = ...\ngrade("01.1", answer)'), code('grade("01.2", answer)'), words(CLOSING))
    return nb, every[1], every


def all_faults(nb, path, every):
    return [*rules.opening_faults(nb, path, every), *rules.size_faults(nb), *rules.ending_faults(nb, path, every),
            *rules.link_faults(nb, path)]


def test_a_good_notebook_breaks_no_rule(walk):
    assert all_faults(*walk) == []


@pytest.mark.parametrize(("cell", "old", "new", "fault"), [
    (0, "# 01", "01", "title"),
    (0, "00_start_here", "02_next", "'previous' goes to 02_next.ipynb, not 00_start_here.ipynb"),
    (0, "next: [02](02_next.ipynb)", "", "'next' goes to None"),
    (0, "../README.md#the-notebooks", "../README.md", "'contents'"),
    (0, "What you need", "Needs", "What you need"),
    (0, "on an H100", "", "minutes"),
    (0, "**What you will be able to do.**", "", "What you will be able to do"),
    (0, "**Level:**", "", "Level:"),
    (0, "5 minutes of reading", "", "minutes of reading"),
    (1, "begin()", "pass", "begin()"),
    (1, "x = 2", "x = 2\n\n\nx", "four lines"),
    (2, "check", "print", "checks no claim"),
    (2, "check", "x\n" * 30, "a cell of 31 lines"),
    (2, "check", "x\n" * 20, "words of prose a line"),
    (2, '"two"', '"../data"', "a path that depends"),
    (5, "What you saw", "End", "what you saw"),
    (5, "Next: [02](02_next.ipynb)", "", "does not end with a link to the next"),
    (5, "Further reading", "Further reading\n[gone](09_gone.ipynb)", "09_gone.ipynb, which does not exist"),
    (5, "Further reading", 'Further reading\n<img src="gone.png">', "gone.png, which does not exist"),
])
def test_a_broken_rule_is_found(cell, old, new, fault, walk):
    nb, path, every = walk
    assert old in nb.cells[cell].source
    nb.cells[cell].source = nb.cells[cell].source.replace(old, new, 1)
    assert any(fault in found for found in all_faults(nb, path, every))


def test_long_cells_are_found_by_their_median(walk):
    nb = walk[0]
    for cell in rules.code_cells(nb)[1:]:
        cell.source = "x\n" * 9
    assert any("median cell has 9 lines" in found for found in rules.size_faults(nb))


def test_exercises_are_held_to_stub_solution_and_checker(walk, two_exercises):
    nb, path, _ = walk
    assert list(rules.solution_faults(nb)) == []
    found, = rules.exercise_faults(nb, path)
    assert found == "stubs ['01.1', '01.2'], folded solutions ['01.1'], checkers ['01.1', '01.2']"
    nb.cells[-1].source += "\n<details>\n\n```python\n# solution 01.2\nsquare = len\n```\n\n</details>"
    assert list(rules.exercise_faults(nb, path)) == []
    assert list(rules.solution_faults(nb)) == ["the solution of 01.2 does not pass"]
    nb.cells[4].source = ""
    assert any(found.startswith("1 exercises") for found in rules.exercise_faults(nb, path))


@pytest.mark.parametrize(("stub", "fault"), [
    ("def square(x):\n    ...\n\ngrade('01.2', square)", None),
    ("def square(x, y):\n    ...\n\ngrade('01.2', square)", "defines square(x, y), and asks for square(x)"),
    ("answer = ...\ngrade('01.2', answer)", "grades answer, and asks for square"),
    ("grade('01.2', square)", "does not name square"),
])
def test_a_stub_carries_the_name_that_the_exercise_asks_for(walk, two_exercises, stub, fault):
    nb, _, _ = walk
    nb.cells[4].source = stub
    found = list(rules.stub_faults(nb))
    assert (found == []) if fault is None else any(fault in one for one in found)
    assert list(rules.question_faults(nb)) == ["the question of 01.2 does not say `square(x)`"]
    nb.cells[0].source += " Write `square(x)`."
    assert list(rules.question_faults(nb)) == []
