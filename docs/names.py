"""Write ``api/index.md``: every public name of marble_core with the first sentence about it."""

from __future__ import annotations

import inspect
from pathlib import Path

import marble_core
from marble_core import rules

FILE = Path(__file__).parent / "api" / "index.md"


def page() -> str:
    """The index as Markdown."""
    lines = ["# All names", "", "| name | what it is |", "|---|---|"]
    for package in (rules, marble_core):
        for name in sorted(package.__all__, key=str.lower):
            thing = getattr(package, name)
            module = inspect.getmodule(thing) if callable(thing) else None
            where = module.__name__ if module is not None else "marble_core.ema"
            file = "rules" if where.startswith("marble_core.rules") else where.rpartition(".")[2]
            text = (inspect.getdoc(thing) or "") if callable(thing) else "A decay schedule."
            about = text.split("\n\n")[0].replace("\n", " ")
            about = about.replace("``", "`").replace("|", "&#124;")
            full = f"rules.{name}" if package is rules else name
            place = f"#{where}.{name}" if callable(thing) else ""
            lines.append(f"| [`{full}`]({file}.md{place}) | {about} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    FILE.write_text(page(), encoding="utf-8")
