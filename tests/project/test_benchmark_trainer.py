"""The trainer's benchmark: its peer computes the same gradient, its full size is the real one, its report is right."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import trainer, trainer_steps
from benchmarks.timing import Timing, measure
from benchmarks.trainer_models import FULL, SMALL, Setup, build, build_transformer, random_rows
from benchmarks.trainer_steps import LOSS, kinds, transcription
from reference.policy.adapters import compile_blocks, parameters, target_layers
from reference.processes.peers import ALONE
from reference.step.balance import Step, init_balance, step_gradient
from reference.step.gradients import Whole

pytestmark = pytest.mark.slow

TINY = dataclasses.replace(
    SMALL,
    transformer=SMALL.transformer
    | {"num_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2, "caption_projection_dim": 16}
    | {"sample_size": 4, "joint_attention_dim": 8, "pooled_projection_dim": 8, "pos_embed_max_size": 4}
    | {"dual_attention_layers": (0,)},
    latent=4,
    tokens=2,
    rank=2,
    alpha=4.0,
    batch=2,
)
BF16 = dataclasses.replace(TINY, dtype=torch.bfloat16)


def test_full_size_is_stable_diffusion_3_5_medium() -> None:
    """2.24 G weights without the position embeddings; 18.8 M of LoRA at rank 32, as the paper's setting has them."""
    transformer = build_transformer(FULL, "meta")
    assert {p.device.type for p in transformer.parameters()} == {"meta"}
    assert {p.dtype for p in transformer.parameters()} == {torch.bfloat16}
    assert sum(p.numel() for p in transformer.parameters()) == pytest.approx(2.24e9, rel=0.01)
    assert len(transformer.transformer_blocks) == 24
    dual = [i for i, block in enumerate(transformer.transformer_blocks) if block.use_dual_attention]
    assert dual == list(range(13))
    layers = target_layers(transformer, "attention")
    sizes = [m.in_features + m.out_features for n, m in transformer.named_modules() if n in layers]
    assert FULL.rank * sum(sizes) == pytest.approx(18.9e6, rel=0.01)
    assert (FULL.latent * 8, FULL.tokens, FULL.batch) == (512, 333, 9)


@pytest.mark.parametrize("micro_batch", [2, 4])
def test_the_transcription_gives_the_gradient_of_a_weighted_sum_step(micro_batch: int) -> None:
    device = torch.device("cpu")
    policy = build(TINY, device)
    rows = random_rows(TINY, 4, 3, device)
    weighted = next(kind for kind in kinds() if kind.name == "weighted-sum")
    assert weighted.rule is not None
    balance, nothing = init_balance(3, weighted.rule, parameters(policy)), torch.full((3,), torch.nan)
    step = Step(False, nothing, rows.A, rows.A_sum, None, micro_batch, Whole(ALONE, 2, 4))
    loss = dataclasses.replace(LOSS, kl_weight=0.1)
    ours = step_gradient(policy, rows, balance, weighted.rule, loss, step).gradient
    theirs = transcription(policy, rows, loss, micro_batch)
    scale = max(float(x.abs().max()) for x in ours.values())
    assert scale > 0
    assert ours.keys() == theirs.keys()
    for name, x in ours.items():
        torch.testing.assert_close(theirs[name], x, rtol=0, atol=1e-5 * scale)
    assert all(p.grad is None for p in policy.model.parameters())


