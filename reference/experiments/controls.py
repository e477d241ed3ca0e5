"""Controls: one run a reward, to see whether each can be raised alone. One that cannot says nothing about balancing."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from reference.config.settings import Config
from reference.run.intervals import Interval, change
from reference.run.reading import number, records
from reference.run.state import begun
from reference.train import train


def controls(settings: Config, rewards: Sequence[str], folder: Path) -> str:
    """Train with each reward alone and report its gain on held-out prompts; finished runs are not repeated.

    Returns:
        A table in Markdown: reward, mean before and after, gain with its 95 % interval over prompts.
    """
    lines = ["| reward alone | before | after | gain | 95 % interval | prompts |", "|---|---|---|---|---|---|"]
    for name in rewards:
        run_once(dataclasses.replace(settings, run=folder / name, rewards=(name,), balance="uniform"))
        first, last, gain = held_out_gain(folder / name, name)
        lines.append(
            f"| {name} | {first:.3f} | {last:.3f} | {gain.mean:+.3f} | [{gain.low:+.3f}, {gain.high:+.3f}] | {gain.n} |"
        )
    return "\n".join(lines)


def run_once(config: Config) -> None:
    """Train unless this run is finished; continue one that was stopped."""
    if not (config.run / "report.html").exists():
        train(config, resume=begun(config.run))


def held_out_gain(run: Path, reward: str) -> tuple[float, float, Interval]:
    """First and last held-out mean of a reward, and its paired change over prompts."""
    evals = records(run, "eval")
    first, last = ([number(x) for x in e["per_prompt"][reward]] for e in (evals[0], evals[-1]))
    return evals[0]["rewards"][reward]["mean"], evals[-1]["rewards"][reward]["mean"], change(first, last)
