"""What several runs of several rules say together: tables and figures of held-out gains."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from reference.config.settings import Config, training_times
from reference.config.toml import to_toml
from reference.errors import ConfigError
from reference.experiments.statistics import Array, Estimate, crossed_interval, runs_that_lower, student, worst
from reference.run.reading import PALETTE, number, records
from reference.step.method import method_of
from reference.text_files import make_folder

_PENS = (*PALETTE, "#000000")


class Run(NamedTuple):
    """What one finished run says.

    Attributes:
        images: trained on, at each evaluation ``[E]``.
        cpu: seconds of computing until each evaluation ``[E]``.
        scores: per-prompt means at each evaluation ``[E, P, K']``, held-out rewards after those that are trained.
        std: ``[K']``, standard deviation over the images of one prompt at the start.
        cosines: mean over refreshes: smallest on the same batch and on the next, and each reward's on the next.
        steps: of the optimiser.
        gradient: mean length of the applied one in the first ten steps: rules push differently against the same pull.
        kl: mean over the last five epochs, the squared distance to the base model; 0 without a pull.
    """

    images: Array
    cpu: Array
    scores: Array
    std: Array
    cosines: Array
    steps: int
    gradient: float
    kl: float


def finished(config: Config) -> bool:
    """Whether a run has been evaluated after ``config.epochs``, where it ends or on the way to more.

    Raises:
        ConfigError: it went on from there without an evaluation.
    """
    evaluated = [r["epoch"] for r in records(config.run, "eval")]
    if config.epochs in evaluated:
        return True
    saved = [int(path.stem.removeprefix("step-")) for path in (config.run / "checkpoints").glob("step-*.ckpt")]
    steps = config.epochs * config.optim.steps_per_epoch
    if max(evaluated, default=0) > config.epochs or max(saved, default=0) > steps:
        raise ConfigError(
            f"--epochs: {config.run} has gone further than {config.epochs} epochs, and was evaluated after "
            f"{', '.join(map(str, evaluated)) or 'none'}. Give one of these, more epochs, or another --folder."
        )
    return False


def judged_by(config: Config) -> tuple[object, ...]:
    """What has to be equal for gains to be compared: the rewards, the base model and the evaluation."""
    log = config.log
    evaluation = (log.eval_prompts, log.eval_images, log.eval_steps, config.rollout.sampler)
    return (config.rewards, log.watch, config.model.base, *evaluation)


def read_run(config: Config) -> Run:
    """A finished run, without what it did in later epochs than those of ``config``.

    Raises:
        ConfigError: its first records are lost.
    """
    found = records(config.run)
    evals = [r for r in found if r["kind"] == "eval" and r["epoch"] <= config.epochs]
    if not evals or evals[0]["epoch"] != 0:
        raise ConfigError(f"{config.run}: its records do not begin with an evaluation of the base model.")
    kinds = {
        kind: [r for r in found if r["kind"] == kind and r["epoch"] < config.epochs]
        for kind in ("epoch", "refresh", "step")
    }
    names = _names(config)
    before = [[r for r in kinds["epoch"] if r["epoch"] < e["epoch"]] for e in evals]
    measured = [r for r in kinds["refresh"] if r["next_cosines"]]
    cosines = [
        [number(x) for x in (r["min_cosine"], r["next_min_cosine"], *(r["next_cosines"][k] for k in config.rewards))]
        for r in measured
    ]
    return Run(
        np.array([float(sum(r["images"] for r in rs)) for rs in before]),
        np.array([float(sum(r["cpu_seconds"] for r in rs)) for rs in before]),
        np.array([[[number(x) for x in e["per_prompt"][k]] for k in names] for e in evals]).transpose(0, 2, 1),
        np.array([number(evals[0]["within_std"][k]) or np.nan for k in names]),
        np.array([student(column).mean for column in np.array(cosines).reshape(-1, 2 + len(config.rewards)).T]),
        len(kinds["step"]),
        student(np.array([number(r.get("grad_norm")) for r in kinds["step"][:10]])).mean,
        student(np.array([number(r.get("kl")) for r in kinds["step"] if r["epoch"] >= config.epochs - 5])).mean,
    )


def _names(config: Config) -> list[str]:
    """The rewards in the tables: those that are trained, then those that are held out."""
    return [*config.rewards, *(name for name in config.log.watch if name not in config.rewards)]


class Comparison(NamedTuple):
    """What runs say together.

    Attributes:
        text: the tables in Markdown.
        numbers: behind them, by table, rule and reward.
        seeds: that every rule has finished.
    """

    text: str
    numbers: dict[str, Any]
    seeds: list[int]


def write_tables(plans: Mapping[str, Sequence[Config]], folder: Path) -> Comparison:
    """Tables and figures of the seeds that every rule has finished."""
    S = len(next(iter(plans.values())))
    common = [s for s in range(S) if all(finished(configs[s]) for configs in plans.values())]
    if not common:
        raise ConfigError(f"folder: there is no seed that every rule has finished in {folder}.")
    make_folder(folder)
    left = sorted(set(range(S)) - set(common))
    runs = {label: [read_run(configs[s]) for s in common] for label, configs in plans.items()}
    config = next(iter(plans.values()))[0]
    names, sigma = _names(config), next(iter(runs.values()))[0].std
    gains = {label: np.stack([run.scores[-1] - run.scores[0] for run in found]) for label, found in runs.items()}
    numbers = summarize(runs, gains, config)
    seen = f"{config.log.eval_prompts} held-out prompts, {config.log.eval_images} images each"
    head = f"{seeds_text(len(common))}, {seen}."
    head += f" Seeds {left} are left out: not every rule has finished them." if left else ""
    text = "\n\n".join([head, *(f"{_TITLES[key]}\n\n{table}" for key, table in _tables(numbers, config).items())])
    (folder / "tables.md").write_text(text + "\n", encoding="utf-8")
    made = {label: [str(configs[s].run) for s in common] for label, configs in plans.items()}
    about = {"seeds": common, "left_out": left, "folders": made, "config": to_toml(config)}
    (folder / "summary.json").write_text(json.dumps(_plain(about | numbers), indent=1) + "\n", encoding="utf-8")
    rows = {label: rows_a_solve(configs[0]) for label, configs in plans.items()}
    with matplotlib.rc_context({"svg.hashsalt": "marble"}):  # the same files from the same runs
        _gains_figure(gains, sigma, names).savefig(folder / "gains.svg", metadata={"Date": None})
        _curves_figure(runs, names).savefig(folder / "curves.svg", metadata={"Date": None})
        _worst_figure(numbers["smallest"], rows).savefig(folder / "worst.svg", metadata={"Date": None})
    return Comparison(text, numbers, common)


def summarize(runs: Mapping[str, Sequence[Run]], gains: Mapping[str, Array], config: Config) -> dict[str, Any]:
    """All numbers of the tables, each by rule and, where there is one for each, by reward."""
    first, *others = runs
    names, K, sigma = _names(config), len(config.rewards), runs[first][0].std
    standard = {label: x / sigma for label, x in gains.items()}
    smallest = {label: worst(x[:, :, :K]) for label, x in standard.items()}
    budget = min(float(np.mean([run.cpu[-1] for run in found])) for found in runs.values())
    equal = {label: np.stack([_at(run, budget) for run in found]) / sigma for label, found in runs.items()}
    cosines = {label: np.stack([run.cosines for run in found]).T for label, found in runs.items()}
    columns = ("smallest, same batch", "smallest, next batch", *(f"{k}, next batch" for k in config.rewards))
    return {
        "runs": {label: _totals(found) for label, found in runs.items()},
        "before": {k: student(column).mean for k, column in zip(names, runs[first][0].scores[0].T, strict=True)},
        "within_std": dict(zip(names, sigma.tolist(), strict=True)),
        "gains": _estimates(gains, names),
        "standardized": _estimates(standard, names),
        "smallest": {label: crossed_interval(x) for label, x in smallest.items()},
        "runs_that_lower": {label: runs_that_lower(x[:, :, :K]) for label, x in standard.items()},
        "differences": {label: crossed_interval(smallest[first] - smallest[label]) for label in others},
        "budget": budget / 60,
        "equal_compute": _estimates(equal, names),
        "equal_smallest": {label: crossed_interval(worst(x[:, :, :K])) for label, x in equal.items()},
        "cosines": {label: dict(zip(columns, map(student, x), strict=True)) for label, x in cosines.items()},
    }


def _totals(found: Sequence[Run]) -> dict[str, float]:
    """What a rule's runs took, the mean over seeds."""
    totals = {
        "images": [run.images[-1] for run in found],
        "steps": [run.steps for run in found],
        "CPU minutes": [run.cpu[-1] / 60 for run in found],
        "gradient": [run.gradient for run in found],
        "kl": [run.kl for run in found],
    }
    return {"seeds": len(found)} | {key: float(np.mean(x)) for key, x in totals.items()}


def _estimates(values: Mapping[str, Array], names: Sequence[str]) -> dict[str, dict[str, Estimate]]:
    """Mean and interval by rule and reward."""
    return {label: {k: crossed_interval(x[:, :, i]) for i, k in enumerate(names)} for label, x in values.items()}


def _plain(value: Any) -> Any:
    """As JSON has it: intervals as objects, null for NaN."""
    if isinstance(value, Estimate):
        value = value._asdict()
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


_TITLES = {
    "runs": "**Runs**, the mean over seeds. Where gradients differ, the same pull to the base (`loss.kl_weight`) holds "
    "one rule more than another: see how far each has gone, the squared distance `kl`.",
    "gains": "**Held-out gains** from the first to the last evaluation, the same prompts and noise; 95 % intervals "
    "over seeds and prompts, both random. Lowered and raised: the interval is on one side of 0.",
    "standardized": "**Standardized gains**: in standard deviations of the reward over the images of one prompt with "
    "the base model. Smallest: a run's gain in its own worst reward, the mean over runs. Last column: runs in which a "
    "reward is lower for certain, by the interval over that run's prompts.",
    "differences": "**Smallest standardized gain of a run with the first rule minus that with the others**, paired by "
    "seeds and prompts.",
    "equal compute": "**Equal compute**: standardized gains when each run has used as many CPU seconds as the "
    "cheapest rule used in all, interpolated between evaluations.",
    "cosines": "**Cosines** of the applied gradient with the rewards' gradients on the batch that made it and on the "
    "next one; mean over refreshes, Student's 95 % interval over seeds.",
}


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def seeds_text(n: int) -> str:
    """Say how many seeds a table rests on, and of a single one what its intervals leave out."""
    return f"{n} seeds" if n != 1 else "1 seed (intervals are over prompts alone, and say nothing about other seeds)"


def interval_text(e: Estimate, digits: int = 3) -> str:
    """As ``+0.050 [+0.010, +0.090]``."""
    text = f"{e.mean:+.{digits}f}"
    return text if np.isnan(e.low) else f"{text} [{e.low:+.{digits}f}, {e.high:+.{digits}f}]"


def _tables(numbers: dict[str, Any], config: Config) -> dict[str, str]:
    """Every table by its key."""
    null = f"(noise alone: {len(config.rewards) ** -0.5:.3f})"
    columns = [f"{k} {null}" if "same" in k else k for k in next(iter(numbers["cosines"].values()))]
    cosines = [[label, *map(interval_text, x.values())] for label, x in numbers["cosines"].items()]
    return {
        "runs": _runs_table(numbers["runs"]),
        "gains": _gains_table(numbers, config),
        "standardized": _standardized_table(numbers, config),
        "differences": _difference_table(numbers),
        "equal compute": _equal_table(numbers, config),
        "cosines": markdown_table(["rule", *columns], cosines),
    }


def _runs_table(runs: Mapping[str, Mapping[str, float]]) -> str:
    head = ["rule", "seeds", "images", "steps", "CPU minutes without evaluation", "gradient, first ten steps"]
    rows = []
    for label, x in runs.items():
        counts = [f"{x['seeds']}", f"{x['images']:,.0f}", f"{x['steps']:.0f}", f"{x['CPU minutes']:.1f}"]
        rows.append([label, *counts, *(f"{x[key]:#.2g}" if x[key] > 0 else "-" for key in ("gradient", "kl"))])
    return markdown_table([*head, "`kl`, last five epochs"], rows)


def _gains_table(numbers: dict[str, Any], config: Config) -> str:
    """Gains of every reward, one column a rule."""
    rows = []
    for name, before in numbers["before"].items():
        cells = [interval_text(x[name]) + _direction(x[name]) for x in numbers["gains"].values()]
        title = name if name in config.rewards else f"{name} (not trained)"
        rows.append([title, f"{before:.3f}", *cells])
    return markdown_table(["reward", "before", *numbers["gains"]], rows)


def _direction(e: Estimate) -> str:
    """What an interval allows to say."""
    return " raised" if e.low > 0 else " **lowered**" if e.high < 0 else ""


def _standardized_table(numbers: dict[str, Any], config: Config) -> str:
    """Gains in standard deviations, the smallest of a run, and runs that lower a reward."""
    rows = []
    for label, x in numbers["standardized"].items():
        lower = f"{numbers['runs_that_lower'][label]} of {numbers['runs'][label]['seeds']}"
        cells = [f"{x[k].mean:+.2f}" for k in config.rewards]
        rows.append([label, *cells, interval_text(numbers["smallest"][label], 2), lower])
    return markdown_table(["rule", *config.rewards, "smallest of a run", "runs that lower one"], rows)


def _difference_table(numbers: dict[str, Any]) -> str:
    """What the first rule's smallest gain has over the others'."""
    first, rows = next(iter(numbers["smallest"])), []
    for label, e in numbers["differences"].items():
        verdict = "larger" if e.low > 0 else "smaller" if e.high < 0 else "not told apart"
        rows.append([f"{first} - {label}", interval_text(e, 2), verdict])
    return markdown_table(["rules", "difference", "verdict"], rows)


def _equal_table(numbers: dict[str, Any], config: Config) -> str:
    """Standardized gains at the compute of the cheapest rule."""
    rows = []
    for label, x in numbers["equal_compute"].items():
        found = [*(x[k] for k in config.rewards), numbers["equal_smallest"][label]]
        rows.append([label, *(interval_text(e, 2) for e in found)])
    table = markdown_table(["rule", *config.rewards, "smallest of a run"], rows)
    return f"Budget: {numbers['budget']:.1f} CPU minutes.\n\n{table}"


def _at(run: Run, cpu: float) -> Array:
    """Gains ``[P, K']`` when so many seconds were used, by linear interpolation between evaluations."""
    gain = run.scores - run.scores[0]
    after = int(np.clip(np.searchsorted(run.cpu, cpu), 1, len(run.cpu) - 1))
    share = min((cpu - run.cpu[after - 1]) / max(run.cpu[after] - run.cpu[after - 1], 1e-9), 1.0)
    mixed: Array = (1 - share) * gain[after - 1] + share * gain[after]
    return mixed


def _gains_figure(gains: Mapping[str, Array], sigma: Array, names: Sequence[str]) -> Figure:
    """Standardized gains with intervals, grouped by rule."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(names)
    for k, name in enumerate(names):
        found = [crossed_interval(x[:, :, k] / sigma[k]) for x in gains.values()]
        place, mean = np.arange(len(found)) + (k - (len(names) - 1) / 2) * width, [e.mean for e in found]
        error = np.nan_to_num([[e.mean - e.low for e in found], [e.high - e.mean for e in found]])
        axes.bar(place, mean, 0.9 * width, yerr=error, color=_PENS[k % len(_PENS)], label=name, error_kw={"lw": 0.8})
    axes.axhline(0, color="black", lw=0.8)
    axes.set_xticks(range(len(gains)), list(gains))
    axes.set_ylabel("held-out gain, standard deviations")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=len(names), frameon=False)
    return figure


def _curves_figure(runs: Mapping[str, Sequence[Run]], names: Sequence[str]) -> Figure:
    """Gains against images, a panel a reward, with Student's interval over seeds as a band."""
    figure = Figure(figsize=(3 * len(names), 3.2), layout="constrained")
    for k, (axes, name) in enumerate(zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True)):
        for i, (label, found) in enumerate(runs.items()):
            gain = np.array([[student(x[:, k]).mean for x in run.scores - run.scores[0]] for run in found])
            band = [student(column) for column in gain.T]
            color, x = _PENS[i % len(_PENS)], found[0].images
            axes.plot(x, [e.mean for e in band], color=color, label=label if k == 0 else None)
            low, high = (np.array([getattr(e, side) for e in band]) for side in ("low", "high"))
            axes.fill_between(x, low, high, color=color, alpha=0.15, lw=0)
        axes.axhline(0, color="0.5", lw=0.8)
        axes.set(title=name, xlabel="images")
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=len(runs), frameon=False)
    return figure


