"""Synthetic gradients with known signal and noise: what the same batch pretends, and what the noise tools recover."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from marble_core import (
    cross_alignment,
    cross_gram,
    gradient_snr,
    gram_matrix,
    harmonize,
    init_gram_ema,
    init_moments,
    normalize_gram,
    null_alignment,
    psd_part,
    signal_share,
    update_gram_ema,
    update_moments,
)
from property_tests.strategies import randn

K, P = 4, 400


def z_scores(samples: Tensor, expected: Tensor) -> Tensor:
    """How many standard errors the means of ``samples [M, ...]`` are from what is expected."""
    return (samples.mean(0) - expected) / (samples.std(0) / len(samples) ** 0.5)


def signals(seed: int) -> Tensor:
    """Four signals with conflict, of unequal length: |s_k| = 1, 1, 1/2, 1/4."""
    s = randn(K, K, seed=seed) @ randn(K, P, seed=seed + 1)
    s = s / s.norm(dim=1, keepdim=True)
    s[1] = s[1] - 0.5 * s[0]
    return s / s.norm(dim=1, keepdim=True) * torch.tensor([[1.0], [1.0], [0.5], [0.25]])


def batch(s: Tensor, seed: int, noise: float) -> Tensor:
    """Signals plus independent noise of squared length ``noise^2``."""
    return s + noise / P**0.5 * randn(K, P, seed=seed)


def test_pure_noise_has_the_null_alignment_for_free_and_nothing_elsewhere() -> None:
    for n_rewards in (2, 5, 10):
        same, held_out = [], []
        for seed in range(60):
            g, other = randn(n_rewards, 20_000, seed=2 * seed), randn(n_rewards, 20_000, seed=2 * seed + 1)
            h = harmonize(gram_matrix(g))
            same.append(h.cosines.min())
            held_out.append(cross_alignment(h.coefficients @ g, other).cosines)
        assert abs(torch.stack(same).mean() - null_alignment(n_rewards)) < 0.02
        cosines = torch.stack(held_out)
        assert abs(z_scores(cosines.flatten(), torch.tensor(0.0))) < 4
        torch.testing.assert_close(cosines.std(), torch.tensor(20_000**-0.5).double(), rtol=0.2, atol=0)


@given(st.integers(1, 12), st.floats(0, 0.99), st.integers(0, 1000))
def test_noises_that_correlate_have_a_larger_null_alignment(n: int, q: float, seed: int) -> None:
    cosines = (1 - q) * torch.eye(n).double() + q
    g = torch.linalg.cholesky(cosines) @ torch.linalg.qr(randn(n + 3, n, seed=seed)).Q.T  # noises of correlation q
    h = harmonize(gram_matrix(randn(n, 1, seed=seed + 1).exp() * g))
    torch.testing.assert_close(h.weights, torch.full((n,), 1 / n, dtype=torch.float64), rtol=0, atol=1e-9)
    assert float(h.cosines.min()) == pytest.approx(((1 + (n - 1) * q) / n) ** 0.5, rel=1e-9)
    assert q > 0 or float(h.cosines.min()) == pytest.approx(null_alignment(n), rel=1e-9)


@given(st.integers(1, 8), st.integers(0, 1000))
def test_orthogonal_noise_shrinks_cosines_and_the_useful_part(n: int, seed: int) -> None:
    """``G_hat = D Gamma D + I - D^2``, ``D = diag(sqrt(p))``, and ``<d*, s_k / |s_k|> = sum_l w_l D_ll Gamma_lk``."""
    s, noise = randn(n, 2 * n + 3, seed=seed), torch.zeros(n, 2 * n + 3).double()
    s[:, n + 3 :] = 0
    noise[:, n + 3 :] = torch.diag((2 * randn(n, seed=seed + 1)).exp())
    unit = s / s.norm(dim=1, keepdim=True)
    Gamma, share = unit @ unit.T, s.square().sum(1) / (s.square().sum(1) + noise.square().sum(1))
    D = share.sqrt().diag()
    G_hat = D @ Gamma @ D + torch.eye(n).double() - D @ D
    torch.testing.assert_close(normalize_gram(gram_matrix(s + noise))[0], G_hat, rtol=0, atol=1e-12)
    h = harmonize(gram_matrix(s + noise))
    direction = h.coefficients @ (s + noise) / h.norms.mean()
    torch.testing.assert_close(unit @ direction, (h.weights * share.sqrt()) @ Gamma, rtol=0, atol=1e-10)


def test_cross_gram_is_unbiased_and_the_gram_is_not() -> None:
    s = signals(0)
    truth = s @ s.T
    pairs = [(batch(s, 2 * i, 3.0), batch(s, 2 * i + 1, 3.0)) for i in range(400)]
    cross = torch.stack([cross_gram(a, b) for a, b in pairs])
    assert z_scores(cross, truth).abs().max() < 4
    same = torch.stack([gram_matrix(a) for a, _ in pairs])
    assert (z_scores(same, truth).diagonal() > 50).all()
    torch.testing.assert_close(
        same.mean(0).diagonal() - truth.diagonal(), torch.full((K,), 9.0).double(), rtol=0.02, atol=0
    )


def test_signal_share_and_its_standard_error_are_calibrated() -> None:
    s = signals(3)
    truth = s.square().sum(1) / (s.square().sum(1) + 4.0)
    estimates, errors = [], []
    for repeat in range(60):
        pairs = [(batch(s, 1000 * repeat + 2 * i, 2.0), batch(s, 1000 * repeat + 2 * i + 1, 2.0)) for i in range(20)]
        cross = torch.stack([cross_gram(a, b) for a, b in pairs])
        gram = torch.stack([(gram_matrix(a) + gram_matrix(b)) / 2 for a, b in pairs])
        share, error = signal_share(cross, gram)
        estimates.append(share)
        errors.append(error)
    assert z_scores(torch.stack(estimates), truth).abs().max() < 4
    ratio = torch.stack(estimates).std(0) / torch.stack(errors).mean(0)
    assert ((ratio > 0.7) & (ratio < 1.4)).all()
    single = [
        signal_share(cross_gram(batch(s, 2 * i, 2.0), batch(s, 2 * i + 1, 2.0)), gram_matrix(batch(s, 2 * i, 2.0)))
        for i in range(300)
    ]
    assert z_scores(torch.stack([x for x in single if isinstance(x, Tensor)]), truth).abs().max() < 4


def test_gradient_snr_estimates_signal_power_over_noise_power() -> None:
    s = signals(5)
    a, b = (torch.cat([batch(s, 2 * i + j, 2.0) for i in range(200)], 1) for j in range(2))  # 200 batches side by side
    snr = gradient_snr(cross_gram(a, b), a.norm(dim=1), b.norm(dim=1))
    torch.testing.assert_close(snr, s.square().sum(1) / 4.0, rtol=0.3, atol=0.01)


def held_out_minimum(s: Tensor, coefficients: Tensor) -> float:
    """Least cosine of the direction that the coefficients give *on the true signals* with those signals."""
    return float(cross_alignment(coefficients @ s, s).minimum)


def test_moments_and_cross_grams_approach_the_noise_free_optimum() -> None:
    """The more batches a solve sees, the nearer; a single batch's direction harms a reward."""
    curves: dict[str, list[list[float]]] = {"moments": [], "cross": []}
    single, best = [], []
    for seed in range(12):
        s = signals(100 + 10 * seed)
        best.append(held_out_minimum(s, harmonize(gram_matrix(s)).coefficients))
        single.append(held_out_minimum(s, harmonize(gram_matrix(batch(s, seed, 2.0))).coefficients))
        moments, ema = init_moments(s), init_gram_ema(K)
        found: dict[str, list[float]] = {"moments": [], "cross": []}
        for i in range(1024):
            a, b = batch(s, 10_000 * seed + 2 * i, 2.0), batch(s, 10_000 * seed + 2 * i + 1, 2.0)
            decay = i / (i + 1)  # a plain mean of all so far
            moments, mean = update_moments(moments, (a + b) / 2, decay=decay)
            ema, C = update_gram_ema(ema, cross_gram(a, b), decay=decay)
            if i + 1 in (1, 32, 1024):
                found["moments"].append(held_out_minimum(s, harmonize(gram_matrix(mean)).coefficients))
                found["cross"].append(held_out_minimum(s, harmonize(psd_part(C), signal_tol=1e-3).coefficients))
        for name, values in found.items():
            curves[name].append(values)
    optimum = torch.tensor(best).mean()
    for name, runs in curves.items():
        few, some, many = torch.tensor(runs).mean(0)
        assert few < some < many, name
        assert optimum - many < 0.4 * (optimum - few), name
        assert many <= optimum + 1e-6, name
    assert torch.tensor(single).mean() < 0 < optimum  # on the signals, a single batch's direction harms a reward


