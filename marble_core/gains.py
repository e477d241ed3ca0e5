"""How far each reward has come since the start, read off the images that training draws anyway."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from marble_core._check import describe, require, require_float, require_labels

_ROUNDING = 2.0**-20  # a spread below this share of the rewards themselves is float32's rounding, not a spread
_STEP = 0.1  # standard deviations by which a gain may change in an epoch, before anything is seen
_EPOCHS = 64  # told apart at most; beyond that, old ones are joined in pairs
_RECENT = 32  # of them, the newest, which stay apart


class GainState(NamedTuple):
    """All groups of images so far, a group being the images of one prompt in one epoch, or in old ones joined.

    Attributes:
        epochs: so far.
        prompt: ``[n]``, label of each group's prompt.
        epoch: ``[n]``, of each group; the first of those joined.
        mean: ``[n, K]``, mean rewards; NaN where they do not apply, or where a reward was NaN.
        images: ``[n, K]``, number of images behind each mean.
        squares: ``[K]``, sum of squared deviations within the groups of the first epochs.
        freedom: ``[K]``, their degrees of freedom.
    """

    epochs: int
    prompt: Tensor
    epoch: Tensor
    mean: Tensor
    images: Tensor
    squares: Tensor
    freedom: Tensor


def init_gains(num_rewards: int) -> GainState:
    """Make a state that has seen nothing, in float64 on the CPU: its few numbers are looked at on the host.

    Args:
        num_rewards: K.

    Returns:
        The state before the first epoch.

    Raises:
        ValueError: ``num_rewards`` is no positive integer.

    Example:
        >>> init_gains(3).mean.shape
        torch.Size([0, 3])

    Reference: docs/design/0003-noise.md.
    """
    ok = isinstance(num_rewards, int) and not isinstance(num_rewards, bool) and num_rewards >= 1
    require(ok, "num_rewards", "an integer of at least 1", describe(num_rewards))
    none = torch.zeros(0, dtype=torch.int64, device="cpu")
    zero = torch.zeros(num_rewards, dtype=torch.float64, device="cpu")
    return GainState(0, none, none, zero.new_zeros(0, num_rewards), zero.new_zeros(0, num_rewards), zero, zero)


def update_gains(
    state: GainState, rewards: Tensor, groups: Tensor, *, applicable: Tensor | None = None, learning: bool = True
) -> GainState:
    """Add an epoch's images to what is known.

    A reward that is NaN or infinite makes that reward's gains NaN from then on, however old its epoch gets: say with
    ``applicable`` where a reward is not known.

    Args:
        state: of the epochs before, which is left as it is.
        rewards: ``[N, K]``, raw rewards, one row an image.
        groups: ``[N]``, integers of any size: the same prompt has the same label in every epoch.
        applicable: ``[N, K]``, bool; where a reward is defined. Everywhere by default.
        learning: True in the first few epochs. The spread within the groups of those epochs becomes the unit in which
            gains are measured.

    Returns:
        The state after the epoch; memory stays bounded, as old epochs are joined.

    Raises:
        ValueError: a shape or a dtype is wrong.

    Example:
        >>> state = init_gains(1)
        >>> for epoch in range(8):
        ...     rewards = torch.tensor([[0.0], [2.0]]) + 0.5 * epoch
        ...     state = update_gains(state, rewards, torch.tensor([3, 3]), learning=epoch < 2)
        >>> gains_since_start(state)
        tensor([0.2629], dtype=torch.float64)

    Reference: docs/design/0003-noise.md.
    """
    K = _check_state(state)
    on = require_labels(groups, rewards, applicable).cpu()
    require(rewards.shape[1] == K, "rewards", f"K = {K} columns, as the state has", describe(rewards))
    x = rewards.detach().double().cpu()
    label, group = torch.unique(groups.detach().long().cpu(), return_inverse=True)
    zeros = x.new_zeros(len(label), K)
    count = zeros.index_add(0, group, on.double())
    mean = zeros.index_add(0, group, torch.where(on, x, 0.0)) / count
    squares, freedom = state.squares.clone(), state.freedom.clone()
    if learning:
        squares = squares + torch.where(on, x - mean[group], 0.0).square().sum(0)
        freedom = freedom + (count - 1).clamp(min=0).sum(0)
    longer = GainState(
        state.epochs + 1,
        torch.cat([state.prompt, label]),
        torch.cat([state.epoch, torch.full_like(label, state.epochs)]),
        torch.cat([state.mean, mean]),
        torch.cat([state.images, count]),
        squares,
        freedom,
    )
    return _joined(longer)


def _check_state(state: GainState) -> int:
    """K, if everything in the state fits together."""
    require(isinstance(state, GainState), "state", "a GainState", describe(state))
    require_float("state.squares", state.squares, "[K]", (1,))
    n, K = state.prompt.shape[0] if state.prompt.ndim == 1 else -1, state.squares.shape[0]
    shapes = {"prompt": (n,), "epoch": (n,), "mean": (n, K), "images": (n, K), "freedom": (K,)}
    for name, shape in shapes.items():
        x = getattr(state, name)
        kind = torch.int64 if name in ("prompt", "epoch") else torch.float64
        fits = x.shape == shape and x.dtype == kind
        require(fits, f"state.{name}", f"{str(kind)[6:]}{list(shape)}, as the rest of the state", describe(x))
    return K


def _joined(state: GainState) -> GainState:
    """Old epochs in pairs once there are too many, so that memory and time stay bounded however long a run is."""
    labels = torch.unique(state.epoch)
    if len(labels) <= _EPOCHS:
        return state
    old = labels[1:-_RECENT]  # the first epoch, from which gains are counted, stays alone
    first = labels.clone()
    first[2 : 1 + len(old) : 2] = old[0 : len(old) - 1 : 2]
    epoch = first[torch.searchsorted(labels, state.epoch)]
    prompts, place = torch.unique(state.prompt, return_inverse=True)  # labels may be hashes, too large for a product
    P = len(prompts)
    key, group = torch.unique(epoch * P + place, return_inverse=True)
    zeros = state.images.new_zeros(len(key), state.images.shape[1])
    images = zeros.index_add(0, group, state.images)
    total = torch.where(state.images > 0, state.images * state.mean, 0.0)  # the mean of no image is NaN
    mean = zeros.index_add(0, group, total) / images
    return state._replace(epoch=key // P, prompt=prompts[key % P], images=images, mean=mean)


def gains_since_start(state: GainState) -> Tensor:
    """Estimate gains since the first epoch, in standard deviations of each reward within a prompt's group at the start.

    A group's mean is ``prompt + gain(epoch) + noise``: prompts differ, all gain alike, the gain is 0 in the first
    epoch and a random walk. The estimate is the Gaussian posterior mean (a Kalman smoother, or best linear unbiased
    prediction): groups of one prompt are compared with each other, new prompts with the mean prompt, each
    with its weight. Comparing with a prompt's first group alone would miss what had been gained before that group.

    Args:
        state: of all epochs so far.

    Returns:
        ``[K]``, float64; NaN where nothing can be told: a reward that never applied, or never varied.

    Raises:
        ValueError: ``state`` does not fit together.

    Example:
        >>> gains_since_start(init_gains(2))
        tensor([nan, nan], dtype=torch.float64)

    Reference: docs/design/0003-noise.md.
    """
    _check_state(state)
    std = (state.squares / state.freedom).sqrt()
    first = torch.unique(state.epoch)
    epoch, end = torch.searchsorted(first, state.epoch), first.new_tensor([state.epochs])
    times = (first + torch.cat([first[1:], end]) - 1) / 2 if len(first) else first  # the middle of those joined
    found = []
    for k, unit in enumerate(std.tolist()):
        on = state.images[:, k] > 0
        y, v = state.mean[on, k] / unit, 1 / state.images[on, k]
        usable = bool(on.any()) and unit > _ROUNDING * float(state.mean[on, k].abs().max())
        found.append(_last_gain(y, v, state.prompt[on], epoch[on], times)[0] if usable else torch.nan)
    return torch.tensor(found, dtype=torch.float64, device="cpu")


def _last_gain(y: Tensor, v: Tensor, prompt: Tensor, epoch: Tensor, times: Tensor) -> tuple[float, float]:
    """Posterior mean and standard deviation of the gain in the last epoch.

    Args:
        y: ``[n]``, mean reward of each group.
        v: ``[n]``, variance of its noise.
        prompt: ``[n]``, labels of prompts.
        epoch: ``[n]``, from 0 to ``T - 1``.
        times: ``[T]``, when each epoch was, in epochs.
    """
    epochs = len(times)
    if epochs == 1:
        return 0.0, 0.0
    between, w = _between_variance(y, v, epoch), 1 / v
    # Unknowns: the mean prompt, then the gains of epochs 1 to T - 1. Prompts are integrated out.
    X = y.new_zeros(len(y), epochs)
    X[:, 0] = 1
    later = epoch > 0
    X[later, epoch[later]] = 1
    weighted = X * w.unsqueeze(1)
    _, place = torch.unique(prompt, return_inverse=True)
    P = int(place.max()) + 1
    total = y.new_zeros(P, epochs).index_add_(0, place, weighted)
    seen = y.new_zeros(P).index_add_(0, place, w * y)
    share = 1 / (1 / between + total[:, :1])
    information = X.mT @ weighted - total.mT @ (share * total)
    score = weighted.mT @ y - total.mT @ (share.squeeze(1) * seen)
    walk = torch.eye(epochs - 1, dtype=y.dtype, device=y.device)
    walk = walk - torch.diag(y.new_ones(epochs - 2), -1)  # differences, the first from 0
    information[1:, 1:] += walk.mT @ (walk / times.diff().unsqueeze(1)) / _STEP**2
    covariance = torch.linalg.inv(information)
    return float(covariance[-1] @ score), float(covariance[-1, -1].clamp(min=0).sqrt())


def _between_variance(y: Tensor, v: Tensor, epoch: Tensor) -> float:
    """Variance between prompts, from the groups of the same epochs, by moments; 1 where each has but one."""
    T = int(epoch.max()) + 1
    count = torch.bincount(epoch, minlength=T).double()
    mean = y.new_zeros(T).index_add_(0, epoch, y) / count.clamp(min=1)
    freedom = float((count - 1).clamp(min=0).sum())
    if freedom == 0:
        return 1.0
    return max(float((y - mean[epoch]).square().sum()) / freedom - float(v.mean()), 1e-3)
