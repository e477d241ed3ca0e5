"""The flags of every command: a dataclass each, whose docstrings are the help."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from reference.config.presets import preset
from reference.config.settings import Config, Preset, PretrainConfig, SimilarityConfig


@dataclass(frozen=True)
class Train:
    """Fine-tune a base model with several rewards.

    Values come from the preset, then from the file, then from the command line.
    """

    settings: Annotated[Config, tyro.conf.arg(name="")]
    preset: Preset = "world"
    """Starting values: world and world-conflict (20-30 minutes on two cores), demo (minutes), tiny (seconds), sd35m,
    sd35m-single-gpu."""
    config: Path | None = None
    """TOML file with values for some of the fields, such as the config.toml of another run."""
    resume: bool = False
    """Continue the run in --run from its newest whole checkpoint."""
    dry_run: bool = False
    """Print what would be done, with estimates of memory and time, and stop."""


@dataclass(frozen=True)
class Demo:
    """Three rules from the same seeds on rewards that conflict, for a few minutes, with one report about all."""

    epochs: int = preset("demo").epochs
    """Epochs of each run."""
    seed: int = 0
    """Seed of all runs."""
    folder: Path = preset("demo").run
    """Where the runs go; those of an earlier demo are replaced, and anything else is refused."""


@dataclass(frozen=True)
class Controls:
    """Train with one reward alone, for each: a reward that cannot be raised alone cannot show balancing."""

    preset: Literal["world", "world-conflict"] = "world"
    """The preset whose rewards and settings are used."""
    rewards: tuple[str, ...] = ()
    """Which rewards; without any, all of the preset's."""
    epochs: int = 80
    """Epochs of each run."""
    prompts_per_epoch: int = 6
    """Prompts of an epoch, fewer than in the world preset: about 10 minutes a run on two cores."""
    seed: int = 0
    """Seed of every run."""
    folder: Path | None = None
    """Where the runs go, by default runs/controls/ and the preset's name; finished ones are not repeated, and one that
    was stopped goes on."""
    threads: int = 0
    """CPU threads; 0 leaves torch's choice."""


@dataclass(frozen=True)
class Runs:
    """What the runs of a comparison share, and how they are made."""

    preset: Literal["world", "world-conflict"] = "world-conflict"
    """The preset whose rewards and settings all runs have."""
    seeds: int = 2
    """Runs of each rule."""
    epochs: int = 20
    """Epochs of each run."""
    prompts_per_epoch: int = 12
    """Prompts of an epoch."""
    eval_prompts: int = 120
    """Held-out prompts."""
    config: Path | None = None
    """TOML file with further values of all runs, over the preset."""
    folder: Path | None = None
    """Where runs, tables and figures go, by default runs/, the command's and the preset's name; finished runs are not
    repeated, and one that was stopped goes on."""
    jobs: int = 1
    """Runs side by side, each in a process of its own."""
    threads: int = 0
    """CPU threads of each run; 0 leaves torch's choice."""


@dataclass(frozen=True)
class Compare:
    """Train several rules with several seeds and the same random numbers, and compare them on held-out prompts."""

    runs: Annotated[Runs, tyro.conf.arg(name="")] = Runs("world", seeds=5, epochs=60)
    rules: tuple[str, ...] = ("soft-gdpo", "marble", "marble-paper", "weighted-sum", "gdpo")
    """Names as of --balance, or label=file.toml with any values of a configuration; the first is compared to all."""
    eval_every: int = 20
    """Epochs between evaluations."""
    finalists: int = 0
    """Rules that are trained to the end, chosen by a screening of all of them; 0 for all, without a screening."""
    screening_seeds: int = 2
    """Runs of each rule in the screening."""
    screening_epochs: int = 40
    """Epochs of each of them."""
    tables_only: bool = False
    """Train nothing: tables of the runs that are there."""


@dataclass(frozen=True)
class Ablate:
    """What each part of MARBLE does: runs that differ from ``marble`` in one thing, compared on held-out prompts."""

    runs: Annotated[Runs, tyro.conf.arg(name="")] = Runs()
    variants: tuple[str, ...] = ()
    """Which of them, the first is compared to all; without any, all: solves every 1, 5, 10, 20 steps with the direction
    kept or as in the paper, without normalization, smoothing, guard, and with better evidence."""
    tables_only: bool = False
    """Train nothing: tables of the runs that are there."""


@dataclass(frozen=True)
class Dilute:
    """A specialist reward: fewer and fewer prompts have a text, and what each rule makes of it."""

    runs: Annotated[Runs, tyro.conf.arg(name="")] = Runs()
    rules: tuple[str, ...] = ("soft-gdpo", "gdpo", "weighted-sum")
    """Names as of --balance, or label=file.toml with any values of a configuration."""
    shares: tuple[int, ...] = (2, 4, 8, 16)
    """One prompt in so many has a text."""


@dataclass(frozen=True)
class Diagnose:
    """How much of each reward's gradient is signal, and what each rule makes of it, as the rows of a solve grow."""

    run: Path | None = None
    """Run folder whose newest checkpoint is examined; without it, a preset's base policy."""
    preset: Preset = "world"
    """The preset whose base policy is examined, where no run is given."""
    units: int = 280
    """Groups of images of training prompts, a prompt's group each; half of them stand behind the largest solve."""
    held_out: int = 80
    """Groups of images of held-out prompts, which no direction is made from."""
    sketch: int = 0
    """Random projection of the gradients to so many numbers, where they do not fit into memory; 0 for none."""
    folder: Path | None = None
    """Where tables, figure and inner products go; by default diagnose/ in the run folder, or runs/diagnose."""
    threads: int = 0
    """CPU threads; 0 leaves torch's choice."""


