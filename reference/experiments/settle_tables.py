"""What ``settle`` found, as Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from reference.experiments.settle import SUM
from reference.run.intervals import interval, wilson

_NEAR_ZERO = 1e-3  # a shorter direction of unit gradients counts as none
_NEGLECTED = 0.02  # a smaller share of the coefficients counts as neglect
Record = dict[str, Any]


def tables(records: Sequence[Record], names: Sequence[str], rows: int) -> str:
    """The claim's table for every size of step, and the statistics of the gradients."""
    keys = list(records[0]["changes"])
    sizes = list(dict.fromkeys(key.rpartition(" @ ")[2] for key in keys))
    parts = [f"{len(records)} mini-batches of {rows:,} rows; K = {len(names)}."]
    parts += [_claim(records, names, size) for size in sizes]
    return "\n\n".join([*parts, _statistics(records, names)])


def _claim(records: Sequence[Record], names: Sequence[str], size: str) -> str:
    """One size of step: how often each rule lowers a reward, and raises all where the sum lowers one."""
    labels = [key.rpartition(" @ ")[0] for key in records[0]["changes"] if key.endswith(f" @ {size}")]
    chosen = [r for r in records if _lowered(r, SUM, size)]
    certain = [r for r in records if _lowered(r, SUM, size, certain=True)]
    what = "AdamW steps with the run's settings" if size == "0" else f"steps of length {size}"
    lines = [
        f"**{what}.** The weighted sum lowered at least one reward on {_rate(len(chosen), len(records))} of the "
        "batches, "
        f"for certain (paired 95 % interval below 0) on {_rate(len(certain), len(records))}.\n",
        f"| rule | lowers a reward, of all batches | raises all, of those {len(chosen)} | lowers none for certain, "
        "of the "
        f"{len(certain)} certain ones | smallest change | {' | '.join(names)} |",
        f"|---|---|---|---|---|{'---|' * len(names)}",
    ]
    for label in labels:
        lowers = sum(_lowered(r, label, size) for r in records)
        raises = sum(_raised_all(r, label, size) for r in chosen)
        spared = sum(not _lowered(r, label, size, certain=True) for r in certain)
        gains = np.array([[_standard(r, label, size, k) for k in names] for r in records])
        worst = interval(gains.min(1).tolist())
        cells = [f"{x:+.3f}" for x in gains.mean(0)]
        lines.append(
            f"| {label} | {_rate(lowers, len(records))} | {_rate(raises, len(chosen))} | "
            f"{_rate(spared, len(certain))} | "
            f"{worst.mean:+.3f} [{worst.low:+.3f}, {worst.high:+.3f}] | {' | '.join(cells)} |"
        )
    return (
        "\n".join(lines) + "\n\nChanges are in standard deviations within a prompt; rates have Wilson's 95 % interval."
    )


def _lowered(record: Record, label: str, size: str, *, certain: bool = False) -> bool:
    """Whether a step lowered at least one reward on held-out prompts: in the mean, or with its whole interval."""
    changes = record["changes"][f"{label} @ {size}"].values()
    return any((high if certain else mean) < 0 for mean, _, high in changes)


def _raised_all(record: Record, label: str, size: str) -> bool:
    """Whether the mean of every reward rose on held-out prompts."""
    return all(mean > 0 for mean, _, _ in record["changes"][f"{label} @ {size}"].values())


def _standard(record: Record, label: str, size: str, name: str) -> float:
    """Mean change of a reward in its standard deviation within a prompt."""
    mean: float = record["changes"][f"{label} @ {size}"][name][0]
    return mean / float(record["within_std"][name])


def _rate(hits: int, n: int) -> str:
    """As ``3 of 12 (25 % [9, 53])``."""
    if n == 0:
        return "-"
    found = wilson(hits, n)
    return f"{hits} of {n} ({found.mean:.0%} [{100 * found.low:.0f}, {100 * found.high:.0f}])"


def _statistics(records: Sequence[Record], names: Sequence[str]) -> str:
    """Distributions of the solution's length, of smallest cosines and of coefficients."""
    norms = [r["direction_norm"] for r in records]
    zero = sum(x < _NEAR_ZERO or r["stationary"] for x, r in zip(norms, records, strict=True))
    null = 1 / math.sqrt(len(names))
    lines = [
        f"**The gradients.** `|d*|` of the min-norm point: {_quantiles(norms)}; near zero on "
        f"{_rate(zero, len(records))}. "
        f"Smallest cosines: median [quartiles]; noise alone gives {null:.3f} on the same batch and about 0, or "
        "less, on a "
        "fresh one.\n",
        f"| rule | same batch | fresh batch | neglects a reward | median coefficients: {', '.join(names)} |",
        "|---|---|---|---|---|",
    ]
    for label in records[0]["cosines"].get("same", ()):
        same, fresh = ([r["cosines"][kind][label] for r in records] for kind in ("same", "fresh"))
        shares = np.array([r["coefficients"].get(label, [math.nan] * len(names)) for r in records])
        shares = shares / np.abs(shares).sum(1, keepdims=True)
        neglects = int((np.abs(shares) < _NEGLECTED).any(1).sum())
        known = not np.isnan(shares).any()
        cells = ", ".join(f"{x:.2f}" for x in np.median(shares, 0)) if known else "-"
        neglect = _rate(neglects, len(records)) if known else "-"
        lines.append(f"| {label} | {_quantiles(same)} | {_quantiles(fresh)} | {neglect} | {cells} |")
    return "\n".join(lines)


def _quantiles(values: Sequence[float]) -> str:
    """As ``+0.30 [+0.25, +0.36]``."""
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
    return f"{middle:+.2f} [{low:+.2f}, {high:+.2f}]"
