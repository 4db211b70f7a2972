"""Plant known faults one at a time, and list those that no test notices.

    python -m tests.mutants                    all of faults.tsv: about an hour
    python -m tests.mutants --only softmax     those whose file, text or tests contain this
    python -m tests.mutants --list             say them and plant none

The tests of a fault first run without it, where they must pass. Exit status 1: a fault went unseen. 2: a fault could
not be planted, or its tests say nothing.
"""
from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

from .faults import ROOT, Fault, copied, listed, planted

PASSED, FAILED, BROKEN, OUT_OF_TIME = 0, 1, 2, -1  # pytest's exit statuses, and ours


def run(tests: str, tree: Path, limit_s: float) -> tuple[int, str]:
    """pytest's exit status for these tests in this tree, OUT_OF_TIME after `limit_s`, and what it printed last."""
    environment = {name: value for name, value in os.environ.items()
                   if name not in ("PYTEST_ADDOPTS", "SAME_BITS_PASSED", "TRITON_INTERPRET")}
    # no .pyc files: one of a fault planted in the same second would serve the next
    environment |= {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "SAME_BITS_CI": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *shlex.split(tests)]
    process = subprocess.Popen(command, cwd=tree, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True, start_new_session=True)
    try:
        said, _ = process.communicate(timeout=limit_s)
        return process.returncode, said[-2000:]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with the processes that it started
        process.communicate()
        return OUT_OF_TIME, f"longer than {limit_s:g} s"


def look_at(faults: list[Fault], tree: Path, limit_s: float) -> tuple[list[Fault], list[str]]:
    """The faults that went unseen, and what is wrong with others; a line is printed for each."""
    sound = cache(lambda tests: run(tests, tree, limit_s))
    unseen, wrong = [], []
    for number, fault in enumerate(faults, 1):
        start = time.monotonic()
        verdict, why = _verdict(fault, tree, limit_s, sound)
        unseen += [fault] if verdict == "UNSEEN" else []
        wrong += [f"{fault}: {why}"] if verdict == "ERROR" else []
        print(f"{number}/{len(faults)} {verdict} {time.monotonic() - start:.0f} s  {fault}", flush=True)
    return unseen, wrong


def _verdict(fault, tree, limit_s, sound) -> tuple[str, str]:
    status, said = sound(fault.tests)
    if status != PASSED:
        return "ERROR", f"without the fault these tests do not pass: {fault.tests}\n{said}"
    try:
        with planted(fault, tree):
            status, said = run(fault.tests, tree, limit_s)
    except (OSError, ValueError) as error:
        return "ERROR", str(error)
    if status == PASSED:
        return "UNSEEN", said
    if status in (FAILED, BROKEN, OUT_OF_TIME):  # BROKEN: the tests cannot be collected
        return "seen", said
    return "ERROR", said


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="say the faults and plant none")
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="faults whose line contains this")
    parser.add_argument("--limit", type=float, default=300, metavar="SECONDS", help="of one run (default: 300)")
    a = parser.parse_args(argv)
    faults = [fault for fault in listed() if a.only in "\t".join(fault)]
    if a.list:
        print(*faults, sep="\n")
        return 0
    if not faults:
        parser.error(f"no fault contains {a.only!r}")
    with tempfile.TemporaryDirectory() as folder:
        unseen, wrong = look_at(faults, copied(Path(folder), ROOT), a.limit)
    print(f"\n{len(faults) - len(unseen) - len(wrong)} of {len(faults)} faults seen")
    print(*(f"unseen: {fault}\n        by {fault.tests}" for fault in unseen), sep="\n", end="\n" if unseen else "")
    print(*(f"error: {line}" for line in wrong), sep="\n", end="\n" if wrong else "")
    return 2 if wrong else 1 if unseen else 0


if __name__ == "__main__":
    sys.exit(main())
