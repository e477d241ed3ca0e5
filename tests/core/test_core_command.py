"""``python -m marble_core``: saved gradients of every form, and files that are none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import marble_core
from marble_core.__main__ import gradients_of, main, read, read_safetensors

A, B = torch.tensor([10.0, 0.0]), torch.tensor([-0.6, 0.8])


def test_every_form_is_the_same_to_it(tmp_path: Path) -> None:
    forms: dict[str, Any] = {
        "vectors": {"text": A, "colour": B},
        "list": [A, B],
        "stacked": {"w": torch.stack([A, B])},
        "matrix": torch.stack([A, B]),
        "trees": {"text": {"x": A[:1], "y": A[1:]}, "colour": {"x": B[:1], "y": B[1:]}},
        "blocks": {"x": torch.stack([A[:1], B[:1]]), "y": torch.stack([A[1:], B[1:]])},
    }
    for name, form in forms.items():
        torch.save(form, tmp_path / f"{name}.pt")
        names, rows = gradients_of(read(tmp_path / f"{name}.pt"))
        assert names == (["text", "colour"] if name in ("vectors", "trees") else ["0", "1"])
        assert torch.allclose(marble_core.gram_matrix(rows), torch.tensor([[100.0, -6.0], [-6.0, 1.0]]).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_safetensors_are_read_without_its_package(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {"a": torch.randn(2, 3, 4).to(dtype), "b": torch.randn(2, 5).to(dtype), "ids": torch.arange(3)}
    save_file(tensors, tmp_path / "g.safetensors", metadata={"made": "here"})
    found = read_safetensors(tmp_path / "g.safetensors")
    assert found.keys() == {"a", "b"}
    assert all(torch.equal(found[name], tensors[name]) for name in found)


def test_what_it_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"text": A, "colour": B}, tmp_path / "g.safetensors")
    assert main([str(tmp_path / "g.safetensors")]) == 0
    said = capsys.readouterr().out
    assert "2 gradients of 2 numbers" in said
    assert "colour against text: cosine -0.600" in said or "text against colour: cosine -0.600" in said
    assert "1 of 1 pairs point apart" in said
    assert "lowers colour" in next(line for line in said.splitlines() if line.startswith("plain sum"))
    assert "lowers" not in next(line for line in said.splitlines() if line.startswith("marble"))
    assert "improves all rewards; its cosine with each is at least +0.447" in said
    torch.save([A, -A], tmp_path / "opposed.pt")
    assert main([str(tmp_path / "opposed.pt")]) == 0
    assert "Pareto-stationary" in capsys.readouterr().out
    torch.save([A, B, 0 * A], tmp_path / "silent.pt")
    assert main([str(tmp_path / "silent.pt")]) == 0
    said = capsys.readouterr().out
    assert "Without signal, left out: 2." in said
    assert float(said.partition("squared length within ")[2].split()[0]) < 1e-12  # of those with signal
    assert "2 gradients of nothing but noise would show 0.707" in said
    assert "nan" not in said
    torch.save({"10": A, "1": B, "0": torch.nan * A}, tmp_path / "broken.pt")
    assert main([str(tmp_path / "broken.pt")]) == 0
    said = capsys.readouterr().out
    assert "NaN or infinite, left out of all that follows: 0." in said
    assert "improves all rewards; its cosine with each is at least +0.447" in said
    assert "nan" not in said
    torch.save([torch.nan * A, torch.inf * B], tmp_path / "nothing.pt")
    assert main([str(tmp_path / "nothing.pt")]) == 0
    assert capsys.readouterr().out.endswith("left out of all that follows: 0, 1.\n")


class Evil:
    """What a pickle must not run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit('run')",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": A}, "expected one vector a reward"),
        ({"a": A, "b": torch.ones(3)}, "expected one vector a reward"),
        ({"a": torch.ones(2, 3), "b": torch.ones(3, 3)}, "expected one vector a reward"),
        ({}, "expected one vector a reward"),
        (3.0, "expected one vector a reward"),
        (Evil(), "weights_only=True"),
    ],
)
def test_what_cannot_be_used_is_one_line(
    content: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(content, tmp_path / "g.pt")
    assert main([str(tmp_path / "g.pt")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_files_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, data in (("a.safetensors", b"\x00" * 4), ("b.safetensors", b"\xff" * 64), ("c.pt", b"no"), ("d.pt", b"")):
        (tmp_path / name).write_bytes(data)
        assert main([str(tmp_path / name)]) == 2
    assert main([str(tmp_path / "none.pt")]) == 2
    assert main([]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 5


@pytest.mark.slow
def test_the_version_by_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "marble_core", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == marble_core.__version__
