"""Pages in a browser: the built documentation and a run's report, at the width of a desktop and of a phone.

Needs the packages of ``make docs`` and a Chromium: one that ``playwright install chromium`` brought, or the system's.
"""

from __future__ import annotations

import functools
import importlib.util
import shutil
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from reference.run.report import write_report
from tests.project.test_site import build_site
from tests.reference.test_report import records, write_run

_CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
_PACKAGES = all(importlib.util.find_spec(name) for name in ("zensical", "playwright"))
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not _PACKAGES, reason="the packages of make docs are not here")]

# What is wider than the window and does not scroll by itself, with the first words of its text.
_TOO_WIDE = """() => {
    const width = document.documentElement.clientWidth, found = [];
    if (document.documentElement.scrollWidth > width) found.push("the page");
    for (const e of document.querySelectorAll("pre, table, math, svg, img, figure, p, h1, h2")) {
        let inside = false;
        for (let p = e; p && p !== document.body; p = p.parentElement)
            inside ||= ["auto", "scroll", "hidden"].includes(getComputedStyle(p).overflowX);
        if (!inside && e.getClientRects().length && e.getBoundingClientRect().right > width + 1)
            found.push(e.tagName + " " + e.textContent.slice(0, 40));
    }
    return found;
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import Error, sync_playwright

    with sync_playwright() as playwright:
        try:
            found = playwright.chromium.launch(executable_path=_CHROMIUM, args=["--no-sandbox"])
        except Error as error:
            pytest.skip(f"no Chromium: {error}")
        yield found
        found.close()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_site(tmp_path_factory.mktemp("clone"))


@pytest.fixture(scope="module")
def served(site: Path) -> Iterator[str]:
    """The site's address on a server of its own."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a made-up run with pictures, long names and many rewards."""
    run = write_run(tmp_path_factory.mktemp("runs") / "a-run-with-quite-a-long-name-of-its-own", *records())
    (run / "grids").mkdir()
    for name in ("before", "after"):
        Image.new("RGB", (960, 384), "grey").save(run / "grids" / f"{name}.png")
        tiles = [f'{{"prompt": "{"a_word_without_a_space" * 4}", "scores": {{"text": 0.5}}}}'] * 40
        text = f'{{"columns": 10, "tiles": [{", ".join(tiles)}]}}'
        (run / "grids" / f"{name}.json").write_text(text, encoding="utf-8")
    return write_report(run)


def faults_of(page: Any, address: str) -> list[str]:
    """What the console says, and what is too wide."""
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(address)
    page.wait_for_timeout(100)  # for what scripts ask for
    return [*page.evaluate(_TOO_WIDE), *said]


@pytest.mark.parametrize("width", [1280, 390])
def test_every_page_of_the_site_fits_and_says_no_error(browser: Any, site: Path, served: str, width: int) -> None:
    found = {}
    for path in sorted(site.rglob("*.html")):
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme="dark")
        if faults := faults_of(page, f"{served}/{path.relative_to(site)}"):
            found[path.name] = faults
        page.close()
    assert not found


def test_the_site_opens_from_disk(browser: Any, site: Path) -> None:
    """Pages, links and style need no server. The search does: its index is a script that a server alone hands out."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    failed: list[str] = []
    page.on("requestfailed", lambda request: failed.append(request.url))
    page.goto((site / "index.html").as_uri())
    page.get_by_role("link", name="Theory").first.click()
    page.wait_for_load_state("networkidle")
    assert page.url.endswith("/theory.html")
    assert [url for url in failed if not url.endswith("/search.js")] == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_a_report_fits(browser: Any, report: Path, width: int, scheme: str) -> None:
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    assert faults_of(page, report.as_uri()) == []


def test_the_first_screen_of_a_report_answers_at_a_phone_s_width(browser: Any, report: Path) -> None:
    """What rose, what fell, and each reward's verdict stand within the window, without scrolling to the side."""
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.goto(report.as_uri())
    answer = page.locator("p b").first.bounding_box()
    verdicts = page.locator("th", has_text="verdict").first.bounding_box()
    page.close()
    assert answer is not None
    assert verdicts is not None
    assert answer["y"] < 300
    assert verdicts["x"] + verdicts["width"] < 390
