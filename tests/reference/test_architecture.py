"""The shape of the trainer: imports run one way, from the command line down to the leaves."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import reference
from benchmarks import size

ROOT = Path(reference.__file__).parent
MODULES = sorted(path for path in ROOT.rglob("*.py") if path.stem != "__init__")
# Folders and files of the trainer's own level, a line each floor: each imports from those above it alone.
FLOORS = (
    ("errors", "splits", "quiet"),
    ("text_files", "tensor_files", "processes"),
    ("config",),
    ("interfaces",),
    ("world",),
    ("prompts", "policy"),
    ("rewards",),
    ("step",),
    ("run",),
    ("train",),
    ("experiments",),
    ("commands",),
    ("__main__",),
)
FLOOR = {folder: number for number, floor in enumerate(FLOORS) for folder in floor}


def name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imports(path: Path) -> set[str]:
    """Modules of the trainer that a file imports, at any depth of its code."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: a relative import"
            found.add(node.module or "")
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return {n.removeprefix("reference.") for n in found if n.startswith("reference.")}


def folder(module: str) -> str:
    """The first part of a module's name."""
    return module.split(".")[0]


def test_every_folder_has_its_floor() -> None:
    assert {folder(name(path)) for path in MODULES} == set(FLOOR)


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_imports_run_down_the_floors(path: Path) -> None:
    own = folder(name(path))
    others = {folder(other) for other in imports(path)} & set(FLOOR) - {own}
    wrong = {other for other in others if FLOOR[other] >= FLOOR[own]}
    assert not wrong, f"{name(path)} imports {sorted(wrong)}"


def test_no_circle_within_a_folder() -> None:
    edges = {name(path): imports(path) & {name(other) for other in MODULES} for path in MODULES}
    free: set[str] = set()
    while len(free) < len(edges):
        more = {module for module, others in edges.items() if module not in free and others - {module} <= free}
        assert more, f"a circle among {sorted(set(edges) - free)}"
        free |= more


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_the_trainer_uses_the_public_core_alone(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("marble_core"):
            assert node.module in ("marble_core", "marble_core.rules")
            assert not [alias.name for alias in node.names if alias.name.startswith("_")]


def test_who_harmonizes() -> None:
    users = {name(p) for p in MODULES if "harmonize(" in p.read_text(encoding="utf-8")}
    assert users == {"step.measurement", "experiments.candidates", "experiments.settle", "experiments.stress"}


def test_the_trainer_is_short_to_read() -> None:
    """``python -m benchmarks.size`` prints these figures."""
    assert size.lines_of("train.py") <= 220
    assert sum(map(size.lines_of, size.PATH)) <= 900
    for package in ("marble_core", "reference"):
        long = [f for f in size.functions(package) if f.lines > 40 or f.arguments > 7]
        assert not long
