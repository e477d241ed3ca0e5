"""From the rows of one optimiser step to one gradient: accumulate K gradients, refresh the coefficients, apply them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from marble_core import (
    Coefficients,
    Harmonization,
    combine_rows,
    cone_weights,
    cross_alignment,
    harmonize,
    init_coefficients,
    interpolation,
    min_norm_weights,
    noise_aware_weights,
    null_alignment,
    shrink_to_prior,
)
from marble_core.rules import Smoothed, follow
from reference.config.settings import FROM_PRIOR, SOLVERS, LossConfig, Rule
from reference.errors import TrainingError
from reference.interfaces import load_callable, place_of
from reference.policy.adapters import Policy
from reference.processes.peers import ALONE, all_reduce
from reference.step.estimate import Estimate, Signal, Tree, init_estimate, observe
from reference.step.gradients import Rows, Weigh, Whole, all_rows, halves, joined, one_gradient


class Balance(NamedTuple):
    """What balancing carries from step to step.

    Attributes:
        coefficients: smoothed weights.
        norms: ``[K]``, each gradient's norm when it last had signal; NaN before.
        applied: ``[K]``, coefficients of the raw gradients, as applied between refreshes; with a solver that takes
            the prior, what is added to the prior.
        estimate: what is known of the signals.
    """

    coefficients: Coefficients
    norms: Tensor
    applied: Tensor
    estimate: Estimate


class Step(NamedTuple):
    """What the loop says about a step.

    Attributes:
        refresh: solve (or, with a fixed rule, measure).
        prior: ``[K]``, weights of the advantages before balancing: on the simplex, or those of the raw sum.
        metric: diagonal of the optimiser's inverse metric by name, or None.
        previous: the gradient of the step before, whose cosines with this batch are measured.
        verify: compare the rows of this refresh with autograd's.
    """

    refresh: bool
    prior: Tensor
    metric: Tree | None
    previous: Tree | None
    verify: bool = False


class StepResult(NamedTuple):
    """One step's gradient by parameter name, the balancing state after it, and what to log.

    ``coefficients [K]`` are those that this step's gradients of the rewards were multiplied by.
    """

    gradient: Tree
    balance: Balance
    coefficients: Tensor
    metrics: dict[str, float]
    refresh: dict[str, Any] | None


def init_balance(K: int, rule: Rule, trained: Mapping[str, Tensor]) -> Balance:
    """Uniform weights; nothing seen."""
    uniform = torch.full((K,), 1.0 / K, dtype=torch.float64)
    applied = uniform * 0 if rule.solver in FROM_PRIOR else uniform
    return Balance(init_coefficients(K), uniform * torch.nan, applied, init_estimate(K, rule, trained))


def step_gradient(
    policy: Policy,
    rows: Rows,
    balance: Balance,
    rule: Rule,
    loss: LossConfig,
    step: Step,
    *,
    micro_batch: int,
    whole: Whole | None = None,
) -> StepResult:
    """The gradient of one optimiser step.

    An ordinary step is one backward pass per micro-batch, with the reward part of every row weighted by the current
    coefficients. A refresh accumulates all K gradients over the micro-batches first, solves once, and combines them.
    Several processes add up what they have accumulated, once a step, before anything is made of it; all get the same
    result.

    Args:
        policy: with ``default`` trained and ``old`` as it was when it sampled.
        rows: of the step, on this process.
        balance: state before the step.
        rule: the balancing rule.
        loss: the NFT loss.
        step: what to do.
        micro_batch: rows at a time.
        whole: the step over all processes; by default there is but this one.

    Returns:
        ``StepResult``.

    Raises:
        PeerError: another process has failed.
    """
    whole = whole or Whole(ALONE, int((rows.half == 0).sum()), rows.x0.shape[0])
    weigh = signal_weights(rule, balance, loss.a_max, step)
    K, full = rows.A.shape[1], rule.gradients == "full"
    used = applied_coefficients(rule, balance, step.prior)
    if not step.refresh:
        scaled = full and rule.amortize == "norm_corrected" and rule.kind == "solve"
        prox_scale = float(used.sum()) if scaled else 1.0
        gradient, metrics = one_gradient(policy, rows, loss, weigh, prox_scale, micro_batch, whole)
        return StepResult(gradient, balance, used, metrics, None)
    fixed = rule.kind != "solve"
    parts = [
        all_rows(
            *(policy, part, rule, loss, weigh if fixed else None, micro_batch, total, whole.world, most),
            verify=step.verify and first,
        )
        for first, (part, total, most) in zip((True, False), halves(rows, whole), strict=False)
    ]
    a, b, last, shared, pull, metrics = joined(all_reduce(parts, whole.world), whole, K)
    own = last if fixed else None
    h = {name: (a[name] + b[name]) / 2 for name in a}
    estimate, signal = observe(balance.estimate, a, b, shared if full else None, rule, step.metric)
    balance = balance._replace(estimate=estimate)
    solution = solve(rule, signal, step.prior)
    rho_used, prox_scale = None, 1.0
    if own is not None:
        direction, c = own, used
    else:
        balance, rho_used, c = refreshed(rule, balance, signal.gram, solution, step.prior)
        direction, prox_scale = combine_rows(signal.rows or h, c), float(c.sum()) if full else 1.0
    gradient = {name: x + prox_scale * shared[name] for name, x in direction.items()}
    gradient = _added(gradient, pull)
    g = {name: x + shared[name] for name, x in h.items()} if full else h
    record = _record(balance, solution, signal, gradient, g, c, step.previous, rho_used)
    return StepResult(gradient, balance, c, metrics, record)


def solve(rule: Rule, signal: Signal, prior: Tensor) -> Harmonization:
    """The rule's weights for K gradients, from what is known of their Gram; min-norm for a rule that does not solve.

    Solvers that take the prior have no weights of unit gradients: theirs are the shares of the coefficients.
    """
    gram = signal.gram
    if rule.shrink:  # a norm that cannot be told from zero must not blow a coefficient up
        square = gram.diagonal()
        gram = gram + torch.diag((signal.error.nan_to_num(0.0) - square).clamp(min=0))
    solver = min_norm_weights if rule.solver in SOLVERS else _own_solver(rule.solver)
    solution = harmonize(gram, solver=solver)
    if rule.solver in FROM_PRIOR:
        c = _from_prior(rule, gram, signal.noise, prior)
        c = shrink_to_prior(c, prior, signal.square, signal.error) if rule.shrink else c
        return solution._replace(weights=c / c.abs().sum(), coefficients=c)
    w = solution.weights
    if not rule.normalize:
        w = solver(torch.where(solution.active & solution.active.unsqueeze(-1), gram, 0.0)) * solution.active
    if rule.shrink:
        w = shrink_to_prior(w, prior, signal.square, signal.error) * solution.active
    if rule.normalize and not rule.shrink:
        return solution
    w = w / w.sum().clamp(min=1e-12)
    n_bar = solution.norms[solution.active].mean()
    c = torch.where(solution.active, n_bar * w / solution.norms, 0.0) if rule.normalize else w
    return solution._replace(weights=w, coefficients=c)


def _own_solver(path: str) -> Callable[[Tensor], Tensor]:
    """A solver of the user's, whose faults are said as what they are."""
    solver = load_callable(path, "balance")

    def checked(gram: Tensor) -> Tensor:
        try:
            weights = solver(gram)
        except Exception as error:
            raise TrainingError(f"balance {path!r} raised {place_of(error)}") from error
        K = gram.shape[-1]
        if not isinstance(weights, Tensor) or weights.shape != (K,) or not weights.is_floating_point():
            got = f"{weights.dtype} {list(weights.shape)}" if isinstance(weights, Tensor) else type(weights).__name__
            raise TrainingError(f"balance {path!r}: expected a float tensor of K = {K} weights, got {got}.")
        if bool(gram.isfinite().all()) and not bool(weights.isfinite().all()):
            raise TrainingError(f"balance {path!r}: expected finite weights, got {weights.tolist()}.")
        return weights

    return checked


