"""Fewer and fewer prompts with a text: which prompts a run gets, and the table and figure of made-up runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from reference.__main__ import main
from reference.config.settings import Config, LogConfig, RolloutConfig
from reference.config.toml import to_toml
from reference.errors import ConfigError
from reference.experiments import compare as compare_module
from reference.experiments.compare import plan_runs, settings_of_rules
from reference.experiments.dilute import dilute
from reference.prompts.pool import prompts_of_epoch, training_pool
from tests.experiments.made_runs import records, write

SETTINGS = Config(epochs=2, rewards=("text", "jpeg"), log=LogConfig(watch=("objects",), eval_prompts=3, eval_images=2))


def diluted(n: int) -> Config:
    rollout = RolloutConfig(prompts=("world:text", "world:objects"), weights=(1.0, n - 1.0), prompts_per_epoch=12)
    return dataclasses.replace(SETTINGS, rollout=rollout)


@pytest.mark.parametrize("n", [2, 4, 8, 16])
def test_one_prompt_in_so_many_has_a_text(n: int) -> None:
    pool = training_pool(diluted(n))
    found = [p.text for epoch in range(16) for p in prompts_of_epoch(pool, 12, 0, epoch)]
    assert sum("text" in prompt for prompt in found) == pytest.approx(len(found) / n, abs=1)


def test_table_and_figure_of_made_up_runs(tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, rollout=RolloutConfig(prompts_per_epoch=12))
    for n, text in ((2, 0.5), (16, 0.05)):
        for rule, gains in (("soft-min", (0.25, 0.06, 0.0)), ("weighted-sum", (text, -0.02, 0.0))):
            for config in plan_runs(settings_of_rules(diluted(n), (rule,)), 1, tmp_path / f"1-in-{n}")[rule]:
                write(config, records(config, gains, cpu=60.0))
                (config.run / "config.toml").write_text(to_toml(config), encoding="utf-8")
    table = dilute(settings, ("soft-min", "weighted-sum"), (2, 16), 1, tmp_path, jobs=1)
    lines = [line.strip("| ").split(" | ")[:4] for line in table.splitlines()[4:]]
    assert lines == [
        ["2", "soft-min", "+0.50", "+0.60"],
        ["2", "weighted-sum", "+1.00", "-0.20"],
        ["16", "soft-min", "+0.50", "+0.60"],
        ["16", "weighted-sum", "+0.10", "-0.20"],
    ]
    assert (tmp_path / "dilute.md").read_text(encoding="utf-8") == table + "\n"
    first = (tmp_path / "dilute.svg").read_bytes()
    dilute(settings, ("soft-min", "weighted-sum"), (2, 16), 1, tmp_path, jobs=1)
    assert (tmp_path / "dilute.svg").read_bytes() == first


def test_rewards_without_text_are_refused_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare_module, "train_all", lambda *_: pytest.fail("trained"))
    with pytest.raises(ConfigError, match=r"rewards: expected text, .* got \['jpeg', 'colour'\]"):
        dilute(dataclasses.replace(SETTINGS, rewards=("jpeg", "colour")), ("uniform",), (2,), 1, tmp_path, jobs=1)


@pytest.mark.parametrize("shares", [(), (1,), (4, 0)])
def test_shares_that_cannot_be(tmp_path: Path, shares: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="shares: expected numbers from 2 on"):
        dilute(SETTINGS, ("uniform",), shares, 1, tmp_path, jobs=1)
    assert main(["dilute", "--shares", "1"]) == 2
