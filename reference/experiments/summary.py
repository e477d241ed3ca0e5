"""What an evaluation found, from rewards of prompts to files: bootstrap intervals, the paper's composite, tables."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from reference.experiments.paper import Table, composite
from reference.experiments.statistics import Array, Estimate

_RESAMPLES = 10_000
_BLOCK = 500  # resamples at a time


class Judged(NamedTuple):
    """One model's rewards on ``P`` prompts.

    Attributes:
        means: ``[P, K]`` over the images of a prompt; NaN where a reward does not apply.
        counts: ``[P, K]``, images to which it applies.
    """

    means: Array
    counts: Array


class Evaluation(NamedTuple):
    """All that was found.

    Attributes:
        where: what was judged and how, as it goes into ``summary.json``.
        rewards: K names.
        trained: K; whether the run was trained on the reward.
        prompts: P texts.
        run: of the run's model.
        base: of the base model, if it was judged.
    """

    where: Mapping[str, Any]
    rewards: tuple[str, ...]
    trained: tuple[bool, ...]
    prompts: tuple[str, ...]
    run: Judged
    base: Judged | None


class Result(NamedTuple):
    """Estimates under ``run`` and, with a base model, ``base`` and ``change``, which is paired.

    Attributes:
        rewards: of each reward.
        composite: none where the paper's table has none of the rewards.
        columns: rewards that are in the composite, in the order of the table.
    """

    rewards: dict[str, dict[str, Estimate]]
    composite: dict[str, Estimate]
    columns: tuple[str, ...]


def bootstrap(values: Array, units: Sequence[str], *, resamples: int = _RESAMPLES, seed: int = 0) -> Array:
    """Means of ``values [P, K]``, of all prompts and of prompts drawn again with replacement: ``[1 + resamples, K]``.

    A prompt that comes several times is one unit, and drawn as a whole. All columns share the draws, so that a function
    of several means can be taken draw by draw. A NaN counts nowhere. A column's draws are NaN where they have none of
    its values, and all of them if fewer than two units have one: one prompt does not tell how prompts vary.

    Args:
        units: P texts; equal ones are one unit.

    Example:
        >>> means = bootstrap(np.array([[0.0], [1.0]]), ["a", "b"], resamples=1000)
        >>> float(means[0, 0]), np.unique(means).tolist()
        (0.5, [0.0, 0.5, 1.0])

    Reference: Efron and Tibshirani (1993), An introduction to the bootstrap, ch. 6 and 13.
    """
    place = {text: i for i, text in enumerate(dict.fromkeys(units))}
    index, known = np.array([place[text] for text in units]), ~np.isnan(values)
    U, K = len(place), values.shape[1]
    totals, counts = np.zeros((U, K)), np.zeros((U, K))
    np.add.at(totals, index, np.where(known, values, 0.0))
    np.add.at(counts, index, known.astype(float))
    rng, found = np.random.default_rng(seed), [_ratio(totals.sum(0), counts.sum(0))[None]]
    single = (counts > 0).sum(0) < 2
    for start in range(0, resamples, _BLOCK):
        drawn = rng.integers(U, size=(min(_BLOCK, resamples - start), U))
        weights = np.stack([np.bincount(row, minlength=U) for row in drawn]).astype(float)
        found.append(np.where(single, np.nan, _ratio(weights @ totals, weights @ counts)))
    return np.concatenate(found)


def _ratio(totals: Array, counts: Array) -> Array:
    """Means; NaN over nothing."""
    means: Array = totals / np.where(counts > 0, counts, np.nan)
    return means


def percentile(draws: Array) -> Estimate:
    """The first entry, with the 95 % percentile interval of the others."""
    known = draws[1:][~np.isnan(draws[1:])]
    low, high = np.percentile(known, (2.5, 97.5)) if len(known) else (math.nan, math.nan)
    return Estimate(float(draws[0]), float(low), float(high))


def analyse(found: Evaluation, table: Table) -> Result:
    """Means, changes and composites, with 95 % intervals from the same draws of prompts."""
    means = {"run": found.run.means}
    if found.base is not None:
        means |= {"base": found.base.means, "change": found.run.means - found.base.means}
    draws = {label: bootstrap(x, found.prompts) for label, x in means.items()}
    names = found.rewards
    rewards = {name: {label: percentile(x[:, k]) for label, x in draws.items()} for k, name in enumerate(names)}
    columns = tuple(n for n in table.rewards if n in names and not math.isnan(rewards[n]["run"].mean))
    if not columns:
        return Result(rewards, {}, ())
    place = [names.index(name) for name in columns]
    z = {label: composite(table, columns, x[:, place]) for label, x in draws.items() if label != "change"}
    if found.base is not None:
        z["change"] = z["run"] - z["base"]
    return Result(rewards, {label: percentile(x) for label, x in z.items()}, columns)


def standings(table: Table, columns: Sequence[str]) -> dict[str, float]:
    """The composite of the table's own models over some of its columns; empty without any."""
    if not columns:
        return {}
    place = [table.rewards.index(name) for name in columns]
    scores = table.scores[:, place] / table.scales[place]
    return dict(zip(table.models, composite(table, columns, scores).tolist(), strict=True))


