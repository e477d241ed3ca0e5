"""Whole balancing rules as pairs of pure functions, ``init`` and ``update``: from what was measured to coefficients.

Every rule is used alike, in any loop:

    >>> import torch
    >>> from marble_core.rules import Evidence, marble
    >>> rule = marble(2)
    >>> state = rule.init()
    >>> gram = torch.tensor([[1.0, -1.0], [-1.0, 4.0]])  # of the gradients of this step
    >>> state, coefficients = rule.update(state, Evidence(gram=gram))
    >>> coefficients
    tensor([0.7500, 0.3750], dtype=torch.float64)

The step goes along ``sum_k coefficients_k g_k``, which is one backward pass of the rewards' weighted losses.
"""

from marble_core.rules.base import Evidence, Rule
from marble_core.rules.catch_up import catch_up
from marble_core.rules.cone import cone
from marble_core.rules.constant import uniform, weighted_sum
from marble_core.rules.marble import Smoothed, follow, init_smoothed, marble, marble_paper
from marble_core.rules.noise_aware import noise_aware
from marble_core.rules.soft_min import soft_min
from marble_core.rules.upgrad import upgrad

__all__ = [
    "Evidence",
    "Rule",
    "Smoothed",
    "catch_up",
    "cone",
    "follow",
    "init_smoothed",
    "marble",
    "marble_paper",
    "noise_aware",
    "soft_min",
    "uniform",
    "upgrad",
    "weighted_sum",
]
