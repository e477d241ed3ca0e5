"""What a GPU session runs, at a size for a CPU: the trainer from end to end without a download, and the tables."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from pathlib import Path

import pytest

from benchmarks.end_to_end import end_to_end
from benchmarks.gpu_table import table
from benchmarks.trainer_models import SMALL

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_end_to_end_trains_resumes_and_writes_a_lora(tmp_path: Path) -> None:
    transformer = SMALL.transformer | {"num_layers": 1, "dual_attention_layers": ()}
    tiny = dataclasses.replace(SMALL, transformer=transformer, latent=8, tokens=8)
    found = end_to_end(tiny, tmp_path, "cpu", small=True)
    assert found["steps"] == [1, 2, 3]
    assert len(found["epochs"]) == 3
    assert found["lora_bytes"] > 1000
    assert "refreshes" in found["plan"]
    (tmp_path / "end-to-end.json").write_text(json.dumps(found))
    text = table(tmp_path)
    assert text.count("\n| ") == 4
    assert "resumed for a third" in text


def test_tables_of_what_is_there(tmp_path: Path) -> None:
    assert table(tmp_path) == f"{tmp_path} has no results."
    fine = {"name": "step/shared K=5", "mode": "eager", "K": 5, "error": None, "seconds": 1.5, "speed": 0.8}
    failed = {"name": "step/shared K=64", "mode": "eager", "K": 64, "error": "out of memory"}
    records = [fine | {"peak_bytes": 2**31, "memory": 1.02}, failed]
    target = {"mode": "eager", "target": "speed: at least 0.75", "measured": 0.8, "met": True}
    result = {"where": {"device": "a GPU"}, "records": records, "targets": [target]}
    (tmp_path / "eager.json").write_text(json.dumps(result))
    text = table(tmp_path)
    assert "| eager | step/shared K=5 | 1500 | 0.800 | 2.00 | 1.020 |" in text
    assert "| eager | step/shared K=64 | out of memory | | | |" in text
    assert "| eager: speed: at least 0.75 | 0.800 | met |" in text


def test_the_session_is_a_shell_script_whose_stages_exist() -> None:
    script = ROOT / "benchmarks" / "gpu_session.sh"
    subprocess.run(["bash", "-n", script], check=True)
    text = script.read_text(encoding="utf-8")
    for part in text.split():
        if part.startswith("tests/"):
            assert (ROOT / part).is_file()
