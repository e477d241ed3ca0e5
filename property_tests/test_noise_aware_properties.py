"""The noise-aware solve: its certificate, its limits and its symmetries, over all classes of gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from marble_core import (
    SignalGram,
    gram_matrix,
    harmonize,
    lag_weights,
    min_norm_weights,
    noise_aware_weights,
    shrink_gram,
    signal_gram,
)
from marble_core.rules import Evidence, catch_up
from property_tests.strategies import REGULAR, gradients, randn

NOISY = tuple(kind for kind in REGULAR if kind not in ("norms 1e-8..1e8", "one tiny"))  # noise hides a tiny signal


def problem(kind: str, K: int, seed: int, level: float) -> tuple[Tensor, Tensor, Tensor]:
    """Signals' Gram, Gram with noise of ``level`` times the mean signal, and wanted gains."""
    s = gradients(kind, K, seed)
    S = s @ s.T
    n = level * S.diagonal().mean().sqrt() * randn(K, 3 * K, seed=seed + 11)
    return S, S + n @ n.T, 0.2 + randn(K, seed=seed + 12).abs()


def problems(max_K: int = 12) -> st.SearchStrategy[tuple[Tensor, Tensor, Tensor]]:
    levels = st.sampled_from((0.1, 1.0, 10.0))
    return st.builds(problem, st.sampled_from(NOISY), st.integers(1, max_K), st.integers(0, 2**20), levels)


@given(problems())
def test_no_other_coefficients_have_a_larger_smallest_gain(found: tuple[Tensor, Tensor, Tensor]) -> None:
    """The certificate, and a comparison with equal weights, each single reward and random coefficients."""
    S, G, wanted = found
    K = len(S)
    best = noise_aware_weights(S, G, wanted)
    others = torch.cat([torch.eye(K).double(), torch.ones(1, K).double(), randn(20, K, seed=K)])
    lengths = (others @ G * others).sum(1).sqrt()
    reached = ((others @ S) / lengths.unsqueeze(1) / wanted).amin(1)
    assert best.smallest >= reached.max() - 1e-7 * S.diagonal().sum().sqrt()
    torch.testing.assert_close(best.smallest, (best.gains / wanted).min())
    c = best.coefficients
    torch.testing.assert_close((S @ c) / (c @ G @ c).sqrt(), best.gains, rtol=1e-9, atol=1e-9)


@given(problems())
def test_the_smallest_gain_is_the_length_of_the_min_norm_point_of_h(found: tuple[Tensor, Tensor, Tensor]) -> None:
    """No weights on the simplex give a smaller upper bound, and the bound of the best is reached."""
    S, G, wanted = found
    H = S @ torch.linalg.solve(G, S) / wanted / wanted.unsqueeze(1)
    best, scale = noise_aware_weights(S, G, wanted), float(H.diagonal().max()) ** 0.5
    others = torch.cat([min_norm_weights(H).unsqueeze(0), randn(20, len(S), seed=len(S)).softmax(1)])
    bounds = (others @ H * others).sum(1).clamp(min=0).sqrt()
    assert (best.smallest <= bounds + 1e-6 * scale).all()
    assert best.smallest >= bounds[0] - 1e-6 * scale
    assert (best.gains >= best.smallest * wanted * (1 - 1e-12)).all()


@given(problems())
def test_the_step_is_as_long_as_that_of_equal_weights(found: tuple[Tensor, Tensor, Tensor]) -> None:
    S, G, wanted = found
    c, u = noise_aware_weights(S, G, wanted).coefficients, torch.full((len(S),), 1 / len(S)).double()
    torch.testing.assert_close(c @ G @ c, u @ G @ u, rtol=1e-7, atol=0)


@given(st.sampled_from(NOISY), st.integers(1, 10), st.integers(0, 2**20))
def test_without_noise_it_is_marble(kind: str, K: int, seed: int) -> None:
    S = gram_matrix(gradients(kind, K, seed))
    found, marble = noise_aware_weights(S, S), harmonize(S)
    assert float(found.smallest) >= float(marble.direction_norm) - 1e-6


