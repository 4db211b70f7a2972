"""What is wrong with built pages: links that lead nowhere, images without words, files fetched from elsewhere."""
from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

_FETCHED = {"script": "src", "link": "href", "img": "src", "iframe": "src", "source": "src", "object": "data"}
_NOT_FETCHED = {"canonical", "next", "prev", "index", "search", "author", "license", "alternate"}  # of <link>


class Page(HTMLParser):
    """What a page holds: the names that a link can lead to, its links, what it fetches, images without words."""

    def __init__(self, text: str):
        super().__init__()
        self.names, self.links, self.fetched, self.unsaid = set(), [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.names |= {given[name] for name in ("id", "name") if given.get(name)}
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        rel = set((given.get("rel") or "").split())
        if given.get(_FETCHED.get(tag, "")) and not (tag == "link" and rel & _NOT_FETCHED):
            self.fetched.append(given[_FETCHED[tag]])
        if tag == "img" and not (given.get("alt") or "").strip() and given.get("aria-hidden") != "true":
            self.unsaid.append(given.get("src", "")[:80])

    handle_startendtag = handle_starttag


def of(folder) -> list[str]:
    """One line for each fault of the pages under `folder`; [] where there is none."""
    folder, pages = Path(folder).resolve(), {}
    for path in sorted(folder.rglob("*.html")):
        pages[path.resolve()] = Page(path.read_text(encoding="utf-8"))
    found = []
    for path, page in pages.items():
        where = path.relative_to(folder).as_posix()
        found += [f"{where}: an image without words: {image}" for image in page.unsaid]
        found += [f"{where}: fetched from elsewhere: {address}" for address in page.fetched
                  if urlsplit(address).scheme in ("http", "https") or address.startswith("//")]
        found += [f"{where}: leads nowhere: {link}" for link in (*page.links, *page.fetched)
                  if not _leads(link, path, pages, folder)]
    return found


def _leads(link: str, path: Path, pages: dict[Path, Page], folder: Path) -> bool:
    """Whether a link of the site's own leads to a file, and to a place in it; one to elsewhere is not followed."""
    if urlsplit(link).scheme or link.startswith("//"):
        return True
    address, place = urldefrag(link)
    target = (path.parent / unquote(address.partition("?")[0])).resolve() if address else path
    if not target.is_relative_to(folder):
        return False
    if target not in pages:
        return target.is_file()
    return not place or place == "top" or unquote(place) in pages[target].names
