"""Gram matrices: additive over blocks, PSD from any dtype, and their cross and projected forms."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from marble_core import cross_gram, flatten_rows, gram_matrix, normalize_gram, psd_part
from property_tests.strategies import gradient_matrices, randn


@given(st.integers(1, 6), st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(0, 1000))
def test_blocks_add_up_in_every_form(K: int, sizes: list[int], seed: int) -> None:
    blocks = [randn(K, size, seed=seed + i) for i, size in enumerate(sizes)]
    G = sum((gram_matrix(block) for block in blocks), start=torch.zeros(K, K).double())
    whole = torch.cat(blocks, 1)
    for rows in (whole, blocks, {"x": blocks}, iter(blocks), ({"x": block} for block in blocks)):
        torch.testing.assert_close(gram_matrix(rows), G, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gram_matrix(flatten_rows(blocks)), whole @ whole.T, rtol=1e-12, atol=1e-12)
    metric = [randn(size, seed=seed + 9).exp() for size in sizes]
    torch.testing.assert_close(
        gram_matrix(iter(blocks), inv_metric=iter(metric)),
        (whole * torch.cat(metric)) @ whole.T,
        rtol=1e-12,
        atol=1e-12,
    )


@given(gradient_matrices(max_K=6), st.integers(0, 1000))
def test_the_gram_of_a_sum_of_batches_has_cross_terms(g: Tensor, seed: int) -> None:
    other = float(g.abs().max()) * randn(*g.shape, seed=seed)
    C, parts = cross_gram(g, other), gram_matrix(g) + gram_matrix(other)
    scale = float(parts.diagonal().max())
    torch.testing.assert_close(gram_matrix(g + other), parts + C + C.T, rtol=1e-12, atol=1e-12 * scale)
    assert not g.any() or not torch.allclose(gram_matrix(g + other), parts, rtol=0, atol=1e-6 * scale)


@given(gradient_matrices(), st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
def test_narrow_rows_keep_a_psd_gram(g: Tensor, dtype: torch.dtype) -> None:
    G = gram_matrix((g / g.abs().max().clamp(min=1e-300)).to(dtype))
    assert torch.equal(G, G.T)
    assert torch.linalg.eigvalsh(G).min() >= -1e-6 * G.trace()


@given(gradient_matrices())
def test_normalized(g: Tensor) -> None:
    G_hat, norms = normalize_gram(gram_matrix(g))
    torch.testing.assert_close(norms, g.norm(dim=1), rtol=1e-12, atol=0)
    on = norms > 0
    assert (G_hat.diagonal()[on] == 1).all()
    assert not G_hat[~on].any()
    assert not G_hat[:, ~on].any()
    unit = g[on] / g[on].norm(dim=1, keepdim=True)
    torch.testing.assert_close(G_hat[on][:, on], unit @ unit.T, rtol=0, atol=1e-12)


@given(gradient_matrices(max_K=8), st.integers(0, 1000))
def test_cross_gram_and_psd_part(g: Tensor, seed: int) -> None:
    scale = float(g.abs().max()) ** 2 + 1e-300
    torch.testing.assert_close(cross_gram(g, g), gram_matrix(g), rtol=1e-12, atol=1e-12 * scale)
    other = randn(*g.shape, seed=seed)
    C = cross_gram(g, other)
    torch.testing.assert_close(C, g @ other.T, rtol=1e-12, atol=1e-12 * scale)
    projected = psd_part(C)
    assert torch.equal(projected, projected.T)
    size = float(C.norm()) + 1e-300
    assert torch.linalg.eigvalsh(projected).min() >= -1e-12 * size
    torch.testing.assert_close(psd_part(projected), projected, rtol=0, atol=1e-12 * size)
    symmetric = (C + C.T) / 2
    for i in range(5):  # nearest: no other PSD matrix is closer
        v = randn(len(C), len(C), seed=seed + i) * size**0.5 / len(C)
        assert (projected - symmetric).norm() <= (v @ v.T - symmetric).norm() + 1e-12 * size
        mixed = 0.9 * projected + 0.1 * v @ v.T
        assert (projected - symmetric).norm() <= (mixed - symmetric).norm() + 1e-12 * size
