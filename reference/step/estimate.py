"""What a solver is shown: estimates of the Gram matrix of the K signals, from gradients that are mostly noise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from marble_core import (
    GramEma,
    Moments,
    cross_gram,
    gram_matrix,
    init_gram_ema,
    init_moments,
    psd_part,
    shrink_gram,
    signal_gram,
    update_gram_ema,
    update_moments,
)
from reference.config.settings import Rule

Tree = dict[str, Tensor]
_SHARE_DECAY = 0.9  # of the averages behind signal shares: about 19 refreshes


class Estimate(NamedTuple):
    """Running estimates. Trees are empty where the rule has no use for them.

    Attributes:
        gram: average of Gram or cross-Gram matrices.
        mean: moments of the gradients, or of those of the first halves.
        mean_b: of the second halves.
        last: gradients of the refresh before.
        cross: average cross-Gram of halves, unbiased.
        square: average of its squared entries.
        batch: average Gram of whole batches.
        overlap: ``[]``, sum of the squared weights of those averages.
    """

    gram: GramEma
    mean: Moments
    mean_b: Moments
    last: Tree
    cross: GramEma
    square: GramEma
    batch: GramEma
    overlap: Tensor


class Signal(NamedTuple):
    """What is known at a refresh.

    Attributes:
        gram: ``[K, K]``, for the solver.
        square: ``[K]``, estimate of ``|s_k|^2``.
        error: ``[K]``, its standard error.
        share: ``[K]``, its share of the squared norm of a batch's gradient.
        share_error: ``[K]``, the standard error of that.
        rows: the moments, where the step follows them.
        noise: ``[K, K]``, average Gram of whole batches, noise included.
        cross: ``[K, K]``, average cross-Gram of halves: unbiased, not PSD.
    """

    gram: Tensor
    square: Tensor
    error: Tensor
    share: Tensor
    share_error: Tensor
    rows: Tree | None
    noise: Tensor
    cross: Tensor


def init_estimate(K: int, rule: Rule, trained: Mapping[str, Tensor]) -> Estimate:
    """Nothing seen; room for what the rule keeps."""
    zeros = {name: p.new_zeros((K, *p.shape)).detach() for name, p in trained.items()}
    nothing = Moments({}, torch.zeros(K, dtype=torch.float64))
    both = rule.gram == "moment_halves"
    mean = init_moments(zeros) if both or rule.gram == "moments" or rule.step == "moments" else nothing
    return Estimate(
        gram=init_gram_ema(K),
        mean=mean,
        mean_b=init_moments(zeros) if both else nothing,
        last=zeros if rule.gram == "consecutive" else {},
        cross=init_gram_ema(K),
        square=init_gram_ema(K),
        batch=init_gram_ema(K),
        overlap=torch.zeros((), dtype=torch.float64),
    )


def observe(
    state: Estimate, a: Tree, b: Tree, shared: Tree | None, rule: Rule, metric: Tree | None
) -> tuple[Estimate, Signal]:
    """Update the estimates with the gradients of a refresh.

    Args:
        a: ``h_k`` of the first half of the rows, as means over that half.
        b: of the second half.
        shared: gradient of the shared part, to balance full gradients; None to balance the signal's.
        metric: diagonal of the optimiser's inverse metric, or None.
    """
    whole = {name: (a[name] + b[name]) / 2 for name in a}
    if shared is not None:
        whole = {name: x + shared[name] for name, x in whole.items()}
    # K x K numbers live on the host, where they are solved
    halves, batch = cross_gram(_weighted(a, metric), b).cpu(), gram_matrix(whole, inv_metric=metric).cpu()
    state, signal = _shares(state, (halves + halves.mT) / 2, batch)
    fit = shrunk if rule.solver == "noise-aware" else psd_part
    rows = whole
    if rule.gram == "moment_halves":
        mean, m_a = update_moments(state.mean, a, decay=rule.decay)
        mean_b, m_b = update_moments(state.mean_b, b, decay=rule.decay)
        state, gram = state._replace(mean=mean, mean_b=mean_b), fit(cross_gram(_weighted(m_a, metric), m_b).cpu())
        rows = {name: (m_a[name] + m_b[name]) / 2 for name in a}
    elif rule.gram == "moments" or rule.step == "moments":
        mean, rows = update_moments(state.mean, whole, decay=rule.decay)
        state = state._replace(mean=mean)
    if rule.gram == "moments":
        gram = gram_matrix(rows, inv_metric=metric).cpu()
    elif rule.gram != "moment_halves":
        state, gram = _averaged(state, whole, halves, batch, rule, metric)
        gram = gram if rule.gram == "batch" else fit(gram)
    return state, signal._replace(gram=gram, rows=rows if rule.step == "moments" else None)


def _averaged(
    state: Estimate, whole: Tree, halves: Tensor, batch: Tensor, rule: Rule, metric: Tree | None
) -> tuple[Estimate, Tensor]:
    """Running average of a Gram or cross-Gram matrix."""
    new = batch if rule.gram == "batch" else halves
    if rule.gram == "consecutive":
        seen = any(bool(x.any()) for x in state.last.values())
        new = cross_gram(_weighted(whole, metric), state.last).cpu() if seen else batch
        state = state._replace(last=whole)
        if not seen:
            return state, new
    average, gram = update_gram_ema(state.gram, new, decay=rule.decay)
    return state._replace(gram=average), gram


def shrunk(cross: Tensor) -> Tensor:
    """Signals' Gram from a cross-Gram, with as much of it as is noise taken out."""
    return shrink_gram(signal_gram(cross))[0]


def _shares(state: Estimate, halves: Tensor, whole: Tensor) -> tuple[Estimate, Signal]:
    """Running signal shares with their standard errors, from the scatter of the cross-Gram over refreshes."""
    cross, C = update_gram_ema(state.cross, halves, decay=_SHARE_DECAY)
    square, C2 = update_gram_ema(state.square, halves.square(), decay=_SHARE_DECAY)
    batch, G = update_gram_ema(state.batch, whole, decay=_SHARE_DECAY)
    overlap = _SHARE_DECAY**2 * state.overlap + (1 - _SHARE_DECAY) ** 2
    q = overlap / cross.weight.square()  # 1 / number of independent refreshes in the average
    variance = (C2 - C.square()).diagonal().clamp(min=0) * q / torch.where(q < 1, 1 - q, torch.nan)
    norm2 = torch.where(G.diagonal() > 0, G.diagonal(), torch.nan)
    s2, error = C.diagonal().clone(), variance.sqrt()
    state = state._replace(cross=cross, square=square, batch=batch, overlap=overlap)
    return state, Signal(C, s2, error, s2 / norm2, error / norm2, None, G, C)


def _weighted(rows: Tree, metric: Tree | None) -> Tree:
    """Rows times the inverse metric, for the left side of an inner product."""
    return rows if metric is None else {name: x * metric[name] for name, x in rows.items()}
