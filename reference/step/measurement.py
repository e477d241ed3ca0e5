"""What a refresh records: conflict and signal of the K gradients, and what the step made of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from marble_core import cross_alignment, harmonize, null_alignment
from reference.step.estimate import Measured, Tree


def refresh_record(measured: Measured, gradient: Tree, g: Tree, c: Tensor, previous: Tree | None) -> dict[str, Any]:
    """Log entry of a refresh, with the cosines on this batch, and of the step before with this batch."""
    same = cross_alignment(gradient, g)
    after = cross_alignment(previous, g) if previous is not None else None
    solution = harmonize(measured.gram)
    unit = c * solution.norms
    norm2 = measured.average.diagonal()
    norm2 = torch.where(norm2 > 0, norm2, torch.nan)
    return {
        "coefficients": c.tolist(),
        "weights": (unit / unit.abs().sum().clamp(min=1e-300)).tolist(),
        "min_norm": solution.weights.tolist(),
        "norms": solution.norms.tolist(),
        "active": solution.active.tolist(),
        "cosines": same.cosines.tolist(),
        "min_cosine": float(same.minimum),
        "mean_cosine": float(same.mean),
        "conflict": bool(same.conflict),
        "direction_norm": float(solution.direction_norm),
        "stationary": bool(solution.stationary),
        "signal_share": (measured.cross.diagonal() / norm2).tolist(),
        "signal_share_error": (measured.error / norm2).tolist(),
        "signal_cosines": _signal_cosines(measured),
        "null": null_alignment(len(c)),
        "next_cosines": after.cosines.tolist() if after else None,
        "next_min_cosine": float(after.minimum) if after else None,
    }


def _signal_cosines(measured: Measured) -> list[list[float]]:
    """Cosines of the signals with each other ``[K][K]``; NaN for a signal within two standard errors of 0."""
    square = measured.cross.diagonal()
    norms = torch.where(square > 2 * measured.error.nan_to_num(0.0), square, torch.nan).sqrt()
    found: list[list[float]] = (measured.cross / norms / norms.unsqueeze(-1)).clamp(-1, 1).tolist()
    return found
