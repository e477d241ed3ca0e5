"""Advantages: rewards ``R`` to per-reward, per-group advantages ``A``, in one batch or from running statistics."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from marble_core._check import require, require_float, require_labels, require_range, require_same_shape


class GroupStats(NamedTuple):
    """Count, mean and sum of squared deviations of every reward in every group, each ``[num_groups, num_rewards]``.

    The spread over the whole batch needs no field of its own: it is the merge of all groups. A cell with no
    applicable reward is all zeros. To save and load it: docs/cookbook.md, "Save and resume".
    """

    count: Tensor  # type: ignore[assignment]  # the formula's name; nobody counts values in this tuple
    mean: Tensor
    m2: Tensor


def group_advantages(
    rewards: Tensor,
    groups: Tensor,
    *,
    applicable: Tensor | None = None,
    std: Literal["global", "group"] = "global",
    eps: float = 1e-4,
) -> Tensor:
    """Centre each reward within its group and divide by its spread; no reward ever sees another.

    ``A_nk = (R_nk - mean_k(group of n)) / (std_k + eps)``, over applicable entries alone, with the population
    standard deviation (divided by the count, not by the count - 1). ``std="global"`` takes it over the batch's raw
    rewards, as DiffusionNFT's code does; ``std="group"`` over the image's own group, as the paper's text does.

    Exactly 0, not rounding noise over ``eps``: identical rewards in a group, a group of one, an inapplicable entry.
    NaN or an infinity makes its group NaN in its own column, with ``std="global"`` its whole column; where it is
    inapplicable it is never read. Computed in float64 without a host sync; not differentiable through ``rewards``.

    Args:
        rewards: ``[N, K]``, raw rewards ``R``, one row an image.
        groups: ``[N]``, integers; images with an equal label (the same prompt) form a group. Any labels will do.
        applicable: ``[N, K]``, bool; where a reward is defined. Everywhere by default.
        std: which spread to divide by.
        eps: added to the standard deviation, positive and finite.

    Returns:
        ``[N, K]``, the advantages ``A``, in the dtype of ``rewards``.

    Raises:
        ValueError: a shape, a dtype or an option is wrong.

    Example:
        >>> rewards = torch.tensor([[1.0, 0.1], [3.0, 0.1], [5.0, 0.3], [5.0, 0.1]])
        >>> group_advantages(rewards, torch.tensor([7, 7, 2, 2]), std="group")
        tensor([[-0.9999,  0.0000],
                [ 0.9999,  0.0000],
                [ 0.0000,  0.9990],
                [ 0.0000, -0.9990]])

    Reference: MARBLE (Zhao et al., arXiv 2605.06507), eq. 3; DiffusionNFT (Zheng et al., arXiv 2509.16117).
        Applicability: this project, docs/theory.md, section 2.
    """
    applicable = require_labels(groups, rewards, applicable)
    labels = groups.long().contiguous()
    slot = torch.searchsorted(labels.sort().values, labels)  # a label's first place in the order: in [0, N), no sync
    stats = _batch_stats(rewards.detach().double(), slot, applicable, len(labels))
    return advantages_from_stats(stats, rewards, slot, applicable=applicable, std=std, eps=eps)


def init_group_stats(
    num_groups: int,
    num_rewards: int,
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> GroupStats:
    """Running statistics that have seen nothing.

    Count, mean and ``m2 = sum (R - mean)^2`` start at 0. Keep one row for every prompt of the training set to carry
    the statistics over between batches.

    Args:
        num_groups: rows, at least 1; group indices passed later lie in ``[0, num_groups)``.
        num_rewards: K, at least 1.
        dtype: float64 or float32; rewards are converted to it. float32 counts exactly up to ``2^24`` images.
        device: where the rewards will be.

    Returns:
        ``GroupStats`` of zeros, each ``[num_groups, num_rewards]``.

    Raises:
        ValueError: a size is below 1 or ``dtype`` is neither float64 nor float32.

    Example:
        >>> init_group_stats(3, 2).count.shape
        torch.Size([3, 2])

    Reference: Welford (1962); this project, docs/theory.md, section 2.
    """
    for name, size in (("num_groups", num_groups), ("num_rewards", num_rewards)):
        require(isinstance(size, int) and size >= 1, name, "an integer of at least 1", size)
    require(dtype in (torch.float64, torch.float32), "dtype", "torch.float64 or torch.float32", dtype)
    zeros = torch.zeros(num_groups, num_rewards, dtype=dtype, device=device)
    return GroupStats(zeros, zeros.clone(), zeros.clone())


def update_group_stats(
    stats: GroupStats, rewards: Tensor, groups: Tensor, applicable: Tensor | None = None
) -> GroupStats:
    """Add a batch of rewards to the running statistics of its groups.

    The batch is reduced to its own count, mean and m2, then merged as ``merge_group_stats`` does, so the order of
    the rows and the cut into batches change the result by rounding alone. A group that only ever saw one value has
    that value as its mean and 0 as its m2, bit for bit, hence advantages of exactly 0. NaN or an infinity makes its
    own cell NaN from then on; an inapplicable entry is never read. No gradient flows into the statistics.

    Group indices are not checked, as that would read values: one outside ``[0, num_groups)``, negative ones
    included, is an error of the scatter on a CPU and an assertion of the kernel on an accelerator.

    Args:
        stats: the statistics so far; not modified.
        rewards: ``[N, K]``, raw rewards.
        groups: ``[N]``, integer indices of the rows of ``stats``.
        applicable: ``[N, K]``, bool; where a reward is defined. Everywhere by default.

    Returns:
        ``GroupStats`` in the dtype of ``stats``.

    Raises:
        ValueError: a shape or a dtype is wrong, or ``stats`` is for another number of rewards.

    Example:
        >>> stats = update_group_stats(init_group_stats(2, 1), torch.tensor([[1.0], [3.0]]), torch.tensor([1, 1]))
        >>> stats.mean[1].item(), stats.m2[1].item()
        (2.0, 2.0)

    Reference: Chan, Golub and LeVeque (1983); this project, docs/theory.md, section 2.
    """
    applicable = require_labels(groups, rewards, applicable)
    num_groups = _check_stats("stats", stats, rewards.shape[1])
    x = rewards.detach().to(stats.mean.dtype)
    return merge_group_stats(stats, _batch_stats(x, groups.long(), applicable, num_groups))


def merge_group_stats(a: GroupStats, b: GroupStats) -> GroupStats:
    """Statistics of the union of two sets of images, for instance those of two ranks.

    ``mean = mean_a + delta n_b / n`` and ``m2 = m2_a + m2_b + delta^2 n_a n_b / n`` with
    ``delta = mean_b - mean_a``: associative and commutative up to rounding. Equal means merge to that very value,
    and empty statistics change nothing, both bit for bit. NaN in either stays in its own cell.

    Args:
        a: ``GroupStats``.
        b: ``GroupStats`` over the same groups and rewards, of other images.

    Returns:
        ``GroupStats``.

    Raises:
        ValueError: the shapes differ.

    Example:
        >>> one, two = (
        ...     update_group_stats(init_group_stats(1, 1), torch.tensor([[x]]), torch.tensor([0])) for x in (1.0, 4.0)
        ... )
        >>> [x.item() for x in merge_group_stats(one, two)]
        [2.0, 2.5, 4.5]

    Reference: Chan, Golub and LeVeque (1983), Algorithms for computing the sample variance, eq. 2.1.
    """
    K = a.mean.shape[-1] if a.mean.ndim else 0
    _check_stats("a", a, K)
    _check_stats("b", b, K)
    require_same_shape("b", b.mean, "a", a.mean)
    n = a.count + b.count
    share = b.count / n.clamp(min=1)
    delta = b.mean - a.mean
    return GroupStats(n, a.mean + delta * share, a.m2 + b.m2 + a.count * delta * share * delta)


def advantages_from_stats(
    stats: GroupStats,
    rewards: Tensor,
    groups: Tensor,
    *,
    applicable: Tensor | None = None,
    std: Literal["global", "group"] = "global",
    eps: float = 1e-4,
) -> Tensor:
    """Advantages against running statistics, which should already contain these rewards.

    ``A_nk = (R_nk - mean_k(group of n)) / (std_k + eps)`` with mean and population standard deviation from ``stats``;
    ``std="global"`` is the spread of everything in ``stats``. On the statistics of the batch itself this is
    ``group_advantages``. Exactly 0: a group that only ever saw this value, a group with fewer than two images in
    ``stats``, an inapplicable entry. A NaN mean or spread makes what it divides or centres NaN; group indices are not
    checked (see ``update_group_stats``). Not differentiable through ``rewards``.

    Args:
        stats: the statistics, after ``update_group_stats`` with these rewards.
        rewards: ``[N, K]``, raw rewards.
        groups: ``[N]``, integer indices of the rows of ``stats``.
        applicable: ``[N, K]``, bool; where a reward is defined. Everywhere by default.
        std: which spread to divide by.
        eps: added to the standard deviation, positive and finite.

    Returns:
        ``[N, K]`` in the dtype of ``rewards``.

    Raises:
        ValueError: a shape, a dtype or an option is wrong, or ``stats`` is for another number of rewards.

    Example:
        >>> rewards, groups = torch.tensor([[1.0], [3.0]]), torch.tensor([1, 1])
        >>> stats = update_group_stats(init_group_stats(2, 1), rewards, groups)
        >>> advantages_from_stats(stats, rewards, groups)
        tensor([[-0.9999],
                [ 0.9999]])

    Reference: MARBLE (Zhao et al., arXiv 2605.06507), eq. 3 ("running"); this project, docs/theory.md, section 2.
    """
    applicable = require_labels(groups, rewards, applicable)
    _check_stats("stats", stats, rewards.shape[1])
    require(std in ("global", "group"), "std", '"global" or "group"', repr(std))
    require_range("eps", eps, 0.0, math.inf, open_low=True, open_high=True)
    index = groups.long().unsqueeze(1).expand_as(rewards)
    centred = rewards.detach().to(stats.mean.dtype) - stats.mean.gather(0, index)
    centred = centred * (stats.count.gather(0, index) > 1)  # a product, so that a NaN is not hidden
    spread = (stats.m2 / stats.count.clamp(min=1)).sqrt().gather(0, index) if std == "group" else _global_std(stats)
    return torch.where(applicable, centred / (spread + eps), 0).to(rewards.dtype)


def _check_stats(name: str, stats: GroupStats, num_rewards: int) -> int:
    """Guard the shapes of ``stats``; its number of groups."""
    for field, x in (("count", stats.count), ("mean", stats.mean), ("m2", stats.m2)):
        require_float(f"{name}.{field}", x, "[num_groups, num_rewards]", (2,))
        require_same_shape(f"{name}.{field}", x, f"{name}.count", stats.count)
    columns = stats.mean.shape[1]
    require(columns == num_rewards, name, f"statistics of {num_rewards} rewards", f"{columns} rewards")
    return stats.mean.shape[0]


def _batch_stats(R: Tensor, slot: Tensor, applicable: Tensor, slots: int) -> GroupStats:
    """Statistics of one batch, computed relative to each group's least reward.

    Copies of one value then deviate by exactly 0, where a plain mean of them is off by rounding.
    """
    index = slot.unsqueeze(1).expand_as(R)
    zero = R.new_zeros(slots, R.shape[1])
    count = zero.scatter_add(0, index, applicable.to(R.dtype))
    least = (zero + math.inf).scatter_reduce(0, index, torch.where(applicable, R, math.inf), "amin")
    least = torch.where(count > 0, least, 0)
    x = torch.where(applicable, R - least.gather(0, index), 0)
    shift = zero.scatter_add(0, index, x) / count.clamp(min=1)
    deviation = torch.where(applicable, x - shift.gather(0, index), 0)
    return GroupStats(count, least + shift, zero.scatter_add(0, index, deviation.square()))


def _global_std(stats: GroupStats) -> Tensor:
    """``[K]``: population standard deviation over all groups together."""
    n = stats.count.sum(0).clamp(min=1)
    mean = (stats.count * stats.mean).sum(0) / n
    return ((stats.m2.sum(0) + (stats.count * (stats.mean - mean).square()).sum(0)) / n).sqrt()
