"""Soft minimum and shrinkage: hand values, what they are the gradient of, and degenerate input."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from marble_core import lag_weights, restore_spread, shrink_to_prior, soft_min_weights

UNIFORM = torch.full((3,), 1 / 3, dtype=torch.float64)


def soft_minimum(gain: Tensor, prior: Tensor, strength: float) -> Tensor:
    return -torch.logsumexp(prior.log() - strength * gain, -1) / strength


def test_the_weights_are_the_gradient_of_the_soft_minimum() -> None:
    gain = torch.tensor([0.3, -0.2, 1.1], dtype=torch.float64, requires_grad=True)
    prior = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    (gradient,) = torch.autograd.grad(soft_minimum(gain, prior, 4.0), gain)
    torch.testing.assert_close(soft_min_weights(gain, prior, 4.0), gradient, rtol=1e-12, atol=0)


def test_hand_values() -> None:
    w = soft_min_weights(torch.tensor([0.0, math.log(2.0), math.log(4.0)], dtype=torch.float64), UNIFORM, 1.0)
    torch.testing.assert_close(w, torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64) / 7)


def test_no_strength_is_the_prior_and_a_great_one_the_worst_reward() -> None:
    gain, prior = torch.tensor([0.3, -0.2, 1.1]), torch.tensor([1.0, 2.0, 5.0])
    torch.testing.assert_close(soft_min_weights(gain, prior, 0.0), prior / 8)
    assert soft_min_weights(gain, prior, 1e6).tolist() == [0.0, 1.0, 0.0]


def test_what_is_kept_is_the_priors() -> None:
    """The gradient of half the prior's mean and half the soft minimum."""
    gain = torch.tensor([0.3, -0.2, 1.1], dtype=torch.float64, requires_grad=True)
    prior = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    objective = 0.5 * (prior * gain).sum() + 0.5 * soft_minimum(gain, prior, 4.0)
    (gradient,) = torch.autograd.grad(objective, gain)
    torch.testing.assert_close(soft_min_weights(gain, 7 * prior, 4.0, keep=0.5), gradient, rtol=1e-12, atol=0)
    torch.testing.assert_close(soft_min_weights(gain, prior, 4.0, keep=1.0), prior)
    extreme = soft_min_weights(torch.tensor([-99.0, 0.0, 0.0]).double(), UNIFORM, 9.0, keep=0.5)
    torch.testing.assert_close(extreme, torch.tensor([4.0, 1.0, 1.0]).double() / 6)


def test_unknown_gains_count_as_the_mean_of_the_known() -> None:
    nan = math.nan
    assert soft_min_weights(torch.tensor([nan, nan, nan]).double(), UNIFORM, 3.0).tolist() == UNIFORM.tolist()
    found = soft_min_weights(torch.tensor([0.2, nan, 0.6]).double(), UNIFORM, 3.0)
    torch.testing.assert_close(found, soft_min_weights(torch.tensor([0.2, 0.4, 0.6]).double(), UNIFORM, 3.0))


def test_a_reward_without_prior_never_gets_weight_and_sets_no_mean() -> None:
    prior = torch.tensor([0.0, 0.5, 0.5])
    w = soft_min_weights(torch.tensor([-9.0, 0.4, math.nan]), prior, 5.0)
    torch.testing.assert_close(w, prior)


