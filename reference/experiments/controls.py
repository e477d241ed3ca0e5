"""Controls: one run a reward, to see whether each can be raised alone. One that cannot says nothing about balancing."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from reference.config.checks import validate
from reference.config.settings import Config
from reference.experiments.compare import check_begun
from reference.experiments.comparison import finished
from reference.run.inputs import prepare
from reference.run.intervals import Interval, change
from reference.run.reading import number, records
from reference.run.state import begun
from reference.text_files import make_folder
from reference.train import train


def controls(settings: Config, rewards: Sequence[str], folder: Path) -> str:
    """Train with each reward alone and report its gain on held-out prompts; finished runs are not repeated.

    Returns:
        A table in Markdown: reward, mean before and after, gain with its 95 % interval over prompts.

    Raises:
        ConfigError: settings that make no sense, or a run in the folder that was made with others; nothing is trained.
    """
    plans = {
        name: dataclasses.replace(settings, run=folder / name, rewards=(name,), balance="uniform") for name in rewards
    }
    for config in plans.values():
        validate(config)
        prepare(config)
        check_begun(config)
    make_folder(folder)
    lines = ["| reward alone | before | after | gain | 95 % interval | prompts |", "|---|---|---|---|---|---|"]
    for name, config in plans.items():
        if not finished(config):
            train(config, resume=begun(config.run))
        first, last, gain = held_out_gain(config, name)
        lines.append(
            f"| {name} | {first:.3f} | {last:.3f} | {gain.mean:+.3f} | [{gain.low:+.3f}, {gain.high:+.3f}] | {gain.n} |"
        )
    return "\n".join(lines)


def held_out_gain(config: Config, reward: str) -> tuple[float, float, Interval]:
    """First and last held-out mean of a reward, and its paired change over prompts."""
    evals = [r for r in records(config.run, "eval") if r["epoch"] in (0, config.epochs)]
    first, last = ([number(x) for x in e["per_prompt"][reward]] for e in (evals[0], evals[-1]))
    return evals[0]["rewards"][reward]["mean"], evals[-1]["rewards"][reward]["mean"], change(first, last)
