"""95 % intervals: of a mean of independent values, and of a rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from scipy import stats


class Interval(NamedTuple):
    """Mean with its 95 % interval, over ``n`` values."""

    mean: float
    low: float
    high: float
    n: int


def interval(values: Sequence[float]) -> Interval:
    """Mean of the values that are not NaN with Student's 95 % interval; the values are independent.

    Example:
        >>> interval([1.0, 2.0, 3.0, float("nan")])
        Interval(mean=2.0, low=-0.484..., high=4.484..., n=3)
    """
    x = np.asarray(values, dtype=np.float64)
    x = x[~np.isnan(x)]
    n, mean = len(x), float(x.mean()) if len(x) else math.nan
    if n < 2:
        return Interval(mean, math.nan, math.nan, n)
    half = float(stats.t.ppf(0.975, n - 1) * x.std(ddof=1) / n**0.5)
    return Interval(mean, mean - half, mean + half, n)


def change(before: Sequence[float], after: Sequence[float]) -> Interval:
    """Mean paired change: the same prompts and the same noise before and after.

    Example:
        >>> change([0.0, 10.0, 20.0], [1.0, 11.0, 21.5]).mean
        1.1666...
    """
    return interval([b - a for a, b in zip(before, after, strict=True)])


def verdict(found: Interval) -> str:
    """What a change allows to say: ``raised``, ``lowered``, ``not told apart``, or ``unknown`` without an interval.

    Example:
        >>> verdict(Interval(0.1, 0.05, 0.15, 9)), verdict(Interval(0.1, -0.05, 0.25, 9))
        ('raised', 'not told apart')
    """
    if math.isnan(found.low):
        return "unknown"
    return "raised" if found.low > 0 else "lowered" if found.high < 0 else "not told apart"


def wilson(hits: int, n: int) -> Interval:
    """Rate with Wilson's 95 % interval.

    Example:
        >>> [round(x, 3) for x in wilson(0, 10)[:3]]
        [0.0, 0.0, 0.278]

    Reference: Wilson (1927), Probable inference, the law of succession, and statistical inference.
    """
    if n == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    z = NormalDist().inv_cdf(0.975)
    center = (hits + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(hits * (n - hits) / n + z * z / 4)
    return Interval(hits / n, max(0.0, center - half), min(1.0, center + half), n)
