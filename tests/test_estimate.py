"""Estimates of the signals' Gram matrix: unbiased where they say so, equal to plain formulas, and composable."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from marble_core import cross_gram, gram_matrix, psd_part
from reference.config.settings import Config, Rule, SolveConfig, rule_of
from reference.step.estimate import Estimate, Signal, Tree, init_estimate, observe

K, P = 3, 40
SIGNALS = torch.tensor([[0.3, 0.0, 0.1], [0.0, 0.2, -0.1], [0.0, 0.0, 0.0]], dtype=torch.float64)


def rule(**switches: Any) -> Rule:
    return rule_of(Config(balance="marble", solve=SolveConfig(**switches)))


def halves(seed: int, noise: float = 1.0) -> tuple[Tree, Tree]:
    """Two independent noisy copies of the signals, as two leaves."""
    g = torch.Generator().manual_seed(seed)
    signal = torch.zeros(K, P, dtype=torch.float64)
    signal[:, :K] = SIGNALS
    both = [signal + noise * torch.randn(K, P, generator=g, dtype=torch.float64) for _ in range(2)]
    return {"w": both[0][:, :10], "b": both[0][:, 10:]}, {"w": both[1][:, :10], "b": both[1][:, 10:]}


def run(rule: Rule, count: int, noise: float = 1.0) -> tuple[Estimate, Signal]:
    trained = {"w": torch.zeros(10, dtype=torch.float64), "b": torch.zeros(P - 10, dtype=torch.float64)}
    state = init_estimate(K, rule, trained)
    for seed in range(count):
        state, signal = observe(state, *halves(seed, noise), None, rule, None)
    return state, signal


def mean(a: Tree, b: Tree) -> Tree:
    return {name: (a[name] + b[name]) / 2 for name in a}


def test_the_batch_is_its_gram() -> None:
    a, b = halves(0)
    state, signal = run(rule(), 1)
    torch.testing.assert_close(signal.gram, gram_matrix(mean(a, b)))
    assert signal.rows is None
    assert state.mean.mean == {}  # nothing is kept that the rule has no use for


def test_halves_are_the_symmetrized_cross_gram() -> None:
    C = cross_gram(*halves(0))
    torch.testing.assert_close(run(rule(gram="halves"), 1)[1].gram, psd_part(C))


def test_full_gradients_have_the_shared_part() -> None:
    a, b = halves(0)
    shared = {"w": torch.ones(10, dtype=torch.float64), "b": torch.zeros(P - 10, dtype=torch.float64)}
    full = rule(gradients="full")
    _, signal = observe(init_estimate(K, full, shared), a, b, shared, full, None)
    torch.testing.assert_close(signal.gram, gram_matrix({name: x + shared[name] for name, x in mean(a, b).items()}))


@pytest.mark.parametrize("gram", ["halves", "consecutive", "moment_halves"])
def test_cross_grams_have_no_noise_on_the_diagonal(gram: Any) -> None:
    """Averaged over many refreshes, noise of squared length 1.8, forty times the signals', leaves nothing."""
    _, signal = run(rule(gram=gram, decay=0.999), 2000, noise=0.3)
    torch.testing.assert_close(signal.gram, SIGNALS @ SIGNALS.mT, rtol=0, atol=0.05)


@pytest.mark.parametrize(("gram", "bias"), [("batch", P / 2), ("moments", P / 2 * (1 - 0.9) / (1 + 0.9))])
def test_others_have_as_much_as_they_say(gram: Any, bias: float) -> None:
    _, signal = run(rule(gram=gram, decay=0.9 if gram == "moments" else 0.999), 2000)
    assert float(signal.gram[2, 2]) == pytest.approx(bias, rel=0.5)


def test_averaging_gradients_beats_averaging_matrices() -> None:
    """The noise of one average of n cross-Grams falls with sqrt(n), that of the cross-Gram of two averages with n."""
    S = SIGNALS @ SIGNALS.mT

    def error(gram: Any) -> float:
        found = [run_from(seed, rule(gram=gram, decay=0.95)) for seed in range(0, 3000, 60)]
        return float(torch.stack([(C - S).square().mean() for C in found]).mean())

    assert error("moment_halves") < 0.5 * error("halves")


