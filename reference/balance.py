"""From the rows of one optimiser step to one gradient: accumulate K gradients, refresh the coefficients, apply them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from marble_core import (
    Coefficients,
    Guard,
    Harmonization,
    affine_terms,
    branch_losses,
    combine_rows,
    cone_weights,
    cross_alignment,
    harmonize,
    init_coefficients,
    interpolation,
    min_norm_weights,
    null_alignment,
    shared_cotangent_rows,
    shrink_to_prior,
    update_coefficients,
)
from reference.config import SOLVERS, LossConfig, Rule
from reference.distributed import ALONE, World, all_reduce, check_peers
from reference.estimate import Estimate, Signal, Tree, collect, init_estimate, observe
from reference.policy import Policy, active, merged, parameters, velocity
from reference.scoring import load_callable

_LOGGED = ("kl", "drift", "v_norm", "x0_abs", "loss")  # means over the rows of a step


class Rows(NamedTuple):
    """The rows of one optimiser step, ``B`` pairs of an image and a timestep, or a micro-batch of them.

    Attributes:
        x0: ``[B, C, H, W]``, clean latents.
        noise: ``[B, C, H, W]``.
        t: ``[B]``.
        embeds: ``[P, L, D]``, embeddings of the prompts, where the model is; the rest may be elsewhere.
        pooled: ``[P, D']``, pooled ones.
        A: ``[B, K]``, advantages, one column a reward.
        A_sum: ``[B]``, advantages of the weighted sum of the raw rewards.
        half: ``[B]``, 0 and then 1: the two halves share no prompt.
        prompt: ``[B]``, which of the P prompts is a row's.
    """

    x0: Tensor
    noise: Tensor
    t: Tensor
    embeds: Tensor
    pooled: Tensor
    A: Tensor
    A_sum: Tensor
    half: Tensor
    prompt: Tensor


class Balance(NamedTuple):
    """What balancing carries from step to step.

    Attributes:
        coefficients: smoothed weights.
        norms: ``[K]``, each gradient's norm when it last had signal; NaN before.
        applied: ``[K]``, coefficients of the raw gradients, as applied between refreshes; with the solvers ``cone`` and
            ``prior``, what is added to the prior.
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
        collect: compute all K gradients for the refresh that is near.
        uniform: the uniform tail: weights 1/K whatever the rule says.
        prior: ``[K]``, weights of the advantages before balancing, on the simplex.
        metric: diagonal of the optimiser's inverse metric by name, or None.
        previous: the gradient of the step before, whose cosines with this batch are measured.
    """

    refresh: bool
    collect: bool
    uniform: bool
    prior: Tensor
    metric: Tree | None
    previous: Tree | None


class Whole(NamedTuple):
    """A step over all processes, each of which has some of its rows, or none.

    Attributes:
        world: the processes.
        first: rows of the step's first half.
        total: rows of the step.
    """

    world: World
    first: int
    total: int


class Part(NamedTuple):
    """Gradients of some of a step's rows by parameter name, and sums over those rows of what is logged.

    Attributes:
        h: ``[K, *shape]``, or one more: of the reward part.
        shared: ``[*shape]``, of the shared part.
        pull: ``[*shape]``, of the pull to the base, where it is not in the shared part; else empty.
        sums: ``[]`` each.
    """

    h: Tree
    shared: Tree
    pull: Tree
    sums: dict[str, Tensor]


class StepResult(NamedTuple):
    """One step's gradient by parameter name, the balancing state after it, and what to log."""

    gradient: Tree
    balance: Balance
    metrics: dict[str, float]
    refresh: dict[str, Any] | None


def init_balance(K: int, rule: Rule, trained: Mapping[str, Tensor]) -> Balance:
    """Uniform weights; nothing seen."""
    uniform = torch.full((K,), 1.0 / K, dtype=torch.float64)
    applied = uniform * 0 if rule.solver in ("cone", "prior") else uniform
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
    if not (step.refresh or step.collect):
        gradient, metrics = _plain(policy, rows, rule, balance, loss, weigh, micro_batch, step.uniform, whole)
        return StepResult(gradient, balance, metrics, None)
    K, full = rows.A.shape[1], rule.gradients == "full"
    fixed = not step.refresh or rule.kind != "solve" or step.uniform
    parts = [
        all_rows(policy, part, rule, loss, weigh if fixed else None, micro_batch, total, whole.world)
        for part, total in _halves(rows, whole)
    ]
    a, b, last, shared, pull, metrics = _joined(all_reduce(parts, whole.world), whole, K)
    own = last if fixed else None
    h = {name: (a[name] + b[name]) / 2 for name in a}
    estimate, sum_a, sum_b = collect(balance.estimate, a, b, rule)
    balance = balance._replace(estimate=estimate)
    if not step.refresh:
        assert own is not None
        gradient = {name: x + shared[name] for name, x in own.items()}
        return StepResult(_added(gradient, pull), balance, metrics, None)
    estimate, signal = observe(estimate, sum_a, sum_b, shared if full else None, rule, step.metric)
    balance = balance._replace(estimate=estimate)
    solution = solve(rule, signal, step.prior)
    rho_used, prox_scale = None, 1.0
    if own is not None:
        direction, c = own, step.prior if rule.solver == "prior" else torch.full((K,), 1.0 / K, dtype=torch.float64)
    else:
        balance, rho_used, c = refreshed(rule, balance, signal.gram, solution, step.prior)
        direction, prox_scale = combine_rows(signal.rows or h, c), float(c.sum()) if full else 1.0
    gradient = {name: x + prox_scale * shared[name] for name, x in direction.items()}
    gradient = _added(gradient, pull)
    g = {name: x + shared[name] for name, x in h.items()} if full else h
    record = _record(balance, solution, signal, gradient, g, c, step.previous, rho_used)
    return StepResult(gradient, balance, metrics, record)


def solve(rule: Rule, signal: Signal, prior: Tensor) -> Harmonization:
    """The rule's weights for K gradients, from what is known of their Gram; min-norm for a rule that does not solve.

    ``cone`` and ``prior`` have no weights of unit gradients: theirs are the shares of the coefficients.
    """
    gram = signal.gram
    if rule.shrink:  # a norm that cannot be told from zero must not blow a coefficient up
        square = gram.diagonal()
        gram = gram + torch.diag((signal.error.nan_to_num(0.0) - square).clamp(min=0))
    if rule.solver not in SOLVERS:
        solution = harmonize(gram, solver=load_callable(rule.solver, "balance"))
    else:
        solution = harmonize(gram)
    if rule.solver in ("cone", "prior"):
        c = cone_weights(gram, prior) if rule.solver == "cone" else prior
        c = shrink_to_prior(c, prior, signal.square, signal.error) if rule.shrink else c
        return solution._replace(weights=c / c.sum(), coefficients=c)
    w = solution.weights
    if not rule.normalize:
        w = min_norm_weights(torch.where(solution.active & solution.active.unsqueeze(-1), gram, 0.0)) * solution.active
    if rule.shrink:
        w = shrink_to_prior(w, prior, signal.square, signal.error) * solution.active
    if rule.normalize and not rule.shrink:
        return solution
    w = w / w.sum().clamp(min=1e-12)
    n_bar = solution.norms[solution.active].mean()
    c = torch.where(solution.active, n_bar * w / solution.norms, 0.0) if rule.normalize else w
    return solution._replace(weights=w, coefficients=c)


def refreshed(
    rule: Rule, balance: Balance, gram: Tensor, solution: Harmonization, prior: Tensor
) -> tuple[Balance, float, Tensor]:
    """The state after a refresh, the memory used by the smoothing, and the coefficients of this step.

    Stationary gradients change nothing. With the paper's amortization this step goes along the fresh solution, ours
    along the smoothed weights; a reward without signal keeps its coefficient.
    """
    if rule.solver in ("cone", "prior"):
        c = solution.coefficients
        return balance._replace(applied=c - prior), 1.0, c
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


def applied_coefficients(rule: Rule, balance: Balance, prior: Tensor) -> Tensor:
    """Coefficients of the raw gradients between refreshes ``[K]``."""
    return balance.applied + prior if rule.solver in ("cone", "prior") else balance.applied


def signal_weights(rule: Rule, balance: Balance, a_max: float, step: Step) -> Callable[[Tensor, Tensor], Tensor]:
    """How a step without a solve weighs the reward part of each row: a function of ``A [B, K]`` and ``A_sum [B]``.

    Norm-corrected coefficients combine in r, which is exact with clamping; the others are the papers' rules, which
    combine advantages.
    """
    if rule.kind == "weighted-sum" and not step.uniform:
        return lambda A, A_sum: interpolation(A_sum, a_max=a_max) - 0.5
    if rule.kind == "uniform" or step.uniform:
        return lambda A, A_sum: interpolation(A.mean(-1), a_max=a_max) - 0.5
    c = applied_coefficients(rule, balance, step.prior)
    if rule.amortize == "paper":
        return lambda A, A_sum: interpolation(A @ c.to(A), a_max=a_max) - 0.5
    return lambda A, A_sum: (interpolation(A, a_max=a_max) - 0.5) @ c.to(A)


def part_of(rows: Rows, part: slice) -> Rows:
    """Some of the rows, with the embeddings of all prompts."""
    own = [name for name in Rows._fields if name not in ("embeds", "pooled")]
    return rows._replace(**{name: getattr(rows, name)[part] for name in own})


def micro_batches(rows: Rows, size: int, world: World = ALONE) -> Iterator[Rows]:
    """The rows, ``size`` at a time, where the model is; not to the end if another process has failed meanwhile."""
    for start in range(0, rows.x0.shape[0], size):
        check_peers(world)
        yield Rows(*(x.to(rows.embeds.device) for x in part_of(rows, slice(start, start + size))))


def _plain(
    policy: Policy,
    rows: Rows,
    rule: Rule,
    balance: Balance,
    loss: LossConfig,
    weigh: Callable[[Tensor, Tensor], Tensor],
    micro_batch: int,
    uniform: bool,
    whole: Whole,
) -> tuple[Tree, dict[str, float]]:
    """One backward pass a micro-batch with the coefficients at hand."""
    B, trained = whole.total, parameters(policy)
    scaled = rule.gradients == "full" and rule.amortize == "norm_corrected" and rule.kind == "solve" and not uniform
    prox_scale = float(balance.applied.sum()) if scaled else 1.0
    total, sums = _zeros(trained), _no_sums(rows)
    for part in micro_batches(rows, micro_batch, whole.world):
        prox, signal, kl, log = _terms(policy, part, loss)
        objective = (prox_scale * prox + weigh(part.A, part.A_sum) * signal + loss.kl_weight * kl).sum() / B
        found = torch.autograd.grad(objective, list(trained.values()))
        for x, g in zip(total.values(), found, strict=True):
            x += g
        _add(sums, log | {"loss": objective.detach() * B})
    total, sums = all_reduce((total, sums), whole.world)
    return total, {name: float(x) / B for name, x in sums.items()}


def _halves(rows: Rows, whole: Whole) -> list[tuple[Rows, int]]:
    """This process's rows of either half, and how many all processes have; undivided where one half is empty."""
    if whole.first in (0, whole.total):  # a single image: nothing to compare it with
        return [(rows, whole.total)]
    own, end = int((rows.half == 0).sum()), rows.x0.shape[0]
    return [(part_of(rows, slice(own)), whole.first), (part_of(rows, slice(own, end)), whole.total - whole.first)]


def _joined(parts: list[Part], whole: Whole, K: int) -> tuple[Tree, Tree, Tree, Tree, Tree, dict[str, float]]:
    """All K gradients of the reward part, as means over either half of the rows; the last row of each (what the
    coefficients at hand make of them, if that was asked for), the shared part and the pull, over all rows; and what
    to log."""
    B, first = whole.total, whole.first
    if len(parts) == 1:
        h, shared, pull, sums = parts[0]
        rows, own = {name: x[:K] for name, x in h.items()}, {name: x[-1] for name, x in h.items()}
        return rows, rows, own, shared, pull, {name: float(x) / B for name, x in sums.items()}
    (h_a, shared_a, pull_a, sums_a), (h_b, shared_b, pull_b, sums_b) = parts
    p, q = first / B, 1 - first / B
    a, b = ({name: 2 * share * x[:K] for name, x in h.items()} for share, h in ((p, h_a), (q, h_b)))
    own = {name: p * x[-1] + q * h_b[name][-1] for name, x in h_a.items()}
    shared, pull = (
        {name: p * x + q * other[name] for name, x in tree.items()}
        for tree, other in ((shared_a, shared_b), (pull_a, pull_b))
    )
    means = {name: p * (float(x) / first) + q * (float(sums_b[name]) / (B - first)) for name, x in sums_a.items()}
    return a, b, own, shared, pull, means


def all_rows(
    policy: Policy,
    rows: Rows,
    rule: Rule,
    loss: LossConfig,
    weigh: Callable[[Tensor, Tensor], Tensor] | None,
    micro_batch: int,
    total: int | None = None,
    world: World = ALONE,
) -> Part:
    """All K gradients of the reward part (with one more for ``weigh``), and those of the shared part and of the pull to
    the base, over the rows. A rule that balances full gradients scales the shared part, and never the pull: only then
    they are apart.

    Args:
        total: the number of rows over which means are taken, where other processes have some of them.
        world: these processes; what they have is not added here.
    """
    B, K, trained = total or rows.x0.shape[0], rows.A.shape[1], parameters(policy)
    h: Tree = {}
    shared: Tree = {}
    apart = rule.gradients == "full" and loss.kl_weight > 0
    pull = _zeros(trained) if apart else {}
    sums = _no_sums(rows)
    for part in micro_batches(rows, micro_batch, world):
        columns = interpolation(part.A, a_max=loss.a_max) - 0.5
        if weigh is not None:
            columns = torch.cat([columns, weigh(part.A, part.A_sum).unsqueeze(-1)], dim=-1)
        log: dict[str, Tensor] = {}

        def forward(part: Rows = part, log: dict[str, Tensor] = log) -> tuple[Tensor, Tensor]:
            prox, signal, kl, seen = _terms(policy, part, loss)
            log.update(seen)
            kl = loss.kl_weight * kl.sum() / B
            if not apart:
                return signal, prox.sum() / B + kl
            found = torch.autograd.grad(kl, list(trained.values()), retain_graph=True)
            _add(pull, dict(zip(trained, found, strict=True)))
            return signal, prox.sum() / B

        fallback = "all" if rule.rows == "k_pass" else "error"
        result = shared_cotangent_rows(forward, policy.model, columns / B, fallback=fallback)  # type: ignore[arg-type]
        _add(h, result.rows)
        _add(shared, result.shared)
        assert result.shared_loss is not None
        _add(sums, log | {"loss": result.shared_loss * B})
    if not h:  # no rows of this process
        shared = _zeros(trained)
        h = {name: p.new_zeros(K + (weigh is not None), *p.shape) for name, p in shared.items()}
    return Part(h, shared, pull, sums)


def _terms(policy: Policy, rows: Rows, loss: LossConfig) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """``prox``, ``signal`` and squared distance to the base of every row ``[B]``, and sums over rows to log."""
    t = rows.t.reshape(-1, 1, 1, 1)
    x_t = (1 - t) * rows.x0 + t * rows.noise
    condition = (rows.embeds[rows.prompt], rows.pooled[rows.prompt])
    with torch.no_grad():
        with merged(policy, "old"):
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


def _zeros(trained: Mapping[str, Tensor]) -> Tree:
    """A gradient of nothing."""
    return {name: torch.zeros_like(p, requires_grad=False) for name, p in trained.items()}


def _no_sums(rows: Rows) -> dict[str, Tensor]:
    """Sums over no rows of what is logged."""
    return {name: rows.embeds.new_zeros((), dtype=rows.x0.dtype) for name in _LOGGED}


def _added(gradient: Tree, pull: Tree) -> Tree:
    """A gradient and the pull to the base, where that is apart."""
    return {name: x + pull[name] for name, x in gradient.items()} if pull else gradient


def _add(total: dict[str, Tensor], more: dict[str, Tensor]) -> None:
    """Add tensors by name, in place in ``total``."""
    for name, x in more.items():
        total[name] = total[name] + x if name in total else x


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
        "null": null_alignment(len(c)),
        "rho_used": rho_used,
        "next_cosines": after.cosines.tolist() if after else None,
        "next_min_cosine": float(after.minimum) if after else None,
    }


def is_finite(gradient: Tree) -> bool:
    """Whether every entry of a gradient is finite."""
    norms = torch.stack([x.detach().norm() for x in gradient.values()])
    return math.isfinite(float(norms.sum()))
