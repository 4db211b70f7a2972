"""Every notebook runs top to bottom, is committed in normal form, and is built alike."""
from __future__ import annotations

import ast
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.lab.notebook import exercises, glossary, reading
from kernels.lab.notebook import run as notebook

ROOT = Path(__file__).resolve().parents[3]
HELD = notebook.held()
EVERY = list(HELD)
SECONDS = 120
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s]+)\)")
NAVIGATION = re.compile(r"(?i)\b(previous|contents|next)\b(?:\W{0,4}\[)?[^\]\n]*\]\(([^)\s]+)\)")
TARGET = re.compile(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"")
SOLUTION = re.compile(r"```python\n# solution (\S+)\n(.*?)```", re.S)

each = pytest.mark.parametrize("path", EVERY, ids=lambda path: path.stem)


def read(path):
    """A notebook of the suite as the tests hold it to the rules, which need not be the reader's file."""
    return notebook.parse(HELD[path], path.name)


def code_cells(nb):
    return [cell for cell in nb.cells if cell.cell_type == "code" and cell.source.strip()]


def prose(cells) -> str:
    return "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def opening(nb) -> str:
    """The prose before the first code cell."""
    first = next((i for i, cell in enumerate(nb.cells) if cell.cell_type == "code"), len(nb.cells))
    return prose(nb.cells[:first])


# The rules; each yields what is wrong.

def opening_faults(nb, path, every):
    text = opening(nb)
    if not text.startswith("# "):
        yield "does not open with a title"
    links = {word.lower(): target for word, target in NAVIGATION.findall(text)}
    at = every.index(path)
    wanted = {"contents": "../README.md#the-notebooks"}
    wanted |= {"previous": every[at - 1].name} if at else {}
    wanted |= {"next": every[at + 1].name} if at + 1 < len(every) else {}
    for word, target in wanted.items():
        if links.get(word) != target:
            yield f"the opening's link '{word}' goes to {links.get(word)}, not {target}"
    for phrase in ("What you will do", "What you will see", "What you will be able to do", "What you need", "Level:"):
        if phrase.lower() not in text.lower():
            yield f"the opening lacks '{phrase}'"
    if not (re.search(r"\d\s*(min|s\b|sec)", text) and "CPU" in text and re.search(r"GPU|H100|H200", text)):
        yield "the opening lacks minutes on a CPU and on a GPU"
    if reading.stated(nb) is None:
        yield "the opening lacks 'About 5 minutes of reading'; `notebooks clean` writes the number"
    setup = code_cells(nb)[0].source if code_cells(nb) else ""
    if "begin()" not in setup or len(setup.splitlines()) > 4:
        yield "the first code cell must call begin() and have at most four lines"


def walk_prose(nb) -> str:
    """The prose between the cells: without the opening, tables, folded solutions and the targets of links."""
    later = "\n\n".join(cell.source for cell in nb.cells[1:] if cell.cell_type == "markdown")
    return re.sub(r"<details.*?</details>|^\|[^\n]*", "", reading.without_targets(later), flags=re.S | re.M)


def size_faults(nb):
    lines = [len(cell.source.strip().splitlines()) for cell in code_cells(nb)] or [0]
    words = len(walk_prose(nb).split())
    if max(lines) > 25:
        yield f"a cell of {max(lines)} lines; 25 at most"
    if statistics.median(lines) > 8:
        yield f"the median cell has {statistics.median(lines):g} lines; 8 at most"
    if not 5 <= words / max(sum(lines), 1) <= 14:
        yield f"{words / max(sum(lines), 1):.1f} words of prose a line of code; 5 to 14"


def ending_faults(nb, path, every):
    text = prose(nb.cells).lower()
    parts = ["what you saw", "exercise", "further reading"]
    places = [text.rfind(part) for part in parts]
    if -1 in places:
        yield f"lacks '{parts[places.index(-1)]}'"
    if path != every[-1]:
        last = [target for _, target in LINK.findall(prose(nb.cells[-2:]))]
        if every[every.index(path) + 1].name not in last:
            yield "does not end with a link to the next notebook"
    if "check(" not in "".join(cell.source for cell in code_cells(nb)):
        yield "checks no claim"


def link_faults(nb, path):
    for target in (a or b for a, b in TARGET.findall(prose(nb.cells))):
        file = target.partition("#")[0]
        if file and not re.match(r"[a-z]+:", file) and not (path.parent / file).exists():
            yield f"a link to {target}, which does not exist"
    for cell in code_cells(nb):
        if re.search(r"[\"'](\.\./|notebooks/)", cell.source):
            yield f"a path that depends on where Jupyter was started: {cell.source.splitlines()[0]}"


