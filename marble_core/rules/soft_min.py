"""Weights from measured gains: rewards that lag count more."""

from __future__ import annotations

from torch import Tensor

from marble_core.prior import soft_min_weights
from marble_core.rules.base import Evidence, Rule, prior_of, require_count, vector_of


def soft_min(num_rewards: int, *, strength: float = 4.0, keep: float = 0.5, prior: Tensor | None = None) -> Rule:
    """The gradient of the soft minimum of the rewards' gains: no solve, and no gradient but the one of the step.

    ``evidence.gains`` tell how far each reward has come; a step without them goes on with the last weights.

    Args:
        num_rewards: K.
        strength: of the tilt towards rewards that lag, per standard deviation.
        keep: share of the weights that stays the prior's.
        prior: ``[K]``; equal weights without it.

    Example:
        >>> import torch
        >>> rule = soft_min(2)
        >>> rule.update(rule.init(), Evidence(gains=torch.tensor([0.0, 0.5])))[1]
        tensor([0.6904, 0.3096], dtype=torch.float64)

    Reference: docs/design/0003-noise.md; ``marble_core.soft_min_weights``.
    """
    require_count(num_rewards)
    weights = prior_of(prior, num_rewards)
    soft_min_weights(weights * 0, weights, strength, keep=keep)  # the same checks as at every update

    def update(state: Tensor, evidence: Evidence) -> tuple[Tensor, Tensor]:
        if evidence.gains is None:
            return state, state.clone()
        gains = vector_of("gains", evidence.gains, num_rewards)
        state = soft_min_weights(gains, weights, strength, keep=keep)
        return state, state.clone()

    return Rule(lambda: weights / weights.sum(), update)
