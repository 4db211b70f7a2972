"""Every notebook runs top to bottom, is committed in normal form, and is built alike."""
from __future__ import annotations

import ast
import json
import re
import statistics
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from kernels.lab.notebook import exercises, glossary, reading
from kernels.lab.notebook import run as notebook
from kernels.lab.site import teaching

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


def size_faults(nb):
    lines = [len(cell.source.strip().splitlines()) for cell in code_cells(nb)] or [0]
    words = len(" ".join(cell.source for cell in nb.cells if cell.cell_type == "markdown").split())
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


@cache
def places(path: Path) -> set[str]:
    """Where a link into this file can lead: a notebook's headings as JupyterLab names them, a text's as GitHub does."""
    if path.suffix == ".ipynb":
        return {place for _, place in teaching.anchors(read(path) if path in HELD else notebook.read(path))}
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def target_faults(text: str, path: Path):
    """Links of a text at this path whose file, or section by the letter, is not there."""
    for target in (a or b for a, b in TARGET.findall(text)):
        file, _, place = target.partition("#")
        aim = (path.parent / file).resolve() if file else path
        if re.match(r"[a-z]+:", file):
            continue
        if not aim.exists():
            yield f"a link to {target}, which does not exist"
        elif place and place not in places(aim):
            yield f"a link to {target}: there is no such section"


def link_faults(nb, path):
    yield from target_faults(prose(nb.cells), path)
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
    if not 2 <= len(graded(nb)) <= 4:
        yield f"{len(graded(nb))} exercises; two to four"
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
    assert {"00": 4, "02": 7, "03": 9, "04": 7, "05": 6, "06": 3, "07": 10}.items() <= tagged.items()


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


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "data/README.md", "notebooks/GLOSSARY.md",
                                  "notebooks/TEACHING.md"])
def test_links_of_the_texts_resolve(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert TARGET.search(text) and list(target_faults(text, ROOT / name)) == []


def test_a_section_is_named_by_the_letter(tmp_path):
    """JupyterLab compares capitals and commas; the sections of a text have neither, as GitHub names them."""
    (tmp_path / "a.md").write_text("# One\n\n## The end, of it\n", encoding="utf-8")
    start = "00_start_here.ipynb"
    for good, bad in ((f"{start}#The-fix", f"{start}#the-fix"), ("GLOSSARY.md#tensor-core", "GLOSSARY.md#Tensor-core")):
        assert list(target_faults(f"[x]({good})", glossary.PATH)) == []
        assert len(list(target_faults(f"[x]({bad})", glossary.PATH))) == 1
    assert list(target_faults("[x](#the-end-of-it)", tmp_path / "a.md")) == []
    assert len(list(target_faults("[x](#The-end,-of-it) [y](b.md)", tmp_path / "a.md"))) == 2


def test_each_word_of_the_glossary_is_used():
    """In some notebook; a link to it stands there, by the test above."""
    linked = {anchor for path in EVERY for cell in read(path).cells if cell.cell_type == "markdown"
              for anchor, _, _ in glossary.links(cell.source)}
    assert {term.anchor for term in glossary.terms().values()} - linked == set()


@each
def test_exercises_are_graded_and_their_solutions_pass(path):
    nb = read(path)
    assert [*exercise_faults(nb, path), *stub_faults(nb), *question_faults(nb), *solution_faults(nb)] == []


README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_states_the_minutes_of_reading():
    rows = re.findall(r"^\| \[.*?\]\(notebooks/(\d\d[a-z]?_\w+\.ipynb)\) \|[^|]*\| *(\d+) *\|", README, re.M)
    stated = {name: int(number) for name, number in rows}
    assert stated == {path.name: reading.minutes(read(path)) for path in EVERY}
    hours = float(re.search(r"all of them take about ([\d.]+) hours", README)[1])
    assert abs(hours - sum(stated.values()) / 60) <= 0.5


def minutes(number: str) -> str:
    return f"{number} minute{'s' * (number != '1')}"


def test_readme_and_the_openings_state_the_same_minutes_of_running():
    """An empty field is for a notebook whose opening says that nothing was timed there."""
    fields = dict(re.findall(r"^\| \[.*?\]\(notebooks/(\w+\.ipynb)\) \|[^|]*\|[^|]*\|(.*)\|$", README, re.M))
    assert set(fields) == {path.name for path in EVERY}
    for path in EVERY:
        cpu, gpu = (field.strip() for field in fields[path.name].split("|"))
        there = f", {minutes(gpu)} on an H100-class GPU." if gpu else "; on a GPU it is not timed yet."
        stated = f"About {minutes(cpu)} of running on two CPU cores{there}"
        assert stated in opening(read(path)), f"{path.name}: {stated}"


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
            assert anchor in places(by_name[name]), f"{name} has no section #{anchor}"
            assert shows(read(by_name[name]), anchor), f"{name}#{anchor} has no cell that shows it"


def shows(nb, anchor) -> bool:
    """Whether a cell behind the heading with this anchor, before the next heading of its level, checks or draws."""
    inside = False
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            for heading in re.findall(r"^##+ (.+)$", cell.source, re.M):
                inside = teaching.anchor(heading) == anchor
        elif inside and re.search(r"\b(check|observe|show|TokenSweep)\(", cell.source):
            return True
    return False
