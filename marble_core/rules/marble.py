"""The paper's method: the min-norm point of unit gradients, smoothed over solves and used in between."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from marble_core._check import require_range
from marble_core.ema import Coefficients, Guard, init_coefficients, update_coefficients
from marble_core.harmonize import Harmonization, harmonize, rescale
from marble_core.rules.base import Evidence, Rule, matrix_of, require_count
from marble_core.simplex import min_norm_weights


class Smoothed(NamedTuple):
    """Smoothed weights, and what they are applied as.

    Attributes:
        coefficients: weights of unit gradients.
        norms: ``[K]``, each gradient's norm when it last had signal; NaN before.
        applied: ``[K]``, coefficients of the raw gradients until the next solve.
    """

    coefficients: Coefficients
    norms: Tensor
    applied: Tensor


def init_smoothed(num_rewards: int) -> Smoothed:
    """Equal weights; no norm known."""
    require_count(num_rewards)
    equal = torch.full((num_rewards,), 1.0 / num_rewards, dtype=torch.float64, device="cpu")
    return Smoothed(init_coefficients(num_rewards, device="cpu"), equal * torch.nan, equal)


def follow(
    state: Smoothed, solution: Harmonization, gram: Tensor, *, rho: float, guard: float, keep_direction: bool
) -> tuple[Smoothed, float]:
    """Take a solution into the smoothed weights; stationary gradients change nothing.

    With ``w`` the smoothed weights of unit gradients, the raw gradients are multiplied by ``n_bar w_k / |g_k|``
    (``keep_direction``), which reproduces the balanced direction, or by ``w_k`` as in the paper. A reward without
    signal keeps the norm that it had last.

    Args:
        gram: ``[K, K]``, that the solution is of.
        rho: weight of what was before.
        guard: in [0, 1), the share of the shortest direction's smallest inner product with the unit gradients that
            smoothing must leave; 0 for none.

    Returns:
        The state, and the ``rho`` that was used after guarding.

    Example:
        >>> gram = torch.diag(torch.tensor([1.0, 4.0], dtype=torch.float64))
        >>> follow(init_smoothed(2), harmonize(gram), gram, rho=0.0, guard=0.0, keep_direction=True)[0].applied
        tensor([0.7500, 0.3750], dtype=torch.float64)

    Reference: MARBLE (Zhao et al., arXiv 2605.06507), eq. 9; docs/theory.md, section 9.
    """
    if bool(solution.stationary):
        return state, 1.0
    limit = Guard(gram, guard) if guard > 0 else None
    smoothed, rho_used = update_coefficients(state.coefficients, solution, rho=rho, guard=limit)
    norms = torch.where(solution.active, solution.norms, state.norms)
    w = smoothed.weights
    applied = rescale(w, norms, solution.active) if keep_direction else w
    return Smoothed(smoothed, norms, applied), float(rho_used)


def marble(
    num_rewards: int,
    *,
    rho: float = 0.7,
    guard: float = 0.5,
    solver: Callable[[Tensor], Tensor] = min_norm_weights,
) -> Rule:
    """MARBLE: the min-norm point of unit gradients, smoothed by ``rho``, applied so that the direction is kept.

    ``coefficients_k = n_bar w_k / |g_k|`` at a solve and until the next one. Give ``evidence.gram`` at every N-th step
    (the paper's N is 10), and nothing in between. On the batch of a solve the direction lowers no reward's sampled
    objective, and the guard keeps that so under smoothing. Where the batch is Pareto-stationary, no direction improves
    all rewards: the old coefficients go on, and may lower one. docs/theory.md says what is not promised under noise.

    Args:
        num_rewards: K.
        rho: weight of the smoothed weights at a solve.
        guard: in [0, 1). The min-norm direction has some smallest inner product with the unit gradients. After
            smoothing, the smallest one must still be at least ``guard`` times that. 0: no guard.
        solver: from the Gram matrix of unit gradients to weights on the simplex.

    Example:
        >>> rule = marble(2)
        >>> state, c = rule.update(rule.init(), Evidence(gram=torch.diag(torch.tensor([1.0, 4.0]))))
        >>> c, rule.update(state, Evidence())[1]
        (tensor([0.7500, 0.3750], dtype=torch.float64), tensor([0.7500, 0.3750], dtype=torch.float64))

    Reference: MARBLE (Zhao et al., arXiv 2605.06507), eqs. 5-9; the kept direction is this project's.
    """
    require_count(num_rewards)
    require_range("rho", rho, 0.0, 1.0)
    require_range("guard", guard, 0.0, 1.0, open_high=True)

    def update(state: Smoothed, evidence: Evidence) -> tuple[Smoothed, Tensor]:
        if evidence.gram is None:
            return state, state.applied.clone()
        gram = matrix_of("gram", evidence.gram, num_rewards)
        solution = harmonize(gram, solver=solver)
        state, _ = follow(state, solution, gram, rho=rho, guard=guard, keep_direction=True)
        return state, state.applied.clone()

    return Rule(lambda: init_smoothed(num_rewards), update)


def marble_paper(num_rewards: int, *, rho: float = 0.7) -> Rule:
    """MARBLE to the letter: the fresh solution at a solve, the smoothed weights themselves in between.

    Those weights are of *unit* gradients, and are applied to gradients of other lengths: between two solves the
    direction may lower rewards even without noise (docs/theory.md, section 9). The paper balances full gradients, so
    ``evidence.gram`` is theirs.

    Args:
        num_rewards: K.
        rho: weight of the smoothed weights at a solve.

    Example:
        >>> rule = marble_paper(2)
        >>> state, c = rule.update(rule.init(), Evidence(gram=torch.diag(torch.tensor([1.0, 4.0]))))
        >>> c, rule.update(state, Evidence())[1]
        (tensor([0.7500, 0.3750], dtype=torch.float64), tensor([0.5000, 0.5000], dtype=torch.float64))

    Reference: MARBLE (Zhao et al., arXiv 2605.06507), eqs. 5-9 and algorithm 1.
    """
    require_count(num_rewards)
    require_range("rho", rho, 0.0, 1.0)

    def update(state: Smoothed, evidence: Evidence) -> tuple[Smoothed, Tensor]:
        if evidence.gram is None:
            return state, state.applied.clone()
        gram = matrix_of("gram", evidence.gram, num_rewards)
        solution = harmonize(gram)
        if bool(solution.stationary):
            return state, state.applied.clone()
        state, _ = follow(state, solution, gram, rho=rho, guard=0.0, keep_direction=False)
        return state, solution.coefficients

    return Rule(lambda: init_smoothed(num_rewards), update)
