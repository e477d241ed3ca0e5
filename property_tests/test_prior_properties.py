"""Soft-minimum weights and shrinkage for any gains, priors and errors."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from marble_core import lag_weights, restore_spread, shrink_to_prior, soft_min_weights

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


@given(vectors(st.floats(-2, 2)), PRIORS.filter(lambda p: bool((p > 0).all())), st.floats(0.1, 20), st.floats(0, 1))
def test_soft_min_weights_are_the_gradient_of_the_soft_minimum(
    gain: torch.Tensor, prior: torch.Tensor, strength: float, keep: float
) -> None:
    """With the prior divided by its sum; and the soft minimum lies where it should."""
    J, pi = gain.clone().requires_grad_(), prior / prior.sum()
    F = -torch.logsumexp(pi.log() - strength * J, -1) / strength
    (expected,) = torch.autograd.grad(keep * (pi * J).sum() + (1 - keep) * F, J)
    w = soft_min_weights(gain, prior, strength, keep=keep)
    torch.testing.assert_close(w, expected, rtol=1e-9, atol=1e-12)
    least, lowest = gain.min(dim=0)
    assert least - 1e-9 <= F.detach() <= least - pi[lowest].log() / strength + 1e-9
    assert bool((w <= keep * pi + 1 - keep + 1e-12).all())


def skewed_batches(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Gains ``[n, 2]`` and gradients ``[n, 2]`` of rewards ``exp(x)`` and ``-x``, x ~ N(theta, 1), at theta = 0.

    A batch is 12 groups of 24 images; rewards are in standard deviations, advantages centred in their group.
    """
    x = torch.randn(n, 12, 24, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    R = torch.stack([(x.exp() - math.exp(0.5)) / math.sqrt((math.e - 1) * math.e), -x], -1)
    h = ((R - R.mean(2, keepdim=True)) * x.unsqueeze(-1)).mean((1, 2))
    return R.mean((1, 2)), h


def test_gains_of_another_batch_give_unbiased_steps_and_those_of_the_same_do_not() -> None:
    signals = 23 / 24 * torch.tensor([math.exp(0.5) / math.sqrt((math.e - 1) * math.e), -1.0], dtype=torch.float64)
    before, same = [], []
    for seed in range(20):
        gains, h = skewed_batches(1500, seed)
        w = soft_min_weights(gains, torch.ones(2), 4.0, keep=0.5)
        expected = w @ signals
        before.append((w.roll(1, 0) * h).sum(1) - expected.roll(1, 0))
        same.append((w * h).sum(1) - expected)
    step = float((w @ signals).mean())
    for errors, biased in ((torch.cat(before), False), (torch.cat(same), True)):
        z = float(errors.mean() / errors.std() * len(errors) ** 0.5)
        assert (abs(z) > 5) == biased
    assert 0.02 < abs(float(torch.cat(same).mean()) / step) < 0.07


@given(vectors(FLOATS), PRIORS, st.floats(0, 1e3), st.permutations(range(K)))
def test_relabelling_relabels(gain: torch.Tensor, prior: torch.Tensor, strength: float, order: list[int]) -> None:
    w, relabelled = (soft_min_weights(gain[i], prior[i], strength) for i in (list(range(K)), order))
    torch.testing.assert_close(relabelled, w[order], rtol=1e-12, atol=1e-300)


@given(vectors(st.floats(-5, 5)), st.floats(0, 20), st.integers(0, K - 1), st.floats(0, 5))
def test_a_greater_gain_never_gets_more_weight(gain: torch.Tensor, strength: float, k: int, more: float) -> None:
    prior = torch.ones(K, dtype=torch.float64)
    ahead = gain.clone()
    ahead[k] += more
    before, after = soft_min_weights(gain, prior, strength), soft_min_weights(ahead, prior, strength)
    assert after[k] <= before[k] + 1e-12
    odds = after / after[k] * math.exp(-strength * more)  # of all others against k
    others = torch.arange(K) != k
    torch.testing.assert_close(odds[others], (before / before[k])[others], rtol=1e-9, atol=1e-300)


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


@given(vectors(st.floats(-5, 5)), PRIORS, st.floats(1e-2, 20))
def test_lag_weights_are_in_proportion_to_the_gradient_of_squared_gaps(
    gain: torch.Tensor, prior: torch.Tensor, ahead: float
) -> None:
    level, J = gain[prior > 0].min() + ahead, gain.clone().requires_grad_()
    (downhill,) = torch.autograd.grad(0.5 * (prior * (level - J).clamp(min=0).square()).sum(), J)
    gap = torch.where(prior > 0, downhill, 0.0)
    torch.testing.assert_close(lag_weights(gain, prior, ahead), gap / gap.sum(), rtol=1e-9, atol=1e-12)


def spread(x: torch.Tensor) -> torch.Tensor:
    return x.square().mean(0).sqrt()


@st.composite
def advantages(draw: st.DrawFn) -> torch.Tensor:
    """``[N, K]``: independent columns, copies of a few, or columns that cancel but for a rest; of any sizes, some 0."""
    N, sources = draw(st.integers(1, 12)), draw(st.integers(1, K))
    x = torch.randn(N, sources, generator=torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))).double()
    mixing = torch.stack([draw(vectors(st.sampled_from([-1.0, 0.0, 1e-9, 1.0]))) for _ in range(sources)])
    sizes = draw(vectors(st.sampled_from([0.0, 1e-6, 1.0, 1e6])))
    return x @ mixing * sizes


