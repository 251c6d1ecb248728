"""Pieces of drawings: text, lines, and a style that follows a light or dark theme."""

from __future__ import annotations

from collections.abc import Sequence
from xml.sax.saxutils import escape

STYLE = """
text { font: 13px system-ui, -apple-system, "Noto Sans CJK SC", sans-serif; fill: #1f2328; }
.title { font-size: 15px; font-weight: 600; }
.note { fill: #59636e; font-size: 12px; }
.axis { stroke: #d1d9e0; }
.line { stroke: #0969da; fill: none; stroke-width: 2; }
.other-line { stroke: #8c959f; fill: none; stroke-width: 2; }
.arrow { stroke: #8c959f; fill: none; stroke-width: 1.5; }
.box { fill: none; stroke: #8c959f; }
.good { fill: #1a7f37; }
.bad { fill: #cf222e; }
.ours { fill: #0969da; }
.other { fill: #8c959f; }
.floor { stroke: #bc4c00; stroke-dasharray: 5 4; stroke-width: 1.5; }
.floor-text { fill: #bc4c00; font-size: 12px; }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3; }
  .note { fill: #9198a1; }
  .axis { stroke: #3d444d; }
  .line { stroke: #4493f8; }
  .good { fill: #3fb950; }
  .bad { fill: #f85149; }
  .ours { fill: #4493f8; }
  .other { fill: #656c76; }
  .floor { stroke: #f0883e; }
  .floor-text { fill: #f0883e; }
}
"""


def text(x: float, y: float, value: str, kind: str = "", anchor: str = "start") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" '
        f'text-anchor="{anchor}">{escape(value)}</text>'
    )


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def polyline(points: Sequence[tuple[float, float]], kind: str) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{path}" class="{kind}"/>'


def document(width: int, height: int, title: str, parts: Sequence[str]) -> str:
    """A whole SVG of `width` by `height` units; `title` is what readers without sight get."""
    label = escape(title, {'"': "&quot;"})
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{label}">'
    )
    body = [head, f"<title>{escape(title)}</title>", f"<style>{STYLE}</style>", *parts, "</svg>"]
    return "\n".join(body) + "\n"
