"""Tools against noise (this project's own, docs/theory.md, section 12): running Grams and moments, signal shares."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from marble_core._check import (
    common_K,
    describe,
    require,
    require_bool,
    require_float,
    require_gram,
    require_range,
    require_same_shape,
    require_same_trees,
    wide,
)

_AGREE = 8.0  # roundings that a product of two norms may be off by


class GramEma(NamedTuple):
    """Running average of Gram matrices: ``value [K, K]`` and the total ``weight []`` that went into it, 0 to 1."""

    value: Tensor
    weight: Tensor


def init_gram_ema(K: int, *, dtype: torch.dtype = torch.float64, device: torch.device | str | None = None) -> GramEma:
    """An empty average of ``[K, K]`` matrices.

    Args:
        K: number of rewards, at least 1.

    Returns:
        A state of zeros.

    Raises:
        ValueError: ``K`` is not a positive integer.

    Example:
        >>> init_gram_ema(2).weight
        tensor(0., dtype=torch.float64)

    Reference: this project, docs/theory.md, section 12.
    """
    require(isinstance(K, int) and K >= 1, "K", "a positive integer", describe(K))
    return GramEma(torch.zeros(K, K, dtype=dtype, device=device), torch.zeros((), dtype=dtype, device=device))


def update_gram_ema(state: GramEma, gram: Tensor, *, decay: float) -> tuple[GramEma, Tensor]:
    """One step of ``value <- decay value + (1 - decay) gram``, and the average corrected for the empty start.

    Averaging the *matrix* of unbiased estimates lowers their noise and keeps them unbiased; averaging the *weights*
    solved from biased ones keeps the bias.

    Args:
        state: from ``init_gram_ema`` or the last update.
        gram: ``[K, K]``, a Gram or cross-Gram matrix.
        decay: in [0, 1): 0 keeps the newest alone; at 0.95 the mean age of what is averaged is 19 steps.

    Returns:
        ``(state, corrected [K, K])`` in the dtype of the state; after one update ``corrected`` equals ``gram``.

    Raises:
        ValueError: shapes differ, or ``decay`` is not in [0, 1).

    Example:
        >>> state, G = update_gram_ema(init_gram_ema(1), torch.tensor([[4.0]]), decay=0.9)
        >>> G
        tensor([[4.]], dtype=torch.float64)

    Reference: this project, docs/theory.md, section 12; bias correction: Adam (Kingma and Ba, 2015).
    """
    require_gram("gram", gram)
    require_gram("state.value", state.value)
    require_float("state.weight", state.weight, "[]", (0,))
    require_same_shape("gram", gram, "state.value", state.value)
    require_range("decay", decay, 0.0, 1.0, open_high=True)
    value = decay * state.value + (1.0 - decay) * gram.detach().to(state.value.dtype)
    weight = decay * state.weight + (1.0 - decay)
    return GramEma(value, weight), value / weight


class Moments(NamedTuple):
    """Running means of K gradients: a pytree with leaves ``[K, ...]``, and the weight ``[K]`` that each one holds."""

    mean: Any
    weight: Tensor


def init_moments(rows: Any) -> Moments:
    """Empty moments shaped like ``rows``, in float32 at least (an average kept in half precision stalls).

    Args:
        rows: pytree with leaves ``[K, ...]``; K x P numbers are kept.

    Returns:
        ``Moments`` of zeros.

    Raises:
        ValueError: no leaves, leaves that are not floating point, or no common K; a list of vectors, which could be K
            gradients or blocks.

    Example:
        >>> init_moments({"w": torch.ones(2, 3)}).weight
        tensor([0., 0.], dtype=torch.float64)

    Reference: MoCo (Fernando et al., ICLR 2023); docs/theory.md, section 12.
    """
    K, device = common_K(rows), pytree.tree_leaves(rows)[0].device
    mean = pytree.tree_map(lambda x: torch.zeros_like(x, dtype=wide(x.dtype), requires_grad=False), rows)
    return Moments(mean, torch.zeros(K, dtype=torch.float64, device=device))


def update_moments(state: Moments, rows: Any, *, decay: float, active: Tensor | None = None) -> tuple[Moments, Any]:
    """One step of ``m_k <- decay m_k + (1 - decay) g_k``, and the means corrected for the empty start.

    In the long run the mean of independent gradients has ``(1 + decay) / (1 - decay)`` times less noise power than one
    of them (39 times at 0.95), at the price of some staleness: its mean age is ``decay / (1 - decay)`` updates. Its
    Gram matrix is what a solver should see where single batches are mostly noise. Where ``active`` is false the moment
    of that reward is left as it is: no applicable image is no news, not a zero gradient. A reward that never was
    active has corrected mean 0.

    Args:
        state: from ``init_moments`` or the last update.
        rows: pytree with leaves ``[K, ...]`` like that of the state.
        decay: in [0, 1).
        active: ``[K]`` bool, or None for all.

    Returns:
        ``(state, corrected)``, ``corrected`` a pytree in the dtype of the state.

    Raises:
        ValueError: structures or shapes differ, or ``decay`` is not in [0, 1).

    Example:
        >>> rows = {"w": torch.tensor([[2.0], [4.0]])}
        >>> update_moments(init_moments(rows), rows, decay=0.5)[1]["w"].T
        tensor([[2., 4.]])

    Reference: MoCo (Fernando et al., ICLR 2023); docs/theory.md, section 12.
    """
    require_range("decay", decay, 0.0, 1.0, open_high=True)
    require_same_trees("rows", rows, "state.mean", state.mean)
    require_float("state.weight", state.weight, "[K]", (1,))
    for x in (*pytree.tree_leaves(rows), *pytree.tree_leaves(state.mean)):
        require_float("rows", x, "[K, ...]", range(1, 65))
        K = state.weight.shape[0]
        require(x.shape[0] == K, "rows", f"leaves [K, ...] with the state's K = {K}", describe(x))
    if active is not None:
        require_bool("active", active, state.weight.shape, "[K]")
    keep = torch.full_like(state.weight, decay)
    keep = keep if active is None else torch.where(active, keep, 1.0)
    weight = keep * state.weight + (1.0 - keep)

    def step(m: Tensor, g: Tensor) -> Tensor:
        c = keep.to(m.dtype).reshape(-1, *[1] * (m.ndim - 1))
        return torch.where(c < 1, c * m + (1.0 - c) * g.detach().to(m.dtype), m)

    def correct(m: Tensor) -> Tensor:
        return m / torch.where(weight > 0, weight, 1.0).to(m.dtype).reshape(-1, *[1] * (m.ndim - 1))

    mean = pytree.tree_map(step, state.mean, rows)
    return Moments(mean, weight), pytree.tree_map(correct, mean)


class SignalShare(NamedTuple):
    """Share of each squared gradient norm that is signal ``[K]``, and its standard error ``[K]``."""

    share: Tensor
    standard_error: Tensor


def signal_share(cross: Tensor, gram: Tensor) -> Tensor | SignalShare:
    """Share of each squared gradient norm that is signal: ``|s_k|^2 / (|s_k|^2 + E|n_k|^2)``.

    ``E[C_kk] = |s_k|^2`` for the cross-Gram of two independent batches and ``E[G_kk] = |s_k|^2 + E|n_k|^2``, so the
    share is the ratio of their means. It is an estimate: noise alone gives values on both sides of 0, and none is
    clipped. A reward with zero gradients has share 0; NaN stays NaN. The standard error is that of a ratio of means,
    from the residuals ``C_kk - share G_kk`` of the M pairs; the pairs must not share batches.

    Args:
        cross: ``[K, K]``, or ``[M, K, K]`` from M independent pairs of batches.
        gram: the same shape: Gram matrices of batches of the same size (best the mean over the two of a pair).

    Returns:
        ``[K]`` for one pair; ``SignalShare(share [K], standard_error [K])`` for M pairs (NaN errors if M = 1).

    Raises:
        ValueError: shapes differ or are neither ``[K, K]`` nor ``[M, K, K]``.

    Example:
        >>> signal_share(torch.diag(torch.tensor([1.0, 0.0])), torch.diag(torch.tensor([4.0, 2.0])))
        tensor([0.2500, 0.0000])

    Reference: this project, docs/theory.md, section 12.
    """
    require_gram("gram", gram)
    require_same_shape("cross", cross, "gram", gram)
    require(gram.ndim in (2, 3), "gram", "[K, K] or [M, K, K]", describe(gram))
    C = cross.double().diagonal(dim1=-2, dim2=-1)
    G = gram.double().diagonal(dim1=-2, dim2=-1)
    if gram.ndim == 2:
        return (C / torch.where(G <= 0, torch.inf, G)).to(gram.dtype)
    mean = G.mean(0)
    mean = torch.where(mean <= 0, torch.inf, mean)
    share = C.mean(0) / mean
    M = gram.shape[0]
    variance = (C - share * G).square().sum(0) / (M - 1 if M > 1 else torch.nan)
    return SignalShare(share.to(gram.dtype), ((variance / M).sqrt() / mean).to(gram.dtype))


def gradient_snr(cross: Tensor, norms_a: Tensor, norms_b: Tensor) -> Tensor:
    """Signal-to-noise power of each reward's gradient, ``|s_k|^2 / E|n_k|^2``, from two batches of one size.

    With ``C_kk = <a_k, b_k>`` it is ``C_kk / (|a_k| |b_k| - C_kk)``, in float64. Below 0 where the two batches disagree
    (noise alone gives values around 0); infinite where they agree to 8 roundings of the coarsest dtype given, beyond
    which a difference means nothing; 0 for a reward with zero gradients. NaN stays in its own entry.

    Args:
        cross: ``[..., K, K]``, ``cross_gram`` of the two batches.
        norms_a: ``[..., K]``, gradient norms of the first batch.
        norms_b: ``[..., K]``, of the second.

    Returns:
        ``[..., K]`` in the dtype of ``cross``.

    Raises:
        ValueError: ``cross`` is not square or the norms do not match it.

    Example:
        >>> gradient_snr(torch.diag(torch.tensor([2.0, 0.0])), torch.tensor([2.0, 1.0]), torch.tensor([2.0, 1.0]))
        tensor([1., 0.])

    Reference: this project, docs/theory.md, section 12.
    """
    require_gram("cross", cross)
    C = cross.double().diagonal(dim1=-2, dim2=-1)
    for name, x in (("norms_a", norms_a), ("norms_b", norms_b)):
        require_float(name, x, "[..., K]", range(1, 65))
        require_same_shape(name, x, "the diagonal of cross", C)
    eps = max(torch.finfo(x.dtype).eps for x in (cross, norms_a, norms_b))
    product = norms_a.double() * norms_b.double()
    ratio = torch.where((1.0 - _AGREE * eps) * product <= C, torch.inf, C / (product - C))
    return torch.where(product == 0, 0.0 * C, ratio).to(cross.dtype)
