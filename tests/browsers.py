"""Chromium for the tests that use a page as a reader would."""
import contextlib
import os
import shutil

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]


@contextlib.contextmanager
def chromium(what: str):
    """Chromium, or a skip that says why (a failure where SAME_BITS_REQUIRE_BROWSER=1). `what` cannot be opened then."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        why = f"none of {', '.join(BROWSERS)} is installed, so no {what} can be opened in a browser"
        if os.environ.get("SAME_BITS_REQUIRE_BROWSER") == "1":
            pytest.fail(why)
        pytest.skip(why)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=found, args=FLAGS)
        yield launched
        launched.close()
