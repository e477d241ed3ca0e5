"""The projection onto the cone against its optimality conditions, an independent solver, and under symmetries."""

from __future__ import annotations

import scipy.optimize
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from marble_core import cone_weights
from property_tests.strategies import CLASSES, REGULAR, gradient_matrices, gradients, randn

EPS = torch.finfo(torch.float64).eps
# Common offsets make most classes conflict-free: flipped signs bring conflicts back.
SIGNED = ("as drawn", "flipped")


def draw(kind: str, K: int, seed: int, sign: str) -> tuple[Tensor, Tensor]:
    """Gradients ``[K, P]`` and a prior ``[K]``, some of it 0."""
    g = gradients(kind, K, seed)
    prior = randn(K, seed=seed + 3).abs() * (randn(K, seed=seed + 4) < 0.5)
    return (g * randn(K, 1, seed=seed + 5).sign() if sign == "flipped" else g), prior


def problems(kinds: tuple[str, ...] = CLASSES, max_K: int = 12) -> st.SearchStrategy[tuple[Tensor, Tensor]]:
    kind, sign = st.sampled_from(kinds), st.sampled_from(SIGNED)
    return st.builds(draw, kind, st.integers(1, max_K), st.integers(0, 2**20), sign)


def reach(g: Tensor, c: Tensor) -> float:
    """``sum_k c_k |g_k|``, what the rounding errors of a Gram and of its products are relative to."""
    return float((c * g.norm(dim=1)).sum())


def assert_optimal(g: Tensor, prior: Tensor, c: Tensor) -> None:
    """The KKT conditions, to a few dozen units of rounding whatever the class."""
    G_c = g @ g.T @ c
    bound = 64 * EPS * reach(g, c) * g.norm(dim=1)
    assert (c >= prior).all()
    assert (G_c >= -bound).all()
    assert (G_c <= bound)[c > prior].all()


def test_most_classes_have_conflicts() -> None:
    """Otherwise the properties below would be those of the identity."""
    for kind in set(CLASSES) - {"all zero"}:
        drawn = [draw(kind, K, 50 * K, "flipped") for K in range(4, 13)]
        changed = [not torch.equal(cone_weights(g @ g.T, prior), prior) for g, prior in drawn]
        assert sum(changed) >= 3, kind


@given(problems())
@example(draw("duplicates", 8, 0, "flipped"))
@example(draw("rank K/2", 9, 903, "as drawn"))
@example(draw("collinear", 12, 2, "flipped"))
@example(draw("stationary", 12, 2, "as drawn"))
def test_optimality_conditions(problem: tuple[Tensor, Tensor]) -> None:
    g, prior = problem
    assert_optimal(g, prior, cone_weights(g @ g.T, prior))


@given(problems(max_K=64))
def test_optimality_conditions_for_many_gradients(problem: tuple[Tensor, Tensor]) -> None:
    g, prior = problem
    assert_optimal(g, prior, cone_weights(g @ g.T, prior))


@given(problems(max_K=8))
def test_without_reading_a_value(problem: tuple[Tensor, Tensor]) -> None:
    g, prior = problem
    c = torch.func.vmap(cone_weights)((g @ g.T)[None], prior[None])[0]
    assert_optimal(g, prior, c)
    other = cone_weights(g @ g.T, prior)
    assert ((c - other) @ g).norm() <= 1e-7 * reach(g, c + other)


@given(problems(max_K=24))
def test_it_is_the_projection(problem: tuple[Tensor, Tensor]) -> None:
    """``<d, v> = |d|^2`` and ``|d| <= |v|``, in the vectors themselves."""
    g, prior = problem
    c = cone_weights(g @ g.T, prior)
    d, v, rounding = c @ g, prior @ g, 64 * EPS * reach(g, c)
    assert d.norm() <= v.norm() + 1e-7 * reach(g, c)
    assert abs(float(d @ (d - v))) <= rounding * reach(g, c - prior) + rounding * float(d.norm())