@dataclass(frozen=True)
class Settle:
    """Where the weighted sum's step lowers a reward on held-out prompts, does the balanced step raise every one?

    Every rule takes one virtual step from the same weights and the same mini-batch; held-out prompts are drawn again
    with the noise of before.
    """

    run: Path | None = None
    """Run folder whose newest checkpoint is tried; without it, a preset's base policy."""
    preset: Literal["world", "world-conflict", "tiny"] = "world-conflict"
    """The preset whose base policy is tried, where no run is given."""
    batches: int = 12
    """Mini-batches; those in the folder are not tried again."""
    prompts: int = 6
    """Groups of images of a mini-batch, 72 rows each in the world presets: 6 for 432 rows, 60 for 4,320."""
    sizes: tuple[float, ...] = (0.3, 0.0)
    """Lengths of the steps; 0 for a step of AdamW with the run's settings."""
    eval_prompts: int = 60
    """Held-out prompts."""
    images: int = 2
    """Images of each of them."""
    folder: Path | None = None
    """Where the batches and settle.md go; by default settle/ in the run folder, or runs/settle/ and the preset's
    name. Batches of other settings or another policy are refused."""
    threads: int = 0
    """CPU threads; 0 leaves torch's choice."""


@dataclass(frozen=True)
class Stress:
    """Made-up gradients, from mild to Pareto-stationary: what each rule does with them, and what the library says."""


@dataclass(frozen=True)
class Generate:
    """Images of a run on a grid, with the averaged weights of its newest checkpoint."""

    run: Path = Path("runs/world")
    """Folder of the run."""
    prompts: tuple[str, ...] = ()
    """Prompts, a row of images each; without any, the run's first held-out prompts."""
    count: int = 8
    """How many held-out prompts."""
    images: int = 4
    """Images of each prompt."""
    steps: int = 0
    """Sampling steps; 0 for those of the run's evaluations."""
    seed: int = 0
    """Seed of the noise."""
    untrained: bool = False
    """The base model's images, from the same noise."""
    device: str = "auto"
    """auto for a GPU where there is one, or cpu, cuda, cuda:1, ..."""
    out: Path | None = None
    """The PNG file; by default grids/generated.png in the run folder. An existing one is replaced."""


@dataclass(frozen=True)
class Evaluate:
    """All rewards of a run on held-out prompts, with intervals, and the paper's composite."""

    run: Path = Path("runs/world")
    """Folder of the run; the averaged weights of its newest checkpoint are judged."""
    prompts: tuple[str, ...] = ()
    """Files of prompts as [format:]path[#reward,reward], all of each; without any, the run's held-out prompts."""
    rewards: tuple[str, ...] = ()
    """Rewards to judge by; without any, those that the run was trained on and those that it watched."""
    images: int = 1
    """Images of each prompt."""
    steps: int = 40
    """Sampling steps."""
    seed: int = 0
    """Seed of the noise; that of the trainer's own evaluations is 0."""
    base: bool = False
    """Judge the base model as well, on images from the same noise, and the change."""
    models: Annotated[tuple[str, ...], tyro.conf.arg(name="scoring.models")] = ()
    """Where rewards load their models from, as name=source, over what the run says."""
    device: str = "auto"
    """auto for a GPU where there is one, or cpu, cuda, cuda:1, ..."""
    folder: Path | None = None
    """Where the files go; by default evaluation/ in the run folder. Those of an earlier evaluation are replaced."""


@dataclass(frozen=True)
class MakePrompts:
    """Make a file of training prompts and one of held-out prompts, so that a run needs none from elsewhere."""

    kind: Annotated[Literal["general", "ocr", "geneval"], tyro.conf.Positional]
    """general: subjects, places and styles. ocr: signs, labels and pages with a text between quotes. geneval: objects,
    counts, colours and positions in the format and language of GenEval."""
    out: Path | None = None
    """The file of training prompts, by default prompts/ and the kind. Held-out ones are written beside it, with -test
    in the name: no prompt is in both, whatever the seeds."""
    count: int = 2000
    """Training prompts, all different."""
    test_count: int = 500
    """Held-out prompts, all different."""
    seed: int = 0
    """Another seed gives other prompts."""


@dataclass(frozen=True)
class Accuracy:
    """How well the eight rewards judge rendered scenes, where the truth is known."""

    count: int = 1000
    """Scenes, at least 10: two of each kind."""
    seed: int = 1
    """Seed of the scenes."""


@dataclass(frozen=True)
class Pretrain:
    """Make the small world's base model from nothing; a run that was stopped goes on."""

    config: Annotated[PretrainConfig, tyro.conf.arg(name="")] = field(default_factory=PretrainConfig)
    folder: Path = Path("runs/world-base")
    """Where the model, its log and the state to go on from are written."""


@dataclass(frozen=True)
class Similarity:
    """Train the small world's dual encoder from nothing."""

    config: Annotated[SimilarityConfig, tyro.conf.arg(name="")] = field(default_factory=SimilarityConfig)
    folder: Path = Path("runs/world-base")
    """Where the encoder and its log are written."""


@dataclass(frozen=True)
class Report:
    """Write the HTML report of a run again, or one page that compares several."""

    run: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction] = ()
    """Folder of a run, as often as there are runs to compare; by default runs/world."""
    out: Path | None = None
    """The page about several runs; by default comparison.html beside the first run."""
