"""State that moves slowly: balancing coefficients on the simplex, averaged weights, and the decay schedules."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from marble_core._check import (
    describe,
    require,
    require_bool,
    require_float,
    require_range,
    require_same_trees,
    require_vector,
    wide,
)
from marble_core.harmonize import Harmonization


class Coefficients(NamedTuple):
    """Smoothed weights ``[K]`` on the simplex, refreshes since each reward had signal ``[K]``, refreshes so far."""

    weights: Tensor
    steps_since_signal: Tensor
    step: Tensor


class Guard(NamedTuple):
    """What guarded smoothing needs: the normalized Gram ``[K, K]`` of the refresh and a margin in (0, 1)."""

    gram: Tensor
    margin: float = 0.5


def init_coefficients(
    K: int, *, dtype: torch.dtype = torch.float64, device: torch.device | str | None = None
) -> Coefficients:
    """Uniform weights, before the first refresh.

    Args:
        K: number of rewards, at least 1.

    Returns:
        ``Coefficients`` with weights ``1/K``, counts 0.

    Raises:
        ValueError: ``K`` is not a positive integer.

    Example:
        >>> init_coefficients(4).weights
        tensor([0.2500, 0.2500, 0.2500, 0.2500], dtype=torch.float64)

    Reference: MARBLE (Zhao et al., arXiv 2605.06507), section 3.5.
    """
    require(isinstance(K, int) and K >= 1, "K", "a positive integer", describe(K))
    zero = torch.zeros(K, dtype=torch.int64, device=device)
    return Coefficients(torch.full((K,), 1.0 / K, dtype=dtype, device=device), zero, zero.sum())


def update_coefficients(
    state: Coefficients, harmonization: Harmonization, *, rho: float = 0.7, guard: Guard | None = None
) -> tuple[Coefficients, Tensor]:
    """One refresh of the smoothed weights: ``w <- rho w + (1 - rho) w*`` among the rewards with signal.

    A reward without signal keeps its share; the others divide the rest: with ``m`` the share that they hold, their
    target is ``m w*``. All rewards active, this is the paper's EMA. The weights stay on the simplex to rounding for any
    number of updates: 1e-12 in float64, the default of ``init_coefficients``. No gradient flows into them.

    The EMA of min-norm weights carries no guarantee. With a ``guard`` the largest ``rho' <= rho`` is taken for which
    ``(G_hat w)_k >= margin |d*|^2`` for every active k, where w is the new share of the active rewards, normalized.
    That is linear in ``rho'``, so it has a closed form; ``rho' = 0`` always serves for min-norm weights.

    Args:
        state: weights ``[K]``.
        harmonization: of this refresh, K rewards, not batched.
        rho: memory in [0, 1]; 0 follows every refresh, 1 never moves.
        guard: ``Guard(gram, margin)``; a scale of the gradients is normalized away. None is the plain EMA.

    Returns:
        ``(state, rho_used [])``; ``rho_used < rho`` tells that the guard acted.

    Raises:
        ValueError: K differs, ``rho`` not in [0, 1], or ``margin`` not in (0, 1).

    Example:
        >>> from marble_core import harmonize
        >>> h = harmonize(torch.diag(torch.tensor([1.0, 1.0, 0.0])))
        >>> state, rho_used = update_coefficients(init_coefficients(3), h)
        >>> state.weights, state.steps_since_signal
        (tensor([0.3333, 0.3333, 0.3333], dtype=torch.float64), tensor([0, 0, 1]))

    Reference: MARBLE (Zhao et al., arXiv 2605.06507), section 3.5; guard and shares: docs/theory.md, section 10.
    """
    old, active = state.weights, harmonization.active
    require_float("state.weights", old, "[K]", (1,))
    K = old.shape[0]
    require_vector("harmonization.weights", harmonization.weights, K, "K")
    require_bool("harmonization.active", active, (K,), "[K]")
    steps = state.steps_since_signal
    require(steps.shape == (K,), "state.steps_since_signal", f"[K] = [{K}]", describe(steps))
    require_range("rho", rho, 0.0, 1.0)
    share = torch.where(active, old, 0.0)
    mass = share.sum()
    target = torch.where(active, harmonization.weights.detach().to(old.dtype), 0.0)
    target = target / torch.where(target.sum() > 0, target.sum(), 1.0)
    rho_used = torch.full_like(mass, rho)
    if guard is not None:
        uniform = active.to(old.dtype) / active.sum().clamp(min=1)
        before = torch.where(mass > 0, share / torch.where(mass > 0, mass, 1.0), uniform)
        rho_used = torch.minimum(rho_used, _largest_rho(before, target, active, guard))
    moved = rho_used * share + (1.0 - rho_used) * mass * target
    weights = torch.where(active, moved, old).clamp(min=0)
    weights = torch.where(active.any(), weights / weights.sum(), old)
    return Coefficients(weights, torch.where(active, 0, steps + 1), state.step + 1), rho_used


def _largest_rho(before: Tensor, target: Tensor, active: Tensor, guard: Guard) -> Tensor:
    """Largest rho in [0, 1] with ``G_hat (rho before + (1 - rho) target) >= margin |d*|^2`` on the active rewards."""
    K = before.shape[0]
    gram_ok = isinstance(guard.gram, Tensor) and guard.gram.shape == torch.Size([K, K])
    require(gram_ok, "guard.gram", f"[K, K] = [{K}, {K}]", describe(guard.gram))
    require_range("guard.margin", guard.margin, 0.0, 1.0, open_low=True, open_high=True)
    G = guard.gram.detach().to(before.dtype)
    norms = torch.where(active, G.diagonal(), 1.0).sqrt()
    both = active.unsqueeze(0) & active.unsqueeze(1)
    G_hat = torch.where(both, G / norms / norms.unsqueeze(-1), 0.0)
    x, y = G_hat @ before, G_hat @ target
    falls = active & (x < y)
    room = y - guard.margin * (target @ y)
    return torch.where(falls, room / torch.where(falls, y - x, 1.0), 1.0).amin().clamp(0.0, 1.0)


def ema_tree(old: Any, new: Any, decay: float | Tensor) -> Any:
    """``decay old + (1 - decay) new`` for every floating-point leaf; other leaves are taken from ``new``.

    Computed in float32 at least and returned in the dtype of ``old``. Keep ``old`` in float32: in bf16 an increment
    below 1/256 of the value is rounded away and the average stalls. ``new`` may be bf16.

    Args:
        old: pytree of tensors, the average.
        new: pytree of the same structure and shapes, the newest values.
        decay: number or 0-d tensor in [0, 1]; 0 copies ``new``, 1 keeps ``old``.

    Returns:
        A new pytree; no leaf aliases an input.

    Raises:
        ValueError: structures or shapes differ, a leaf is no tensor, or a Python ``decay`` is outside [0, 1].

    Example:
        >>> ema_tree({"w": torch.tensor([1.0])}, {"w": torch.tensor([2.0])}, 0.75)
        {'w': tensor([1.2500])}

    Reference: DiffusionNFT (Zheng et al., arXiv 2509.16117), section 3; docs/theory.md, section 6.
    """
    if not isinstance(decay, Tensor):
        require_range("decay", decay, 0.0, 1.0)
    require_same_trees("new", new, "old", old)
    decay = decay.detach() if isinstance(decay, Tensor) else decay

    def mix(x: Tensor, y: Tensor) -> Tensor:
        if not x.is_floating_point():
            return y.detach().clone()
        a, b = x.detach().to(wide(x.dtype)), y.detach().to(wide(x.dtype))
        return (decay * a + (1.0 - decay) * b).to(x.dtype)

    return pytree.tree_map(mix, old, new)


class DecaySchedule(NamedTuple):
    """Decay of the old policy: 0 up to step ``flat``, then ``rate`` a step, at most ``cap``."""

    flat: int
    rate: float
    cap: float


STANDARD_DECAY = DecaySchedule(flat=0, rate=0.001, cap=0.5)
SLOW_DECAY = DecaySchedule(flat=75, rate=0.0075, cap=0.999)


def old_policy_decay(step: int, schedule: DecaySchedule = STANDARD_DECAY) -> float:
    """Decay of the sampling policy, ``old <- decay old + (1 - decay) new``, after ``step`` updates.

    ``min(rate * max(step - flat, 0), cap)``: 0 at first, so that the sampling policy follows at once, then slower.
    ``STANDARD_DECAY`` is ``min(0.001 step, 0.5)``; ``SLOW_DECAY``, the paper's for OCR, is 0 up to step 75 and then
    ``min(0.0075 (step - 75), 0.999)``.

    Args:
        step: updates so far, at least 0.
        schedule: the three constants.

    Returns:
        A Python float in [0, cap].

    Raises:
        ValueError: negative ``step``, or constants out of range.

    Example:
        >>> old_policy_decay(100), old_policy_decay(75, SLOW_DECAY), old_policy_decay(95, SLOW_DECAY)
        (0.1, 0.0, 0.15)

    Reference: DiffusionNFT (Zheng et al., arXiv 2509.16117), appendix; docs/theory.md, section 6.
    """
    require(isinstance(step, int) and step >= 0, "step", "an integer >= 0", describe(step))
    require_range("schedule.cap", schedule.cap, 0.0, 1.0)
    require_range("schedule.rate", schedule.rate, 0.0, 1.0)
    return min(schedule.rate * max(step - schedule.flat, 0), schedule.cap)


def eval_ema_decay(step: int, cap: float = 0.9) -> float:
    """Decay of the weights kept for evaluation, ``min((1 + s) / (10 + s), cap)``: a short memory at first.

    Args:
        step: optimizer steps so far, at least 0.
        cap: largest decay, in [0, 1].

    Returns:
        A Python float.

    Raises:
        ValueError: negative ``step``, or ``cap`` outside [0, 1].

    Example:
        >>> eval_ema_decay(0), eval_ema_decay(1000)
        (0.1, 0.9)

    Reference: DiffusionNFT (Zheng et al., arXiv 2509.16117), released configuration; docs/theory.md, section 6.
    """
    require(isinstance(step, int) and step >= 0, "step", "an integer >= 0", describe(step))
    require_range("cap", cap, 0.0, 1.0)
    return min((1 + step) / (10 + step), cap)


def refresh_due(step: int, every: int) -> bool:
    """Whether optimizer step ``step`` (from 0) is one that solves for new weights: steps 0, every, 2 every, ...

    Args:
        step: at least 0.
        every: the paper's N = 10; 1 refreshes at every step.

    Returns:
        A Python bool.

    Raises:
        ValueError: negative ``step`` or ``every < 1``.

    Example:
        >>> [refresh_due(step, 3) for step in range(5)]
        [True, False, False, True, False]

    Reference: MARBLE (Zhao et al., arXiv 2605.06507), section 3.4.
    """
    require(isinstance(step, int) and step >= 0, "step", "an integer >= 0", describe(step))
    require(isinstance(every, int) and every >= 1, "every", "an integer >= 1", describe(every))
    return step % every == 0
