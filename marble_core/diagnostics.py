"""What a run should log: how a direction agrees with each reward, on its own batch and on another, over a run."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from marble_core._check import describe, require, require_float, require_gram, require_range, require_vector

_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


class Alignment(NamedTuple):
    """Cosines of a direction with K gradients ``[..., K]``; their minimum, mean, variance; whether one is negative.

    The summaries are over the gradients of non-zero length; a zero gradient has cosine 0. ``conflict`` is bool.
    """

    cosines: Tensor
    minimum: Tensor
    mean: Tensor
    variance: Tensor
    conflict: Tensor


def alignment(gram: Tensor, weights: Tensor) -> Alignment:
    """Cosines of ``d = sum_k weights_k g_k`` with each gradient, from the Gram matrix alone.

    ``cos_k = (G w)_k / (|g_k| |d|)``. On the batch that produced the weights this is optimistic: K orthogonal noise
    vectors give a minimum of ``1/sqrt(K)`` (``null_alignment``). ``cross_alignment`` asks another batch.

    Args:
        gram: ``[..., K, K]``, of the raw gradients.
        weights: ``[..., K]``, for the raw gradients (``Harmonization.coefficients``), any sign, any sum.

    Returns:
        ``Alignment`` in the dtype of ``gram``; all cosines are 0 if ``d = 0``. The variance is that of the population.

    Raises:
        ValueError: ``gram`` is not square or ``weights`` does not have its K.

    Example:
        >>> alignment(torch.tensor([[1.0, -1.0], [-1.0, 4.0]]), torch.tensor([0.5, 0.5])).cosines
        tensor([0.0000, 0.8660])

    Reference: MARBLE (Zhao et al., arXiv 2605.06507), section 4 (harmony metrics).
    """
    require_gram("gram", gram)
    require_float("weights", weights, "[..., K]", range(1, 65))
    require(weights.shape[-1] == gram.shape[-1], "weights", f"K = {gram.shape[-1]} entries", describe(weights))
    G, w = gram.detach().double(), weights.detach().double()
    G_w = (G @ w.unsqueeze(-1)).squeeze(-1)
    d = (w * G_w).sum(-1, keepdim=True).clamp(min=0).sqrt()
    return _summarize(G_w, d, G.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt(), gram.dtype)


def cross_alignment(direction: Any, rows: Any) -> Alignment:
    """Cosines of a direction with the K gradients of *another* batch: the honest figure.

    Its expectation is ``<d, s_k> / (|d| E|g_k|)`` up to the spread of the norm: 0 for a direction that is noise, and
    small even for a perfect one where ``rows`` are mostly noise, since ``|g_k|`` includes it. Compare rules on the
    same rows.

    Args:
        direction: pytree like the parameters, or ``[P]``.
        rows: pytree with leaves ``[K, ...]`` of the same structure, or ``[K, P]``, from data that ``direction`` has
            not seen.

    Returns:
        ``Alignment`` with cosines ``[K]``, float64.

    Raises:
        ValueError: structures or shapes do not match.

    Example:
        >>> cross_alignment(torch.tensor([1.0, 0.0]), torch.tensor([[2.0, 0.0], [-1.0, 1.0]])).cosines
        tensor([ 1.0000, -0.7071], dtype=torch.float64)

    Reference: this project, docs/theory.md, section 12.
    """
    d_leaves, d_spec = pytree.tree_flatten(direction)
    leaves, spec = pytree.tree_flatten(rows)
    require(d_spec == spec, "direction", f"the structure of rows, {spec}", d_spec)
    require(len(leaves) > 0, "rows", "at least one leaf [K, ...]", "none")
    pairs = list(zip(d_leaves, leaves, strict=True))
    for d, x in pairs:
        require_float("rows", x, "[K, ...]", range(1, 65))
        require(d.shape == x.shape[1:], "direction", f"a leaf of shape {list(x.shape[1:])}", describe(d))
    zero = torch.zeros(leaves[0].shape[0], dtype=torch.float64, device=leaves[0].device)
    products = sum((x.detach().double().flatten(1) @ d.detach().double().flatten() for d, x in pairs), start=zero)
    squares = sum((x.detach().double().flatten(1).square().sum(-1) for _, x in pairs), start=zero)
    length = sum((d.detach().double().square().sum() for d, _ in pairs), start=zero[:1]).sqrt()
    return _summarize(products, length, squares.sqrt(), torch.float64)


def _summarize(products: Tensor, length: Tensor, norms: Tensor, dtype: torch.dtype) -> Alignment:
    """``Alignment`` from ``<d, g_k>``, ``|d| [..., 1]`` and ``|g_k|``; statistics over the gradients with length."""
    scale = norms * length
    cosines = torch.where(scale > 0, products / torch.where(scale > 0, scale, 1.0), 0.0)
    on = norms > 0
    n = on.sum(-1).clamp(min=1)
    minimum = torch.where(on, cosines, torch.inf).amin(-1)
    minimum = torch.where(on.any(-1), minimum, 0.0)
    mean = (cosines * on).sum(-1) / n
    variance = ((cosines - mean.unsqueeze(-1)).square() * on).sum(-1) / n
    conflict = minimum < 0
    return Alignment(cosines.to(dtype), minimum.to(dtype), mean.to(dtype), variance.to(dtype), conflict)


def null_alignment(K: int) -> float:
    """Same-batch minimum cosine that K orthogonal noise gradients reach for free: ``1/sqrt(K)``.

    Args:
        K: number of rewards, at least 1.

    Returns:
        A Python float, to be shown beside every same-batch minimum cosine.

    Raises:
        ValueError: ``K`` is not a positive integer.

    Example:
        >>> null_alignment(4)
        0.5

    Reference: this project, docs/theory.md, section 12.
    """
    require(isinstance(K, int) and K >= 1, "K", "a positive integer", describe(K))
    return 1.0 / math.sqrt(K)


class AlignmentStats(NamedTuple):
    """Counts over refreshes: what to log of a whole run without keeping it. All tensors; sums merge across ranks.

    Histograms have equal bins over [0, 1] (``|d|``, weights) and [-1, 1] (minimum cosine).
    """

    refreshes: Tensor
    direction_norm: Tensor
    min_cosine: Tensor
    weights: Tensor
    near_zero: Tensor
    conflicts: Tensor
    neglected_now: Tensor
    neglected_longest: Tensor


class AlignmentSummary(NamedTuple):
    """Quantiles ``[Q]`` (weights ``[K, Q]``) at ``levels [Q]``, rates with a 95 % interval, and neglected rewards."""

    refreshes: Tensor
    levels: Tensor
    direction_norm: Tensor
    min_cosine: Tensor
    weights: Tensor
    near_zero_fraction: Tensor
    conflict_rate: Tensor
    conflict_interval: Tensor
    neglected: Tensor


def init_alignment_stats(K: int, *, bins: int = 200, device: torch.device | str | None = None) -> AlignmentStats:
    """Empty statistics for K rewards.

    Args:
        K: number of rewards.
        bins: histogram bins; quantiles are exact to one bin (1/200 of the range).

    Returns:
        ``AlignmentStats`` of zeros (int64).

    Raises:
        ValueError: ``K`` or ``bins`` is not a positive integer.

    Example:
        >>> init_alignment_stats(3, bins=10).weights.shape
        torch.Size([3, 10])

    Reference: this project, docs/theory.md, section 13.
    """
    for name, value in (("K", K), ("bins", bins)):
        require(isinstance(value, int) and value >= 1, name, "a positive integer", describe(value))

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int64, device=device)

    return AlignmentStats(zeros(), zeros(bins), zeros(bins), zeros(K, bins), zeros(), zeros(), zeros(K), zeros(K))


def update_alignment_stats(
    stats: AlignmentStats,
    cosines: Tensor,
    weights: Tensor,
    direction_norm: Tensor,
    *,
    active: Tensor | None = None,
    near_zero: float = 1e-3,
    floor: float = 1e-3,
) -> AlignmentStats:
    """Add one refresh (or one step): its cosines, weights and ``|d|``.

    Values outside a histogram's range count in its end bins; a refresh with a NaN is not counted at all. A reward
    whose weight is below ``floor`` extends its run of neglect, any other ends it.

    Args:
        stats: from ``init_alignment_stats`` or the last update.
        cosines: ``[K]``; pass those of another batch (``cross_alignment``) to keep honest figures.
        weights: ``[K]``.
        direction_norm: ``[]``.
        active: ``[K]`` bool, whose cosines enter the minimum; None for all. With none active nothing is counted.
        near_zero: ``|d|`` below this counts as a near-zero solution.
        floor: weight below which a reward counts as neglected.

    Returns:
        ``AlignmentStats``.

    Raises:
        ValueError: shapes differ from the K of ``stats``, or a threshold is not in [0, 1].

    Example:
        >>> stats = update_alignment_stats(init_alignment_stats(2), torch.tensor([0.5, -0.1]),
        ...                                torch.tensor([0.9, 0.1]), torch.tensor(0.5))
        >>> stats.refreshes, stats.conflicts
        (tensor(1), tensor(1))

    Reference: this project, docs/theory.md, section 13.
    """
    K, bins = stats.weights.shape
    for name, x in (("cosines", cosines), ("weights", weights)):
        require_vector(name, x, K, "K")
    require_range("near_zero", near_zero, 0.0, 1.0)
    require_range("floor", floor, 0.0, 1.0)
    on = torch.ones_like(cosines, dtype=torch.bool) if active is None else active
    minimum = torch.where(on, cosines, torch.inf).amin()
    used = (minimum.isfinite() & weights.isfinite().all() & direction_norm.isfinite()).long()
    run = torch.where(weights < floor, stats.neglected_now + 1, 0)
    now = torch.where(used > 0, run, stats.neglected_now)
    return AlignmentStats(
        stats.refreshes + used,
        stats.direction_norm + used * _one_hot(direction_norm, bins),
        stats.min_cosine + used * _one_hot((minimum + 1) / 2, bins),
        stats.weights + used * _one_hot(weights, bins),
        stats.near_zero + used * (direction_norm < near_zero).long(),
        stats.conflicts + used * (minimum < 0).long(),
        now,
        torch.maximum(stats.neglected_longest, now),
    )


def _one_hot(x: Tensor, bins: int) -> Tensor:
    """Histogram of each entry alone, ``[..., bins]``, over [0, 1] with the ends open."""
    index = (torch.nan_to_num(x, 0.0, 1.0, 0.0).clamp(0, 1) * bins).long().clamp(max=bins - 1)
    return (index.unsqueeze(-1) == torch.arange(bins, device=x.device)).long()


def merge_alignment_stats(a: AlignmentStats, b: AlignmentStats) -> AlignmentStats:
    """Statistics of two disjoint sets of refreshes, as from two ranks or two parts of a run.

    Counts add up. A run of neglect is not joined across the border: the longer of the two is kept.

    Args:
        a: statistics of K rewards.
        b: of the same K and bins.

    Returns:
        ``AlignmentStats``.

    Raises:
        ValueError: different K or bins.

    Example:
        >>> merge_alignment_stats(init_alignment_stats(2), init_alignment_stats(2)).refreshes
        tensor(0)

    Reference: this project, docs/theory.md, section 13.
    """
    require(a.weights.shape == b.weights.shape, "b", f"histograms {list(a.weights.shape)}", describe(b.weights))
    sums = [x + y for x, y in zip(a[:6], b[:6], strict=True)]
    return AlignmentStats(*sums, *(torch.maximum(x, y) for x, y in zip(a[6:], b[6:], strict=True)))


def summarize_alignment_stats(
    stats: AlignmentStats, *, levels: tuple[float, ...] = _QUANTILES, neglect_after: int = 10
) -> AlignmentSummary:
    """Quantiles, rates and their intervals from the counts.

    Quantiles are the centres of histogram bins. The conflict rate has Wilson's 95 % interval, valid for independent
    refreshes (neighbouring ones are correlated, so it is the optimistic one). Without any refresh all floats are NaN.

    Args:
        stats: the counts.
        levels: quantile levels in [0, 1].
        neglect_after: a reward is ``neglected`` after a run of so many refreshes below the floor.

    Returns:
        ``AlignmentSummary``, floats in float64.

    Raises:
        ValueError: a level outside [0, 1], or ``neglect_after < 1``.

    Example:
        >>> stats = update_alignment_stats(init_alignment_stats(2), torch.tensor([0.5, -0.1]),
        ...                                torch.tensor([0.9, 0.1]), torch.tensor(0.5))
        >>> summarize_alignment_stats(stats).conflict_interval
        tensor([0.2065, 1.0000], dtype=torch.float64)

    Reference: Wilson (1927), Probable inference; docs/theory.md, section 13.
    """
    for level in levels:
        require_range("levels", level, 0.0, 1.0)
    require(isinstance(neglect_after, int) and neglect_after >= 1, "neglect_after", "an integer >= 1", neglect_after)
    q = torch.tensor(levels, dtype=torch.float64, device=stats.refreshes.device)
    n = torch.where(stats.refreshes > 0, stats.refreshes.double(), torch.nan)
    p, z = stats.conflicts / n, 1.959963984540054
    centre, half = p + z * z / (2 * n), z * (p * (1 - p) / n + (z / (2 * n)) ** 2).sqrt()
    interval = torch.stack([centre - half, centre + half]) / (1 + z * z / n)
    return AlignmentSummary(
        stats.refreshes.clone(),
        q,
        _quantiles(stats.direction_norm, q),
        2 * _quantiles(stats.min_cosine, q) - 1,
        _quantiles(stats.weights, q),
        stats.near_zero / n,
        p,
        interval.clamp(0, 1),
        stats.neglected_longest >= neglect_after,
    )


def _quantiles(histogram: Tensor, q: Tensor) -> Tensor:
    """Bin centres at which the cumulated share of ``[..., bins]`` first reaches ``q [Q]``: ``[..., Q]`` over [0, 1]."""
    bins = histogram.shape[-1]
    share = histogram.cumsum(-1).double() / histogram.sum(-1, keepdim=True)
    index = (share.unsqueeze(-2) < q.unsqueeze(-1) - 1e-12).sum(-1).clamp(max=bins - 1)
    empty = histogram.sum(-1, keepdim=True) == 0
    first = (histogram > 0).long().argmax(-1, keepdim=True)
    centre = (torch.maximum(index, first).double() + 0.5) / bins
    return torch.where(empty, torch.nan, centre)
