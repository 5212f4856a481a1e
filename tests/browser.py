"""A real browser for the tests that need one: Chromium, found and opened in one place."""
from contextlib import contextmanager
from importlib.util import find_spec
import shutil

import pytest

CHROMIUM = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None)
WHY = "no Chromium or no playwright here: apt-get install chromium (Debian), pip install -e '.[dev]'"
THERE = CHROMIUM and find_spec("playwright")
needs_browser = pytest.mark.skipif(not THERE, reason=WHY)  # of tests that start a server before they open a page

@contextmanager
def chromium():
    "The browser; without one the test is skipped."
    if not THERE: pytest.skip(WHY)
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()

@contextmanager
def opened():
    "A page of it, as wide as a laptop's window."
    with chromium() as browser:
        page = browser.new_page(viewport=dict(width=1280, height=900))
        page.set_default_timeout(120_000)
        yield page
