"""Soft-minimum weights and shrinkage for any gains, priors and errors."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from marble_core import lag_weights, shrink_to_prior, soft_min_weights

FLOATS = st.floats(-1e6, 1e6)
K = 4


def vectors(elements: st.SearchStrategy[float]) -> st.SearchStrategy[torch.Tensor]:
    return st.lists(elements, min_size=K, max_size=K).map(lambda x: torch.tensor(x, dtype=torch.float64))


PRIORS = vectors(st.sampled_from([0.0, 1e-8, 0.25, 1.0, 1e8])).filter(lambda p: float(p.sum()) > 0)


@given(vectors(st.one_of(FLOATS, st.just(math.nan))), PRIORS, st.floats(0, 1e3), st.floats(0, 1))
def test_soft_min_weights_are_on_the_simplex(
    gain: torch.Tensor, prior: torch.Tensor, strength: float, keep: float
) -> None:
    w = soft_min_weights(gain, prior, strength, keep=keep)
    assert bool((w >= keep * prior / prior.sum() - 1e-12).all())
    assert bool((w >= 0).all())
    assert abs(float(w.sum()) - 1) < 1e-12
    assert bool((w[prior == 0] == 0).all())


@given(vectors(FLOATS), PRIORS, st.floats(0, 1e3), st.permutations(range(K)))
def test_relabelling_relabels(gain: torch.Tensor, prior: torch.Tensor, strength: float, order: list[int]) -> None:
    w, relabelled = (soft_min_weights(gain[i], prior[i], strength) for i in (list(range(K)), order))
    torch.testing.assert_close(relabelled, w[order], rtol=1e-12, atol=1e-300)


@given(vectors(st.floats(-5, 5)), st.floats(0, 20), st.integers(0, K - 1), st.floats(0, 5))
def test_a_greater_gain_never_gets_more_weight(gain: torch.Tensor, strength: float, k: int, more: float) -> None:
    prior = torch.ones(K, dtype=torch.float64)
    ahead = gain.clone()
    ahead[k] += more
    assert soft_min_weights(ahead, prior, strength)[k] <= soft_min_weights(gain, prior, strength)[k] + 1e-12


@given(vectors(st.one_of(st.floats(-5, 5), st.just(math.nan))), PRIORS, st.floats(1e-3, 20), st.permutations(range(K)))
def test_lag_weights_are_on_the_simplex_and_fall_with_the_gain(
    gain: torch.Tensor, prior: torch.Tensor, ahead: float, order: list[int]
) -> None:
    w = lag_weights(gain, prior, ahead)
    assert bool((w >= 0).all())
    assert abs(float(w.sum()) - 1) < 1e-12
    assert bool((w[prior == 0] == 0).all())
    torch.testing.assert_close(lag_weights(gain[order], prior[order], ahead), w[order], rtol=1e-12, atol=1e-300)
    torch.testing.assert_close(lag_weights(2 * gain, prior, 2 * ahead), w, rtol=1e-9, atol=1e-12)
    known = (prior > 0) & ~gain.isnan()
    share = w[known] / prior[known]
    by_gain = gain[known].argsort()
    assert bool((share[by_gain].diff() <= 1e-12 * share.sum()).all())
    if bool(known.any()):
        assert bool((share[gain[known] >= float(gain[known].min()) + 1.001 * ahead] == 0).all())


@given(
    vectors(st.sampled_from([0.0, 0.1, 1.0, 7.0])), PRIORS, vectors(st.floats(-1e8, 1e8)), vectors(st.floats(0, 1e8))
)
def test_shrunk_weights_lie_between_the_solver_and_the_prior(
    weights: torch.Tensor, prior: torch.Tensor, signal: torch.Tensor, error: torch.Tensor
) -> None:
    w = shrink_to_prior(weights, prior, signal, error)
    low, high = torch.minimum(weights, prior), torch.maximum(weights, prior)
    assert bool(((w >= low * (1 - 1e-12)) & (w <= high * (1 + 1e-12))).all())
    unsure = signal <= error
    assert torch.equal(w[unsure], prior[unsure])
