"""A solve that knows how noisy its gradients are."""

from __future__ import annotations

from torch import Tensor

from marble_core._check import require
from marble_core.noise_aware import noise_aware_weights, shrink_gram, signal_gram
from marble_core.rules.base import Evidence, Rule, matrix_of, prior_of, require_count


def noise_aware(num_rewards: int, *, prior: Tensor | None = None) -> Rule:
    """The shortest step, noise included, that raises every reward's signal to the same degree.

    ``evidence.cross`` is a cross-Gram matrix of independent halves, best of their averages over some steps, and
    ``evidence.gram`` that of the gradients that the step is made of, noise included. A step without them goes on with
    the last coefficients.

    Args:
        num_rewards: K.
        prior: ``[K]``, how much of each reward is wanted, whatever the sum; equal shares without it.

    Example:
        >>> import torch
        >>> rule = noise_aware(2)
        >>> both = torch.diag(torch.tensor([4.0, 1.0]))
        >>> rule.update(rule.init(), Evidence(gram=both, cross=both))[1]
        tensor([0.3953, 0.7906], dtype=torch.float64)

    Reference: docs/design/0004-solve-under-noise.md; ``marble_core.noise_aware_weights``.
    """
    require_count(num_rewards)
    weights = prior_of(prior, num_rewards)

    def update(state: Tensor, evidence: Evidence) -> tuple[Tensor, Tensor]:
        if evidence.cross is None:
            return state, state.clone()
        fix = "Give both at a step with a solve."
        require(evidence.gram is not None, "evidence.gram", "a matrix beside evidence.cross", "None", fix)
        assert evidence.gram is not None
        S = shrink_gram(signal_gram(matrix_of("cross", evidence.cross, num_rewards)))[0]
        wanted = num_rewards * weights * S.diagonal().clamp(min=0).sqrt()
        state = noise_aware_weights(S, matrix_of("gram", evidence.gram, num_rewards), wanted).coefficients
        return state, state.clone()

    return Rule(lambda: weights / weights.sum(), update)
