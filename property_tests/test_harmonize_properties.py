"""The guarantee: a direction that serves every gradient to the same degree, or the word that there is none."""

from __future__ import annotations

import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from marble_core import alignment, combine_rows, gram_matrix, harmonize, min_norm_weights
from property_tests.strategies import CLASSES, REGULAR, gradient_matrices, randn

NON_ZERO = tuple(kind for kind in CLASSES if kind not in ("zero rows", "all zero"))


@given(gradient_matrices(NON_ZERO))
def test_every_cosine_is_at_least_the_length_and_the_least_is_equal(g: Tensor) -> None:
    h = harmonize(gram_matrix(g))
    assume(not h.stationary)
    d = h.coefficients @ g
    cosines = g @ d / (g.norm(dim=1) * d.norm())
    assert (cosines >= h.direction_norm - 1e-9).all()
    assert abs(cosines.min() - h.direction_norm) <= 1e-9
    torch.testing.assert_close(h.cosines, cosines, rtol=0, atol=1e-8)
    assert (cosines[h.weights > 1e-6] - h.direction_norm).abs().max() <= 1e-8
    n_bar = g.norm(dim=1).mean()
    torch.testing.assert_close(d.norm(), n_bar * h.direction_norm, rtol=1e-6, atol=0)
    torch.testing.assert_close(d, n_bar * (h.weights / g.norm(dim=1)) @ g, rtol=1e-9, atol=1e-12 * float(n_bar))


@given(gradient_matrices(NON_ZERO, min_K=2), st.integers(0, 1000))
def test_no_direction_has_a_larger_smallest_cosine(g: Tensor, seed: int) -> None:
    """Neither a random one, nor a gradient, nor one a little away from the best."""
    h = harmonize(gram_matrix(g))
    unit = g / g.norm(dim=1, keepdim=True)
    best = h.weights @ unit
    step = float(best.norm()) * 10.0 ** -(seed % 4)
    others = torch.cat([randn(20, g.shape[1], seed=seed), unit, best + step * randn(20, g.shape[1], seed=seed + 1)])
    others = others / others.norm(dim=1, keepdim=True).clamp(min=1e-300)
    assert (others @ unit.T).amin(1).max() <= float(h.direction_norm) + 1e-6 * float(h.stationary) + 1e-9


@given(gradient_matrices(("stationary", "opposite pair", "all zero"), min_K=2))
def test_stationarity_is_detected(g: Tensor) -> None:
    h = harmonize(gram_matrix(g))
    assert h.stationary
    assert h.direction_norm <= 1e-6


@given(gradient_matrices(REGULAR, max_K=10))
def test_and_not_seen_where_it_is_not(g: Tensor) -> None:
    assume(torch.linalg.svdvals(g / g.norm(dim=1, keepdim=True)).min() > 1e-4)  # so |d*| > 1e-4 / sqrt(K)
    assert not harmonize(gram_matrix(g)).stationary


@given(gradient_matrices(max_K=8), st.integers(0, 1000))
def test_relabelling_relabels(g: Tensor, seed: int) -> None:
    p = torch.randperm(len(g), generator=torch.Generator().manual_seed(seed))
    G = gram_matrix(g)
    h, relabelled = harmonize(G), harmonize(G[p][:, p])
    torch.testing.assert_close(relabelled.weights, h.weights[p], rtol=0, atol=1e-9)
    torch.testing.assert_close(relabelled.norms, h.norms[p], rtol=0, atol=0)
    assert torch.equal(relabelled.active, h.active[p])


@given(gradient_matrices(("random", "correlated", "bf16"), max_K=8), st.integers(0, 1000))
def test_scale_of_a_gradient_and_rotation_of_the_parameters(g: Tensor, seed: int) -> None:
    h = harmonize(gram_matrix(g))
    scale = 10 ** (8 * torch.tanh(randn(len(g), 1, seed=seed)))
    scaled = harmonize(gram_matrix(scale * g))
    assume(torch.linalg.svdvals(g / g.norm(dim=1, keepdim=True)).min() > 1e-2)
    torch.testing.assert_close(scaled.weights, h.weights, rtol=0, atol=1e-9)
    torch.testing.assert_close(scaled.cosines, h.cosines, rtol=0, atol=1e-9)
    Q = torch.linalg.qr(randn(g.shape[1], g.shape[1], seed=seed + 1)).Q
    rotated = harmonize(gram_matrix(g @ Q))
    torch.testing.assert_close(rotated.weights, h.weights, rtol=0, atol=1e-9)
    torch.testing.assert_close(rotated.coefficients @ (g @ Q), (h.coefficients @ g) @ Q, rtol=0, atol=1e-8)


@given(gradient_matrices(NON_ZERO, max_K=10), st.integers(0, 10), st.booleans())
def test_a_reward_without_signal_changes_nothing(g: Tensor, at: int, broken: bool) -> None:
    at = min(at, len(g))
    silent = torch.full_like(g[:1], torch.nan if broken else 0.0)
    h, wider = harmonize(gram_matrix(g)), harmonize(gram_matrix(torch.cat([g[:at], silent, g[at:]])))
    others = torch.arange(len(g) + 1) != at
    assert wider.coefficients[at] == 0
    assert wider.weights[at] == 0
    assert not wider.active[at]
    for name in ("weights", "coefficients", "norms", "cosines"):
        torch.testing.assert_close(
            getattr(wider, name)[others], getattr(h, name), rtol=1e-12, atol=1e-12 * float(h.norms.max() + 1)
        )
    torch.testing.assert_close(wider.direction_norm.square(), h.direction_norm.square(), rtol=0, atol=1e-12)
    assert wider.stationary == h.stationary