def glossary_faults(nb):
    yield from glossary.faults([cell.source for cell in nb.cells if cell.cell_type == "markdown"], glossary.terms())


def solutions(nb) -> dict[str, str]:
    """Folded solutions by exercise: the code that sets the name that is asked for."""
    folded = re.findall(r"<details.*?</details>", prose(nb.cells), re.S)
    return {name: code for block in folded for name, code in SOLUTION.findall(block)}


def graded(nb) -> set[str]:
    """Exercises whose stub is in the notebook: the names in its calls of grade."""
    calls = [node for cell in code_cells(nb) for node in ast.walk(ast.parse(cell.source)) if isinstance(node, ast.Call)]
    return {call.args[0].value for call in calls if getattr(call.func, "id", getattr(call.func, "attr", "")) == "grade"}


def exercise_faults(nb, path):
    number = path.name.partition("_")[0]
    registered = {name for name in exercises.checkers() if name.startswith(f"{number}.")}
    if not 2 <= len(graded(nb)) <= 6:
        yield f"{len(graded(nb))} exercises; two to six"
    if not graded(nb) == set(solutions(nb)) == registered:
        yield f"stubs {sorted(graded(nb))}, folded solutions {sorted(solutions(nb))}, checkers {sorted(registered)}"


def stub_faults(nb):
    """A stub sets or defines the name that the exercise asks for, leaves it open, and hands it to grade."""
    for cell in code_cells(nb):
        body = ast.parse(cell.source).body
        for call in (c for c in ast.walk(ast.Module(body, [])) if isinstance(c, ast.Call)):
            if getattr(call.func, "id", "") == "grade" and call.args[0].value in exercises.checkers():
                yield from _stub_faults(exercises.checkers()[call.args[0].value], call, body)


def _stub_faults(asked, call, body):
    """The faults of one call of grade, in a cell with this body."""
    if getattr(call.args[1], "id", "") != asked.target:
        yield f"the stub of {asked.name} grades {ast.unparse(call.args[1])}, and asks for {asked.target}"
    made = [node for node in body if isinstance(node, ast.FunctionDef) and node.name == asked.target
            or isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == asked.target]
    if not made:
        yield f"the stub of {asked.name} does not name {asked.target}"
    elif isinstance(made[-1], ast.FunctionDef):
        defined = f"{asked.target}({ast.unparse(made[-1].args)})"
        if defined != asked.asks:
            yield f"the stub of {asked.name} defines {defined}, and asks for {asked.asks}"


def question_faults(nb):
    """The question names the function that it asks for."""
    for name in graded(nb) & set(exercises.checkers()):
        asked = exercises.checkers()[name]
        if "(" in asked.asks and f"`{asked.asks}`" not in prose(nb.cells):
            yield f"the question of {name} does not say `{asked.asks}`"


def solution_faults(nb):
    for name, code in solutions(nb).items():
        space: dict = {}
        exec(code_cells(nb)[0].source, space)
        exec(code, space)
        target = exercises.checkers()[name].target if name in exercises.checkers() else "answer"
        if exercises.passes(name, space.get(target, ...)) is not True:
            yield f"the solution of {name} does not pass"


# The notebooks.

def test_the_walk_starts_at_00_and_numbers_are_given_once():
    assert [path.name for path in EVERY[:1]] == ["00_start_here.ipynb"]
    numbers = [path.name.partition("_")[0] for path in EVERY]
    assert len(set(numbers)) == len(numbers)


@each
def test_runs_top_to_bottom(path):
    nb = notebook.normalise(notebook.execute(read(path), path.parent, SECONDS, path.name))
    assert notebook.faults(nb) == []
    assert recorded_texts(nb) == recorded_texts(read(path)), "run python -m kernels notebooks redraw all"


def recorded_texts(nb):
    """What the cells print whose output is the same on every machine, images apart."""
    return [[output.get("text") or output.get("data", {}).get("text/html") for output in cell.outputs]
            for cell in code_cells(nb) if notebook.RECORDED in cell.metadata.get("tags", ())]


def test_notebooks_with_recorded_data_say_which_cells_show_nothing_else():
    tagged = {path.name.partition("_")[0]: len(recorded_texts(read(path))) for path in EVERY}
    assert {"00": 4, "02": 7, "03": 9, "04": 5, "05": 6, "06": 3, "07": 5}.items() <= tagged.items()


