"""The configuration: presets, files, rules, and everything that is refused before a run begins."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from reference.config import (
    BUILT_IN_RULES,
    WORLD_REWARDS,
    Config,
    LogConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    Preset,
    RolloutConfig,
    SolveConfig,
    from_toml,
    preset,
    rule_of,
    to_toml,
    training_times,
)
from reference.errors import ConfigError
from reference.train import load_rewards
from reference.validation import validate

PRESETS: tuple[Preset, ...] = ("world", "demo", "tiny")
OTHER = Config(
    run=Path("elsewhere/run"),
    balance="weighted-sum",
    rewards=("text", "my.file:reward"),
    reward_weights=(1.0, 0.5),
    epochs=3,
    seed=7,
    threads=1,
    model=ModelConfig("some/folder", 4, 8.0, "attention"),
    rollout=RolloutConfig("prompts.txt", 9, 3, 5, 7, "dpm2", 4),
    loss=LossConfig("velocity", 1.0, 4.0, 1e-4, "group", 2, 0.5),
    solve=SolveConfig("full", False, 3, 0.25, 0.0, "paper", "k_pass", 1),
    optim=OptimConfig(3e-4, (0.8, 0.95), 0.0, 1e-6, 2.0, 3, 5, "slow", 0.5),
    log=LogConfig(1, 2, 3, 4, 5, (), ("wandb",)),
)


def read(text: str, tmp_path: Path, base: Config | None = None) -> Config:
    path = tmp_path / "config.toml"
    path.write_text(text, encoding="utf-8")
    return from_toml(path, base or Config())


@pytest.mark.parametrize("config", [*map(preset, PRESETS), OTHER], ids=[*PRESETS, "other"])
def test_what_is_written_is_read_back(config: Config, tmp_path: Path) -> None:
    assert read(to_toml(config), tmp_path) == config
    assert all(getattr(OTHER, f.name) != f.default for f in dataclasses.fields(Config)), "OTHER changes every field"


@pytest.mark.parametrize("name", PRESETS)
def test_presets_can_be_run(name: Preset) -> None:
    validate(preset(name))


def test_a_file_changes_what_it_names_and_nothing_else(tmp_path: Path) -> None:
    found = read("seed = 3\n[optim]\nlr = 1\n", tmp_path)
    assert found == dataclasses.replace(Config(), seed=3, optim=OptimConfig(lr=1.0))
    assert isinstance(found.optim.lr, float)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch = 3", r"unknown key epoch\. Did you mean epochs\?"),
        ("[optim]\nlearning = 1.0", r"unknown key optim\.learning\. Valid keys: .*lr"),
        ("[rollout]\nimage_per_prompt = 3", r"Did you mean rollout\.images_per_prompt\?"),
        ("optim = 3", "expected optim to be a table"),
        ('epochs = "3"', r"expected epochs to be int, got '3' \(str\)"),
        ("epochs = 3.0", r"expected epochs to be int, got 3\.0 \(float\)"),
        ("epochs = true", r"expected epochs to be int, got True \(bool\)"),
        ("[optim]\nlr = true", r"expected optim\.lr to be float, got True"),
        ('[optim]\nlr = "fast"', r"expected optim\.lr to be float"),
        ("[optim]\nbetas = [0.9]", r"expected optim\.betas to be a list of 2"),
        ('[optim]\nbetas = "0.9, 0.99"', r"expected optim\.betas to be a list"),
        ('rewards = "text"', "expected rewards to be a list"),
        ('[loss]\nform = "velosity"', r"loss\.form to be one of .*Did you mean 'velocity'\?"),
        ('[solve]\nnormalize = "no"', r"expected solve\.normalize to be bool"),
        ("seed = ", r"cannot read .*config\.toml"),
    ],
)
def test_a_bad_file_is_refused_with_the_nearest_valid_name(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        read(text, tmp_path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        from_toml(tmp_path / "none.toml", Config())


def changed(**groups: Any) -> Config:
    """The default configuration with some fields of some groups, or some top-level fields, changed."""
    base = Config()
    fields = {
        name: dataclasses.replace(getattr(base, name), **value) if isinstance(value, dict) else value
        for name, value in groups.items()
    }
    return dataclasses.replace(base, **fields)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (changed(epochs=0), "epochs to be positive"),
        (changed(model={"lora_rank": 0}), "model.lora_rank to be positive"),
        (changed(rollout={"steps": 0}), "rollout.steps to be positive"),
        (changed(rollout={"prompts_per_epoch": 0}), "rollout.prompts_per_epoch to be positive"),
        (changed(optim={"lr": 0.0}), "optim.lr to be positive"),
        (changed(optim={"micro_batch": 0}), "optim.micro_batch to be positive"),
        (changed(loss={"beta": -1.0}), "loss.beta to be positive"),
        (changed(loss={"kl_weight": -1.0}), "loss.kl_weight to be at least 0"),
        (changed(loss={"timestep_fraction": 0.0}), r"loss.timestep_fraction to be in \(0, 1\]"),
        (changed(loss={"timesteps_per_image": 8}), "loss.timesteps_per_image to be at most the 7 that"),
        (changed(optim={"ema_cap": 1.5}), r"optim.ema_cap to be in \[0, 1\]"),
        (changed(solve={"rho": -0.1}), r"solve.rho to be in \[0, 1\]"),
        (changed(solve={"guard": 1.0}), r"solve.guard to be in \[0, 1\]"),
        (changed(solve={"refresh_every": 0}), "solve.refresh_every to be positive"),
        (changed(solve={"uniform_tail": 999}), "solve.uniform_tail to be at most epochs"),
        (changed(rewards=()), "rewards to name at least one"),
        (changed(rewards=("text", "text")), "rewards to be distinct"),
        (changed(rewards=("texts",)), r"rewards to be in .*Did you mean 'text'\?"),
        (changed(log={"watch": ("object",)}), r"log.watch to be in .*Did you mean 'objects'\?"),
        (changed(balance="weighted-sum", reward_weights=(1.0,)), "reward_weights to be empty or 5 numbers"),
        (changed(reward_weights=(1.0,) * 5), "reward_weights only with balance weighted-sum"),
        (changed(rollout={"images_per_prompt": 1}), "rollout.images_per_prompt to be at least 2"),
        (changed(rollout={"prompts_per_epoch": 65}), "rollout.prompts_per_epoch to be at most rollout.pool = 64"),
        (changed(optim={"steps_per_epoch": 145}), "optim.steps_per_epoch to be at most the 144 images"),
        (changed(balance="marbel"), r"balance to be in .*Did you mean 'marble'\?"),
        (changed(balance="uniform", solve={"rho": 0.5}), "no solve.rho with balance uniform"),
        (changed(balance="weighted-sum", solve={"uniform_tail": 1}), "no solve.uniform_tail with balance"),
        (changed(solve={"normalize": False}), "solve.guard 0 where solve.normalize is false"),
    ],
)
def test_what_cannot_be_run_is_refused(config: Config, message: str) -> None:
    with pytest.raises(ConfigError, match=f"config: expected {message}"):
        validate(config)


def test_paths_of_callables_are_taken_as_they_are() -> None:
    validate(changed(balance="my.rules:own", rewards=("text", "my.file:reward")))


def test_every_name_of_a_reward_is_a_reward() -> None:
    assert tuple(load_rewards(WORLD_REWARDS)) == WORLD_REWARDS
    with pytest.raises(ConfigError, match="rewards: expected the dotted path of a callable"):
        load_rewards(("no.such.module:reward",))


def test_rules() -> None:
    marble, paper = (rule_of(Config(balance=name)) for name in ("marble", "marble-paper"))
    assert (marble.gradients, marble.guard, marble.amortize) == ("signal", 0.5, "norm_corrected")
    assert (paper.gradients, paper.guard, paper.amortize) == ("full", 0.0, "paper")
    for rule in (marble, paper):
        assert (rule.kind, rule.refresh_every, rule.rho, rule.normalize, rule.rows) == (
            "solve",
            10,
            0.7,
            True,
            "shared",
        )
    assert [rule_of(Config(balance=name)).kind for name in BUILT_IN_RULES[2:]] == ["weighted-sum", "uniform"]
    own = rule_of(Config(balance="my.rules:own"))
    assert (own.kind, own.solver, own.guard) == ("solve", "my.rules:own", 0.0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("gradients", "full"),
        ("normalize", False),
        ("refresh_every", 1),
        ("rho", 0.0),
        ("guard", 0.1),
        ("amortize", "paper"),
        ("rows", "k_pass"),
    ],
)
def test_each_switch_changes_one_thing(field: str, value: Any) -> None:
    changed_rule = rule_of(changed(solve={field: value}))
    assert changed_rule == dataclasses.replace(rule_of(Config()), **{field: value})


def test_training_times() -> None:
    for steps, fraction, expected in ((10, 0.99, 9), (8, 0.99, 7), (8, 1.0, 8), (1, 0.99, 1), (10, 0.5, 5)):
        assert training_times(changed(rollout={"steps": steps}, loss={"timestep_fraction": fraction})) == expected
