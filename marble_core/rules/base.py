"""What a rule looks at, and what a rule is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from marble_core._check import (
    describe,
    has_readable_values,
    require,
    require_float,
    require_prior,
    require_vector,
)


class Evidence(NamedTuple):
    """What was measured for a step. A step on which nothing was measured has none of it: rules then go on as before.

    Attributes:
        gram: ``[K, K]``, Gram matrix of the step's gradients.
        cross: ``[K, K]``, cross-Gram matrix of independent halves: unbiased, perhaps averaged over steps.
        gains: ``[K]``, how far each reward has come since the start, in standard deviations; NaN where not known.
        certainty: ``[K]``, each signal's squared length over the standard error of that; NaN where not known.
    """

    gram: Tensor | None = None
    cross: Tensor | None = None
    gains: Tensor | None = None
    certainty: Tensor | None = None


class Rule(NamedTuple):
    """A balancing rule.

    Attributes:
        init: ``init() -> state``, a pytree of tensors on the CPU: ``()``, a float64 tensor, or ``Smoothed``, a
            NamedTuple. To save and load it: docs/cookbook.md, "Save and resume".
        update: ``update(state, evidence) -> (state, coefficients)`` with the coefficients ``[K]`` of the K gradients of
            this step, float64. Pure: the same evidence gives the same, and nothing that goes in is changed. The
            coefficients are the caller's own: changing them in place changes no state.
    """

    init: Callable[[], Any]
    update: Callable[[Any, Evidence], tuple[Any, Tensor]]


def require_count(num_rewards: int) -> None:
    """Raise unless the number of rewards is a positive integer."""
    ok = isinstance(num_rewards, int) and not isinstance(num_rewards, bool) and num_rewards >= 1
    require(ok, "num_rewards", "an integer of at least 1", describe(num_rewards))


def matrix_of(name: str, x: Tensor, K: int) -> Tensor:
    """A ``[K, K]`` matrix of the evidence in float64 on the CPU, where K x K numbers are solved."""
    require_float(f"evidence.{name}", x, "[K, K]", (2,))
    require(x.shape == (K, K), f"evidence.{name}", f"[K, K] = [{K}, {K}]", describe(x))
    return x.detach().double().cpu()


def vector_of(name: str, x: Tensor, K: int) -> Tensor:
    """A vector ``[K]`` of the evidence in float64 on the CPU."""
    require_vector(f"evidence.{name}", x, K, "K")
    return x.detach().double().cpu()


def prior_of(prior: Tensor | None, K: int) -> Tensor:
    """A prior's weights, not all 0, copied to float64 on the CPU; equal ones, of sum 1, without it."""
    if prior is None:
        return torch.full((K,), 1.0 / K, dtype=torch.float64, device="cpu")
    require_float("prior", prior, "[K]", (1,))
    require_prior(prior, K)
    if has_readable_values(prior):
        require(bool((prior > 0).any()), "prior", "an entry above 0", prior.tolist(), "Without a prior: None.")
    return copied(prior)


def copied(x: Tensor) -> Tensor:
    """A copy in float64 on the CPU, which no change of ``x`` reaches."""
    return x.detach().to(device="cpu", dtype=torch.float64, copy=True)
