"""What notebook cells call, the runner that executes and normalises notebooks, exercises, and the rules' own tests."""
from __future__ import annotations

import base64
import functools
import json
import subprocess
import sys

import IPython.display
import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
import test_notebooks as rules
import torch
from nbformat.v4 import new_code_cell as code
from nbformat.v4 import new_markdown_cell as words
from nbformat.v4 import new_output as output

from kernels import bits, rms_norm, runtime
from kernels.arithmetic.sums import tree
from kernels.lab import records
from kernels.lab.notebook import exercises
from kernels.lab.notebook import run as notebook
from kernels.runtime import triton

# begin, check, observe


@pytest.fixture
def an_h200_recorded(monkeypatch, tmp_path):
    (tmp_path / "h200").mkdir()
    (tmp_path / "h200" / "machine.json").write_text('{"device": "NVIDIA H200"}')
    monkeypatch.setattr(records, "DATA", tmp_path)
    monkeypatch.setattr(records, "machines", lambda: ["h200"])


@pytest.mark.parametrize(("where", "line"), [
    ("LIVE", "LIVE NVIDIA H100"),
    ("INTERPRETER", "INTERPRETER on CPU + recorded H200"),
    ("RECORDED", "RECORDED H200 (no wheels)"),
])
def test_begin_says_in_one_line_where_it_runs(where, line, monkeypatch, capsys, an_h200_recorded):
    monkeypatch.setattr(runtime, "where", lambda: where)
    monkeypatch.setattr(runtime, "WHY_NOT", "no wheels")
    monkeypatch.setattr(records, "device_name", lambda: "NVIDIA H100")
    notebook.begin()
    assert capsys.readouterr().out == line + "\n"


def test_begin_without_any_record(monkeypatch, capsys):
    monkeypatch.setattr(records, "machines", list)
    monkeypatch.setattr(runtime, "where", lambda: "INTERPRETER")
    notebook.begin()
    assert capsys.readouterr().out == "INTERPRETER on CPU\n"


def test_begin_seeds_torch_and_sets_the_theme():
    draws = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        plt.rcParams["svg.hashsalt"] = None
        notebook.begin()
        draws.append(torch.rand(8))
    assert torch.equal(*draws)
    assert plt.rcParams["svg.hashsalt"] == "same-bits"


def test_begin_themes_the_page_in_a_notebook_alone(monkeypatch, displayed):
    notebook.begin()
    assert displayed == []
    monkeypatch.setattr(IPython, "get_ipython", object)
    notebook.begin()
    (data, options), = displayed
    assert "white-space: pre;" in data["text/html"] and "overflow-x: auto" in data["text/html"]
    assert "details { margin-bottom" in data["text/html"] and options == {"raw": True}


@pytest.mark.parametrize("yes", [True, np.bool_(True), torch.tensor(True), np.float32(1) == 1])
def test_check_ticks_what_holds(yes, capsys):
    notebook.check("one is one", yes)
    assert capsys.readouterr().out == "✓ one is one\n"


@pytest.mark.parametrize("no", [False, np.bool_(False), torch.tensor(False)])
def test_check_raises_on_what_does_not_hold(no, capsys):
    with pytest.raises(AssertionError, match="one is two"):
        notebook.check("one is two", no)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("neither", [None, 1, "yes", torch.ones(2) == 1, np.ones(2) == 1, torch.tensor(1.0)])
def test_check_wants_one_yes_or_no(neither):
    with pytest.raises(TypeError, match="one yes or no"):
        notebook.check("all ones", neither)


def test_check_of_a_report_says_what_it_compared_or_what_differs(capsys):
    x = bits.portable(8, 4)
    notebook.check("rows stay", bits.check_invariance(lambda x: x + 1, (x,)))
    assert "✓ rows stay: same bits in" in capsys.readouterr().out
    with pytest.raises(AssertionError, match=r"✗ rows stay: bits moved.*first at.*row"):
        notebook.check("rows stay", bits.check_invariance(lambda x: x + len(x), (x,)))


@pytest.mark.parametrize(("value", "text"), [(True, "yes"), (0.123456, "0.123"), (7, "7"), (torch.tensor(2.5), "2.5"),
                                             (np.bool_(False), "no"), ("four", "four")])
