"""Rules that look at nothing: the sum of all rewards."""

from __future__ import annotations

from torch import Tensor

from marble_core._check import describe, require, require_float
from marble_core.rules.base import Evidence, Rule, copied, prior_of, require_count


def uniform(num_rewards: int) -> Rule:
    """Equal coefficients, ``1/K``, whatever was measured.

    Example:
        >>> uniform(4).update((), Evidence())[1]
        tensor([0.2500, 0.2500, 0.2500, 0.2500], dtype=torch.float64)

    Reference: the baseline of MARBLE (Zhao et al., arXiv 2605.06507), with advantages of unit variance.
    """
    require_count(num_rewards)
    return _constant(prior_of(None, num_rewards))


def weighted_sum(weights: Tensor) -> Rule:
    """Coefficients that never change: the gradient of the weighted sum of the rewards' losses.

    Args:
        weights: ``[K]``, any sum. Of raw rewards with standard deviations ``s_k`` and advantages of unit variance the
            sum's weights are in proportion to ``s_k``.

    Example:
        >>> import torch
        >>> weighted_sum(torch.tensor([1.0, 3.0])).update((), Evidence())[1]
        tensor([1., 3.], dtype=torch.float64)

    Reference: linear scalarization.
    """
    require_float("weights", weights, "[K]", (1,))
    require(len(weights) >= 1, "weights", "at least one weight, K >= 1", describe(weights))
    return _constant(copied(weights))


def _constant(coefficients: Tensor) -> Rule:
    """A rule without a state."""

    def update(state: tuple[()], evidence: Evidence) -> tuple[tuple[()], Tensor]:
        return state, coefficients.clone()

    return Rule(lambda: (), update)
