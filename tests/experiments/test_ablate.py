"""Runs that differ from ``marble`` in one thing: what is trained, and the table of made-up runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from reference.__main__ import main
from reference.config.checks import validate
from reference.config.presets import preset
from reference.config.settings import Config, LogConfig, RolloutConfig, SolveConfig
from reference.config.toml import to_toml
from reference.errors import ConfigError
from reference.experiments.ablate import VARIANTS, ablate
from reference.experiments.compare import plan_runs
from reference.step.method import method_of
from tests.experiments.made_runs import records, write

LOG = LogConfig(watch=("objects",), eval_prompts=3, eval_images=2)
SETTINGS = Config(epochs=2, rewards=("text", "jpeg"), log=LOG, rollout=RolloutConfig(prompts_per_epoch=6, pool=8))


def configured(label: str) -> Config:
    v = VARIANTS[label]
    return dataclasses.replace(SETTINGS, balance=v.balance, solve=v.solve)


def test_every_variant_can_be_trained() -> None:
    methods = {label: method_of(configured(label)) for label in VARIANTS}
    for label in VARIANTS:
        validate(configured(label))
    assert methods["marble"].every == 10
    assert [methods[f"N-{n}"].every for n in (1, 5, 20)] == [1, 5, 20]
    assert [methods[f"paper-N-{n}"].every for n in (1, 5, 10, 20)] == [1, 5, 10, 20]
    assert methods["paper-N-10"].full
    assert not methods["paper-signal"].full
    assert methods["moments"].memory == 0.8


def test_each_differs_from_marble_in_something() -> None:
    """No two variants train the same run, and those of ``marble`` itself change one number."""
    all_of = [v._replace(part="", what="") for v in VARIANTS.values()]
    assert len(set(all_of)) == len(all_of)
    for label, v in VARIANTS.items():
        if v.balance == "marble":
            changed = [k for k, x in dataclasses.asdict(v.solve).items() if x != getattr(SolveConfig(), k)]
            assert len(changed) + (v.rows != 1) == (label != "marble"), label


def test_the_table_of_made_up_runs(tmp_path: Path) -> None:
    """Standard deviations are 0.5 for text and 0.1 for jpeg; ``rows-3`` has 18 prompts an epoch, from a larger pool."""
    gains = {"marble": (0.25, 0.06, 0.3), "raw": (0.5, -0.02, 0.3), "rows-3": (0.25, 0.1, 0.3)}
    for label, found in gains.items():
        rows = dataclasses.replace(SETTINGS.rollout, prompts_per_epoch=18, pool=18)
        rollout = rows if label == "rows-3" else SETTINGS.rollout
        for configs in plan_runs(
            {label: dataclasses.replace(configured(label), rollout=rollout)}, 2, tmp_path
        ).values():
            for config in configs:
                write(config, records(config, found, cpu=60.0))
                (config.run / "config.toml").write_text(to_toml(config), encoding="utf-8")
    text = ablate(SETTINGS, tuple(gains), 2, tmp_path, jobs=1, tables_only=True)
    assert (tmp_path / "ablate.md").read_text(encoding="utf-8") == text + "\n"
    first, raw, threefold = (line.split(" | ") for line in text.splitlines()[4:])
    assert first[1:4] == ["N = 10, direction kept, rho = 0.7, guard = 0.5 (`marble`)", "+0.50", "+0.60"]
    assert first[4:] == ["+0.50 [+0.50, +0.50]", "", " |"]
    assert raw[2:] == ["+1.00", "-0.20", "-0.20 [-0.20, -0.20]", "-0.70 [-0.70, -0.70]", "jpeg |"]
    assert threefold[4] == "+0.50 [+0.50, +0.50]"
    assert threefold[5].startswith("+0.00") or threefold[5].startswith("-0.00")


def test_an_unknown_variant_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"expected some of marble, N-1, .* got 'rho-o'\. Did you mean 'rho-0'"):
        ablate(preset("world"), ("rho-o",), 1, tmp_path, jobs=1, tables_only=True)
    assert main(["ablate", "--variants", "rho-o"]) == 2
    assert "Did you mean 'rho-0'" in capsys.readouterr().err
    assert main(["ablate", "--variants", "raw", "--tables-only", "--folder", str(tmp_path)]) == 2
    assert "no seed that every rule has finished" in capsys.readouterr().err