FROM_THE_ROOT = """
import contextlib, io, json, sys
for name, cell in json.load(sys.stdin).items():
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(cell, {"__name__": "__main__"})
    print(json.dumps([name, out.getvalue()]), flush=True)
"""


@pytest.fixture(scope="module")
def first_cells():
    """notebook -> what its first cell prints where a reader starts in the root; one process for all is quick."""
    cells = {path.name: code_cells(read(path))[0].source for path in EVERY}
    run = subprocess.run([sys.executable, "-c", FROM_THE_ROOT], input=json.dumps(cells), cwd=ROOT, text=True,
                         capture_output=True, timeout=SECONDS)
    return dict(map(json.loads, run.stdout.splitlines())), run.stderr


@each
def test_sets_up_from_the_root(path, first_cells):
    printed, errors = first_cells
    assert printed.get(path.name, errors).startswith(("LIVE", "INTERPRETER", "RECORDED"))


@each
def test_is_committed_in_normal_form_with_its_outputs(path):
    if notebook.under_git():  # in an archive, what a reader saved cannot be told from what was committed
        notebook.check_text(HELD[path], path)
    assert any(cell.outputs for cell in code_cells(read(path)))


@each
def test_is_built_like_the_others(path):
    nb = read(path)
    assert [*opening_faults(nb, path, EVERY), *size_faults(nb), *ending_faults(nb, path, EVERY)] == []


@each
def test_links_resolve(path):
    assert list(link_faults(read(path), path)) == []


@each
def test_words_are_linked_to_the_glossary_where_they_are_first_used(path):
    assert list(glossary_faults(read(path))) == []


def test_the_glossarys_own_links_resolve():
    text = glossary.PATH.read_text(encoding="utf-8")
    targets = [target.partition("#")[0] for _, target in LINK.findall(text) if not re.match(r"[a-z]+:", target)]
    assert targets and all((glossary.PATH.parent / target).exists() for target in targets)


def test_each_word_of_the_glossary_is_used():
    """In some notebook; a link to it stands there, by the test above."""
    linked = {anchor for path in EVERY for cell in read(path).cells if cell.cell_type == "markdown"
              for anchor, _, _ in glossary.links(cell.source)}
    assert {term.anchor for term in glossary.terms().values()} - linked == set()


@each
def test_exercises_are_graded_and_their_solutions_pass(path):
    nb = read(path)
    assert [*exercise_faults(nb, path), *stub_faults(nb), *question_faults(nb), *solution_faults(nb)] == []


def heading_anchors(path) -> set[str]:
    """The anchors of a notebook's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(read(path).cells), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_states_the_minutes_of_reading():
    rows = re.findall(r"^\| \[.*?\]\(notebooks/(\d\d[a-z]?_\w+\.ipynb)\) \|[^|]*\| *(\d+) *\|", README, re.M)
    stated = {name: int(number) for name, number in rows}
    assert stated == {path.name: reading.minutes(read(path)) for path in EVERY}
    hours = float(re.search(r"all of them take about ([\d.]+) hours", README)[1])
    assert abs(hours - sum(stated.values()) / 60) <= 0.5


def test_each_question_leads_from_a_tracker_to_sections_that_show_cause_and_fix():
    """Every link resolves, and a section that is named has a cell that checks or observes."""
    table = README.partition("### Which notebook answers my question")[2].partition("\n#")[0]
    rows = [line.strip("|").split("|") for line in re.findall(r"^\| .*\|$", table, re.M)][2:]
    assert len(rows) >= 7
    by_name = {path.name: path for path in EVERY}
    for question, _, cause, fix in rows:
        assert re.search(r"\]\(https://github\.com/[\w.-]+/[\w.-]+/issues/\d+\)", question), question
        links = re.findall(r"\]\(notebooks/(\w+\.ipynb)#([^)]+)\)", cause + fix)
        assert links and (fix.strip() == "the same section" or "](notebooks/" in fix), question
        for name, anchor in links:
            assert anchor in heading_anchors(by_name[name]), f"{name} has no section #{anchor}"
            assert shows(read(by_name[name]), anchor), f"{name}#{anchor} has no cell that shows it"


def shows(nb, anchor) -> bool:
    """Whether a cell behind the heading with this anchor, before the next heading of its level, checks or draws."""
    inside = False
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            for heading in re.findall(r"^##+ (.+)$", cell.source, re.M):
                inside = re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") == anchor
        elif inside and re.search(r"\b(check|observe|show|TokenSweep)\(", cell.source):
            return True
    return False
