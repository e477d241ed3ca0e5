"""Intervals of means and rates, and verdicts."""

from __future__ import annotations

import math

import pytest

from reference.run.intervals import Interval, change, interval, verdict, wilson

NAN = math.nan


def test_interval_is_students() -> None:
    found = interval([1.0, 2.0, 3.0, 4.0, NAN])
    half = 3.182446 * math.sqrt(5 / 3) / 2  # t(0.975, 3) s / sqrt(n)
    assert found.n == 4
    assert found[:3] == pytest.approx((2.5, 2.5 - half, 2.5 + half))
    assert interval([7.0])[0] == 7.0
    assert math.isnan(interval([7.0]).low)
    assert math.isnan(interval([NAN]).mean)
    assert math.isnan(interval([]).mean)


def test_a_change_is_paired() -> None:
    """Prompts differ by far more than the change: unpaired intervals would overlap."""
    before = [0.0, 10.0, 20.0, NAN]
    assert change(before, [x + 1 for x in before]) == (1.0, 1.0, 1.0, 3)
    assert verdict(change(before, [x + 1 for x in before])) == "raised"


def test_verdicts_need_an_interval_on_one_side() -> None:
    assert verdict(Interval(-0.1, -0.2, -0.01, 5)) == "lowered"
    assert verdict(Interval(-0.1, -0.2, 0.0, 5)) == "not told apart"
    assert verdict(Interval(0.1, NAN, NAN, 1)) == "unknown"


def test_wilson_by_hand() -> None:
    z2 = 3.841459
    assert wilson(0, 21)[:3] == pytest.approx((0.0, 0.0, z2 / (21 + z2)), abs=1e-6)
    assert wilson(3, 20)[:3] == pytest.approx((0.15, 0.05237, 0.36042), abs=1e-4)
    assert math.isnan(wilson(0, 0).mean)