@given(vectors(st.sampled_from([0.0, 0.1, 1.0, 7.0])), advantages(), st.permutations(range(K)), st.floats(1e-6, 1e6))
def test_the_combined_advantage_is_as_spread_out_as_its_parts(
    weights: torch.Tensor, A: torch.Tensor, order: list[int], size: float
) -> None:
    """Unless they cancel: then K times what is left. Order and scale do not matter."""
    c = restore_spread(weights, A)
    parts, left = float(weights @ spread(A)), float(spread(A @ weights))
    if left > parts / K:
        torch.testing.assert_close(float(spread(A @ c)), parts, rtol=1e-9, atol=1e-12)
    else:
        torch.testing.assert_close(c, K * weights if parts > 0 else weights, rtol=1e-9, atol=0)
    assert bool((c >= weights * (1 - 1e-9)).all())
    assert bool((c <= K * weights * (1 + 1e-9)).all())
    for other in (restore_spread(size * weights, A) / size, restore_spread(weights, size * A)):
        torch.testing.assert_close(other, c, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(restore_spread(weights[order], A[:, order]), c[order], rtol=1e-9, atol=1e-12)


@given(vectors(st.sampled_from([0.0, 0.1, 1.0, 7.0])), st.integers(0, 2**32 - 1))
def test_uncorrelated_advantages_of_unit_variance_are_combined_to_unit_variance(w: torch.Tensor, seed: int) -> None:
    """As GDPO's last step does it, for weights that sum to 1; the factor is that of the weights' own length."""
    x = torch.randn(12, K, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    A = torch.linalg.qr(x).Q * math.sqrt(12)
    c = restore_spread(w, A)
    torch.testing.assert_close(c * w.norm(), w * w.sum(), rtol=1e-9, atol=1e-12)
    if float(w.sum()) > 0:
        torch.testing.assert_close(spread(A @ c / w.sum()), torch.ones(()).double(), rtol=1e-9, atol=0)


@given(vectors(st.floats(0, 10)), vectors(st.floats(0, 10)), vectors(st.floats(-10, 10)), vectors(st.floats(1e-3, 10)))
def test_what_is_kept_of_the_solvers_weights_is_the_james_stein_factor(
    weights: torch.Tensor, prior: torch.Tensor, signal: torch.Tensor, error: torch.Tensor
) -> None:
    """``1 - 1/z^2`` and at least 0; what is sure is the solver's alone."""
    w, z = shrink_to_prior(weights, prior, signal, error), signal / error
    kept = torch.where(z > 1, 1 - z.clamp(min=1) ** -2, 0.0)
    torch.testing.assert_close(w - prior, kept * (weights - prior), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(shrink_to_prior(weights, prior, 1e9 * error, error), weights)


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
