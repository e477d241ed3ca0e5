"""How far each reward has come since the start, read off the images that training draws anyway."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from reference.config.settings import Config
from reference.interfaces import Scores
from reference.prompts.pool import Pool, all_prompts

_ROUNDING = 2.0**-20  # a spread below this share of the rewards themselves is float32's rounding, not a spread
_STEP = 0.1  # standard deviations by which a gain may change in an epoch, before anything is seen
_FIRST_EPOCHS = 10  # at most so many tell the spread of rewards at the start, the unit of gains
_EPOCHS = 64  # told apart at most; beyond that, old ones are joined in pairs
_RECENT = 32  # of them, the newest, which stay apart


class Progress(NamedTuple):
    """All groups of images so far, a group being the images of one prompt in one epoch, or in old ones joined.

    Attributes:
        epochs: so far.
        prompts: number of each prompt.
        prompt: ``[n]``, number of each group's prompt.
        epoch: ``[n]``, of each group; the first of those joined.
        mean: ``[n, K]``, mean rewards; NaN where they do not apply.
        images: ``[n, K]``, number of images behind each mean.
        squares: ``[K]``, sum of squared deviations within the groups of the first epochs.
        freedom: ``[K]``, their degrees of freedom.
    """

    epochs: int
    prompts: dict[str, int]
    prompt: Tensor
    epoch: Tensor
    mean: Tensor
    images: Tensor
    squares: Tensor
    freedom: Tensor


def init_progress(K: int) -> Progress:
    """Nothing known."""
    none, zero = torch.zeros(0, dtype=torch.int64), torch.zeros(K, dtype=torch.float64)
    return Progress(0, {}, none, none, zero.new_zeros(0, K), zero.new_zeros(0, K), zero, zero)


def update_progress(
    state: Progress, prompts: Sequence[str], scores: Scores, images: int, *, learning: bool
) -> Progress:
    """Add an epoch's images, one prompt's side by side.

    Args:
        images: of each prompt.
        learning: whether the spread within these groups still counts as that of the start.
    """
    K = scores.values.shape[1]
    x = torch.where(scores.applicable, scores.values, torch.nan).reshape(-1, images, K)
    mean, count = x.nanmean(1), (~x.isnan()).sum(1).double()
    known = dict(state.prompts)
    number = torch.tensor([known.setdefault(prompt, len(known)) for prompt in prompts[::images]])
    squares, freedom = state.squares, state.freedom
    if learning:
        squares = squares + (x - mean.unsqueeze(1)).square().nansum((0, 1))
        freedom = freedom + (count - 1).clamp(min=0).sum(0)
    longer = Progress(
        state.epochs + 1,
        known,
        torch.cat([state.prompt, number]),
        torch.cat([state.epoch, torch.full_like(number, state.epochs)]),
        torch.cat([state.mean, mean]),
        torch.cat([state.images, count]),
        squares,
        freedom,
    )
    return _joined(longer)


def learns_spread(epoch: int, pool: Pool, config: Config) -> bool:
    """Whether an epoch tells the spread of rewards at the start: once through the prompts, but not for long."""
    return epoch < min(math.ceil(len(all_prompts(pool)) / config.rollout.prompts_per_epoch), _FIRST_EPOCHS)


def _joined(state: Progress) -> Progress:
    """Old epochs in pairs once there are too many, so that memory and time stay bounded however long a run is."""
    labels = torch.unique(state.epoch)
    if len(labels) <= _EPOCHS:
        return state
    old = labels[1:-_RECENT]  # the first epoch, from which gains are counted, stays alone
    first = labels.clone()
    first[2 : 1 + len(old) : 2] = old[0 : len(old) - 1 : 2]
    epoch = first[torch.searchsorted(labels, state.epoch)]
    key, group = torch.unique(epoch * len(state.prompts) + state.prompt, return_inverse=True)
    keys = torch.stack([key // len(state.prompts), key % len(state.prompts)], 1)
    zeros = state.images.new_zeros(len(keys), state.images.shape[1])
    images = zeros.index_add(0, group, state.images)
    mean = zeros.index_add(0, group, (state.images * state.mean).nan_to_num(0.0)) / images
    return state._replace(epoch=keys[:, 0], prompt=keys[:, 1], images=images, mean=mean)


def gains_of(state: Progress) -> Tensor:
    """Gains since the first epoch ``[K]``, in standard deviations of each reward within a prompt's group at the start;
    NaN where nothing can be told.

    A group's mean is ``prompt + gain(epoch) + noise``: prompts differ, all gain alike, the gain is 0 in the first
    epoch and a random walk. The estimate is the Gaussian posterior mean (a Kalman smoother, or best linear unbiased
    prediction): groups of one prompt are compared with each other, new prompts with the mean prompt, each
    with its weight. Comparing with a prompt's first group alone would miss what had been gained before that group.
    """
    std = (state.squares / state.freedom).sqrt()
    first = torch.unique(state.epoch)
    epoch, end = torch.searchsorted(first, state.epoch), first.new_tensor([state.epochs])
    times = (first + torch.cat([first[1:], end]) - 1) / 2  # the middle of those joined
    found = []
    for k, unit in enumerate(std.tolist()):
        on = state.images[:, k] > 0
        y, v = state.mean[on, k] / unit, 1 / state.images[on, k]
        usable = bool(on.any()) and unit > _ROUNDING * float(state.mean[on, k].abs().max())
        found.append(last_gain(y, v, state.prompt[on], epoch[on], times)[0] if usable else torch.nan)
    return torch.tensor(found, dtype=torch.float64)


def last_gain(y: Tensor, v: Tensor, prompt: Tensor, epoch: Tensor, times: Tensor) -> tuple[float, float]:
    """Posterior mean and standard deviation of the gain in the last epoch.

    Args:
        y: ``[n]``, mean reward of each group.
        v: ``[n]``, variance of its noise.
        prompt: ``[n]``, numbers of prompts.
        epoch: ``[n]``, from 0 to ``T - 1``.
        times: ``[T]``, when each epoch was, in epochs.
    """
    epochs = len(times)
    if epochs == 1:
        return 0.0, 0.0
    between, w = _between_variance(y, v, epoch), 1 / v
    # Unknowns: the mean prompt, then the gains of epochs 1 to T - 1. Prompts are integrated out.
    X = torch.zeros(len(y), epochs, dtype=torch.float64)
    X[:, 0] = 1
    later = epoch > 0
    X[later, epoch[later]] = 1
    weighted = X * w.unsqueeze(1)
    P = int(prompt.max()) + 1
    total = torch.zeros(P, epochs, dtype=torch.float64).index_add_(0, prompt, weighted)
    seen = torch.zeros(P, dtype=torch.float64).index_add_(0, prompt, w * y)
    share = 1 / (1 / between + total[:, :1])
    information = X.mT @ weighted - total.mT @ (share * total)
    score = weighted.mT @ y - total.mT @ (share.squeeze(1) * seen)
    walk = torch.eye(epochs - 1, dtype=torch.float64)
    walk = walk - torch.diag(torch.ones(epochs - 2, dtype=torch.float64), -1)  # differences, the first from 0
    information[1:, 1:] += walk.mT @ (walk / times.diff().unsqueeze(1)) / _STEP**2
    covariance = torch.linalg.inv(information)
    return float(covariance[-1] @ score), float(covariance[-1, -1].clamp(min=0).sqrt())


def _between_variance(y: Tensor, v: Tensor, epoch: Tensor) -> float:
    """Variance between prompts, from the groups of the same epochs, by moments; 1 where each has but one."""
    T = int(epoch.max()) + 1
    count = torch.bincount(epoch, minlength=T).double()
    mean = torch.zeros(T, dtype=torch.float64).index_add_(0, epoch, y) / count.clamp(min=1)
    freedom = float((count - 1).clamp(min=0).sum())
    if freedom == 0:
        return 1.0
    return max(float((y - mean[epoch]).square().sum()) / freedom - float(v.mean()), 1e-3)
