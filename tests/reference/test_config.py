"""Configurations: TOML and back, and everything that is wrong said by name before anything loads."""

from __future__ import annotations

import dataclasses
import math
import tempfile
import types
import typing
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from marble_core import harmonize, soft_min_weights
from marble_core.rules import Evidence
from reference.config.checks import validate
from reference.config.presets import preset
from reference.config.settings import (
    BUILT_IN_RULES,
    WORLD_REWARDS,
    Config,
    LogConfig,
    LossConfig,
    ModelConfig,
    Preset,
    RolloutConfig,
    SolveConfig,
    training_times,
)
from reference.config.toml import from_toml, to_toml
from reference.errors import ConfigError
from reference.rewards.scorer import load_rewards
from reference.step.method import Method, by_advantages, by_signals, method_of

PRESETS: tuple[Preset, ...] = typing.get_args(Preset)


def read(tmp_path: Path, text: str, base: Config | None = None) -> Config:
    path = tmp_path / "config.toml"
    path.write_text(text, encoding="utf-8")
    return from_toml(path, base or Config())


def other(value: Any, hint: Any) -> Any:
    """A value of the same type that is not this one; of a dataclass, with every field changed."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        hints = typing.get_type_hints(type(value))
        return type(value)(**{name: other(x, hints[name]) for name, x in vars(value).items()})
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return other(value, arguments[0])
    if origin is Literal:
        return next(a for a in arguments if a != value)
    if origin is tuple:
        return tuple(other(x, arguments[0]) for x in value or (arguments[0](),))
    simple = {bool: not value, str: f'{value} "é" \\ 😀', Path: Path("über/a run")}
    return simple[hint] if hint in simple else hint((value or 0) + (1 if hint is int else 0.3))


def with_value(key: str, value: Any, base: Config) -> Config:
    """``base`` with one value, by its dotted name."""
    group, _, name = key.rpartition(".")
    if not group:
        return dataclasses.replace(base, **{name: value})
    changed: Any = dataclasses.replace(getattr(base, group), **{name: value})
    return dataclasses.replace(base, **{group: changed})


def leaves(config: Any, prefix: str = "") -> dict[str, Any]:
    """All values by dotted name."""
    found: dict[str, Any] = {}
    for name, value in vars(config).items():
        found |= leaves(value, f"{prefix}{name}.") if dataclasses.is_dataclass(value) else {prefix + name: value}
    return found


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("base", PRESETS)
def test_a_preset_survives_toml_whatever_it_is_read_onto(tmp_path: Path, name: Preset, base: Preset) -> None:
    assert read(tmp_path, to_toml(preset(name)), preset(base)) == preset(name)


def test_a_config_with_every_field_changed_survives_toml(tmp_path: Path) -> None:
    changed = other(Config(), Config)
    before, after = leaves(Config()), leaves(changed)
    assert [key for key in before if before[key] == after[key]] == []
    again = read(tmp_path, to_toml(changed))
    assert again == changed
    assert {key: type(x) for key, x in leaves(again).items()} == {key: type(x) for key, x in after.items()}


@pytest.mark.parametrize("key", leaves(Config()))
def test_one_changed_field_survives_toml_alone(tmp_path: Path, key: str) -> None:
    changed = with_value(key, leaves(other(Config(), Config))[key], Config())
    assert read(tmp_path, to_toml(changed)) == changed


@pytest.mark.parametrize(
    "folder", ["", "a b", 'q"uote', "back\\slash", "tab\t", "new\nline", "\x7f", "é", "日本", "😀"]
)
def test_any_folder_name_survives_toml(tmp_path: Path, folder: str) -> None:
    assert read(tmp_path, to_toml(Config(run=Path(folder)))).run == Path(folder)


@pytest.mark.parametrize("value", [1e-300, 1e22, 0.1 + 0.2, 5e-324, float("inf"), -0.0])
def test_floats_survive_toml_bit_for_bit(tmp_path: Path, value: float) -> None:
    assert read(tmp_path, to_toml(Config(loss=LossConfig(a_max=value)))).loss.a_max.hex() == value.hex()


def test_a_file_changes_what_it_names_alone(tmp_path: Path) -> None:
    found = read(tmp_path, "epochs = 7\n[rollout]\nsteps = 5\n", preset("tiny"))
    before = leaves(preset("tiny"))
    assert {k: x for k, x in leaves(found).items() if x != before[k]} == {"epochs": 7, "rollout.steps": 5}
    assert read(tmp_path, "", preset("demo")) == preset("demo")


def test_integers_are_fine_for_floats(tmp_path: Path) -> None:
    text = "reward_weights = [1, 2.5]\n[loss]\nbeta = 1\n[solve]\nrho = 0\n[optim]\nbetas = [0, 0.5]\n"
    found = read(tmp_path, text)
    values = [*found.reward_weights, found.loss.beta, found.solve.rho, *found.optim.betas]
    assert values == [1, 2.5, 1, 0, 0, 0.5]
    assert {type(x) for x in values} == {float}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch = 3", r"unknown key epoch\. Did you mean epochs\?"),
        ("[rolout]\nsteps = 3", r"unknown key rolout\. Did you mean rollout\?"),
        ("[rollout]\nstep = 3", r"unknown key rollout\.step\. Did you mean rollout\.steps\?"),
        ("[solve]\nstrenght = 2.0", r"unknown key solve\.strenght\. Did you mean solve\.strength\?"),
        ("zzz = 3", r"unknown key zzz\. Valid keys: balance, device, epochs, .*threads\."),
        ("[log]\nzzz = 3", r"unknown key log\.zzz\. Valid keys: eval_every, .*watch\."),
        ("[optim.lr]\nx = 1", r"expected optim\.lr to be float, got \{'x': 1\} \(dict\)"),
        ("optim = 3", r"expected optim to be a table, got 3\."),
        ('epochs = "3"', r"expected epochs to be int, got '3' \(str\)"),
        ("epochs = 3.0", r"expected epochs to be int, got 3\.0 \(float\)"),
        ("epochs = true", r"expected epochs to be int, got True \(bool\)"),
        ("[optim]\nlr = true", r"expected optim\.lr to be float, got True \(bool\)"),
        ('[optim]\nlr = "1e-3"', r"expected optim\.lr to be float, got '1e-3' \(str\)"),
        ("[solve]\nrho = false", r"expected solve\.rho to be float, got False \(bool\)"),
        ("[model]\nshard = 1", r"expected model\.shard to be bool, got 1 \(int\)"),
        ("[solve]\nrefresh_every = 2.5", r"expected solve\.refresh_every to be int, got 2\.5 \(float\)"),
        ("balance = 3", r"expected balance to be str, got 3 \(int\)"),
        ("run = 3", r"expected run to be a string, got 3 \(int\)"),
        ("[optim]\nbetas = [0.9]", r"expected optim\.betas to be a list of 2, got \[0\.9\]"),
        ("[optim]\nbetas = [0.9, 0.99, 0.999]", r"expected optim\.betas to be a list of 2"),
        ("[optim]\nbetas = 0.9", r"expected optim\.betas to be a list of 2, got 0\.9"),
        ('[optim]\nbetas = [0.9, "x"]', r"expected optim\.betas to be float, got 'x' \(str\)"),
        ('rewards = "objects"', r"expected rewards to be a list, got 'objects'"),
        ("rewards = [1]", r"expected rewards to be str, got 1 \(int\)"),
        ("reward_weights = [true]", r"expected reward_weights to be float, got True \(bool\)"),
        (
            '[rollout]\nsampler = "eular"',
            r"expected rollout\.sampler to be one of \['euler', 'dpm2'\], got 'eular'\. Did you mean 'euler'\?",
        ),
        ('[loss]\nform = "velocities"', r"one of \['x0', 'velocity'\], got 'velocities'\. Did you mean 'velocity'\?"),
        ('[loss]\nform = "zzz"', r"expected loss\.form to be one of \['x0', 'velocity'\], got 'zzz'\.$"),
        ("epochs = ", r"cannot read .*config\.toml: Invalid value"),
        ("epochs = 3\nepochs = 4", r"cannot read .*config\.toml: Cannot overwrite a value"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, text + "\n")


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^config: cannot read [^ ]*missing\.toml: \[Errno") as error:
        from_toml(tmp_path / "missing.toml", Config())
    assert str(error.value).count("cannot read") == 1
    with pytest.raises(ConfigError, match="cannot read"):
        from_toml(tmp_path, Config())
    (tmp_path / "latin.toml").write_bytes(b'run = "\xe9"\n')
    with pytest.raises(ConfigError, match=r"cannot read .*latin\.toml.*utf-8"):
        from_toml(tmp_path / "latin.toml", Config())


def test_configurations_are_frozen() -> None:
    config = Config()
    for part in (config, config.model, config.rollout, config.loss, config.solve, config.optim, config.log):
        name = next(iter(vars(part)))
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(part, name, getattr(part, name))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.solve.rho = 0.0  # type: ignore[misc]


def test_training_times_are_those_of_the_fraction_and_at_least_one() -> None:
    def times(steps: int, fraction: float) -> int:
        config = Config(rollout=RolloutConfig(steps=steps), loss=LossConfig(timestep_fraction=fraction))
        return training_times(config)

    assert [times(8, 0.99), times(8, 1.0), times(8, 0.5), times(3, 0.99), times(10, 0.05)] == [7, 8, 4, 2, 1]


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("balance", [*BUILT_IN_RULES, "marble_core:min_norm_weights"])
def test_presets_are_valid_with_every_rule(name: Preset, balance: str) -> None:
    validate(dataclasses.replace(preset(name), balance=balance))


def test_the_paper_s_constants() -> None:
    paper = preset("sd35m")
    m, r, loss, o = paper.model, paper.rollout, paper.loss, paper.optim
    assert (m.base, m.resolution) == ("stabilityai/stable-diffusion-3.5-medium", 512)
    assert (m.lora_rank, m.lora_alpha, m.lora_targets) == (32, 64.0, "attention")
    assert (o.lr, o.betas, o.weight_decay, o.eps, o.clip) == (3e-4, (0.9, 0.999), 1e-4, 1e-8, 1.0)
    assert (r.prompts_per_epoch, r.images_per_prompt, r.steps, r.sampler) == (48, 24, 10, "dpm2")
    assert (loss.timesteps_per_image, training_times(paper), o.steps_per_epoch) == (0, 9, 1)
    assert (loss.form, loss.kl_weight, loss.beta, loss.a_max, loss.std) == ("x0", 1e-4, 0.1, 5.0, "global")
    assert (o.old_decay, o.ema_cap) == ("standard", 0.9)
    assert paper.rewards == ("pickscore", "hpsv2", "clipscore", "ocr", "geneval")
    assert paper.log.watch == ("aesthetic", "imagereward", "unifiedreward")
    method = method_of(paper)
    assert (paper.balance, method.every, method.full) == ("marble-paper", 10, True)


def test_the_two_presets_of_the_small_world_differ_in_what_the_documentation_says() -> None:
    mild, conflict = leaves(preset("world")), leaves(preset("world-conflict"))
    assert {key: (mild[key], conflict[key]) for key in mild if mild[key] != conflict[key]} == {
        "run": (Path("runs/world"), Path("runs/world-conflict")),
        "rewards": (
            ("objects", "text", "similarity", "colour", "jpeg"),
            ("text", "colour", "jpeg", "sharpness", "contrast"),
        ),
        "loss.kl_weight": (0.4, 0.1),
        "optim.lr": (2.5e-4, 5e-4),
        "log.watch": (("objects_strict",), ("objects", "similarity")),
    }


def test_what_one_gpu_trades_is_what_the_documentation_says() -> None:
    many, one = leaves(preset("sd35m")), leaves(preset("sd35m-single-gpu"))
    assert {key: (many[key], one[key]) for key in many if many[key] != one[key]} == {
        "run": (Path("runs/sd35m"), Path("runs/sd35m-single-gpu")),
        "model.t5_tokens": (256, 128),
        "rollout.prompts_per_epoch": (48, 16),
        "loss.timesteps_per_image": (0, 3),
        "log.watch": (("aesthetic", "imagereward", "unifiedreward"), ("aesthetic", "imagereward")),
    }


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("rewards", ("objects",), r"rewards to name rewards of Stable Diffusion 3, pickscore, .*got 'objects'"),
        ("rewards", ("pikscore",), r"Did you mean 'pickscore'\?"),
        ("log.watch", ("jpeg",), r"log\.watch to name rewards of Stable Diffusion 3"),
        ("rollout.prompts", (), r"rollout\.prompts to name at least one source"),
        ("rollout.prompts", ("world",), r"to be files for Stable Diffusion 3; make some with"),
        ("rollout.held_out", (), r"rollout\.held_out to name a file"),
        ("rollout.weights", (1.0,), r"rollout\.weights to be empty or 3 numbers, one a source"),
        ("rollout.weights", (1.0, 0.0, 1.0), r"rollout\.weights to be finite and positive"),
        ("scoring.batch", 0, r"scoring\.batch to be positive where scoring\.background"),
        ("scoring.batch", -1, r"scoring\.batch to be at least 0"),
        ("model.resolution", 0, r"model\.resolution to be positive"),
    ],
)
def test_what_cannot_be_with_stable_diffusion_is_named(key: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(with_value(key, value, preset("sd35m")))


def test_rewards_of_models_are_not_for_the_small_world() -> None:
    with pytest.raises(ConfigError, match=r"rewards to name rewards of the small world, objects, .*got 'pickscore'"):
        validate(Config(rewards=("pickscore",)))


def test_presets_have_folders_of_their_own() -> None:
    assert len({preset(name).run for name in PRESETS}) == len(PRESETS)


def test_rules_are_fed_and_applied_as_their_papers_say() -> None:
    def method(balance: str, **solve: Any) -> Method:
        return method_of(Config(balance=balance, solve=SolveConfig(**solve)))

    paper = method("marble-paper")
    assert (paper.solves, paper.full, paper.weigh, paper.every) == (True, True, by_advantages, 10)
    ours = method("marble")
    assert (ours.solves, ours.full, ours.weigh, ours.every) == (True, False, by_signals, 10)
    assert (method("noise-aware").every, method("noise-aware").memory) == (1, 0.8)
    assert (method("catch-up").every, method("catch-up").memory) == (1, 0.8)
    assert (method("cone").every, method("cone").memory) == (1, 0.9)
    assert (method("upgrad").every, method("upgrad").memory, method("upgrad").weigh) == (1, None, by_signals)
    assert [method(name).solves for name in ("soft-gdpo", "soft-min", "gdpo", "uniform", "weighted-sum")] == [False] * 5
    own = method("marble_core:min_norm_weights", decay=0.5, refresh_every=3)
    assert (own.solves, own.weigh, own.every, own.memory) == (True, by_signals, 3, 0.5)


def test_numbers_of_a_rule_reach_it() -> None:
    gram = torch.tensor([[1.0, 0.2], [0.2, 4.0]], dtype=torch.float64)
    gains = torch.tensor([0.0, 1.0], dtype=torch.float64)
    equal = torch.tensor([0.5, 0.5], dtype=torch.float64)

    def coefficients(balance: str, **solve: Any) -> Tensor:
        rule = method_of(Config(balance=balance, rewards=("text", "jpeg"), solve=SolveConfig(**solve))).rule
        return rule.update(rule.init(), Evidence(gram, gram, gains))[1]

    assert torch.equal(coefficients("soft-min", strength=2.0, keep=0.1), soft_min_weights(gains, equal, 2.0, keep=0.1))
    assert coefficients("soft-min", strength=0.0, prior=(1.0, 3.0)).tolist() == [0.25, 0.75]
    assert torch.equal(coefficients("cone", prior=(1.0, 3.0)), torch.tensor([0.25, 0.75], dtype=torch.float64))
    assert torch.equal(coefficients("upgrad", prior=(1.0, 3.0)), torch.tensor([0.25, 0.75], dtype=torch.float64))
    fresh, kept = coefficients("marble", rho=0.0, guard=0.0), coefficients("marble", rho=1.0, guard=0.0)
    assert torch.allclose(fresh, harmonize(gram).coefficients)
    assert torch.allclose(kept, 1.5 * equal / gram.diagonal().sqrt())
    wanted = coefficients("noise-aware", prior=(1.0, 3.0)) - coefficients("noise-aware")
    assert float(wanted[1]) > float(wanted[0])
    all_wanted, first = coefficients("catch-up", ahead=1e9), coefficients("catch-up")  # which is far behind
    assert torch.allclose(all_wanted, coefficients("noise-aware"))
    assert float(first[0] / first[1]) > float(all_wanted[0] / all_wanted[1])


def test_a_rule_that_does_not_solve_measures_at_its_own_interval() -> None:
    log = LogConfig(measure_every=4)
    for balance in ("soft-gdpo", "soft-min", "weighted-sum", "uniform", "gdpo"):
        assert method_of(Config(balance=balance, log=log)).every == 4
        validate(Config(balance=balance, log=LogConfig(measure_every=0)))
        with pytest.raises(ConfigError, match=r"no solve\.refresh_every .*; log\.measure_every says how often"):
            validate(Config(balance=balance, solve=SolveConfig(refresh_every=3)))
    assert method_of(Config(balance="marble", log=log)).every == 10
    assert method_of(Config(balance="noise-aware", log=LogConfig(measure_every=0))).every == 1


POSITIVE = (
    "epochs",
    "model.lora_rank",
    "model.lora_alpha",
    "rollout.pool",
    "rollout.prompts_per_epoch",
    "rollout.steps",
    "rollout.batch",
    "loss.beta",
    "loss.a_max",
    "solve.refresh_every",
    "optim.lr",
    "optim.clip",
    "optim.steps_per_epoch",
    "optim.micro_batch",
    "log.eval_prompts",
    "log.eval_images",
    "log.eval_steps",
)


@pytest.mark.parametrize("value", [0, -1, float("nan")])
@pytest.mark.parametrize("key", POSITIVE)
def test_what_must_be_positive(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"config: expected {key} to be positive, got {value}"):
        validate(with_value(key, value, base_of(key)))


def is_float(value: Any) -> bool:
    return isinstance(value, float) or (isinstance(value, tuple) and isinstance(value[0], float))


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("key", [key for key, x in leaves(other(Config(), Config)).items() if is_float(x)])
def test_no_number_is_infinite_or_none(key: str, value: float) -> None:
    numbers = leaves(other(Config(), Config))[key]
    wrong = (value,) * len(numbers) if isinstance(numbers, tuple) else value
    with pytest.raises(ConfigError, match=f"expected {key} "):
        validate(with_value(key, wrong, base_of(key)))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("threads", -1, "threads to be at least 0"),
        ("log.save_every", -1, "log.save_every to be at least 0"),
        ("optim.weight_decay", -1.0, "optim.weight_decay to be at least 0"),
        ("optim.eps", 0.0, "optim.eps to be positive"),
        ("optim.betas", (0.9, 1.0), "optim.betas to be in"),
        ("solve.rho", 1.1, "solve.rho to be in"),
        ("solve.rho", -0.1, "solve.rho to be in"),
        ("solve.guard", 1.0, "solve.guard to be in"),
        ("solve.guard", -0.1, "solve.guard to be in"),
        ("optim.ema_cap", 1.1, "optim.ema_cap to be in"),
        ("optim.ema_cap", float("nan"), "optim.ema_cap to be in"),
        ("loss.kl_weight", -0.1, "loss.kl_weight to be at least 0"),
        ("log.eval_every", -1, "log.eval_every to be at least 0"),
        ("rewards", (), "rewards to name at least one"),
        ("rewards", ("text", "jpeg", "text"), "rewards to be distinct"),
        ("reward_weights", (1.0,), "reward_weights to be empty or 5 numbers, one a reward"),
        ("reward_weights", (1.0,) * 5, "reward_weights only with balance weighted-sum"),
        ("rollout.images_per_prompt", 1, "rollout.images_per_prompt to be at least 2"),
        ("rollout.images_per_prompt", 0, "rollout.images_per_prompt to be at least 2"),
        ("loss.timestep_fraction", 0.0, "loss.timestep_fraction to be in"),
        ("loss.timestep_fraction", 1.1, "loss.timestep_fraction to be in"),
        ("loss.timesteps_per_image", 8, "loss.timesteps_per_image to be at most the 7 that are trained on, got 8"),
        ("loss.timesteps_per_image", -1, "loss.timesteps_per_image to be at most the 7"),
        ("optim.steps_per_epoch", 481, "optim.steps_per_epoch to be at most the 480 images of an epoch, got 481"),
        ("rollout.prompts_per_epoch", 65, "rollout.prompts_per_epoch to be at most rollout.pool = 64, got 65"),
        ("solve.decay", 1.0, "solve.decay to be in"),
        ("solve.strength", -1.0, "solve.strength to be finite and at least 0"),
        ("solve.strength", float("inf"), "solve.strength to be finite and at least 0"),
        ("solve.keep", 1.5, "solve.keep to be in"),
        ("solve.ahead", 0.0, "solve.ahead to be from 1e-9 to 1e9"),
        ("solve.ahead", float("nan"), "solve.ahead to be from 1e-9 to 1e9"),
        ("solve.prior", (1.0,), "solve.prior to be empty or 5 numbers, one a reward"),
        ("solve.prior", (1.0, 1.0, 1.0, 1.0, -1.0), "solve.prior to be finite, at least 0, and not all 0"),
        ("solve.prior", (0.0,) * 5, "solve.prior to be finite, at least 0, and not all 0"),
    ],
)
def test_a_value_that_cannot_be_is_named(key: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^config: expected {message}"):
        validate(with_value(key, value, base_of(key)))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("solve.rho", 0.0),
        ("solve.rho", 1.0),
        ("solve.guard", 0.0),
        ("optim.ema_cap", 1.0),
        ("log.eval_every", 0),
        ("log.watch", ()),
        ("log.trackers", ()),
        ("rewards", ("jpeg",)),
        ("rollout.images_per_prompt", 2),
        ("rollout.prompts_per_epoch", 64),
        ("loss.timestep_fraction", 1.0),
        ("loss.timesteps_per_image", 0),
        ("loss.timesteps_per_image", 7),
        ("optim.steps_per_epoch", 480),
    ],
)
def test_the_last_value_that_can_be(key: str, value: object) -> None:
    validate(with_value(key, value, base_of(key)))


def base_of(key: str) -> Config:
    """A rule that takes the value."""
    switch = key.removeprefix("solve.")
    takes = [name for name, switches in BUILT_IN_RULES.items() if switch in switches]
    return Config(balance=takes[0] if takes else "soft-min")


VALUES: dict[str, Any] = {
    "refresh_every": 3,
    "rho": 0.5,
    "guard": 0.25,
    "decay": 0.5,
    "prior": (1.0, 2.0, 3.0, 4.0, 5.0),
    "strength": 2.0,
    "keep": 0.25,
    "ahead": 0.5,
}


@pytest.mark.parametrize("switch", VALUES)
@pytest.mark.parametrize("balance", [*BUILT_IN_RULES, "marble_core:min_norm_weights"])
def test_a_rule_takes_its_own_numbers_and_refuses_the_others(balance: str, switch: str) -> None:
    config = with_value(f"solve.{switch}", VALUES[switch], Config(balance=balance))
    if switch in BUILT_IN_RULES.get(balance, ("refresh_every", "rho", "decay")):
        validate(config)
        method_of(config)
        assert from_toml_text(to_toml(config)) == config
    else:
        with pytest.raises(ConfigError, match=rf"no solve\.{switch} with balance {balance}, which takes"):
            validate(config)


def test_every_number_of_the_rules_is_one_that_some_rule_takes() -> None:
    assert {switch for taken in BUILT_IN_RULES.values() for switch in taken} == set(VALUES)
    assert {f.name for f in dataclasses.fields(SolveConfig)} == set(VALUES)


def from_toml_text(text: str) -> Config:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.toml"
        path.write_text(text, encoding="utf-8")
        return from_toml(path, Config())


def test_a_file_of_prompts_does_not_depend_on_the_pool() -> None:
    validate(Config(rollout=RolloutConfig(prompts=("prompts.txt",), pool=1, prompts_per_epoch=6)))


def test_blocks_are_not_compiled_where_they_are_gathered() -> None:
    with pytest.raises(ConfigError, match=r"model\.compile to be off with model\.shard"):
        validate(Config(model=ModelConfig(compile=True, shard=True)))


def test_weights_of_rewards_go_with_the_weighted_sum() -> None:
    config = Config(balance="weighted-sum", rewards=("text", "jpeg"), reward_weights=(1.0, -0.5))
    validate(config)
    with pytest.raises(ConfigError, match=r"empty or 3 numbers, one a reward, got \(1\.0, -0\.5\)"):
        validate(dataclasses.replace(config, rewards=("text", "jpeg", "colour")))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("balance", "marbel", r"expected balance .*'marble-paper'.* got 'marbel'\. Did you mean 'marble'\?"),
        ("balance", "weighted_sum", r"got 'weighted_sum'\. Did you mean 'weighted-sum'\?"),
        ("balance", "zzz", r"got 'zzz'\.$"),
        ("rewards", ("jpeg", "objets"), r"rewards .*'similarity'.* got 'objets'\. Did you mean 'objects'\?"),
        ("rewards", ("color",), r"rewards .*or module:callable, got 'color'\. Did you mean 'colour'\?"),
        ("rewards", ("zzz",), r"rewards .*got 'zzz'\.$"),
        ("log.watch", ("object_strict",), r"log\.watch .*Did you mean 'objects_strict'\?"),
    ],
)
def test_a_name_that_is_unknown_gets_the_nearest(key: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(with_value(key, value, Config()))


def test_every_reward_of_the_world_can_be_trained_and_watched() -> None:
    validate(with_value("log.watch", WORLD_REWARDS, Config(rewards=WORLD_REWARDS)))
    assert tuple(load_rewards(WORLD_REWARDS)) == WORLD_REWARDS


def test_paths_of_callables_are_taken_as_they_are() -> None:
    validate(Config(balance="my.rules:own", rewards=("text", "my.file:reward")))
    with pytest.raises(ConfigError, match="rewards: expected the dotted path of a callable"):
        load_rewards(("no.such.module:reward",))


def test_a_file_with_a_byte_order_mark_is_read_and_utf_16_is_named(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_bytes(b"\xef\xbb\xbfepochs = 7\r\n")
    assert from_toml(path, Config()).epochs == 7
    path.write_bytes("epochs = 7".encode("utf-16"))
    with pytest.raises(ConfigError, match=r"config: cannot read .*: it is text in UTF-16, expected text in UTF-8"):
        from_toml(path, Config())


def test_a_misspelled_base_model_is_named_before_its_rewards(tmp_path: Path) -> None:
    config = dataclasses.replace(Config(), model=dataclasses.replace(Config().model, base="nothere"))
    with pytest.raises(ConfigError, match=r"model.base to be world, a folder that exists, or an id .*, got 'nothere'"):
        validate(config)
