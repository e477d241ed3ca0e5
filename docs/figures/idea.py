"""Draw docs/figures/idea.svg: two rewards' gradients, the directions that raise both, their sum, and the balanced one.

python docs/figures/idea.py
"""

from __future__ import annotations

import math
from pathlib import Path

Vector = tuple[float, float]
A: Vector = (3.0, 0.3)  # raises reward A, a long gradient
B: Vector = (-1.05, 0.95)  # raises reward B, a short one
WIDTH, HEIGHT, UNIT, ORIGIN = 700, 310, 105.0, (200.0, 262.0)
STYLE = """
  text { font: 15px system-ui, sans-serif; fill: #24292f }
  .small { font-size: 13px; fill: #57606a }
  .a { stroke: #0969da; fill: #0969da } .b { stroke: #8250df; fill: #8250df }
  .sum { stroke: #cf222e; fill: #cf222e } .ours { stroke: #1a7f37; fill: #1a7f37 }
  line { stroke-width: 3 } .edge { stroke: #8c959f; stroke-width: 1; stroke-dasharray: 4 4 }
  .cone { fill: #2da44e; fill-opacity: 0.16 } text.a, text.b, text.sum, text.ours { stroke: none }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 } .small { fill: #9198a1 }
    .a { stroke: #4493f8; fill: #4493f8 } .b { stroke: #ab7df8; fill: #ab7df8 }
    .sum { stroke: #f85149; fill: #f85149 } .ours { stroke: #3fb950; fill: #3fb950 }
    .edge { stroke: #656c76 } .cone { fill-opacity: 0.25 }
  }
"""


def unit(v: Vector) -> Vector:
    """A vector of length 1."""
    length = math.hypot(*v)
    return v[0] / length, v[1] / length


def place(v: Vector) -> Vector:
    """Where the tip of a vector is drawn."""
    return ORIGIN[0] + UNIT * v[0], ORIGIN[1] - UNIT * v[1]


def arrow(v: Vector, kind: str, label: str, shift: Vector) -> str:
    """A vector from the origin with a head and a label beside its tip."""
    (x, y), (dx, dy) = place(v), unit(v)
    dx, dy = 11 * dx, -11 * dy
    head = f"{x:.1f},{y:.1f} {x - dx - dy / 2:.1f},{y - dy + dx / 2:.1f} {x - dx + dy / 2:.1f},{y - dy - dx / 2:.1f}"
    line = f'<line class="{kind}" x1="{ORIGIN[0]}" y1="{ORIGIN[1]}" x2="{x - dx / 2:.1f}" y2="{y - dy / 2:.1f}"/>'
    text = f'<text class="{kind}" x="{x + shift[0]:.1f}" y="{y + shift[1]:.1f}">{label}</text>'
    return f'{line}<polygon class="{kind}" points="{head}"/>{text}'


def main() -> None:
    """Write the picture."""
    total = A[0] + B[0], A[1] + B[1]
    assert total[0] * B[0] + total[1] * B[1] < 0  # the sum lowers B
    a, b = unit(A), unit(B)
    balanced = unit((a[0] + b[0], a[1] + b[1]))
    assert all(balanced[0] * v[0] + balanced[1] * v[1] > 0 for v in (A, B))
    # directions that raise both: between the normals of A and of B that point to the other one's side
    left, right = (-a[1], a[0]), (b[1], -b[0])
    far = [place((2.3 * x, 2.3 * y)) for x, y in (left, right)]
    cone = " ".join(f"{x:.1f},{y:.1f}" for x, y in (ORIGIN, *far))
    edges = "".join(f'<line class="edge" x1="{ORIGIN[0]}" y1="{ORIGIN[1]}" x2="{x:.1f}" y2="{y:.1f}"/>' for x, y in far)
    parts = [
        f'<polygon class="cone" points="{cone}"/>{edges}',
        arrow(A, "a", "gradient of reward A", (-130.0, 36.0)),
        arrow(B, "b", "gradient of reward B", (-76.0, -12.0)),
        arrow(total, "sum", "their sum: raises A, lowers B", (12.0, 4.0)),
        arrow((1.75 * balanced[0], 1.75 * balanced[1]), "ours", "balanced: raises both", (14.0, -2.0)),
        '<text class="small" x="212" y="18">directions that raise both</text>',
    ]
    title = "<title>Two conflicting gradients: their sum lowers one reward, the balanced direction raises both</title>"
    box = f'viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {box} role="img">{title}<style>{STYLE}</style>'
    (Path(__file__).parent / "idea.svg").write_text(f"{head}{''.join(parts)}</svg>\n", encoding="utf-8")


if __name__ == "__main__":
    main()
