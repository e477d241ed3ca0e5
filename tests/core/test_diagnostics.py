"""Alignment on the same and on another batch, and the statistics of a run."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from marble_core import (
    alignment,
    cone_weights,
    cross_alignment,
    gram_matrix,
    harmonize,
    null_alignment,
)


def test_alignment_by_hand() -> None:
    # d = g_1 + g_2 = (0.4, 0.8) of length sqrt(0.8); g_3 = 0
    rows = torch.tensor([[1.0, 0.0], [-0.6, 0.8], [0.0, 0.0]], dtype=torch.float64)
    a = alignment(gram_matrix(rows), torch.ones(3))
    cosines = [0.4 / math.sqrt(0.8), 0.4 / math.sqrt(0.8), 0.0]
    assert a.cosines.tolist() == pytest.approx(cosines)
    assert a.minimum.item() == pytest.approx(cosines[0])  # the zero gradient does not count
    assert a.mean.item() == pytest.approx(cosines[0])
    assert a.variance.item() == pytest.approx(0)
    assert not a.conflict
    sum_ = alignment(torch.tensor([[100.0, -6.0], [-6.0, 1.0]]), torch.ones(2))
    assert sum_.conflict
    assert sum_.variance.item() == pytest.approx(((sum_.cosines[0] - sum_.cosines[1]) / 2).item() ** 2, rel=1e-5)
    nothing = alignment(torch.zeros(2, 2), torch.ones(2))
    assert [x.item() for x in nothing[1:]] == [0, 0, 0, False]
    assert alignment(torch.eye(2).expand(3, 2, 2), torch.ones(3, 2)).cosines.shape == (3, 2)


def test_alignment_of_the_coefficients_is_that_of_the_harmonization() -> None:
    g = torch.randn(4, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * torch.tensor(
        [[1e3], [1], [1e-3], [1]]
    )
    h = harmonize(gram_matrix(g))
    torch.testing.assert_close(alignment(gram_matrix(g), h.coefficients).cosines, h.cosines)
    torch.testing.assert_close(alignment(gram_matrix(g), h.coefficients).minimum, h.direction_norm)


def test_cross_alignment_by_hand_and_on_trees() -> None:
    d = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([[4.0]])}
    rows = {"a": torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]]), "b": torch.tensor([[[0.0]], [[0.0]], [[-2.0]]])}
    a = cross_alignment(d, rows)
    assert a.cosines.tolist() == pytest.approx([0.6, 0.0, -0.8])
    assert a.minimum.item() == pytest.approx(-0.8)
    assert a.conflict
    zero = cross_alignment(torch.zeros(2), torch.ones(2, 2))
    assert zero.cosines.tolist() == [0, 0]
    assert null_alignment(9) == pytest.approx(1 / 3)


def test_rounding_is_no_conflict() -> None:
    """The cone's direction has cosines of 0 with those it was turned for, to rounding on either side."""
    smallest = []
    for seed in range(50):
        gram = gram_matrix(torch.randn(4, 6, generator=torch.Generator().manual_seed(seed)))
        a = alignment(gram, cone_weights(gram, torch.full((4,), 0.25)))
        assert not a.conflict, seed
        smallest.append(float(a.minimum))
    assert -1e-12 < min(smallest) < 0
    for cosine, conflict in ((-2e-6, True), (-5e-7, False), (5e-7, False)):
        gram = torch.tensor([[1.0, cosine], [cosine, 1.0]], dtype=torch.float64)
        assert bool(alignment(gram, torch.tensor([1.0, 0.0])).conflict) == conflict


def test_nan_is_not_hidden() -> None:
    """A cosine of 0 means that a gradient or the direction is 0."""
    rows = torch.tensor([[1.0, 0.0], [-0.6, 0.8], [math.nan, 0.0], [0.0, 0.0]])
    for found in (
        alignment(gram_matrix(rows), torch.tensor([1.0, 0.0, 0.0, 0.0])),
        alignment(torch.eye(4), torch.tensor([math.nan, 1.0, 0.0, 0.0])),
    ):
        assert all(x.isnan().all() for x in found[:4])
        assert not found.conflict
    fresh = cross_alignment(torch.tensor([1.0, 0.0]), rows)
    torch.testing.assert_close(fresh.cosines, torch.tensor([1.0, -0.6, math.nan, 0.0]).double(), equal_nan=True)
    assert all(x.isnan() for x in fresh[1:4])
    assert fresh.conflict  # of the second one
    assert not cross_alignment(torch.tensor([1.0, 0.0]), rows[[0, 2, 3]]).conflict
    assert cross_alignment(torch.tensor([math.nan, 0.0]), rows).cosines[:3].isnan().all()
    broken = torch.stack([torch.eye(2), torch.full((2, 2), math.nan)])
    assert alignment(broken, torch.ones(2)).minimum.isnan().tolist() == [False, True]


def test_weights_may_be_on_another_device() -> None:
    """As for ``combine_rows``: K numbers follow the matrix."""
    assert alignment(torch.eye(2, device="meta"), torch.ones(2)).cosines.is_meta


def draws(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    cosines = 2 * torch.rand(count, 3, generator=generator, dtype=torch.float64) - 1
    weights = torch.rand(count, 3, generator=generator, dtype=torch.float64).softmax(1)
    return cosines, weights, torch.rand(count, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: alignment(torch.eye(2), torch.ones(3)), "weights: expected K = 2 entries"),
        (lambda: cross_alignment(torch.ones(3), torch.ones(2, 4)), r"direction: expected a leaf of shape \[4\]"),
        (lambda: cross_alignment({"a": torch.ones(3)}, torch.ones(2, 3)), "direction: expected the structure of rows"),
        (lambda: cross_alignment([], []), "rows: expected at least one leaf"),
        (lambda: cross_alignment({"w": None}, {"w": torch.ones(2, 3)}), "direction: expected a floating-point tensor"),
        (lambda: null_alignment(0), "K: expected a positive integer"),
    ],
)
def test_bad_input_is_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
