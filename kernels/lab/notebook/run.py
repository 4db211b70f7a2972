"""The runner: executes the notebooks and leaves them in normal form.

    python -m kernels notebooks run 00 03     execute, normalise and save (`run all` for every notebook)
    python -m kernels notebooks redraw all    execute, and keep only outputs that are the same on every machine
    python -m kernels notebooks clean 03      normalise what JupyterLab saved, without executing
    python -m kernels notebooks check all     say what is wrong with the files as they are

Normal form has words linked to the glossary where prose first uses them, and the opening's minutes of reading.
A notebook is named by its number, or by a path. One that fails, or breaks a rule of `faults`, is not written.
"""
from __future__ import annotations

import argparse
import copy
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from .. import records
from . import glossary, reading

NOTEBOOKS = records.ROOT / "notebooks"


class NotebookError(RuntimeError):
    """A notebook that cannot be read, fails, or breaks a rule; the message names it and the cell."""


_NAME = re.compile(r"\d\d[a-z]?_\w+\.ipynb")  # not 00_start_here-Copy1.ipynb, which JupyterLab makes for a reader
_KERNELSPEC = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
_CELL_METADATA = ("jupyter", "tags")
_WIDGET = "application/vnd.jupyter.widget-view+json"
_WIDGET_NOTE = "(a widget: run the notebook to use it)"
_SAVED_WITH_WIDGET = ("image/", "text/html", "text/markdown")
_REST = r"[^\s'\"<>)]*"
_MACHINE_PATH = re.compile(
    r"(?<![\w.:/])(?:/(?:root|home|tmp|Users|usr|opt|mnt|var/folders)/|[A-Za-z]:\\Users\\)" + _REST)
_ADDRESS = re.compile(r" at 0x[0-9a-f]{6,}")
_NO_ALT = re.compile(r"!\[\s*\]\(|<img(?![^>]*\balt=\"[^\"]+\")[^>]*>")
_LARGEST_IMAGE = 1_000_000


def read(path) -> dict:
    """The notebook as plain dicts. Raises NotebookError for anything that is not one."""
    return parse(_text(path), Path(path).name)


def parse(text: str, name: str) -> dict:
    """The notebook in this text as plain dicts. Raises NotebookError, which calls it `name`, for anything else."""
    import nbformat
    from nbformat.v4.rwbase import rejoin_lines

    try:
        nb = json.loads(text)
        if nb.get("nbformat") != 4:
            raise ValueError(f"nbformat is {nb.get('nbformat')}, and must be 4")
        return rejoin_lines(nbformat.from_dict({**nb, "nbformat_minor": 5}))
    except (ValueError, AttributeError) as error:
        raise NotebookError(f"{name} is not a readable notebook: {error}") from None