@given(problems())
def test_without_information_it_is_uniform(found: tuple[Tensor, Tensor, Tensor]) -> None:
    S, G, _ = found
    K, u = len(S), torch.full((len(S),), 1 / len(S)).double()
    G = G.abs()  # noises that do not oppose each other
    nothing, rho = shrink_gram(SignalGram(S, torch.tensor(torch.inf)))
    assert K == 1 or float(rho) == 1
    torch.testing.assert_close(
        noise_aware_weights(nothing, G + K * G.diag().diag()).coefficients, u, rtol=1e-7, atol=1e-9
    )


@given(problems(), st.floats(-4, 4))
def test_scale_and_labels_do_not_matter(found: tuple[Tensor, Tensor, Tensor], exponent: float) -> None:
    S, G, wanted = found
    scale, order = 10.0**exponent, torch.randperm(len(S), generator=torch.Generator().manual_seed(1))
    c = noise_aware_weights(S, G, wanted).coefficients
    torch.testing.assert_close(noise_aware_weights(scale * S, scale * G, wanted).coefficients, c, rtol=1e-5, atol=1e-7)
    permuted = noise_aware_weights(S[order][:, order], G[order][:, order], wanted[order]).coefficients
    torch.testing.assert_close(permuted, c[order], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("q", [0.0, 0.9])
def test_the_error_of_a_pair_misses_what_noises_of_two_rewards_share(q: float) -> None:
    """Off the diagonal by ``(1 + q^2) / (1 - q^2)`` in the variance, and the diagonal twice as noisy as is assumed."""
    K, P, M = 4, 200, 2000
    mix = torch.linalg.cholesky((1 - q) * torch.eye(K).double() + q)
    cross = (mix @ randn(M, K, P, seed=1)) @ (mix @ randn(M, K, P, seed=2)).mT  # noise alone: S = 0
    off = ~torch.eye(K, dtype=torch.bool)
    symmetric, anti = (cross + cross.mT) / 2, (cross - cross.mT) / 2
    ratio = float(symmetric[:, off].square().mean() / anti[:, off].square().mean())
    assert ratio == pytest.approx((1 + q**2) / (1 - q**2), rel=0.1)
    found = signal_gram(cross)
    missed = float(found.gram.square().sum((1, 2)).mean() / found.variance.mean())
    assert missed == pytest.approx((K + 1 + (K - 1) * q**2) / (K * (1 - q**2)), rel=0.1)


@given(st.integers(1, 8), st.integers(0, 2**20))
def test_shrinking_moves_towards_equal_signals_and_stays_psd(K: int, seed: int) -> None:
    cross = randn(K, K, seed=seed)
    signal = signal_gram(cross)
    gram, rho = shrink_gram(signal)
    assert 0 <= float(rho) <= 1
    assert float(torch.linalg.eigvalsh(gram).min()) >= -1e-12 * max(1.0, float(gram.abs().max()))
    if float(signal.gram.trace()) > 0:  # else nothing is known, whatever the variance
        assert float(shrink_gram(SignalGram(signal.gram, torch.tensor(0.0)))[1]) == 0


@given(problems(), st.floats(0.01, 2.0))
def test_catching_up_raises_whoever_lags_in_proportion(found: tuple[Tensor, Tensor, Tensor], ahead: float) -> None:
    """And whoever is in front asks for nothing: its gradient never keeps the others from gaining as much."""
    S, G, wanted = found
    K, gains = len(S), wanted - 1.0
    c = catch_up(K, ahead=ahead).update(torch.ones(K).double(), Evidence(gram=G, cross=S, gains=gains))[1]
    asked = lag_weights(gains, torch.ones(K).double(), ahead) * S.diagonal().sqrt()
    solved = noise_aware_weights(S, G, asked)
    assume(not bool(solved.stationary))
    reached = (S @ c) / (c @ G @ c).sqrt()
    assert bool((reached >= float(solved.smallest) * asked - 1e-7 * S.diagonal().sum().sqrt())[asked > 0].all())
    assert float(reached[gains.argmin()]) > 0
    everyone = noise_aware_weights(S, G, S.diagonal().sqrt())
    served = everyone.gains[asked > 0] / (asked[asked > 0] / asked.max())
    assert float(solved.smallest * asked.max()) >= float(served.min()) - 1e-7 * float(S.diagonal().sum().sqrt())
