"""What every test gets: the `gpu` mark, memory that is never zero by luck, and in CI no silent skip.

.ci/run sets SAME_BITS_CI=1, and SAME_BITS_PASSED to a file that gets one number of passed tests a session.
"""
import os
import sys

import pytest
import torch
from hypothesis import settings

from kernels import runtime  # before anything imports Triton, so that the interpreter can be chosen

sys.modules.setdefault("rfc3987_syntax", None)  # jsonschema makes 39 grammars with it, for what no notebook has

HAS_GPU = torch.cuda.is_available()
IN_CI = os.environ.get("SAME_BITS_CI") == "1"
if IN_CI:
    settings.load_profile("ci")  # Hypothesis' own: the same examples in every run; a failing one is printed as code
if runtime.where() == "INTERPRETER":
    import quick_interpreter

    quick_interpreter.hurry()


# What takes longest runs first, so that no worker waits at the end. The third file waits for the worker of the first:
# what itself uses all cores, as a browser does, does not run beside the notebooks, which have two minutes each.
LONGEST = ("lab/notebook/test_notebooks.py", "ops/test_every_op.py", "ops/test_op.py", "figures/test_sizes.py",
           "figures/test_figures.py", "test_readme.py", "test_frame.py", "lab/proofs/test_generated_code.py",
           "test_lab_in_browser.py", "lab/site/test_site_pages.py", "ops/attention/test_code.py",
           "ops/matmul/test_matmul.py", "ops/matmul/test_shared.py", "ops/test_softmax.py", "ops/matmul/test_tuning.py")
ONE_SITE = "tests/lab/site/"  # built once for the tests of this folder


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """--dist loadfile, by which the files that share a site run on one worker."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class BySite(LoadFileScheduling):
        def _split_scope(self, nodeid):
            return ONE_SITE if nodeid.startswith(ONE_SITE) else super()._split_scope(nodeid)

    return BySite(config, log)


def pytest_ignore_collect(collection_path, config):
    """Collecting takes half a minute: tests that run alone are looked for where the word stands."""
    alone = config.option.markexpr == "serial" and collection_path.name.startswith("test_")
    return (alone and collection_path.is_file() and "serial" not in collection_path.read_text(encoding="utf-8")) or None


def pytest_collection_modifyitems(items):
    place = {f"tests/{name}": i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.nodeid.partition("::")[0], len(place)))
    if not HAS_GPU:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


def _no_skip(report):
    """The report, a failure in CI where it was a skip: without a GPU only tests marked `gpu` may skip there."""
    if IN_CI and not HAS_GPU and report.skipped:
        why = report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome, report.longrepr = "failed", f"only tests marked gpu may skip in CI: {why}"
        vars(report).pop("wasxfail", None)  # a failure that is expected would count as no failure
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(item):
    report = yield
    return report if item.get_closest_marker("gpu") else _no_skip(report)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report():
    return _no_skip((yield))


def pytest_terminal_summary(terminalreporter):
    """Once a session: a worker of pytest-xdist leaves it to the process that sums up."""
    if (path := os.environ.get("SAME_BITS_PASSED")) and not hasattr(terminalreporter.config, "workerinput"):
        with open(path, "a") as file:
            file.write(f"{len(terminalreporter.stats.get('passed', []))}\n")


def _filled(make):
    """`make`, its memory filled with NaN or the largest integer: a fill runs on no path that is tested."""
    def filled(*args, **kwargs):
        tensor = make(*args, **kwargs)
        with torch.no_grad():
            if tensor.is_floating_point() or tensor.is_complex():
                return tensor.fill_(float("nan"))
            return tensor.fill_(True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max)
    return filled


@pytest.fixture(scope="session")
def processes():
    """Eight processes of this CPU as ranks, started once."""
    from kernels.lab.parallel.processes import Processes

    with Processes(8) as eight:
        yield eight


# `with device:` keeps these functions when it is first used, and a test's torch.empty must not be among them
with torch.device("cpu"):
    torch.empty(0, dtype=torch.float32)


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan(monkeypatch):
    """torch.empty and its like give NaN, so that an element a kernel forgets to write shows."""
    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, _filled(getattr(torch, name)))
