"""Several rules, several seeds, the same random numbers: trained by one command that can be stopped, and compared."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from reference.config.checks import validate
from reference.config.settings import Config
from reference.config.toml import from_toml, to_toml
from reference.errors import ConfigError, Interrupted, TrainingError
from reference.experiments.comparison import Comparison, finished, judged_by, write_tables
from reference.run.inputs import prepare
from reference.run.state import begun, essentials
from reference.text_files import make_folder


def settings_of_rules(settings: Config, rules: Sequence[str]) -> dict[str, Config]:
    """The settings of each rule by label, a rule's name or the name before ``=`` of ``label=file.toml``.

    Raises:
        ConfigError: no rule, a label twice or of other characters, or a file that cannot be used.
    """
    found: dict[str, Config] = {}
    for rule in rules:
        label, _, file = rule.partition("=")
        if not re.fullmatch(r"\w[\w.:-]*", label) or _folder_name(label) in map(_folder_name, found):
            raise ConfigError(f"rules: expected distinct names of letters, digits and any of _.:-, got {list(rules)}.")
        found[label] = from_toml(Path(file), settings) if file else dataclasses.replace(settings, balance=label)
    return found


def _folder_name(label: str) -> str:
    """A colon is no part of a name everywhere."""
    return label.replace(":", "-")


def plan_runs(rules: Mapping[str, Config], seeds: int, folder: Path) -> dict[str, list[Config]]:
    """The configuration of every run of every rule, a seed each.

    Raises:
        ConfigError: no rule or seed, a configuration that makes no sense, rules that are not judged alike, or a run in
            the folder that was made by another configuration.
    """
    plans: dict[str, list[Config]] = {}
    if not rules or seeds < 1:
        raise ConfigError(f"rules and seeds: expected at least one of each, got {list(rules)} and {seeds}.")
    for label, config in rules.items():
        place, log = folder / _folder_name(label), dataclasses.replace(config.log, trackers=())
        plans[label] = [
            dataclasses.replace(config, run=place / f"seed-{seed}", seed=seed, log=log) for seed in range(seeds)
        ]
        validate(plans[label][0])
        prepare(plans[label][0])
        if judged_by(plans[label][0]) != judged_by(next(iter(plans.values()))[0]):
            raise ConfigError(f"rules: {label} has other rewards or another evaluation than {next(iter(plans))}.")
    for config in (config for configs in plans.values() for config in configs):
        check_begun(config)
    return plans


def check_begun(config: Config) -> None:
    """Refuse a run, finished or stopped, that was made by another configuration.

    Raises:
        ConfigError: it was, or it has gone further without an evaluation.
    """
    file = config.run / "config.toml"
    if not (finished(config) or begun(config.run)) or not file.exists():
        return
    try:
        found = from_toml(file, Config())
    except ConfigError as error:
        raise ConfigError(f"--folder: {config.run} is of another version ({error}) Choose another.") from error
    if essentials(found) != essentials(config) or judged_by(found) != judged_by(config):
        raise ConfigError(
            f"--folder: {config.run} was made by another configuration (see its config.toml). Choose another."
        )


def compare(plans: Mapping[str, Sequence[Config]], folder: Path, *, jobs: int, tables_only: bool) -> Comparison:
    """Train what is not finished, seed by seed, and write ``tables.md``, ``summary.json`` and two figures.

    Raises:
        TrainingError: a run failed; the others that were under way have ended, and the command can be given again.
        ConfigError: there is no seed that all rules have.
    """
    if not tables_only:
        make_folder(folder)
        in_turn = [config for configs in zip(*plans.values(), strict=True) for config in configs]
        train_all([config for config in in_turn if not finished(config)], jobs)
    return write_tables(plans, folder)


class Screening(NamedTuple):
    """A short comparison that decides which rules are trained to the end.

    Attributes:
        seeds: runs of each rule.
        epochs: of each run.
        finalists: rules that go on, the first one and then those with the largest smallest standardized gain.
    """

    seeds: int
    epochs: int
    finalists: int


def screened(
    plans: Mapping[str, Sequence[Config]], folder: Path, screening: Screening, *, jobs: int, tables_only: bool
) -> dict[str, Sequence[Config]]:
    """Train all rules for a few epochs of a few seeds, write the tables to ``folder/screening``, and choose.

    The runs of the finalists go on from there: nothing is trained twice.

    Raises:
        ConfigError: the screening is longer than the comparison, or there are no finalists.
        TrainingError: a run failed; the command can be given again.
    """
    first, *_ = plans
    seeds, epochs = len(plans[first]), plans[first][0].epochs
    usable = 1 <= screening.seeds <= seeds and 1 <= screening.epochs <= epochs and screening.finalists >= 1
    if not usable:
        raise ConfigError(
            f"screening: expected seeds from 1 to {seeds}, epochs from 1 to {epochs} and at least one finalist, got "
            f"{screening.seeds}, {screening.epochs} and {screening.finalists}."
        )
    short = {
        label: [dataclasses.replace(config, epochs=screening.epochs) for config in configs[: screening.seeds]]
        for label, configs in plans.items()
    }
    smallest = compare(short, folder / "screening", jobs=jobs, tables_only=tables_only).numbers["smallest"]
    others = sorted((label for label in plans if label != first), key=lambda label: -smallest[label].mean)
    kept = {first, *others[: screening.finalists - 1]}
    print(f"finalists of the screening: {', '.join(label for label in plans if label in kept)}", flush=True)
    return {label: configs for label, configs in plans.items() if label in kept}


def train_all(waiting: Sequence[Config], jobs: int) -> None:
    """So many runs at a time. After a failure, Ctrl-C or SIGTERM no other one begins, and those under way end first.

    Raises:
        TrainingError: a run failed.
        Interrupted: by SIGTERM, which is passed on to the runs; Ctrl-C reaches them by itself.
    """
    left, under_way, processes = list(waiting), set[Future[str]](), set[subprocess.Popen[bytes]]()
    with ThreadPoolExecutor(max_workers=max(jobs, 1)) as pool, _sigterm_for(processes):
        while left or under_way:
            while left and len(under_way) < max(jobs, 1):
                under_way.add(pool.submit(_train, left.pop(0), processes))
            done, under_way = wait(under_way, return_when=FIRST_COMPLETED)
            for future in done:
                print(f"{future.result()}: done, {len(left) + len(under_way)} left", flush=True)


def _train(config: Config, processes: set[subprocess.Popen[bytes]]) -> str:
    """One run in a process of its own; resumed if it was begun."""
    name = f"{config.run.parent.name}/{config.run.name}"
    config.run.parent.mkdir(parents=True, exist_ok=True)
    file = config.run.with_suffix(".toml")
    file.write_text(to_toml(config), encoding="utf-8")
    command = [sys.executable, "-m", "reference", "train", "--config", str(file), "--run", str(config.run)]
    command += ["--resume"] if begun(config.run) else []
    log = config.run.with_suffix(".log")
    with log.open("a", encoding="utf-8") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    processes.add(process)
    status = process.wait()
    processes.discard(process)
    if status:
        last = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-5:])
        raise TrainingError(f"{name} ended with status {status}; {log} ends with\n{last}")
    return name


@contextlib.contextmanager
def _sigterm_for(processes: set[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Within it SIGTERM stops the runs as well: without it they would go on, with nobody to wait for them."""

    def handle(number: int, frame: FrameType | None) -> None:
        for process in set(processes):
            process.send_signal(number)
        raise Interrupted("stopped, and so are the runs under way; give the same command again to go on")

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
