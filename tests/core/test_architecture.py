"""The shape of the library: what ``marble_core`` may import, in which direction, and what it exports."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import marble_core

PACKAGE = Path(marble_core.__file__).parent
MODULES = sorted(path for path in PACKAGE.glob("*.py") if path.stem not in ("__init__", "__main__"))
# Public modules that others may build on. Private ones (`_check`, `_min_norm`, ...) are open to every module.
EDGES = {
    "harmonize": {"gram", "simplex"},
    "ema": {"harmonize"},
    "noise_aware": {"simplex"},
    "upgrad": {"cone"},
}


def imported_modules(path: Path) -> set[str]:
    """Dotted names of every module that a file imports, at any depth of its code."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: a relative import"
            names.add(node.module or "")
            if node.module == "marble_core":
                names.update(f"marble_core.{alias.name}" for alias in node.names)
    return names


def inner_edges(path: Path) -> set[str]:
    """Modules of the package that a file imports."""
    return {name.split(".")[1] for name in imported_modules(path) if name.startswith("marble_core.")}


def public_names(path: Path) -> set[str]:
    """Functions, classes and constants of a module that have no leading underscore."""
    names: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names.update(target.id for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return {name for name in names if not name.startswith("_")}


def test_no_module_is_missed() -> None:
    assert len(MODULES) >= 9
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    assert folders == {PACKAGE, PACKAGE / "rules"}, "primitives are flat; rules, made of them, have a folder"


def test_no_primitive_knows_a_rule() -> None:
    for path in [*MODULES, PACKAGE / "__init__.py"]:
        assert "rules" not in inner_edges(path), path.name


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_torch_and_the_standard_library_alone(path: Path) -> None:
    allowed = {"torch", "marble_core"} | sys.stdlib_module_names
    foreign = {name for name in imported_modules(path) if name.split(".")[0] not in allowed}
    assert not foreign, f"{path.name} imports {sorted(foreign)}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_edges_are_few_and_run_one_way(path: Path) -> None:
    public = {name for name in inner_edges(path) if not name.startswith("_")}
    allowed = EDGES.get(path.stem, set())
    assert public <= allowed, f"{path.name} may import {sorted(allowed)} and private modules, not {sorted(public)}"
    if path.stem.startswith("_"):
        assert not public, f"{path.name} is below every public module"


def test_no_cycles() -> None:
    graph = {path.stem: inner_edges(path) for path in MODULES}
    while graph:
        leaves = [name for name, edges in graph.items() if not edges & graph.keys()]
        assert leaves, f"a cycle among {sorted(graph)}"
        for name in leaves:
            del graph[name]


def test_modules_do_not_import_through_the_package() -> None:
    stems = {path.stem for path in MODULES}
    for path in MODULES:
        assert inner_edges(path) <= stems, f"{path.name}: import from the module that defines the name"


@pytest.mark.parametrize("path", [p for p in MODULES if not p.stem.startswith("_")], ids=lambda path: path.stem)
def test_everything_public_is_exported(path: Path) -> None:
    module = sys.modules[f"marble_core.{path.stem}"]
    for name in public_names(path):
        assert name in marble_core.__all__, f"{path.stem}.{name} is public but not in marble_core.__all__"
        # By value, not by name: a function may share the name of its module.
        assert getattr(marble_core, name) is getattr(module, name)


def test_all_lists_nothing_else() -> None:
    assert len(marble_core.__all__) == len(set(marble_core.__all__))
    defined = set().union(*(public_names(path) for path in MODULES if not path.stem.startswith("_")))
    # A type that users name may live in a private module.
    private = set().union(*(public_names(path) for path in MODULES if path.stem.startswith("_")))
    for name in marble_core.__all__:
        assert name in defined | private, f"{name} is exported but defined nowhere"


def test_the_package_is_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()
