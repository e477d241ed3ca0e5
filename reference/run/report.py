"""Reports of training runs: self-contained HTML pages, readable offline, in light and in dark, and a table of text."""

from __future__ import annotations

import base64
import io
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import fmean, median
from string import Template
from typing import Any, NamedTuple

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from reference.errors import TrainingError
from reference.run import reading
from reference.run.intervals import Interval, change, interval, verdict, wilson
from reference.run.watch import LONGER

_EVAL, _TRAINING, _APPLIED = ("eval", "rewards"), ("epoch", "rewards"), ("step", "coefficients")
_WEIGHTS, _NORMS, _SECONDS = ("refresh", "weights"), ("refresh", "norms"), ("epoch", "seconds")
_GAINS, _SHARES = ("epoch", "gains"), ("refresh", "signal_share")
_RECENT = 10  # refreshes behind the conflict matrix
_Estimate = tuple[float, float, float]  # mean, and the bounds of its 95 % interval

_PENS = [(color, dash) for dash in ("solid", "dashed", "dotted") for color in reading.PALETTE]
_INK, _MUTED = "#010203", "#040506"  # stand for the page's own colours, which depend on light and dark
_STYLE: dict[Any, Any] = {
    **dict.fromkeys(("axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor", "text.color"), _INK),
    **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), _MUTED),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "svg.fonttype"), "none"),
    **{"font.size": 9, "axes.grid": True, "axes.spines.top": False, "axes.spines.right": False, "grid.alpha": 0.25},
}
_PAGE = Template("""<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width,initial-scale=1"><title>$title</title><style>
:root{color-scheme:light dark;--bg:#fff;--ink:#1b1f24;--muted:#68707a;--line:#d8dce1}
@media(prefers-color-scheme:dark){:root{--bg:#14171a;--ink:#e6e8eb;--muted:#9aa2ac;--line:#343a41}}
body{max-width:62rem;margin:0 auto;padding:1.5rem 1rem 4rem;background:var(--bg);color:var(--ink);
font:1rem/1.5 system-ui,sans-serif}h1,h2{line-height:1.2}h2{margin:2.5rem 0 .5rem}.note{color:var(--muted)}
.grid{display:grid;gap:1rem 1.5rem;grid-template-columns:repeat(auto-fit,minmax(min(17rem,100%),1fr))}
.wide{grid-column:1/-1;overflow-x:auto}.wide svg{min-width:32rem}figure{margin:0;min-width:0}pre{overflow-x:auto}
svg,img{display:block;width:100%;height:auto}svg text{font-family:system-ui,sans-serif!important}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}th,td{padding:.3rem .9rem .3rem 0;text-align:left;
border-bottom:1px solid var(--line)}i{display:inline-block;width:1.6rem;margin:0 .4rem 0 .8rem;vertical-align:middle}
</style></head><body><h1>$title</h1>
$body</body></html>
""")


class _Curve(NamedTuple):
    """Values over steps, NaN where there is none, and perhaps a band around them."""

    label: str
    x: list[float]
    y: list[float]
    color: str
    dash: str = "solid"
    width: float = 1.6
    band: tuple[list[float], list[float]] | None = None


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
        return names, [[fmean(_finite(x)) if _finite(x) else math.nan for x in line] for line in cells]

    def curves(self, field: tuple[str, str], pens: Mapping[str, tuple[str, str]]) -> list[_Curve]:
        """One curve per reward in a field."""
        x = self.series(field[0], "step")
        return [_Curve(name, x, self.series(*field, name), *pens[name]) for name in _names([self], field)]