def test_observe_prints_a_value(value, text, capsys, monkeypatch):
    monkeypatch.setattr(runtime, "HAS_GPU", False)
    notebook.observe("how many", value)
    assert capsys.readouterr().out == f"• how many: {text} on this CPU\n"


def test_observe_names_the_cpu_for_what_it_did_beside_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(runtime, "HAS_GPU", True)
    monkeypatch.setattr(records, "device_name", lambda: "NVIDIA H200")
    notebook.observe("how many", 3)
    notebook.observe("how many", 3, cpu=True)
    assert capsys.readouterr().out == "• how many: 3 on NVIDIA H200\n• how many: 3 on this CPU\n"


@pytest.mark.parametrize("recorded", [False, {"H200": False}])
def test_observe_prints_the_recorded_value_beside_it(recorded, capsys, monkeypatch, an_h200_recorded):
    monkeypatch.setattr(runtime, "HAS_GPU", False)
    notebook.observe("bits moved", True, recorded)
    assert capsys.readouterr().out == "• bits moved: yes on this CPU; no on H200\n"


# show, show_source

@pytest.fixture
def displayed(monkeypatch):
    calls = []
    monkeypatch.setattr(IPython.display, "display", lambda data, **options: calls.append((data, options)))
    return calls


def test_show_displays_one_png_with_its_words_and_closes_the_figure(displayed):
    figure, axes = plt.subplots(figsize=(4, 3), dpi=100)
    axes.plot([1, 2])
    notebook.show(figure, "A line\n  that <rises>.")
    images = [(data, options["metadata"]) for data, options in displayed if "image/png" in data]
    assert len(images) == 1
    data, metadata = images[0]
    assert base64.b64decode(data["image/png"]).startswith(b"\x89PNG\r\n")
    assert metadata == {"image/png": {"alt": "A line that <rises>.", "width": 400}}
    assert "A line that &lt;rises&gt;." in displayed[-1][0]["text/html"]
    assert not plt.fignum_exists(figure.number)


@pytest.mark.parametrize("alt", ["", "  \n", None, 3])
def test_show_wants_words(alt, displayed):
    with pytest.raises(ValueError, match="alt must say"):
        notebook.show(plt.figure(), alt)
    assert displayed == []
    plt.close("all")


def documented(x):
    """Its docstring."""
    return x + 1  # a comment


@pytest.mark.parametrize(("thing", "line", "file"), [
    (rms_norm.python, "def _python(x, weight", "kernels/ops/rms_norm.py"),
    (tree, "def tree(x):", "kernels/arithmetic/sums.py"),
    (documented, "def documented(x):", "tests/lab/notebook/test_notebook_tools.py"),
    (functools.partial(documented, 3), "def documented(x):", "tests/lab/notebook/test_notebook_tools.py"),
    (torch.library.custom_op("same_bits_test::documented", mutates_args=(), schema="(int x) -> int")(documented),
     "def documented(x):", "tests/lab/notebook/test_notebook_tools.py"),
])
def test_show_source_of(thing, line, file, displayed):
    notebook.show_source(thing)
    (data, options), = displayed
    assert line in data["text/plain"] and options["raw"]
    assert data["text/markdown"] == f"*{file}*\n\n```python\n{data['text/plain']}\n```"


@pytest.mark.skipif(not runtime.HAS_TRITON, reason="there is no Triton here")
def test_show_source_of_a_kernel_to_be_compiled(displayed):
    notebook.show_source(triton.runtime.jit.JITFunction(documented))
    assert "def documented(x):" in displayed[0][0]["text/plain"]


def test_show_source_of_a_stand_in_kernel(displayed):
    notebook.show_source(runtime._StandIn("no Triton").jit(documented))
    assert "def documented(x):" in displayed[0][0]["text/plain"]


def test_show_source_without_docstring(displayed):
    notebook.show_source(documented, without_docstring=True)
    assert displayed[0][0]["text/plain"] == "def documented(x):\n    return x + 1  # a comment"


def test_show_source_wants_a_function():
    with pytest.raises(TypeError, match="needs a function or a kernel, got int"):
        notebook.show_source(3)


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


