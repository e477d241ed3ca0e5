"""The projection onto the cone against its optimality conditions, an independent solver, and under symmetries."""

from __future__ import annotations

from functools import partial

import scipy.optimize
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from marble_core import combine_rows, cone_weights, cross_gram, gram_matrix, harmonize, psd_part, signal_gram
from property_tests.strategies import CLASSES, REGULAR, gradient_matrices, gradients, randn

EPS = torch.finfo(torch.float64).eps
exact = partial(cone_weights, precision=2.0**-53)  # for float64 rows
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
        changed = [not torch.equal(exact(g @ g.T, prior), prior) for g, prior in drawn]
        assert sum(changed) >= 3, kind


@given(problems())
@example(draw("duplicates", 8, 0, "flipped"))
@example(draw("rank K/2", 9, 903, "as drawn"))
@example(draw("collinear", 12, 2, "flipped"))
@example(draw("stationary", 12, 2, "as drawn"))
def test_optimality_conditions(problem: tuple[Tensor, Tensor]) -> None:
    g, prior = problem
    assert_optimal(g, prior, exact(g @ g.T, prior))


@given(problems(max_K=64))
def test_optimality_conditions_for_many_gradients(problem: tuple[Tensor, Tensor]) -> None:
    g, prior = problem
    assert_optimal(g, prior, exact(g @ g.T, prior))


@given(problems(max_K=8))
def test_without_reading_a_value(problem: tuple[Tensor, Tensor]) -> None:
    g, prior = problem
    c = torch.func.vmap(exact)((g @ g.T)[None], prior[None])[0]
    assert_optimal(g, prior, c)
    other = exact(g @ g.T, prior)
    assert ((c - other) @ g).norm() <= 1e-7 * reach(g, c + other)


@given(problems(max_K=24))
def test_it_is_the_projection(problem: tuple[Tensor, Tensor]) -> None:
    """``<d, v> = |d|^2`` and ``|d| <= |v|``, in the vectors themselves."""
    g, prior = problem
    c = exact(g @ g.T, prior)
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
    c = exact(g @ g.T, prior)
    assert (c @ g - nnls_direction(g, prior)).norm() <= 1e-11 * reach(g, c)


@given(problems())
def test_agrees_with_nnls_as_far_as_a_gram_tells(problem: tuple[Tensor, Tensor]) -> None:
    """A Gram holds squares: directions that differ by the root of its rounding look alike to it."""
    g, prior = problem
    c = exact(g @ g.T, prior)
    assert (c @ g - nnls_direction(g, prior)).norm() <= 1e-7 * reach(g, c)


@given(problems(tuple(kind for kind in CLASSES if kind != "collinear")), st.integers(0, 1000))
def test_relabelling_relabels_the_coefficients(problem: tuple[Tensor, Tensor], seed: int) -> None:
    g, prior = problem
    p = torch.randperm(len(g), generator=torch.Generator().manual_seed(seed))
    c, permuted = exact(g @ g.T, prior), exact(g[p] @ g[p].T, prior[p])
    assert ((permuted - c[p]).abs() * g[p].norm(dim=1) <= 1e-8 * reach(g, c)).all()


@given(problems(), st.integers(0, 1000))
def test_relabelling_leaves_the_direction(problem: tuple[Tensor, Tensor], seed: int) -> None:
    g, prior = problem
    p = torch.randperm(len(g), generator=torch.Generator().manual_seed(seed))
    c, permuted = exact(g @ g.T, prior), exact(g[p] @ g[p].T, prior[p])
    assert (permuted @ g[p] - c @ g).norm() <= 1e-7 * reach(g, c)


@given(problems(), st.integers(-12, 12), st.integers(-20, 20))
def test_a_scale_of_the_gram_changes_nothing_and_one_of_the_prior_is_that_of_c(
    problem: tuple[Tensor, Tensor], i: int, j: int
) -> None:
    g, prior = problem
    G = g @ g.T
    scaled = exact(4.0**i * G, 2.0**j * prior)  # powers at which not even roots round differently
    assert torch.equal(scaled, 2.0**j * exact(G, prior))


