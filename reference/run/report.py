"""Reports of training runs: self-contained HTML pages, readable offline, in light and in dark, and a table of text."""

from __future__ import annotations

import base64
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

from reference.errors import ConfigError, TrainingError
from reference.run import reading
from reference.run.intervals import Interval, change, interval, verdict, wilson
from reference.run.page import INK, MUTED, PENS, Curve, finite, matrix_table, plot, section, table, write_page
from reference.run.tiles import tile_cards
from reference.run.watch import LONGER
from reference.text_files import make_folder

_EVAL, _TRAINING, _APPLIED = ("eval", "rewards"), ("epoch", "rewards"), ("step", "coefficients")
_WEIGHTS, _NORMS, _SECONDS = ("refresh", "weights"), ("refresh", "norms"), ("epoch", "seconds")
_NEXT = ("refresh", "next_cosines")
_GAINS, _SHARES = ("epoch", "gains"), ("refresh", "signal_share")
_RECENT = 10  # refreshes behind the conflict matrix
_Estimate = tuple[float, float, float]  # mean, and the bounds of its 95 % interval


class _Run(NamedTuple):
    """What a run folder holds: records by kind, and the text of the configuration."""

    folder: Path
    config: str
    records: dict[str, list[dict[str, Any]]]
    others: int = 0  # evaluations with other settings than the last one, which are left out

    def series(self, kind: str, *keys: str) -> list[float]:
        """Numbers under nested keys of the records of a kind, NaN where there is no finite one."""
        return [_number(record, *keys) for record in self.records.get(kind, ())]

    def ends(self, name: str) -> tuple[_Estimate, _Estimate]:
        """A held-out reward at the first and at the last evaluation, NaN where there is none or only one."""
        mean, low, high = (self.series(*_EVAL, name, key) for key in ("mean", "low", "high"))
        known = [*zip(mean, low, high, strict=True)] or [(math.nan, math.nan, math.nan)]
        return known[0], known[-1] if len(known) > 1 else (math.nan, math.nan, math.nan)

    def change(self, name: str) -> Interval:
        """Paired change of a held-out reward from the first to the last evaluation; NaN where there is only one."""
        found = [r["per_prompt"].get(name, []) for r in self.records.get("eval", ()) if "per_prompt" in r]
        if len(found) < 2 or len(found[0]) != len(found[-1]):
            return interval([])
        before, after = ([_number(x) for x in column] for column in (found[0], found[-1]))
        return change(before, after)

    def conflicts(self) -> tuple[list[str], list[list[float]]]:
        """Names of the rewards and the cosines of their signals ``[K][K]``, a mean over the last refreshes."""
        found = [r for r in self.records.get("refresh", ()) if isinstance(r.get("signal_cosines"), dict)][-_RECENT:]
        names = list(found[0]["signal_cosines"]) if found else []
        cells = [[[_number(r, "signal_cosines", a, b) for r in found] for b in names] for a in names]
        return names, [[fmean(finite(x)) if finite(x) else math.nan for x in line] for line in cells]

    def curves(self, field: tuple[str, str], pens: Mapping[str, tuple[str, str]]) -> list[Curve]:
        """One curve per reward in a field."""
        x = self.series(field[0], "step")
        return [Curve(name, x, self.series(*field, name), *pens[name]) for name in _names([self], field)]


def write_report(run: Path) -> Path:
    """Write ``report.html`` into a run folder, from its records, configuration and images, and return its path.

    Raises:
        ValueError: ``metrics.jsonl`` is missing, has no record, or a line other than the last is not JSON.
    """
    return _about_one(_load(run), run / "report.html")


