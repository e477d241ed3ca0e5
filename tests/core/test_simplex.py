"""The simplex module: hand values, degenerate cases, exactness over hard classes, transforms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from marble_core import min_norm_gap, min_norm_weights, project_simplex
from marble_core._min_norm import enumerate_supports

EPS = torch.finfo(torch.float64).eps


def gram(*rows: list[float]) -> Tensor:
    g = torch.tensor(rows, dtype=torch.float64)
    return g @ g.T


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def hard_rows(kind: str, K: int, seed: int) -> Tensor:
    """Gradients of the classes on which solvers fail."""
    g = seeded(K, max(2, K // 2) if kind in ("rank", "spread rank") else 2 * K, seed=seed)
    exponent = 16 * torch.rand(K, 1, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64) - 8
    if kind in ("spread", "spread rank"):
        g = g * 10**exponent
    if kind == "lognormal":
        g = g * seeded(K, 1, seed=seed + 2).mul(2).exp()
    if kind == "one tiny":
        g[0] *= 1e-6
    if kind == "duplicates":
        g = g[torch.arange(K) % max(K // 2, 1)]
    if kind == "opposite" and K > 1:
        g[1] = -g[0]
    if kind == "collinear":
        g[1::2] = g[0 : K - K % 2 : 2][: g[1::2].shape[0]] + 1e-6 * g[1::2]
    if kind == "all collinear":
        g = g[:1] + 1e-6 * g
    if kind == "zero row":
        g[K // 2] = 0
    if kind == "all zero":
        g = 0 * g
    if kind == "identical":
        g = g[:1].expand(K, -1).clone()
    return g


KINDS = (
    "random",
    "lognormal",
    "spread",
    "one tiny",
    "duplicates",
    "opposite",
    "collinear",
    "all collinear",
    "rank",
    "spread rank",
    "zero row",
    "all zero",
    "identical",
)


def assert_exact(G: Tensor, w: Tensor) -> None:
    """On the simplex to 1e-12, and optimal to what float64 rounding of ``G w`` allows."""
    assert w.isfinite().all()
    assert (w >= 0).all()
    assert abs(float(w.sum()) - 1) <= 1e-12
    G_w = G @ w
    gap = w @ G_w - G_w.min()
    assert gap <= 1e-9 * (w @ G_w) + 16 * EPS * (G.abs() @ w).max()


@pytest.mark.parametrize("kind", KINDS)
def test_exact_on_every_hard_class(kind: str) -> None:
    for K in (1, 2, 3, 5, 8, 9, 13, 17, 32):
        for seed in range(4):
            g = hard_rows(kind, K, 100 * K + seed)
            G = g @ g.T
            assert_exact(G, min_norm_weights(G))


@pytest.mark.parametrize("kind", KINDS)
def test_exact_for_many_gradients(kind: str) -> None:
    for K in (64, 129, 256):
        g = hard_rows(kind, K, K)
        G = g @ g.T
        assert_exact(G, min_norm_weights(G))


@pytest.mark.parametrize("kind", KINDS)
def test_enumeration_and_pivoting_agree(kind: str) -> None:
    for K in (2, 4, 7):
        for seed in range(4):
            g = hard_rows(kind, K, 10 * K + seed)
            G = g @ g.T
            w = enumerate_supports(G)
            assert_exact(G, w)
            torch.testing.assert_close(w, min_norm_weights(G), rtol=0, atol=1e-9)


def test_hand_values() -> None:
    torch.testing.assert_close(min_norm_weights(gram([1, 0], [0, 1])), torch.tensor([0.5, 0.5]).double())
    # orthogonal gradients: weights proportional to 1 / |g|^2
    torch.testing.assert_close(min_norm_weights(gram([1, 0], [0, 2])), torch.tensor([0.8, 0.2]).double())
    # the shorter of two acute, nearly parallel gradients takes all
    torch.testing.assert_close(min_norm_weights(gram([1, 0], [3, 0.5])), torch.tensor([1.0, 0.0]).double())
    # opposite gradients cancel where |w_1 g_1| = |w_2 g_2|
    torch.testing.assert_close(min_norm_weights(gram([3, 0], [-1, 0])), torch.tensor([0.25, 0.75]).double())
    # three unit gradients at 120 degrees: 0 lies in the middle
    h = math.sqrt(3) / 2
    torch.testing.assert_close(min_norm_weights(gram([1, 0], [-0.5, h], [-0.5, -h])), torch.full((3,), 1 / 3).double())
    assert min_norm_weights(torch.tensor([[7.0]])).tolist() == [1.0]


def test_of_all_minimizers_the_shortest() -> None:
    # two opposite pairs: every (a, a, b, b) with a + b = 1/2 is a minimizer, the shortest is uniform
    G = gram([1, 0], [-1, 0], [0, 1], [0, -1])
    torch.testing.assert_close(min_norm_weights(G), torch.full((4,), 0.25).double())
    for K in (2, 5, 9, 20, 100):
        torch.testing.assert_close(min_norm_weights(torch.ones(K, K)), torch.full((K,), 1 / K))
    doubled = seeded(12, 40)[torch.arange(24) % 12]
    w = min_norm_weights(doubled @ doubled.T)
    torch.testing.assert_close(w[:12], w[12:], rtol=0, atol=1e-12)
    # a gradient and two copies of another: the copies share what it had alone
    alone, copies = min_norm_weights(gram([1, 0], [0, 2])), min_norm_weights(gram([1, 0], [0, 2], [0, 2]))
    torch.testing.assert_close(copies, torch.stack([alone[0], alone[1] / 2, alone[1] / 2]))


def test_zero_gradients_share_all_the_weight() -> None:
    assert min_norm_weights(gram([1, 0], [0, 0], [0, 1], [0, 0])).tolist() == [0, 0.5, 0, 0.5]
    for K in (3, 12):
        assert min_norm_weights(torch.zeros(K, K)).tolist() == pytest.approx([1 / K] * K)


@pytest.mark.parametrize("K", [3, 8, 11, 24])
def test_relabelling_relabels_the_weights(K: int) -> None:
    for kind in KINDS:
        g = hard_rows(kind, K, 7 * K)
        G = g @ g.T
        p = torch.randperm(K, generator=torch.Generator().manual_seed(K))
        torch.testing.assert_close(min_norm_weights(G[p][:, p]), min_norm_weights(G)[p], rtol=0, atol=1e-7)


def test_batch_is_a_loop_and_nan_stays_in_its_item() -> None:
    for K in (3, 10):
        G = torch.stack([hard_rows(kind, K, 3) @ hard_rows(kind, K, 3).T for kind in KINDS])
        G[4, 0, 1] = math.nan
        G[6, 2, 2] = math.inf
        w = min_norm_weights(G.reshape(13, 1, K, K))
        assert w.shape == (13, 1, K)
        assert w[[4, 6]].isnan().all()
        for i in set(range(13)) - {4, 6}:
            assert torch.equal(w[i, 0], min_norm_weights(G[i]))
    assert min_norm_weights(torch.zeros(0, 3, 3)).shape == (0, 3)


@pytest.mark.slow
def test_vmap_and_compile_without_reading_a_value() -> None:
    for K in (1, 3, 8):
        G = torch.stack([hard_rows(kind, K, 5) @ hard_rows(kind, K, 5).T for kind in KINDS])
        loop = torch.stack([min_norm_weights(item) for item in G])
        torch.testing.assert_close(torch.func.vmap(min_norm_weights)(G), loop, rtol=0, atol=1e-9)
        compiled = torch.compile(min_norm_weights, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(G), loop, rtol=0, atol=1e-9)
        assert min_norm_weights(G.to("meta")).shape == loop.shape
    with pytest.raises(ValueError, match=r"K <= 8 where values cannot be read .*, got K = 9"):
        torch.func.vmap(min_norm_weights)(torch.eye(9).expand(2, 9, 9))
    with pytest.raises(ValueError, match=r"inside torch.func"):
        torch.func.grad(lambda item: min_norm_weights(item).sum())(torch.eye(9))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_dtypes_are_solved_in_float64(dtype: torch.dtype) -> None:
    g = seeded(5, 20)
    G = (g @ g.T).to(dtype)
    w = min_norm_weights(G)
    assert w.dtype == dtype
    torch.testing.assert_close(w, min_norm_weights(G.double()).to(dtype), rtol=0, atol=0)


def test_float32_grams_of_low_rank_give_a_solution_to_float32_rounding() -> None:
    for K in (4, 8, 16, 40):
        for kind in KINDS:
            g = hard_rows(kind, K, 11 * K).float()
            G = g @ g.T  # not PSD beyond float32 rounding
            w = min_norm_weights(G).double()
            assert abs(float(w.sum()) - 1) < 1e-5
            bound = 1e-5 * (w @ G.double() @ w).abs() + 1e-5 * (G.double().abs() @ w).max()
            assert min_norm_gap(G.double(), w) <= bound


def test_floor() -> None:
    G = gram([1, 0, 0], [0, 10, 0], [0, 0, 10])
    torch.testing.assert_close(min_norm_weights(G, floor=0.2), torch.tensor([0.6, 0.2, 0.2]).double())
    torch.testing.assert_close(min_norm_weights(G, floor=1 / 3), torch.full((3,), 1 / 3).double())
    torch.testing.assert_close(min_norm_weights(G, floor=1e-9), min_norm_weights(G), rtol=0, atol=1e-8)
    for K in (2, 6, 12):  # optimal under the floor: no shift of weight between two rewards shortens the direction
        g = seeded(K, K + 2, seed=K)
        G, floor = g @ g.T, 0.5 / K
        w = min_norm_weights(G, floor=floor)
        assert (w >= floor - 1e-15).all()
        G_w = G @ w
        free = w > floor + 1e-9
        assert (G_w[free] <= G_w.min() + 1e-9).all()
    batched = torch.func.vmap(lambda item: min_norm_weights(item, floor=0.1))(G[None, :4, :4])
    torch.testing.assert_close(batched[0], min_norm_weights(G[:4, :4], floor=0.1))


def test_gap_is_a_certificate() -> None:
    G = gram([1, 0], [0, 1])
    assert float(min_norm_gap(G, torch.tensor([0.5, 0.5]).double())) == 0.0
    assert float(min_norm_gap(G, torch.tensor([1.0, 0.0]).double())) == 1.0
    g = seeded(6, 9)
    G, w = g @ g.T, torch.softmax(seeded(6, seed=1), 0)
    suboptimality = w @ G @ w - min_norm_weights(G) @ G @ min_norm_weights(G)
    assert 0 < suboptimality <= 2 * min_norm_gap(G, w)
    assert min_norm_gap(G.expand(4, 6, 6), w).shape == (4,)
    assert min_norm_gap(G.bfloat16(), w.bfloat16()).dtype == torch.bfloat16


def test_project_simplex() -> None:
    torch.testing.assert_close(project_simplex(torch.tensor([0.5, 2.0, 1.5])), torch.tensor([0.0, 0.75, 0.25]))
    inside = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    torch.testing.assert_close(project_simplex(inside), inside)
    torch.testing.assert_close(project_simplex(torch.full((4,), 1e8)), torch.full((4,), 0.25))
    x = 5 * seeded(50, 7)
    w = project_simplex(x)
    assert (w >= 0).all()
    torch.testing.assert_close(w.sum(-1), torch.ones(50).double())
    vertices = torch.eye(7).double()  # variational inequality: <x - w, v - w> <= 0 for every vertex v
    assert (torch.einsum("nk,vnk->vn", x - w, vertices[:, None] - w) <= 1e-12).all()
    torch.testing.assert_close(torch.func.vmap(project_simplex)(x), w)
    mixed = project_simplex(torch.tensor([[math.nan, 0.0], [1.0, 1.0], [math.inf, 0.0]]))
    assert mixed[[0, 2]].isnan().all()
    assert mixed[1].tolist() == [0.5, 0.5]
    assert project_simplex(torch.tensor([3.0, 1.0], dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: min_norm_weights(torch.ones(2, 3)),
            r"gram: expected a floating-point Gram matrix .* got float32\[2, 3\]",
        ),
        (lambda: min_norm_weights(torch.ones(2, 2, dtype=torch.int64)), r"gram: .* got int64\[2, 2\]"),
        (lambda: min_norm_weights(torch.ones(3)), "gram"),
        (lambda: min_norm_weights(torch.eye(2), floor=0.6), r"floor: expected a number in \[0, 0.5\], got float 0.6"),
        (lambda: min_norm_weights(torch.eye(2), floor=-0.1), "floor"),
        (lambda: min_norm_gap(torch.eye(2), torch.ones(3)), "w: expected K = 2 weights"),
        (lambda: project_simplex(torch.tensor([1, 2])), "x: expected a floating-point tensor"),
        (lambda: project_simplex(torch.zeros(2, 0)), "x: expected at least one entry"),
    ],
)
def test_bad_input_is_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