def write_report(run: Path) -> Path:
    """Write ``report.html`` into a run folder, from its records, configuration and images, and return its path.

    Raises:
        ValueError: ``metrics.jsonl`` is missing, has no record, or a line other than the last is not JSON.
    """
    loaded, title = _load(run), run.resolve().name
    runs = {title: loaded}
    names = _names([loaded], _EVAL, _TRAINING, _APPLIED, _WEIGHTS, _NORMS, _GAINS, _SHARES)
    pens = dict(zip(names, itertools.cycle(_PENS), strict=False))
    weights = "Weight of each reward's unit gradient in the direction, at each refresh; all together 1."
    factors = "What each reward's gradient is multiplied by at a step, its scale included."
    lengths = "Length of each reward's gradient at each refresh, on a log axis; a gap is a reward without a gradient."
    progress = "How far each reward has come on training prompts, in standard deviations, as the soft minimum sees it."
    signal = "Signal's share of each squared gradient norm, averaged over refreshes; noise alone is on both sides of 0."
    gains = _figure("Gains so far", progress, loaded.curves(_GAINS, pens), wide=True)
    shares = _figure("Signal shares", signal, loaded.curves(_SHARES, pens), wide=True)
    in_units = _figure("Weights", weights, loaded.curves(_WEIGHTS, pens), wide=True)
    applied = _figure("Applied coefficients", factors, loaded.curves(_APPLIED, pens), wide=True)
    norms = _figure("Norms", lengths, loaded.curves(_NORMS, pens), wide=True, log=True)
    config = f"<details><summary>config.toml</summary><pre>{escape(loaded.config)}</pre></details>"
    sections = (
        *(_answer(runs), _summary(runs), _rewards(runs), _held_out(runs, pens, by_run=False), _images(runs)),
        _conflict_matrix(loaded),
        _section("Coefficients", "coefficients", "", in_units, applied, gains),
        _cosines(runs),
        _section("Gradient norms", "gradient norms", "", norms, shares),
        *(_health(loaded), _warnings(loaded)),
        _section("Configuration", "config.toml", "", config if loaded.config else ""),
    )
    return _write_page(run / "report.html", f"Run {title}", sections)


def write_comparison(runs: Mapping[str, Path], path: Path) -> Path:
    """Write one page that overlays several runs, by label; folders, result and errors as of ``write_report``."""
    loaded = {label: _load(run) for label, run in runs.items()}
    pens = dict(zip(runs, itertools.cycle(_PENS), strict=False))
    sections = _answer(loaded), _summary(loaded), _rewards(loaded), _held_out(loaded, pens, by_run=True)
    return _write_page(path, "Comparison of runs", (*sections, _cosines(loaded), _images(loaded)))


def usable_runs(folders: Sequence[Path]) -> tuple[dict[str, Path], list[str]]:
    """Runs that can be reported on, by labels that tell them apart, and a line about each that cannot."""
    names = [folder.resolve().name for folder in folders]
    runs, faults = {}, []
    for folder, name in zip(folders, names, strict=True):
        label = name if names.count(name) == 1 else str(folder)
        if not folder.is_dir():
            faults.append(f"--run: expected the folder of a run, got {folder}.")
            continue
        try:
            _load(folder)
        except ValueError as error:
            faults.append(f"--run: cannot report on {folder}: {error}")
            continue
        runs[label] = folder
    return runs, faults


def reward_table(run: Path) -> str:
    """Held-out rewards before and after as aligned text, with the paired change and what its interval allows to say.

    Raises:
        ValueError: as of ``write_report``.
    """
    loaded = _load(run)
    rows = [["reward", "before", "after", "change, 95 % paired", "verdict"]]
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


def _finite(values: Iterable[float]) -> list[float]:
    """Values without NaN."""
    return [value for value in values if not math.isnan(value)]


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
        steps = max(_finite(x for kind in run.records for x in run.series(kind, "step")), default=0.0)
        epochs = len(set(_finite(run.series("epoch", "epoch"))))
        seconds = sum(_finite(x for part in _names([run], _SECONDS) for x in run.series(*_SECONDS, part)))
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
    """Rewards before and after, the paired change prompt by prompt, and what its interval allows to say."""
    rows = [["reward", "before", "after", "change", "verdict"]]
    for name, (label, run) in itertools.product(_names(runs.values(), _EVAL), runs.items()):
        rows.append(_reward_row(name if len(runs) == 1 else f"{name} ({label})", run, name))
    sentence = (
        "First and last evaluation, with 95 % intervals over prompts. The change is paired: the same prompts and the "
        "same noise before and after; a verdict needs an interval on one side of 0."
    )
    others = sum(run.others for run in runs.values())
    sentence += f" {others} evaluations with other settings are left out." * (others > 0)
    return _section("Rewards before and after", "held-out evaluations", sentence, _table(rows))


def _reward_row(title: str, run: _Run, name: str) -> list[str]:
    """A reward before and after, the paired change, and what its interval allows to say."""
    (before, after), found = run.ends(name), run.change(name)
    return [title, _text(before), _text(after), _text(found[:3], "+"), verdict(found)]


