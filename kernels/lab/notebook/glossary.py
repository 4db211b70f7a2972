"""The glossary, notebooks/GLOSSARY.md, and the links to it: a notebook links a term where its prose first uses it.

A term is a heading of level 3 in small letters, digits, spaces and hyphens, so that GitHub, JupyterLab and Sphinx make
the same anchor of it. Below may stand `*also: ...*`, other forms of the word. The first paragraph is the definition.
"""
from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .. import records

PATH = records.ROOT / "notebooks" / "GLOSSARY.md"
_ENTRY = re.compile(r"^### (.+)\n+(?:\*also: (.+)\*\n+)?(.+)$", re.M)
_LINK = re.compile(r"\[([^\]\n]*)\]\(([^()\s]+)(?: \"[^\"\n]*\")?\)")
# what is no prose: fenced code, folded parts, formulas in backticks, headings, links and images, tags
_SKIP = re.compile(r"```.*?```|<details.*?</details>|`[^`\n]*`|^#+ [^\n]*|<[^>\n]+>"
                   r"|!?\[[^\]\n]*\]\([^()\n]*(?:\"[^\"\n]*\")?\)", re.S | re.M)


@dataclass(frozen=True)
class Term:
    """One entry; `forms` are the words that stand for it in prose."""

    name: str
    forms: tuple[str, ...]
    definition: str

    @property
    def anchor(self) -> str:
        return self.name.replace(" ", "-")

    @property
    def pattern(self) -> re.Pattern:
        """The term as a word of its own, also in the plural; capital letters matter only where the entry has some."""
        words = "|".join(re.escape(form) + ("(?:s|es)?" if form[-1].isalpha() else "") for form in
                         sorted(self.forms, key=len, reverse=True))
        exact = any(form != form.lower() for form in self.forms)
        return re.compile(rf"(?<![\w./-])(?:{words})(?![\w/-]|\.\w)", 0 if exact else re.I)


def terms(path: Path = PATH) -> dict[str, Term]:
    """The entries by name, in the file's order. ValueError for an entry that has no anchor or no sentence."""
    return {term.name: term for term in _terms(path.read_text(encoding="utf-8"))}


@cache
def _terms(text: str) -> tuple[Term, ...]:
    found = tuple(Term(name, (name, *(also.split(", ") if also else ())), definition)
                  for name, also, definition in _ENTRY.findall(text))
    headings = re.findall(r"^### (.+)$", text, re.M)
    if [term.name for term in found] != headings:
        lost = set(headings) - {term.name for term in found}
        raise ValueError(f"the glossary's entries {sorted(lost)} have no definition")
    for term in found:
        if not re.fullmatch(r"[a-z0-9]+(?:[ -][a-z0-9]+)*", term.name):
            raise ValueError(f"a term is written in small letters, digits, spaces and hyphens, got {term.name!r}")
        if not re.match(r".*?[.](?= |$)", term.definition):
            raise ValueError(f"the definition of {term.name!r} must be a sentence that ends with a full stop")
    if len(set(headings)) != len(headings):
        raise ValueError("the glossary has two entries of one name")
    return found


def _prose(source: str) -> str:
    """The source with everything that is no prose blanked out, at the same places."""
    return _SKIP.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), source)


def links(source: str) -> list[tuple[str, int, str]]:
    """(anchor, where, text as it stands) of each link to an entry of the glossary in one cell."""
    return [(found[2].partition("#")[2], found.start(), found[0]) for found in _LINK.finditer(source)
            if f"{PATH.name}#" in found[2]]


def first_use(term: Term, sources: list[str]) -> tuple[int, int, int] | None:
    """(cell, start, end) of the term's first unlinked use in prose; None if there is none, or a link stands before."""
    for cell, source in enumerate(sources):
        at = [where for anchor, where, _ in links(source) if anchor == term.anchor]
        used = term.pattern.search(_prose(source))
        if used and not (at and min(at) < used.start()):
            return cell, used.start(), used.end()
        if at:
            return None
    return None


def faults(sources: list[str], known: dict[str, Term]):
    """What is wrong with the links of one notebook's prose, cell by cell."""
    anchors = {term.anchor: term for term in known.values()}
    for source in sources:
        for anchor, _, text in links(source):
            if anchor not in anchors:
                yield f"a link to the glossary's #{anchor}, which it does not have"
            elif text != _as_link(_LINK.fullmatch(text)[1], anchors[anchor]):
                yield f"the link {text} is not as `notebooks clean` writes it"
    for term in known.values():
        if place := first_use(term, sources):
            cell, start, end = place
            yield f"'{sources[cell][start:end]}' is first used without a link; `notebooks clean` sets it"


def _as_link(text: str, term: Term) -> str:
    return f'[{text}]({PATH.name}#{term.anchor})'


def _unlinked(found: re.Match) -> str:
    return found[1] if f"{PATH.name}#" in found[2] else found[0]


def link(sources: list[str], known: dict[str, Term]) -> list[str]:
    """The sources with each term linked where it is first used, and nowhere else."""
    plain = [_LINK.sub(_unlinked, source) for source in sources]
    for term in sorted(known.values(), key=lambda term: -max(map(len, term.forms))):  # "tensor core" before "core"
        if place := first_use(term, plain):
            cell, start, end = place
            source = plain[cell]
            plain[cell] = source[:start] + _as_link(source[start:end], term) + source[end:]
    return plain