def _text(path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise NotebookError(f"{Path(path).name} is not a readable notebook: {error}") from None


def held(folder=NOTEBOOKS) -> dict[Path, str]:
    """path -> text of the suite's notebooks, as the tests hold them to the rules.

    A reader runs, answers and saves them, which is no fault of the suite: where none of the code is changed, this is
    what git has staged or committed. An author, whose code is changed too, is held to the files as they are. Without
    git, as in a downloaded archive, nobody can tell; see `under_git`.
    """
    if not under_git(folder) or _git(folder, "diff", "--name-only", "--", ":/*.py"):
        return {path: _text(path) for path in find(["all"], folder)}
    names = [name for name in _git(folder, "ls-files", "-z").split("\0") if _NAME.fullmatch(name)]
    return {Path(folder) / name: _git(folder, "show", f":./{name}") for name in sorted(names)}


def under_git(folder=NOTEBOOKS) -> bool:
    """Whether git knows the notebooks in this folder, so that what is committed can be told from what was saved."""
    try:
        return bool(_git(folder, "ls-files", "--", "*.ipynb"))
    except (OSError, subprocess.CalledProcessError):
        return False


def _git(folder, *words) -> str:
    """What git prints, also where the files belong to another user or have lost their modes."""
    command = ["git", "-c", "safe.directory=*", "-c", "core.fileMode=false", "-C", str(folder), *words]
    return subprocess.run(command, capture_output=True, check=True).stdout.decode()


def as_text(nb) -> str:
    """The one way a notebook is written to disk."""
    import nbformat

    return nbformat.writes(nb).rstrip("\n") + "\n"


def execute(nb, cwd, timeout: float = 120, name: str = "notebook", timing: bool = False):
    """Run every cell in a fresh kernel that starts in `cwd`; `timeout` seconds in total. Returns the same notebook.

    timing: whether each cell's metadata says when it began and ended, as `execution`.
    Raises NotebookError that names the cell and its error.
    """
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    at = [0]
    deadline = time.monotonic() + timeout
    client = NotebookClient(
        nb, kernel_name="python3", resources={"metadata": {"path": str(cwd)}}, record_timing=timing,
        store_widget_state=False, coalesce_streams=True, force_raise_errors=True,
        timeout_func=lambda cell: max(1, int(deadline - time.monotonic())),
        on_cell_start=lambda cell, cell_index: at.__setitem__(0, cell_index))
    path = os.pathsep.join(filter(None, (str(records.ROOT), os.environ.get("PYTHONPATH"))))
    try:
        return client.execute(env={**os.environ, "PYTHONPATH": path})  # before another package called kernels
    except CellExecutionError as error:
        why = f"{error.ename}: {error.evalue}"
    except CellTimeoutError:
        why = f"the notebook took longer than {timeout:g} s"
    except DeadKernelError:
        why = "the kernel died"
    raise NotebookError(f"{name}, {_cell(nb, at[0])}: {why}")


def normalise(nb):
    """The notebook without what differs from run to run or machine to machine: the same outputs give the same file."""
    import nbformat

    nb.metadata = {"kernelspec": _KERNELSPEC, "language_info": {"name": "python"}}
    nb.nbformat_minor = 5
    ids: set[str] = set()
    for cell in nb.cells:
        cell.source = "\n".join(line.rstrip() for line in cell.source.strip("\n").split("\n"))
        cell.metadata = {k: v for k, v in cell.metadata.items() if k in _CELL_METADATA and v}
        cell.id = _unused(cell, ids)
        ids.add(cell.id)
        if cell.cell_type == "code":
            cell.outputs = [kept for output in cell.outputs if (kept := _normal_output(output)) is not None]
    reading.state(nb)
    prose = [cell for cell in nb.cells if cell.cell_type == "markdown"]
    for cell, source in zip(prose, glossary.link([cell.source for cell in prose], glossary.terms()), strict=True):
        cell.source = source
    return nbformat.from_dict(nb)


def _unused(cell, ids) -> str:
    """The cell's own id; if it has none or shares one, an id from its source."""
    candidate, n = cell.get("id"), 0
    while not candidate or candidate in ids:
        candidate, n = hashlib.sha256(f"{cell.source}{n}".encode()).hexdigest()[:8], n + 1
    return candidate


def _normal_output(output):
    if output.output_type == "stream":
        output.text = re.sub(r"[^\n]*\r(?!\n)", "", output.text)  # what a progress bar overwrote
        return output if output.text.strip() else None
    data = output.get("data", {})
    if data.pop(_WIDGET, None) and not any(kind.startswith(_SAVED_WITH_WIDGET) for kind in data):
        if re.search(r"\d+%\|", data.get("text/plain", "")):  # a progress bar
            return None
        data["text/plain"] = _WIDGET_NOTE
    return output


def faults(nb) -> list[str]:
    """What keeps these outputs from being committed, each with its cell; [] for a good notebook."""
    found = []
    code = [c for c in nb.cells if c.cell_type == "code" and c.source.strip()]
    if [c.execution_count for c in code] != list(range(1, len(code) + 1)):
        found.append("not executed top to bottom in one run")
    for index, cell in enumerate(nb.cells):
        found += [f"{_cell(nb, index)}: {what}" for what in _cell_faults(cell)]
    return found


def _cell_faults(cell):
    if cell.cell_type == "markdown" and _NO_ALT.search(cell.source):
        yield "an image without alt text"
    for output in cell.get("outputs", []):
        if output.output_type == "error":
            yield f"an error output, {output.ename}"
        for kind, value in output.get("data", {"text/plain": output.get("text", "")}).items():
            if kind.startswith("image/"):
                yield from _image_faults(kind, value, output.metadata)
            if kind.startswith("text/") or kind == "image/svg+xml":
                yield from _text_faults(value)


def _image_faults(kind, value, metadata):
    if not metadata.get(kind, {}).get("alt", "").strip():
        yield f"an image without alt text ({kind}); use show(figure, alt)"
    size = len(value) if kind == "image/svg+xml" else len(value) * 3 // 4
    if size > _LARGEST_IMAGE:
        yield f"an image of {size / 1e6:.1f} MB; 1 MB is the most"


def _text_faults(text):
    own = "|".join(re.escape(str(p)) for p in (records.ROOT, sys.prefix, tempfile.gettempdir()))
    found = _MACHINE_PATH.search(text) or re.search(f"(?<![\\w.])(?:{own})[/\\\\]{_REST}", text)
    if found:
        yield f"a path of this machine in the output: {found[0]}"
    if _ADDRESS.search(text):
        yield f"a memory address in the output:{_ADDRESS.search(text)[0]}"
    if _NO_ALT.search(text):
        yield "an image without alt text"


def _cell(nb, index: int) -> str:
    return f"cell {index + 1} ({(nb.cells[index].source.strip().splitlines() or ['empty'])[0][:60]!r})"


def run(path, timeout: float = 120) -> None:
    """Execute one notebook in its own folder, normalise it and replace the file. Raises NotebookError."""
    path = Path(path)
    _save(path, normalise(execute(read(path), path.parent, timeout, path.name)))


RECORDED = "recorded"  # the tag of a cell that prints recorded data alone, so that its output is the same everywhere


def redraw(path, timeout: float = 120) -> None:
    """Execute one notebook and replace the outputs of its cells tagged `recorded`. Raises NotebookError."""
    path = Path(path)
    nb = read(path)
    fresh = normalise(execute(copy.deepcopy(nb), path.parent, timeout, path.name))
    for mine, theirs in zip(nb.cells, fresh.cells, strict=True):
        if RECORDED in mine.metadata.get("tags", ()):
            mine.outputs = theirs.outputs
    _save(path, normalise(nb))


def clean(path) -> None:
    """Normalise one notebook as it is. Raises NotebookError."""
    _save(Path(path), normalise(read(path)))


def check_file(path) -> None:
    """Raise NotebookError unless the file is as `run` would leave it."""
    check_text(_text(path), Path(path))


def check_text(text: str, path: Path) -> None:
    """Raise NotebookError unless this text, of the notebook at `path`, is as `run` would leave it."""
    nb = normalise(parse(text, path.name))
    _refuse(path, faults(nb) + ["not in normal form; `python -m kernels notebooks clean` mends that"]
            * (as_text(nb) != text))


def _save(path, nb):
    _refuse(path, faults(nb))
    records.write_atomic(path, as_text(nb))


def _refuse(path, found):
    if found:
        raise NotebookError("\n".join(f"{path.name}: {fault}" for fault in found))


def find(names: Sequence[str], folder=NOTEBOOKS) -> list[Path]:
    """Paths from numbers, file names or 'all'. Raises NotebookError where a name fits no notebook."""
    every = sorted(path for path in Path(folder).glob("*.ipynb") if _NAME.fullmatch(path.name))
    if list(names) == ["all"]:
        return every
    chosen = []
    for name in names:
        fits = [p for p in every if p.name.startswith(f"{name}_") or p.stem == name]
        fits = fits or [p for p in [Path(name)] if p.suffix == ".ipynb" and p.exists()]
        if not fits:
            raise NotebookError(f"no notebook {name!r}; there are {', '.join(p.stem for p in every) or 'none'}")
        chosen += fits
    return chosen


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels notebooks", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["run", "redraw", "clean", "check"])
    parser.add_argument("names", nargs="+", help="numbers, paths, or all")
    parser.add_argument("--timeout", type=float, default=120, help="seconds a notebook may take")
    a = parser.parse_args(argv)
    action = {"run": lambda path: run(path, a.timeout), "redraw": lambda path: redraw(path, a.timeout),
              "clean": clean, "check": check_file}[a.action]
    failed = False
    try:
        for path in find(a.names):
            failed |= not _report(action, path)
    except NotebookError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return int(failed)


def _report(action, path) -> bool:
    start = time.monotonic()
    try:
        action(path)
    except (NotebookError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return False
    print(f"{path.name}: {time.monotonic() - start:.0f} s")
    return True


if __name__ == "__main__":
    sys.exit(main())
