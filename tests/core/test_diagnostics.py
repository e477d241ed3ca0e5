"""Alignment on the same and on another batch, and the statistics of a run."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from marble_core import (
    AlignmentStats,
    alignment,
    cross_alignment,
    gram_matrix,
    harmonize,
    init_alignment_stats,
    merge_alignment_stats,
    null_alignment,
    summarize_alignment_stats,
    update_alignment_stats,
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


def fill(cosines: Tensor, weights: Tensor, norms: Tensor) -> AlignmentStats:
    stats = init_alignment_stats(cosines.shape[1])
    for c, w, n in zip(cosines, weights, norms, strict=True):
        stats = update_alignment_stats(stats, c, w, n)
    return stats


def draws(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    cosines = 2 * torch.rand(count, 3, generator=generator, dtype=torch.float64) - 1
    weights = torch.rand(count, 3, generator=generator, dtype=torch.float64).softmax(1)
    return cosines, weights, torch.rand(count, generator=generator, dtype=torch.float64)


def test_statistics_of_a_run() -> None:
    cosines, weights, norms = draws(500, 0)
    stats = fill(cosines, weights, norms)
    summary = summarize_alignment_stats(stats)
    levels = summary.levels
    minimum = cosines.amin(1)
    for found, values, width in (
        (summary.direction_norm, norms, 1 / 200),
        (summary.min_cosine, minimum, 2 / 200),
        (summary.weights[1], weights[:, 1], 1 / 200),
    ):
        expected = torch.quantile(values, levels, interpolation="lower")
        torch.testing.assert_close(found, expected, rtol=0, atol=width / 2)
    conflicts = (minimum < 0).double().mean()
    torch.testing.assert_close(summary.conflict_rate, conflicts)
    assert summary.conflict_interval[0] < conflicts < summary.conflict_interval[1]
    torch.testing.assert_close(summary.near_zero_fraction, (norms < 1e-3).double().mean())
    assert summary.refreshes == 500


def test_wilson_interval_by_hand() -> None:
    cosines = torch.tensor([[0.5]] * 8 + [[-0.5]] * 2)
    stats = fill(cosines, torch.ones(10, 1), torch.ones(10))
    low, high = summarize_alignment_stats(stats).conflict_interval.tolist()
    assert (low, high) == pytest.approx((0.0567, 0.5098), abs=1e-4)  # 2 of 10


def test_merging_parts_is_counting_them_all() -> None:
    whole, first, second = (
        fill(*draws(60, 1)),
        fill(*(x[:25] for x in draws(60, 1))),
        fill(*(x[25:] for x in draws(60, 1))),
    )
    for x, y in zip(merge_alignment_stats(first, second)[:6], whole[:6], strict=True):
        assert torch.equal(x, y)
    assert torch.equal(merge_alignment_stats(second, first).weights, whole.weights)


def test_neglect_is_a_run_of_small_weights() -> None:
    stats = init_alignment_stats(2)
    for weight in [0.0] * 4 + [0.5] + [0.0] * 3:
        w = torch.tensor([weight, 1 - weight])
        stats = update_alignment_stats(stats, torch.ones(2), w, torch.tensor(1.0), floor=0.01)
    assert stats.neglected_now.tolist() == [3, 0]
    assert stats.neglected_longest.tolist() == [4, 0]
    assert summarize_alignment_stats(stats, neglect_after=4).neglected.tolist() == [True, False]
    assert summarize_alignment_stats(stats, neglect_after=5).neglected.tolist() == [False, False]


def test_what_is_not_counted() -> None:
    empty = init_alignment_stats(2)
    w, n = torch.tensor([0.5, 0.5]), torch.tensor(0.5)
    for cosines, weights, norm in (
        (torch.tensor([math.nan, 1.0]), w, n),
        (torch.ones(2), torch.tensor([math.nan, 1.0]), n),
        (torch.ones(2), w, torch.tensor(math.inf)),
    ):
        assert not any(x.any() for x in update_alignment_stats(empty, cosines, weights, norm))
    none = update_alignment_stats(empty, torch.ones(2), w, n, active=torch.tensor([False, False]))
    assert none.refreshes == 0
    one = update_alignment_stats(empty, torch.tensor([-1.0, 0.5]), w, n, active=torch.tensor([False, True]))
    assert one.refreshes == 1
    assert one.conflicts == 0
    outside = update_alignment_stats(empty, torch.tensor([-2.0, 3.0]), torch.tensor([-1.0, 2.0]), torch.tensor(7.0))
    assert outside.direction_norm[-1] == outside.min_cosine[0] == outside.weights[0, 0] == outside.weights[1, -1] == 1
    summary = summarize_alignment_stats(empty)
    assert summary.conflict_rate.isnan()
    assert summary.direction_norm.isnan().all()
    assert summary.conflict_interval.isnan().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: alignment(torch.eye(2), torch.ones(3)), "weights: expected K = 2 entries"),
        (lambda: cross_alignment(torch.ones(3), torch.ones(2, 4)), r"direction: expected a leaf of shape \[4\]"),
        (lambda: cross_alignment({"a": torch.ones(3)}, torch.ones(2, 3)), "direction: expected the structure of rows"),
        (lambda: cross_alignment([], []), "rows: expected at least one leaf"),
        (lambda: null_alignment(0), "K: expected a positive integer"),
        (lambda: init_alignment_stats(2, bins=0), "bins: expected a positive integer"),
        (
            lambda: update_alignment_stats(init_alignment_stats(2), torch.ones(3), torch.ones(2), torch.tensor(1.0)),
            r"cosines: expected .* \[K\] = \[2\], got float32\[3\]",
        ),
        (lambda: merge_alignment_stats(init_alignment_stats(2), init_alignment_stats(3)), "b: expected histograms"),
        (lambda: summarize_alignment_stats(init_alignment_stats(2), levels=(2.0,)), "levels: expected a number"),
        (lambda: summarize_alignment_stats(init_alignment_stats(2), neglect_after=0), "neglect_after"),
    ],
)
def test_bad_input_is_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
