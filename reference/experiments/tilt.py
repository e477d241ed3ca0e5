"""What a soft minimum of gains buys and costs, to first order at one policy."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from marble_core import soft_min_weights
from reference.experiments.bank import Array, Bank

STRENGTHS = (0.0, 1.0, 2.0, 5.0, 10.0)
_ROUNDS, _SHARE = 2000, 0.02  # of the damped iteration to the fixed point


class Settled(NamedTuple):
    """Where the weights come to rest.

    Attributes:
        strength: of the soft minimum.
        weights: ``[K]``.
        gain: ``[K]``, in units of the mean gain over rewards that equal weights would make.
    """

    strength: float
    weights: Array
    gain: Array


def moments_of(bank: Bank, K: int, units: int) -> tuple[Array, Array]:
    """Gram of the signals ``[K, K]``, unbiased, and expected Gram of a step of ``units`` units, noise included."""
    U = bank.gram.shape[0]
    own = np.stack([bank.gram[u, :K, u, :K] for u in range(U)])
    total = bank.gram[:, :K, :, :K].sum((0, 2))
    signal = (total - own.sum(0)) / (U * (U - 1))
    return signal, signal + (own.mean(0) - signal) / units


def settle(signal: Array, gram: Array, prior: Array, strength: float) -> Settled:
    """The fixed point ``w = soft_min_weights(gain(w))`` with ``gain(w) = c S w / sqrt(w^T G w)``.

    An optimiser that normalizes its steps moves by ``d / |d|``, and ``|d|`` is mostly noise: a tilt towards one reward
    turns the signal of the direction, and lengthens its noise. ``c`` makes the mean gain of the prior's weights 1.
    """
    unit = np.abs((signal @ prior).mean()) / np.sqrt(prior @ gram @ prior)
    w = prior
    for _ in range(_ROUNDS):
        gain = signal @ w / np.sqrt(w @ gram @ w) / unit
        tilted = soft_min_weights(torch.from_numpy(gain), torch.from_numpy(prior), strength).numpy()
        w = (1 - _SHARE) * w + _SHARE * tilted
    return Settled(strength, w, gain)


def table(bank: Bank, names: list[str], units: int) -> str:
    """The fixed points of several strengths as Markdown."""
    signal, gram = moments_of(bank, len(names), units)
    prior = np.full(len(names), 1 / len(names))
    head = " | ".join(names)
    lines = [
        f"Where a soft minimum settles, to first order, with steps of {units * bank.rows:,} rows: gains in units of "
        "the mean gain that equal\nweights make, and weights.\n",
        f"| strength | {head} | smallest | weights |\n|---|{'---|' * len(names)}---|---|",
    ]
    for strength in STRENGTHS:
        s = settle(signal, gram, prior, strength)
        cells = " | ".join(f"{g:+.2f}" for g in s.gain)
        lines.append(f"| {strength:g} | {cells} | {s.gain.min():+.2f} | {', '.join(f'{w:.2f}' for w in s.weights)} |")
    return "\n".join(lines)
