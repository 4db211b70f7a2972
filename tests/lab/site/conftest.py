"""A site of one notebook, built once for all tests of pages, and a browser."""
import warnings
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from kernels.lab.site import build
from kernels.lab.site.address import Address
from tests.browsers import chromium

OWN = ("file:", "data:", "http://127.0.0.1:")  # what a page may ask for
ADDRESS = Address("https://example.org/someone/same-bits")


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The folder of the built pages: notebook 00, the texts, the proof; with an address, without sources."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PendingDeprecationWarning)  # of Sphinx, about what MyST-Parser calls
        return build.build(tmp_path_factory.mktemp("site") / "site", ADDRESS, ("00",), sources=False)


@pytest.fixture(scope="session")
def served(site):
    """The address of the pages on loopback: the search reads the pages that it found, which a file may not."""
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")  # not longer: one Playwright at a time can be open in a process
def browser():
    with chromium("page") as launched:
        yield launched


@pytest.fixture
def page(browser):
    """A page of the browser; in the end no script may have failed, warned, or asked another machine for anything."""
    opened, wrong = browser.new_page(), []
    opened.set_default_timeout(120_000)  # ms: other tests run beside these, and a slow page is no fault
    opened.on("console", lambda said: wrong.append(said.text) if said.type in ("error", "warning") else None)
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on("request", lambda asked: None if asked.url.startswith(OWN) else wrong.append(asked.url))
    yield opened
    opened.close()
    assert wrong == []
