"""A solve for the rewards that lag."""

from __future__ import annotations

from torch import Tensor

from marble_core.prior import lag_weights
from marble_core.rules.base import Evidence, Rule, prior_of, require_count, vector_of
from marble_core.rules.noise_aware import noise_aware


def catch_up(num_rewards: int, *, ahead: float = 0.25, prior: Tensor | None = None) -> Rule:
    """The step of fixed length that raises the rewards that lag, in proportion to how far each is behind.

    The solve of ``noise_aware``, asked for cosines in proportion to ``lag_weights`` of ``evidence.gains``. A reward
    that is more than ``ahead`` in front of the last one is left to itself: it may give something back, as long as
    it is in front. Without gains all rewards are wanted alike. A step without ``evidence.cross`` goes on with the
    last coefficients.

    Args:
        num_rewards: K.
        ahead: standard deviations that a reward may be in front of the last one before it is left to itself.
        prior: ``[K]``, how much of each reward is wanted, whatever the sum; equal shares without it.

    Example:
        >>> import torch
        >>> rule = catch_up(2)
        >>> both = torch.diag(torch.tensor([4.0, 1.0]))
        >>> rule.update(rule.init(), Evidence(gram=both, cross=both, gains=torch.tensor([0.0, 0.125])))[1]
        tensor([0.5000, 0.5000], dtype=torch.float64)

    Reference: docs/design/0006-catching-up.md; ``marble_core.lag_weights``, ``marble_core.rules.noise_aware``.
    """
    require_count(num_rewards)
    weights = prior_of(prior, num_rewards)
    lag_weights(weights * 0, weights, ahead)  # the same checks as at every update

    def update(state: Tensor, evidence: Evidence) -> tuple[Tensor, Tensor]:
        gains = weights * 0 if evidence.gains is None else vector_of("gains", evidence.gains, num_rewards)
        return noise_aware(num_rewards, prior=lag_weights(gains, weights, ahead)).update(state, evidence)

    return Rule(lambda: weights / weights.sum(), update)
