"""The test of the claim: batches that are tried once, virtual steps that leave the policy alone, and tables by hand."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from reference.__main__ import main
from reference.config.presets import preset
from reference.config.settings import Config, OptimConfig
from reference.errors import ConfigError
from reference.experiments import settle as settle_module
from reference.experiments.settle import RULES, SUM, Setting, directions, gradients, open_bench, settle, stepped
from reference.experiments.settle_tables import tables
from reference.policy.adapters import adapter_state
from reference.run import checkpoint

SETTING = Setting(prompts=2, sizes=(0.3, 0.0), images=2)


def tiny() -> Config:
    return dataclasses.replace(preset("tiny"), rewards=("colour", "jpeg"), threads=1)


@pytest.mark.slow
def test_a_batch_is_tried_once_and_a_second_call_goes_on(tmp_path: Path) -> None:
    first = settle(tiny(), None, SETTING, 1, tmp_path)
    stamp = (tmp_path / "batch-0000.json").stat().st_mtime_ns
    both = settle(tiny(), None, SETTING, 2, tmp_path)
    assert both[0] == first[0]
    assert (tmp_path / "batch-0000.json").stat().st_mtime_ns == stamp
    assert both[1]["batch"] == 1
    assert both[1]["changes"] != both[0]["changes"]
    keys = {f"{rule} @ {size}" for rule in (SUM, *RULES) for size in ("0.3", "0")}
    assert set(both[0]["changes"]) == keys
    assert all(set(changes) == {"colour", "jpeg"} for changes in both[0]["changes"].values())
    assert (
        both[0]["changes"]["soft-min @ 0.3"] == both[0]["changes"]["uniform @ 0.3"]
    )  # nothing is measured at the base


def test_directions_and_steps_are_what_their_rules_say() -> None:
    bench = open_bench(tiny(), None)
    batch = gradients(bench, 0, 2)
    found, coefficients, evidence = directions(batch, bench.gain)
    h = {k: (batch.a[k] + batch.b[k]) / 2 for k in batch.a}
    flat = torch.cat([x.flatten(1) for x in h.values()], 1).double()
    torch.testing.assert_close(flat @ flat.mT, evidence.gram, rtol=1e-6, atol=0)
    assert coefficients["uniform"].tolist() == [0.5, 0.5]
    for name, x in found["uniform"].items():
        torch.testing.assert_close(x, h[name].mean(0) + batch.shared[name])
    before = adapter_state(bench.policy, "default")
    after = stepped(bench, found["uniform"], 0.3)
    moved = torch.cat([(after[k] - before[k]).flatten() for k in before])
    torch.testing.assert_close(moved.norm(), torch.tensor(0.3), rtol=1e-4, atol=0)
    gradient = torch.cat([x.flatten() for x in found["uniform"].values()])
    torch.testing.assert_close(moved @ gradient / moved.norm() / gradient.norm(), torch.tensor(-1.0), rtol=1e-4, atol=0)
    adam = stepped(bench, found["uniform"], 0.0)
    largest = max(float((adam[k] - before[k]).abs().max()) for k in before)
    assert largest == pytest.approx(bench.config.optim.lr, rel=0.05)  # a first step of Adam
    assert all(torch.equal(x, before[k]) for k, x in adapter_state(bench.policy, "default").items())


def record(number: int, sums: float, ours: float) -> dict[str, Any]:
    """A batch on which the sum changes the second reward by ``sums`` and our rule by ``ours``, give or take 0.1."""

    def changes(second: float) -> dict[str, list[float]]:
        return {"a": [0.5, 0.4, 0.6], "b": [second, second - 0.1, second + 0.1]}

    return {
        "batch": number,
        "changes": {f"{SUM} @ 0.3": changes(sums), "marble @ 0.3": changes(ours)},
        "within_std": {"a": 0.5, "b": 2.0},
        "coefficients": {"marble": [0.99, 0.01]},
        "direction_norm": 0.3 if number else 0.0,
        "stationary": False,
        "cosines": {"same": {SUM: -0.1, "marble": 0.3}, "fresh": {SUM: -0.2, "marble": -0.1}},
    }


def test_rates_by_hand() -> None:
    """The sum lowers b on three of four batches, for certain on two; ours raises all on two of those three."""
    found = [record(0, -0.5, 0.2), record(1, -0.5, -0.3), record(2, -0.05, 0.3), record(3, 0.4, 0.4)]
    text = tables(found, ["a", "b"], 432)
    assert "4 mini-batches of 432 rows; K = 2." in text
    assert "lowered at least one reward on 3 of 4 (75% [30, 95]) of the batches" in text
    assert "on 2 of 4 (50% [15, 85])" in text
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if "|" in line}
    claims = [line for line in text.splitlines() if line.startswith("| marble |")]
    cells = [c.strip() for c in claims[0].split("|")[2:-1]]
    assert [c.split(" (")[0] for c in cells[:3]] == ["1 of 4", "2 of 3", "1 of 2"]
    assert cells[4:] == ["+1.000", "+0.075"]  # 0.5 / 0.5; (0.2 - 0.3 + 0.3 + 0.4) / 4 / 2
    assert rows[SUM].startswith(f"| {SUM} | -0.10 ")  # the last table: cosines
    assert "near zero on 1 of 4" in text
    assert "4 of 4 (100% [51, 100])" in claims[1]  # it neglects b


def stand_ins(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Batches are made up; the numbers of those that are tried."""
    tried: list[int] = []

    def try_batch(bench: Any, number: int, setting: Setting, before: Any, other: Any) -> dict[str, Any]:
        tried.append(number)
        return {"batch": number, "changes": {f"{SUM} @ {size:g}": {} for size in setting.sizes}}

    batch = settle_module.Batch({}, {}, {}, {})
    for name, found in {"open_bench": SimpleNamespace(policy=None), "adapter_state": {}, "gradients": batch}.items():
        monkeypatch.setattr(settle_module, name, lambda *_, found=found: found)
    monkeypatch.setattr(settle_module, "judged", lambda *_: (torch.zeros(3, 2), torch.ones(2)))
    monkeypatch.setattr(settle_module, "try_batch", try_batch)
    return tried


