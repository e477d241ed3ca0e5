"""From mild to Pareto-stationary: what every rule does with made-up gradients, and what the library says."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from marble_core import (
    cone_weights,
    gram_matrix,
    harmonize,
    noise_aware_weights,
    shrink_gram,
    signal_gram,
    upgrad_weights,
)

_P = 600  # parameters


class Case(NamedTuple):
    """Gradients of two batches ``[K, P]`` and the signals ``[K, P]`` that they share."""

    a: Tensor
    b: Tensor
    signals: Tensor


def _draw(name: str) -> Case:
    """The gradients of a scenario, from a seed of its own."""
    g = torch.Generator().manual_seed(len(name))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    K = 64 if name == "64 rewards" else 5
    s = normal(K, _P) + 0.7 * normal(1, _P)
    noise = 0.0
    if name == "one against three":
        s[3] = -0.4 * (s[0] + s[1] + s[2]) + normal(_P)
    elif name == "a reward and its negative, and a third":
        s = torch.stack([s[0], -s[0], s[1]])
    elif name == "a reward and its negative, up to rounding":
        s = torch.stack([s[0], (-s[0]).float().double() * (1 + 1e-7), s[1]])
    elif name == "duplicates":
        s = s[[0, 0, 1, 1, 2]]
    elif name == "scales 1e-4 to 1e4":
        s = s * 10.0 ** torch.linspace(-4, 4, K, dtype=torch.float64).unsqueeze(1)
    elif name == "stationary":
        s[4] = -(s[0] + s[1] + s[2] + s[3]) / 4
    elif name == "one prompt in fifty":
        s[0] = s[0] * (torch.rand(_P, generator=g) < 0.02)
        noise = 2.0
    elif name in ("noise ten times the signal", "noise alone"):
        s, noise = (0 * s, 3.0) if name == "noise alone" else (s, 10.0)
    return Case(s + noise * normal(*s.shape), s + noise * normal(*s.shape), s)


SCENARIOS = (
    "mild",
    "one against three",
    "64 rewards",
    "duplicates",
    "scales 1e-4 to 1e4",
    "one prompt in fifty",
    "noise ten times the signal",
    "noise alone",
    "a reward and its negative, and a third",
    "a reward and its negative, up to rounding",
    "stationary",
)


def _uniform(case: Case) -> Tensor:
    K = len(case.a)
    return torch.full((K,), 1.0 / K, dtype=torch.float64)


def _marble(case: Case) -> Tensor:
    return harmonize(gram_matrix((case.a + case.b) / 2)).coefficients


def _aware(case: Case) -> Tensor:
    signal, _ = shrink_gram(signal_gram(case.a @ case.b.mT))
    return noise_aware_weights(signal, gram_matrix((case.a + case.b) / 2)).coefficients


# Coefficients of the mean gradients of both batches.
RULES: dict[str, Callable[[Case], Tensor]] = {
    "uniform": _uniform,
    "marble": _marble,
    "noise-aware": _aware,
    "cone": lambda case: cone_weights(gram_matrix((case.a + case.b) / 2), _uniform(case)),
    "upgrad": lambda case: upgrad_weights(gram_matrix((case.a + case.b) / 2), _uniform(case)),
}


def stress() -> str:
    """One table as Markdown: the smallest cosine of each rule's direction with the gradients that made it, and with the
    signals behind them, and what ``harmonize`` reports."""
    lines = [
        "Smallest cosine with the batch's gradients / with the signals; a dash where there is no direction.\n",
        f"| scenario | {' | '.join(RULES)} | |d*| | gap | stationary |".replace("|d*|", "`d*`"),
        f"|---|{'---|' * len(RULES)}---|---|---|",
    ]
    for name in SCENARIOS:
        case = _draw(name)
        g = (case.a + case.b) / 2
        cells = []
        for rule in RULES.values():
            d = rule(case) @ g
            cells.append(f"{_smallest(d, g)} / {_smallest(d, case.signals)}")
        h = harmonize(gram_matrix(g))
        said = f"{float(h.direction_norm):.3f} | {float(h.gap):.1e} | {'yes' if h.stationary else 'no'}"
        lines.append(f"| {name} | {' | '.join(cells)} | {said} |")
    return "\n".join(lines)


def _smallest(d: Tensor, rows: Tensor) -> str:
    """Smallest cosine of a direction with rows of non-zero length."""
    norms = rows.norm(dim=1)
    length = float(d.norm())
    scale = float(norms.max())
    if length <= 1e-9 * scale or scale == 0:
        return "-"
    known = norms > 0
    cosine = float((rows[known] @ d / norms[known]).min()) / length
    return f"{cosine + 0.0:+.2f}"
