"""A balancing rule by its name, and how a training run feeds and applies it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from marble_core import interpolation, restore_spread
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
from reference.config.settings import Config, SolveConfig
from reference.errors import ConfigError, TrainingError
from reference.interfaces import load_callable, place_of

# From advantages [B, K], those of the raw sum [B], coefficients [K] and a_max to the weight of each row's reward part.
Weighing = Callable[[Tensor, Tensor, Tensor, float], Tensor]
# From a rule's coefficients [K], the advantages [N, K] of an epoch and those of the raw sum [N] to those applied.
Fitting = Callable[[Tensor, Tensor, Tensor], Tensor]


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


def as_given(c: Tensor, A: Tensor, A_sum: Tensor) -> Tensor:
    """What the rule says."""
    return c


def to_raw_sum(c: Tensor, A: Tensor, A_sum: Tensor) -> Tensor:
    """Coefficients with which the raw sum adds the rewards' own advantages: ``A_sum = A c``, exactly so with one
    standard deviation for all prompts."""
    found: Tensor = torch.linalg.lstsq(A.double(), A_sum.double().unsqueeze(1), driver="gelsd").solution.squeeze(1)
    return found


def to_spread(c: Tensor, A: Tensor, A_sum: Tensor) -> Tensor:
    """The combined advantage varies as much as its parts, as GDPO's last step has it."""
    return restore_spread(c, A)


class Method(NamedTuple):
    """A balancing rule, and how a training run feeds and applies it.

    Attributes:
        rule: from evidence to coefficients.
        every: optimiser steps between measurements of all K gradients; 0 for never.
        solves: whether the rule looks at them; if not, they are measured for the record.
        weigh: how coefficients weigh the rows of a step on which nothing is measured.
        memory: decay of the moments whose Gram matrices the rule is shown; None to show it the batch's.
        full: gradients of the whole loss are balanced, as in the paper; if not, those of its reward part.
        fit: of the coefficients to the advantages of an epoch.
    """

    rule: Rule
    every: int
    solves: bool = True
    weigh: Weighing = by_signals
    memory: float | None = None
    full: bool = False
    fit: Fitting = as_given


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
    shares = prior / prior.sum()
    rho, guard = _or(s.rho, 0.7), _or(s.guard, 0.5)
    match config.balance:
        case "weighted-sum":
            return Method(uniform(K), measure, solves=False, weigh=by_raw_sum, fit=to_raw_sum)
        case "uniform":
            return Method(uniform(K), measure, solves=False, weigh=by_mean)
        case "gdpo":
            return Method(uniform(K), measure, solves=False, weigh=by_advantages, fit=to_spread)
        case "soft-gdpo":
            return Method(_soft_min(K, s, prior), measure, solves=False, weigh=by_advantages, fit=to_spread)
        case "soft-min":
            return Method(_soft_min(K, s, prior), measure, solves=False)
        case "marble":
            return Method(marble(K, rho=rho, guard=guard), _or(s.refresh_every, 10))
        case "marble-paper":
            return Method(marble_paper(K, rho=rho), _or(s.refresh_every, 10), weigh=by_advantages, full=True)
        case "catch-up":
            lagging = catch_up(K, ahead=_or(s.ahead, 0.25), prior=shares)
            return Method(lagging, _or(s.refresh_every, 1), memory=_or(s.decay, 0.8))
        case "noise-aware":
            known = noise_aware(K, prior=shares)
            return Method(known, _or(s.refresh_every, 1), memory=_or(s.decay, 0.8))
        case "cone":
            turned = cone(K, prior=shares)
            return Method(turned, _or(s.refresh_every, 1), memory=_or(s.decay, 0.9))
        case "upgrad":
            return Method(upgrad(K, prior=shares), _or(s.refresh_every, 1))
    return Method(_own(config.balance, K, s.rho), _or(s.refresh_every, 10), memory=s.decay)


