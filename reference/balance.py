"""From the rows of one optimiser step to one gradient: accumulate K gradients, refresh the coefficients, apply them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from marble_core import (
    AlignmentStats,
    Coefficients,
    Guard,
    Harmonization,
    affine_terms,
    branch_losses,
    combine_rows,
    cross_alignment,
    gram_matrix,
    harmonize,
    init_alignment_stats,
    init_coefficients,
    interpolation,
    min_norm_weights,
    null_alignment,
    shared_cotangent_rows,
    update_alignment_stats,
    update_coefficients,
)
from reference.config import LossConfig, Rule
from reference.policy import Policy, active, parameters, velocity
from reference.scoring import load_callable

Tree = dict[str, Tensor]


class Rows(NamedTuple):
    """The rows of one optimiser step, ``B`` pairs of an image and a timestep, or a micro-batch of them.

    Attributes:
        x0: ``[B, C, H, W]``, clean latents.
        noise: ``[B, C, H, W]``.
        t: ``[B]``.
        embeds: ``[B, L, D]``, prompt embeddings.
        pooled: ``[B, D']``, pooled prompt embeddings.
        A: ``[B, K]``, advantages, one column a reward.
        A_sum: ``[B]``, advantages of the weighted sum of the raw rewards.
    """

    x0: Tensor
    noise: Tensor
    t: Tensor
    embeds: Tensor
    pooled: Tensor
    A: Tensor
    A_sum: Tensor


class Balance(NamedTuple):
    """What balancing carries from step to step.

    Attributes:
        coefficients: smoothed weights.
        norms: ``[K]``, each gradient's norm when it last had signal; NaN before.
        applied: ``[K]``, coefficients of the raw gradients, as applied between refreshes.
        same: statistics of cosines with the batch that made the direction.
        next: statistics of cosines with a batch that the direction had not seen.
    """

    coefficients: Coefficients
    norms: Tensor
    applied: Tensor
    same: AlignmentStats
    next: AlignmentStats


class StepResult(NamedTuple):
    """One step's gradient by parameter name, the balancing state after it, and what to log."""

    gradient: Tree
    balance: Balance
    metrics: dict[str, float]
    refresh: dict[str, Any] | None


def init_balance(K: int) -> Balance:
    """Uniform weights; no norms seen."""
    uniform = torch.full((K,), 1.0 / K, dtype=torch.float64)
    return Balance(init_coefficients(K), uniform * torch.nan, uniform, init_alignment_stats(K), init_alignment_stats(K))


def step_gradient(
    policy: Policy,
    rows: Rows,
    balance: Balance,
    rule: Rule,
    loss: LossConfig,
    *,
    refresh: bool,
    uniform: bool,
    micro_batch: int,
    previous: Tree | None,
) -> StepResult:
    """The gradient of one optimiser step.

    An ordinary step is one backward pass per micro-batch, with the reward part of every row weighted by the current
    coefficients. A refresh accumulates all K gradients over the micro-batches first, solves once, and combines them.

    Args:
        policy: with ``default`` trained and ``old`` as it was when it sampled.
        rows: of the whole step.
        balance: state before the step.
        rule: the balancing rule.
        loss: the NFT loss.
        refresh: solve (or, with a fixed rule, measure) at this step.
        uniform: the uniform tail: weights 1/K whatever the rule says.
        micro_batch: rows at a time.
        previous: the gradient of the step before, whose cosines with this batch are measured.

    Returns:
        ``StepResult``.
    """
    weigh = signal_weights(rule, balance, loss.a_max, uniform)
    if not refresh:
        gradient, metrics = _plain(policy, rows, rule, balance, loss, weigh, micro_batch, uniform)
        return StepResult(gradient, balance, metrics, None)
    fixed = rule.kind != "solve" or uniform
    h, shared, metrics = _all_rows(policy, rows, rule, loss, weigh if fixed else None, micro_batch)
    K = rows.A.shape[1]
    own = {name: x[K] for name, x in h.items()} if fixed else None
    h = {name: x[:K] for name, x in h.items()}
    full = rule.gradients == "full"
    g = {name: x + shared[name] for name, x in h.items()} if full else h
    gram = gram_matrix(g)
    solution = solve(rule, gram)
    rho_used: float | None = None
    if own is not None:
        direction = own
        c, prox_scale = torch.full((K,), 1.0 / K, dtype=torch.float64), 1.0
    else:
        balance, rho_used, c = refreshed(rule, balance, gram, solution)
        direction, prox_scale = combine_rows(h, c), float(c.sum()) if full else 1.0
    gradient = {name: x + prox_scale * shared[name] for name, x in direction.items()}
    if full and loss.kl_weight > 0:
        pull = _kl_gradient(policy, rows, loss, micro_batch)
        gradient = {name: x + pull[name] for name, x in gradient.items()}
    balance, record = _record(balance, solution, gradient, g, c, previous, rho_used)
    return StepResult(gradient, balance, metrics, record)


def solve(rule: Rule, gram: Tensor) -> Harmonization:
    """The rule's weights for the K gradients of a Gram matrix; min-norm for a rule that does not solve."""
    if rule.solver != "min-norm":
        return harmonize(gram, solver=load_callable(rule.solver, "balance"))
    solution = harmonize(gram)
    if rule.normalize:
        return solution
    w = min_norm_weights(torch.where(solution.active & solution.active.unsqueeze(-1), gram, 0.0)) * solution.active
    w = w / w.sum().clamp(min=1e-12)
    return solution._replace(weights=w, coefficients=w)


def refreshed(rule: Rule, balance: Balance, gram: Tensor, solution: Harmonization) -> tuple[Balance, float, Tensor]:
    """The state after a refresh, the memory used by the smoothing, and the coefficients of this step.

    Stationary gradients change nothing. With the paper's amortization this step goes along the fresh solution, ours
    along the smoothed weights; a reward without signal keeps its coefficient.
    """
    if bool(solution.stationary):
        return balance, 1.0, balance.applied
    guard = Guard(gram, rule.guard) if rule.guard > 0 else None
    smoothed, rho_used = update_coefficients(balance.coefficients, solution, rho=rule.rho, guard=guard)
    on = solution.active
    norms = torch.where(on, solution.norms, balance.norms)
    n_bar = solution.norms[on].mean()
    if rule.normalize and rule.amortize == "norm_corrected":
        applied = n_bar * smoothed.weights / torch.where(norms > 0, norms, n_bar)
    else:
        applied = smoothed.weights
    c = solution.coefficients if rule.amortize == "paper" else applied
    return balance._replace(coefficients=smoothed, norms=norms, applied=applied), float(rho_used), c


def signal_weights(rule: Rule, balance: Balance, a_max: float, uniform: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """How a step without a solve weighs the reward part of each row: a function of ``A [B, K]`` and ``A_sum [B]``.

    Norm-corrected coefficients combine in r, which is exact with clamping; the others are the papers' rules, which
    combine advantages.
    """
    if rule.kind == "weighted-sum" and not uniform:
        return lambda A, A_sum: interpolation(A_sum, a_max=a_max) - 0.5
    if rule.kind == "uniform" or uniform:
        return lambda A, A_sum: interpolation(A.mean(-1), a_max=a_max) - 0.5
    c = balance.applied
    if rule.amortize == "paper":
        return lambda A, A_sum: interpolation(A @ c.to(A), a_max=a_max) - 0.5
    return lambda A, A_sum: (interpolation(A, a_max=a_max) - 0.5) @ c.to(A)


def micro_batches(rows: Rows, size: int) -> Iterator[Rows]:
    """The rows, ``size`` at a time."""
    for start in range(0, rows.x0.shape[0], size):
        yield Rows(*(x[start : start + size] for x in rows))


def _plain(
    policy: Policy,
    rows: Rows,
    rule: Rule,
    balance: Balance,
    loss: LossConfig,
    weigh: Callable[[Tensor, Tensor], Tensor],
    micro_batch: int,
    uniform: bool,
) -> tuple[Tree, dict[str, float]]:
    """One backward pass a micro-batch with the coefficients at hand."""
    B, trained = rows.x0.shape[0], parameters(policy)
    scaled = rule.gradients == "full" and rule.amortize == "norm_corrected" and rule.kind == "solve" and not uniform
    prox_scale = float(balance.applied.sum()) if scaled else 1.0
    total = {name: torch.zeros_like(p) for name, p in trained.items()}
    sums: dict[str, Tensor] = {}
    for part in micro_batches(rows, micro_batch):
        prox, signal, kl, log = _terms(policy, part, loss)
        objective = (prox_scale * prox + weigh(part.A, part.A_sum) * signal + loss.kl_weight * kl).sum() / B
        found = torch.autograd.grad(objective, list(trained.values()))
        for x, g in zip(total.values(), found, strict=True):
            x += g
        _add(sums, log | {"loss": objective.detach() * B})
    return total, {name: float(x) / B for name, x in sums.items()}


def _all_rows(
    policy: Policy,
    rows: Rows,
    rule: Rule,
    loss: LossConfig,
    weigh: Callable[[Tensor, Tensor], Tensor] | None,
    micro_batch: int,
) -> tuple[Tree, Tree, dict[str, float]]:
    """All K gradients of the reward part (with one more for ``weigh``), and that of the shared part, over the step."""
    B = rows.x0.shape[0]
    h: Tree = {}
    shared: Tree = {}
    sums: dict[str, Tensor] = {}
    kl_apart = rule.gradients == "full"
    for part in micro_batches(rows, micro_batch):
        columns = interpolation(part.A, a_max=loss.a_max) - 0.5
        if weigh is not None:
            columns = torch.cat([columns, weigh(part.A, part.A_sum).unsqueeze(-1)], dim=-1)
        log: dict[str, Tensor] = {}

        def forward(part: Rows = part, log: dict[str, Tensor] = log) -> tuple[Tensor, Tensor]:
            prox, signal, kl, seen = _terms(policy, part, loss)
            log.update(seen)
            return signal, (prox + (0.0 if kl_apart else loss.kl_weight) * kl).sum() / B

        fallback = "all" if rule.rows == "k_pass" else "error"
        result = shared_cotangent_rows(forward, policy.model, columns / B, fallback=fallback)  # type: ignore[arg-type]
        _add(h, result.rows)
        _add(shared, result.shared)
        assert result.shared_loss is not None
        _add(sums, log | {"loss": result.shared_loss * B})
    return h, shared, {name: float(x) / B for name, x in sums.items()}


def _kl_gradient(policy: Policy, rows: Rows, loss: LossConfig, micro_batch: int) -> Tree:
    """Gradient of the pull to the base alone, for the paper's rule, which scales everything else."""
    B, trained = rows.x0.shape[0], parameters(policy)
    total: Tree = {}
    for part in micro_batches(rows, micro_batch):
        _, _, kl, _ = _terms(policy, part, loss)
        found = torch.autograd.grad(loss.kl_weight * kl.sum() / B, list(trained.values()))
        _add(total, dict(zip(trained, found, strict=True)))
    return total


def _terms(policy: Policy, rows: Rows, loss: LossConfig) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """``prox``, ``signal`` and squared distance to the base of every row ``[B]``, and sums over rows to log."""
    t = rows.t.reshape(-1, 1, 1, 1)
    x_t = (1 - t) * rows.x0 + t * rows.noise
    condition = (rows.embeds, rows.pooled)
    with torch.no_grad():
        with active(policy, "old"):
            v_old = velocity(policy, x_t, rows.t, condition)
        if loss.kl_weight > 0:
            with active(policy, "base"):
                v_ref = velocity(policy, x_t, rows.t, condition)
    v = velocity(policy, x_t, rows.t, condition)
    l_pos, l_neg = branch_losses(v, v_old, x0=rows.x0, noise=rows.noise, t=rows.t, beta=loss.beta, form=loss.form)
    scale = loss.a_max / loss.beta if loss.form == "x0" else 1.0
    prox, signal = affine_terms(scale * l_pos, scale * l_neg)
    kl = (v - v_ref).square().flatten(1).mean(1) if loss.kl_weight > 0 else torch.zeros_like(prox)
    log = {
        "kl": kl.detach().sum(),
        "drift": (v - v_old).detach().square().flatten(1).mean(1).sum(),
        "v_norm": v.detach().square().flatten(1).mean(1).sqrt().sum(),
        "x0_abs": rows.x0.abs().flatten(1).mean(1).sum(),
    }
    return prox, signal, kl, log


def _add(total: dict[str, Tensor], more: dict[str, Tensor]) -> None:
    """Add tensors by name, in place in ``total``."""
    for name, x in more.items():
        total[name] = total[name] + x if name in total else x


def _record(
    balance: Balance,
    solution: Harmonization,
    gradient: Tree,
    g: Tree,
    c: Tensor,
    previous: Tree | None,
    rho_used: float | None,
) -> tuple[Balance, dict[str, Any]]:
    """Statistics and log entry of a refresh: cosines on this batch, and of the step before with this batch."""
    K = c.shape[0]
    same = cross_alignment(gradient, g)
    share = c / c.sum() if float(c.sum()) > 0 else c
    balance = balance._replace(
        same=update_alignment_stats(balance.same, same.cosines, share, solution.direction_norm, active=solution.active)
    )
    record: dict[str, Any] = {
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
        "null": null_alignment(K),
        "rho_used": rho_used,
        "next_cosines": None,
        "next_min_cosine": None,
    }
    if previous is not None:
        after = cross_alignment(previous, g)
        record |= {"next_cosines": after.cosines.tolist(), "next_min_cosine": float(after.minimum)}
        balance = balance._replace(
            next=update_alignment_stats(
                balance.next, after.cosines, share, solution.direction_norm, active=solution.active
            )
        )
    return balance, record


def is_finite(gradient: Tree) -> bool:
    """Whether every entry of a gradient is finite."""
    norms = torch.stack([x.detach().norm() for x in gradient.values()])
    return math.isfinite(float(norms.sum()))
