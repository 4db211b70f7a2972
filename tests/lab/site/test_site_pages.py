"""The static site, of notebook 00 alone: what its pages hold, and that a browser shows them without an error."""
import re

import pytest

from kernels.lab.site import build, faults
from kernels.lab.site.faults import Page


@pytest.fixture(scope="session")
def notebook(site):
    return (site / "notebooks" / "00_start_here.html").read_text(encoding="utf-8")


def test_it_has_the_texts_and_the_search(site):
    for name in ("index.html", "proof.html", "CONTRIBUTING.html", "data/README.html", "notebooks/TEACHING.html",
                 "search.html", "searchindex.js", "_images/rms_norm_time.png"):
        assert (site / name).is_file(), name
    assert len(list(site.glob("_downloads/*/handout.pdf"))) == 1
    assert "specification" in (site / "searchindex.js").read_text(encoding="utf-8")


def test_every_picture_has_its_words(notebook):
    alts = re.findall(r'<img alt="([^"]+)"', notebook)
    assert len(alts) >= 3 and any("RMSNorm in a fixed order takes" in alt for alt in alts)
    assert len(alts) == notebook.count("<img ")


def test_a_widget_is_a_picture(notebook):
    assert "(a widget: run the notebook to use it)" not in notebook
    assert notebook.count("This is how the widget opens.") == 1
    pictures = re.findall(r'src="(\.\./_images/[0-9a-f]{64}\.png)"', notebook)
    assert len(pictures) == len(set(pictures)) + 1, "the slider's picture is that of the chart before it"


def test_solutions_are_folded(notebook):
    folds = re.findall(r"<details><summary>Solution</summary>(.*?)</details>", notebook, re.S)
    assert len(folds) >= 2 and all("highlight" in fold for fold in folds)
    outside = re.sub(r"<details><summary>Solution</summary>.*?</details>", "", notebook, flags=re.S)
    assert "# solution" in notebook and "# solution" not in outside


def test_pages_lead_on_and_back(site, notebook):
    assert re.search(r'class="right-next"\s+href="01_add_floats_in_any_order.html"', notebook)
    assert re.search(r'class="left-prev"\s+href="\.\./index.html"', notebook)
    assert 'href="notebooks/00_start_here.html"' in (site / "index.html").read_text(encoding="utf-8")


def test_binder_and_colab_appear_with_the_address(notebook):
    file = "notebooks/00_start_here.ipynb"
    assert f"https://mybinder.org/v2/gh/someone/same-bits/main?urlpath=lab/tree/{file}" in notebook
    assert f"https://colab.research.google.com/github/someone/same-bits/blob/main/{file}" in notebook
    assert "https://example.org/someone/same-bits" in notebook


def test_the_style_sheet_of_jupyterlab_is_left_out(notebook):
    assert "jp-RenderedMarkdown" not in notebook


@pytest.mark.parametrize("change, said", [
    (lambda text: text.replace('href="../proof.html"', 'href="../no_such.html"', 1), "leads nowhere: ../no_such.html"),
    (lambda text: text.replace("<article", '<a href="#no-place">x</a><article', 1), "leads nowhere: #no-place"),
    (lambda text: re.sub(r'<img alt="[^"]+"', '<img alt=" "', text, count=1), "an image without words"),
    (lambda text: text.replace("</head>", '<script src="https://cdn.example.org/x.js"></script></head>', 1),
     "fetched from elsewhere: https://cdn.example.org/x.js")])
def test_a_fault_of_a_page_is_found(change, said, site, notebook):
    path = site / "notebooks" / "00_start_here.html"
    assert faults.of(site) == []
    path.write_text(change(notebook), encoding="utf-8")
    try:
        found = faults.of(site)
    finally:
        path.write_text(notebook, encoding="utf-8")
    assert found and all(line.startswith("notebooks/00_start_here.html: ") and said in line for line in found)


def test_an_image_that_says_that_it_says_nothing_is_no_fault():
    assert Page('<img src="x.png" alt="" aria-hidden="true">').unsaid == []
    assert Page('<img src="x.png">').unsaid == ["x.png"]


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1920])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_page_is_readable_on_a_telephone_and_on_a_large_screen(width, theme, site, page):
    page.emulate_media(color_scheme=theme)
    page.set_viewport_size({"width": width, "height": 900})
    for name in ("notebooks/00_start_here.html", "data/README.html"):
        page.goto((site / name).as_uri())
        assert page.evaluate("document.documentElement.dataset.theme") == theme
        assert page.evaluate("document.documentElement.scrollWidth") <= width, f"{name} is wider than the screen"
        letters, line = page.evaluate("""[...document.querySelectorAll('article section > p')].map(p =>
            [parseFloat(getComputedStyle(p).fontSize), p.getBoundingClientRect().width]).reduce(
            ([a, b], [c, d]) => [Math.min(a, c), Math.max(b, d)])""")
        assert letters >= 14 and 300 < line <= width


@pytest.mark.browser
def test_a_reader_searches_and_leafs_by_keyboard(served, page):
    page.goto(f"{served}/search.html?q=specification")
    page.get_by_role("link", name="00 · Start here").first.wait_for()
    page.goto(f"{served}/index.html")
    for _ in range(6):  # past the search and into the list of pages: where they are is seen at every stop
        page.keyboard.press("Tab")
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.locator(".right-next").focus()
    page.keyboard.press("Enter")
    page.wait_for_url("**/00_start_here.html")
    summary = page.get_by_text("Solution", exact=True).first
    summary.focus()
    page.keyboard.press("Enter")
    assert page.get_by_text("# solution 00.1").is_visible()


def test_a_folder_that_holds_something_else_is_not_emptied(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="--out must be a folder of an earlier build or an empty one"):
        build.main(["00", "--out", str(tmp_path)])
    assert (tmp_path / "thesis.tex").read_text() == "mine"
