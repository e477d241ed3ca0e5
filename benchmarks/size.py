"""How long the trainer is to read: the way from a prompt to the optimiser step, the longest functions.

python -m benchmarks.size
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PATH = ("train.py", "step/rollout.py", "step/batch.py", "step/gradients.py", "step/balance.py")


class Function(NamedTuple):
    """A function of the code.

    Attributes:
        name: file and name.
        lines: of its body, without its docstring and blank lines.
        arguments: how many it takes, without self.
    """

    name: str
    lines: int
    arguments: int


def lines_of(path: str) -> int:
    """Lines of a file of ``reference/``."""
    return len((ROOT / "reference" / path).read_text(encoding="utf-8").splitlines())


def functions(package: str) -> Iterator[Function]:
    """All functions of a package."""
    for path in sorted((ROOT / package).rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        source = text.splitlines()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                inside = source[body[0].lineno - 1 : node.end_lineno] if body else []
                a = node.args
                names = [x.arg for x in (*a.posonlyargs, *a.args, *a.kwonlyargs) if x.arg not in ("self", "cls")]
                written = sum(bool(line.strip()) for line in inside)
                yield Function(f"{path.relative_to(ROOT)}:{node.name}", written, len(names))


def main() -> None:
    """Print the figures."""
    print("from a prompt to the optimiser step:")
    for path in PATH:
        print(f"  {lines_of(path):5} reference/{path}")
    print(f"  {sum(map(lines_of, PATH)):5} lines")
    for package in ("marble_core", "reference"):
        found = list(functions(package))
        files = list((ROOT / package).rglob("*.py"))
        total = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files)
        print(f"{package}: {total} lines in {len(files)} files, {len(found)} functions")
        for f in sorted(found, key=lambda f: -f.lines)[:5]:
            print(f"  {f.lines:5} lines      {f.name}")
        for f in sorted(found, key=lambda f: -f.arguments)[:5]:
            print(f"  {f.arguments:5} arguments  {f.name}")


if __name__ == "__main__":
    main()
