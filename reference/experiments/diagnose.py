"""How much of each reward's gradient is signal, and what each rule makes of it, as the rows behind a solve grow."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure

from marble_core import min_norm_weights, psd_part
from marble_core.rules import Evidence
from reference.config.checks import at_least, validate
from reference.config.settings import Config
from reference.experiments import tilt
from reference.experiments.bank import Array, Bank, Indices, collect, key_of
from reference.experiments.candidates import coefficients_of
from reference.run.reading import PALETTE
from reference.tensor_files import load_tensors
from reference.text_files import make_folder

_BLOCKS = 10  # of the jackknife
_PARTITIONS = 8  # of the training units into batches
_PENS = [(color, dash) for dash in ("solid", "dashed") for color in ("#000000", *PALETTE[:3])]

SUM = "weighted-sum"  # has a gradient of its own
# Directions from the rows of a batch; those of FULL are of the whole loss.
RULES = (
    SUM,
    "uniform",
    "marble-paper",
    "marble",
    "min-norm, halves",
    "raw min-norm, halves",
    "upgrad, halves",
    "cone",
    "noise-aware",
    "soft-min",
)
BETWEEN = "marble-paper, between solves"
FULL = ("marble-paper", BETWEEN)


class Point(NamedTuple):
    """One rule at one number of rows: means ``[K]`` and standard errors over batches that share no unit.

    Attributes:
        rows: behind a solve.
        batches: number of batches.
        share: of each reward in the coefficients; 0 for the weighted sum, which has a gradient of its own.
        share_sd: its spread from batch to batch.
        same: cosines with the batch's own gradients.
        next: cosines with another batch's, NaN where there is only one.
        held_out: cosines with the gradients of all held-out prompts.
        gain: of each reward on held-out prompts for a step of unit length, over the best that any direction could do
            for the worst reward.
        gain_error: its standard error.
        minima: mean of the smallest same-batch and next-batch cosine.
    """

    rows: int
    batches: int
    share: Array
    share_sd: Array
    same: Array
    next: Array
    held_out: Array
    gain: Array
    gain_error: Array
    minima: tuple[float, float]


def diagnose(config: Config, *, run: Path | None, units: int, held_out: int, sketch: int, folder: Path) -> str:
    """Collect gradients at the base policy, or at the last checkpoint of a run, and write tables and a figure.

    Args:
        config: of the run, or a preset.
        run: folder whose newest checkpoint is examined; None for the base policy.
        units: prompts' groups of training prompts, one a unit.
        held_out: of held-out prompts.
        sketch: dimensions of a random sketch of the gradients, 0 for none: where they do not fit into memory.
        folder: for ``bank.pt`` (used again if it is there), ``diagnose.md``, ``diagnose.json`` and ``diagnose.svg``.

    Returns:
        The text of ``diagnose.md``.
    """
    validate(config)
    at_least(4, {"--units": units})
    at_least(2 * _BLOCKS, {"--held-out": held_out})
    at_least(0, {"--sketch": sketch})
    torch.set_num_threads(config.threads or torch.get_num_threads())
    key = json.dumps(key_of(config, run, {"units": units, "held_out": held_out, "sketch": sketch}))
    make_folder(folder)
    saved = _saved(folder / "bank.pt")
    if saved.get("key") != key:
        saved = collect(config, run, units, held_out, sketch) | {"key": key}
        torch.save(saved, folder / "bank.pt")
    bank = Bank(saved["gram"].numpy(), units, saved["rows"], saved["gains"])
    names = list(config.rewards)
    signal = signal_of(bank, len(names))
    table = {label: curve(bank, label, len(names), signal.best) for label in RULES}
    units_a_step = max(1, config.rollout.prompts_per_epoch // config.optim.steps_per_epoch)
    possible = limits(bank, len(names))
    parts = (_tables(bank, names, signal, table, run), _limit_table(names, possible))
    text = "\n\n".join([*parts, tilt.table(bank, names, units_a_step)])
    (folder / "diagnose.md").write_text(text + "\n", encoding="utf-8")
    plain = {label: [point._asdict() for point in points] for label, points in table.items()}
    data = {"rewards": names, "signal": signal._asdict(), "rules": plain, "unit_rows": bank.rows}
    data |= {"signal_gram": unbiased(bank), "limits": {label: limit._asdict() for label, limit in possible.items()}}
    (folder / "diagnose.json").write_text(json.dumps(data, default=np.ndarray.tolist, indent=1), encoding="utf-8")
    _plot(names, table).savefig(folder / "diagnose.svg", metadata={"Date": None})
    return text


def _saved(path: Path) -> dict[str, Any]:
    """Inner products that were collected before; nothing where there are none, or the file is damaged."""
    try:
        found = load_tensors(path, path) if path.exists() else {}
    except ValueError as error:
        print(f"{error} They are collected again.", file=sys.stderr)
        return {}
    return found if isinstance(found, dict) else {}


class SignalTable(NamedTuple):
    """Signals of the K rewards at a policy, from pairs of units, with standard errors by the jackknife.

    Attributes:
        share: of a unit's squared gradient norm that is signal.
        share_error: its error.
        half_rows: rows at which a gradient is half signal.
        cosines: of the signals, ``[K, K]``.
        cosines_error: their errors.
        best: largest gain of the worst reward for a step of unit length, from the signals' Gram; NaN if it is 0.
    """

    share: Array
    share_error: Array
    half_rows: Array
    cosines: Array
    cosines_error: Array
    best: float


def signal_of(bank: Bank, K: int) -> SignalTable:
    """Unbiased signal shares and cosines, training and held-out prompts together."""
    U = bank.gram.shape[0]
    own = np.stack([bank.gram[u, :K, u, :K] for u in range(U)])

    def estimates(keep: Indices) -> tuple[Array, Array]:
        total = bank.gram[keep][:, :K][:, :, keep][:, :, :, :K].sum((0, 2))
        S = (total - own[keep].sum(0)) / (len(keep) * (len(keep) - 1))
        norm2, s2 = own[keep].mean(0).diagonal(), S.diagonal()
        s = np.sqrt(np.where(s2 > 0, s2, np.nan))  # no cosine where there is no signal
        return np.concatenate([[s2 / np.where(norm2 > 0, norm2, np.nan)], S / s / s[:, None]]), S

    value, S = estimates(np.arange(U))
    left_out = np.array_split(np.random.default_rng(0).permutation(U), _BLOCKS)
    again = np.stack([estimates(np.setdiff1d(np.arange(U), block))[0] for block in left_out])
    error = _jackknife(again)
    psd = psd_part(torch.from_numpy(S))
    w = min_norm_weights(psd)
    best = float((w @ psd @ w).clamp(min=0).sqrt())
    best = best if best > 1e-6 * math.sqrt(float(psd.trace())) else math.nan  # a hull that holds 0, to rounding
    share = value[0]
    half = bank.rows * (1 - share) / np.where(share > 0, share, np.nan)
    return SignalTable(share, error[0], half, value[1:], error[1:], best)


def _jackknife(values: Array) -> Array:
    """Standard error from estimates that leave one block out each ``[blocks, ...]``."""
    n = len(values)
    error: Array = np.sqrt((n - 1) / n * np.square(values - values.mean(0)).sum(0))
    return error


def curve(bank: Bank, label: str, K: int, best: float) -> list[Point]:
    """One rule at growing numbers of units behind a solve."""
    sizes = sorted({bank.training // 2**i for i in range(1, 20) if bank.training // 2**i >= 2})
    return [_point(bank, label, n, K, best) for n in sizes]


def _point(bank: Bank, label: str, n: int, K: int, best: float) -> Point:
    """One rule with ``n`` units a solve, over batches that share no unit, in several random partitions."""
    M, U = bank.training, bank.gram.shape[0]
    blocks = np.array_split(np.arange(M, U), _BLOCKS)
    everywhere = [np.arange(M, U)] + [np.setdiff1d(np.arange(M, U), block) for block in blocks]
    held = np.stack([bank.gram[:M][:, :, keep].mean(2)[:, :, :K] for keep in everywhere])  # [1 + blocks, M, R, K]
    H_held = bank.gram[M:, :, M:].mean((0, 2))
    rng, found = np.random.default_rng(n), []
    for _ in range(_PARTITIONS):
        groups = rng.permutation(M)[: M // n * n].reshape(-1, n)
        for i, g in enumerate(groups):
            x = direction(bank, label, g, K)
            H = bank.gram[g][:, :, g].mean((0, 2))
            norm = math.sqrt(max(x @ H @ x, 1e-300))
            other = groups[(i + 1) % len(groups)]
            cross = bank.gram[g][:, :, other].mean((0, 2))
            H_other = bank.gram[other][:, :, other].mean((0, 2))
            after = _cosines(x @ cross[:, :K] / norm, H_other) if len(groups) > 1 else np.full(K, np.nan)
            gain = np.einsum("r,jrk->jk", x, held[:, g].mean(1)) / norm
            same = _cosines(x @ H[:, :K] / norm, H)
            found.append((x[:K] / max(np.abs(x[:K]).sum(), 1e-300), same, after, gain))
    share, same, after = (np.stack([f[i] for f in found]) for i in range(3))
    gain = np.stack([f[3] for f in found])  # [batches, 1 + blocks, K]
    spread = gain[:, 0].std(0, ddof=1) / math.sqrt(M // n)  # partitions share their units: they count once
    error = np.hypot(spread, _jackknife(gain.mean(0)[1:])) / best
    return Point(
        n * bank.rows, M // n, share.mean(0), share.std(0), _mean(same), _mean(after),
        _cosines(gain[:, 0].mean(0), H_held), gain[:, 0].mean(0) / best, error,
        (_smallest(same), _smallest(after)),
    )  # fmt: skip


def _cosines(products: Array, gram: Array) -> Array:
    """``<d, g_k> / |g_k|`` of a direction of unit length; NaN for a gradient that is 0."""
    K = len(products)
    norms: Array = np.sqrt(np.where(gram.diagonal()[:K] > 0, gram.diagonal()[:K], np.nan))
    return products / norms


def _mean(x: Array) -> Array:
    """Mean of each column without NaN."""
    count = (~np.isnan(x)).sum(0)
    mean: Array = np.nansum(x, 0) / np.where(count > 0, count, np.nan)
    return mean


def _smallest(x: Array) -> float:
    """Mean over rows of the smallest entry that is not NaN."""
    smallest = np.where(np.isnan(x), np.inf, x).min(1)
    return float(smallest.mean()) if np.isfinite(smallest).all() else math.nan


def direction(bank: Bank, label: str, units: Indices, K: int) -> Array:
    """Coefficients ``[K + 2]`` of a rule's direction, from the units of a batch, over their mean gradients.

    Without the shared part, which every rule adds to its step alike; one that balances full gradients has it in them.
    """
    H = bank.gram[units][:, :, units].mean((0, 2))
    a, b = units[: len(units) // 2], units[len(units) // 2 :]
    pairs = bank.gram[a][:, :K][:, :, b][:, :, :, :K]
    C, scatter = pairs.mean((0, 2)), np.einsum("ikjk->ijk", pairs).std((0, 1)) / math.sqrt(len(a) * len(b))
    certainty = C.diagonal() / np.where(scatter > 0, scatter, np.nan)
    return _coefficients(label, H, Evidence(None, torch.from_numpy(C), bank.gains, torch.from_numpy(certainty)))


def _coefficients(label: str, H: Array, evidence: Evidence) -> Array:
    """Coefficients ``[K + 2]`` of a rule's direction.

    Args:
        H: ``[K + 2, K + 2]``, Gram of the mean gradients.
        evidence: what the rule sees beside it.
    """
    K = len(H) - 2
    x = np.zeros(K + 2)
    if label == SUM:
        x[K] = 1.0
        return x
    h = H[:K, :K]
    if label in FULL:
        h = h + H[:K, K + 1 :] + H[K + 1 :, :K] + H[K + 1, K + 1]
    x[:K] = coefficients_of(label, evidence._replace(gram=torch.from_numpy(h)), K).numpy()
    if label in FULL:
        x[K + 1] = x[:K].sum()
    return x


class Limit(NamedTuple):
    """One rule at infinitely many rows.

    Attributes:
        gain: ``[K]``, of a step of unit length, in units of the mean gain of equal weights.
        coefficients: ``[K]``, of the raw gradients, their absolute values adding up to 1; 0 for the weighted sum.
    """

    gain: Array
    coefficients: Array


def limits(bank: Bank, K: int) -> dict[str, Limit]:
    """What every rule would do without noise: the unbiased Gram of all groups takes the place of a batch's.

    The paper's rule has two rows: a step at a solve, and a step between two solves, where its weights of unit gradients
    are applied to the raw ones.
    """
    psd = psd_part(torch.from_numpy(unbiased(bank))).numpy()
    sure = torch.full((K,), torch.inf, dtype=torch.float64)
    evidence = Evidence(None, torch.from_numpy(psd[:K, :K].copy()), bank.gains, sure)
    found = {label: _coefficients(label, psd, evidence) for label in (*RULES, BETWEEN)}
    unit = np.append(np.full(K, 1 / K), [0.0, 0.0])
    mean = float(_gain(psd, unit)[:K].mean())
    return {
        label: Limit(_gain(psd, x)[:K] / mean, x[:K] / max(np.abs(x[:K]).sum(), 1e-300)) for label, x in found.items()
    }


def _gain(S: Array, x: Array) -> Array:
    """First-order gains of a step of unit length along ``x``; NaN where that direction is 0, to rounding."""
    length2 = float(x @ S @ x)
    gain: Array = S @ x / math.sqrt(length2) if length2 > 1e-12 * x @ x * S.trace() else np.full(len(x), np.nan)
    return gain


def unbiased(bank: Bank) -> Array:
    """Gram of the signals ``[K + 2, K + 2]``, from all pairs of different units."""
    U = bank.gram.shape[0]
    own = np.stack([bank.gram[u, :, u, :] for u in range(U)]).sum(0)
    S: Array = (bank.gram.sum((0, 2)) - own) / (U * (U - 1))
    symmetric: Array = (S + S.T) / 2
    return symmetric


def _limit_table(names: Sequence[str], found: Mapping[str, Limit]) -> str:
    """What is possible, as Markdown."""
    head = " | ".join(names)
    lines = [
        "What is possible: gains of a step of unit length with the unbiased Gram of all groups in place of a batch's, "
        "as with\ninfinitely many rows, in units of the mean gain of equal weights; and the coefficients of the raw "
        f"gradients.\n\n| rule | {head} | smallest | coefficients |\n|---|{'---|' * len(names)}---|---|"
    ]
    for label, limit in found.items():
        gains = " | ".join(f"{g:+.2f}" for g in limit.gain)
        shares = ", ".join(f"{c:.2f}" for c in limit.coefficients if limit.coefficients.any())
        lines.append(f"| {label} | {gains} | {limit.gain.min():+.2f} | {shares} |")
    return "\n".join(lines)


def _tables(
    bank: Bank, names: Sequence[str], signal: SignalTable, table: Mapping[str, list[Point]], run: Path | None
) -> str:
    """Everything as Markdown."""
    where = f"the last checkpoint of `{run.name}`" if run is not None else "the base policy"
    U, head = bank.gram.shape[0], " | ".join(names)
    lines = [
        f"Gradients of {bank.training} groups of training prompts and {U - bank.training} of held-out prompts at "
        f"{where}, {bank.rows} rows a group.\n",
        *_signal_lines(names, signal),
    ]
    lines.append(
        "\nHeld-out gain of every reward for a step of unit length, over the best that any direction could do for the "
        "worst\nreward (1 is that best), ± one standard error; minimum cosines, where pure noise gives "
        f"{1 / math.sqrt(len(names)):.3f} on the same batch and less than 0 on the next.\n\n"
        f"| rule | rows a solve | {head} | worst | min cos, same batch | min cos, next batch | coefficients |\n"
        f"|---|---|{'---|' * len(names)}---|---|---|---|"
    )
    for label, points in table.items():
        for p in points:
            gains = " | ".join(f"{g:+.2f} ± {e:.2f}" for g, e in zip(p.gain, p.gain_error, strict=True))
            shares = ", ".join(f"{s:.2f} ± {d:.2f}" for s, d in zip(p.share, p.share_sd, strict=True) if p.share.any())
            cosines = " | ".join(map(_cosine, p.minima))
            lines.append(f"| {label} | {p.rows:,} | {gains} | {p.gain.min():+.2f} | {cosines} | {shares} |")
    lines.append(
        "\nCosines of each rule's direction with every reward's gradient: on the batch that made it / on another "
        f"batch / on all held-out groups.\n\n| rule | rows a solve | {head} |\n|---|---|{'---|' * len(names)}"
    )
    for label, points in table.items():
        for p in points:
            cells = [" / ".join(map(_cosine, three)) for three in zip(p.same, p.next, p.held_out, strict=True)]
            lines.append(f"| {label} | {p.rows:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _signal_lines(names: Sequence[str], signal: SignalTable) -> list[str]:
    """The tables of signal shares and of the signals' cosines."""
    lines = ["| reward | signal share of one group | rows for a share of 1/2 |\n|---|---|---|"]
    for k, name in enumerate(names):
        sure = signal.share[k] > 2 * signal.share_error[k]
        half = f"{signal.half_rows[k]:,.0f}" if sure else "not told from never"
        lines.append(f"| {name} | {signal.share[k]:.4f} ± {signal.share_error[k]:.4f} | {half} |")
    lines.append(f"\nCosines of the signals:\n\n| | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
    for k, name in enumerate(names):
        cells = [f"{c:+.2f} ± {e:.2f}" for c, e in zip(signal.cosines[k], signal.cosines_error[k], strict=True)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _cosine(value: float) -> str:
    """A cosine, or ``-`` where there is none."""
    return "-" if math.isnan(value) else f"{value:+.2f}"


def _plot(names: Sequence[str], table: Mapping[str, list[Point]]) -> Figure:
    """Worst held-out gain, and the minimum cosines on the same and on the next batch, against rows a solve."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    rows = [p.rows for p in next(iter(table.values()))]  # the limits, as there may be nothing finite to show
    left, middle, right = figure.subplots(1, 3)
    for (label, points), (color, dash) in zip(table.items(), _PENS, strict=False):
        x = [p.rows for p in points]
        worst = np.array([(p.gain[k := int(p.gain.argmin())], p.gain_error[k]) for p in points]).T
        left.plot(x, worst[0], color=color, linestyle=dash, label=label)
        left.fill_between(x, worst[0] - 1.96 * worst[1], worst[0] + 1.96 * worst[1], color=color, alpha=0.06, lw=0)
        middle.plot(x, [p.minima[0] for p in points], color=color, linestyle=dash)
        right.plot(x, [p.minima[1] for p in points], color=color, linestyle=dash)
    middle.axhline(1 / math.sqrt(len(names)), color="0.4", lw=0.8, ls=":")
    titles = ("held-out gain of the worst reward", "minimum cosine, same batch", "minimum cosine, next batch")
    for axes, title in zip((left, middle, right), titles, strict=True):
        axes.axhline(0, color="0.6", lw=0.8)
        axes.set(xscale="log", xlim=(0.8 * rows[0], 1.25 * rows[-1]), xlabel="rows a solve", title=title)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    return figure
