"""Recorded measurements: tidy CSV tables and machine.json under data/<machine>/.

Rows are replaced by key, a file is written whole or not at all, only one writer works on it at a time, and a folder
belongs to one kind of machine: nothing here mixes rows silently.
"""
from __future__ import annotations

import datetime
import itertools
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from filelock import FileLock

from .. import runtime

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "data"


@dataclass(frozen=True)
class Table:
    """The form of one CSV: its file name, its columns in order, and the columns that are its key."""

    file: str
    columns: tuple[str, ...]
    key: tuple[str, ...]

    def read(self, folder) -> pd.DataFrame:
        """The table in this folder; empty if there is none. Raises ValueError for a file of another form."""
        path = Path(folder) / self.file
        if not path.exists():
            return pd.DataFrame(columns=list(self.columns))
        try:
            table = pd.read_csv(path, dtype={"digest": str, "source": str}, comment="#", keep_default_na=True)
        except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not a readable CSV table: {error}") from None
        if tuple(table.columns) != self.columns:
            odd = sorted(set(table.columns) ^ set(self.columns)) or "the same columns in another order"
            raise ValueError(f"{path} is not a {self.file} of this suite: {odd}. Move it away and record again.")
        return table

    def merge(self, folder, rows) -> pd.DataFrame:
        """Write these rows (dicts or a DataFrame) over those with the same key; returns the whole table."""
        rows = pd.DataFrame(rows, columns=list(self.columns))
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{self.file}.lock"):
            old = self.read(folder)
            keys = list(self.key)
            new = rows.drop_duplicates(keys, keep="last")
            kept = old[~old.set_index(keys).index.isin(new.set_index(keys).index)] if len(old) else old
            table = pd.concat([t for t in (kept, new) if len(t)] or [old], ignore_index=True)
            table = table.sort_values(keys, kind="stable", ignore_index=True)
            write_atomic(folder / self.file, table.to_csv(index=False, float_format="%.6g", lineterminator="\n"))
        return table


TOKEN_SWEEP = Table(
    "token_sweep.csv",
    ("op", "implementation", "dtype", "shape", "tokens", "clock", "us_p05", "us_p20", "us_p50", "us_p80", "us_p95",
     "repeats", "gbytes_per_s", "tflops", "same_bits", "elements_differ", "digest", "schedule", "recorded_at",
     "source"),
    ("op", "implementation", "dtype", "shape", "tokens", "clock"),
)


def write_atomic(path: Path, text: str) -> None:
    """Replace the file whole, or leave it as it was and raise OSError that names it."""
    temporary = None
    try:
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False, encoding="utf-8") as file:
            temporary = file.name
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        if temporary and os.path.exists(temporary):
            os.unlink(temporary)
        raise OSError(error.errno, f"could not write {path} (the file there is unchanged): {error.strerror}") from error


def now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def device_name() -> str:
    return torch.cuda.get_device_name() if runtime.HAS_GPU else f"{_cpu_model()}, {torch.get_num_threads()} threads"


def slug() -> str:
    """This machine's folder under data/: h200, h100, cpu-avx512 and so on."""
    if runtime.HAS_GPU:
        return runtime.slug(torch.cuda.current_device())
    return "cpu-" + torch.backends.cpu.get_cpu_capability().lower().replace("_", "")


def _cpu_model() -> str:
    try:
        return re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())[1].strip()
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
        "host_cpu": _cpu_model(),
    }


def open_machine(out=DATA, name: str | None = None) -> Path:
    """The folder to record into: this machine's own, or the next free h200-2, h200-3 if another machine has the name.

    Raises ValueError if `name` is given and that folder holds measurements of another machine.
    """
    names = [name] if name else itertools.chain([slug()], (f"{slug()}-{i}" for i in itertools.count(2)))
    for candidate in names:
        folder = Path(out) / candidate
        other = _other_machine(read_machine(folder))
        if not other:
            folder.mkdir(parents=True, exist_ok=True)
            return folder
    raise ValueError(f"{folder} was recorded elsewhere ({other}). Give this machine another name with --machine")


def _other_machine(recorded: dict) -> str:
    """In what the recorded machine differs from this one, or ''."""
    here = this_machine()
    return "; ".join(f"{k} was {recorded[k]}, here {here[k]}" for k in ("device", "torch", "triton")
                     if k in recorded and recorded[k] != here[k])


def read_machine(folder) -> dict:
    """machine.json of one folder, {} if there is none. Raises ValueError if it cannot be read."""
    path = Path(folder) / "machine.json"
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not readable JSON: {error}") from None


def note_machine(folder, file: str, **ceilings) -> dict:
    """Write machine.json: this machine, its measured ceilings, and the command that recorded `file`.

    Ceilings that it already has stay, so that all rows of a folder are compared with the same ones.
    """
    folder = Path(folder)
    with FileLock(folder / "machine.json.lock"):
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
    return " ".join([program, *sys.argv[1:]])


def machines(file: str = TOKEN_SWEEP.file, out=DATA) -> list[str]:
    """The machines that recorded this file, data-centre GPUs first, newest first."""
    found = [p.parent.name for p in Path(out).glob(f"*/{file}") if (p.parent / "machine.json").exists()]
    order = {name: i for i, name in enumerate(("b200", "h200", "h100", "a100"))}
    return sorted(found, key=lambda name: (order.get(name, 99), name))


def load(table: Table = TOKEN_SWEEP, machine: str | None = None, out=DATA) -> pd.DataFrame:
    """One machine's recorded table (by default the first of `machines`), with a column `machine`."""
    names = machines(table.file, out)
    machine = machine or (names[0] if names else None)
    if machine is None or not (Path(out) / machine / table.file).exists():
        raise FileNotFoundError(f"no {table.file} is recorded for {machine or 'any machine'} in {out}; have: {names}")
    return table.read(Path(out) / machine).assign(machine=machine)
