"""`source`: which code decided a recorded row. What decides nothing changes nothing; what decides anything does."""
import pytest

from kernels import OPS
from kernels.lab import provenance
from kernels.lab.closure import of_functions
from kernels.lab.provenance import ROOT, deciding, of_op, of_row, source
from kernels.op import DTYPES

CODE = '"""What it does."""\nimport math\n\n\ndef f(x):\n    """Half."""\n    return x / 2  # one rounding\n'


def hashed(tmp_path, text, name="a.py") -> str:
    path = tmp_path / name
    path.write_text(text)
    source.cache_clear()
    return source(str(path))


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    return tmp_path


@pytest.mark.parametrize("other", [
    CODE.replace("one rounding", "rounds"), CODE.replace("Half.", "Half of x."),
    CODE.replace("import math", "import sys"), CODE.replace("import math", "from math import pi, tau"),
    CODE.replace("What it does.", "?"), CODE.replace("x / 2", "(x\n            / 2)")])
def test_comments_imports_docstrings_and_layout_do_not_change_it(project, other):
    assert hashed(project, CODE) == hashed(project, other)


@pytest.mark.parametrize("other", [
    CODE.replace("/ 2", "/ 4"), CODE.replace("/ 2", "* 2"), CODE.replace("x / 2", "2 / x"), CODE + "\n\ng = None\n",
    CODE.replace("f(x)", "f(x, y=None)"), CODE.replace("def f", "@g\ndef f"), CODE.replace("/ 2", "/ 2.0")])
def test_any_change_of_the_code_changes_it(project, other):
    assert hashed(project, CODE) != hashed(project, other)


def test_a_file_that_moves_keeps_it(project):
    assert hashed(project, CODE) == hashed(project, CODE, "b.py")


def test_files_imported_count_also_from_inside_a_function(project):
    room = project / "kernels"
    room.mkdir()
    (room / "__init__.py").write_text("")
    (room / "a.py").write_text("from . import b\n\n\ndef f():\n    from .c import g\n    return g(b)\n")
    (room / "b.py").write_text("x = 1\n")
    (room / "c.py").write_text("import kernels.b\ng = print\n")
    assert {p.name for p in deciding(str(room / "a.py"))} == {"a.py", "b.py", "c.py"}


def names(op) -> set[str]:
    import inspect
    return {p.relative_to(ROOT).as_posix() for p in deciding(inspect.getfile(inspect.unwrap(OPS[op].python)))}


@pytest.mark.parametrize("op", OPS)
def test_no_row_of_an_op_depends_on_the_lab(op):
    assert not [name for name in names(op) if "/lab/" in name]
    assert {"kernels/bits.py", "kernels/op.py", "kernels/launch.py", "kernels/runtime.py"} <= names(op)


def test_an_op_depends_on_its_own_arithmetic_alone():
    assert any("sums" in name for name in names("rms_norm"))
    assert not any("tensor_core" in name or "softmax" in name for name in names("rms_norm"))
    assert any("hopper" in name for name in names("matmul"))  # imported when a schedule wants it


def test_each_op_has_a_source_of_12_digits_of_its_own():
    found = {name: of_op(op) for name, op in OPS.items()}
    assert all(len(s) == 12 and int(s, 16) >= 0 for s in found.values())
    assert len({found[name] for name in ("rms_norm", "softmax", "mean", "matmul")}) == 4


def test_what_is_said_to_be_the_same_code_is_of_this_project(tmp_path, monkeypatch):
    table = tmp_path / "same_code.csv"
    table.write_text("source,now,op,commit,compared\naaaaaaaaaaaa,bbbbbbbbbbbb,mean,1234567,PTX\n")
    monkeypatch.setattr(provenance, "SAME_CODE", table)
    provenance.known_as.cache_clear()
    assert provenance.known_as("bbbbbbbbbbbb") == {"aaaaaaaaaaaa", "bbbbbbbbbbbb"}
    assert provenance.known_as("cccccccccccc") == {"cccccccccccc"}
    provenance.known_as.cache_clear()


def test_the_order_in_which_files_are_found_says_nothing(project, monkeypatch):
    files = [project / name for name in ("a.py", "b.py", "c.py")]
    for i, path in enumerate(files):
        path.write_text(f"x = {i}\n")
    found = []
    for order in (files, files[::-1]):
        monkeypatch.setattr(provenance, "deciding", lambda *_, order=order: order)
        source.cache_clear()
        found.append(source("a.py"))
    assert found[0] == found[1]


def test_only_a_schedules_calls_count_by_all_files():
    op = OPS["rms_norm"]
    at = ("float32", "D=64", 4)
    named = op.schedule(4, "D=64", DTYPES["float32"])
    for name in ("cuda", "python", "split"):
        assert of_row(op, name, *at, "call") == of_row(op, name, *at, "graph") == of_functions(op.implementation(name))
    assert of_row(op, "triton", *at, "call", named) == of_op(op) != of_row(op, "triton", *at, "graph", named)
