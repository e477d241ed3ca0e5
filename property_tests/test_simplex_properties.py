"""The solver against its own optimality conditions, against independent oracles, and under symmetries."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import Tensor

from marble_core import min_norm_gap, min_norm_weights, project_simplex
from property_tests.strategies import CLASSES, gradient_matrices, gradients, randn

EPS = torch.finfo(torch.float64).eps
NON_ZERO = tuple(kind for kind in CLASSES if kind not in ("zero rows", "all zero"))


def assert_exact(G: Tensor, w: Tensor) -> None:
    assert w.isfinite().all()
    assert (w >= 0).all()
    assert abs(float(w.sum()) - 1) <= 1e-12
    G_w = G @ w
    assert w @ G_w - G_w.min() <= 1e-9 * (w @ G_w) + 16 * EPS * (G.abs() @ w).max()


def test_every_class_has_its_property() -> None:
    """The generators hit what they are named for, at every K from 2 to 12."""
    for K, seed in itertools.product(range(2, 13), range(3)):
        g = {kind: gradients(kind, K, seed) for kind in CLASSES}
        norms = {kind: x.norm(dim=1) for kind, x in g.items()}
        cosines = {kind: torch.corrcoef(torch.cat([x, -x], 1)) for kind, x in g.items() if norms[kind].min() > 0}
        assert norms["norms 1e-8..1e8"].min() > 1e-9
        assert norms["one tiny"].min() == pytest.approx(1e-6)
        assert norms["one tiny"].max() == pytest.approx(1)
        assert torch.equal(g["duplicates"][0], g["duplicates"][max(1, K // 2)])
        assert (g["identical"] == g["identical"][0]).all()
        assert cosines["opposite pair"].min() == pytest.approx(-1, abs=1e-12)
        assert 0 < 1 - cosines["collinear"].min() < 1e-9
        assert torch.linalg.matrix_rank(g["rank K/2"]) == max(1, K // 2)
        assert (norms["zero rows"] == 0).any()
        assert not g["all zero"].any()
        w, unit = min_norm_weights(g["stationary"] @ g["stationary"].T), norms["stationary"].max()
        assert (w @ g["stationary"]).norm() < 1e-7 * unit
        assert torch.equal(g["bf16"], g["bf16"].bfloat16().double())
    spread = torch.cat([gradients("norms 1e-8..1e8", 12, seed).norm(dim=1) for seed in range(20)])
    assert spread.min() < 1e-6
    assert spread.max() > 1e6


def test_every_class_occurs() -> None:
    seen = set()

    @given(st.sampled_from(CLASSES))
    def draw(kind: str) -> None:
        seen.add(kind)

    draw()
    assert seen == set(CLASSES)


@given(gradient_matrices())
def test_optimal_on_every_class(g: Tensor) -> None:
    G = g @ g.T
    w = min_norm_weights(G)
    assert_exact(G, w)
    assert min_norm_gap(G, w) <= 1e-9 * (w @ G @ w) + 16 * EPS * (G.abs() @ w).max()


@given(gradient_matrices(), st.integers(0, 1000))
def test_the_gap_bounds_the_distance_to_the_shortest_vector(g: Tensor, seed: int) -> None:
    """``|d_w - d*|^2 <= gap(w)`` at random weights and at every vertex, and ``<d_w, g_k> >= |d_w|^2 - gap(w)``."""
    G, K = g @ g.T, len(g)
    W = torch.cat([(3 * randn(4, K, seed=seed)).softmax(1), torch.eye(K, dtype=torch.float64)])
    gap, shortest, scale = min_norm_gap(G, W), min_norm_weights(G) @ g, float(G.diagonal().max())
    distance = (W @ g - shortest).square().sum(1)
    assert (gap >= -1e-12 * scale).all()
    assert (distance <= gap + 1e-7 * scale).all()
    promised = (W @ g).square().sum(1) - gap
    assert ((W @ G).amin(1) >= promised - 1e-12 * scale).all()


def test_the_distance_comes_near_to_the_gap() -> None:
    G, w = torch.tensor([[1.0, 0.0], [0.0, 900.0]], dtype=torch.float64), torch.tensor([0.0, 1.0], dtype=torch.float64)
    apart = w - min_norm_weights(G)
    assert apart @ G @ apart > 0.998 * min_norm_gap(G, w)


@given(gradient_matrices(tuple(kind for kind in NON_ZERO if kind != "collinear"), min_K=2), st.integers(0, 1000))
@example(torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64), 0)
def test_no_unit_gradient_gets_more_than_half(g: Tensor, seed: int) -> None:
    """And exactly half against a bundle of all others, whether it opposes the bundle or is orthogonal to it."""
    unit = g / g.norm(dim=1, keepdim=True)
    assert min_norm_weights(unit @ unit.T).max() <= 0.5 + 1e-9
    bundle = unit[1:2].expand(len(g), -1).clone()
    bundle[0] = unit[0] if seed % 2 else randn(g.shape[1], seed=seed)
    bundle[0] -= (bundle[0] @ bundle[1]).clamp(min=0) * bundle[1]
    assume(bundle[0].norm() > 1e-3)
    bundle[0] /= bundle[0].norm()
    torch.testing.assert_close(min_norm_weights(bundle @ bundle.T)[0], torch.tensor(0.5).double(), rtol=0, atol=1e-9)


@given(st.integers(1, 12), st.integers(0, 1000))
def test_orthogonal_gradients_get_weights_by_their_inverse_squares(K: int, seed: int) -> None:
    lengths = (2 * randn(K, seed=seed)).exp()
    g = lengths.unsqueeze(1) * torch.linalg.qr(randn(K + 3, K, seed=seed + 1)).Q.T
    expected = lengths**-2 / (lengths**-2).sum()
    torch.testing.assert_close(min_norm_weights(g @ g.T), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", CLASSES)
def test_optimal_for_many_gradients(kind: str) -> None:
    for K in (16, 33, 64, 128, 256):
        g = gradients(kind, K, K)
        assert_exact(g @ g.T, min_norm_weights(g @ g.T))


@given(gradient_matrices(("random", "correlated", "lognormal norms", "opposite pair", "rank K/2", "zero rows")))
def test_no_other_solver_finds_a_shorter_vector(g: Tensor) -> None:
    G = g @ g.T
    K = len(G)
    length2 = float(min_norm_weights(G) @ G @ min_norm_weights(G))
    scale = float(G.diagonal().max()) or 1.0
    u, _ = scipy.optimize.nnls(np.concatenate([g.T.numpy() / scale**0.5, np.ones((1, K))]), np.eye(g.shape[1] + 1)[-1])
    w = torch.from_numpy(u / u.sum())
    assert length2 <= float(w @ G @ w) + 1e-12 * scale
    assert length2 >= float(w @ G @ w) - 1e-9 * scale  # and nnls is a good solver
    A = G.numpy() / scale
    start = np.full(K, 1 / K)
    slsqp = scipy.optimize.minimize(
        lambda w: w @ A @ w,
        start,
        jac=lambda w: 2 * A @ w,
        bounds=[(0, 1)] * K,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": lambda w: np.ones(K)},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    v = np.clip(slsqp.x, 0, None)
    assert length2 <= scale * float(v @ A @ v) / v.sum() ** 2 + 1e-12 * scale


def exact_min_norm(rows: list[list[int]]) -> Fraction:
    """Squared length of the shortest vector in the hull of up to three integer vectors, by all faces, in rationals."""
    G = [[Fraction(sum(a * b for a, b in zip(x, y, strict=True))) for y in rows] for x in rows]
    best = min(G[i][i] for i in range(len(rows)))
    for i, j in itertools.combinations(range(len(rows)), 2):
        det = G[i][i] + G[j][j] - 2 * G[i][j]
        if det > 0:
            t = (G[j][j] - G[i][j]) / det
            if 0 <= t <= 1:
                best = min(best, t * t * G[i][i] + 2 * t * (1 - t) * G[i][j] + (1 - t) ** 2 * G[j][j])
    if len(rows) == 3:  # interior: minimize over (s, t) with w = (s, t, 1 - s - t)
        a = [[G[i][j] - G[i][2] - G[2][j] + G[2][2] for j in range(2)] for i in range(2)]
        b = [G[2][2] - G[i][2] for i in range(2)]
        det = a[0][0] * a[1][1] - a[0][1] * a[1][0]
        if det > 0:
            s = (b[0] * a[1][1] - b[1] * a[0][1]) / det
            t = (a[0][0] * b[1] - a[1][0] * b[0]) / det
            w = [s, t, 1 - s - t]
            if min(w) >= 0:
                best = min(best, sum((w[i] * w[j] * G[i][j] for i in range(3) for j in range(3)), start=Fraction(0)))
    return best


@given(st.lists(st.lists(st.integers(-4, 4), min_size=3, max_size=3), min_size=2, max_size=3))
def test_exact_in_rationals(rows: list[list[int]]) -> None:
    g = torch.tensor(rows, dtype=torch.float64)
    w = min_norm_weights(g @ g.T)
    assert float((w @ g).square().sum()) == pytest.approx(float(exact_min_norm(rows)), abs=1e-14)


@given(gradient_matrices(max_K=10), st.integers(0, 1000))
def test_relabelling_relabels_and_equals_share_equally(g: Tensor, seed: int) -> None:
    G = g @ g.T
    w = min_norm_weights(G)
    p = torch.randperm(len(G), generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(min_norm_weights(G[p][:, p]), w[p], rtol=0, atol=1e-9)
    twice = torch.cat([G, G]).repeat(1, 2)  # every gradient exactly twice
    doubled = min_norm_weights(twice)
    torch.testing.assert_close(doubled[: len(G)], doubled[len(G) :], rtol=0, atol=1e-9)
    torch.testing.assert_close(doubled[: len(G)] + doubled[len(G) :], w, rtol=0, atol=1e-3 if len(G) > 4 else 1e-5)


@given(gradient_matrices(("identical",), max_K=40))
def test_identical_gradients_get_uniform_weights(g: Tensor) -> None:
    K = len(g)
    torch.testing.assert_close(
        min_norm_weights(g @ g.T), torch.full((K,), 1 / K, dtype=torch.float64), rtol=0, atol=1e-9
    )


@given(st.lists(st.sampled_from(CLASSES), min_size=1, max_size=5), st.integers(1, 10), st.integers(0, 1000))
def test_batch_vmap_and_loop(kinds: list[str], K: int, seed: int) -> None:
    g = torch.stack(
        [
            gradients(kind, K, seed + i) if kind != "rank K/2" else randn(K, K + 4, seed=seed)
            for i, kind in enumerate(kinds)
        ]
    )
    G = g @ g.mT
    loop = torch.stack([min_norm_weights(item) for item in G])
    assert torch.equal(min_norm_weights(G), loop)
    if K <= 8:
        torch.testing.assert_close(torch.func.vmap(min_norm_weights)(G), loop, rtol=0, atol=1e-9)
    G[0, 0, 0] = torch.nan
    poisoned = min_norm_weights(G)
    assert poisoned[0].isnan().all()
    assert torch.equal(poisoned[1:], loop[1:])


@given(gradient_matrices(), st.floats(-12, 12))
def test_a_common_scale_changes_nothing(g: Tensor, exponent: float) -> None:
    G = g @ g.T
    scaled = 4.0 ** round(exponent) * G  # a power of four, so that not even roots round differently
    assert torch.equal(min_norm_weights(scaled), min_norm_weights(G))


@given(
    gradient_matrices(("random", "correlated", "lognormal norms", "duplicates", "opposite pair"), max_K=8),
    st.floats(0, 1),
)
def test_floor_is_honoured_and_optimal(g: Tensor, share: float) -> None:
    G, K = g @ g.T, len(g)
    floor = share / K
    w = min_norm_weights(G, floor=floor)
    assert (w >= floor - 1e-15).all()
    assert abs(float(w.sum()) - 1) <= 1e-12
    G_w = G @ w
    free = w > floor + 1e-7
    assert not free.any() or G_w[free].max() <= G_w.min() + 1e-6 * G.diagonal().max()


@given(st.integers(1, 30), st.integers(0, 1000), st.floats(-6, 6))
def test_projection_onto_the_simplex(K: int, seed: int, exponent: float) -> None:
    x = 10.0**exponent * randn(4, K, seed=seed)
    w = project_simplex(x)
    assert (w >= 0).all()
    torch.testing.assert_close(w.sum(-1), torch.ones(4).double(), rtol=0, atol=1e-9)
    torch.testing.assert_close(project_simplex(w), w, rtol=0, atol=1e-12)
    towards = (x - w).amax(-1) - ((x - w) * w).sum(-1)  # max over the vertices v of <x - w, v - w>
    assert (towards <= 1e-9 * (1 + x.abs().amax(-1))).all()
