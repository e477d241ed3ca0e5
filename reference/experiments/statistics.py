"""Intervals for runs that differ in their seed and are judged on the same prompts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

Array = np.ndarray[Any, np.dtype[np.float64]]
_RESAMPLES = 4000


class Estimate(NamedTuple):
    """A mean with its 95 % interval; NaN where there is too little to tell."""

    mean: float
    low: float
    high: float


def crossed_interval(values: Array) -> Estimate:
    """Mean of ``values [S, P]`` over seeds and prompts, both random and crossed, with its 95 % interval.

    Each cell is ``mean + seed + prompt + rest``. From the mean squares of seeds, prompts and rest, the variance of the
    mean is ``(MS_S + MS_P - MS_R) / (S P)``, and at least ``max(MS_S, MS_P) / (S P)``; Student's t with the degrees of
    freedom of Satterthwaite. Prompts with a NaN are left out. One seed: Student's interval over prompts; one prompt:
    over seeds.

    Example:
        >>> crossed_interval(np.array([[1.0, 3.0], [2.0, 4.0]])).mean
        2.5

    Reference: Searle, Casella and McCulloch (1992), Variance components, ch. 4; Satterthwaite (1946).
    """
    x = values[:, ~np.isnan(values).any(0)]
    S, P = x.shape
    if S == 1 or P < 2:
        return student(x[0] if S == 1 else x[:, 0] if P else np.empty(0))
    mean, rows, columns = float(x.mean()), x.mean(1), x.mean(0)
    rest = x - rows[:, None] - columns + mean
    ms_s, ms_p = P * float(rows.var(ddof=1)), S * float(columns.var(ddof=1))
    ms_r = float(np.square(rest).sum()) / ((S - 1) * (P - 1))
    total = max(ms_s + ms_p - ms_r, ms_s, ms_p)
    if total <= 0:
        return Estimate(mean, mean, mean)
    parts = ms_s**2 / (S - 1) + ms_p**2 / (P - 1) + ms_r**2 / ((S - 1) * (P - 1))
    half = float(stats.t.ppf(0.975, max(total**2 / parts, 1.0))) * math.sqrt(total / (S * P))
    return Estimate(mean, mean - half, mean + half)


def student(values: Array) -> Estimate:
    """Mean of independent values with Student's 95 % interval."""
    x = values[~np.isnan(values)]
    mean = float(x.mean()) if len(x) else math.nan
    if len(x) < 2:
        return Estimate(mean, math.nan, math.nan)
    half = float(stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x)))
    return Estimate(mean, mean - half, mean + half)


def smallest(values: Mapping[str, Array]) -> dict[str, Array]:
    """Bootstrap of each rule's smallest mean gain over rewards: ``[1 + resamples]``, the data's own first.

    Seeds and prompts are both drawn again, with the same draws for every rule, so that differences are paired.

    Args:
        values: gains ``[S, P, K]`` of each rule on the same seeds and prompts; NaN where a reward does not apply.
    """
    S, P = next(iter(values.values())).shape[:2]
    rng = np.random.default_rng(0)
    draws = [(np.ones(S), np.ones(P))] + [
        (np.bincount(rng.integers(S, size=S), minlength=S), np.bincount(rng.integers(P, size=P), minlength=P))
        for _ in range(_RESAMPLES)
    ]
    seeds, prompts = (np.stack([draw[i] for draw in draws]).astype(float) for i in range(2))

    def minima(x: Array) -> Array:
        known = ~np.isnan(x)
        total = np.einsum("bs,bp,spk->bk", seeds, prompts, np.where(known, x, 0.0), optimize=True)
        weight = np.einsum("bs,bp,spk->bk", seeds, prompts, known.astype(float), optimize=True)
        mean: Array = (total / np.where(weight > 0, weight, np.nan)).min(1)
        return mean

    return {label: minima(x) for label, x in values.items()}


def percentile(draws: Array) -> Estimate:
    """The first entry, with the 95 % percentile interval of the others."""
    known = draws[1:][~np.isnan(draws[1:])]
    low, high = np.percentile(known, (2.5, 97.5)) if len(known) else (math.nan, math.nan)
    return Estimate(float(draws[0]), float(low), float(high))
