"""Command line: ``python -m reference COMMAND --help``."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

try:
    import tyro
except ImportError as error:
    need = "python -m reference needs the trainer's packages. In a clone: make setup, or pip install '.[reference]'"
    raise SystemExit(f"{need} ({error}).") from None

from reference.arguments import (
    Accuracy,
    Compare,
    Controls,
    Demo,
    Diagnose,
    Evaluate,
    Generate,
    MakePrompts,
    Pretrain,
    Report,
    Settle,
    Similarity,
    Stress,
    Train,
)
from reference.config.checks import validate
from reference.config.presets import preset
from reference.config.settings import Config, Preset, is_world, training_times
from reference.config.toml import from_toml
from reference.errors import CheckpointError, ConfigError, Interrupted, RewardError, TrainingError


def train_arguments(argv: Sequence[str]) -> Train:
    """Parse the flags of ``train``: the preset and the file first, as they are the defaults of all other flags."""
    first = argparse.ArgumentParser(prog="python -m reference train", add_help=False, allow_abbrev=False)
    first.add_argument("--preset", choices=typing.get_args(Preset), default="world")
    first.add_argument("--config", type=Path)
    known, _ = first.parse_known_args(argv)
    settings = preset(known.preset)
    if known.config is not None:
        settings = from_toml(known.config, settings)
    return tyro.cli(
        Train, prog="python -m reference train", args=list(argv), default=Train(settings), use_underscores=False
    )


def train_command(argv: Sequence[str]) -> None:
    """``train``, or its plan."""
    arguments = train_arguments(argv)
    validate(arguments.settings)
    from reference.run.inputs import prepare
    from reference.train import train

    if arguments.dry_run:
        from reference.run.plan import plan

        if is_world(arguments.settings.model.base):
            prepare(arguments.settings)
        print(plan(arguments.settings))
    else:
        print(f"report: {train(arguments.settings, resume=arguments.resume)}")


def demo_command(argv: Sequence[str]) -> None:
    """``demo``."""
    a = tyro.cli(Demo, prog="python -m reference demo", args=list(argv))
    from reference.experiments.demo import demo

    settings = dataclasses.replace(preset("demo"), run=a.folder, epochs=a.epochs, seed=a.seed)
    validate(settings)
    print(demo(settings))


def controls_command(argv: Sequence[str]) -> None:
    """``controls``."""
    a = tyro.cli(Controls, prog="python -m reference controls", args=list(argv))
    from reference.experiments.controls import controls

    world = preset(a.preset)
    rollout = dataclasses.replace(world.rollout, prompts_per_epoch=a.prompts_per_epoch)
    settings = dataclasses.replace(world, epochs=a.epochs, seed=a.seed, threads=a.threads, rollout=rollout)
    print(controls(settings, a.rewards or world.rewards, a.folder or Path("runs/controls") / a.preset))


def report_command(argv: Sequence[str]) -> None:
    """``report``."""
    a = tyro.cli(Report, prog="python -m reference report", args=list(argv))
    from reference.run.report import write_report

    if not a.run.is_dir():
        raise ConfigError(f"--run: expected the folder of a run, got {a.run}.")
    try:
        print(f"report: {write_report(a.run)}")
    except ValueError as error:
        raise ConfigError(f"--run: cannot report on {a.run}: {error}") from error


def compare_command(argv: Sequence[str]) -> None:
    """``compare``."""
    a = tyro.cli(Compare, prog="python -m reference compare", args=list(argv))
    from reference.experiments.compare import Screening, compare, plan_runs, screened

    world = preset(a.preset)
    settings = dataclasses.replace(
        world,
        epochs=a.epochs,
        threads=a.threads,
        rollout=dataclasses.replace(world.rollout, prompts_per_epoch=a.prompts_per_epoch),
        log=dataclasses.replace(world.log, eval_prompts=a.eval_prompts, eval_every=a.eval_every),
    )
    settings = from_toml(a.config, settings) if a.config is not None else settings
    folder = a.folder or Path("runs/compare") / a.preset
    plans: Mapping[str, Sequence[Config]] = plan_runs(settings, a.rules, a.seeds, folder)
    if a.finalists:
        screening = Screening(a.screening_seeds, a.screening_epochs, a.finalists)
        plans = screened(plans, folder, screening, jobs=a.jobs, tables_only=a.tables_only)
    print(compare(plans, folder, jobs=a.jobs, tables_only=a.tables_only))


def diagnose_command(argv: Sequence[str]) -> None:
    """``diagnose``."""
    a = tyro.cli(Diagnose, prog="python -m reference diagnose", args=list(argv))
    from reference.experiments.diagnose import diagnose

    settings = preset(a.preset) if a.run is None else from_toml(a.run / "config.toml", preset(a.preset))
    settings = dataclasses.replace(settings, threads=a.threads)
    folder = a.folder or (Path("runs/diagnose") if a.run is None else a.run / "diagnose")
    print(diagnose(settings, run=a.run, units=a.units, held_out=a.held_out, sketch=a.sketch, folder=folder))


def settle_command(argv: Sequence[str]) -> None:
    """``settle``."""
    a = tyro.cli(Settle, prog="python -m reference settle", args=list(argv))
    from reference.experiments.settle import Setting, settle
    from reference.experiments.settle_tables import tables

    config = preset(a.preset) if a.run is None else from_toml(a.run / "config.toml", preset(a.preset))
    log = dataclasses.replace(config.log, eval_prompts=a.eval_prompts)
    config = dataclasses.replace(config, threads=a.threads, log=log)
    validate(config)
    folder = a.folder or (Path("runs/settle") / a.preset if a.run is None else a.run / "settle")
    found = settle(config, a.run, Setting(a.prompts, a.sizes, a.images), a.batches, folder)
    rows = a.prompts * config.rollout.images_per_prompt * (config.loss.timesteps_per_image or training_times(config))
    text = tables(found, config.rewards, rows)
    (folder / "settle.md").write_text(text + "\n", encoding="utf-8")
    print(text)


def stress_command(argv: Sequence[str]) -> None:
    """``stress``."""
    tyro.cli(Stress, prog="python -m reference stress", args=list(argv))
    from reference.experiments.stress import stress

    print(stress())


def generate_command(argv: Sequence[str]) -> None:
    """``generate``."""
    a = tyro.cli(Generate, prog="python -m reference generate", args=list(argv))
    from reference.run.generate import generate_grid

    found = generate_grid(
        a.run,
        a.prompts,
        a.out or a.run / "grids" / "generated.png",
        count=a.count,
        images=a.images,
        steps=a.steps,
        seed=a.seed,
        untrained=a.untrained,
        device=a.device,
    )
    print(f"grid: {found}")


def evaluate_command(argv: Sequence[str]) -> None:
    """``evaluate``."""
    a = tyro.cli(Evaluate, prog="python -m reference evaluate", args=list(argv))
    from reference.experiments.evaluation import evaluate_run

    folder = a.folder or a.run / "evaluation"
    found = evaluate_run(
        a.run,
        folder,
        prompts=a.prompts,
        rewards=a.rewards,
        images=a.images,
        steps=a.steps,
        seed=a.seed,
        base=a.base,
        models=a.models,
        device=a.device,
    )
    print(f"{found}\nfiles: {folder}")


def make_prompts_command(argv: Sequence[str]) -> None:
    """``make-prompts``."""
    a = tyro.cli(MakePrompts, prog="python -m reference make-prompts", args=list(argv))
    from reference.prompts.made import write_prompts

    out = a.out or Path("prompts") / f"{a.kind}.{'jsonl' if a.kind == 'geneval' else 'txt'}"
    made, test = write_prompts(a.kind, out, a.seed, count=a.count, test_count=a.test_count)
    print(f"{a.count} prompts to train on: {made}\n{a.test_count} held-out prompts, none of them there: {test}")


def accuracy_command(argv: Sequence[str]) -> None:
    """``world-accuracy``."""
    a = tyro.cli(Accuracy, prog="python -m reference world-accuracy", args=list(argv))
    from reference.world.accuracy import accuracy

    print(accuracy(a.count, a.seed))


def pretrain_command(argv: Sequence[str]) -> None:
    """``world-pretrain``."""
    a = tyro.cli(Pretrain, prog="python -m reference world-pretrain", args=list(argv))
    from reference.world.pretrain import pretrain

    pretrain(a.config, a.folder)


def similarity_command(argv: Sequence[str]) -> None:
    """``world-similarity``."""
    a = tyro.cli(Similarity, prog="python -m reference world-similarity", args=list(argv))
    from reference.world.similarity import train_dual_encoder

    train_dual_encoder(a.config, a.folder)


COMMANDS: dict[str, tuple[Callable[[Sequence[str]], None], str]] = {
    "train": (train_command, "fine-tune a base model with several rewards"),
    "demo": (demo_command, "minutes: three rules on rewards that conflict, with a report"),
    "controls": (controls_command, "one run a reward: can each be raised at all?"),
    "compare": (compare_command, "rules and seeds side by side: tables and figures of held-out gains"),
    "diagnose": (diagnose_command, "signal, noise and conflict of the gradients, and what each rule makes of them"),
    "settle": (settle_command, "where the sum's step lowers a reward, does the balanced step raise all?"),
    "stress": (stress_command, "made-up gradients, from mild to Pareto-stationary: what each rule does"),
    "generate": (generate_command, "images of a run on a grid, for any prompts"),
    "evaluate": (evaluate_command, "all rewards of a run on any prompts, with intervals, and the paper's composite"),
    "make-prompts": (make_prompts_command, "prompts to train on and held-out ones, so that a run needs no others"),
    "report": (report_command, "write the HTML report of a run again"),
    "world-accuracy": (accuracy_command, "how well the rewards judge rendered scenes"),
    "world-pretrain": (pretrain_command, "make the small world's base model from nothing"),
    "world-similarity": (similarity_command, "train the small world's dual encoder from nothing"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; exit status 0, 1 for a run that failed, 2 for input that cannot be used, 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: python -m reference COMMAND [flags]    (COMMAND --help for its flags)\n")
        print("\n".join(f"  {name:18}{text}" for name, (_, text) in COMMANDS.items()))
        return 0
    if argv[0] not in COMMANDS:
        near = difflib.get_close_matches(argv[0], COMMANDS, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else f"Commands: {', '.join(COMMANDS)}."
        print(f"no command {argv[0]!r}. {hint}", file=sys.stderr)
        return 2
    try:
        COMMANDS[argv[0]][0](argv[1:])
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except (RewardError, TrainingError, CheckpointError) as error:
        print(error, file=sys.stderr)
        return 1
    except (Interrupted, KeyboardInterrupt) as error:
        print(str(error) or "stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
