"""What .ci/run holds the tests to: no silent skip, a least number of passes, fixed examples, a leg without Triton."""
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from kernels import runtime

ROOT = Path(__file__).resolve().parents[1]

# Without a GPU, a skip.

SKIPS = """
import pytest
from hypothesis import settings

def test_passes():
    assert settings().derandomize and settings().print_blob

@pytest.mark.gpu
def test_marked():
    assert False

def test_skips():
    pytest.skip("no reason")

@pytest.mark.skipif(True, reason="Triton is broken")
def test_marked_as_a_skip():
    assert False

@pytest.mark.parametrize("nothing", [])
def test_of_no_cases(nothing):
    assert False

@pytest.mark.xfail
def test_fails_as_expected():
    assert False
"""


def outcomes(folder, *arguments, **environment):
    """pytest's outcomes in this folder by test, in a process of its own, and what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_ADDOPTS": "", **environment}
    code = environment.pop("CODE", "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))")
    report = folder / "report.xml"
    command = [sys.executable, "-c", code, "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        what = next((part for part in case if part.tag in ("failure", "error", "skipped")), None)
        found[f"{case.get('classname')}.{case.get('name')}"] = \
            ("passed", "") if what is None else (what.tag, what.get("message"))
    return found, done.stdout + done.stderr


@pytest.mark.skipif(runtime.HAS_GPU, reason="with a GPU, tests for machines without one skip")
def test_in_ci_only_tests_marked_gpu_may_skip(tmp_path):
    for name in ("conftest.py", "quick_interpreter.py"):
        (tmp_path / name).write_bytes((ROOT / "tests" / name).read_bytes())
    (tmp_path / "test_skips.py").write_text(SKIPS)
    (tmp_path / "test_module.py").write_text("import pytest\npytest.importorskip('no_such_module')\n")
    found, said = outcomes(tmp_path, tmp_path, "-n", "2", "-c", ROOT / "pyproject.toml",
                           "--continue-on-collection-errors", SAME_BITS_CI="1",
                           SAME_BITS_PASSED=str(tmp_path / "passed"))
    by_name = {name.rpartition(".")[2].partition("[")[0]: what for name, (what, _) in found.items()}
    assert by_name.pop("test_passes") == "passed" and by_name.pop("test_marked") == "skipped"
    assert len(by_name) == 5 and set(by_name.values()) <= {"failure", "error"}, by_name
    assert "only tests marked gpu may skip in CI: " in said and "Triton is broken" in said
    assert (tmp_path / "passed").read_text() == "1\n"


# .ci/run, with another `make`.

FAKE_MAKE = """#!/bin/sh
echo "make $*; CI=$SAME_BITS_CI browser=$SAME_BITS_REQUIRE_BROWSER"
for name in ARGS MAKEFLAGS PYTEST_ADDOPTS PYTEST_PLUGINS TRITON_INTERPRET; do
    eval "echo $name=[\\${$name-unset}]"
done
for passed in $PASSED; do echo $passed >> "$SAME_BITS_PASSED"; done
echo "==== 1 passed in 1.00s ===="
echo "==== 2 passed in 2.00s ===="
exit ${STATUS-0}
"""


def ci(tmp_path, passed, **environment):
    """`.ci/run` where `make` notes its environment and says that so many tests passed."""
    for name, text in (("make", FAKE_MAKE), ("chromium", "#!/bin/sh\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PASSED": passed, **environment}
    return subprocess.run(["bash", ROOT / ".ci" / "run"], env=environment, capture_output=True, text=True, timeout=60)


def least() -> tuple[int, int]:
    line = next(line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line.startswith("LEAST_TOGETHER="))
    together, alone = (int(word.partition("=")[2]) for word in line.split()[:2])
    return together, alone


def test_ci_is_green_with_enough_passes_and_ends_with_both_closing_lines(tmp_path):
    together, alone = least()
    done = ci(tmp_path, f"{together} {alone}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["==== 1 passed in 1.00s ====", "==== 2 passed in 2.00s ===="]


@pytest.mark.parametrize("passed", ["", "{0}", "{1}", "{few} {1}", "{0} {fewer}", "{0} {1} {1}"])
def test_ci_is_red_with_too_few_passes(passed, tmp_path):
    together, alone = least()
    done = ci(tmp_path, passed.format(together, alone, few=together - 1, fewer=alone - 1))
    assert done.returncode == 1
    assert f"at least {together} and {alone} must" in done.stderr


def test_ci_is_red_where_make_is(tmp_path):
    assert ci(tmp_path, "{} {}".format(*least()), STATUS="2").returncode == 2


def test_the_environment_chooses_no_tests_in_ci(tmp_path):
    done = ci(tmp_path, "1 1", ARGS="-k no_such_test", PYTEST_ADDOPTS="--collect-only", MAKEFLAGS="n",
              PYTEST_PLUGINS="os", TRITON_INTERPRET="0", SAME_BITS_CI="0")
    said = done.stdout.splitlines()
    assert said[0] == "make test ARGS=; CI=1 browser=1"
    assert said[1:6] == [f"{name}=[unset]" for name in
                         ("ARGS", "MAKEFLAGS", "PYTEST_ADDOPTS", "PYTEST_PLUGINS", "TRITON_INTERPRET")]


def test_the_least_number_of_passes_is_no_smaller_than_the_number_of_test_functions():
    """Most have several cases, and those that need a GPU are fewer than the cases."""
    together, alone = least()
    functions = sum(len(re.findall(r"^def test_", f.read_text(), re.M)) for f in (ROOT / "tests").rglob("test_*.py"))
    assert together >= functions > 500 and alone > 0


def test_the_files_that_run_first_are_there_and_the_slowest_tests_are_printed(pytestconfig):
    first = pytestconfig.pluginmanager.get_plugin(str(ROOT / "tests" / "conftest.py")).LONGEST
    assert len(set(first)) == len(first) > 5 and all((ROOT / "tests" / name).is_file() for name in first)
    made = subprocess.run(["make", "--dry-run", "test"], cwd=ROOT, capture_output=True, text=True).stdout
    assert "-n 2 --dist loadfile --no-loadscope-reorder" in made and "--durations=20" in pytestconfig.getini("addopts")


# Without Triton.

HIDDEN = "import sys; sys.modules['triton'] = None; import pytest; sys.exit(pytest.main(sys.argv[1:]))"
WITHOUT_TRITON = ("tests/test_bits.py", "tests/arithmetic/test_sums.py", "tests/ops/test_rms_norm.py")


@pytest.mark.skipif(not runtime.HAS_TRITON, reason="without Triton every test is such a leg")
def test_without_triton_the_specifications_pass_and_only_kernels_are_skipped(tmp_path):
    quiet = {name: "" for name in ("SAME_BITS_CI", "SAME_BITS_PASSED")}
    found, said = outcomes(tmp_path, *WITHOUT_TRITON, CODE=HIDDEN, **quiet)
    whats = [what for what, _ in found.values()]
    assert whats.count("passed") >= 170 and not {"failure", "error"} & set(whats), said[-3000:]
    reasons = {why for what, why in found.values() if what == "skipped"}
    assert {why.split("(")[0].strip() for why in reasons} <= {"needs a CUDA GPU", "Triton cannot be imported here"}
