"""What each part of MARBLE does: runs that differ from ``marble`` in one thing, compared on held-out prompts.

Adam's metric is not among them: gradients in that metric did not reach the others, and are no longer collected. The
candidate can be run at commit 53f21ea.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from reference.config.settings import Config, SolveConfig
from reference.errors import ConfigError, did_you_mean
from reference.experiments.compare import compare, plan_runs
from reference.experiments.comparison import interval_text, markdown_table, seeds_text
from reference.experiments.statistics import Estimate

_HERE = "reference.experiments.candidates"


class Variant(NamedTuple):
    """One difference from ``marble``.

    Attributes:
        part: of the method that differs.
        what: it is instead.
        balance: the rule.
        solve: its numbers.
        rows: how many times the rows of a step.
    """

    part: str
    what: str
    balance: str = "marble"
    solve: SolveConfig = SolveConfig()
    rows: int = 1


def _steps(N: int) -> SolveConfig:
    return SolveConfig(refresh_every=N)


VARIANTS: dict[str, Variant] = {
    "marble": Variant("none", "N = 10, direction kept, rho = 0.7, guard = 0.5"),
    "N-1": Variant("amortization, direction kept", "N = 1", solve=_steps(1)),
    "N-5": Variant("amortization, direction kept", "N = 5", solve=_steps(5)),
    "N-20": Variant("amortization, direction kept", "N = 20", solve=_steps(20)),
    "paper-N-1": Variant("the paper's: weights kept, whole loss", "N = 1", "marble-paper", _steps(1)),
    "paper-N-5": Variant("the paper's: weights kept, whole loss", "N = 5", "marble-paper", _steps(5)),
    "paper-N-10": Variant("the paper's: weights kept, whole loss", "N = 10", "marble-paper", _steps(10)),
    "paper-N-20": Variant("the paper's: weights kept, whole loss", "N = 20", "marble-paper", _steps(20)),
    "paper-signal": Variant("the paper's, on the reward part", "N = 10", "marble_core.rules:marble_paper", _steps(10)),
    "raw": Variant("normalization", "none: min-norm of raw gradients", f"{_HERE}:raw_min_norm", _steps(10)),
    "rho-0": Variant("smoothing", "rho = 0", solve=SolveConfig(rho=0.0)),
    "rho-0.9": Variant("smoothing", "rho = 0.9", solve=SolveConfig(rho=0.9)),
    "guard-0": Variant("guard", "0", solve=SolveConfig(guard=0.0)),
    "guard-0.8": Variant("guard", "0.8", solve=SolveConfig(guard=0.8)),
    "halves": Variant("evidence", "unbiased, from halves of a batch", f"{_HERE}:min_norm_halves", _steps(10)),
    "moments": Variant(
        "evidence",
        "unbiased, moments of 9 steps, N = 1",
        f"{_HERE}:min_norm_halves",
        SolveConfig(refresh_every=1, decay=0.8),
    ),
    "rows-3": Variant("rows of a step", "three times as many, so three times the images", rows=3),
}


def ablate(settings: Config, variants: Sequence[str], seeds: int, folder: Path, *, jobs: int, tables_only: bool) -> str:
    """Train the variants, all of them where none is named, and write ``ablate.md``; finished runs are not repeated.

    Returns:
        A table in Markdown: gains in standard deviations, the smallest and its paired difference from the first
        variant's, and rewards that are lower for certain.

    Raises:
        ConfigError: an unknown variant, or settings that make no sense.
        TrainingError: a run failed; the command can be given again.
    """
    for name in variants:
        if name not in VARIANTS:
            raise ConfigError(f"variants: expected some of {', '.join(VARIANTS)}, got {name!r}."
                              f"{did_you_mean(name, VARIANTS)}")  # fmt: skip
    chosen = {name: VARIANTS[name] for name in dict.fromkeys(variants or VARIANTS)}
    plans = plan_runs({name: _configured(settings, v) for name, v in chosen.items()}, seeds, folder)
    found = compare(plans, folder, jobs=jobs, tables_only=tables_only)
    table = _table(found.numbers, chosen, settings.rewards)
    text = f"{seeds_text(len(found.seeds))}, {settings.epochs} epochs.\n\n{table}"
    (folder / "ablate.md").write_text(text + "\n", encoding="utf-8")
    return text


def _configured(settings: Config, v: Variant) -> Config:
    """The settings of a variant."""
    prompts, r = settings.rollout.prompts_per_epoch * v.rows, settings.rollout
    rollout = dataclasses.replace(r, prompts_per_epoch=prompts, pool=max(r.pool, prompts))
    return dataclasses.replace(settings, balance=v.balance, solve=v.solve, rollout=rollout)


def _table(numbers: Mapping[str, Any], variants: Mapping[str, Variant], rewards: Sequence[str]) -> str:
    """A row a variant."""
    first, rows = next(iter(variants)), []
    for label, v in variants.items():
        gains = numbers["standardized"][label]
        lowered = ", ".join(name for name in rewards if gains[name].high < 0)
        means = [f"{gains[name].mean:+.2f}" for name in rewards]
        against = "" if label == first else interval_text(_negative(numbers["differences"][label]), 2)
        smallest = interval_text(numbers["smallest"][label], 2)
        rows.append([v.part, f"{v.what} (`{label}`)", *means, smallest, against, lowered])
    head = ["what differs", "", *rewards, "smallest", f"minus `{first}`'s", "lower for certain"]
    return markdown_table(head, rows)


def _negative(e: Estimate) -> Estimate:
    """The other rule minus the first one."""
    return Estimate(-e.mean, -e.high, -e.low)
