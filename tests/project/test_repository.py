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
        for command in re.findall(r"run: pytest (.+)", text):
            assert all((ROOT / name).exists() for name in command.split())
        assert set(re.findall(r"make ([a-z-]+)", text)) <= targets


def test_what_the_core_job_runs_needs_the_core_alone() -> None:
    assert "pytest property_tests tests/core\n" in (ROOT / ".github" / "workflows" / "ci.yml").read_text(
        encoding="utf-8"
    )
    files = [*(ROOT / "property_tests").glob("*.py"), *(ROOT / "tests" / "core").glob("*.py")]
    assert len(files) > 20
    for path in [*files, ROOT / "conftest.py", ROOT / "tests" / "conftest.py"]:
        found = re.findall(r"^(?:from|import) (\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert not {"reference", "peft", "diffusers", "transformers", "benchmarks"} & set(found), path.name


def test_what_the_lock_pins_is_what_make_installs() -> None:
    lock = (ROOT / "uv.lock").read_text(encoding="utf-8")
    assert set(re.findall(r"registry = \"([^\"]+)\"", lock)) == {"https://pypi.org/simple"}
    locked = set(re.findall(r"name = \"([^\"]+)\"\nversion = \"([^\"]+)\"", lock))
    pins = re.findall(r"^([\w.-]+)==([^ \n]+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(pins) > 100
    assert set(pins) <= locked


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
