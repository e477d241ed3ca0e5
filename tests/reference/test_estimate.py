"""Estimates of the signals' Gram matrix: unbiased where they say so, equal to plain formulas, and composable."""

from __future__ import annotations

import pytest
import torch

from marble_core import cross_gram, gram_matrix
from marble_core.rules import Evidence
from reference.step.estimate import Estimate, Measured, Tree, init_estimate, observe

K, P = 3, 40
SIGNALS = torch.tensor([[0.3, 0.0, 0.1], [0.0, 0.2, -0.1], [0.0, 0.0, 0.0]], dtype=torch.float64)


def halves(seed: int, noise: float = 1.0) -> tuple[Tree, Tree]:
    """Two independent noisy copies of the signals, as two leaves."""
    g = torch.Generator().manual_seed(seed)
    signal = torch.zeros(K, P, dtype=torch.float64)
    signal[:, :K] = SIGNALS
    both = [signal + noise * torch.randn(K, P, generator=g, dtype=torch.float64) for _ in range(2)]
    return {"w": both[0][:, :10], "b": both[0][:, 10:]}, {"w": both[1][:, :10], "b": both[1][:, 10:]}


def run(memory: float | None, count: int, noise: float = 1.0, first: int = 0) -> tuple[Estimate, Measured, Evidence]:
    trained = {"w": torch.zeros(10, dtype=torch.float64), "b": torch.zeros(P - 10, dtype=torch.float64)}
    state = init_estimate(K, memory, trained)
    for seed in range(first, first + count):
        state, measured, evidence = observe(state, *halves(seed, noise), None, memory)
    return state, measured, evidence


def mean(a: Tree, b: Tree) -> Tree:
    return {name: (a[name] + b[name]) / 2 for name in a}


def test_without_memory_the_evidence_is_the_batch_s() -> None:
    a, b = halves(0)
    state, measured, evidence = run(None, 1)
    assert evidence.gram is not None
    assert evidence.cross is not None
    torch.testing.assert_close(evidence.gram, gram_matrix(mean(a, b)))
    torch.testing.assert_close(evidence.gram, measured.gram)
    torch.testing.assert_close(evidence.cross, cross_gram(a, b))
    assert evidence.gains is None  # which the loop knows
    assert state.mean.mean == {}  # nothing is kept that the rule has no use for


def test_full_gradients_have_the_shared_part_and_no_unbiased_cross_gram() -> None:
    a, b = halves(0)
    shared = {"w": torch.ones(10, dtype=torch.float64), "b": torch.zeros(P - 10, dtype=torch.float64)}
    _, _, evidence = observe(init_estimate(K, None, shared), a, b, shared, None)
    assert evidence.gram is not None
    torch.testing.assert_close(evidence.gram, gram_matrix({name: x + shared[name] for name, x in mean(a, b).items()}))
    assert evidence.cross is None


def test_with_memory_the_evidence_is_of_the_moments() -> None:
    (a, b), (c, d) = halves(0), halves(1)
    _, measured, evidence = run(0.5, 2)
    m_a, m_b = ({n: (0.25 * x[n] + 0.5 * y[n]) / 0.75 for n in x} for x, y in ((a, c), (b, d)))
    assert evidence.cross is not None
    assert evidence.gram is not None
    torch.testing.assert_close(evidence.cross, cross_gram(m_a, m_b))
    batch = [gram_matrix(mean(*halves(seed))) for seed in range(2)]
    torch.testing.assert_close(evidence.gram, (0.9 * batch[0] + batch[1]) / 1.9)
    torch.testing.assert_close(measured.gram, batch[1])


def test_cross_grams_have_no_noise_on_the_diagonal() -> None:
    """Averaged over many refreshes, noise of squared length 1.8, forty times the signals', leaves nothing."""
    cross = run(0.999, 2000, noise=0.3)[2].cross
    torch.testing.assert_close(cross, SIGNALS @ SIGNALS.mT, rtol=0, atol=0.05)


def test_the_average_gram_has_all_the_noise() -> None:
    assert float(run(None, 300)[1].average[2, 2]) == pytest.approx(P / 2, rel=0.5)


@pytest.mark.slow
def test_averaging_gradients_beats_averaging_matrices() -> None:
    """The noise of one average of n cross-Grams falls with sqrt(n), that of the cross-Gram of two averages with n."""
    S = SIGNALS @ SIGNALS.mT
    found = [run(0.9, 60, first=first) for first in range(0, 3000, 60)]
    matrices = torch.stack([(measured.cross - S).square().mean() for _, measured, _ in found])
    gradients = torch.stack([(e.cross - S).square().mean() for *_, e in found if e.cross is not None])
    assert float(gradients.mean()) < 0.5 * float(matrices.mean())


@pytest.mark.slow
def test_squared_lengths_and_their_errors() -> None:
    """Squared signals of 0.1, 0.05 and 0 beside noise of P / 2 = 20."""
    many = [run(None, 100, first=first)[1] for first in range(0, 6000, 100)]
    squares = torch.stack([m.cross.diagonal() for m in many])
    errors = torch.stack([m.error for m in many])
    standard = squares.std(0) / len(many) ** 0.5
    assert ((squares.mean(0) - SIGNALS.square().sum(1)).abs() < 4 * standard).all()
    assert (errors.mean(0) / squares.std(0)).tolist() == pytest.approx([1.0] * K, rel=0.35)


def test_certainty_is_the_square_over_its_error() -> None:
    _, measured, evidence = run(None, 30, noise=0.1)
    assert evidence.certainty is not None
    torch.testing.assert_close(evidence.certainty, measured.cross.diagonal() / measured.error)
    assert float(evidence.certainty[0]) > 3
    assert abs(float(evidence.certainty[2])) < 3


def test_one_refresh_knows_no_error() -> None:
    _, measured, evidence = run(None, 1)
    assert evidence.certainty is not None
    assert measured.error.isnan().all()
    assert evidence.certainty.isnan().all()


@pytest.mark.parametrize("memory", [None, 0.5])
def test_nothing_is_changed_in_place(memory: float | None) -> None:
    state = init_estimate(K, memory, {"w": torch.zeros(10).double(), "b": torch.zeros(P - 10).double()})
    a, b = halves(0)
    before = [x.clone() for x in (*a.values(), *b.values())]
    observe(state, a, b, None, memory)
    assert all(torch.equal(x, y) for x, y in zip(before, (*a.values(), *b.values()), strict=True))
    assert float(state.cross.weight) == 0
    assert all(not x.any() for x in state.mean.mean.values())
