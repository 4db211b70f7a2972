"""What every test gets: the `gpu` mark, memory that is never zero by luck, and in CI no silent skip.

.ci/run sets SAME_BITS_CI=1, and SAME_BITS_PASSED to a file that gets one number of passed tests a session.
"""
import os

import pytest
import torch
from hypothesis import settings

import kernels  # noqa: F401 - before anything imports Triton, so that the interpreter can be chosen

HAS_GPU = torch.cuda.is_available()
IN_CI = os.environ.get("SAME_BITS_CI") == "1"
if IN_CI:
    settings.load_profile("ci")  # Hypothesis' own: the same examples in every run; a failing one is printed as code


def pytest_collection_modifyitems(items):
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


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan(monkeypatch):
    """torch.empty and its like give NaN, so that an element a kernel forgets to write shows."""
    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, _filled(getattr(torch, name)))
