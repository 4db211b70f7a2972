"""The site's pages as files for Sphinx: README and the other texts, the notebooks, the sources of kernels/, the proof.

They lie in the folders in which they lie in the repository, so that their links to each other stay as they are.
"""
from __future__ import annotations

import hashlib
import re
import shutil
from base64 import b64decode
from pathlib import Path

from .. import records
from ..notebook import run
from . import proof
from .address import Address
from .cells import FENCE, outline, without_styles
from .pictures import with_pictures

TEXTS = ("CONTRIBUTING.md", "data/README.md")
PLAIN = ("LICENSE", "CITATION.cff", "requirements.txt")  # what a text links to, as a download
_SOURCE = re.compile(r"(?<!\[)`(kernels/[\w/]+\.py)`(?!\])")
_TITLE = re.compile(r"^\*(kernels/[\w/]+\.py)\*\n", re.M)  # of a source that show_source printed
_README_LINK = re.compile(r"\]\((?P<up>(?:\.\./)*)README\.md(?P<place>#[^)]*)?\)")
_SECTION = re.compile(r"(?<=\.ipynb#)[^)\s]+(?=\))")  # of a notebook, by the name that JupyterLab gives it
_CODE_LINK = re.compile(r"\]\((?P<path>(?:\.\./)*(?:[\w./-]+/)?[\w-]+\.py)\)")


def stage(out: Path, address: Address | None = None, names=("all",), sources: bool = True) -> dict[str, str]:
    """Write all pages under `out`; the words of each picture, by the SHA-256 of its bytes.

    names: which notebooks, as run.find takes them; the others have their headings alone, so that links to them lead
    somewhere. sources: whether each file of kernels/ is a page, too.
    Raises run.NotebookError for a notebook that cannot be read, ValueError for a widget without a picture.
    """
    root = records.ROOT
    notebooks, whole = run.find(["all"]), run.find(list(names))
    texts = [*(root / name for name in TEXTS), *sorted((root / "notebooks").glob("*.md"))]
    for path in texts:
        _write(out / path.relative_to(root), linked(path.read_text(encoding="utf-8"), _up(path), sources))
    _write(out / "index.md", linked((root / "README.md").read_text(encoding="utf-8"), "", sources)
           + contents([path.relative_to(root).with_suffix("").as_posix() for path in notebooks],
                      [path.relative_to(root).with_suffix("").as_posix() for path in texts]))
    _write(out / "proof.md", linked(proof.page(), "", sources))
    for path in notebooks:
        nb = run.read(path) if path in whole else outline(run.read(path))
        _write(out / path.relative_to(root), run.as_text(notebook(nb, path, address, sources)))
    for path in (root / name for name in PLAIN):
        shutil.copy(path, out / path.name)
    (out / "figures").mkdir(exist_ok=True)
    for path in (root / "figures").iterdir():
        if path.suffix in (".png", ".svg", ".pdf"):
            shutil.copy(path, out / "figures")
    for path in sorted((root / "kernels").rglob("*.py")) if sources else ():
        _write(out / f"{path.relative_to(root)}.md", source_page(path.relative_to(root).as_posix(), path))
    return {digest: words for path in notebooks for digest, words in in_words(run.read(out / path.relative_to(root)))}


def notebook(nb, path: Path, address: Address | None, sources: bool):
    """The notebook as a page: pictures for widgets, links to sources, and where it can be run if that is known."""
    with_pictures(without_styles(nb))
    for index, cell in enumerate(nb.cells):
        if cell.cell_type == "markdown":
            cell.source = linked(cell.source, "../", sources)
            if index == 0 and address:
                title, _, rest = cell.source.partition("\n")
                cell.source = f"{title}\n\n{address.invitation(f'notebooks/{path.name}')}\n{rest}"
        for output in cell.get("outputs", []) if sources else ():
            if "text/markdown" in output.get("data", {}):
                output.data["text/markdown"] = _TITLE.sub(r"[\1](../\1.html)\n", output.data["text/markdown"])
    return nb


def linked(text: str, up: str, sources: bool) -> str:
    """A text whose links to README lead to the first page, those to sections to Sphinx's names of them, and whose files
    of kernels/ are links to their pages.

    up: the way from the text's folder to the root. Code in fences stays as it is.
    """
    def links(prose: str) -> str:
        prose = _SECTION.sub(lambda m: re.sub(r"[^\w-]", "", m[0].lower()), prose)  # as Sphinx names it
        prose = _README_LINK.sub(lambda m: m[0] if up == "" and m["up"] else f"]({_first(m, up)})", prose)
        if not sources:
            return prose
        prose = _CODE_LINK.sub(r"](\g<path>.md)", prose)
        return _SOURCE.sub(lambda m: f"[`{m[1]}`]({up}{m[1]}.md)" if (records.ROOT / m[1]).is_file() else m[0], prose)

    parts, at = [], 0
    for fence in FENCE.finditer(text):
        parts += [links(text[at:fence.start()]), fence[0]]
        at = fence.end()
    return "".join([*parts, links(text[at:])])


def _first(match, up: str) -> str:
    """README of the root is the first page; README of another folder, such as data/, stays what it is."""
    to_root = match["up"] == up
    return f"{match['up']}{'index' if to_root else 'README'}.md{match['place'] or ''}"


def _up(path: Path) -> str:
    return "../" * len(path.parent.relative_to(records.ROOT).parts)


def contents(notebooks: list[str], texts: list[str]) -> str:
    """Sphinx's table of contents, which is not shown on the page: it orders the pages and fills the sidebar."""
    teaching = [name for name in texts if name.startswith("notebooks/")]
    rest = [name for name in texts if not name.startswith("notebooks/")]
    parts = (("The notebooks", notebooks), ("In your browser", ["proof"]), ("To teach and to look up", teaching),
             ("The repository", rest))
    return "".join(f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n" + "\n".join(pages) + "\n```\n"
                   for caption, pages in parts if pages)


def source_page(name: str, path: Path) -> str:
    """A file of kernels/ as a page that no search finds and no table of contents lists."""
    code = path.read_text(encoding="utf-8")
    fence = "`" * 8
    return (f"---\norphan: true\nnosearch: true\n---\n\n# {name}\n\n"
            f"{fence}{{code-block}} python\n:linenos:\n\n{code or '# nothing'}\n{fence}\n")


def in_words(nb):
    """(SHA-256 of a picture's bytes, its text alternative) for every picture that a cell made."""
    for cell in nb.cells:
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                yield (hashlib.sha256(b64decode(output.data["image/png"])).hexdigest(),
                       output.metadata["image/png"]["alt"])


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