@given(problems())
def test_projecting_again_changes_nothing(problem: tuple[Tensor, Tensor]) -> None:
    g, prior = problem
    c = exact(g @ g.T, prior)
    again = exact(g @ g.T, c)
    assert ((again - c) @ g).norm() <= 64 * EPS * reach(g, again)


@given(gradient_matrices(("duplicates", "identical"), min_K=2), st.integers(0, 1000))
def test_equal_gradients_get_equal_corrections(g: Tensor, seed: int) -> None:
    prior, other = randn(len(g) + 1, seed=seed).abs(), -3 * g.mean(0, keepdim=True) + randn(1, g.shape[1], seed=seed)
    g = torch.cat([g, other])
    c = exact(g @ g.T, prior)
    correction = (c - prior) * g.norm(dim=1)
    same = (g.unsqueeze(0) == g.unsqueeze(1)).all(-1)
    spread = torch.where(same, correction.unsqueeze(0) - correction.unsqueeze(1), 0.0)
    assert spread.abs().max() <= 1e-10 * reach(g, c)


# --- rows of limited precision: coefficients are applied in the rows' dtype, and the applied direction is judged

OPPOSED = ("weakly stationary", "complement", "duplicates and opposites", "nearly opposite", "two bundles")
DELTA = 2.0**-24  # relative rounding of float32 rows


