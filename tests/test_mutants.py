"""The list of faults that `make mutants` plants is sound, and the tool tells which of them no test notices."""
import ast
import shlex

import pytest
from mutants import __main__ as mutants
from mutants.faults import ROOT, Fault, copied, listed, planted

FAULTS = listed()
AREAS = ("bits", "op", "call", "launch", "runtime", "tables", "arithmetic", "ops/rms_norm", "ops/softmax", "ops/mean",
         "ops/matmul", "ops/swiglu", "ops/rotary", "model", "lab/bench", "lab/records", "lab/table", "lab/provenance",
         "lab/sweep", "lab/window", "lab/atlas", "lab/orders", "lab/adder", "lab/proofs", "lab/tuning")


@pytest.mark.parametrize("fault", FAULTS, ids=[f"{f.file}: {f.old.strip()[:40]}" for f in FAULTS])
def test_a_fault_can_be_planted_and_its_tests_are_there(fault):
    before = (ROOT / fault.file).read_text(encoding="utf-8")
    after = fault.planted_in(before)
    assert after != before
    if fault.file.endswith(".py"):  # code that does something else, and no syntax error
        assert ast.dump(ast.parse(after)) != ast.dump(ast.parse(before))
    files = [word.partition("::")[0] for word in shlex.split(fault.tests) if word.startswith("tests/")]
    assert files and all((ROOT / file).exists() for file in files)


def test_every_area_has_faults():
    assert len(FAULTS) >= 60 and len(set(FAULTS)) == len(FAULTS)
    files = {fault.file for fault in FAULTS}
    assert [area for area in AREAS if not any(f.startswith(f"kernels/{area}") for f in files)] == []
    assert {"README.md", "data/h200/token_sweep.csv"} <= files and any(f.startswith("figures/") for f in files)


@pytest.mark.parametrize("old, count", [("absent", 0), ("a", 2)])
def test_text_that_is_not_there_once_is_refused(old, count):
    with pytest.raises(ValueError, match=f"code.py: found {count} times instead of once: {old}"):
        Fault("code.py", old, "b", "tests").planted_in("a = a\n")


CODE = "def larger(a, b):\n    return a if a > b else b\n"
TESTS = """
import sys, time
from code_under_test import larger

def test_larger():
    assert larger(1, 2) == 2

def test_nothing():
    assert larger(2, 2) == 2

def test_waits():
    time.sleep(300 if larger(1, 2) == 1 else 0)
"""
SMALLER = Fault("code_under_test.py", "a > b", "a < b", "tests/test_it.py -k larger")


@pytest.fixture
def tree(tmp_path):
    """A copy of a small tree with one function and its tests."""
    (tmp_path / "source" / "tests").mkdir(parents=True)
    (tmp_path / "source" / "code_under_test.py").write_text(CODE)
    (tmp_path / "source" / "tests" / "test_it.py").write_text(TESTS)
    (tmp_path / "source" / ".git").mkdir()
    return copied(tmp_path, tmp_path / "source")


def test_a_fault_stands_only_while_it_is_planted(tree):
    assert not (tree / ".git").exists()
    with planted(SMALLER, tree):
        assert (tree / "code_under_test.py").read_text() == CODE.replace(">", "<")
    assert (tree / "code_under_test.py").read_text() == CODE


def test_faults_that_no_test_notices_are_told(tree, capsys):
    faults = [SMALLER, SMALLER._replace(tests="tests/test_it.py -k nothing"), SMALLER._replace(old="no such text"),
              SMALLER._replace(tests="tests/test_it.py -k no_such_test")]
    unseen, wrong = mutants.look_at(faults, tree, limit_s=300)
    assert unseen == [faults[1]]
    assert len(wrong) == 2 and "found 0 times" in wrong[0] and "do not pass" in wrong[1]
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == ["seen", "UNSEEN", "ERROR", "ERROR"]


def test_a_run_that_hangs_is_ended(tree):
    with planted(SMALLER, tree):
        assert mutants.run("tests/test_it.py -k waits", tree, limit_s=2) == (mutants.OUT_OF_TIME, "longer than 2 s")


@pytest.mark.parametrize("unseen, wrong, status", [([], [], 0), ([SMALLER], [], 1), ([SMALLER], ["it"], 2)])
def test_the_exit_status_says_whether_all_were_seen(unseen, wrong, status, monkeypatch, capsys):
    monkeypatch.setattr(mutants, "copied", lambda folder, root: folder)
    monkeypatch.setattr(mutants, "look_at", lambda faults, tree, limit_s: (unseen, wrong))
    assert mutants.main(["--only", "kernels/bits.py"]) == status
    said = capsys.readouterr().out
    assert ("unseen: code_under_test.py: a > b  ->  a < b" in said) == bool(unseen)
    assert ("error: it" in said) == bool(wrong)


def test_only_chooses_and_list_plants_nothing(monkeypatch, capsys):
    monkeypatch.delattr(mutants, "look_at")
    assert mutants.main(["--list", "--only", "kernels/ops/softmax/"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert 3 <= len(lines) < len(FAULTS) and all(line.startswith("kernels/ops/softmax/") for line in lines)
    with pytest.raises(SystemExit):
        mutants.main(["--only", "no such fault"])
