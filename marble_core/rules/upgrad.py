"""UPGrad: the mean of all gradients, each projected so that it lowers no reward."""

from __future__ import annotations

from torch import Tensor

from marble_core.rules.base import Evidence, Rule, matrix_of, prior_of, require_count
from marble_core.upgrad import upgrad_weights


def upgrad(num_rewards: int, *, prior: Tensor | None = None) -> Rule:
    """UPGrad of a batch at every step with its Gram matrix: the mean of the gradients, each projected first.

    Of the evidence it reads the batch's Gram matrix alone. A step without goes on with the last coefficients, which
    promise nothing for its gradients.

    Args:
        num_rewards: K.
        prior: ``[K]``, weights of the projected gradients; equal weights of sum 1 without it.

    Example:
        >>> import torch
        >>> rule = upgrad(2)
        >>> rule.update(rule.init(), Evidence(gram=torch.tensor([[4.0, -1.0], [-1.0, 1.0]])))[1]
        tensor([0.6250, 1.0000], dtype=torch.float64)

    Reference: ``marble_core.upgrad_weights``; Quinton and Rey (arXiv 2406.16232).
    """
    require_count(num_rewards)
    weights = prior_of(prior, num_rewards)

    def update(state: Tensor, evidence: Evidence) -> tuple[Tensor, Tensor]:
        if evidence.gram is not None:
            state = upgrad_weights(matrix_of("gram", evidence.gram, num_rewards), weights)
        return state, state.clone()

    return Rule(lambda: weights.clone(), update)
