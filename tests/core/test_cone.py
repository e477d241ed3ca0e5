"""The cone module: hand values, degenerate cases, transforms, errors."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from marble_core import cone_weights

EPS = torch.finfo(torch.float64).eps
exact = partial(cone_weights, precision=2.0**-53)  # for float64 rows


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def gram(*rows: list[float]) -> Tensor:
    g = torch.tensor(rows, dtype=torch.float64)
    return g @ g.T


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_certified(G: Tensor, prior: Tensor, c: Tensor, tol: float = 32 * EPS) -> None:
    """``<d, g_k> >= 0``, equality where c is not the prior, to what rounding of the Gram leaves."""
    s = G.diagonal().clamp(min=0).sqrt()
    bound = tol * s * (s * c).sum()
    G_c = G @ c
    assert (c >= prior).all()
    assert (G_c >= -bound).all()
    assert (G_c.abs() <= bound)[c > prior].all()


def test_no_conflict_keeps_the_prior_to_the_bit() -> None:
    prior = double(0.1, 0.7)
    assert torch.equal(exact(gram([1, 0], [0, 5]), prior), prior)
    assert torch.equal(exact(gram([1, 0], [1, 1e-9]), prior), prior)
    prior = double(0.7, 0.1)  # these two conflict, but v lowers neither
    assert torch.equal(exact(gram([1, 0], [-1, 8]), prior), prior)
    assert torch.equal(exact(torch.zeros(2, 2), prior.float()), prior.float())
    assert exact(torch.tensor([[7.0]]), torch.tensor([0.3])).tolist() == torch.tensor([0.3]).tolist()
    assert exact(gram([1, 0], [-1, 0]), double(0, 0)).tolist() == [0, 0]
    for K in (3, 12, 40):  # orthogonal up to the rounding of a rotation: what the Gram shows is not a conflict
        Q = torch.linalg.qr(seeded(K, K)).Q * 10.0 ** (16 * torch.arange(K) / K - 8).unsqueeze(-1)
        prior = seeded(K, seed=1).abs()
        assert torch.equal(exact(Q @ Q.T, prior), prior)


def test_two_opposite_gradients() -> None:
    # v = 3 e - 1 e points along the longer one: d = 0, by more of the shorter one
    G = gram([3, 0], [-1, 0])
    torch.testing.assert_close(exact(G, double(1, 1)), double(1, 3))
    assert (G @ exact(G, double(1, 1)) == 0).all()
    # together already 0: nothing is lowered
    assert exact(G, double(1, 3)).tolist() == [1, 3]


def test_one_conflict_is_the_closed_form_of_gem() -> None:
    for seed in range(20):
        g, h = seeded(2, 5, seed=seed)
        d = exact(gram(g.tolist(), h.tolist()), double(1, 0)) @ torch.stack([g, h])
        torch.testing.assert_close(d, g - min(0.0, float(g @ h)) / (h @ h) * h, rtol=1e-13, atol=1e-13)
    # v = g_1 + g_2 + g_3 = (3, 1, 0) lowers only g_3 = (-1, 2, 0): d = v + (1/5) g_3
    G = gram([3, 0, 0], [1, -1, 0], [-1, 2, 0])
    torch.testing.assert_close(exact(G, double(1, 1, 1)), double(1, 1, 1.2))


def test_two_constraints_at_once() -> None:
    # v = (0, 0, 1) lowers a = (1, 0, -1) and b = (0, 1, -1). d is orthogonal to both: along (1, 1, 1), d = (1, 1, 1)/3.
    # Repairing one conflict after the other would end elsewhere: nu = 1/2 each.
    G = gram([0, 0, 1], [1, 0, -1], [0, 1, -1])
    torch.testing.assert_close(exact(G, double(1, 0, 0)), double(1, 1 / 3, 1 / 3))
    # here b's conflict is repaired on the way: v = (0, 1), a = (1, -1), b = (3, -1), d = (1, 1)/2 from a alone
    G = gram([0, 1], [1, -1], [3, -1])
    torch.testing.assert_close(exact(G, double(1, 0, 0)), double(1, 0.5, 0))


def test_equal_gradients_share_the_correction() -> None:
    for copies in (1, 2, 7, 20):
        G = gram([1, 0], *[[-1.0, 1.0]] * copies)
        c = exact(G, torch.cat([double(1), torch.zeros(copies).double()]))
        torch.testing.assert_close(c, torch.cat([double(1), torch.full((copies,), 0.5 / copies).double()]))
    # copies of other lengths share by length: nu_k |g_k| is equal
    c = exact(gram([1, 0], [-1, 1], [-1e6, 1e6]), double(1, 0, 0))
    torch.testing.assert_close(c, double(1, 0.25, 0.25e-6))


def test_zero_gradients_keep_their_prior_and_change_nothing() -> None:
    prior = double(1, 0.3, 0.5, 0)
    c = exact(gram([1, 0], [0, 0], [-0.5, 0.1], [0, 0]), prior)
    torch.testing.assert_close(c[[0, 2]], exact(gram([1, 0], [-0.5, 0.1]), prior[[0, 2]]))
    assert torch.equal(c[[1, 3]], prior[[1, 3]])


def test_stationary_gives_coefficients_of_zero() -> None:
    h = math.sqrt(3) / 2
    G = gram([1, 0], [-0.5, h], [-0.5, -h])
    torch.testing.assert_close(exact(G, double(1, 0, 0)), double(1, 1, 1))
    for K in (4, 9, 30):
        g = seeded(K, K // 3, seed=K)  # many more gradients than dimensions: no direction is left
        prior = seeded(K, seed=1).abs()
        c = exact(g @ g.T, prior)
        assert_certified(g @ g.T, prior, c)
        assert (c @ g).norm() <= 1e-12 * (c * g.norm(dim=1)).sum()


@pytest.mark.parametrize("K", [2, 5, 8, 9, 20, 64])
def test_certificate_up_to_many_gradients_of_all_lengths(K: int) -> None:
    for seed in range(5):
        g = seeded(K, 2 * K, seed=seed) * 10.0 ** (16 * torch.linspace(0, 1, K).unsqueeze(-1) - 8)
        prior = seeded(K, seed=seed + 9).abs()
        c = exact(g @ g.T, prior)
        assert_certified(g @ g.T, prior, c)
        assert (c @ g).norm() <= (prior @ g).norm()


def test_the_scale_of_the_gram_and_of_the_prior() -> None:
    g, prior = seeded(6, 5), seeded(6, seed=1).abs()
    G = g @ g.T
    c = exact(G, prior)
    assert not torch.equal(c, prior)
    assert torch.equal(exact(4.0**20 * G, prior), c)
    assert torch.equal(exact(G, prior / 8), c / 8)
    torch.testing.assert_close(exact(1e-9 * G, 3 * prior), 3 * c, rtol=1e-10, atol=0)


def test_batch_is_a_loop_nan_stays_in_its_item_and_dimensions_broadcast() -> None:
    for K in (3, 10):
        g = seeded(5, K, K)
        G, prior = g @ g.mT, seeded(5, K, seed=1).abs()
        loop = torch.stack([exact(*item) for item in zip(G, prior, strict=True)])
        assert torch.equal(exact(G, prior), loop)
        G[1, 0, 1], G[3, 2, 2] = math.nan, math.inf
        poisoned = exact(G.reshape(5, 1, K, K), prior.reshape(5, 1, K))
        assert poisoned.shape == (5, 1, K)
        assert poisoned[[1, 3]].isnan().all()
        assert torch.equal(poisoned[[0, 2, 4], 0], loop[[0, 2, 4]])
        assert torch.equal(exact(G, prior[0])[2], exact(G[2], prior[0]))
        assert torch.equal(exact(G[2], prior)[4], exact(G[2], prior[4]))
        assert exact(G[:, None], prior[:3]).shape == (5, 3, K)
    assert exact(torch.zeros(0, 3, 3), torch.ones(3)).shape == (0, 3)


@pytest.mark.slow
def test_vmap_and_compile_without_reading_a_value() -> None:
    for K in (1, 3, 8):
        g = seeded(6, K, max(1, K - 2))
        g[0], g[1] = 0.0, g[1, :1]
        G, prior = g @ g.mT, seeded(K, seed=1).abs()
        loop = exact(G, prior)
        blind = torch.func.vmap(exact, in_dims=(0, None))
        torch.testing.assert_close(blind(G, prior), loop, rtol=1e-9, atol=1e-9)
        compiled = torch.compile(exact, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(G, prior), loop, rtol=1e-9, atol=1e-9)
        assert exact(G.to("meta"), prior.to("meta")).shape == loop.shape
    with pytest.raises(ValueError, match=r"K <= 8 where values cannot be read .*, got K = 9. Call it outside"):
        torch.func.vmap(exact, in_dims=(0, None))(torch.eye(9).expand(2, 9, 9), torch.ones(9))
    with pytest.raises(ValueError, match=r"inside torch.func"):
        torch.func.grad(lambda item: exact(item, torch.ones(9)).sum())(torch.eye(9))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_dtypes_are_solved_in_float64(dtype: torch.dtype) -> None:
    g, prior = seeded(5, 5), seeded(5, seed=1).abs()
    G = (g @ g.T).to(dtype)
    c = exact(G, prior)
    assert c.dtype == dtype
    assert torch.equal(c, exact(G.double(), prior).to(dtype))


def test_grams_that_are_not_psd_are_solved_as_their_psd_part() -> None:
    for K in (5, 8, 20):
        g = seeded(K, 2, seed=K).float()
        G, prior = (g @ g.T).double(), seeded(K, seed=1).abs()
        assert torch.linalg.eigvalsh((G + G.T) / 2)[0] < -1e-9
        c = exact(G, prior)
        assert_certified(G, prior, c, tol=1e-6)
        assert c.sum() <= 1e3 * prior.sum()  # without it the coefficients grow by up to 1e9
    # an inner product beyond Cauchy and Schwarz: the nearest possible are opposite gradients, and d = 0
    c = exact(torch.tensor([[1.0, -1.1], [-1.1, 1.0]]), torch.tensor([1.0, 0.5]))
    torch.testing.assert_close(c, torch.tensor([1.0, 1.0]))


def test_inputs_are_unmutated_and_no_gradient_flows() -> None:
    g, prior = seeded(4, 3), seeded(4, seed=1).abs()
    G = (g @ g.T).requires_grad_()
    copies = G.detach().clone(), prior.clone()
    assert not exact(G, prior.requires_grad_()).requires_grad
    assert torch.equal(G, copies[0])
    assert torch.equal(prior, copies[1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: exact(torch.ones(2, 3), torch.ones(2)),
            r"gram: expected a floating-point Gram matrix .* got float32\[2, 3\]",
        ),
        (lambda: exact(torch.ones(2, 2).long(), torch.ones(2)), r"gram: .* got int64\[2, 2\]"),
        (lambda: exact(torch.eye(2), torch.tensor([1, 2])), "prior: expected a floating-point tensor"),
        (
            lambda: exact(torch.eye(2), torch.ones(3)),
            r"prior: expected K = 2 entries, one a reward, got float32",
        ),
        (lambda: exact(torch.eye(2), torch.tensor([1.0, -0.5])), r"got \[1.0, -0.5\]. 0 is a reward"),
        (lambda: exact(torch.eye(2), torch.tensor([1.0, math.nan])), "prior: expected finite entries"),
        (lambda: exact(torch.eye(2), torch.tensor([1.0, math.inf])), "prior: expected finite entries"),
    ],
)
def test_bad_input_is_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