def _from_prior(rule: Rule, gram: Tensor, noise: Tensor, prior: Tensor) -> Tensor:
    """Coefficients of the raw gradients ``[K]`` by a solver that takes the prior; the noise-aware one wants equal
    cosines, times the prior."""
    if rule.solver == "cone":  # an estimate does not know how long a step is
        return cone_weights(gram, prior, step_gram=None if rule.gram == "batch" else noise)
    if rule.solver == "prior":
        return prior
    wanted = len(prior) * prior * gram.diagonal().clamp(min=0).sqrt()
    return noise_aware_weights(gram, noise, wanted).coefficients


def refreshed(
    rule: Rule, balance: Balance, gram: Tensor, solution: Harmonization, prior: Tensor
) -> tuple[Balance, float, Tensor]:
    """The state after a refresh, the memory used by the smoothing, and the coefficients of this step.

    Stationary gradients change nothing. With the paper's amortization this step goes along the fresh solution, ours
    along the smoothed weights; a reward without signal keeps its coefficient.
    """
    if rule.solver in FROM_PRIOR:
        c = solution.coefficients
        return balance._replace(applied=c - prior), 1.0, c
    before = Smoothed(balance.coefficients, balance.norms, balance.applied)
    keep = rule.normalize and rule.amortize == "norm_corrected"
    after, rho_used = follow(before, solution, gram, rho=rule.rho, guard=rule.guard, keep_direction=keep)
    fresh = rule.amortize == "paper" and not bool(solution.stationary)
    return balance._replace(**after._asdict()), rho_used, solution.coefficients if fresh else after.applied


