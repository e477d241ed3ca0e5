"""The demo: three rules from the same seeds on rewards that conflict, in a few minutes, with one report about all."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import time
from collections.abc import Mapping, Sequence

import numpy as np

from reference.config.settings import Config
from reference.config.toml import from_toml
from reference.errors import ConfigError
from reference.experiments.compare import train_all
from reference.experiments.statistics import Array, crossed_interval, worst
from reference.run.intervals import Interval, interval, verdict
from reference.run.lock import check_unlocked
from reference.run.reading import number, records
from reference.run.report import write_comparison
from reference.run.state import essentials
from reference.text_files import make_folder

RULES = {
    "weighted-sum": "the rewards are added up",
    "soft-gdpo": "the default: each reward's weight follows what it has gained so far",
    "marble": "the paper's solve on the gradients of every tenth step, here 216 rows of mostly noise",
}


def demo(settings: Config) -> str:
    """Run the rules afresh in ``settings.run``, as many at a time as there are cores; returns the findings and the path
    of the report.

    Raises:
        ConfigError: a folder is in use, or holds something else than a run of an earlier demo; nothing was removed.
        TrainingError: a run failed.
    """
    images, cores = settings.rollout.prompts_per_epoch * settings.rollout.images_per_prompt, os.cpu_count() or 1
    jobs = min(len(RULES), cores)
    runs = _planned(settings, jobs)
    make_folder(settings.run)
    for config in runs.values():
        _check_replaceable(config)
    print(
        f"{len(RULES)} runs of {settings.epochs} epochs of {images} images each, from the same base model and seed:\n",
        *(f"  {rule:14}{what}\n" for rule, what in RULES.items()),
        "Their rewards pull against each other. Held-out prompts are scored before and after, with the same noise.\n",
        f"It takes a few minutes; {settings.run}/RULE.log has what each run says.\n",
        sep="",
        flush=True,
    )
    began = time.monotonic()
    for config in runs.values():
        shutil.rmtree(config.run, ignore_errors=True)
        config.run.with_suffix(".log").unlink(missing_ok=True)
    train_all(list(runs.values()), jobs)
    report = write_comparison({rule: config.run for rule, config in runs.items()}, settings.run / "report.html")
    found = {rule: _gains(config) for rule, config in runs.items()}
    minutes = (time.monotonic() - began) / 60
    return f"\nAfter {minutes:.1f} minutes, {findings(found, settings.rewards)}\n\nreport: {report.resolve()}"


def _planned(settings: Config, jobs: int) -> dict[str, Config]:
    """The configuration of each rule's run."""
    log = dataclasses.replace(settings.log, trackers=())
    alone = len(RULES) - 1 if len(RULES) % jobs == 1 else len(RULES)  # the last one, which then has all cores
    return {
        rule: dataclasses.replace(
            settings, run=settings.run / rule, balance=rule, threads=1 if i < alone else jobs, log=log
        )
        for i, rule in enumerate(RULES)
    }


def _check_replaceable(config: Config) -> None:
    """Raise unless there is nothing, or the run of an earlier demo with any seed, which nobody is writing to.

    The file beside the folder is what tells it from a run that was trained by hand with the preset of the demo.
    """
    run, file = config.run, config.run / "config.toml"
    if not run.exists() or (run.is_dir() and not any(run.iterdir())):
        return
    check_unlocked(run)
    with contextlib.suppress(ConfigError):  # a file of another version
        before = from_toml(file, Config())
        same = essentials(dataclasses.replace(before, seed=config.seed)) == essentials(config)
        if same and run.with_suffix(".toml").is_file():
            return
    raise ConfigError(
        f"--folder: {run} is no run of an earlier demo with these settings, and would be lost; nothing was changed. "
        "Choose another --folder, or move it away."
    )


def _gains(config: Config) -> Array:
    """Standardized paired gains on held-out prompts ``[P, K]``; NaN where a reward does not apply."""
    first, *_, last = records(config.run, "eval")
    columns = []
    for name in config.rewards:
        before, after = (np.array([number(x) for x in e["per_prompt"][name]]) for e in (first, last))
        columns.append((after - before) / number(first["within_std"][name]))
    return np.stack(columns, 1)


def findings(gains: Mapping[str, Array], names: Sequence[str]) -> str:
    """The gains as an aligned table, and what their intervals allow to say: nothing is said that was not measured."""
    rows = [["reward", *gains]]
    intervals = {rule: [interval(column.tolist()) for column in x.T] for rule, x in gains.items()}
    for k, name in enumerate(names):
        rows.append([name, *(_text(intervals[rule][k]) for rule in gains)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    head = "gains on held-out prompts in standard deviations, with paired 95 % intervals (* lowered, + raised):"
    return "\n".join([f"{head}\n\n{table}\n", *_sentences(gains, intervals, names)])


def _text(found: Interval) -> str:
    """As ``-0.66 [-0.89, -0.43] *``."""
    mark = {"lowered": " *", "raised": " +"}.get(verdict(found), "")
    return f"{found.mean:+.2f} [{found.low:+.2f}, {found.high:+.2f}]{mark}"


def _sentences(
    gains: Mapping[str, Array], intervals: Mapping[str, Sequence[Interval]], names: Sequence[str]
) -> list[str]:
    """A line a rule, and the paired differences of the smallest gains from the first rule's."""
    lines = []
    for rule, found in intervals.items():
        lowered = [name for name, x in zip(names, found, strict=True) if verdict(x) == "lowered"]
        raised = [name for name, x in zip(names, found, strict=True) if verdict(x) == "raised"]
        said = f"lowers {', '.join(lowered)}" if lowered else "lowers no reward"
        said += ", raises all" if len(raised) == len(names) else f", raises {len(raised)} of {len(names)}"
        lines.append(f"{rule} {said}.")
    first, *others = gains
    for rule in others:
        mean, low, high = crossed_interval(worst(gains[rule][None]) - worst(gains[first][None]))
        word = "larger" if low > 0 else "smaller" if high < 0 else "not told apart"
        lines.append(f"Smallest gain of {rule} minus that of {first}: {mean:+.2f} [{low:+.2f}, {high:+.2f}]: {word}.")
    return [*lines, "One seed: intervals are over prompts alone, and say nothing about other seeds."]