def write_csv(path: Path, rewards: Sequence[str], prompts: Sequence[str], judged: Judged) -> None:
    """A prompt a row: its text, and of each reward the mean over its images and how many of them it applies to.

    The mean is empty where it applies to none.
    """
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["prompt", *(column for name in rewards for column in (name, f"{name}_applicable"))])
        for prompt, means, counts in zip(prompts, judged.means.tolist(), judged.counts.tolist(), strict=True):
            pairs = zip(means, counts, strict=True)
            cells = [cell for mean, n in pairs for cell in ("" if math.isnan(mean) else mean, int(n))]
            rows.writerow([prompt, *cells])


def as_json(found: Evaluation, result: Result, table: Table) -> str:
    """The text of ``summary.json``; a number that is not known is null."""
    rewards = {
        name: {"trained": trained, "prompts": n, **_record(result.rewards[name])}
        for name, trained, n in zip(found.rewards, found.trained, _applicable(found), strict=True)
    }
    paper = {"source": table.source, "models": standings(table, result.columns)}
    record = {"rewards": list(result.columns), **_record(result.composite), "paper": paper}
    data = {**found.where, "prompts": len(found.prompts), "rewards": rewards, "composite": record}
    return json.dumps(data, indent=1, allow_nan=False) + "\n"


def _record(estimates: Mapping[str, Estimate]) -> dict[str, dict[str, float | None]]:
    """Estimates as JSON has them."""
    return {label: {k: None if math.isnan(v) else v for k, v in e._asdict().items()} for label, e in estimates.items()}


def as_markdown(found: Evaluation, result: Result, table: Table) -> str:
    """The text of ``summary.md``: a table of rewards, and the composite among those of the paper's models."""
    w, labels = found.where, ["run", "base", "change"][: 1 if found.base is None else 3]
    lines = [
        f"# {w['run']}, epoch {w['epoch']}, step {w['step']}",
        "",
        f"{len(found.prompts)} prompts, images of each: {w['images']}, {w['steps']} steps of {w['sampler']}, seed "
        f"{w['seed']}, averaged weights. In brackets are 95 % intervals over prompts.",
        "",
        f"| reward | | prompts | {' | '.join(labels)} |",
        f"|---|---|---:|{'---:|' * len(labels)}",
    ]
    for name, trained, n in zip(found.rewards, found.trained, _applicable(found), strict=True):
        cells = [_text(result.rewards[name][label], signed=label == "change") for label in labels]
        lines.append(f"| {name} | {'trained' if trained else 'held out'} | {n} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *_composite_lines(result, table)]) + "\n"


def _composite_lines(result: Result, table: Table) -> list[str]:
    """The composite's part of the Markdown, best model first."""
    if not result.columns:
        return ["No composite: the paper's table has none of these rewards."]
    titles = [table.titles[table.rewards.index(name)] for name in result.columns]
    known = {label: e for label, e in result.composite.items() if label != "change"}
    rows = [(e.mean, f"**this {label}**", _text(e, signed=True)) for label, e in known.items()]
    rows += [(z, model, f"{z:+.4f}") for model, z in standings(table, result.columns).items()]
    lines = [f"Composite over {', '.join(titles)}, standardized over the other models here, which are those of "
             f"{table.source}:", "", "| model | composite |", "|---|---:|"]  # fmt: skip
    lines += [f"| {model} | {text} |" for _, model, text in sorted(rows, reverse=True)]
    if "change" in result.composite:
        lines += ["", f"Change of the composite: {_text(result.composite['change'], signed=True)}."]
    return lines


def _applicable(found: Evaluation) -> list[int]:
    """Prompts to which each reward applies."""
    numbers: list[int] = (found.run.counts > 0).sum(0).tolist()
    return numbers


def _text(estimate: Estimate, *, signed: bool) -> str:
    """A mean with its interval, where there is one."""
    mean, low, high = ("" if math.isnan(x) else format(x, "+.4f" if signed else ".4f") for x in estimate)
    return f"{mean} [{low}, {high}]" if low else mean
