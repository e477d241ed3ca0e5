"""Intervals for runs that differ in their seed and are judged on the same prompts."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

Array = np.ndarray[Any, np.dtype[np.float64]]


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


def worst(gains: Array) -> Array:
    """The gains ``[S, P]`` of each run in its own worst reward, from ``[S, P, K]`` of all rewards.

    The mean over prompts is a run's smallest gain, and ``crossed_interval`` gives its mean over runs with an interval:
    what to expect of one run. (The smallest *mean* over runs would let runs cancel that fail in different rewards.)
    It is a little low where rewards are tied more closely than the prompts can tell. A reward that is NaN where it
    does not apply keeps its mean and its standard error. A run with a reward that never applies is all NaN.

    Example:
        >>> worst(np.array([[[1.0, 3.0], [1.0, 5.0]], [[4.0, 2.0], [4.0, 0.0]]]))
        array([[1., 1.],
               [2., 0.]])
    """
    known = ~np.isnan(gains)
    n = known.sum(1, keepdims=True, dtype=float)
    n[n == 0] = np.nan
    mean = np.where(known, gains, 0.0).sum(1, keepdims=True) / n
    filled = mean + np.where(known, gains - mean, 0.0) * gains.shape[1] / n
    chosen: Array = np.take_along_axis(filled, mean.argmin(-1, keepdims=True), -1)[..., 0]
    return chosen


def runs_that_lower(gains: Array) -> int:
    """How many runs lower a reward for certain: Student's interval over prompts ``[S, P, K]`` is below 0."""
    return sum(any(student(column).high < 0 for column in run.T) for run in gains)
