"""Rules that were tried and are not shipped, each a function as those of ``marble_core.rules``.

    python -m reference train --balance reference.experiments.candidates:soft_min_cone --solve.refresh-every 1

Candidates that looked at gradients in Adam's metric, at moments with their noise or at two steps in a row, and one that
stepped along the moments, did not reach the rules here; they can be run at commit 53f21ea, before the trainer stopped
collecting what they need.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from marble_core import (
    harmonize,
    min_norm_weights,
    psd_part,
    rescale,
    shrink_to_prior,
    soft_min_weights,
    upgrad_weights,
)
from marble_core.rules import (
    Evidence,
    Rule,
    catch_up,
    cone,
    marble,
    marble_paper,
    noise_aware,
    soft_min,
    uniform,
    upgrad,
)


def upgrad_halves(num_rewards: int) -> Rule:
    """UPGrad on the signals, by an unbiased estimate of their Gram matrix."""
    return _solving(num_rewards, lambda e: upgrad_weights(psd_part(_given(e.cross)), _equal(num_rewards)))


def min_norm_halves(num_rewards: int) -> Rule:
    """Min-norm of unit signals by an unbiased Gram matrix, shrunk to equal weights where there is no signal."""

    def solve(e: Evidence) -> Tensor:
        solution = harmonize(_known(e))
        w = _shrunk(solution.weights, e) * solution.active
        w = w / w.sum().clamp(min=1e-12)
        return torch.where(solution.active, rescale(w, solution.norms, solution.active), 0.0)

    return _solving(num_rewards, solve)


def raw_min_norm(num_rewards: int) -> Rule:
    """The shortest vector in the hull of the raw gradients of a batch: MGDA, without normalization."""
    return _solving(num_rewards, lambda e: min_norm_weights(_given(e.gram)))


def raw_min_norm_halves(num_rewards: int) -> Rule:
    """The largest gain of the worst reward, if the signals were what an unbiased estimate says: raw min-norm."""
    return _solving(num_rewards, lambda e: min_norm_weights(psd_part(_given(e.cross))))


def raw_min_norm_shrunk(num_rewards: int) -> Rule:
    """The same, shrunk to equal weights where there is no signal."""

    def solve(e: Evidence) -> Tensor:
        w = _shrunk(min_norm_weights(_known(e)), e)
        return w / w.sum().clamp(min=1e-12)

    return _solving(num_rewards, solve)


def soft_min_cone(num_rewards: int) -> Rule:
    """The soft minimum's direction, projected so that no reward falls as far as the signals are known."""

    def solve(e: Evidence) -> Tensor:
        return _fresh(cone(num_rewards, prior=_tilted(e)), e._replace(cross=_given(e.cross)))

    return _solving(num_rewards, solve)


def noise_aware_soft(num_rewards: int) -> Rule:
    """The noise-aware solve with feedback: the cosines it asks for are in proportion to the soft minimum's weights."""

    def solve(e: Evidence) -> Tensor:
        return _fresh(noise_aware(num_rewards, prior=_tilted(e)), e._replace(cross=_given(e.cross)))

    return _solving(num_rewards, solve)


def marble_paper_between(num_rewards: int) -> Rule:
    """The paper's step between two solves: weights of unit gradients, applied to the raw ones."""
    return _solving(num_rewards, lambda e: harmonize(_given(e.gram)).weights)


# One step of every rule from what was measured on a batch, without smoothing: for ``diagnose`` and ``settle``.
CANDIDATES: dict[str, Callable[[int], Rule]] = {
    "uniform": uniform,
    "soft-min": soft_min,
    "marble": functools.partial(marble, rho=0.0, guard=0.0),
    "marble-paper": marble_paper,
    "marble-paper, between solves": marble_paper_between,
    "noise-aware": noise_aware,
    "catch-up": catch_up,
    "cone": cone,
    "upgrad": upgrad,
    "min-norm, halves": min_norm_halves,
    "raw min-norm, halves": raw_min_norm_halves,
    "upgrad, halves": upgrad_halves,
}


def coefficients_of(label: str, evidence: Evidence, num_rewards: int) -> Tensor:
    """What a fresh rule of ``CANDIDATES`` makes of the evidence, ``[K]``."""
    return _fresh(CANDIDATES[label](num_rewards), evidence)


def _fresh(rule: Rule, evidence: Evidence) -> Tensor:
    """The first coefficients of a rule."""
    return rule.update(rule.init(), evidence)[1]


def _solving(num_rewards: int, solve: Callable[[Evidence], Tensor]) -> Rule:
    """A rule that solves where gradients were measured, and goes on with the last coefficients in between."""

    def update(state: Tensor, evidence: Evidence) -> tuple[Tensor, Tensor]:
        state = state if evidence.gram is None else solve(evidence)
        return state, state.clone()

    return Rule(lambda: _equal(num_rewards), update)


def _equal(K: int) -> Tensor:
    return torch.full((K,), 1 / K, dtype=torch.float64)


def _given(matrix: Tensor | None) -> Tensor:
    """A matrix that a rule cannot do without."""
    if matrix is None:
        raise ValueError(
            "evidence: expected a Gram matrix and a cross-Gram matrix of the rewards' own parts, got None."
        )
    return matrix.double()


def _tilted(e: Evidence) -> Tensor:
    """The soft minimum's weights; equal ones where no gains are known."""
    K = len(_given(e.gram))
    equal = _equal(K)
    return equal if e.gains is None else soft_min_weights(e.gains.double(), equal, 4.0, keep=0.5)


def _known(e: Evidence) -> Tensor:
    """Gram of the signals; a norm below its own error counts as that, so that no coefficient is blown up."""
    cross = _given(e.cross)
    S = psd_part(cross)
    error = 0.0 if e.certainty is None else (cross.diagonal() / e.certainty).abs().nan_to_num(0.0)
    return S + torch.diag((error - S.diagonal()).clamp(min=0))


def _shrunk(weights: Tensor, e: Evidence) -> Tensor:
    """Weights moved to equal ones as far as the signals cannot be told from zero."""
    z = torch.full_like(weights, torch.nan) if e.certainty is None else e.certainty
    return shrink_to_prior(weights, torch.full_like(weights, 1 / len(weights)), z, torch.ones_like(z))