def nnls_direction(g: Tensor, prior: Tensor) -> Tensor:
    """d from Lawson and Hanson's method on the vectors, not on their Gram."""
    s, v = g.norm(dim=1), prior @ g
    A = (g / torch.where(s > 0, s, 1.0).unsqueeze(-1)).T.numpy()
    scale = float(v.norm()) or 1.0
    mu, _ = scipy.optimize.nnls(A, -(v / scale).numpy(), maxiter=100 * len(g))
    return v + scale * torch.tensor(A @ mu)


@given(problems(REGULAR))
def test_agrees_with_nnls_on_the_vectors(problem: tuple[Tensor, Tensor]) -> None:
    g, prior = problem
    c = cone_weights(g @ g.T, prior)
    assert (c @ g - nnls_direction(g, prior)).norm() <= 1e-11 * reach(g, c)


@given(problems())
def test_agrees_with_nnls_as_far_as_a_gram_tells(problem: tuple[Tensor, Tensor]) -> None:
    """A Gram holds squares: directions that differ by the root of its rounding look alike to it."""
    g, prior = problem
    c = cone_weights(g @ g.T, prior)
    assert (c @ g - nnls_direction(g, prior)).norm() <= 1e-7 * reach(g, c)


@given(problems(tuple(kind for kind in CLASSES if kind != "collinear")), st.integers(0, 1000))
def test_relabelling_relabels_the_coefficients(problem: tuple[Tensor, Tensor], seed: int) -> None:
    g, prior = problem
    p = torch.randperm(len(g), generator=torch.Generator().manual_seed(seed))
    c, permuted = cone_weights(g @ g.T, prior), cone_weights(g[p] @ g[p].T, prior[p])
    assert ((permuted - c[p]).abs() * g[p].norm(dim=1) <= 1e-8 * reach(g, c)).all()


@given(problems(), st.integers(0, 1000))
def test_relabelling_leaves_the_direction(problem: tuple[Tensor, Tensor], seed: int) -> None:
    g, prior = problem
    p = torch.randperm(len(g), generator=torch.Generator().manual_seed(seed))
    c, permuted = cone_weights(g @ g.T, prior), cone_weights(g[p] @ g[p].T, prior[p])
    assert (permuted @ g[p] - c @ g).norm() <= 1e-7 * reach(g, c)


@given(problems(), st.integers(-12, 12), st.integers(-20, 20))
def test_a_scale_of_the_gram_changes_nothing_and_one_of_the_prior_is_that_of_c(
    problem: tuple[Tensor, Tensor], i: int, j: int
) -> None:
    g, prior = problem
    G = g @ g.T
    scaled = cone_weights(4.0**i * G, 2.0**j * prior)  # powers at which not even roots round differently
    assert torch.equal(scaled, 2.0**j * cone_weights(G, prior))


@given(problems())
def test_projecting_again_changes_nothing(problem: tuple[Tensor, Tensor]) -> None:
    g, prior = problem
    c = cone_weights(g @ g.T, prior)
    again = cone_weights(g @ g.T, c)
    assert ((again - c) @ g).norm() <= 64 * EPS * reach(g, again)


@given(gradient_matrices(("duplicates", "identical"), min_K=2), st.integers(0, 1000))
def test_equal_gradients_get_equal_corrections(g: Tensor, seed: int) -> None:
    prior, other = randn(len(g) + 1, seed=seed).abs(), -3 * g.mean(0, keepdim=True) + randn(1, g.shape[1], seed=seed)
    g = torch.cat([g, other])
    c = cone_weights(g @ g.T, prior)
    correction = (c - prior) * g.norm(dim=1)
    same = (g.unsqueeze(0) == g.unsqueeze(1)).all(-1)
    spread = torch.where(same, correction.unsqueeze(0) - correction.unsqueeze(1), 0.0)
    assert spread.abs().max() <= 1e-10 * reach(g, c)
