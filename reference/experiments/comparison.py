"""What several runs of several rules say together: tables and figures of held-out gains."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from reference.config import Config, rule_of, to_toml, training_times
from reference.errors import ConfigError
from reference.experiments.records import number, records
from reference.experiments.statistics import Array, Estimate, crossed_interval, percentile, smallest, student

_PENS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")


class Run(NamedTuple):
    """What one finished run says.

    Attributes:
        images: trained on, at each evaluation ``[E]``.
        cpu: seconds of computing until each evaluation ``[E]``.
        scores: per-prompt means at each evaluation ``[E, P, K']``, held-out rewards after those that are trained.
        std: ``[K']``, standard deviation over the images of one prompt at the start.
        cosines: mean over refreshes: smallest on the same batch and on the next, and each reward's on the next.
        steps: of the optimiser.
    """

    images: Array
    cpu: Array
    scores: Array
    std: Array
    cosines: Array
    steps: int


def finished(config: Config) -> bool:
    """Whether a run has its last evaluation."""
    return any(r["epoch"] == config.epochs for r in records(config.run, "eval"))


def read_run(config: Config) -> Run:
    """A finished run."""
    kinds = {kind: records(config.run, kind) for kind in ("eval", "epoch", "refresh", "step")}
    evals, names = kinds["eval"], list(kinds["eval"][0]["per_prompt"])
    before = [[r for r in kinds["epoch"] if r["epoch"] < e["epoch"]] for e in evals]
    measured = [r for r in kinds["refresh"] if r["next_cosines"]]
    cosines = [
        [r["min_cosine"], r["next_min_cosine"], *(number(r["next_cosines"][k]) for k in config.rewards)]
        for r in measured
    ]
    return Run(
        np.array([float(sum(r["images"] for r in rs)) for rs in before]),
        np.array([float(sum(r["cpu_seconds"] for r in rs)) for rs in before]),
        np.array([[[number(x) for x in e["per_prompt"][k]] for k in names] for e in evals]).transpose(0, 2, 1),
        np.array([number(evals[0]["within_std"][k]) or np.nan for k in names]),
        np.array(cosines).mean(0) if measured else np.full(2 + len(config.rewards), np.nan),
        len(kinds["step"]),
    )


def write_tables(plans: Mapping[str, Sequence[Config]], folder: Path) -> str:
    """Tables and figures of the seeds that every rule has finished."""
    S = len(next(iter(plans.values())))
    common = [s for s in range(S) if all(finished(configs[s]) for configs in plans.values())]
    if not common:
        raise ConfigError(f"folder: there is no seed that every rule has finished in {folder}.")
    runs = {label: [read_run(configs[s]) for s in common] for label, configs in plans.items()}
    config = next(iter(plans.values()))[0]
    names = [*config.rewards, *(name for name in config.log.watch if name not in config.rewards)]
    sigma = next(iter(runs.values()))[0].std
    gains = {label: np.stack([run.scores[-1] - run.scores[0] for run in found]) for label, found in runs.items()}
    tables = {
        "runs": _runs_table(runs),
        "gains": _gains_table(gains, runs, names, config),
        "standardized": _standardized_table(gains, sigma, config),
        "differences": _difference_table(gains, sigma, config),
        "equal compute": _equal_table(runs, sigma, names, config),
        "cosines": _cosine_table(runs, config),
    }
    left = sorted(set(range(S)) - set(common))
    head = f"{len(common)} seeds, {config.log.eval_prompts} held-out prompts, {config.log.eval_images} images each."
    head += f" Seeds {left} are left out: not every rule has finished them." if left else ""
    text = "\n\n".join([head, *(f"{_TITLES[key]}\n\n{table}" for key, table in tables.items())])
    (folder / "tables.md").write_text(text + "\n", encoding="utf-8")
    summary = {"seeds": common, "config": to_toml(config), "within_std": dict(zip(names, sigma.tolist(), strict=True))}
    summary["gains"] = {
        label: {k: crossed_interval(x[:, :, i])._asdict() for i, k in enumerate(names)} for label, x in gains.items()
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    with matplotlib.rc_context({"svg.hashsalt": "marble"}):  # the same files from the same runs
        _gains_figure(gains, sigma, names).savefig(folder / "gains.svg", metadata={"Date": None})
        _curves_figure(runs, names).savefig(folder / "curves.svg", metadata={"Date": None})
        rows = {label: rows_a_solve(configs[0]) for label, configs in plans.items()}
        _worst_figure(gains, sigma, config, rows).savefig(folder / "worst.svg", metadata={"Date": None})
    return text


_TITLES = {
    "runs": "**Runs**, the mean over seeds.",
    "gains": "**Held-out gains** from the first to the last evaluation, the same prompts and noise; 95 % intervals "
    "over seeds and prompts, both random. Lowered and raised: the interval is on one side of 0.",
    "standardized": "**Standardized gains**: in standard deviations of the reward over the images of one prompt with "
    "the base model; the smallest over the trained rewards with its interval from a bootstrap over seeds and prompts.",
    "differences": "**Smallest standardized gain of the first rule minus that of the others**, paired by seeds and "
    "prompts.",
    "equal compute": "**Equal compute**: standardized gains when each run has used as many CPU seconds as the "
    "cheapest rule used in all, interpolated between evaluations.",
    "cosines": "**Cosines** of the applied gradient with the rewards' gradients on the batch that made it and on the "
    "next one; mean over refreshes, Student's 95 % interval over seeds.",
}


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _cell(e: Estimate, digits: int = 3) -> str:
    """As ``+0.050 [+0.010, +0.090]``."""
    text = f"{e.mean:+.{digits}f}"
    return text if np.isnan(e.low) else f"{text} [{e.low:+.{digits}f}, {e.high:+.{digits}f}]"


def _runs_table(runs: Mapping[str, Sequence[Run]]) -> str:
    rows = [
        [label, f"{np.mean([r.images[-1] for r in found]):,.0f}", f"{np.mean([r.steps for r in found]):.0f}",
         f"{np.mean([r.cpu[-1] for r in found]) / 60:.1f}"]
        for label, found in runs.items()
    ]  # fmt: skip
    return _table(["rule", "images", "steps", "CPU minutes without evaluation"], rows)


def _gains_table(
    gains: Mapping[str, Array], runs: Mapping[str, Sequence[Run]], names: Sequence[str], config: Config
) -> str:
    """Gains of every reward, one column a rule."""
    base = next(iter(runs.values()))[0].scores[0]
    rows = []
    for k, name in enumerate(names):
        cells = []
        for x in gains.values():
            e = crossed_interval(x[:, :, k])
            cells.append(_cell(e) + (" raised" if e.low > 0 else " **lowered**" if e.high < 0 else ""))
        title = name if name in config.rewards else f"{name} (not trained)"
        rows.append([title, f"{student(base[:, k]).mean:.3f}", *cells])
    return _table(["reward", "before", *gains], rows)


def _standardized_table(gains: Mapping[str, Array], sigma: Array, config: Config) -> str:
    """Gains in standard deviations, and the smallest."""
    K = len(config.rewards)
    draws = smallest({label: x[:, :, :K] / sigma[:K] for label, x in gains.items()})
    rows = []
    for label, x in gains.items():
        mean = np.array([crossed_interval(x[:, :, k] / sigma[k]).mean for k in range(K)])
        worst = config.rewards[int(mean.argmin())]
        rows.append([label, *(f"{m:+.2f}" for m in mean), f"{_cell(percentile(draws[label]), 2)} ({worst})"])
    return _table(["rule", *config.rewards, "smallest"], rows)


def _difference_table(gains: Mapping[str, Array], sigma: Array, config: Config) -> str:
    """What the first rule's smallest gain has over the others'."""
    K = len(config.rewards)
    draws = smallest({label: x[:, :, :K] / sigma[:K] for label, x in gains.items()})
    first, rows = next(iter(gains)), []
    for label in list(gains)[1:]:
        e = percentile(draws[first] - draws[label])
        verdict = "larger" if e.low > 0 else "smaller" if e.high < 0 else "not told apart"
        rows.append([f"{first} - {label}", _cell(e, 2), verdict])
    return _table(["rules", "difference", "verdict"], rows)


def _equal_table(runs: Mapping[str, Sequence[Run]], sigma: Array, names: Sequence[str], config: Config) -> str:
    """Standardized gains at the compute of the cheapest rule."""
    budget = min(float(np.mean([run.cpu[-1] for run in found])) for found in runs.values())
    rows, K = [], len(config.rewards)
    for label, found in runs.items():
        at = np.stack([_at(run, budget) for run in found])
        cells = [crossed_interval(at[:, :, k] / sigma[k]) for k in range(K)]
        rows.append([label, *(_cell(e, 2) for e in cells), f"{min(e.mean for e in cells):+.2f}"])
    return f"Budget: {budget / 60:.1f} CPU minutes.\n\n" + _table(["rule", *names[:K], "smallest"], rows)


def _at(run: Run, cpu: float) -> Array:
    """Gains ``[P, K']`` when so many seconds were used, by linear interpolation between evaluations."""
    gain = run.scores - run.scores[0]
    after = int(np.clip(np.searchsorted(run.cpu, cpu), 1, len(run.cpu) - 1))
    share = min((cpu - run.cpu[after - 1]) / max(run.cpu[after] - run.cpu[after - 1], 1e-9), 1.0)
    mixed: Array = (1 - share) * gain[after - 1] + share * gain[after]
    return mixed


def _cosine_table(runs: Mapping[str, Sequence[Run]], config: Config) -> str:
    """Cosines on the same and on the next batch."""
    rows = []
    for label, found in runs.items():
        x = np.stack([run.cosines for run in found])
        rows.append([label, *(_cell(student(x[:, i])) for i in range(x.shape[1]))])
    null = f"smallest, same batch (noise alone: {len(config.rewards) ** -0.5:.3f})"
    return _table(["rule", null, "smallest, next batch", *(f"{k}, next batch" for k in config.rewards)], rows)


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
    rule = rule_of(config)
    if rule.kind != "solve" or rule.solver == "prior":
        return None
    images = config.rollout.prompts_per_epoch * config.rollout.images_per_prompt / config.optim.steps_per_epoch
    memory = (1 + rule.decay) / (1 - rule.decay) if "moment" in rule.gram else 1
    return round(images * (config.loss.timesteps_per_image or training_times(config)) * rule.accumulate * memory)


def _worst_figure(gains: Mapping[str, Array], sigma: Array, config: Config, rows: Mapping[str, int | None]) -> Figure:
    """Gain of the worst reward against the rows behind a solve; rules that solve nothing as lines."""
    K = len(config.rewards)
    draws = smallest({label: x[:, :, :K] / sigma[:K] for label, x in gains.items()})
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for i, (label, draw) in enumerate(draws.items()):
        e, color, x = percentile(draw), _PENS[i % len(_PENS)], rows[label]
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
