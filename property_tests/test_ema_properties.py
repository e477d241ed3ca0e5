"""Smoothed coefficients: on the simplex for ever, in closed form, and positive cosines under the guard."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from marble_core import (
    Coefficients,
    Guard,
    ema_tree,
    gram_matrix,
    harmonize,
    init_coefficients,
    normalize_gram,
    update_coefficients,
)
from property_tests.strategies import CLASSES, REGULAR, gradient_matrices, gradients, randn


@given(st.sampled_from(CLASSES), st.integers(1, 8), st.floats(0, 1), st.booleans(), st.integers(0, 1000))
def test_on_the_simplex_whatever_comes(kind: str, K: int, rho: float, guarded: bool, seed: int) -> None:
    state = init_coefficients(K)
    for i in range(20):
        g = gradients(kind if i % 3 else "zero rows", K, seed + i)
        G = gram_matrix(g)
        state, rho_used = update_coefficients(state, harmonize(G), rho=rho, guard=Guard(G) if guarded else None)
        assert 0 <= rho_used <= rho
        assert (state.weights >= 0).all()
        assert abs(float(state.weights.sum()) - 1) <= 1e-12
    assert state.step == 20


def test_on_the_simplex_after_ten_thousand_updates() -> None:
    state = init_coefficients(5)
    refreshes = [harmonize(gram_matrix(gradients("correlated", 5, seed))) for seed in range(10)]
    for i in range(10_000):
        state, _ = update_coefficients(state, refreshes[i % 10], rho=0.7)
    assert abs(float(state.weights.sum()) - 1) <= 1e-12
    assert (state.weights >= 0).all()


@given(st.integers(1, 8), st.floats(0, 1), st.integers(0, 1000))
def test_closed_form(K: int, rho: float, seed: int) -> None:
    refreshes = [harmonize(gram_matrix(gradients("random", K, seed + i))) for i in range(6)]
    state = init_coefficients(K)
    for h in refreshes:
        state, rho_used = update_coefficients(state, h, rho=rho)
        assert rho_used == rho
    expected = rho**6 / K + sum((1 - rho) * rho ** (5 - i) * h.weights for i, h in enumerate(refreshes))
    torch.testing.assert_close(state.weights, expected, rtol=0, atol=1e-12)


@given(st.integers(2, 8), st.integers(0, 1000), st.floats(0, 1))
def test_a_silent_reward_keeps_its_share(K: int, seed: int, rho: float) -> None:
    g = gradients("random", K, seed)
    g[0] = 0
    before = Coefficients(randn(K, seed=seed).softmax(0), torch.arange(K), torch.tensor(7))
    after, _ = update_coefficients(before, harmonize(gram_matrix(g)), rho=rho)
    torch.testing.assert_close(after.weights[0], before.weights[0], rtol=1e-12, atol=0)
    assert after.steps_since_signal.tolist() == [1] + [0] * (K - 1)
    alone = harmonize(gram_matrix(g[1:])).weights  # the others share the rest as if among themselves
    expected = rho * before.weights[1:] + (1 - rho) * (1 - before.weights[0]) * alone
    torch.testing.assert_close(after.weights[1:], expected, rtol=0, atol=1e-12)


@given(
    gradient_matrices((*REGULAR, "zero rows", "duplicates"), min_K=2, max_K=8),
    st.floats(0.05, 0.95),
    st.floats(0, 1),
    st.integers(0, 1000),
)
def test_guard(g: Tensor, margin: float, rho: float, seed: int) -> None:
    G = gram_matrix(g)
    h = harmonize(G)
    assume(h.direction_norm > 1e-3)
    before = init_coefficients(len(g))._replace(weights=(4 * randn(len(g), seed=seed)).softmax(0))
    after, rho_used = update_coefficients(before, h, rho=rho, guard=Guard(G, margin))
    on = h.active
    G_hat = normalize_gram(G)[0][on][:, on]

    def projections(rho: float) -> Tensor:
        """``G_hat w`` for the active share after a plain update with this rho."""
        share = before.weights[on] / before.weights[on].sum()
        return G_hat @ (rho * share + (1 - rho) * h.weights[on])

    bound = margin * h.direction_norm.square()
    w = after.weights[on] / after.weights[on].sum()
    assert (G_hat @ w >= bound - 1e-9).all()
    assert (G_hat @ w > 0).all()
    torch.testing.assert_close(G_hat @ w, projections(float(rho_used)), rtol=0, atol=1e-9)
    if rho_used < rho:  # the largest that the margin allows
        assert projections(min(float(rho_used) + 1e-4, rho)).min() < bound + 1e-9
    if projections(rho).min() >= bound + 1e-9:
        assert rho_used == rho


@given(st.floats(0, 1), st.integers(0, 1000))
def test_ema_tree_closed_form(decay: float, seed: int) -> None:
    trees: list[dict[str, Any]] = [
        {"a": randn(3, seed=seed + i), "b": (randn(2, 2, seed=seed - i - 1),)} for i in range(5)
    ]
    average = trees[0]
    for tree in trees[1:]:
        average = ema_tree(average, tree, decay)
    for leaf, path in ((average["a"], lambda t: t["a"]), (average["b"][0], lambda t: t["b"][0])):
        expected = decay**4 * path(trees[0]) + sum((1 - decay) * decay ** (4 - i) * path(trees[i]) for i in range(1, 5))
        torch.testing.assert_close(leaf, expected, rtol=0, atol=1e-12)