@pytest.mark.parametrize(("size", "setup"), [("--full-size", BF16)])
def test_everything_runs_and_is_reported(
    size: str, setup: Setup, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer_steps, "CYCLE", 2)
    monkeypatch.setattr(trainer_steps, "SAMPLING_STEPS", 2)
    some = [k for k in kinds() if k.group != "k-pass" or k.K == 5]
    monkeypatch.setattr(trainer, "kinds", lambda: some)
    out = tmp_path / "trainer.json"
    result = trainer.main([size, "--device", "cpu", "--repeats", "1", "--out", str(out)], (setup, setup))
    records = {record["name"]: record for record in result["records"]}
    assert [record["error"] for record in records.values()] == [None] * len(records)
    assert len(records) == len(some)
    for name, record in records.items():
        baseline = records[name.split("/")[0] + "/weighted-sum"]
        assert record["speed"] == pytest.approx(baseline["seconds"] / record["seconds"])
        assert record["per_second"] == pytest.approx(2 * setup.batch / record["seconds"])
    assert json.loads(out.read_text()) == result
    printed = capsys.readouterr().out
    assert all(name in printed for name in records)
    assert "full harmonization at every step, K = 5: speed of a step: at least 0.75" in printed


@pytest.mark.filterwarnings("ignore")  # what the compiler warns about while it traces is not ours
def test_compiled_steps_and_a_choice_of_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(trainer, "compile_blocks", partial(compile_blocks, backend="eager"))
    torch._dynamo.utils.counters.clear()
    arguments = ["--small", "--device", "cpu", "--repeats", "1", "--modes", "compiled", "--only", "step/shared K=5"]
    records = trainer.main(arguments, (TINY, TINY))["records"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert not torch._dynamo.utils.counters["graph_break"]
    assert [(r["name"], r["mode"], r["error"]) for r in records] == [
        ("step/weighted-sum", "compiled", None),
        ("step/shared K=5", "compiled", None),
    ]
    torch._dynamo.reset()


def test_a_failure_is_a_row_of_its_own() -> None:
    def without_memory() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    def unprepared() -> Any:
        raise ValueError("rows: expected")

    calls: list[int] = []
    found = measure(
        {"fails": lambda: without_memory, "is not made": unprepared, "works": lambda: lambda: calls.append(1)},
        repeats=3,
        device=torch.device("cpu"),
        budget=60.0,
    )
    assert found["fails"].error == "OutOfMemoryError: CUDA out of memory."
    assert found["is not made"].error == "ValueError: rows: expected"
    assert len(calls) == 1 + len(found["works"].seconds) == 4
    slow = iter(range(100))
    once = measure({"slow": lambda: lambda: None}, 5, torch.device("cpu"), 1.5, clock=lambda: float(next(slow)))
    assert once["slow"] == Timing([1.0, 1.0], 1.0, None, None)  # two of its seconds are more than its budget


def test_nothing_is_begun_after_the_limit(capsys: pytest.CaptureFixture[str]) -> None:
    records = trainer.main(["--small", "--device", "cpu", "--limit", "0", "--only", "step/w"], (TINY, TINY))["records"]
    assert [record["error"] for record in records] == ["not begun: 0 s were over"]
    assert "not begun" in capsys.readouterr().out


def test_targets_compare_in_the_right_sense() -> None:
    def record(name: str, seconds: float, speed: float, memory: float | None = None) -> dict[str, Any]:
        return {"name": name, "mode": "eager", "seconds": seconds, "speed": speed, "memory": memory}

    fast = [record("step/shared K=5", 1.0, 0.76, 1.02), record("step/shared K=64", 1.1, 0.7)]
    slow = [record("step/shared K=5", 1.0, 0.74, 1.04), record("step/shared K=64", 1.2, 0.6)]
    slow.append(record("step/transcription", 1.0, 1.05))
    assert [row["met"] for row in trainer.targets(fast, "eager")] == [True, True, True]
    assert [row["met"] for row in trainer.targets(slow, "eager")] == [False, False, False, False]
    assert trainer.targets(slow, "compiled") == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--small", "--only", "steps"], "expected the beginning of one of step/weighted-sum"),
        (["--small", "--repeats", "0"], "expected at least 1"),
        (["--small", "--device", "cuda", "--clock", "cpu"], "expected --device cpu"),
        ([], "--small --full-size"),
    ],
)
def test_what_cannot_be_asked_for_is_said(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        trainer.main(arguments, (TINY, TINY))
    assert message in capsys.readouterr().err