def applied_coefficients(rule: Rule, balance: Balance, prior: Tensor) -> Tensor:
    """Coefficients of the raw gradients between refreshes ``[K]``: those of the prior where nothing is solved."""
    if rule.kind != "solve":
        return prior
    return balance.applied + prior if rule.solver in FROM_PRIOR else balance.applied


def signal_weights(rule: Rule, balance: Balance, a_max: float, step: Step) -> Weigh:
    """How a step without a solve weighs the reward part of each row: a function of ``A [B, K]`` and ``A_sum [B]``.

    Norm-corrected coefficients combine in r, which is exact with clamping; the others are the papers' rules, which
    combine advantages.
    """
    if rule.kind == "weighted-sum":
        return lambda A, A_sum: interpolation(A_sum, a_max=a_max) - 0.5
    if rule.kind == "uniform":
        return lambda A, A_sum: interpolation(A.mean(-1), a_max=a_max) - 0.5
    c = applied_coefficients(rule, balance, step.prior)
    if rule.amortize == "paper":
        return lambda A, A_sum: interpolation(A @ c.to(A), a_max=a_max) - 0.5
    return lambda A, A_sum: (interpolation(A, a_max=a_max) - 0.5) @ c.to(A)


def _added(gradient: Tree, pull: Tree) -> Tree:
    """A gradient and the pull to the base, where that is apart."""
    return {name: x + pull[name] for name, x in gradient.items()} if pull else gradient


def _record(
    balance: Balance,
    solution: Harmonization,
    signal: Signal,
    gradient: Tree,
    g: Tree,
    c: Tensor,
    previous: Tree | None,
    rho_used: float | None,
) -> dict[str, Any]:
    """Log entry of a refresh, with the cosines on this batch, and of the step before with this batch."""
    same = cross_alignment(gradient, g)
    after = cross_alignment(previous, g) if previous is not None else None
    return {
        "weights": solution.weights.tolist(),
        "smoothed": balance.coefficients.weights.tolist(),
        "coefficients": c.tolist(),
        "norms": solution.norms.tolist(),
        "active": solution.active.tolist(),
        "cosines": same.cosines.tolist(),
        "min_cosine": float(same.minimum),
        "mean_cosine": float(same.mean),
        "conflict": bool(same.conflict),
        "direction_norm": float(solution.direction_norm),
        "stationary": bool(solution.stationary),
        "signal_share": signal.share.tolist(),
        "signal_share_error": signal.share_error.tolist(),
        "signal_cosines": _signal_cosines(signal),
        "null": null_alignment(len(c)),
        "rho_used": rho_used,
        "next_cosines": after.cosines.tolist() if after else None,
        "next_min_cosine": float(after.minimum) if after else None,
    }


def _signal_cosines(signal: Signal) -> list[list[float]]:
    """Cosines of the signals with each other ``[K][K]``; NaN for a signal within two standard errors of 0."""
    sure = signal.square > 2 * signal.error.nan_to_num(0.0)
    norms = torch.where(sure, signal.square, torch.nan).sqrt()
    found: list[list[float]] = (signal.cross / norms / norms.unsqueeze(-1)).clamp(-1, 1).tolist()
    return found


def is_finite(gradient: Tree) -> bool:
    """Whether every entry of a gradient is finite."""
    norms = torch.stack([x.detach().norm() for x in gradient.values()])
    return math.isfinite(float(norms.sum()))
