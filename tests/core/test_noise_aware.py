"""The noise-aware solve: values by hand, its two limits, and what is not known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from marble_core import (
    SignalGram,
    cross_gram,
    gram_matrix,
    harmonize,
    noise_aware_weights,
    psd_part,
    shrink_gram,
    signal_gram,
)


def matrix(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def test_the_error_of_the_symmetric_part_is_read_off_the_antisymmetric_one() -> None:
    """Two batches with known noise, many times: the variance is right on average, the estimate unbiased."""
    g = torch.Generator().manual_seed(0)
    s = torch.randn(3, 40, generator=g, dtype=torch.float64)
    S, errors, told = s @ s.mT, [], []
    for _ in range(4000):
        a, b = (s + 0.5 * torch.randn(3, 40, generator=g, dtype=torch.float64) for _ in range(2))
        found = signal_gram(cross_gram(a, b))
        errors.append((found.gram - S).square().sum())
        told.append(found.variance)
    # the off-diagonal share is exact; the diagonal, with twice the variance, is taken to be like the others
    truth, mean = torch.stack(errors).mean(), torch.stack(told).mean()
    assert 0.6 * truth < mean < truth


def test_shrinkage_by_hand() -> None:
    S = matrix([3.0, 1.0], [1.0, 1.0])  # mu = 2, |S - 2 I|^2 = 4
    for variance, rho in ((0.0, 0.0), (1.0, 0.25), (4.0, 1.0), (9.0, 1.0)):
        found, share = shrink_gram(SignalGram(S, torch.tensor(variance)))
        assert float(share) == pytest.approx(rho)
        torch.testing.assert_close(found, (1 - rho) * S + rho * 2 * torch.eye(2, dtype=torch.float64))


def test_without_a_positive_trace_nothing_is_known() -> None:
    found, rho = shrink_gram(SignalGram(matrix([-1.0, 0.3], [0.3, 0.5]), torch.tensor(0.1)))
    assert float(rho) == 1
    torch.testing.assert_close(found, torch.eye(2, dtype=torch.float64))


def test_an_exact_estimate_is_left_alone_and_one_reward_too() -> None:
    S = matrix([2.0, -1.0], [-1.0, 3.0])
    assert torch.equal(shrink_gram(signal_gram(S))[0], S)
    found, rho = shrink_gram(signal_gram(matrix([4.0])))
    assert (found.tolist(), float(rho)) == ([[4.0]], 0.0)


def test_without_noise_it_is_marble() -> None:
    rows = torch.randn(4, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    rows[3] -= 2 * rows[0]
    S = gram_matrix(rows)
    found, marble = noise_aware_weights(S, S), harmonize(S)
    torch.testing.assert_close(found.gains / S.diagonal().sqrt(), marble.cosines, rtol=0, atol=1e-9)
    torch.testing.assert_close(found.smallest, marble.direction_norm, rtol=0, atol=1e-9)
    ratio = found.coefficients / marble.coefficients
    torch.testing.assert_close(ratio, ratio[:1].expand(4), rtol=1e-7, atol=0)
    assert not found.stationary


def test_without_information_it_is_the_wanted_weights() -> None:
    G = matrix([5.0, 1.0, 0.0], [1.0, 3.0, -0.5], [0.0, -0.5, 9.0])
    signal, _ = shrink_gram(SignalGram(matrix([1.0, 0.9, 0.2], [0.9, 2.0, 0.1], [0.2, 0.1, 0.5]), torch.tensor(99.0)))
    torch.testing.assert_close(noise_aware_weights(signal, G).coefficients, torch.full((3,), 1 / 3).double())
    wanted = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    c = noise_aware_weights(signal, G, wanted).coefficients
    torch.testing.assert_close(c / c.sum(), wanted / 6)


def test_by_hand_with_noise() -> None:
    """Two equal signals at right angles, the second with more noise: equal gains at least noise.

    ``S = I`` wants ``c_1 = c_2``; ``G = diag(2, 6)`` then makes a step of length sqrt(8) / 2 times that of the mean.
    """
    found = noise_aware_weights(torch.eye(2).double(), matrix([2.0, 0.0], [0.0, 6.0]))
    torch.testing.assert_close(found.coefficients, torch.tensor([0.5, 0.5]).double())
    torch.testing.assert_close(found.gains, torch.full((2,), 1 / math.sqrt(8)).double())


def test_a_reward_of_noise_is_raised_through_its_relatives() -> None:
    """Reward 0 is the same signal as reward 1 with a hundred times the noise: its own gradient is hardly used."""
    S, G = matrix([1.0, 1.0], [1.0, 1.0]), matrix([101.0, 1.0], [1.0, 2.0])
    found = noise_aware_weights(S, G)
    assert abs(float(found.coefficients[0])) < 0.02 * float(found.coefficients[1])
    torch.testing.assert_close(found.gains[0], found.gains[1])
    equal = torch.tensor([0.5, 0.5]).double()
    assert found.smallest > 2 * (S @ equal).min() / (equal @ G @ equal).sqrt()


def test_opposed_signals_are_stationary() -> None:
    found = noise_aware_weights(matrix([1.0, -1.0], [-1.0, 1.0]), matrix([2.0, -1.0], [-1.0, 2.0]))
    assert found.stationary
    assert found.coefficients.tolist() == [0.5, 0.5]


def test_a_reward_that_nobody_wants_is_left_to_itself() -> None:
    S, G = matrix([1.0, -1.0], [-1.0, 1.0]), matrix([2.0, -1.0], [-1.0, 2.0])
    found = noise_aware_weights(S, G, torch.tensor([1.0, 0.0]))
    assert not found.stationary
    assert found.gains[0] > 0 > found.gains[1]
    assert found.smallest == found.gains[0]


def test_not_a_number_stays_in_its_item() -> None:
    S = torch.eye(2).double().repeat(3, 1, 1)
    S[1, 0, 0] = math.nan
    found = noise_aware_weights(S, S)
    assert found.coefficients.isnan().all(-1).tolist() == [False, True, False]
    assert found.gains.isnan().all(-1).tolist() == [False, True, False]
    assert shrink_gram(SignalGram(S, torch.zeros(3)))[0].isnan().flatten(1).any(1).tolist() == [False, True, False]


def test_what_does_not_fit_is_named() -> None:
    S = torch.eye(2)
    with pytest.raises(ValueError, match=r"gram: expected the shape of signal, \[2, 2\]"):
        noise_aware_weights(S, torch.eye(3))
    with pytest.raises(ValueError, match=r"wanted: expected K = 2 entries"):
        noise_aware_weights(S, S, torch.ones(3))
    with pytest.raises(ValueError, match="cross: expected a floating-point Gram matrix"):
        signal_gram(torch.ones(2, 3))


def test_with_noise_it_gains_more_than_min_norm_of_the_estimate() -> None:
    """One reward opposes three, the signals are a fifth of the noise: the smallest true gain, on average over draws."""
    g = torch.Generator().manual_seed(5)
    P, K = 400, 4
    s = torch.zeros(K, P, dtype=torch.float64)
    s[0, :2] = torch.tensor([1.0, 0.2])
    s[1, :3], s[2, :3] = torch.tensor([1.0, 0.3, 0.5]), torch.tensor([0.9, -0.2, 0.4])
    s[3, :4] = torch.tensor([-0.8, 0.4, 0.3, 0.6])
    S = s @ s.mT
    noise = torch.tensor([0.4, 0.1, 0.2, 0.1], dtype=torch.float64).unsqueeze(1)
    aware: list[float] = []
    plain: list[float] = []
    equal: list[float] = []
    for _ in range(150):
        a, b = (s + noise * torch.randn(K, P, generator=g, dtype=torch.float64) for _ in range(2))
        G = gram_matrix((a + b) / 2)
        true = S + (noise.square() * P / 2).squeeze(1).diag()
        signal = shrink_gram(signal_gram(cross_gram(a, b)))[0]
        wanted = torch.ones(K)
        for found, c in (
            (aware, noise_aware_weights(signal, G, wanted).coefficients),
            (plain, harmonize(psd_part(cross_gram(a, b))).coefficients),
            (equal, torch.full((K,), 0.25, dtype=torch.float64)),
        ):
            found.append(float((S @ c).min() / (c @ true @ c).sqrt()))
    means = [sum(x) / len(x) for x in (aware, plain, equal)]
    assert means[0] > means[1]
    assert means[0] > means[2]


def test_lengths_from_1e_4_to_1e4_do_not_matter() -> None:
    rows = torch.randn(5, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows[4] -= rows[:4].sum(0) / 2
    S = gram_matrix(rows)
    scale = 10.0 ** torch.linspace(-4, 4, 5, dtype=torch.float64)
    far = scale.unsqueeze(1) * S * scale
    found, expected = noise_aware_weights(far, far), noise_aware_weights(S, S)
    torch.testing.assert_close(found.gains / scale, expected.gains, rtol=1e-6, atol=0)
