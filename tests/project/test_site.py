"""The built documentation: no broken link, no formula and no table left as it was written. ``make docs`` builds it."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import urllib.parse
from html.parser import HTMLParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("zensical") is None, reason="the packages of make docs are not here"),
]


class Page(HTMLParser):
    """Links, names and text of a page, with code and formulas apart."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.names: set[str] = set()
        self.text: list[str] = []
        self.code: list[str] = []
        self.formulas: list[str] = []
        self.inside: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.names |= {value for key in ("id", "name") if (value := given.get(key))}
        self.links += [value for key in ("href", "src") if (value := given.get(key))]
        if tag in ("code", "pre", "script", "style", "math"):
            self.inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self.inside and tag == self.inside[-1]:
            self.inside.pop()

    def handle_data(self, data: str) -> None:
        where = {"code": self.code, "math": self.formulas}
        (where.get(self.inside[-1], []) if self.inside else self.text).append(data)


def build_site(folder: Path) -> Path:
    """The folder of the site, built in a copy of what it is made from."""
    for name in ("docs", "marble_core"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "data"))
    shutil.copy(ROOT / "mkdocs.yml", folder)
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "site"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Page]:
    built = build_site(tmp_path_factory.mktemp("clone"))
    return {path: Page(path) for path in built.rglob("*.html") if path.name != "404.html"}


def test_every_link_leads_somewhere(site: dict[Path, Page]) -> None:
    assert len(site) > 30
    broken = []
    for path, page in site.items():
        for link in page.links:
            where = urllib.parse.urlsplit(link)
            if where.scheme or where.netloc or link.startswith("//"):
                continue
            target = (path.parent / urllib.parse.unquote(where.path)).resolve() if where.path else path
            if "data/" in where.path:  # archives, which this copy leaves out
                continue
            there = target.is_file() and (
                not where.fragment or target not in site or where.fragment in site[target].names
            )
            if not there and where.fragment != "__skip":
                broken.append(f"{path.name}: {link}")
    assert not broken


def test_nothing_is_left_as_it_was_written(site: dict[Path, Page]) -> None:
    for path, page in site.items():
        text = "".join(page.text)
        assert "klzzwxh" not in text, path
        assert not re.search(r"\\(?:frac|sum|lVert|langle|alpha|mathbb)\b", text), path
        assert not re.search(r"\$[^$\n]{1,80}\$", text), path
        assert not [code for code in page.code if "\\|" in code], path
        assert not [formula for formula in page.formulas if "\\" in formula], path  # a command it does not know
