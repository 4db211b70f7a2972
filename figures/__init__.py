"""Every figure of the suite, drawn from data/ alone and byte for byte the same on the same pins.

A module here is one figure: `draw(data, machine, page) -> Figure` and `words(data, machine) -> str`, what a reader who
cannot see it should know. (page.py has the sizes to draw for, readme.py writes README's numbers, handout.py draws a
page for a class.) Of another machine, or of a part of a record, a figure shows what there is and says what is not; it
raises ValueError, or FileNotFoundError where there is no table, only if nothing is left to draw.
"""
from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

FOLDER = Path(__file__).parent
CLOCKS = {"cold": "device time with inputs out of cache", "graph": "CUDA-graph replay on warm inputs, no launch",
          "call": "host wall time, launch included", "event": "an event pair around each eager call, warm inputs",
          "flush": "an event pair around an eager call, inputs out of cache"}


def names() -> list[str]:
    found = {module.name for module in pkgutil.iter_modules([str(FOLDER)]) if not module.name.startswith("_")}
    return sorted(found - {"handout", "page", "readme", "readme_model"})


def render(name: str, size: str = "screen", **of) -> dict[str, bytes]:
    """Draw one figure; returns {"svg": bytes, "png": bytes}. `of` may name `data` and `machine`, as for draw.

    size: a name in page.PAGES. Raises ValueError for an unknown name or size, else as draw does.
    """
    from figures.page import PAGES
    from kernels.lab import style

    for what, given, known in (("figure", name, names()), ("size", size, PAGES)):
        if given not in known:
            raise ValueError(f"{what} must be one of {', '.join(known)}, got {given!r}")
    style.theme()
    page = PAGES[size]
    figure = importlib.import_module(f"figures.{name}").draw(**of, page=page)
    files = {}
    for kind, metadata in (("svg", {"Date": None, "Creator": None}), ("png", {"Software": None})):
        buffer = BytesIO()
        figure.savefig(buffer, format=kind, metadata=metadata, dpi=page.dpi * page.scale)
        files[kind] = buffer.getvalue()
    files["svg"] = page.scaled(files["svg"])
    return files


def sweep_rows(data, machine: str | None, ops: Iterable[str]) -> tuple[pd.DataFrame, dict]:
    """A machine's rows of these ops in its token sweep, with a column `older` for those of older code, and its
    machine.json. ValueError where there are none.
    """
    from kernels.lab import older, records

    rows = records.load(machine=machine, out=data)
    name, rows = rows.machine.iloc[0] if len(rows) else machine, rows[rows.op.isin(list(ops))]
    if not len(rows):
        todo = " or ".join(f"python -m kernels sweep {op}" for op in ops)
        raise ValueError(f"no {' or '.join(ops)} rows are recorded for {name or 'any machine'} in {data}: {todo}")
    return older.mark(rows), described(data, name)


def of_older_code(rows: pd.DataFrame) -> str:
    """A line for the caption that counts the rows of older code, and those whose code nobody can read without Triton;
    '' if there are none.
    """
    older = f"\nof older code, drawn hollow: {rows.older.sum()} of {len(rows)} points" if rows.older.any() else ""
    unsaid = rows.untold.sum() if "untold" in rows else 0
    return older + (f"\nwithout Triton it cannot be told whether {unsaid} of {len(rows)} points are of older code"
                    if unsaid else "")


def ends(rows: pd.DataFrame, column: str = "us_p50", per: float = 1.0, names: Iterable[str] = (), cpu=False) -> str:
    """Of each contender, in words: its value at the fewest and the most tokens."""
    from kernels.lab import style

    said = []
    for name in names or style.in_order(rows):
        mine = rows[rows.implementation == name].sort_values("tokens")
        if len(mine):
            first, last = mine.iloc[0], mine.iloc[-1]
            low, high = (f"{v:,.0f}" if v >= 100 else f"{v:.3g}" for v in (first[column] / per, last[column] / per))
            said.append(f"{style.contender(name, cpu)['label']} {low} at {first.tokens} and {high} at {last.tokens}")
    return "; ".join(said) or "nothing recorded"


def described(data, machine: str) -> dict:
    """machine.json, with a word for the device or the version of torch where it does not say them.

    Also whether the machine `is_cpu`, and which implementation is `ours` there: on a CPU `python`, since Triton's
    interpreter is there to look at and not for speed.
    """
    from kernels.lab import records

    found = records.read_machine(Path(data) / machine)
    cpu = records.is_cpu(machine, found)
    return {"device": machine, "torch": "not recorded", **found, "is_cpu": cpu, "ours": "python" if cpu else "triton"}


def pick(rows: pd.DataFrame, column: str, *wanted: str) -> pd.DataFrame:
    """The rows with the first of these values that any of them has in `column`; else with what most of them have."""
    values = rows[column]
    if not len(rows):
        return rows
    value = next((v for v in wanted if (values == v).any()), values.mode().iloc[-1])
    return rows[values == value]


def one_experiment(rows: pd.DataFrame, clocks: Iterable[str] = ()) -> pd.DataFrame:
    """The rows of RMSNorm as published, 8192 wide in bfloat16, or of what this machine recorded instead."""
    rows = pick(rows, "clock", *clocks) if clocks else rows
    return pick(pick(rows, "dtype", "bfloat16"), "shape", "D=8192,residual")


def specified(rows: pd.DataFrame) -> str:
    """In words, what the rows of one experiment of RMSNorm measure."""
    from kernels.op import Shape

    shape = Shape.parse(rows["shape"].iloc[0])
    return f"{'residual + ' * ('residual' in shape)}RMSNorm, hidden {shape['D']}, {rows.dtype.iloc[0]}"


def medians(rows: pd.DataFrame) -> str:
    """Of how many samples the rows are medians: three sweeps give at least 21."""
    if not rows.repeats.median() < 21:
        return "medians of three interleaved sweeps"
    return f"medians of {rows.repeats.min():g} to {rows.repeats.max():g} samples"


def other_runs(rows: pd.DataFrame, beside: str = "cuda") -> str:
    """Whose rows were recorded over half a day apart from the default's at the same point, and at which token counts;
    '' if none were. A ratio of such rows is of two runs.
    """
    import pandas as pd

    at = rows.assign(at=pd.to_datetime(rows.recorded_at, errors="coerce", utc=True, format="ISO8601"))
    at = at.pivot_table(index=["shape", "tokens"], columns="implementation", values="at", aggfunc="max")
    if beside not in at:
        return ""
    found: dict[str, list[str]] = {}
    for name in at.columns.drop(beside):
        apart = (at[name] - at[beside]).abs() > pd.Timedelta(hours=12)
        tokens = sorted(apart[apart].index.unique("tokens"))
        if tokens:
            found.setdefault(f"{tokens[0]}" + (f" to {tokens[-1]}" if len(tokens) > 1 else ""), []).append(name)
    return "; ".join(f"{', '.join(names)} at {tokens} tokens" for tokens, names in found.items())


def of_other_runs(rows: pd.DataFrame) -> str:
    """The same as a line for the caption."""
    said = other_runs(rows)
    return f"\ntimed in another run than the default: {said}" if said else ""


def named_once(panels) -> tuple[list, list]:
    """Handles and labels for one legend of several panels, which need not have the same lines."""
    found: dict = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    return list(found.values()), list(found)


def not_recorded(wanted: Iterable, found: Iterable) -> str:
    """A line for the caption that names what a record lacks; '' if it lacks nothing."""
    lacking = [str(one) for one in wanted if one not in set(found)]
    return f"\nnot recorded: {', '.join(lacking)}" if lacking else ""
