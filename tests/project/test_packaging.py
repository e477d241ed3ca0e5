"""Both distributions, built and installed beside nothing of this clone."""

from __future__ import annotations

import email
import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import marble_core
import reference

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


def run(*command: object, cwd: Path) -> str:
    done = subprocess.run([str(x) for x in command], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("wheels")
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder)
    run(*pip, ROOT, ROOT / "reference", cwd=folder)
    return {path.name.split("-")[0]: path for path in folder.glob("*.whl")}


@pytest.fixture(scope="module")
def python(wheels: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the two wheels, which finds the packages that they need in this one."""
    folder = tmp_path_factory.mktemp("clean") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    found = folder / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", found, "install", "--quiet", "--no-deps", "--no-index")
    run(*pip, *wheels.values(), cwd=folder.parent)
    site = next(folder.rglob("site-packages"))
    (site / "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")  # its own .pth files are not read
    return found


def metadata(wheel: Path) -> email.message.Message:
    with zipfile.ZipFile(wheel) as file:
        name = next(name for name in file.namelist() if name.endswith("METADATA"))
        return email.message_from_bytes(file.read(name))


def test_what_the_wheels_hold_and_promise(wheels: dict[str, Path]) -> None:
    assert set(wheels) == {"marble_core", "marble_reference"}
    core, trainer = (zipfile.ZipFile(wheels[name]).namelist() for name in ("marble_core", "marble_reference"))
    assert {name.split("/")[0] for name in core} == {"marble_core", f"marble_core-{marble_core.__version__}.dist-info"}
    assert "marble_core/py.typed" in core
    assert "marble_core/rules/marble.py" in core
    assert {name.split("/")[0] for name in trainer if ".dist-info" not in name} == {"reference"}
    assert any(name.startswith("reference/world/weights/") for name in trainer)
    assert not [name for name in trainer if re.search(r"pyproject|README|\.pyc$", name)]
    about = metadata(wheels["marble_core"])
    assert about.get_all("Requires-Dist") == ["torch>=2.6"]
    assert about.get_all("Provides-Extra") is None
    assert about.get_all("Project-URL")
    about = metadata(wheels["marble_reference"])
    assert about.get_all("Provides-Extra") == ["rewards"]
    assert "marble-core" in (about.get_all("Requires-Dist") or [])


def test_links_of_the_readme_survive_on_an_index_page(wheels: dict[str, Path]) -> None:
    """An index page knows no files of the repository."""
    for wheel in wheels.values():
        text = str(metadata(wheel).get_payload())
        links = re.findall(r"\]\(([^)]+)\)", text) + re.findall(r"(?:src|href)=\"([^\"]+)\"", text)
        assert links
        assert not [link for link in links if not link.startswith(("https://", "#"))]


def test_both_have_one_version() -> None:
    assert reference.__version__ == marble_core.__version__


def test_they_run_without_the_clone(python: Path, tmp_path: Path) -> None:
    where = "import marble_core, reference; print(marble_core.__file__, reference.__file__)"
    assert str(ROOT) not in run(python, "-c", where, cwd=tmp_path)
    assert marble_core.__version__ in run(python, "-m", "marble_core", "--version", cwd=tmp_path)
    assert "make-prompts" in run(python, "-m", "reference", "--help", cwd=tmp_path)
    flags = ("--preset", "tiny", "--epochs", "1", "--rewards", "colour", "jpeg")
    assert "report: " in run(python, "-m", "reference", "train", *flags, cwd=tmp_path)