def _about_one(loaded: _Run, path: Path) -> Path:
    """The page of one run."""
    title = loaded.folder.resolve().name
    runs = {title: loaded}
    names = _names([loaded], _EVAL, _TRAINING, _APPLIED, _WEIGHTS, _NORMS, _GAINS, _SHARES)
    pens = dict(zip(names, itertools.cycle(PENS), strict=False))
    weights = "Weight of each reward's unit gradient in the direction, at each refresh; all together 1."
    factors = "What each reward's gradient is multiplied by at a step, its scale included."
    lengths = "Length of each reward's gradient at each refresh, on a log axis; a gap is a reward without a gradient."
    progress = "How far each reward has come on training prompts, in standard deviations, as the soft minimum sees it."
    signal = "Signal's share of each squared gradient norm, averaged over refreshes; noise alone is on both sides of 0."
    each = "Cosine of the direction with each reward's gradient on data that it had not seen."
    gains = plot("Gains so far", progress, loaded.curves(_GAINS, pens), wide=True)
    shares = plot("Signal shares", signal, loaded.curves(_SHARES, pens), wide=True)
    in_units = plot("Weights", weights, loaded.curves(_WEIGHTS, pens), wide=True)
    applied = plot("Applied coefficients", factors, loaded.curves(_APPLIED, pens), wide=True)
    norms = plot("Norms", lengths, loaded.curves(_NORMS, pens), wide=True, log=True)
    config = f"<details><summary>config.toml</summary><pre>{escape(loaded.config)}</pre></details>"
    sections = (
        *(_answer(runs), _summary(runs), _rewards(runs), _held_out(runs, pens, by_run=False), _images(runs)),
        _conflict_matrix(loaded),
        section("Coefficients", "coefficients", "", in_units, applied, gains),
        _cosines(runs, plot("Each reward on the next batch", each, loaded.curves(_NEXT, pens), wide=True)),
        section("Gradient norms", "gradient norms", "", norms, shares),
        *(_health(loaded), _warnings(loaded)),
        section("Configuration", "config.toml", "", config if loaded.config else ""),
    )
    return write_page(path, f"Run {title}", sections)


def write_comparison(runs: Mapping[str, Path], path: Path) -> Path:
    """Write one page that overlays several runs, by label; folders, result and errors as of ``write_report``."""
    return _about_several({label: _load(run) for label, run in runs.items()}, path)


def _about_several(loaded: Mapping[str, _Run], path: Path) -> Path:
    """The page of several runs."""
    pens = dict(zip(loaded, itertools.cycle(PENS), strict=False))
    sections = _answer(loaded), _summary(loaded), _rewards(loaded), _held_out(loaded, pens, by_run=True)
    return write_page(path, "Comparison of runs", (*sections, _cosines(loaded), _images(loaded)))


def report_on(folders: Sequence[Path], out: Path | None) -> tuple[Path, list[str]]:
    """Write the page of one run, or that of several, at ``out``, in the run's folder or beside the first; runs that
    cannot be used are left out.

    Returns:
        The page, and a line about each run that is left out.

    Raises:
        ConfigError: none of them can be used, or there is no place for the page.
    """
    folders = list({folder.resolve(): folder for folder in folders}.values())
    names = [folder.resolve().name for folder in folders]
    runs, faults = {}, []
    for folder, name in zip(folders, names, strict=True):
        label = name if names.count(name) == 1 else str(folder)
        if not folder.is_dir():
            faults.append(f"--run: expected the folder of a run, got {folder}.")
            continue
        try:
            runs[label] = _load(folder)
        except (OSError, ValueError) as error:
            faults.append(f"--run: cannot report on {folder}: {error}")
    if not runs:
        raise ConfigError("\n".join(faults))
    one = len(folders) == 1
    page = out or (folders[0] / "report.html" if one else folders[0].parent / "comparison.html")
    make_folder(page.parent, "--out")
    try:
        return _about_one(runs[names[0]], page) if one else _about_several(runs, page), faults
    except OSError as error:
        raise ConfigError(f"--out: cannot write {page}: {error}. Give another file.") from error


