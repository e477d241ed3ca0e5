"""Held-out evaluation, and the experiments made of several runs."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from reference.config.presets import preset
from reference.config.settings import Config
from reference.config.toml import to_toml
from reference.errors import ConfigError, TrainingError
from reference.experiments import controls as controls_module
from reference.experiments import demo as demo_module
from reference.experiments.controls import controls, held_out_gain
from reference.experiments.demo import RULES, demo, findings
from reference.interfaces import Scores, plain_prompts
from reference.policy.adapters import Adapter, active, adapter_state, add_lora, load_adapter
from reference.policy.base import load_base
from reference.prompts.pool import world_prompts
from reference.rewards.scorer import Scorer, load_rewards
from reference.run.reading import records
from reference.step.chance import generator
from reference.step.evaluation import Judging, evaluate, prompt_means
from reference.step.rollout import Sampling, generate_batches
from reference.world.accuracy import accuracy
from tests.experiments.made_runs import write

NAN = float("nan")


def tiny(run: Path, epochs: int = 1) -> Config:
    return dataclasses.replace(preset("tiny"), run=run, epochs=epochs)


def test_prompts_are_the_units_and_inapplicable_images_do_not_count() -> None:
    values = torch.tensor([[1.0], [3.0], [5.0], [0.0], [0.0], [0.0]])
    applicable = torch.tensor([[True], [True], [True], [False], [False], [False]])
    means = prompt_means(Scores(values, applicable), images=2)
    assert means[:2].flatten().tolist() == [2.0, 5.0]
    assert means[2].isnan().all()


def test_generators_depend_on_seed_and_purpose_alone() -> None:
    draw = lambda *key: torch.randn(3, generator=generator(*key)).tolist()  # noqa: E731
    assert draw(0, "a", 1) == draw(0, "a", 1)
    assert len({tuple(draw(*key)) for key in ((0, "a", 1), (0, "a", 2), (1, "a", 1), (0, "b", 1))}) == 4


def test_evaluation_uses_the_weights_given_and_leaves_the_policy_alone() -> None:
    base = load_base("world")
    policy = add_lora(base.transformer, rank=2, alpha=4.0, targets="linear", seed=0)
    fresh = adapter_state(policy, "default")
    moved = {name: x + 0.05 for name, x in fresh.items()}
    prompts = plain_prompts(world_prompts(3, 0, held_out=True))
    scorer = Scorer(load_rewards(("colour", "jpeg")), torch.device("cpu"))

    def scores(state: dict[str, torch.Tensor], batch: int = 6) -> torch.Tensor:
        judging = Judging(2, 0, Sampling("euler", 2, batch))
        found, images = evaluate(policy, base, state, prompts, scorer, judging)
        assert images.shape == (6, 3, 32, 32)
        return found.values

    assert torch.equal(scores(fresh), scores(fresh))
    torch.testing.assert_close(scores(fresh, batch=4), scores(fresh), rtol=0, atol=2e-3)
    assert not torch.allclose(scores(moved), scores(fresh), atol=2e-3)
    after = adapter_state(policy, "default")
    assert all(torch.equal(after[name], fresh[name]) for name in fresh)


def test_images_come_from_the_adapter_asked_for() -> None:
    base = load_base("world")
    policy = add_lora(base.transformer, rank=2, alpha=4.0, targets="linear", seed=0)
    load_adapter(policy, "old", {name: x + 0.05 for name, x in adapter_state(policy, "old").items()})
    noise = torch.randn(2, *base.latent_shape)

    def drawn(adapter: Adapter) -> tuple[Tensor, Tensor]:
        texts = ["a red circle"] * 2
        return next(generate_batches(policy, base, texts, noise, adapter, Sampling("euler", 2, 2)))

    draw = {"default": drawn("default"), "old": drawn("old"), "base": drawn("base")}
    torch.testing.assert_close(draw["default"][0], draw["base"][0], rtol=0, atol=1e-5)
    assert not torch.allclose(draw["old"][0], draw["base"][0], atol=1e-2)
    with active(policy, "default"):
        assert torch.equal(base.decode(draw["old"][0]), draw["old"][1])


@pytest.mark.slow
def test_controls_report_each_reward_and_do_not_repeat_themselves(tmp_path: Path) -> None:
    settings = tiny(tmp_path)
    table = controls(settings, ("colour", "jpeg"), tmp_path / "controls")
    lines = table.splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| colour", "| jpeg"]
    first, last, change = held_out_gain(dataclasses.replace(settings, run=tmp_path / "controls" / "colour"), "colour")
    evals = records(tmp_path / "controls" / "colour", "eval")
    assert (first, last) == (evals[0]["rewards"]["colour"]["mean"], evals[-1]["rewards"]["colour"]["mean"])
    assert change.mean == pytest.approx(last - first, abs=1e-6)
    written = (tmp_path / "controls" / "colour" / "metrics.jsonl").stat().st_mtime_ns
    assert controls(settings, ("colour", "jpeg"), tmp_path / "controls") == table
    assert (tmp_path / "controls" / "colour" / "metrics.jsonl").stat().st_mtime_ns == written


@pytest.mark.slow
def test_the_demo_trains_all_rules_from_the_same_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = dataclasses.replace(tiny(tmp_path / "demo"), rewards=("colour", "jpeg"))
    text = demo(settings)
    assert "3 runs of 1 epochs of 8 images" in capsys.readouterr().out
    assert text.endswith(f"report: {(tmp_path / 'demo' / 'report.html').resolve()}")
    for word in (*RULES, "colour", "jpeg", "One seed"):
        assert word in text
    start = [records(tmp_path / "demo" / rule, "eval")[0]["rewards"] for rule in RULES]
    means = [[found[name]["mean"] for name in ("colour", "jpeg")] for found in start]
    assert means[0] == pytest.approx(means[1], abs=1e-3)  # one may have more threads, which round otherwise
    assert means[0] == pytest.approx(means[2], abs=1e-3)
    assert (tmp_path / "demo" / "report.html").stat().st_size > 10_000


def test_controls_check_every_run_before_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(config: Config, *, resume: bool) -> None:
        raise AssertionError(f"{config.run} {resume}")

    monkeypatch.setattr(controls_module, "train", trained)
    settings = tiny(tmp_path, epochs=2)
    for name in ("colour", "jpeg"):
        config = dataclasses.replace(settings, run=tmp_path / name, rewards=(name,), balance="uniform")
        means = [{"kind": "eval", "epoch": e, "per_prompt": {name: [e, e + 1.0]}, "rewards": {name: {"mean": e + 0.5}}}
                 for e in (0, 1, 2)]  # fmt: skip
        write(config, means)
        (config.run / "config.toml").write_text(to_toml(config), encoding="utf-8")
    assert "| jpeg | 0.500 | 2.500 | +2.000 |" in controls(settings, ("colour", "jpeg"), tmp_path)
    shorter = dataclasses.replace(settings, epochs=1)  # than what was trained: its evaluation is there
    assert "| jpeg | 0.500 | 1.500 | +1.000 |" in controls(shorter, ("colour", "jpeg"), tmp_path)
    rollout = dataclasses.replace(settings.rollout, prompts_per_epoch=3)
    for other in (dataclasses.replace(settings, seed=1), dataclasses.replace(settings, rollout=rollout)):
        with pytest.raises(ConfigError, match="colour was made by another configuration"):
            controls(other, ("colour", "jpeg"), tmp_path)
    with pytest.raises(ConfigError, match="Did you mean 'text'"):  # before objects is trained
        controls(settings, ("objects", "txt"), tmp_path)


def _by_compare(run: Path, config: Config) -> None:
    (run / "seed-0").mkdir(parents=True)
    (run / "seed-0" / "config.toml").write_text(to_toml(config), encoding="utf-8")


def _by_hand(run: Path, config: Config) -> None:
    run.mkdir()
    (run / "config.toml").write_text(to_toml(config), encoding="utf-8")


def _with_other_settings(run: Path, config: Config) -> None:
    _by_demo(run, dataclasses.replace(config, optim=dataclasses.replace(config.optim, lr=0.1)))


def _by_demo(run: Path, config: Config) -> None:
    _by_hand(run, config)
    run.with_suffix(".toml").write_text(to_toml(config), encoding="utf-8")


@pytest.mark.parametrize("other", [_by_compare, _by_hand, _with_other_settings])
def test_the_demo_removes_runs_of_a_demo_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: Callable[[Path, Config], None]
) -> None:
    def stops(configs: list[Config], jobs: int) -> None:
        raise TrainingError("begun")

    monkeypatch.setattr(demo_module, "train_all", stops)
    settings, (first, *_, last) = tiny(tmp_path), RULES
    log = dataclasses.replace(settings.log, trackers=())
    of = {rule: dataclasses.replace(settings, run=tmp_path / rule, balance=rule, log=log, seed=7) for rule in RULES}
    _by_demo(tmp_path / first, of[first])
    other(tmp_path / last, of[last])
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match=f"{last} is no run of an earlier demo"):
        demo(settings)
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / last).rename(tmp_path / "elsewhere")
    with pytest.raises(TrainingError, match="begun"):
        demo(settings)
    assert not (tmp_path / first).exists()


def test_the_demo_says_what_its_runs_showed_and_no_more() -> None:
    rng = np.random.default_rng(0)
    common, noise = rng.normal(size=(60, 1)), 0.1 * rng.normal(size=(60, 2))
    up, down = np.array([0.5, 0.4]), np.array([1.0, -0.6])
    text = findings({"sum": noise + down, "ours": noise + up}, ("text", "jpeg"))
    assert "sum lowers jpeg, raises 1 of 2." in text
    assert "ours lowers no reward, raises all." in text
    assert "Smallest gain of ours minus that of sum: +1.0" in text
    assert "]: larger." in text
    assert re.search(r"jpeg +-0.[56]\d \[.*\] \* +\+0.[34]\d \[.*\] \+", text)
    unclear = findings({"sum": common + 0 * down, "ours": -common + 0 * down}, ("text", "jpeg"))
    assert "sum lowers no reward, raises 0 of 2." in unclear
    assert "not told apart" in unclear
    assert "*" not in unclear.split("):", 1)[1]


def test_a_missing_base_model_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"transformer/config.json.*missing.*world-pretrain"):
        load_base(str(tmp_path))


def test_accuracy_on_a_few_scenes() -> None:
    text = accuracy(count=20, seed=3)
    assert "| objects | 1.000 |" in text
    assert "| text | 1.000 |" in text
    assert "objects: exactly 1 on 100.0 % of 16 scenes." in text
    with pytest.raises(ConfigError, match="--count: expected at least 10, got 9"):
        accuracy(count=9)
