"""What a run should log: how a direction agrees with each reward, on its own batch and on another, over a run."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from marble_core._check import LOWERED, describe, require, require_float, require_gram


class Alignment(NamedTuple):
    """Cosines of a direction with K gradients ``[..., K]``; their minimum, mean, variance; whether one is negative.

    The summaries are over the gradients of non-zero length; a zero gradient has cosine 0. ``conflict`` (bool) says that
    a cosine is below -1e-6, as rounding alone may put one just below 0. NaN in the direction or in a gradient makes the
    cosine NaN, and with it the summaries; it is no conflict by itself.
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
        NaN anywhere in an item's Gram matrix or weights makes all its cosines NaN, as it does ``combine_rows``.

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
    G = gram.detach().double()
    w = weights.detach().to(G)
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
        require_float("direction", d, "[...]", range(65))
        require(d.shape == x.shape[1:], "direction", f"a leaf of shape {list(x.shape[1:])}", describe(d))
        K = leaves[0].shape[0]
        require(x.shape[0] == K >= 1, "rows", f"the same K >= 1 in every leaf, {K} in the first", describe(x))
    zero = torch.zeros(leaves[0].shape[0], dtype=torch.float64, device=leaves[0].device)
    products = sum((x.detach().double().flatten(1) @ d.detach().double().flatten() for d, x in pairs), start=zero)
    squares = sum((x.detach().double().flatten(1).square().sum(-1) for _, x in pairs), start=zero)
    length = sum((d.detach().double().square().sum() for d, _ in pairs), start=zero[:1]).sqrt()
    return _summarize(products, length, squares.sqrt(), torch.float64)


def _summarize(products: Tensor, length: Tensor, norms: Tensor, dtype: torch.dtype) -> Alignment:
    """``Alignment`` from ``<d, g_k>``, ``|d| [..., 1]`` and ``|g_k|``; statistics over the gradients with length."""
    scale = norms * length
    cosines = torch.where(scale == 0, 0.0 * products, products / scale)  # a product, so that a NaN is not hidden
    on = norms != 0
    n = on.sum(-1).clamp(min=1)
    minimum = torch.where(on, cosines, torch.inf).amin(-1)
    minimum = torch.where(on.any(-1), minimum, 0.0)
    mean = (cosines * on).sum(-1) / n
    variance = ((cosines - mean.unsqueeze(-1)).square() * on).sum(-1) / n
    conflict = (cosines < LOWERED).any(-1)
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