def rows_a_solve(config: Config) -> int | None:
    """Rows behind each solve; None for a rule that solves nothing."""
    method = method_of(config)
    if not method.solves:
        return None
    images = config.rollout.prompts_per_epoch * config.rollout.images_per_prompt / config.optim.steps_per_epoch
    memory = 1 if method.memory is None else (1 + method.memory) / (1 - method.memory)
    return round(images * (config.loss.timesteps_per_image or training_times(config)) * memory)


def _worst_figure(worst: Mapping[str, Estimate], rows: Mapping[str, int | None]) -> Figure:
    """Gain of the worst reward against the rows behind a solve; rules that solve nothing as lines."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for i, (label, e) in enumerate(worst.items()):
        color, x = _PENS[i % len(_PENS)], rows[label]
        if x is None:
            axes.axhline(e.mean, color=color, label=label)
            axes.axhspan(e.low, e.high, color=color, alpha=0.12, lw=0)
        else:
            error = [[e.mean - e.low], [e.high - e.mean]]
            axes.errorbar([x], [e.mean], yerr=error, fmt="o", color=color, capsize=3, label=label)
    axes.axhline(0, color="black", lw=0.8)
    axes.set(xscale="log", xlim=(100, 20000), xlabel="rows behind a solve", ylabel="smallest held-out gain, std")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    return figure