def _conflict_matrix(run: _Run) -> str:
    """Cosines of the rewards' signals with each other, averaged over the last refreshes."""
    names, matrix = run.conflicts()
    if not names:
        return ""
    cells = [[f"{x:+.2f}" if not math.isnan(x) else "-" for x in line] for line in matrix]
    rows = [["", *names], *([name, *line] for name, line in zip(names, cells, strict=True))]
    sentence = (
        "Cosines of the rewards' signals with each other, free of noise bias, at the last refreshes: below 0, what "
        "raises one lowers the other. A dash: a signal that cannot be told from noise."
    )
    return _section("Conflicts between rewards", "conflicts", sentence, _table(rows))


def _held_out(runs: Mapping[str, _Run], pens: Mapping[str, tuple[str, str]], *, by_run: bool) -> str:
    """A small plot per reward; pens are by run or by reward."""
    figures = []
    for name in _names(runs.values(), _EVAL):
        curves = []
        for label, run in runs.items():
            mean, low, high = (run.series(*_EVAL, name, key) for key in ("mean", "low", "high"))
            legend, pen = (label, pens[label]) if by_run else ("held-out", pens[name])
            curves.append(_Curve(legend, run.series("eval", "step"), mean, *pen, band=(low, high)))
            training = run.series("epoch", "step"), run.series(*_TRAINING, name, "mean")
            curves += [] if by_run else [_Curve("training", *training, _MUTED, width=0.8)]
        figures.append(_figure(name, "", curves))
    sentence = "Bold: mean over held-out prompts with its 95 % interval"
    sentence += "." if by_run else "; thin: mean over the epoch's training prompts."
    return _section("Held-out rewards", "held-out evaluations", sentence, *figures)


def _images(runs: Mapping[str, _Run]) -> str:
    """Grids of images before and after."""
    grids = []
    for label, run in runs.items():
        figures = []
        for name in ("before", "after"):
            file = run.folder / "grids" / f"{name}.png"
            if file.is_file():
                caption, data = escape(f"{label}: {name} training"), base64.b64encode(file.read_bytes()).decode()
                image = f'<img alt="{caption}" src="data:image/png;base64,{data}">'
                figures.append(f"<figure>{image}<figcaption>{caption}</figcaption></figure>")
        grids.append(f'<div class="grid wide">{"".join(figures)}</div>' if figures else "")
    return _section("Images", "images in grids/", "Before and after have the same prompts and seeds.", *grids)


def _cosines(runs: Mapping[str, _Run]) -> str:
    """Cosines of the direction with the gradients of its own batch and of the next one, and conflicts."""
    columns = ("n refreshes", "median minimum cosine", "conflicts", "conflict rate", "pure noise gives")
    keys = ("step", "next_min_cosine", "min_cosine", "mean_cosine", "null")
    figures, rows = [], [["", *columns]]
    for label, run in runs.items():
        x, fresh, same, mean, null = (run.series("refresh", key) for key in keys)
        curves = [
            _Curve("next batch, minimum", x, fresh, _INK),
            _Curve("same batch, minimum", x, same, _MUTED, width=0.9),
            _Curve("same batch, mean", x, mean, _MUTED, "dashed", 0.9),
            _Curve("same batch, 1/sqrt(K) of noise", x, null, _MUTED, "dotted"),
        ]
        figures.append(_figure(label, "", curves, wide=True) if _finite(same + fresh) else "")
        noise = f"{median(_finite(null)):.3f}" if _finite(null) else "-"
        rows += [[f"{label}: same batch", *_conflicts(_finite(same)), noise]] if _finite(same) else []
        rows += [[f"{label}: next batch", *_conflicts(_finite(fresh)), "0"]] if _finite(fresh) else []
    sentence = (
        "Cosines of the direction with each reward's gradient: below 0, a conflict, that reward would get worse. "
        "Same-batch cosines say little, as the direction was made from those very gradients: pure noise reaches "
        "1/sqrt(K), and balancing hides conflicts. The next batch is data it had not seen, where noise gives about 0, "
        "of either sign. Rates have Wilson's 95 % interval, which takes refreshes as independent."
    )
    return _section("Gradient cosines", "gradient cosines", sentence, *figures, _table(rows))


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
    figures = [_figure(key, text, [_Curve(key, x, run.series("step", key), _INK)]) for key, text in texts.items()]
    velocity = [_Curve("trained", x, run.series("step", "v_norm"), _INK)]
    base = run.series("step", "v_norm_base")
    velocity += [_Curve("base", x, base, _MUTED, "dashed")] if _finite(base) else []
    figures.append(_figure("v_norm", f"Length of the velocity. {LONGER:g} times the base's is a warning.", velocity))
    sentence = f"Skipped steps: {sum(record.get('skipped') is True for record in steps)} of {len(steps)}."
    return _section("Training health", "step records", sentence, *(figures if steps else []))


