"""Recorded measurements: tidy CSV tables and machine.json under data/<machine>/.

Rows are replaced by key, a file is written whole or not at all, only one writer works on it at a time, and a folder
belongs to one kind of machine: nothing here mixes rows silently.
"""
from __future__ import annotations

import datetime
import itertools
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import torch

from .. import runtime
from .table import Table, made, turn, write_atomic

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "data"

TOKEN_SWEEP = Table(
    "token_sweep.csv",
    ("op", "implementation", "dtype", "shape", "tokens", "clock", "us_p05", "us_p20", "us_p50", "us_p80", "us_p95",
     "repeats", "gbytes_per_s", "tflops", "same_bits", "elements_differ", "digest", "schedule", "recorded_at",
     "source"),
    ("op", "implementation", "dtype", "shape", "tokens", "clock"),
)


def now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def device_name() -> str:
    if runtime.HAS_GPU:
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return f"{cpu_model()}, {threads} thread{'s' * (threads != 1)}"


def slug() -> str:
    """This kind of machine as a folder under data/: h200, h100, cpu-avx512 and so on."""
    if runtime.HAS_GPU:
        return runtime.slug(torch.cuda.current_device())
    return "cpu-" + torch.backends.cpu.get_cpu_capability().lower().replace("_", "")


def cpu_model() -> str:
    """The processor's name, as the system reports it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        return re.search(r"model name\s*:\s*(.+)", text)[1].strip()
    except (OSError, TypeError):
        return platform.processor() or platform.machine()


def _driver() -> str | None:
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def this_machine() -> dict:
    """What decides this machine's times and bits, as in machine.json but for the measured ceilings."""
    return {
        "device": device_name(),
        "driver": _driver() if runtime.HAS_GPU else None,
        "torch": torch.__version__,
        "triton": getattr(runtime.triton, "__version__", None) if runtime.HAS_TRITON else None,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "host_cpu": cpu_model(),
    }


def open_machine(out=DATA, name: str | None = None) -> Path:
    """The folder to record into: this machine's own, or the next free h200-2, h200-3 if another machine has the name.

    Raises ValueError if `name` is no folder's name, or that folder holds measurements of another machine.
    """
    if name and not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError(f"--machine must be a plain name such as h200 or my-laptop, got {name!r}")
    base = name or _kind(out)
    for candidate in [base] if name else itertools.chain([base], (f"{base}-{i}" for i in itertools.count(2))):
        folder = Path(out) / candidate
        other = _other_machine(read_machine(folder))
        if not other:
            return made(folder)
    raise ValueError(f"{folder} was recorded elsewhere ({other}). Give this machine another name with --machine")


def _kind(out) -> str:
    """`slug`; with the processor's name in it for a CPU of another make than the one whose folder has that name."""
    there = None if runtime.HAS_GPU else read_machine(Path(out) / slug()).get("host_cpu")
    if there in (None, cpu_model()):
        return slug()
    make = re.sub(r"\((r|tm)\)|@.*|\b(\d+-core|cpu|processor)\b", " ", cpu_model().lower())
    return "-".join([*re.findall(r"[a-z0-9]+", f"cpu {make}"), slug().removeprefix("cpu-")])


def _other_machine(recorded: dict) -> str:
    """In what the recorded machine differs from this one, or ''."""
    here = this_machine()
    return "; ".join(f"{k} was {recorded[k]}, here {here[k]}" for k in ("device", "torch", "triton")
                     if k in recorded and recorded[k] != here[k])


def read_machine(folder) -> dict:
    """machine.json of one folder, {} if there is none. Raises ValueError that says what is wrong with it."""
    path = Path(folder) / "machine.json"
    if not path.exists():
        return {}
    try:
        machine = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not readable JSON: {error}") from None
    for fault in _machine_faults(machine):
        raise ValueError(f"{path} is not a machine.json of this suite: {fault}")
    return machine


def _machine_faults(machine) -> Iterator[str]:
    if not isinstance(machine, dict):
        yield f"it must hold fields in {{}}, got {json.dumps(machine)[:40]}"
        return
    for name, value in machine.items():
        if name in ("copy_gbytes_per_s", "matmul_tflops") and not _is_rate(value):
            yield f"{name} must be a number above 0, got {value!r}"
        if name in ("device", "torch", "host_cpu", "verify_cost_model") and not isinstance(value, str):
            yield f"{name} must be a text, got {value!r}"
    commands = machine.get("command", {})
    if not isinstance(commands, dict):
        yield f"command must give each file its list of commands, got {commands!r}"
    for file, lines in commands.items() if isinstance(commands, dict) else ():
        if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
            yield f"command must give {file} a list of commands, got {lines!r}"


def _is_rate(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def is_cpu(name: str, machine: dict) -> bool:
    """Whether the machine in this folder, with this machine.json, is a CPU alone."""
    threads = machine.get("device", "").endswith((" thread", " threads"))
    return threads or "device" not in machine and name.startswith("cpu")


def note_machine(folder, file: str, **ceilings) -> dict:
    """Write machine.json: this machine, its measured ceilings, and the command that recorded `file`.

    Ceilings that it already has stay, so that all rows of a folder are compared with the same ones.
    """
    folder = made(folder)
    with turn(folder / "machine.json"):
        machine = read_machine(folder)
        commands = machine.get("command", {})
        commands[file] = list(dict.fromkeys([*commands.get(file, []), command()]))
        machine = {**ceilings, **machine, **this_machine(), "date": now(), "command": commands}
        write_atomic(folder / "machine.json", json.dumps(machine, indent=2, sort_keys=True) + "\n")
    return machine


def command() -> str:
    """The command that is running, as a reader would type it."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = f"python -m {spec.name.removesuffix('.__main__')}" if spec else Path(sys.argv[0]).name
    if spec and "TORCHELASTIC_RUN_ID" in os.environ:  # one of torchrun's ranks
        program = program.replace("python", f"torchrun --standalone --nproc-per-node {os.environ['WORLD_SIZE']}", 1)
    return f"{program} {shlex.join(sys.argv[1:])}".strip()


# the machines that come with the suite, in whose figures, notebooks and README they are named; the GPU to show first
OURS = ("h200", "h100", "cpu-avx512", "cpu-avx512-2", "cpu-avx512-3", "cpu-avx2", "cpu-intel-xeon-avx512",
        "cpu-intel-xeon-avx512-2")


def machines(file: str = TOKEN_SWEEP.file, out=DATA) -> list[str]:
    """The machines that recorded this file: those of OURS first, so that a reader's own record moves no chart of ours.

    Raises FileNotFoundError where the suite was installed without its data.
    """
    if Path(out) == DATA and not DATA.is_dir():
        raise FileNotFoundError(f"there is no recorded data in {DATA}: the suite is installed without it. Clone the "
                                "repository and install it from there: pip install -r requirements.txt")
    found = [p.parent.name for p in Path(out).glob(f"*/{file}") if (p.parent / "machine.json").exists()]
    order = {name: i for i, name in enumerate(OURS)}
    return sorted(found, key=lambda name: (order.get(name, len(OURS)), name.startswith("cpu"), name))


def load(table: Table = TOKEN_SWEEP, machine: str | None = None, out=DATA) -> pd.DataFrame:
    """One machine's recorded table (by default the first of `machines`), with a column `machine`."""
    names = machines(table.file, out)
    machine = machine or (names[0] if names else None)
    if machine is None or not (Path(out) / machine / table.file).exists():
        raise FileNotFoundError(f"no {table.file} is recorded for {machine or 'any machine'} in {out}; have: {names}")
    return table.read(Path(out) / machine).assign(machine=machine)
