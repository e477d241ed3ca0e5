"""Alignment on the same and on another batch, and the statistics of a run."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from marble_core import (
    alignment,
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
        (lambda: null_alignment(0), "K: expected a positive integer"),
    ],
)
def test_bad_input_is_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
