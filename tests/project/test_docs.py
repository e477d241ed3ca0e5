"""The documentation runs: every Python block of README and docs, its printed output, its links, its API pages."""

from __future__ import annotations

import contextlib
import io
import re
import runpy
import shlex
from pathlib import Path
from typing import Any

import pytest
import tyro

import marble_core
from reference import __main__ as reference_main

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)")


def blocks(page: Path) -> list[tuple[str, str, int]]:
    """Language and text of every fenced block, and how many lines of the page come before its text."""
    text = page.read_text(encoding="utf-8")
    return [(m[1], m[2], text.count("\n", 0, m.start(2))) for m in BLOCK.finditer(text)]


@pytest.mark.parametrize("page", [*PAGES, *ROOT.glob("*/README.md")], ids=lambda p: str(p.relative_to(ROOT)))
def test_code_fits_a_narrow_window(page: Path) -> None:
    wide = [line for _, text, _ in blocks(page) for line in text.splitlines() if len(line) > 88]
    assert not wide


def test_long_pages_begin_with_a_summary() -> None:
    """Pages of numbers alone have none."""
    for page in (ROOT / "docs").rglob("*.md"):
        text = page.read_text(encoding="utf-8")
        if len(text.split()) > 2000 and page.parent.name != "figures":
            assert "\n> **Summary" in text.partition("\n## ")[0], page


def run_page(page: Path) -> list[tuple[str, str]]:
    """Run a page's Python blocks in order, in one namespace; ``(printed, expected)`` where a text block follows."""
    namespace: dict[str, object] = {"__name__": page.stem}
    results, printed = [], None
    for language, text, lines_before in blocks(page):
        if language == "python":
            code = compile("\n" * lines_before + text, str(page), "exec")  # tracebacks then point into the page
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(code, namespace)
            printed = out.getvalue()
        elif language == "text" and printed is not None:
            results.append((printed, text))
            printed = None
    return results


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", [p for p in PAGES if any(b[0] == "python" for b in blocks(p))], ids=page_id)
def test_code_runs_and_prints_what_the_page_says(page: Path) -> None:
    for printed, expected in run_page(page):
        assert printed == expected


def test_readme_example_is_the_demo_and_prints() -> None:
    python = [text for language, text, _ in blocks(ROOT / "README.md") if language == "python"]
    assert python[0] == (ROOT / "examples" / "two_rewards.py").read_text(encoding="utf-8")
    assert len(run_page(ROOT / "README.md")) == 1
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 700


def anchors(page: Path) -> set[str]:
    """The names that a page's headings get in the built site, and on the pages of a code host."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    titles = [re.sub(r"[^\w\s-]", "", title).strip().lower() for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE)]
    return {re.sub(r"\s", "-", title) for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    """Also to a section, but for the names that docstrings give: those are in the built site alone."""
    for target, section in LINK.findall(page.read_text(encoding="utf-8")):
        there = page.parent / target if target else page
        assert there.exists(), f"{page_id(page)} links to {target}"
        if section and there.suffix == ".md" and not section.startswith("marble_core."):
            assert section in anchors(there), f"{page_id(page)} links to {target}#{section}"


def commands(page: Path) -> list[str]:
    """The lines of a page's shell blocks, continued ones joined, without comments."""
    texts = [text.replace("\\\n", " ") for language, text, _ in blocks(page) if language in ("bash", "text")]
    return [line.partition("  #")[0].strip() for text in texts for line in text.splitlines()]


class Parsed(Exception):
    """The command line was understood; nothing else is done."""


@pytest.mark.parametrize("page", [p for p in PAGES if any("-m reference" in c for c in commands(p))], ids=page_id)
def test_documented_commands_are_understood(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = tyro.cli

    def parse_only(*args: Any, **kwargs: Any) -> Any:
        found = real(*args, **kwargs)
        raise Parsed(found)

    monkeypatch.setattr(tyro, "cli", parse_only)
    monkeypatch.chdir(ROOT)
    found = 0
    for line in commands(page):
        _, marker, rest = line.partition("-m reference ")
        if not marker or "COMMAND" in rest:
            continue
        name, *flags = [word for word in shlex.split(rest) if word not in ("[flags]", "...")]
        found += 1
        if "--help" in (name, *flags):
            continue
        with pytest.raises(Parsed):  # a flag that is not understood is a SystemExit
            reference_main.parsed(name, reference_main.COMMANDS[name][0], flags)
    assert found


def test_documented_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = {word for page in PAGES for line in commands(page) if line.startswith("make ") for word in line.split()[1:]}
    assert named
    assert {word for word in named if "=" not in word} <= targets | {".venv"}


def test_every_public_module_has_an_api_page() -> None:
    modules = {p.stem for p in (ROOT / "marble_core").glob("*.py") if not p.stem.startswith("_")}
    assert {p.stem for p in (ROOT / "docs" / "api").glob("*.md")} == modules | {"rules", "index"}
    rules = (ROOT / "docs" / "api" / "rules.md").read_text(encoding="utf-8")
    for path in (ROOT / "marble_core" / "rules").glob("*.py"):
        assert path.stem == "__init__" or f"::: marble_core.rules.{path.stem}\n" in rules
    for name in modules:
        assert f"::: marble_core.{name}" in (ROOT / "docs" / "api" / f"{name}.md").read_text(encoding="utf-8")


def test_sections_that_docstrings_cite_exist() -> None:
    theory = (ROOT / "docs" / "theory.md").read_text(encoding="utf-8")
    numbers = [int(n) for n in re.findall(r"^## (\d+)\. ", theory, re.MULTILINE)]
    assert numbers == list(range(1, 15))
    for path in (ROOT / "marble_core").glob("*.py"):
        for cited in re.findall(r"theory\.md,\s+sections?\s+(\d+)", path.read_text(encoding="utf-8")):
            assert int(cited) in numbers, f"{path.name} cites section {cited}"


def test_version_is_the_changelogs_and_the_citations() -> None:
    assert f"## [{marble_core.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"version: {marble_core.__version__}" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_the_index_of_names_is_what_its_script_writes() -> None:
    names = runpy.run_path(str(ROOT / "docs" / "names.py"))
    assert names["FILE"].read_text(encoding="utf-8") == names["page"]()


def test_every_statement_of_the_theory_names_tests_that_exist() -> None:
    theory = (ROOT / "docs" / "theory.md").read_text(encoding="utf-8")
    table = theory[theory.index("## 14. Where each statement is checked") :]
    named = re.findall(r"`(test_\w+)`", table)
    assert len(named) > 25
    files = [*(ROOT / "property_tests").glob("*.py"), *(ROOT / "tests" / "core").glob("*.py")]
    there = {name for path in files for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.M)}
    assert set(named) <= there
    sections = {int(n) for n in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)}
    assert sections == set(range(2, 13))


def test_every_promise_names_tests_that_exist() -> None:
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (?!promise|---)(.+) \| (.+) \|$", text, re.MULTILINE)
    assert len(rows) > 20
    files = [*(ROOT / "property_tests").glob("*.py"), *(ROOT / "tests").rglob("*.py")]
    there = {name for path in files for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.M)}
    for promise, tests in rows:
        assert re.findall(r"`(test_\w+)`", tests), promise
        assert set(re.findall(r"`(test_\w+)`", tests)) <= there, promise
