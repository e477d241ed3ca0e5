"""Drawing of report pages: plots, tables and sections as HTML, readable offline, in light and in dark."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from reference.run import reading
from reference.text_files import write_whole

PENS = [(color, dash) for dash in ("solid", "dashed", "dotted") for color in reading.PALETTE]
INK, MUTED = "#010203", "#040506"  # stand for the page's own colours, which depend on light and dark
_STYLE: dict[Any, Any] = {
    **dict.fromkeys(("axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor", "text.color"), INK),
    **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), MUTED),
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
border-bottom:1px solid var(--line)}.tiles{grid-column:1/-1;display:grid;gap:1.5rem;
grid-template-columns:repeat(auto-fill,minmax(min(18rem,100%),1fr))}.tile div{display:flex;flex-wrap:wrap;gap:.5rem}
.tile span{min-width:0}.tile div>span{flex:1 1 6rem;max-width:16rem}.tile img{image-rendering:pixelated}
.tile small{color:var(--muted)}figcaption{overflow-wrap:anywhere}summary{cursor:pointer}
.matrix td{padding:.3rem .9rem;text-align:right}
i{display:inline-block;width:1.6rem;margin:0 .4rem 0 .8rem;vertical-align:middle}
</style></head><body><h1>$title</h1>
$body</body></html>
""")


class Curve(NamedTuple):
    """Values over steps, NaN where there is none, and perhaps a band around them."""

    label: str
    x: list[float]
    y: list[float]
    color: str
    dash: str = "solid"
    width: float = 1.6
    band: tuple[list[float], list[float]] | None = None


def finite(values: Iterable[float]) -> list[float]:
    """Values without NaN."""
    return [value for value in values if not math.isnan(value)]


def plot(title: str, sentence: str, curves: Sequence[Curve], *, wide: bool = False, log: bool = False) -> str:
    """A plot with its caption and key, a note where no value is finite, nothing without curves."""
    if log:
        curves = [c._replace(y=[y if y > 0 else math.nan for y in c.y]) for c in curves]
    if not any(finite(c.y) for c in curves):
        return f'<p class="note">{escape(title)}: no finite value.</p>' if curves else ""
    keys = [f'<i style="border-top:3px {c.dash} {c.color}"></i>{escape(c.label)}' for c in curves]
    key = f"<br>{' '.join(keys)}" if len(keys) > 1 else ""
    caption = f'<figcaption><b>{escape(title)}</b> <span class="note">{escape(sentence)}</span>{key}</figcaption>'
    size, kind = ((8.6, 2.9), "wide") if wide else ((3.6, 2.2), "small")
    drawing = f'<svg role="img" aria-label="{escape(title)}"{_svg(curves, size, repr((title, curves)), log)}'
    html = f'<figure class="{kind}">{caption}{drawing}</figure>'
    return html.replace(INK, "var(--ink)").replace(MUTED, "var(--muted)")


def _svg(curves: Sequence[Curve], size: tuple[float, float], salt: str, log: bool) -> str:
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


def table(rows: Sequence[Sequence[str]]) -> str:
    """A table of escaped text under its first row, nothing without others."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in rows[0])
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows[1:])
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>' if body else ""


def matrix_table(names: Sequence[str], matrix: Sequence[Sequence[float]]) -> str:
    """Numbers in [-1, 1] by name and name, the stronger the colour the farther from 0; a dash for NaN."""
    head = "".join(f"<th>{escape(name)}</th>" for name in ("", *names))
    lines = []
    for name, line in zip(names, matrix, strict=True):
        cells = "".join(_tinted(x) for x in line)
        lines.append(f"<tr><th>{escape(name)}</th>{cells}</tr>")
    return f'<div class="wide"><table class="matrix"><tr>{head}</tr>{"".join(lines)}</table></div>'


def _tinted(x: float) -> str:
    """A cell with its number on its colour."""
    if math.isnan(x):
        return "<td>-</td>"
    color, share = reading.PALETTE[0 if x > 0 else 1], round(60 * min(abs(x), 1.0))
    return f'<td style="background:color-mix(in srgb,{color} {share}%,transparent)">{x:+.2f}</td>'


def section(title: str, needs: str, sentence: str, *parts: str) -> str:
    """A section of figures side by side where there is room, or one line that says why it is left out."""
    if not any(parts):
        return f'<p class="note">{title} left out: there are no {needs}.</p>'
    return f'<h2>{title}</h2><p>{escape(sentence)}</p><div class="grid">{"".join(parts)}</div>'


def write_page(path: Path, title: str, sections: Iterable[str]) -> Path:
    """Write a page that may load nothing from elsewhere."""
    html = _PAGE.substitute(title=escape(title), body="\n".join(sections))
    write_whole(path, html.encode("utf-8", "xmlcharrefreplace"))
    return path