def run_from(first: int, rule: Rule) -> Tensor:
    state = init_estimate(K, rule, {"w": torch.zeros(10).double(), "b": torch.zeros(P - 10).double()})
    for seed in range(first, first + 60):
        state, signal = observe(state, *halves(seed), None, rule, None)
    return signal.gram


def test_shares_and_their_errors() -> None:
    """Squared signals of 0.1, 0.05 and 0 beside noise of P / 2 = 20: shares below one per cent."""
    found = torch.stack([torch.stack(run_shares(first)) for first in range(0, 6000, 100)])
    shares, errors = found[:, 0], found[:, 1]
    expected = SIGNALS.square().sum(1) / (SIGNALS.square().sum(1) + P / 2)
    standard = shares.std(0) / len(shares) ** 0.5
    assert ((shares.mean(0) - expected).abs() < 4 * standard).all()
    assert (errors.mean(0) / shares.std(0)).tolist() == pytest.approx([1.0] * K, rel=0.35)


def run_shares(first: int) -> list[Tensor]:
    one = rule()
    state = init_estimate(K, one, {"w": torch.zeros(10).double(), "b": torch.zeros(P - 10).double()})
    for seed in range(first, first + 100):
        state, signal = observe(state, *halves(seed), None, one, None)
    return [signal.share, signal.share_error]


def test_one_refresh_knows_no_error() -> None:
    _, signal = run(rule(), 1)
    assert signal.error.isnan().all()
    assert signal.share.isfinite().all()


def test_a_reward_without_gradient_has_no_share() -> None:
    a, b = halves(0)
    for x in (*a.values(), *b.values()):
        x[1] = 0.0
    _, signal = observe(init_estimate(K, rule(), {"w": torch.zeros(10)}), a, b, None, rule(), None)
    assert signal.share.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("gram", ["batch", "halves", "consecutive", "moments", "moment_halves"])
def test_the_metric_is_a_change_of_coordinates(gram: Any) -> None:
    """Inner products in the metric are plain ones of gradients times its root."""
    one = rule(gram=gram, decay=0.5)
    metric = {"w": torch.linspace(0.1, 2.0, 10).double(), "b": torch.linspace(3.0, 0.2, P - 10).double()}
    plain = state = init_estimate(K, one, {name: torch.zeros_like(x) for name, x in metric.items()})
    for seed in range(3):
        a, b = halves(seed)
        state, signal = observe(state, a, b, None, one, metric)
        root_a, root_b = ({name: x * metric[name].sqrt() for name, x in half.items()} for half in (a, b))
        plain, expected = observe(plain, root_a, root_b, None, one, None)
    torch.testing.assert_close(signal.gram, expected.gram)
    torch.testing.assert_close(signal.share, expected.share)


@pytest.mark.parametrize("gram", ["batch", "moments", "moment_halves"])
def test_moments_to_step_along(gram: Any) -> None:
    one = rule(gram=gram, decay=0.5, step="moments")
    _, signal = run(one, 2)
    first, second = (mean(*halves(seed)) for seed in range(2))
    expected = {name: (0.25 * first[name] + 0.5 * second[name]) / 0.75 for name in first}
    assert signal.rows is not None
    for name, x in expected.items():
        torch.testing.assert_close(signal.rows[name], x)


def test_nothing_is_changed_in_place() -> None:
    for one in (rule(gram="moment_halves"), rule(gram="consecutive"), rule(step="moments")):
        state = init_estimate(K, one, {"w": torch.zeros(10).double(), "b": torch.zeros(P - 10).double()})
        a, b = halves(0)
        before = [x.clone() for x in (*a.values(), *b.values())]
        observe(state, a, b, None, one, None)
        assert all(torch.equal(x, y) for x, y in zip(before, (*a.values(), *b.values()), strict=True))
        assert float(state.cross.weight) == 0
        assert all(not x.any() for tree in (state.last, state.mean.mean) for x in tree.values())
