"""What every command does: a function each, of its flags."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from reference.config.checks import validate
from reference.config.flags import (
    Ablate,
    Accuracy,
    Compare,
    Controls,
    Demo,
    Diagnose,
    Dilute,
    Evaluate,
    Generate,
    MakePrompts,
    Pretrain,
    Report,
    Runs,
    Settle,
    Similarity,
    Stress,
    Train,
)
from reference.config.presets import preset
from reference.config.settings import Config, Preset, is_world, training_times
from reference.config.toml import from_toml
from reference.errors import TrainingError


def train_command(a: Train) -> None:
    """Run ``train``, or print its plan."""
    validate(a.settings)
    from reference.run.inputs import prepare
    from reference.run.report import reward_table
    from reference.train import train

    if a.dry_run:
        from reference.run.plan import plan

        if is_world(a.settings.model.base):
            prepare(a.settings)
        found = plan(a.settings)
        print(found.text)
        if found.missing:
            raise TrainingError("\n".join(["this run cannot start yet:", *found.missing]))
    else:
        report = train(a.settings, resume=a.resume)
        if report.exists():  # written by the main process
            print(f"\n{reward_table(a.settings.run)}\n\nreport: {report}")


def demo_command(a: Demo) -> None:
    """Run ``demo``."""
    from reference.experiments.demo import demo

    settings = dataclasses.replace(preset("demo"), run=a.folder, epochs=a.epochs, seed=a.seed)
    validate(settings)
    print(demo(settings))


def controls_command(a: Controls) -> None:
    """Run ``controls``."""
    from reference.experiments.controls import controls

    world = preset(a.preset)
    rollout = dataclasses.replace(world.rollout, prompts_per_epoch=a.prompts_per_epoch)
    settings = dataclasses.replace(world, epochs=a.epochs, seed=a.seed, threads=a.threads, rollout=rollout)
    print(controls(settings, a.rewards or world.rewards, a.folder or Path("runs/controls") / a.preset))


def report_command(a: Report) -> None:
    """Run ``report``."""
    from reference.run.report import report_on

    page, faults = report_on(a.run or (Path("runs/world"),), a.out)
    print("".join(f"left out: {fault}\n" for fault in faults), end="", file=sys.stderr)
    print(f"report: {page}")


def compare_command(a: Compare) -> None:
    """Run ``compare``."""
    from reference.experiments.compare import Screening, compare, plan_runs, screened, settings_of_rules

    settings, folder = _shared(a.runs, "compare", a.eval_every)
    plans: Mapping[str, Sequence[Config]] = plan_runs(settings_of_rules(settings, a.rules), a.runs.seeds, folder)
    if a.finalists:
        screening = Screening(a.screening_seeds, a.screening_epochs, a.finalists)
        plans = screened(plans, folder, screening, jobs=a.runs.jobs, tables_only=a.tables_only)
    print(compare(plans, folder, jobs=a.runs.jobs, tables_only=a.tables_only).text)


def _shared(runs: Runs, command: str, eval_every: int) -> tuple[Config, Path]:
    """The settings that all runs of a comparison have, and its folder."""
    world = preset(runs.preset)
    settings = dataclasses.replace(
        world,
        epochs=runs.epochs,
        threads=runs.threads,
        rollout=dataclasses.replace(world.rollout, prompts_per_epoch=runs.prompts_per_epoch),
        log=dataclasses.replace(world.log, eval_prompts=runs.eval_prompts, eval_every=eval_every),
    )
    folder = runs.folder or Path("runs") / command / runs.preset
    return (settings if runs.config is None else from_toml(runs.config, settings)), folder


def ablate_command(a: Ablate) -> None:
    """Run ``ablate``."""
    from reference.experiments.ablate import ablate

    settings, folder = _shared(a.runs, "ablate", 0)
    print(ablate(settings, a.variants, a.runs.seeds, folder, jobs=a.runs.jobs, tables_only=a.tables_only))


def dilute_command(a: Dilute) -> None:
    """Run ``dilute``."""
    from reference.experiments.dilute import dilute

    settings, folder = _shared(a.runs, "dilute", 0)
    print(dilute(settings, a.rules, a.shares, a.runs.seeds, folder, jobs=a.runs.jobs))


def diagnose_command(a: Diagnose) -> None:
    """Run ``diagnose``."""
    from reference.experiments.diagnose import diagnose

    settings = dataclasses.replace(_examined(a.run, a.preset), threads=a.threads)
    folder = a.folder or (Path("runs/diagnose") if a.run is None else a.run / "diagnose")
    print(diagnose(settings, run=a.run, units=a.units, held_out=a.held_out, sketch=a.sketch, folder=folder))


def _examined(run: Path | None, name: Preset) -> Config:
    """The settings of a run, or of a preset where there is none."""
    from reference.run.state import load_run

    return preset(name) if run is None else load_run(run, "auto")[0]


def settle_command(a: Settle) -> None:
    """Run ``settle``."""
    from reference.experiments.settle import Setting, settle
    from reference.experiments.settle_tables import tables

    config = _examined(a.run, a.preset)
    log = dataclasses.replace(config.log, eval_prompts=a.eval_prompts)
    config = dataclasses.replace(config, threads=a.threads, log=log)
    validate(config)
    folder = a.folder or (Path("runs/settle") / a.preset if a.run is None else a.run / "settle")
    found = settle(config, a.run, Setting(a.prompts, a.sizes, a.images), a.batches, folder)
    rows = a.prompts * config.rollout.images_per_prompt * (config.loss.timesteps_per_image or training_times(config))
    text = tables(found, config.rewards, rows)
    (folder / "settle.md").write_text(text + "\n", encoding="utf-8")
    print(text)


def stress_command(a: Stress) -> None:
    """Run ``stress``."""
    from reference.experiments.stress import stress

    print(stress())


def generate_command(a: Generate) -> None:
    """Run ``generate``."""
    from reference.run.generate import generate_grid

    print(f"grid: {generate_grid(a)}")


def evaluate_command(a: Evaluate) -> None:
    """Run ``evaluate``."""
    from reference.experiments.evaluation import evaluate_run

    print(f"{evaluate_run(a)}\nfiles: {a.folder or a.run / 'evaluation'}")


def make_prompts_command(a: MakePrompts) -> None:
    """Run ``make-prompts``."""
    from reference.prompts.made import write_prompts

    out = a.out or Path("prompts") / f"{a.kind}.{'jsonl' if a.kind == 'geneval' else 'txt'}"
    made, test = write_prompts(a.kind, out, a.seed, count=a.count, test_count=a.test_count)
    print(f"{a.count} prompts to train on: {made}\n{a.test_count} held-out prompts, none of them there: {test}")


def accuracy_command(a: Accuracy) -> None:
    """Run ``world-accuracy``."""
    from reference.world.accuracy import accuracy

    print(accuracy(a.count, a.seed))


def pretrain_command(a: Pretrain) -> None:
    """Run ``world-pretrain``."""
    from reference.world.pretrain import pretrain

    pretrain(a.config, a.folder)


def similarity_command(a: Similarity) -> None:
    """Run ``world-similarity``."""
    from reference.world.similarity import train_dual_encoder

    train_dual_encoder(a.config, a.folder)