def _warnings(run: _Run) -> str:
    """Warnings by epoch."""
    records = run.records.get("epoch", [])
    found = [(_number(record, "epoch"), str(text)) for record in records for text in record.get("warnings") or ()]
    items = "".join(f"<li>Epoch {epoch:.0f}: {escape(text)}</li>" for epoch, text in found)
    return _section("Warnings", "epoch records", "", f"<ul>{items or '<li>None.</li>'}</ul>" if records else "")


def _figure(title: str, sentence: str, curves: Sequence[_Curve], *, wide: bool = False, log: bool = False) -> str:
    """A plot with its caption and key, a note where no value is finite, nothing without curves."""
    if log:
        curves = [c._replace(y=[y if y > 0 else math.nan for y in c.y]) for c in curves]
    if not any(_finite(c.y) for c in curves):
        return f'<p class="note">{escape(title)}: no finite value.</p>' if curves else ""
    keys = [f'<i style="border-top:3px {c.dash} {c.color}"></i>{escape(c.label)}' for c in curves]
    key = f"<br>{' '.join(keys)}" if len(keys) > 1 else ""
    caption = f'<figcaption><b>{escape(title)}</b> <span class="note">{escape(sentence)}</span>{key}</figcaption>'
    size, kind = ((8.6, 2.9), "wide") if wide else ((3.6, 2.2), "small")
    plot = f'<svg role="img" aria-label="{escape(title)}"{_svg(curves, size, repr((title, curves)), log)}'
    html = f'<figure class="{kind}">{caption}{plot}</figure>'
    return html.replace(_INK, "var(--ink)").replace(_MUTED, "var(--muted)")


def _svg(curves: Sequence[_Curve], size: tuple[float, float], salt: str, log: bool) -> str:
    """Curves over steps as an SVG after its opening ``<svg``; dots show what a line cannot, single points."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({**_STYLE, "svg.hashsalt": salt})
        figure, text = Figure(figsize=size, layout="constrained"), io.StringIO()
        axes = figure.add_subplot()
        for _, x, y, color, dash, width, band in curves:
            sides = enumerate(zip([math.nan, *y], y, [*y[1:], math.nan], strict=False))
            dots = [i for i, (a, _, c) in sides if len(y) <= 40 or (math.isnan(a) and math.isnan(c))]
            axes.plot(x, y, ".", color=color, ls=dash, lw=width, ms=3 * width, markevery=dots, zorder=1 + width)
            if band is not None:
                axes.fill_between(x, *band, color=color, alpha=0.18, linewidth=0)
        axes.set(xlabel="step", yscale="log" if log else "linear")
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
        figure.savefig(text, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return re.sub(r'<g id="[^"]*"', "<g", text.getvalue().partition("<svg")[2])


def _table(rows: Sequence[Sequence[str]]) -> str:
    """A table of escaped text under its first row, nothing without others."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in rows[0])
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows[1:])
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>' if body else ""


def _section(title: str, needs: str, sentence: str, *parts: str) -> str:
    """A section of figures side by side where there is room, or one line that says why it is left out."""
    if not any(parts):
        return f'<p class="note">{title} left out: there are no {needs}.</p>'
    return f'<h2>{title}</h2><p>{escape(sentence)}</p><div class="grid">{"".join(parts)}</div>'


def _write_page(path: Path, title: str, sections: Iterable[str]) -> Path:
    """Write a page that may load nothing from elsewhere."""
    html = _PAGE.substitute(title=escape(title), body="\n".join(sections))
    path.write_text(html, encoding="utf-8", errors="xmlcharrefreplace", newline="\n")
    return path


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
