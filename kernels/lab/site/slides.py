"""Decks of slides of the notebooks: one HTML file each, with reveal.js inside, which opens without a network.

    python -m kernels slides           00 to 05, into build/slides
    python -m kernels slides 03 07     these notebooks

A heading begins a slide, each further text one below it; code and outputs stand with the text before them. Solutions
stay folded. The arrow keys lead on; a slide that is taller than the screen scrolls.
"""
from __future__ import annotations

import argparse
import html
import re
import shutil
import sys
from importlib.resources import files
from pathlib import Path

from .. import records
from ..notebook import run
from . import faults
from .cells import as_slides, relinked, without_styles
from .pictures import with_pictures

OUT = records.ROOT / "build" / "slides"
TAUGHT = ("00", "01", "02", "03", "04", "05")
HERE = Path(__file__).parent / "deck"
_PREFIX = "inside"  # stands in nbconvert's template where reveal.js would be fetched from
_STYLES = ("dist/reveal.css", "dist/theme/white.css")


def build(out=OUT, names=TAUGHT) -> list[Path]:
    """Write a deck for each notebook, and a page that lists them. Raises RuntimeError with the faults found."""
    paths, out = run.find(list(names)), Path(out)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    decks = {path.name: f"{path.stem}.html" for path in paths}
    for path in paths:
        (out / decks[path.name]).write_text(deck(run.read(path), path.stem, decks), encoding="utf-8")
    (out / "index.html").write_text(_index(decks), encoding="utf-8")
    if found := faults.of(out):
        raise RuntimeError("\n".join([f"{len(found)} faults of the slides:", *found]))
    return [out / name for name in decks.values()]


def deck(nb, title: str, decks: dict[str, str]) -> str:
    """One deck as HTML; links to the notebooks in `decks` lead to their decks."""
    from nbconvert.exporters import SlidesExporter

    nb = as_slides(relinked(with_pictures(without_styles(nb)), decks))
    nb.metadata["title"] = title
    exporter = SlidesExporter(reveal_url_prefix=_PREFIX, reveal_theme="white", template_name=HERE.name,
                              extra_template_basedirs=[str(HERE.parent)], exclude_input_prompt=True,
                              exclude_output_prompt=True, exclude_anchor_links=True)
    parts = {"css": (HERE / "deck.css").read_text(encoding="utf-8"), "reveal": _reveal("dist/reveal.js")}
    text, _ = exporter.from_notebook_node(nb, {"deck": parts})
    for name in _STYLES:
        text = inlined(text, name)
    return text


def _reveal(name: str) -> str:
    """A file of reveal.js, which the package sphinx-revealjs carries. Scripts keep no end tag that would end ours."""
    text = (files("sphinx_revealjs") / "_static" / "revealjs" / name).read_text(encoding="utf-8")
    return text.replace("</script", "<\\/script")


def inlined(text: str, name: str) -> str:
    """The deck with one of reveal.js's style sheets inside. RuntimeError unless nbconvert's template names it once."""
    parts = re.split(f'<link[^>]*href="{_PREFIX}/{re.escape(name)}"[^>]*>', text)
    if len(parts) != 2:
        raise RuntimeError(f"nbconvert's slides must link {name} once, and do {len(parts) - 1} times; a new version of "
                           "it may need a new slides.py")
    style = "\n".join(line for line in _reveal(name).splitlines() if not line.startswith("@import"))  # fonts
    return f"{parts[0]}<style>{style}</style>{parts[1]}"


def _index(decks: dict[str, str]) -> str:
    lines = "\n".join(f'<li><a href="{html.escape(deck)}">{html.escape(deck.removesuffix(".html"))}</a></li>'
                      for deck in decks.values())
    return ('<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>Same Bits: slides</title></head>\n'
            f"<body><h1>Slides</h1>\n<ul>\n{lines}\n</ul></body></html>\n")


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels slides", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=TAUGHT, help="notebooks: numbers, or all (default: 00 to 05)")
    parser.add_argument("--out", type=Path, default=OUT, help="the folder to write, which is emptied first")
    a = parser.parse_args(argv)
    if a.out.exists() and any(path.suffix != ".html" for path in a.out.iterdir()):
        raise ValueError(f"--out must be a folder of earlier slides or an empty one, got {a.out}")
    for path in build(a.out, a.names):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
