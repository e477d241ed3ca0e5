"""Several rules, several seeds, the same random numbers: trained by one command that can be stopped, and compared."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from reference.config import Config, from_toml, to_toml
from reference.errors import ConfigError, TrainingError
from reference.experiments.comparison import finished, write_tables
from reference.train import prepare
from reference.validation import validate


def plan_runs(settings: Config, rules: Sequence[str], seeds: int, folder: Path) -> dict[str, list[Config]]:
    """The configuration of every run by label, a rule's name or the name before ``=`` of ``label=file.toml``.

    Raises:
        ConfigError: a label twice, a file that cannot be used, or a configuration that makes no sense.
    """
    plans: dict[str, list[Config]] = {}
    if not rules or seeds < 1:
        raise ConfigError(f"rules and seeds: expected at least one of each, got {list(rules)} and {seeds}.")
    for rule in rules:
        label, _, file = rule.partition("=")
        if label in plans or not label or "/" in label:
            raise ConfigError(f"rules: expected distinct names without a slash, got {list(rules)}.")
        config = from_toml(Path(file), settings) if file else dataclasses.replace(settings, balance=label)
        log = dataclasses.replace(config.log, trackers=())
        plans[label] = [
            dataclasses.replace(config, run=folder / label.replace(":", "-") / f"seed-{seed}", seed=seed, log=log)
            for seed in range(seeds)
        ]
        validate(plans[label][0])
        prepare(plans[label][0])
    return plans


def compare(plans: Mapping[str, Sequence[Config]], folder: Path, *, jobs: int, tables_only: bool) -> str:
    """Train what is not finished, seed by seed, and write ``tables.md``, ``summary.json`` and two figures.

    Returns:
        The text of ``tables.md``.

    Raises:
        TrainingError: a run failed; the others that were under way have ended, and the command can be given again.
        ConfigError: there is no seed that all rules have.
    """
    if not tables_only:
        waiting = [
            config for configs in zip(*plans.values(), strict=True) for config in configs if not finished(config)
        ]
        with ThreadPoolExecutor(max_workers=max(jobs, 1)) as pool:
            try:
                for left, name in enumerate(pool.map(_train, waiting), start=1):
                    print(f"{name}: done, {len(waiting) - left} left", flush=True)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    return write_tables(plans, folder)


def _train(config: Config) -> str:
    """One run in a process of its own; resumed if it was begun."""
    name = f"{config.run.parent.name}/{config.run.name}"
    config.run.parent.mkdir(parents=True, exist_ok=True)
    file = config.run.with_suffix(".toml")
    file.write_text(to_toml(config), encoding="utf-8")
    command = [sys.executable, "-m", "reference", "train", "--config", str(file), "--run", str(config.run)]
    command += ["--resume"] if (config.run / "metrics.jsonl").exists() else []
    log = config.run.with_suffix(".log")
    with log.open("a", encoding="utf-8") as out:
        status = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, check=False).returncode
    if status:
        last = "\n".join(log.read_text(encoding="utf-8").splitlines()[-5:])
        raise TrainingError(f"{name} ended with status {status}; {log} ends with\n{last}")
    return name
