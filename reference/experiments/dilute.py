"""A specialist reward, diluted: the share of the prompts that it applies to goes down, and its gain with each rule.

The paper's first finding is that a few specialist samples drown among the others. Here ``text`` applies to the prompts
with a text alone, and the world's rewards have raw scales as those of the field: their spread over the images of one
prompt goes from 0.3 (text) to 0.007 (sharpness).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from reference.config.settings import Config
from reference.errors import ConfigError
from reference.experiments.compare import compare, plan_runs, settings_of_rules
from reference.experiments.comparison import interval_text, markdown_table, seeds_text
from reference.experiments.statistics import Estimate
from reference.run.reading import PALETTE


def dilute(
    settings: Config, rules: Sequence[str], shares: Sequence[int], seeds: int, folder: Path, *, jobs: int
) -> str:
    """Train every rule with one prompt in so many that has a text; finished runs are not repeated.

    Returns:
        A table in Markdown, also written to ``dilute.md`` beside a figure: gains in standard deviations on the same
        held-out prompts, whatever the share in training.

    Raises:
        ConfigError: shares below 2, rewards without text, or settings that make no sense.
        TrainingError: a run failed; the command can be given again.
    """
    if not shares or min(shares) < 2:
        raise ConfigError(f"shares: expected numbers from 2 on, one prompt in so many has a text, got {list(shares)}.")
    plans = {n: _planned(settings, rules, n, seeds, folder / f"1-in-{n}") for n in dict.fromkeys(shares)}
    rewards = next(configs for planned in plans.values() for configs in planned.values())[0].rewards
    if "text" not in rewards:
        raise ConfigError(f"rewards: expected text, the one that is diluted, among them, got {list(rewards)}.")
    found = {
        n: compare(planned, folder / f"1-in-{n}", jobs=jobs, tables_only=False).numbers for n, planned in plans.items()
    }
    text = f"{seeds_text(seeds)}, {settings.epochs} epochs.\n\n{_table(found, rewards)}"
    (folder / "dilute.md").write_text(text + "\n", encoding="utf-8")
    with matplotlib.rc_context({"svg.hashsalt": "marble"}):  # the same file from the same runs
        _figure(found).savefig(folder / "dilute.svg", metadata={"Date": None})
    return text


def _planned(settings: Config, rules: Sequence[str], n: int, seeds: int, folder: Path) -> dict[str, list[Config]]:
    """The runs of a comparison in which one prompt in ``n`` has a text."""
    rollout = dataclasses.replace(settings.rollout, prompts=("world:text", "world:objects"), weights=(1.0, n - 1.0))
    return plan_runs(settings_of_rules(dataclasses.replace(settings, rollout=rollout), rules), seeds, folder)


def _table(found: Mapping[int, Mapping[str, Any]], rewards: Sequence[str]) -> str:
    """A row a share and rule."""
    rows = []
    for n, numbers in found.items():
        for label, gains in numbers["standardized"].items():
            means = [f"{gains[name].mean:+.2f}" for name in rewards]
            rows.append([f"{n}", label, *means, interval_text(numbers["smallest"][label], 2)])
    return markdown_table(["one text prompt in", "rule", *rewards, "smallest"], rows)


def _figure(found: Mapping[int, Mapping[str, Any]]) -> Figure:
    """The smallest gain and the specialist's against the share, a line a rule."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, label in enumerate(next(iter(found.values()))["smallest"]):
        color = PALETTE[i % len(PALETTE)]
        _line(left, {n: numbers["smallest"][label] for n, numbers in found.items()}, color, label)
        _line(right, {n: numbers["standardized"][label]["text"] for n, numbers in found.items()}, color, None)
    left.set(title="smallest gain of all rewards", ylabel="held-out gain, standard deviations")
    right.set(title="gain of text, the specialist")
    for axes in (left, right):
        axes.axhline(0, color="0.5", lw=0.8)
        axes.set(xlabel="one prompt in so many has a text", xscale="log")
        axes.set_xticks(list(found), [f"{n}" for n in found])
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=6, frameon=False)
    return figure


def _line(axes: Any, estimates: Mapping[int, Estimate], color: str, label: str | None) -> None:
    """Means with their intervals."""
    mean, low, high = np.array(list(estimates.values())).T
    error = np.nan_to_num([mean - low, high - mean])
    axes.errorbar(list(estimates), mean, yerr=error, marker="o", color=color, capsize=3, label=label)