def test_batches_of_other_settings_or_another_policy_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried, run, folder, config = stand_ins(monkeypatch), tmp_path / "run", tmp_path / "out", tiny()
    checkpoint.save(run / "checkpoints", 7, {"step": 7, "default": torch.zeros(2)})
    first = settle(config, run, SETTING, 1, folder)
    assert settle(config, run, SETTING, 1, folder) == first
    assert tried == [0]

    def refused(config: Config, setting: Setting = SETTING) -> str:
        with pytest.raises(ConfigError, match=r"batch-0000\.json was tried with other .* Choose another --folder") as e:
            settle(config, run, setting, 2, folder)
        return str(e.value)

    assert "(other prompts)" in refused(config, SETTING._replace(prompts=3))
    assert "(other sizes)" in refused(config, SETTING._replace(sizes=(0.3,)))
    assert "(other images)" in refused(config, SETTING._replace(images=3))
    assert "eval_prompts" in refused(dataclasses.replace(config, log=dataclasses.replace(config.log, eval_prompts=4)))
    assert "(other settings)" in refused(dataclasses.replace(config, optim=OptimConfig(lr=1.0)))
    checkpoint.save(run / "checkpoints", 7, {"step": 7, "default": torch.ones(2)})  # another run of the same name
    assert "(other checkpoint)" in refused(config)
    checkpoint.save(run / "checkpoints", 8, {"step": 8, "default": torch.zeros(2)})  # it has trained on
    assert "(other step, checkpoint)" in refused(config)
    assert tried == [0]


def test_batches_from_before_there_were_keys_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried, config, setting = stand_ins(monkeypatch), tiny(), SETTING._replace(sizes=(0.3,))
    settle(config, None, setting, 1, tmp_path)
    file = tmp_path / "batch-0000.json"
    old = {k: x for k, x in json.loads(file.read_text(encoding="utf-8")).items() if k != "key"}
    file.write_text(json.dumps(old), encoding="utf-8")
    assert settle(config, None, setting, 1, tmp_path) == [old]
    with pytest.raises(ConfigError, match="other sizes"):
        settle(config, None, SETTING, 1, tmp_path)
    with pytest.raises(ConfigError, match="other rewards"):
        settle(dataclasses.replace(config, rewards=("text",)), None, setting, 1, tmp_path)
    file.write_text(file.read_text(encoding="utf-8")[:-9], encoding="utf-8")
    with pytest.raises(ConfigError, match=r"cannot read .*batch-0000\.json"):
        settle(config, None, setting, 1, tmp_path)
    assert tried == [0]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (SETTING._replace(sizes=(-1.0,)), "--sizes: expected finite numbers from 0 on"),
        (SETTING._replace(sizes=(math.nan,)), "--sizes: expected finite numbers from 0 on"),
        (SETTING._replace(sizes=()), "--sizes: expected finite numbers from 0 on"),
        (SETTING._replace(images=0), "--images: expected at least 1, got 0"),
        (SETTING._replace(prompts=1), "--prompts: expected at least 2, got 1"),
    ],
)
def test_what_cannot_be_tried(tmp_path: Path, setting: Setting, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settle(tiny(), None, setting, 1, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "settle",
        "--preset",
        "tiny",
        "--batches",
        "1",
        "--prompts",
        "2",
        "--sizes",
        "0.2",
        "--eval-prompts",
        "3",
    ]
    more = ["--eval-prompts", "3", "--images", "2", "--threads", "1", "--folder", str(tmp_path)]
    assert main([*arguments, *more]) == 0
    printed = capsys.readouterr().out
    assert "1 mini-batches of 16 rows; K = 5." in printed
    assert (tmp_path / "settle.md").read_text(encoding="utf-8").strip() in printed
    assert json.loads((tmp_path / "batch-0000.json").read_text())["batch"] == 0