@given(st.integers(1, 5), st.floats(0, 0.99), st.integers(0, 1000), st.sampled_from([torch.float32, torch.bfloat16]))
def test_moments_closed_form(n: int, decay: float, seed: int, dtype: torch.dtype) -> None:
    rows = [randn(3, 7, seed=seed + i).to(dtype) for i in range(n)]
    active = torch.tensor([True, False, True])
    state = init_moments({"w": rows[0]})
    for x in rows:
        state, corrected = update_moments(state, {"w": x}, decay=decay, active=active)
    weights = torch.tensor([(1 - decay) * decay ** (n - 1 - i) for i in range(n)])
    expected = sum(w * x.float() for w, x in zip(weights, rows, strict=True)) / weights.sum()
    assert corrected["w"].dtype == torch.float32
    torch.testing.assert_close(corrected["w"][active], expected[active], rtol=1e-4, atol=1e-5)
    assert not corrected["w"][1].any()
    assert not state.mean["w"][1].any()


@given(st.floats(0, 0.97))
def test_a_moment_is_as_noisy_and_as_old_as_a_plain_mean(decay: float) -> None:
    """Of the last ``n = (1 + decay) / (1 - decay)`` gradients: noise power 1/n, mean age (n - 1) / 2."""
    steps, n = 1000, (1 + decay) / (1 - decay)
    noise = torch.eye(steps).double()  # one orthogonal noise of power 1 a step
    state = init_moments(noise[:1])
    for x in noise:
        state, moment = update_moments(state, x.unsqueeze(0), decay=decay)
    assert float(moment.square().sum()) == pytest.approx(1 / n, rel=1e-9)
    age = float(moment[0].flip(0) @ torch.arange(steps).double())
    assert age == pytest.approx((n - 1) / 2, rel=1e-6, abs=1e-12)


@given(st.integers(1, 6), st.floats(0, 0.99), st.integers(0, 1000))
def test_gram_ema_closed_form(n: int, decay: float, seed: int) -> None:
    grams = [gram_matrix(randn(3, 7, seed=seed + i)) for i in range(n)]
    state = init_gram_ema(3)
    for G in grams:
        state, corrected = update_gram_ema(state, G, decay=decay)
    weights = torch.tensor([(1 - decay) * decay ** (n - 1 - i) for i in range(n)], dtype=torch.float64)
    expected = sum(w * G for w, G in zip(weights, grams, strict=True)) / weights.sum()
    torch.testing.assert_close(corrected, expected, rtol=1e-9, atol=1e-12)
