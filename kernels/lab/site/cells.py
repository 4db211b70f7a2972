"""A notebook's cells, rearranged for a page, a deck of slides or a class."""
from __future__ import annotations

import re

from nbformat.v4 import new_markdown_cell

FENCE = re.compile(r"^(```|~~~).*?^\1\s*$", re.M | re.S)  # code between fences
_STYLE = re.compile(r"\s*<style>.*</style>\s*", re.S)
_SOLUTION = re.compile(r"<details>\s*<summary>[^<]*solution[^<]*</summary>.*?</details>\s*", re.S | re.I)
_SOLVED = re.compile(r"#\s*solution\s+\d\d[a-z]?\.\d", re.I)  # a solution's first line, which tests look for as well
_HEADING = re.compile(r"^##? ", re.M)
_LINK = re.compile(r"(?<!!)\[(?P<text>(?:[^\[\]]|\[[^\]]*\])+)\]\((?P<to>[^()\s]+)(?P<title>\s+\"[^\"]*\")?\)")
RELATIVE = re.compile(r"(?!#|\w+:)")


def without_styles(nb):
    """The notebook, changed in place, without the style sheet for JupyterLab that its first cell displays."""
    for cell in nb.cells:
        if "outputs" in cell:
            cell.outputs = [o for o in cell.outputs if not _STYLE.fullmatch(o.get("data", {}).get("text/html", ""))]
    return nb


def outline(nb):
    """The notebook, changed in place, with its headings alone."""
    headings = [line for cell in nb.cells if cell.cell_type == "markdown"
                for line in re.findall(r"^#{1,3} .+$", FENCE.sub("", cell.source), re.M)]
    nb.cells = [new_markdown_cell(line, id=f"heading-{i}") for i, line in enumerate(headings)]
    return nb


def without_solutions(nb):
    """The notebook, changed in place, without the folded solutions; a cell that held nothing else is gone.

    Raises ValueError where a solution is left that is not folded.
    """
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            cell.source = _SOLUTION.sub("", cell.source).rstrip("\n")
        if _SOLVED.search(cell.source):
            raise ValueError("a solution must be folded in <details> with the summary 'Solution', got "
                             f"{_SOLVED.search(cell.source)[0]!r} in cell {cell.id!r}")
    nb.cells = [cell for cell in nb.cells if cell.cell_type != "markdown" or cell.source.strip()]
    return nb


def solutions(nb) -> int:
    """How many folded solutions the notebook has."""
    return sum(len(_SOLUTION.findall(cell.source)) for cell in nb.cells if cell.cell_type == "markdown")


def as_slides(nb):
    """The notebook, changed in place, with a slide for each heading and one below it for each further text.

    A cell of code stands on the slide of the text before it; where both it and the cell before show a picture, on the
    next one. A cell that sets `slideshow` in its metadata itself keeps that.
    """
    cells = []
    for cell in nb.cells:
        cells += _parts(cell) if cell.cell_type == "markdown" else [cell]
    for before, cell in zip([None, *cells], cells, strict=False):
        if cell.metadata.get("slideshow"):
            continue
        if cell.cell_type == "markdown":
            kind = "slide" if _HEADING.match(cell.source) else "subslide"
        else:
            kind = "subslide" if before is not None and _shows(before) and _shows(cell) else "-"
        cell.metadata["slideshow"] = {"slide_type": kind}
    nb.cells = cells
    return nb


def _parts(cell) -> list:
    """A cell of text, cut before each heading of the first or second level."""
    fenced = [range(*match.span()) for match in FENCE.finditer(cell.source)]
    cuts = [m.start() for m in _HEADING.finditer(cell.source) if not any(m.start() in code for code in fenced)]
    edges = sorted({0, *cuts, len(cell.source)})
    texts = [cell.source[a:b].strip("\n") for a, b in zip(edges, edges[1:], strict=False)]
    if len(texts) < 2:
        return [cell]
    return [new_markdown_cell(text, metadata=dict(cell.metadata), id=f"{cell.id}-{i}"[:64])
            for i, text in enumerate(texts)]


def _shows(cell) -> bool:
    return any("image/png" in output.get("data", {}) for output in cell.get("outputs", []))


def relinked(nb, known: dict[str, str]):
    """The notebook, changed in place: a link to a file in `known` leads where that says, one to another file is text.

    Links to the web, and places on the same page, stay.
    """
    def link(match):
        if not RELATIVE.match(match["to"]):
            return match[0]
        file = match["to"].partition("#")[0].rpartition("/")[2]
        return f"[{match['text']}]({known[file]})" if file in known else match["text"]

    for cell in nb.cells:
        if cell.cell_type == "markdown":
            cell.source = _LINK.sub(link, cell.source)
    return nb
