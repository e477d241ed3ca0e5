"""From the rows of one optimiser step to one gradient: accumulate K gradients, ask the rule, apply its coefficients."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from marble_core import combine_rows
from marble_core.rules import Evidence
from reference.config.settings import LossConfig
from reference.policy.adapters import Policy
from reference.processes.sums import all_reduce
from reference.step.estimate import Estimate, Tree, init_estimate, observe
from reference.step.gradients import Asked, Rows, Whole, all_rows, one_gradient
from reference.step.halves import Joined, halves, joined
from reference.step.measurement import refresh_record
from reference.step.method import Method, by_signals


class Balance(NamedTuple):
    """What balancing carries from step to step: the rule's state, and what is known of the signals."""

    rule: Any
    estimate: Estimate


class Step(NamedTuple):
    """What the loop says about a step.

    Attributes:
        refresh: measure all K gradients, and let the rule see them.
        gains: ``[K]``, of the rewards since the start; NaN where not known.
        A: ``[N, K]``, advantages of all images of the epoch.
        A_sum: ``[N]``, those of the weighted sum of the raw rewards.
        previous: the gradient of the step before, whose cosines with this batch are measured.
        micro_batch: rows at a time.
        whole: the step over all processes.
        verify: compare the rows of this refresh with autograd's.
    """

    refresh: bool
    gains: Tensor
    A: Tensor
    A_sum: Tensor
    previous: Tree | None
    micro_batch: int
    whole: Whole
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


def init_balance(K: int, method: Method, trained: Mapping[str, Tensor]) -> Balance:
    """Nothing seen."""
    return Balance(method.rule.init(), init_estimate(K, method.memory, trained))


def step_gradient(
    policy: Policy, rows: Rows, balance: Balance, method: Method, loss: LossConfig, step: Step
) -> StepResult:
    """The gradient of one optimiser step.

    An ordinary step is one backward pass per micro-batch, with the reward part of every row weighted by the current
    coefficients. A refresh accumulates all K gradients over the micro-batches first, asks the rule once, and combines
    them. Several processes add up what they have accumulated, once a step, before anything is made of it; all get the
    same result.

    Args:
        policy: with ``default`` trained and ``old`` as it was when it sampled.
        rows: of the step, on this process.
        balance: state before the step.
        method: the balancing rule.
        loss: the NFT loss.
        step: what to do.

    Raises:
        PeerError: another process has failed.
        TrainingError: a rule of the user's own is at fault.
    """
    if step.refresh and (method.solves or method.weigh is by_signals):
        return _combined(policy, rows, balance, method, loss, step)
    state, c = _coefficients(balance, method, Evidence(), step)
    balance = balance._replace(rule=state)

    def weigh(A: Tensor, A_sum: Tensor) -> Tensor:
        return method.weigh(A, A_sum, c, loss.a_max)

    if step.refresh:
        found = _measured(policy, rows, loss, Asked(weigh, False, step.micro_batch, step.verify), step.whole)
        return _recorded(found, balance, c, step)
    gradient, metrics = one_gradient(policy, rows, loss, weigh, step.micro_batch, step.whole)
    return StepResult(gradient, balance, c, metrics, None)


def _coefficients(balance: Balance, method: Method, evidence: Evidence, step: Step) -> tuple[Any, Tensor]:
    """The rule's next state, and what the gradients are multiplied by."""
    state, c = method.rule.update(balance.rule, evidence._replace(gains=step.gains))
    return state, method.fit(c, step.A, step.A_sum)


def _combined(policy: Policy, rows: Rows, balance: Balance, method: Method, loss: LossConfig, step: Step) -> StepResult:
    """A step along the direction that a rule makes of all K gradients of this batch."""
    found = _measured(policy, rows, loss, Asked(None, method.full, step.micro_batch, step.verify), step.whole)
    shared = found.shared if method.full else None
    estimate, measured, evidence = observe(balance.estimate, found.a, found.b, shared, method.memory)
    state, c = _coefficients(balance, method, evidence, step)
    h = {name: (found.a[name] + x) / 2 for name, x in found.b.items()}
    scale = float(c.sum()) if method.full else 1.0
    direction = combine_rows(h, c)
    gradient = _added({name: x + scale * found.shared[name] for name, x in direction.items()}, found.pull)
    g = {name: x + found.shared[name] for name, x in h.items()} if method.full else h
    record = refresh_record(measured, gradient, g, c, step.previous)
    return StepResult(gradient, Balance(state, estimate), c, found.metrics, record)


def _recorded(found: Joined, balance: Balance, c: Tensor, step: Step) -> StepResult:
    """A step whose gradient clamping makes no combination of the K gradients, which are measured for the record."""
    estimate, measured, _ = observe(balance.estimate, found.a, found.b, None, None)
    gradient = {name: x + found.shared[name] for name, x in found.own.items()}
    h = {name: (found.a[name] + x) / 2 for name, x in found.b.items()}
    record = refresh_record(measured, gradient, h, c, step.previous)
    return StepResult(gradient, balance._replace(estimate=estimate), c, found.metrics, record)


def _measured(policy: Policy, rows: Rows, loss: LossConfig, asked: Asked, whole: Whole) -> Joined:
    """All K gradients of a step, over all processes; only its first half is verified."""
    parts = [
        all_rows(policy, part, loss, asked._replace(verify=asked.verify and i == 0), total, whole.peers)
        for i, (part, total) in enumerate(halves(rows, whole))
    ]
    return joined(all_reduce(parts, whole.peers), whole, rows.A.shape[1])


def _added(gradient: Tree, pull: Tree) -> Tree:
    """A gradient and the pull to the base, where that is apart."""
    return {name: x + pull[name] for name, x in gradient.items()} if pull else gradient


def is_finite(gradient: Tree) -> bool:
    """Whether every entry of a gradient is finite."""
    norms = torch.stack([x.detach().norm() for x in gradient.values()])
    return math.isfinite(float(norms.sum()))