def opposed(kind: str, K: int, seed: int) -> Tensor:
    """Float32 rows ``[K, P]`` that oppose each other up to rounding: the exact cone asks for huge coefficients."""
    g = randn(K, 10, seed=seed)
    if kind == "weakly stationary":  # 0 = sum w_k g_k for weights of which some are 0
        w = randn(K, seed=seed + 1).abs() + 0.1
        half = max(2, K // 2)
        g[half - 1] = -(w[: half - 1] @ g[: half - 1]) / w[half - 1]
    elif kind == "complement":  # a reward and 1 - it
        g[-1] = -g[0]
        g[-1] *= 1 + 1e-7 * randn(10, seed=seed + 1)
    elif kind == "duplicates and opposites":
        g = g[torch.arange(K) % max(1, K // 3)] * randn(K, 1, seed=seed + 1).sign()
        g = g * (1 + 1e-7 * randn(K, 10, seed=seed + 2))
    elif kind == "two bundles":  # copies of (1, 0) and of (-1, 2 sqrt(DELTA)) against (0, -1)
        g = torch.zeros(K, 10, dtype=torch.float64)
        g[0, 1], g[1::2, 0], g[2::2, 0], g[2::2, 1] = -1, 1, -1, 2 * DELTA**0.5
    else:
        g[1::2] = -g[:1] + 10.0 ** -(3 + seed % 5) * g[1::2]
    return g.float()


def opposed_prior(kind: str, K: int, seed: int) -> Tensor:
    """Random, or the one that the bundles oppose most."""
    prior = randn(K, seed=seed + 7).abs()
    return torch.eye(K, dtype=torch.float64)[0] if kind == "two bundles" else prior


def most(K: int) -> float:
    """The greatest ``sum_k nu_k |g_k|`` for float32 rows, in units of ``sum_k prior_k |g_k|``."""
    return float(max(K**-0.5, 0.5) / DELTA**0.5)


def unit_violation(g: Tensor, d: Tensor) -> float:
    """The most that d lowers a reward, per unit of its gradient."""
    return float((-(g.double() @ d.double()) / g.double().norm(dim=1)).max())


def opposed_problems(max_K: int = 20) -> st.SearchStrategy[tuple[Tensor, Tensor]]:
    def build(kind: str, K: int, seed: int) -> tuple[Tensor, Tensor]:
        return opposed(kind, K, seed), opposed_prior(kind, K, seed)

    return st.builds(build, st.sampled_from(OPPOSED), st.integers(2, max_K), st.integers(0, 2**20))


def test_these_classes_ask_for_huge_coefficients() -> None:
    for kind in OPPOSED:
        reached = []
        for seed in range(40):
            g, prior = opposed(kind, 6, seed), opposed_prior(kind, 6, seed)
            G = g.double() @ g.double().T
            reached.append(reach(g.double(), exact(G, prior)) / reach(g.double(), prior))
        assert max(reached) > 4000 or kind == "duplicates and opposites", (kind, max(reached))


def test_two_bundles_come_near_to_the_greatest_sum() -> None:
    for K in (9, 21, 51):
        g, prior = opposed("two bundles", K, 0).double(), opposed_prior("two bundles", K, 0)
        assert 0.94 * most(K) < reach(g, cone_weights(g @ g.T, prior) - prior) <= most(K)


@given(opposed_problems())
@example((opposed("weakly stationary", 20, 3), torch.ones(20, dtype=torch.float64)))
@example((opposed("complement", 5, 1), torch.ones(5, dtype=torch.float64)))
@example((opposed("nearly opposite", 2, 4), torch.ones(2, dtype=torch.float64)))
@example((opposed("two bundles", 9, 0), opposed_prior("two bundles", 9, 0)))
@example((opposed("two bundles", 51, 0), opposed_prior("two bundles", 51, 0)))
def test_what_is_applied_in_float32_keeps_the_promise(problem: tuple[Tensor, Tensor]) -> None:
    g, prior = problem
    K, v, rows = len(g), reach(g.double(), prior), g.double()
    c = cone_weights(rows @ rows.T, prior)
    bound = (K * DELTA) ** 0.5
    assert reach(rows, c - prior) <= (1 + 1e-6) * most(K) * v
    assert unit_violation(g, c @ rows) <= (bound / 2 + K * DELTA) * (1 + 1e-6) * v
    assert float((c @ rows).square().sum()) <= float((prior @ rows).square().sum()) + 64 * EPS * reach(rows, c) ** 2
    assert unit_violation(g, combine_rows(g, c.float())) <= bound * v
    naive = c.float() @ g  # sums of products in float32
    assert unit_violation(g, naive) <= 2 * bound * v
    assert float(naive.double().norm()) <= float((prior @ rows).norm()) + 2 * bound * v


@given(opposed_problems(max_K=8))
@example((opposed("two bundles", 7, 0), opposed_prior("two bundles", 7, 0)))
def test_without_reading_a_value_coefficients_are_bounded_too(problem: tuple[Tensor, Tensor]) -> None:
    g, prior = problem
    G, bound = g.double() @ g.double().T, (len(g) * DELTA) ** 0.5
    c = torch.func.vmap(cone_weights)(G[None], prior[None])[0]
    assert reach(g.double(), c - prior) <= (1 + 1e-6) * most(len(g)) * reach(g.double(), prior)
    assert unit_violation(g, combine_rows(g, c.float())) <= bound * reach(g.double(), prior)


@given(st.integers(0, 2**20), st.sampled_from([torch.float32, torch.bfloat16]))
def test_short_gradients_keep_their_share_in_the_rows_dtype(seed: int, dtype: torch.dtype) -> None:
    """A gradient of 1e-8 has a coefficient of 1e8: its product with the row is as exact as any other."""
    g = randn(4, 30, seed=seed)
    g[1] *= 1e-8
    g = g.to(dtype)
    h = harmonize(gram_matrix(g))
    d = combine_rows(g, h.coefficients).double()
    unit = g.double() / g.double().norm(dim=1, keepdim=True)
    cosines = unit @ d / d.norm()
    assert float(cosines.min()) >= float(h.direction_norm) - 4 * torch.finfo(dtype).eps


@given(st.integers(0, 2**20))
def test_on_an_estimate_the_step_is_no_longer_than_the_prior_s(seed: int) -> None:
    """Five signals, a twentieth of the noise: an averaged cross-Gram, the error that it tells, the batch's Gram."""
    K, P = 5, 300
    s, prior = randn(K, P, seed=seed) / P**0.5, torch.full((K,), 0.2, dtype=torch.float64)
    s[1] -= 1.5 * s[0]
    rows = s + 20 * randn(4, 2, K, P, seed=seed + 1) / P**0.5
    estimate = signal_gram(torch.stack([cross_gram(a, b) for a, b in rows]).mean(0))
    batch = rows[-1].mean(0)
    gram = psd_part(estimate.gram)
    error = float((estimate.variance / K**2).sqrt() / gram.diagonal().mean())
    c = cone_weights(gram, prior, error=error, step_gram=gram_matrix(batch))
    assert float((c @ batch).norm()) <= (1 + 1e-9) * float((prior @ batch).norm())
    assert float(c.abs().sum()) < 100
