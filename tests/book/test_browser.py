"""Open every page of the built book in headless Chromium, as a phone and in the dark.

Run after the book is built (``pytest -m book``). A missing browser is an error in CI and a clear
message elsewhere.
"""

from __future__ import annotations

import functools
import http.server
import os
import shutil
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HTML = ROOT / "_build" / "html"
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PAGES = sorted(
    page.relative_to(HTML).as_posix()
    for page in HTML.rglob("*.html")
    if not page.relative_to(HTML).as_posix().startswith(("_static", "_modules"))
)
pytestmark = [pytest.mark.book, pytest.mark.xdist_group("browser")]


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def address():
    if not (HTML / "index.html").exists():
        pytest.fail("the book is not built: run `make book` first")
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(_Quiet, directory=str(HTML))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture(scope="module")
def browser():
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if found is None:
        message = "no Chromium found: install it, or name it in the environment variable CHROMIUM"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=found, args=FLAGS)
        yield running
        running.close()


@pytest.fixture
def page(browser, address):
    """A phone in dark mode whose troubles are collected in ``page.troubles``."""
    context = browser.new_context(
        viewport={"width": 390, "height": 844}, color_scheme="dark", base_url=address
    )
    page = context.new_page()
    page.troubles = []
    page.on("console", lambda m: m.type == "error" and page.troubles.append(m.text))
    page.on("pageerror", lambda error: page.troubles.append(str(error)))
    page.on("requestfailed", lambda request: page.troubles.append(f"failed: {request.url}"))
    page.on(
        "request",
        lambda request: (
            request.url.startswith(("http", "ws"))
            and not request.url.startswith(address)
            and page.troubles.append(f"outside: {request.url}")
        ),
    )
    yield page
    context.close()


def _open(page, name):
    page.goto(name, wait_until="networkidle")
    if page.locator(".math").count():
        page.wait_for_function("window.MathJax?.startup?.promise", timeout=20_000)
        page.evaluate("MathJax.startup.promise")


def _plain_math(page):
    """Formulas that MathJax left as they were or could not read."""
    return page.evaluate(
        """[...document.querySelectorAll('.math')]
           .filter(e => !e.querySelector('mjx-container') || e.querySelector('mjx-merror'))
           .map(e => e.textContent)"""
    )


@pytest.mark.parametrize("name", PAGES)
def test_page_is_whole_on_a_dark_phone(page, name):
    _open(page, name)
    assert page.troubles == []
    assert _plain_math(page) == []
    widths = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert widths[0] <= widths[1], f"wider than a phone: {widths}"
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    assert page.locator("article h1, main h1, h1").count() >= 1


@pytest.mark.parametrize("name", [page for page in PAGES if page.startswith("chapters/")])
def test_pictures_stand_once_and_have_alt_text(page, name):
    _open(page, name)
    counts = page.evaluate(
        """[...document.querySelectorAll('.cell_output')]
           .map(e => e.querySelectorAll('img').length)"""
    )
    assert max(counts, default=0) <= 1
    alts = page.evaluate(
        """[...document.querySelectorAll('.cell_output img, article figure img')].map(e => e.alt)"""
    )
    assert all(len(alt.split()) >= 8 for alt in alts), alts


@pytest.mark.parametrize("name", [page for page in PAGES if page.startswith("chapters/")])
def test_code_fits_between_the_side_bars_of_a_small_laptop(browser, address, name):
    page = browser.new_page(viewport={"width": 1280, "height": 800}, base_url=address)
    page.goto(name, wait_until="networkidle")
    cut = page.evaluate(
        """[...document.querySelectorAll('.cell_input pre, .cell_output .stream pre')]
           .filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.textContent.slice(0, 80))"""
    )
    page.close()
    assert cut == []


def test_search_finds_a_word(page):
    page.goto("search.html?q=partition", wait_until="networkidle")
    page.wait_for_selector("#search-results li", timeout=20_000)
    assert page.troubles == []


def test_colab_button_opens_the_notebook(page):
    _open(page, "chapters/crf.html")
    links = page.evaluate(
        "[...document.querySelectorAll('a[href*=\"colab\"]')].map(a => a.getAttribute('href'))"
    )
    assert links, "no Colab button"
    assert links[0].endswith("/chapters/crf.ipynb")
    assert (ROOT / "chapters/crf.ipynb").exists()


def test_dark_and_light_follow_the_reader(browser, address):
    grounds = set()
    for scheme in ("light", "dark"):
        context = browser.new_context(color_scheme=scheme, base_url=address)
        page = context.new_page()
        page.goto("chapters/crf.html", wait_until="networkidle")
        grounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        context.close()
    assert len(grounds) == 2