# Exercises.

@pytest.fixture
def two_exercises(monkeypatch):
    monkeypatch.setattr(exercises, "CHECKERS", {})

    @exercises.exercise("01.1")
    def _(answer):
        assert answer == 4, "two and two"

    @exercises.exercise("01.2")
    def _(answer):
        if answer(2) != 4:
            raise AssertionError


@pytest.mark.parametrize(("name", "answer", "passed", "said"), [
    ("01.1", ..., None, "not answered yet"),
    ("01.1", 4, True, "✓ Exercise 01.1"),
    ("01.1", 5, False, "✗ Exercise 01.1: two and two"),
    ("01.1", torch.ones(2), False, "your answer raised RuntimeError"),
    ("01.2", lambda x: x * x, True, "✓ Exercise 01.2"),
    ("01.2", lambda x: x, False, "look again"),
    ("01.2", lambda x: ..., None, "not answered yet"),
    ("01.2", lambda x: None, None, "not answered yet"),
    ("01.2", lambda x: 1 / 0, False, "your answer raised ZeroDivisionError"),
    ("01.2", 3, False, "your answer raised TypeError"),
])
def test_grade_prints_and_passes_tells(name, answer, passed, said, two_exercises, capsys):
    assert exercises.grade(name, answer) is None
    assert said in capsys.readouterr().out
    assert exercises.passes(name, answer) is passed


def test_a_stub_function_is_not_answered(two_exercises, capsys):
    def answer(x):
        """Square x."""
    exercises.grade("01.2", answer)
    assert "not answered yet" in capsys.readouterr().out


def test_an_unknown_exercise(two_exercises, capsys):
    exercises.grade("09.9", 1)
    assert capsys.readouterr().out == "There is no exercise 09.9; there are 01.1, 01.2.\n"
    with pytest.raises(KeyError, match="no exercise 09.9"):
        exercises.passes("09.9", 1)
    with pytest.raises(ValueError, match="two exercises 01.1"):
        exercises.exercise("01.1")(len)


@pytest.mark.parametrize(("name", "wrong", "hint"), [
    ("00.1", 24, "number of orders"), ("00.1", 2.0, "whole number"), ("00.1", 7, "1e8"),
    ("00.2", lambda x: x, "go on until one is left"), ("00.2", lambda x: x[0], "not the sum"),
    ("00.2", lambda x: x.view(2, -1).sum(0).flip(0).cumsum(0)[-1] if len(x) > 1 else x[0], "which are neighbours"),
    ("03.1", (16, 23), "close"), ("03.1", (0, 8), "eight"), ("03.1", (24, 31), "draw the tree"),
    ("03.2", 134.2, "two bytes"), ("03.2", 33.55, "two rows are read"), ("03.2", 0.067, "in microseconds"),
    ("03.3", lambda row: row * row, "one sum a row"), ("03.3", lambda row: row.sum(), "not the sum of squares"),
    ("03.3", lambda row: rms_norm_order(row), "our order's bits"),
])
def test_a_wrong_answer_gets_its_hint(name, wrong, hint, capsys):
    exercises.grade(name, wrong)
    assert hint in capsys.readouterr().out


def rms_norm_order(row):
    from kernels.arithmetic.sums import ordered_sum
    return ordered_sum(row * row)


# The rules that notebooks are held to, shown failing.

OPENING = """# 01 · Add

Previous: [00](00_start_here.ipynb) · [Contents](../README.md#the-notebooks) · next: [02](02_next.ipynb)

**What you will do.** Add. **What you will see.** Sums. **What you need.** 1 minute on a CPU, 1 minute on an H100."""
CLOSING = """## What you saw

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
    (tmp_path / "README.md").touch()
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
    nb.cells[-1].source += "\n<details>\n\n```python\n# solution 01.2\nanswer = len\n```\n\n</details>"
    assert list(rules.exercise_faults(nb, path)) == []
    assert list(rules.solution_faults(nb)) == ["the solution of 01.2 does not pass"]
    nb.cells[4].source = ""
    assert any(found.startswith("1 exercises") for found in rules.exercise_faults(nb, path))
