"""The examples run, and show what they say."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from marble_core import shared_cotangent_rows
from reference.__main__ import main

FOLDER = Path(__file__).resolve().parents[2] / "examples"


def load(name: str) -> Any:
    """An example as a module; what it prints on import is kept in ``printed``."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        spec.loader.exec_module(module)
    module.printed = out.getvalue()
    return module


def test_every_example_is_tested() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} == {
        "two_rewards",
        "own_loop",
        "grpo",
        "with_torchjd",
        "with_trl",
        "with_accelerate",
        "mine",
    }


def test_two_rewards() -> None:
    assert "cosines after balancing: tensor([0.4472, 0.4472])" in load("two_rewards").printed


def test_the_loop_of_one_s_own_raises_all_three_rewards() -> None:
    before, after = (
        [float(x) for x in re.findall(r"-?\d+\.\d+", line)] for line in load("own_loop").printed.splitlines()
    )
    assert len(before) == len(after) == 3
    assert all(b > a for a, b in zip(before, after, strict=True))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft and transformers at each other
def test_grpo_raises_all_three_rewards_and_its_rows_are_k_passes() -> None:
    grpo = load("grpo")
    before, after = grpo.main(steps=25)
    assert bool((after > before).all())
    model = grpo.make_model().double()
    prompts = torch.randint(grpo.VOCABULARY, (6, 4))
    answers, weights = grpo.sample(model, prompts), torch.randn(6, 3, dtype=torch.float64)
    found = shared_cotangent_rows(lambda: grpo.log_probability(model, prompts, answers), model, weights, verify=True)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for k in range(3):
        log_p = grpo.log_probability(model, prompts, answers)
        expected = torch.autograd.grad(log_p, list(named.values()), weights[:, k])
        for (name, _), g in zip(named.items(), expected, strict=True):
            assert torch.allclose(found.rows[name][k], g, rtol=1e-4, atol=1e-5), name  # norms are in float32 inside


def test_torchjd_takes_our_rules_and_we_its_weightings() -> None:
    pytest.importorskip("torchjd")
    together = load("with_torchjd")
    before, after = together.ours_in_theirs(steps=100)
    assert bool((after < before).all())
    gram = torch.tensor([[100.0, -6.0], [-6.0, 1.0]], dtype=torch.float64)
    c = together.theirs_in_ours(gram)
    assert bool((gram @ c > 0).all())


def test_a_loop_with_accelerate(capfd: pytest.CaptureFixture[str]) -> None:
    before, after = load("with_accelerate").main(steps=60)
    assert all(b < a for a, b in zip(before, after, strict=True))


@pytest.mark.slow
def test_two_processes_of_accelerate_take_the_same_coefficients(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", str(FOLDER / "with_accelerate.py")]
    environment = {**os.environ, "PYTHONPATH": str(FOLDER.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    before, after = ([float(x) for x in re.findall(r"\d+\.\d+", line)] for line in done.stdout.splitlines()[-2:])
    assert all(b < a for a, b in zip(before, after, strict=True))


@pytest.mark.slow
def test_a_reward_prompts_and_a_rule_of_one_s_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(FOLDER.parent)
    flags = ["--preset", "tiny", "--rewards", "colour", "examples.mine:bright", "--run", str(tmp_path / "run")]
    flags += ["--balance", "examples.mine:lagging_only", "--rollout.prompts", "examples/mine.txt"]
    assert main(["train", *flags]) == 0
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    applied = [tuple(r["coefficients"].values()) for r in records if r["kind"] == "step"]
    assert set(applied) <= {(1.0, 0.0), (0.0, 1.0)}
