"""How a command ends: a mistake that its reader can mend gives one line on stderr and status 1, and no traceback.

`python -X dev -m kernels ...` shows the traceback.
"""
from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

MENDABLE = (OSError, ValueError, RuntimeError, MemoryError, ImportError)


def in_one_line(command: Callable[[], int | None]) -> int:
    """Run a command and return its exit status, whatever it raises of MENDABLE or by Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without our signs shows question marks
    try:
        status = command() or 0
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except MENDABLE as error:
        if sys.flags.dev_mode:
            raise
        print(f"error: {told(error)}", file=sys.stderr)
        return 1


def part(text: str) -> tuple[int, int]:
    """1/4 -> (1, 4), the share of one of so many GPUs. Raises argparse.ArgumentTypeError for what is no part."""
    number, _, of = text.partition("/")
    if not (number.isdigit() and of.isdigit() and 1 <= int(number) <= int(of)):
        raise argparse.ArgumentTypeError(f"a part must read like 1/4, got {text!r}")
    return int(number), int(of)


def told(error: BaseException) -> str:
    """What went wrong, in one line; of a longer text the first and the last."""
    if isinstance(error, ImportError) and (other := another_kernels()):
        return (f"another package called kernels is in the way, {other}: uninstall it, or make this suite an "
                "environment of its own")
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] not in ("kernels", "figures"):
        return f"{error.name} is not installed here: pip install -r requirements.txt"
    if isinstance(error, OSError) and error.strerror:
        return ": ".join(map(str, filter(None, (error.filename, error.strerror))))
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ... ".join(dict.fromkeys([*lines[:1], *lines[-1:]])) or type(error).__name__


def another_kernels() -> str:
    """Where another package called `kernels` lies, if Python found that one instead of this suite's; else ''."""
    places = [str(Path(place).resolve()) for place in getattr(sys.modules.get("kernels"), "__path__", [])]
    return "" if str(Path(__file__).resolve().parents[1]) in places else ", ".join(places)
