"""Watch what goes wrong in training with rewards: the velocity outgrows the base model's, then gradients grow."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

LONGER = 1.05  # times the base model's velocity (NormGuard, arXiv 2606.27771, sees 1.05 to 1.15 where quality falls)
STEEPER = 5.0  # times the first epochs' gradients
_FIRST = 3  # epochs that say how long gradients and velocity are at the start
_AGAIN = 10  # epochs until a warning is repeated
_ADVICE = "Training may be coming apart: raise loss.kl_weight or loss.norm_guard, or lower optim.lr."


class Health(NamedTuple):
    """Lengths seen so far; part of a checkpoint, so that a resumed run warns as an undisturbed one.

    Attributes:
        steps: ``[n, 3]``, this epoch's steps: lengths of the gradient, of the velocity and of the base model's.
        first: ``[m, 2]``, of each of the first epochs: median length of the gradient, mean length of the velocity.
        warned: ``[2]``, the epochs of the last warnings about the velocity and about the gradient.
    """

    steps: Tensor
    first: Tensor
    warned: Tensor


def init_health() -> Health:
    """Nothing seen."""
    none = torch.zeros(0, dtype=torch.float64)
    return Health(none.reshape(0, 3), none.reshape(0, 2), torch.full((2,), -math.inf, dtype=torch.float64))


def observe_step(health: Health, metrics: Mapping[str, float]) -> Health:
    """Add a step that was taken; a length that was not measured is NaN."""
    found = [metrics.get(key, math.nan) for key in ("grad_norm", "v_norm", "v_norm_base")]
    return health._replace(steps=torch.cat([health.steps, torch.tensor([found], dtype=torch.float64)]))


def end_epoch(health: Health, epoch: int) -> tuple[Health, list[str]]:
    """Close an epoch: the health for the next one, and warnings.

    The velocity is compared with the base model's on the same rows; where that is not computed (no ``loss.kl_weight``
    and no ``loss.norm_guard``), with that of the first epochs. Gradients are compared with those of the first epochs.

    Example:
        >>> health = observe_step(init_health(), {"grad_norm": 1.0, "v_norm": 1.2, "v_norm_base": 1.0})
        >>> end_epoch(health, 0)[1]
        ["the velocity is 1.20 times as long as the base model's. Training may be coming apart: ..."]
    """
    gradient, v, base = health.steps.nanmedian(0).values[0], *health.steps[:, 1:].nanmean(0)
    first = health.first
    if len(first) < _FIRST:
        first = torch.cat([first, torch.stack([gradient, v]).unsqueeze(0)])
    whose = "the base model's" if base.isfinite() else "at the start"
    longer = float(v / (base if base.isfinite() else first[:, 1].nanmean()))
    steeper = float(gradient / first[:, 0].nanmedian())
    warned, warnings = health.warned.clone(), []
    texts = (
        (longer > LONGER, f"the velocity is {longer:.2f} times as long as {whose}. {_ADVICE}"),
        (steeper > STEEPER, f"gradients are {steeper:.1f} times as long as in the first epochs. {_ADVICE}"),
    )
    for kind, (wrong, text) in enumerate(texts):
        if wrong and epoch - float(warned[kind]) >= _AGAIN:
            warned[kind] = epoch
            warnings.append(text)
    return Health(health.steps[:0], first, warned), warnings
