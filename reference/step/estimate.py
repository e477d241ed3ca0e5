"""What a rule is shown: estimates of the Gram matrix of the K signals, from gradients that are mostly noise."""

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
    update_gram_ema,
    update_moments,
)
from marble_core.rules import Evidence

Tree = dict[str, Tensor]
_SHARE_DECAY = 0.9  # of the averages behind signal shares: about 19 refreshes


class Estimate(NamedTuple):
    """Running estimates. Trees are empty where the rule has no use for them.

    Attributes:
        mean: moments of the gradients of the first halves.
        mean_b: of the second halves.
        cross: average cross-Gram of halves, unbiased.
        square: average of its squared entries.
        batch: average Gram of whole batches.
        overlap: ``[]``, sum of the squared weights of those averages.
    """

    mean: Moments
    mean_b: Moments
    cross: GramEma
    square: GramEma
    batch: GramEma
    overlap: Tensor


class Measured(NamedTuple):
    """What a refresh has found.

    Attributes:
        gram: ``[K, K]``, of this batch's gradients.
        cross: ``[K, K]``, average cross-Gram of halves: unbiased, not PSD.
        average: ``[K, K]``, average Gram of whole batches, noise included.
        error: ``[K]``, standard error of the diagonal of ``cross``, the estimate of ``|s_k|^2``.
    """

    gram: Tensor
    cross: Tensor
    average: Tensor
    error: Tensor


def init_estimate(K: int, memory: float | None, trained: Mapping[str, Tensor]) -> Estimate:
    """Nothing seen; room for the moments where they are remembered."""
    mean = mean_b = Moments({}, torch.zeros(K, dtype=torch.float64))
    if memory is not None:
        zeros = {name: p.new_zeros((K, *p.shape)).detach() for name, p in trained.items()}
        mean, mean_b = init_moments(zeros), init_moments(zeros)
    cross, square, batch = (init_gram_ema(K) for _ in range(3))
    return Estimate(mean, mean_b, cross, square, batch, torch.zeros((), dtype=torch.float64))


def observe(
    state: Estimate, a: Tree, b: Tree, shared: Tree | None, memory: float | None
) -> tuple[Estimate, Measured, Evidence]:
    """Update the estimates with the gradients of a refresh.

    Args:
        a: ``h_k`` of the first half of the rows, as means over that half.
        b: of the second half.
        shared: gradient of the shared part, to balance full gradients; None to balance the signal's.
        memory: decay of the moments, whose Gram matrices are then the evidence; None for the batch's.
    """
    whole = {name: (a[name] + b[name]) / 2 for name in a}
    if shared is not None:
        whole = {name: x + shared[name] for name, x in whole.items()}
    # K x K numbers live on the host, where they are solved
    halves, gram = cross_gram(a, b).cpu(), gram_matrix(whole).cpu()
    state, measured = _averaged(state, (halves + halves.mT) / 2, gram)
    certainty = measured.cross.diagonal() / measured.error
    if memory is None:  # the shared part is in both halves: their cross-Gram is not free of bias
        return state, measured, Evidence(gram, None if shared is not None else halves, certainty=certainty)
    mean, m_a = update_moments(state.mean, a, decay=memory)
    mean_b, m_b = update_moments(state.mean_b, b, decay=memory)
    evidence = Evidence(measured.average, cross_gram(m_a, m_b).cpu(), certainty=certainty)
    return state._replace(mean=mean, mean_b=mean_b), measured, evidence


def _averaged(state: Estimate, halves: Tensor, gram: Tensor) -> tuple[Estimate, Measured]:
    """Running averages, and the standard error of the signals from the scatter of the cross-Gram over refreshes."""
    cross, C = update_gram_ema(state.cross, halves, decay=_SHARE_DECAY)
    square, C2 = update_gram_ema(state.square, halves.square(), decay=_SHARE_DECAY)
    batch, G = update_gram_ema(state.batch, gram, decay=_SHARE_DECAY)
    overlap = _SHARE_DECAY**2 * state.overlap + (1 - _SHARE_DECAY) ** 2
    q = overlap / cross.weight.square()  # 1 / number of independent refreshes in the average
    variance = (C2 - C.square()).diagonal().clamp(min=0) * q / torch.where(q < 1, 1 - q, torch.nan)
    state = state._replace(cross=cross, square=square, batch=batch, overlap=overlap)
    return state, Measured(gram, C, G, variance.sqrt())