def reward_table(run: Path) -> str:
    """Held-out rewards as aligned text: what the interval of the paired change allows to say, before and after.

    Raises:
        ValueError: as of ``write_report``.
    """
    loaded = _load(run)
    rows = [["reward", "verdict", "change, 95 % paired", "before", "after"]]
    rows += [_reward_row(name, loaded, name) for name in _names([loaded], _EVAL)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _load(run: Path) -> _Run:
    """A run folder, without a last record that was cut off while it was written."""
    file, toml, records = run / "metrics.jsonl", run / "config.toml", dict[str, list[dict[str, Any]]]()
    for record in reading.records(run):
        records.setdefault(str(record.get("kind")), []).append(record)
    if not records:
        raise ValueError(f"{file}: expected at least one record, got {'none' if file.is_file() else 'no file'}.")
    evals = records.get("eval", [])
    alike = [record for record in evals if record.get("settings") == evals[-1].get("settings")]
    records |= {"eval": alike} if evals else {}
    config = toml.read_text("utf-8", "replace") if toml.is_file() else ""
    return _Run(run, config, records, len(evals) - len(alike))


def _number(item: Any, *keys: str) -> float:
    """The number under nested keys, NaN where there is no finite one."""
    for key in keys:
        item = item.get(key) if isinstance(item, dict) else None
    number = isinstance(item, (int, float)) and not isinstance(item, bool) and math.isfinite(item)
    return float(item) if number else math.nan


def _names(runs: Iterable[_Run], *fields: tuple[str, str]) -> list[str]:
    """Rewards in fields (kind, key) of the records, in the order in which they appear."""
    found = (record.get(key) for kind, key in fields for run in runs for record in run.records.get(kind, ()))
    return list(dict.fromkeys(name for item in found if isinstance(item, dict) for name in item))


def _text(estimate: _Estimate, sign: str = "") -> str:
    """As ``0.500 [0.400, 0.600]``; ``-`` without a mean, the mean alone without an interval."""
    mean, low, high = (format(value, f"{sign}.3f") for value in estimate)
    known, bounded = (not math.isnan(value) for value in (estimate[0], estimate[1] + estimate[2]))
    return f"{mean} [{low}, {high}]" if known and bounded else mean if known else "-"


def _summary(runs: Mapping[str, _Run]) -> str:
    """Rule, length and duration of each run in one line."""
    lines = []
    for label, run in runs.items():
        rule = re.search(r"""^\s*balance\s*=\s*(["'])(.*?)\1""", run.config, re.MULTILINE)
        steps = max(finite(x for kind in run.records for x in run.series(kind, "step")), default=0.0)
        epochs = len(set(finite(run.series("epoch", "epoch"))))
        seconds = sum(finite(x for part in _names([run], _SECONDS) for x in run.series(*_SECONDS, part)))
        text = f"rule {rule[2] if rule else 'unknown'}, {steps:.0f} steps, {epochs} epochs"
        lines.append(f"<p>{escape(label)}: {escape(text)}, wall time {seconds / 60:.1f} min.</p>")
    return "".join(lines)


def _answer(runs: Mapping[str, _Run]) -> str:
    """Which rewards rose, which fell, and which two conflict the most, in a line or two for each run."""
    lines = []
    for label, run in runs.items():
        found: dict[str, list[str]] = {}
        for name in _names([run], _EVAL):
            found.setdefault(verdict(run.change(name)), []).append(name)
        words = [word for word in ("raised", "lowered", "not told apart") if word in found]
        said = [f"{word}: {', '.join(found[word])}" for word in words]
        names, matrix = run.conflicts()
        pairs = [(matrix[i][j], names[i], names[j]) for i in range(len(names)) for j in range(i)]
        worst = min((pair for pair in pairs if not math.isnan(pair[0])), default=None)
        if worst is not None and worst[0] < 0:
            said.append(f"strongest conflict: {worst[1]} and {worst[2]}, cosine {worst[0]:+.2f}")
        if said:
            lines.append(f"<p><b>{escape(label)}</b>: {escape('; '.join(said))}.</p>")
    return "".join(lines)


def _rewards(runs: Mapping[str, _Run]) -> str:
    """What the interval of each reward's paired change allows to say, the change, before and after."""
    rows = [["reward", "verdict", "change", "before", "after"]]
    for name, (label, run) in itertools.product(_names(runs.values(), _EVAL), runs.items()):
        rows.append(_reward_row(name if len(runs) == 1 else f"{name} ({label})", run, name))
    sentence = (
        "First and last evaluation, with 95 % intervals over prompts. The change is paired: the same prompts and the "
        "same noise before and after; a verdict needs an interval on one side of 0."
    )
    others = sum(run.others for run in runs.values())
    sentence += f" {others} evaluations with other settings are left out." * (others > 0)
    return section("Rewards before and after", "held-out evaluations", sentence, table(rows))


def _reward_row(title: str, run: _Run, name: str) -> list[str]:
    """A reward: what the interval of its paired change allows to say, that change, and the means before and after."""
    (before, after), found = run.ends(name), run.change(name)
    return [title, verdict(found), _text(found[:3], "+"), _text(before), _text(after)]


def _conflict_matrix(run: _Run) -> str:
    """Cosines of the rewards' signals with each other, averaged over the last refreshes."""
    names, matrix = run.conflicts()
    if not names:
        return ""
    sentence = (
        "Cosines of the rewards' signals with each other, free of noise bias, at the last refreshes: below 0, what "
        "raises one lowers the other. A dash: a signal that cannot be told from noise."
    )
    return section("Conflicts between rewards", "conflicts", sentence, matrix_table(names, matrix))


def _held_out(runs: Mapping[str, _Run], pens: Mapping[str, tuple[str, str]], *, by_run: bool) -> str:
    """A small plot per reward; pens are by run or by reward."""
    figures = []
    for name in _names(runs.values(), _EVAL):
        curves = []
        for label, run in runs.items():
            mean, low, high = (run.series(*_EVAL, name, key) for key in ("mean", "low", "high"))
            legend, pen = (label, pens[label]) if by_run else ("held-out", pens[name])
            curves.append(Curve(legend, run.series("eval", "step"), mean, *pen, band=(low, high)))
            training = run.series("epoch", "step"), run.series(*_TRAINING, name, "mean")
            curves += [] if by_run else [Curve("training", *training, MUTED, width=0.8)]
        figures.append(plot(name, "", curves))
    sentence = "Bold: mean over held-out prompts with its 95 % interval"
    sentence += "." if by_run else "; thin: mean over the epoch's training prompts."
    return section("Held-out rewards", "held-out evaluations", sentence, *figures)


def _images(runs: Mapping[str, _Run]) -> str:
    """The first held-out prompts with their images before and after and all scores, and the whole pictures."""
    cards = "".join(tile_cards({label: run.folder for label, run in runs.items()}))
    grids = []
    for (label, run), name in itertools.product(runs.items(), ("before", "after")):
        file = run.folder / "grids" / f"{name}.png"
        if file.is_file():
            caption, data = escape(f"{label}: {name} training"), base64.b64encode(file.read_bytes()).decode()
            image = f'<img alt="{caption}" src="data:image/png;base64,{data}">'
            grids.append(f"<figure>{image}<figcaption>{caption}</figcaption></figure>")
    whole = f'<div class="grid">{"".join(grids)}</div>' if grids else ""
    if cards and whole:
        whole = f"<details><summary>All pictures</summary>{whole}</details>"
    sentence = "Before and after have the same prompts and seeds. " + "The first prompts, not chosen." * bool(cards)
    parts = f'<div class="tiles">{cards}</div>' if cards else "", f'<div class="wide">{whole}</div>' if whole else ""
    return section("Images", "images in grids/", sentence, *filter(None, parts))


def _cosines(runs: Mapping[str, _Run], *more: str) -> str:
    """Cosines of the direction with the gradients of its own batch and of the next one, and conflicts."""
    columns = ("n refreshes", "median minimum cosine", "conflicts", "conflict rate", "pure noise gives")
    keys = ("step", "next_min_cosine", "min_cosine", "mean_cosine", "null")
    figures, rows = [], [["", *columns]]
    for label, run in runs.items():
        x, fresh, same, mean, null = (run.series("refresh", key) for key in keys)
        curves = [
            Curve("next batch, minimum", x, fresh, INK),
            Curve("same batch, minimum", x, same, MUTED, width=0.9),
            Curve("same batch, mean", x, mean, MUTED, "dashed", 0.9),
            Curve("same batch, 1/sqrt(K) of noise", x, null, MUTED, "dotted"),
        ]
        figures.append(plot(label, "", curves, wide=True) if finite(same + fresh) else "")
        noise = f"{median(finite(null)):.3f}" if finite(null) else "-"
        rows += [[f"{label}: same batch", *_conflicts(finite(same)), noise]] if finite(same) else []
        rows += [[f"{label}: next batch", *_conflicts(finite(fresh)), "0"]] if finite(fresh) else []
    sentence = (
        "Cosines of the direction with each reward's gradient: below 0, a conflict, that reward would get worse. "
        "Same-batch cosines say little, as the direction was made from those very gradients: pure noise reaches "
        "1/sqrt(K), and balancing hides conflicts. The next batch is data it had not seen, where noise gives about 0, "
        "of either sign. Rates have Wilson's 95 % interval, which takes refreshes as independent."
    )
    return section("Gradient cosines", "gradient cosines", sentence, *figures, *more, table(rows))


def _conflicts(cosines: list[float]) -> list[str]:
    """Number, median, and how many are negative: the rate with Wilson's 95 % interval."""
    n, hits = len(cosines), sum(value < 0 for value in cosines)
    rate, low, high, _ = wilson(hits, n)
    return [str(n), f"{median(cosines):.3f}", f"{hits} of {n}", f"{rate:.1%} [{low:.1%}, {high:.1%}]"]


def _health(run: _Run) -> str:
    """Loss and sizes over steps, and skipped steps."""
    steps, x = run.records.get("step", []), run.series("step", "step")
    texts = {
        "loss": "Loss of the step.",
        "grad_norm": "Length of the combined gradient.",
        "kl": "Squared distance of the velocity to that of the base; 0 unless loss.kl_weight is above 0.",
        "x0_abs": "Mean absolute value of the sampled latents; a steady rise warns of collapse.",
    }
    figures = [plot(key, text, [Curve(key, x, run.series("step", key), INK)]) for key, text in texts.items()]
    velocity = [Curve("trained", x, run.series("step", "v_norm"), INK)]
    base = run.series("step", "v_norm_base")
    velocity += [Curve("base", x, base, MUTED, "dashed")] if finite(base) else []
    figures.append(plot("v_norm", f"Length of the velocity. {LONGER:g} times the base's is a warning.", velocity))
    sentence = f"Skipped steps: {sum(record.get('skipped') is True for record in steps)} of {len(steps)}."
    return section("Training health", "step records", sentence, *(figures if steps else []))


def _warnings(run: _Run) -> str:
    """Warnings by epoch."""
    records = run.records.get("epoch", [])
    found = [(_number(record, "epoch"), str(text)) for record in records for text in record.get("warnings") or ()]
    items = "".join(f"<li>Epoch {epoch:.0f}: {escape(text)}</li>" for epoch, text in found)
    return section("Warnings", "epoch records", "", f"<ul>{items or '<li>None.</li>'}</ul>" if records else "")


def final_report(run: Path) -> Path:
    """Write the report; a run without one is complete all the same.

    Raises:
        TrainingError: it could not be written.
    """
    try:
        return write_report(run)
    except (OSError, ValueError) as error:
        raise TrainingError(
            f"the report could not be written: {error}. The run itself is complete; write it again with "
            f"python -m reference report --run {run}"
        ) from error
