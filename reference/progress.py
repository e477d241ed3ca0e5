"""How far each reward has come since the start, read off the images that training draws anyway."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from reference.scoring import Scores

_DECAY = 0.8  # of older epochs' gains: the mean looks back about five epochs


class Progress(NamedTuple):
    """Running gains of K rewards in units of their standard deviation within a prompt's group at the start.

    Attributes:
        first: mean rewards ``[K]`` of each prompt's first group, of the first epochs; NaN where they do not apply.
        squares: ``[K]``, sum of squared deviations within those groups.
        freedom: ``[K]``, their degrees of freedom.
        total: ``[K]``, discounted sum of gains.
        weight: ``[K]``, discounted number of groups behind it.
    """

    first: dict[str, Tensor]
    squares: Tensor
    freedom: Tensor
    total: Tensor
    weight: Tensor


def init_progress(K: int) -> Progress:
    """Nothing known."""
    zero = torch.zeros(K, dtype=torch.float64)
    return Progress({}, zero, zero, zero, zero)


def update_progress(
    state: Progress, prompts: Sequence[str], scores: Scores, images: int, *, learning: bool
) -> Progress:
    """Add an epoch's images, one prompt's side by side.

    In the first epochs (``learning``) a prompt's first group becomes its baseline. From then on every group gives one
    gain for each reward: its mean minus the prompt's baseline, or minus the mean baseline for a prompt without one.
    The noise of a gain is that of two means over a group, whatever the number of parameters; it does not enter through
    gradients.

    Args:
        images: of each prompt.
        learning: whether baselines are still collected.
    """
    K = scores.values.shape[1]
    x = torch.where(scores.applicable, scores.values, torch.nan).reshape(-1, images, K)
    means = x.nanmean(1)
    first, squares, freedom = dict(state.first), state.squares, state.freedom
    gains = []
    common = torch.stack([*first.values()]).nanmean(0) if first else means.nanmean(0)
    for p, prompt in enumerate(prompts[::images]):
        if prompt in first or not learning:
            gains.append(means[p] - first.get(prompt, common))
        else:
            first[prompt] = means[p]
            squares = squares + (x[p] - means[p]).square().nansum(0)
            freedom = freedom + (scores.applicable[p * images : (p + 1) * images].sum(0) - 1).clamp(min=0)
    total, weight = _DECAY * state.total, _DECAY * state.weight
    if gains:
        std = (squares / freedom).sqrt()
        found = torch.stack(gains) / torch.where(std > 0, std, torch.nan)
        total, weight = total + found.nansum(0), weight + (~found.isnan()).sum(0)
    return Progress(first, squares, freedom, total, weight)


def gains_of(state: Progress) -> Tensor:
    """Gains ``[K]``, NaN where nothing is known yet."""
    return torch.where(state.weight > 0, state.total / state.weight, torch.nan)
