"""Where a soft minimum settles: by hand, its fixed point, and what noise does to it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from reference.experiments.bank import Bank
from reference.experiments.tilt import moments_of, settle, table

EQUAL = np.array([0.5, 0.5])


def test_equal_weights_without_strength_gain_one_on_average() -> None:
    """Two orthogonal signals of lengths 1 and 3: gains in proportion to 1 and 9, mean 1."""
    S = np.diag([1.0, 9.0])
    found = settle(S, S, EQUAL, 0.0)
    np.testing.assert_allclose(found.gain, [0.2, 1.8])
    np.testing.assert_allclose(found.weights, EQUAL)


@pytest.mark.parametrize("strength", [1.0, 5.0])
def test_the_weights_are_those_of_the_gains_they_make(strength: float) -> None:
    S = np.array([[1.0, -0.5], [-0.5, 2.0]])
    found = settle(S, S + np.eye(2), EQUAL, strength)
    odds = np.log(found.weights[0] / found.weights[1])
    assert odds == pytest.approx(strength * (found.gain[1] - found.gain[0]), abs=1e-6)
    assert found.weights.sum() == pytest.approx(1.0)


def test_a_strong_tilt_makes_conflicting_gains_equal() -> None:
    S = np.array([[1.0, -0.8], [-0.8, 4.0]])
    weak, strong = (settle(S, S + 10 * np.eye(2), EQUAL, strength).gain for strength in (0.0, 100.0))
    assert weak.min() < strong.min()
    assert np.ptp(strong) < 0.05


def test_moments_are_unbiased() -> None:
    """Units with signal (1, 2) on two axes and unit noise on 50 of their own."""
    rng, U = np.random.default_rng(0), 400
    rows = rng.standard_normal((U, 4, 50)) * 0.1
    rows[:, 0, 0] += 1.0
    rows[:, 1, 1] += 2.0
    gram = np.einsum("uip,vjp->uivj", rows, rows)
    bank = Bank(gram, U, 72, torch.full((2,), torch.nan))
    S, G = moments_of(bank, 2, 10)
    np.testing.assert_allclose(S, np.diag([1.0, 4.0]), atol=0.05)
    np.testing.assert_allclose(G - S, 0.05 * np.eye(2), atol=0.01)
    text = table(bank, ["a", "b"], 10)
    assert "720 rows" in text
    assert "| 0 | +0.40 | +1.60 | +0.40 |" in text
