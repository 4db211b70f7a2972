"""What notebook cells call: begin, check, observe, show and show_source."""
from __future__ import annotations

import base64
import functools
import re

import IPython.display
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from kernels import bits, rms_norm, runtime
from kernels.arithmetic.sums import tree
from kernels.lab import records
from kernels.lab.notebook import cells as notebook
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


@pytest.mark.parametrize("no", [True, False, None])
def test_what_cannot_be_tried_gets_no_tick(no, capsys):
    notebook.check("the kernel has these bits", no, absent="Triton cannot be imported here (why): install it")
    assert capsys.readouterr().out == "○ the kernel has these bits: not here (Triton cannot be imported here)\n"


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


@pytest.mark.parametrize(("count", "ending"), [(1, ", 1 thread"), (2, ", 2 threads")])
def test_a_cpu_is_named_with_its_threads(count, ending, monkeypatch):
    monkeypatch.setattr(runtime, "HAS_GPU", False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: count)
    assert records.device_name().endswith(ending)
    assert records.is_cpu("mine", {"device": records.device_name()})


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


def test_show_texts_marks_the_first_difference_and_says_it_in_words(displayed):
    notebook.show_texts({"alone": "ab<c", "crowd": "abxc", "same": "ab<c", "short": "ab"})
    (data, options), = displayed
    assert options == {"raw": True}
    marked = re.findall(r"<mark style=\"([^\"]*)\">(.*?)</mark>", data["text/html"])
    assert [letter for _, letter in marked] == ["x"] and "ab&lt;c" in data["text/html"]
    assert all(f"{name}:#" in marked[0][0] for name in ("background", "color")) and "underline" in marked[0][0]
    said = "crowd differs from alone first at letter 3. short differs from alone first at letter 3."
    assert said in data["text/html"]
    assert data["text/plain"].splitlines() == ["alone  ab<c", "crowd  abxc", "         ^", "same   ab<c", "short  ab",
                                               "         ^", said]


def test_show_texts_of_one_text_and_of_none(displayed):
    notebook.show_texts({"a": "x", "b": "x"})
    assert "All texts are the same." in displayed[0][0]["text/plain"] and "<mark" not in displayed[0][0]["text/html"]
    with pytest.raises(ValueError, match="texts must hold at least one text"):
        notebook.show_texts({})


def contrast(one: str, other: str) -> float:
    """WCAG 2's contrast of two colours."""
    from matplotlib.colors import to_rgb

    def light(colour):
        parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), parts, strict=True))
    dark, bright = sorted((light(one), light(other)))
    return (bright + 0.05) / (dark + 0.05)


def test_the_mark_is_readable_and_carries_its_own_background(displayed):
    """So the page's colour, dark or light, is nowhere behind the letter."""
    notebook.show_texts({"a": "x", "b": "y"})
    style, = re.findall(r"<mark style=\"([^\"]*)\"", displayed[0][0]["text/html"])
    colours = dict(part.split(":") for part in style.split(";"))
    assert contrast(colours["background"], colours["color"]) >= 7


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
    (documented, "def documented(x):", "tests/lab/notebook/test_notebook_cells.py"),
    (functools.partial(documented, 3), "def documented(x):", "tests/lab/notebook/test_notebook_cells.py"),
    (torch.library.custom_op("same_bits_test::documented", mutates_args=(), schema="(int x) -> int")(documented),
     "def documented(x):", "tests/lab/notebook/test_notebook_cells.py"),
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
