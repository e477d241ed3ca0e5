"""What lies around the code: workflows that name what exists, hooks that are `make check`, files that run no code."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def test_workflows_name_tests_and_targets_that_exist() -> None:
    assert {path.stem for path in WORKFLOWS} == {"ci", "docs", "nightly", "release"}
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for path in WORKFLOWS:
        text = path.read_text(encoding="utf-8")
        assert all((ROOT / name).is_file() for name in re.findall(r"tests/test_\w+\.py", text))
        assert set(re.findall(r"make ([a-z-]+)", text)) <= targets


def test_what_the_core_job_runs_needs_the_core_alone() -> None:
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    names = re.findall(r"tests/test_\w+\.py", text)
    assert len(names) > 10
    for path in [*(ROOT / name for name in names), *(ROOT / "property_tests").glob("*.py"), ROOT / "conftest.py"]:
        found = re.findall(r"^(?:from|import) (\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert not {"reference", "peft", "diffusers", "transformers", "benchmarks"} & set(found), path.name


def test_the_picture_is_what_its_script_draws() -> None:
    picture = ROOT / "docs" / "figures" / "idea.svg"
    before = picture.read_bytes()
    runpy.run_path(str(ROOT / "docs" / "figures" / "idea.py"), run_name="__main__")
    assert picture.read_bytes() == before


def test_hooks_are_the_checks() -> None:
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    for check in ("ruff check", "ruff format", "mypy"):
        assert f"-m {check}" in hooks
        assert f"-m {check}" in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_no_file_is_read_as_a_pickle_that_runs_code() -> None:
    for folder in ("marble_core", "reference", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"\bpickle\.loads?\(", text), path
            for call in re.findall(r"torch\.load\((?:[^()]|\([^()]*\))*\)", text):
                assert "weights_only=True" in call, f"{path}: {call}"
