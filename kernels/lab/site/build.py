"""The static site: every notebook with its committed outputs, the texts, the sources, and a proof in the browser.

    python -m kernels site                       build/site/html, from the files as they are; no network is used
    python -m kernels site 00 03 --no-sources    faster: of the other notebooks the headings alone, no pages of kernels/
    python -m kernels site --address https://HOST/OWNER/NAME    with links to the repository, to Binder and to Colab

The address is `repository-code` in CITATION.cff, where it stands there. A warning of Sphinx, a link that leads nowhere,
an image without words or a file that a page would fetch from elsewhere is an error.
"""
from __future__ import annotations

import argparse
import io
import shutil
import sys
import time
from pathlib import Path

from .. import records
from . import address as addresses
from . import faults, staging

OUT = records.ROOT / "build" / "site"
NEEDS = 'pip install -e ".[site]"'
STATIC = ("site.css", "favicon.svg")  # without an icon of its own a browser asks a server for one that is not there
SETTINGS = {
    "project": "Same Bits", "author": "the Same Bits authors", "copyright": "2026, the Same Bits authors",
    "language": "en", "root_doc": "index", "html_title": "Same Bits", "html_theme": "sphinx_book_theme",
    "extensions": ["myst_nb", "sphinx_copybutton"], "nb_execution_mode": "off", "nb_merge_streams": True,
    "myst_heading_anchors": 3, "myst_links_external_new_tab": False, "html_static_path": ["static"],
    "html_css_files": ["site.css"], "html_favicon": "static/favicon.svg", "html_last_updated_fmt": "",
    "copybutton_selector": "div.cell_input pre",
    "copybutton_exclude": ".linenos", "templates_path": [], "html_show_sphinx": False, "smartquotes": False,
    "html_context": {"default_mode": "auto"},
    "html_theme_options": {
        "home_page_in_toc": True, "show_navbar_depth": 1, "show_toc_level": 2, "use_download_button": True,
        "use_fullscreen_button": False, "navbar_persistent": [],
        "pygments_light_style": "a11y-high-contrast-light",
        "pygments_dark_style": "a11y-high-contrast-dark"},
}


def build(out=OUT, address: addresses.Address | None = None, names=("all",), sources: bool = True,
          jobs: int = 1) -> Path:
    """Write the site under `out`; the folder with its pages. Raises RuntimeError with the warnings or faults found.

    jobs: how many processes Sphinx may use.
    """
    from sphinx.application import Sphinx

    out = Path(out)
    shutil.rmtree(out, ignore_errors=True)
    words = staging.stage(out / "source", address, names, sources)
    (out / "source" / "static").mkdir()
    for name in STATIC:
        shutil.copy(Path(__file__).parent / name, out / "source" / "static")
    told, warned = io.StringIO(), io.StringIO()
    app = Sphinx(out / "source", None, out / "html", out / "doctrees", "html", settings(address), status=told,
                 warning=warned, freshenv=True, parallel=jobs)
    app.connect("doctree-read", lambda app, doctree: describe(doctree, words))
    app.build()
    for template in (out / "html" / "_static").glob("*webpack-macros.html"):
        template.unlink()  # the themes copy their templates along
    found = [line for line in warned.getvalue().splitlines() if line.strip()]
    found += faults.of(out / "html")
    if found or app.statuscode:
        raise RuntimeError("\n".join([f"{len(found)} faults of the site:", *found]))
    return out / "html"


def settings(address: addresses.Address | None) -> dict:
    options = dict(SETTINGS["html_theme_options"])
    if address:
        options |= {"repository_url": address.url, "repository_branch": address.branch,
                    "repository_provider": "github", "use_repository_button": True}
    return {**SETTINGS, "html_theme_options": options}


def describe(doctree, words: dict[str, str]) -> None:
    """Give each picture that a cell made its text alternative: myst-nb names its file by a hash of its bytes."""
    from docutils import nodes

    for image in doctree.findall(nodes.image):
        said = words.get(Path(image["uri"]).stem)
        if said:
            image["alt"] = said


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels site", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=["all"], help="notebooks: numbers, or all (default)")
    parser.add_argument("--out", type=Path, default=OUT, help="the folder to build in, which is emptied first")
    parser.add_argument("--address", help="the public repository (default: repository-code in CITATION.cff)")
    parser.add_argument("--no-sources", action="store_true", help="leave out the pages of kernels/")
    a = parser.parse_args(argv)
    if a.out.exists() and any(a.out.iterdir()) and not (a.out / "source" / "index.md").exists():
        raise ValueError(f"--out must be a folder of an earlier build or an empty one, got {a.out}")
    start = time.monotonic()
    html = build(a.out, addresses.known(a.address), a.names, not a.no_sources, jobs=2)
    print(f"{len(list(html.rglob('*.html')))} pages in {time.monotonic() - start:.0f} s: {html / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