def _soft_min(K: int, s: SolveConfig, prior: Tensor) -> Rule:
    return soft_min(K, strength=_or(s.strength, 4.0), keep=_or(s.keep, 0.5), prior=prior)


N = TypeVar("N", int, float)


def _or(value: N | None, default: N) -> N:
    """A switch, or what the rule says where it is not set."""
    return default if value is None else value


def _own(path: str, K: int, rho: float | None) -> Rule:
    """A rule of the user's: ``callable(num_rewards) -> Rule``, or from the Gram matrix of unit gradients to weights,
    which ``marble`` then uses in place of the min-norm point, without its guard: that is about the shortest direction.

    Raises:
        ConfigError: it cannot be loaded, makes no rule, takes no ``rho``, or its state could not be saved.
    """
    found = load_callable(path, "balance")
    if not _makes_rule(found, path):
        return marble(K, rho=_or(rho, 0.7), guard=0.0, solver=_checked_solver(found, path))
    if rho is not None:
        raise ConfigError(
            f"solve.rho: expected none with balance {path!r}, which makes a whole rule, got {rho}: only the weights of "
            "a solver are smoothed. Leave it out, or set it within the rule."
        )
    try:
        rule = found(num_rewards=K)
        state = rule.init() if isinstance(rule, Rule) else None
    except Exception as error:
        raise ConfigError(f"balance {path!r} raised {place_of(error)}") from error
    if not isinstance(rule, Rule):
        raise ConfigError(
            f"balance {path!r}: expected a marble_core.rules.Rule for num_rewards = {K}, got {type(rule).__name__}."
        )
    if fault := _not_saved(state, state):
        raise ConfigError(f"balance {path!r}: expected init() to return {fault}")
    return rule._replace(update=_checked_update(rule, path, K))


def _makes_rule(found: Callable[..., Any], path: str) -> bool:
    """Whether a callable takes ``num_rewards``: it then makes a rule, and is a solver otherwise."""
    try:
        return "num_rewards" in inspect.signature(found).parameters
    except (TypeError, ValueError) as error:  # one that is written in C
        raise ConfigError(
            f"balance {path!r}: expected a function that takes num_rewards and returns a rule, or one from a Gram "
            f"matrix to weights, got one that does not say what it takes ({error}). Wrap it in a function of your own."
        ) from error


def _not_saved(state: Any, first: Any) -> str:
    """Why a rule's state could not go into a checkpoint and come back in the form of the first one; empty if it can."""
    leaves, form = pytree.tree_flatten(state)
    odd = [type(x).__name__ for x in leaves if not isinstance(x, Tensor)]
    if odd:
        return (
            f"tensors, alone or in tuples, lists or dictionaries, which a checkpoint can hold, got {odd[0]}. Write a "
            "number as torch.tensor(0.0), and () where there is nothing to remember."
        )
    if form != pytree.tree_structure(first):
        return (
            f"{len(pytree.tree_leaves(first))} tensors in the places of those of init(), got {len(leaves)} in others."
        )
    return ""


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
            after, c = rule.update(state, evidence)
        except Exception as error:
            raise TrainingError(f"balance {path!r} raised {place_of(error)}") from error
        _check_weights(c, path, K)
        if fault := _not_saved(after, state):
            raise TrainingError(f"balance {path!r}: expected the state after an update to be {fault}")
        return after, c

    return checked


def _check_weights(weights: object, path: str, K: int) -> None:
    """Raise unless a rule returned K finite numbers."""
    if not isinstance(weights, Tensor) or weights.shape != (K,) or not weights.is_floating_point():
        got = f"{weights.dtype} {list(weights.shape)}" if isinstance(weights, Tensor) else type(weights).__name__
        raise TrainingError(f"balance {path!r}: expected a float tensor of K = {K} weights, got {got}.")
    if not bool(weights.isfinite().all()):
        raise TrainingError(f"balance {path!r}: expected finite weights, got {weights.tolist()}.")