@given(gradient_matrices(CLASSES, max_K=8))
def test_without_reading_a_value(g: Tensor) -> None:
    """vmap cannot branch on values, nor can it drop silent rewards from the problem: same result all the same."""
    G = gram_matrix(g)
    for floor in (0.0, 0.5 / len(g)):
        eager = harmonize(G, floor=floor)
        blind = torch.func.vmap(lambda item, floor=floor: harmonize(item, floor=floor))(G.unsqueeze(0))
        for name, x, y in zip(eager._fields, eager, blind, strict=True):
            atol = 1e-7 if name == "direction_norm" else 1e-9  # a root: 0 is known to half of the digits
            torch.testing.assert_close(y[0], x, rtol=1e-9, atol=atol)


@given(st.integers(2, 6), st.integers(6, 30), st.integers(0, 1000))
def test_norm_corrected_amortization_is_exact_on_the_refresh_batch(K: int, B: int, seed: int) -> None:
    A, z = randn(B, K, seed=seed), randn(B, 40, seed=seed + 1)  # advantages, and each row's signal gradient
    h = A.T @ z  # linear in the advantages
    result = harmonize(gram_matrix(h))
    d_final = combine_rows(h, result.coefficients)
    one_backward = (A @ result.coefficients) @ z
    torch.testing.assert_close(one_backward, d_final, rtol=1e-10, atol=1e-10)
    paper = (A @ result.weights) @ z  # the paper's rule points elsewhere unless the norms agree
    same = torch.cosine_similarity(paper, d_final, dim=0) > 1 - 1e-12
    assert not same or (h.norm(dim=1) / h.norm(dim=1)[0] - 1).abs().max() < 1e-3 or (result.weights > 1e-9).sum() == 1


@given(gradient_matrices(REGULAR, max_K=8), st.integers(0, 1000))
def test_in_the_metric_of_the_optimizer_its_step_improves_every_reward(g: Tensor, seed: int) -> None:
    inv_metric = 10 ** (2 * torch.tanh(randn(g.shape[1], seed=seed)))
    G = gram_matrix(g, inv_metric=inv_metric)
    torch.testing.assert_close(G, (g * inv_metric) @ g.T, rtol=1e-9, atol=1e-12 * float(G.diagonal().max()))
    h = harmonize(G)
    assume(not h.stationary)
    step = inv_metric * (h.coefficients @ g)
    assert (g @ step > 0).all()
    promised = h.norms.mean() * h.norms * h.direction_norm.square()  # lengths in the metric
    assert (g @ step >= promised * (1 - 1e-6)).all()


def test_without_the_metric_the_step_of_adam_may_lower_a_reward() -> None:
    g, inv_metric = torch.tensor([[1.0, 0.0], [-0.6, 0.8]]).double(), torch.tensor([1.0, 0.1]).double()
    d = harmonize(gram_matrix(g)).coefficients @ g
    torch.testing.assert_close(d, torch.tensor([0.2, 0.4]).double())
    torch.testing.assert_close(g[1] @ (inv_metric * d), torch.tensor(-0.088).double())
    d = harmonize(gram_matrix(g, inv_metric=inv_metric)).coefficients @ g
    assert (g @ (inv_metric * d) > 0).all()


@given(gradient_matrices(("stationary", "opposite pair", "random", "correlated"), min_K=2, max_K=6), st.integers(0, 99))
def test_stationarity_does_not_depend_on_the_metric(g: Tensor, seed: int) -> None:
    h = harmonize(gram_matrix(g))
    assume(h.direction_norm > 1e-2 or h.direction_norm < 1e-7)
    for inv_metric in (randn(g.shape[1], seed=seed).exp(), randn(g.shape[1], seed=seed + 1).exp()):
        assert harmonize(gram_matrix(g, inv_metric=inv_metric)).stationary == h.stationary


@given(st.floats(-0.99, -0.05), st.floats(-3, 3))
def test_weights_of_unit_gradients_on_raw_ones_lower_the_shorter(cosine: float, exponent: float) -> None:
    """The paper's rule for two gradients: half of each, and the second falls once the first is 1/|cosine| as long."""
    ratio = 10.0**exponent
    g = torch.tensor([[ratio, 0.0], [cosine, (1 - cosine**2) ** 0.5]], dtype=torch.float64)
    w = harmonize(gram_matrix(g)).weights
    torch.testing.assert_close(w, torch.full((2,), 0.5).double(), rtol=0, atol=1e-9)
    assume(abs(ratio * abs(cosine) - 1) > 1e-6)
    assert bool((w @ g) @ g[1] < 0) == (ratio > 1 / abs(cosine))


@given(gradient_matrices(NON_ZERO, max_K=8))
def test_alignment_says_the_same_of_the_coefficients(g: Tensor) -> None:
    G = gram_matrix(g)
    h = harmonize(G)
    assume(not h.stationary)
    a = alignment(G, h.coefficients)
    torch.testing.assert_close(a.cosines, h.cosines, rtol=0, atol=1e-7)
    assert not a.conflict


@given(gradient_matrices(NON_ZERO, min_K=2, max_K=8))
def test_any_solver_gets_the_normalized_gram(g: Tensor) -> None:
    seen: list[Tensor] = []

    def spy(G_hat: Tensor) -> Tensor:
        seen.append(G_hat)
        return min_norm_weights(G_hat)

    G = gram_matrix(g)
    torch.testing.assert_close(harmonize(G, solver=spy).weights, harmonize(G).weights, rtol=0, atol=0)
    torch.testing.assert_close(seen[0].diagonal(), torch.ones(len(g)).double(), rtol=0, atol=0)
