"""A balancing rule by its name, and how a training run feeds and applies it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from marble_core import interpolation
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
)
from reference.config.settings import Config
from reference.errors import ConfigError, TrainingError
from reference.interfaces import load_callable, place_of

# From advantages [B, K], those of the raw sum [B], coefficients [K] and a_max to the weight of each row's reward part.
Weighing = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def by_signals(A: Tensor, A_sum: Tensor, c: Tensor, a_max: float) -> Tensor:
    """Coefficients combine what each reward alone would weigh a row with: exact with clamping."""
    return (interpolation(A, a_max=a_max) - 0.5) @ c.to(A)


def by_advantages(A: Tensor, A_sum: Tensor, c: Tensor, a_max: float) -> Tensor:
    """Coefficients combine advantages, as in the paper."""
    return interpolation(A @ c.to(A), a_max=a_max) - 0.5


def by_mean(A: Tensor, A_sum: Tensor, c: Tensor, a_max: float) -> Tensor:
    """The mean advantage."""
    return interpolation(A.mean(-1), a_max=a_max) - 0.5


def by_raw_sum(A: Tensor, A_sum: Tensor, c: Tensor, a_max: float) -> Tensor:
    """The advantage of the sum of the raw rewards."""
    return interpolation(A_sum, a_max=a_max) - 0.5


def raw_sum_weights(A: Tensor, A_sum: Tensor) -> Tensor:
    """Coefficients ``[K]`` with which the raw sum adds the rewards' own advantages: ``A_sum = A c``, exactly so with
    one standard deviation for all prompts."""
    found: Tensor = torch.linalg.lstsq(A.double(), A_sum.double().unsqueeze(1), driver="gelsd").solution.squeeze(1)
    return found


class Method(NamedTuple):
    """A balancing rule, and how a training run feeds and applies it.

    Attributes:
        rule: from evidence to coefficients.
        every: optimiser steps between measurements of all K gradients; 0 for never.
        solves: whether the rule looks at them; if not, they are measured for the record.
        weigh: how coefficients weigh the rows of a step on which nothing is measured.
        memory: decay of the moments whose Gram matrices the rule is shown; None to show it the batch's.
        full: gradients of the whole loss are balanced, as in the paper; if not, those of its reward part.
    """

    rule: Rule
    every: int
    solves: bool = True
    weigh: Weighing = by_signals
    memory: float | None = None
    full: bool = False


def refreshes_at(method: Method, step: int) -> bool:
    """Whether all gradients are measured at a step, counted from 0."""
    return method.every > 0 and step % method.every == 0


def method_of(config: Config) -> Method:
    """The method of a run.

    Example:
        >>> method_of(Config(balance="marble-paper")).full
        True

    Raises:
        ConfigError: a rule of the user's own cannot be loaded.
    """
    K, s, measure = len(config.rewards), config.solve, config.log.measure_every
    prior = torch.tensor(s.prior or [1.0] * K, dtype=torch.float64)
    rho, guard = _or(s.rho, 0.7), _or(s.guard, 0.5)
    match config.balance:
        case "weighted-sum":
            return Method(uniform(K), measure, solves=False, weigh=by_raw_sum)
        case "uniform":
            return Method(uniform(K), measure, solves=False, weigh=by_mean)
        case "soft-min":
            tilted = soft_min(K, strength=_or(s.strength, 4.0), keep=_or(s.keep, 0.5), prior=prior)
            return Method(tilted, measure, solves=False)
        case "marble":
            return Method(marble(K, rho=rho, guard=guard), _or(s.refresh_every, 10))
        case "marble-paper":
            return Method(marble_paper(K, rho=rho), _or(s.refresh_every, 10), weigh=by_advantages, full=True)
        case "catch-up":
            lagging = catch_up(K, ahead=_or(s.ahead, 0.25), prior=prior / prior.sum())
            return Method(lagging, _or(s.refresh_every, 1), memory=_or(s.decay, 0.8))
        case "noise-aware":
            known = noise_aware(K, prior=prior / prior.sum())
            return Method(known, _or(s.refresh_every, 1), memory=_or(s.decay, 0.8))
        case "cone":
            turned = cone(K, prior=prior / prior.sum())
            return Method(turned, _or(s.refresh_every, 1), memory=_or(s.decay, 0.9))
    return Method(_own(config.balance, K, rho), _or(s.refresh_every, 10), memory=s.decay)


N = TypeVar("N", int, float)


def _or(value: N | None, default: N) -> N:
    """A switch, or what the rule says where it is not set."""
    return default if value is None else value


def _own(path: str, K: int, rho: float) -> Rule:
    """A rule of the user's: ``callable(num_rewards) -> Rule``, or from the Gram matrix of unit gradients to weights,
    which ``marble`` then uses in place of the min-norm point, without its guard: that is about the shortest direction.

    Raises:
        ConfigError: it cannot be loaded, or makes no rule.
    """
    found = load_callable(path, "balance")
    if "num_rewards" not in inspect.signature(found).parameters:
        return marble(K, rho=rho, guard=0.0, solver=_checked_solver(found, path))
    try:
        rule = found(num_rewards=K)
    except Exception as error:
        raise ConfigError(f"balance {path!r} raised {place_of(error)}") from error
    if not isinstance(rule, Rule):
        raise ConfigError(
            f"balance {path!r}: expected a marble_core.rules.Rule for num_rewards = {K}, got {type(rule).__name__}."
        )
    return rule._replace(update=_checked_update(rule, path, K))


def _checked_solver(solver: Callable[[Tensor], Tensor], path: str) -> Callable[[Tensor], Tensor]:
    """A solver whose faults are said as what they are."""

    def checked(gram: Tensor) -> Tensor:
        try:
            weights = solver(gram)
        except Exception as error:
            raise TrainingError(f"balance {path!r} raised {place_of(error)}") from error
        if bool(gram.isfinite().all()):
            _check_weights(weights, path, gram.shape[-1])
        return weights

    return checked


def _checked_update(rule: Rule, path: str, K: int) -> Callable[[Any, Evidence], tuple[Any, Tensor]]:
    """A rule's update, whose faults are said as what they are."""

    def checked(state: Any, evidence: Evidence) -> tuple[Any, Tensor]:
        try:
            state, c = rule.update(state, evidence)
        except Exception as error:
            raise TrainingError(f"balance {path!r} raised {place_of(error)}") from error
        _check_weights(c, path, K)
        return state, c

    return checked


def _check_weights(weights: object, path: str, K: int) -> None:
    """Raise unless a rule returned K finite numbers."""
    if not isinstance(weights, Tensor) or weights.shape != (K,) or not weights.is_floating_point():
        got = f"{weights.dtype} {list(weights.shape)}" if isinstance(weights, Tensor) else type(weights).__name__
        raise TrainingError(f"balance {path!r}: expected a float tensor of K = {K} weights, got {got}.")
    if not bool(weights.isfinite().all()):
        raise TrainingError(f"balance {path!r}: expected finite weights, got {weights.tolist()}.")