@pytest.mark.parametrize("seed", range(20))
def test_the_soft_minimum_is_near_the_minimum(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    gain, strength = torch.randn(5, generator=g, dtype=torch.float64), 0.5 + 10 * float(torch.rand((), generator=g))
    F = float(soft_minimum(gain, torch.full((5,), 0.2, dtype=torch.float64), strength))
    assert float(gain.min()) - 1e-12 <= F <= float(gain.min()) + math.log(5) / strength + 1e-12


def test_a_common_shift_of_the_gains_changes_nothing() -> None:
    gain = torch.tensor([0.3, -0.2, 1.1], dtype=torch.float64)
    torch.testing.assert_close(soft_min_weights(gain + 7, UNIFORM, 2.0), soft_min_weights(gain, UNIFORM, 2.0))


def test_ascending_the_soft_minimum_raises_the_reward_that_lags() -> None:
    """Two opposed rewards of different slopes: the sum gives one up, the soft minimum holds both at one level."""
    ends = {}
    for strength in (0.0, 10.0):
        theta = torch.zeros(2, dtype=torch.float64)
        slopes = torch.tensor([[3.0, 1.0], [-1.0, 1.0]], dtype=torch.float64)
        for _ in range(200):
            w = soft_min_weights(slopes @ theta, torch.ones(2, dtype=torch.float64), strength)
            theta = theta + 0.01 * w @ slopes
        ends[strength] = slopes @ theta
    assert float(ends[0.0].min()) < 0.1 < float(ends[10.0].min())


def test_lag_weights_by_hand() -> None:
    gain, nan = torch.tensor([0.5, 0.0, 0.2, 0.1], dtype=torch.float64), math.nan
    found = lag_weights(gain, torch.tensor([1.0, 1.0, 1.0, 3.0], dtype=torch.float64), 0.25)
    torch.testing.assert_close(found, torch.tensor([0.0, 1.0, 0.2, 1.8], dtype=torch.float64) / 3)
    # who is not wanted is not waited for; who is not known counts as last
    torch.testing.assert_close(
        lag_weights(gain, torch.tensor([1.0, 0.0, 1.0, 0.0]).double(), 0.25)[2], torch.tensor(1.0).double()
    )
    assert lag_weights(torch.tensor([0.0, nan, 9.0]), torch.ones(3), 1.0).tolist() == [0.5, 0.5, 0.0]
    assert lag_weights(torch.tensor([nan, nan]), torch.tensor([1.0, 3.0]), 1.0).tolist() == [0.25, 0.75]
    assert lag_weights(torch.tensor([-math.inf, 0.0, math.inf]), torch.ones(3), 1.0).tolist() == [1.0, 0.0, 0.0]


def test_restoring_the_spread_by_hand() -> None:
    """Columns with spreads 3 and 4 that share nothing: their sum has spread 5, in halves 2.5 instead of 3.5."""
    A = torch.tensor([[3.0, 4.0], [3.0, -4.0], [-3.0, 4.0], [-3.0, -4.0]], dtype=torch.float64)
    half = torch.tensor([0.5, 0.5], dtype=torch.float64)
    torch.testing.assert_close(restore_spread(half, A), half * 1.4)
    torch.testing.assert_close(restore_spread(10 * half, A), half * 14)
    skewed = torch.tensor([1.0, -2.0], dtype=torch.float64)  # parts 3 + 8, together sqrt(9 + 64)
    torch.testing.assert_close(restore_spread(skewed, A), skewed * 11 / math.sqrt(73))


def test_one_reward_and_copies_of_it_are_left_as_they_are() -> None:
    a = torch.tensor([[0.5], [-1.5], [1.0]], dtype=torch.float64)
    for w in ([1.0], [0.25, 0.75], [0.2, 0.3, 0.5]):
        weights = torch.tensor(w, dtype=torch.float64)
        torch.testing.assert_close(restore_spread(weights, a.expand(3, len(w))), weights)


def test_what_is_left_of_rewards_that_cancel_is_at_most_k_times_as_large() -> None:
    a = torch.tensor([1.0, -1.0, 2.0, -2.0], dtype=torch.float64)
    half = torch.tensor([0.5, 0.5], dtype=torch.float64)
    for opposed in (-a, -0.999 * a):
        assert restore_spread(half, torch.stack([a, opposed], 1)).tolist() == [1.0, 1.0]
    assert restore_spread(half, torch.zeros(4, 2).double()).tolist() == [0.5, 0.5]
    assert restore_spread(0 * half, torch.stack([a, -a], 1)).tolist() == [0.0, 0.0]
    tiny = 1e-30 * torch.stack([a, a.roll(1)], 1)
    torch.testing.assert_close(restore_spread(half, tiny), restore_spread(half, 1e30 * tiny))


def test_shrinking_by_hand() -> None:
    w, prior = torch.tensor([0.8, 0.2, 0.0]).double(), torch.tensor([1.0, 1.0, 2.0]).double()
    signal, error = torch.tensor([2.0, 1.0, -5.0]).double(), torch.ones(3).double()
    a = torch.tensor([0.75, 0.0, 0.0]).double()
    torch.testing.assert_close(shrink_to_prior(w, prior / 4, signal, error), a * w + (1 - a) * prior / 4)


def test_sure_signals_keep_their_weights_and_noise_gets_the_prior() -> None:
    w, prior = torch.tensor([0.7, 0.3]), torch.tensor([0.5, 0.5])
    torch.testing.assert_close(shrink_to_prior(w, prior, torch.ones(2), torch.full((2,), 1e-9)), w)
    torch.testing.assert_close(shrink_to_prior(w, prior, torch.zeros(2), torch.zeros(2)), prior)
    for unknown in (math.nan, math.inf):
        torch.testing.assert_close(shrink_to_prior(w, prior, torch.ones(2), torch.full((2,), unknown)), prior)


def test_bad_input_is_named() -> None:
    two, three = torch.ones(2), torch.ones(3)
    with pytest.raises(ValueError, match=r"prior: expected K = 3 entries"):
        soft_min_weights(three, two, 1.0)
    with pytest.raises(ValueError, match=r"prior: expected finite entries of at least 0"):
        soft_min_weights(two, torch.tensor([1.0, -1.0]), 1.0)
    with pytest.raises(ValueError, match="strength"):
        soft_min_weights(two, two, -1.0)
    for ahead in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="ahead: expected a number"):
            lag_weights(two, two, ahead)
    with pytest.raises(ValueError, match=r"prior: expected K = 3 entries"):
        lag_weights(three, two, 1.0)
    with pytest.raises(ValueError, match="signal: expected K = 2"):
        shrink_to_prior(two, two, three, two)
    with pytest.raises(ValueError, match="prior"):
        shrink_to_prior(two, -two, two, two)
    with pytest.raises(ValueError, match=r"weights: expected a floating-point tensor of shape \[K\] = \[3\]"):
        restore_spread(two, torch.ones(4, 3))
    with pytest.raises(ValueError, match="A: expected"):
        restore_spread(two, two)
