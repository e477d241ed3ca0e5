"""The prior's step, turned only as far as needed to lower no reward."""

from __future__ import annotations

from torch import Tensor

from marble_core._check import require
from marble_core.cone import cone_weights
from marble_core.gram import psd_part
from marble_core.rules.base import Evidence, Rule, matrix_of, prior_of, require_count


def cone(num_rewards: int, *, prior: Tensor | None = None) -> Rule:
    """Projection of the prior's step onto the cone of directions that lower no reward, at every step with a Gram.

    Where the prior's weighted sum lowers nothing, that sum is the step. With ``evidence.cross`` beside the Gram matrix
    the cone is that of the signals, as far as they are known, and the Gram matrix says how long a step is. With the
    Gram matrix alone the cone is the batch's. A step without either goes on with the last coefficients.

    Args:
        num_rewards: K.
        prior: ``[K]``, whose scale is that of the coefficients; equal weights of sum 1 without it.

    Example:
        >>> import torch
        >>> rule = cone(2)
        >>> rule.update(rule.init(), Evidence(gram=torch.tensor([[4.0, -1.0], [-1.0, 1.0]])))[1]
        tensor([0.5000, 0.5000], dtype=torch.float64)

    Reference: ``marble_core.cone_weights``; docs/theory.md, section 12.
    """
    require_count(num_rewards)
    weights = prior_of(prior, num_rewards)

    def update(state: Tensor, evidence: Evidence) -> tuple[Tensor, Tensor]:
        if evidence.gram is None:
            fix = "Give both at a step with a solve."
            require(evidence.cross is None, "evidence.gram", "a matrix beside evidence.cross", "None", fix)
            return state, state.clone()
        gram = matrix_of("gram", evidence.gram, num_rewards)
        if evidence.cross is None:
            state = cone_weights(gram, weights)
        else:  # an estimate does not know how long a step is
            signals = psd_part(matrix_of("cross", evidence.cross, num_rewards))
            state = cone_weights(signals, weights, step_gram=gram)
        return state, state.clone()

    return Rule(lambda: weights.clone(), update)
