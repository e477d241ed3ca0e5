"""The shape of the trainer: imports run one way, from the command line down to the leaves."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import reference

ROOT = Path(reference.__file__).parent
MODULES = sorted(path for path in ROOT.rglob("*.py") if path.stem != "__init__")
# A module may import from those above it alone.
ORDER = (
    "errors",
    "splits",
    "quiet",
    "text_files",
    "intervals",
    "config",
    "presets",
    "toml",
    "devices",
    "distributed",
    "geneval_prompts",
    "made_prompts",
    "prompt_files",
    "validation",
    "scoring",
    "checkpoint",
    "world.scenes",
    "world.render",
    "world.model",
    "world.pretrain",
    "world.similarity",
    "world.readers",
    "world.rewards",
    "world.accuracy",
    "rewards.clip",
    "rewards.pickscore",
    "rewards.hpsv2",
    "rewards.clipscore",
    "rewards.aesthetic",
    "rewards.imagereward",
    "rewards.ocr",
    "rewards.detector",
    "rewards.geneval",
    "rewards.unifiedreward",
    "scorer",
    "base",
    "embeddings",
    "sd3",
    "prompts",
    "policy",
    "sharding",
    "model",
    "rollout",
    "live",
    "watch",
    "report",
    "estimate",
    "rows",
    "balance",
    "progress",
    "evaluate",
    "batch",
    "inputs",
    "state",
    "held_out",
    "plan",
    "train",
    "generate",
    "experiments.records",
    "experiments.peers",
    "experiments.controls",
    "experiments.bank",
    "experiments.tilt",
    "experiments.diagnose",
    "experiments.settle",
    "experiments.stress",
    "experiments.settle_tables",
    "experiments.statistics",
    "experiments.comparison",
    "experiments.compare",
    "experiments.demo",
    "experiments.paper",
    "experiments.summary",
    "experiments.evaluation",
    "arguments",
    "__main__",
)


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
    return {n.removeprefix("reference.") for n in found if n.startswith("reference.")} & set(ORDER)


def test_every_module_has_its_place() -> None:
    assert {name(path) for path in MODULES} == set(ORDER)


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_imports_run_one_way(path: Path) -> None:
    place = ORDER.index(name(path))
    below = {other for other in imports(path) if ORDER.index(other) >= place}
    assert not below, f"{name(path)} imports {sorted(below)}"


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_the_trainer_uses_the_public_core_alone(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("marble_core"):
            assert node.module in ("marble_core", "marble_core.rules")
            assert not [alias.name for alias in node.names if alias.name.startswith("_")]


def test_only_balance_harmonizes() -> None:
    users = {name(p) for p in MODULES if "harmonize(" in p.read_text(encoding="utf-8")}
    assert users == {"balance", "experiments.settle", "experiments.stress"}
