"""Charts as inline SVG: they need no script, no font and no network.

Colours come from the page's CSS classes, so that one drawing serves light and dark. Every mark has
a `<title>`, which browsers show as a tooltip and screen readers read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape

WIDTH = 720
RIGHT, TOP, BOTTOM = 12, 12, 36
LETTER = 12.5  # width of a wide font's on a phone, where the page draws text largest


def error_chart(points: Sequence[tuple[str, float, float]], height: int = 240) -> str:
    """Errors of linears in the order of the model: nearest rounding above, this run below, a stem
    between them.

    points: (name, error, error of nearest rounding), relative. The vertical axis is logarithmic:
    errors of one model span three decades.
    """
    values = [value for _, ours, nearest in points for value in (ours, nearest) if value > 0]
    if not values:
        return ""

    low = 10 ** math.floor(math.log10(min(values)))
    high = 10 ** math.ceil(math.log10(max(values)))
    if high <= low:
        high = low * 10

    left = _room(_percent(10.0**power) for power in _powers(low, high))

    def x_of(index: int) -> float:
        return left + (WIDTH - left - RIGHT) * (index + 0.5) / len(points)

    def y_of(value: float) -> float:
        share = math.log10(max(value, low) / low) / math.log10(high / low)
        return height - BOTTOM - share * (height - TOP - BOTTOM)

    marks = list(_decades(low, high, left, y_of))
    for index, (name, ours, nearest) in enumerate(points):
        x = x_of(index)
        tip = f"<title>{escape(name)}: {ours:.2g}, nearest {nearest:.2g}</title>"
        marks.append(
            f'<line class="stem" x1="{x:.1f}" x2="{x:.1f}" y1="{y_of(nearest):.1f}" '
            f'y2="{y_of(ours):.1f}"/>'
        )
        marks.append(
            f'<circle class="before" cx="{x:.1f}" cy="{y_of(nearest):.1f}" r="2.6">{tip}</circle>'
        )
        marks.append(
            f'<circle class="after" cx="{x:.1f}" cy="{y_of(ours):.1f}" r="3.2">{tip}</circle>'
        )

    middle = (left + WIDTH - RIGHT) / 2
    marks.append(
        f'<text class="axis" x="{middle}" y="{height - 8}" text-anchor="middle">first block → '
        "last block</text>"
    )

    return _svg(
        marks, height, "Relative output error of every linear, nearest rounding and this run"
    )


def bar_chart(rows: Sequence[tuple[str, float, str]], label: str) -> str:
    """Horizontal bars. rows: (name, length, text at the bar's end)."""
    longest = max((value for _, value, _ in rows), default=0.0)
    if longest <= 0:
        return ""

    step = 26
    names = _room(name for name, _, _ in rows)
    end = _room(text for _, _, text in rows)

    marks = []
    for index, (name, value, text) in enumerate(rows):
        y = index * step + 4
        width = max(1.0, (WIDTH - names - end) * value / longest)
        marks.append(
            f'<text class="axis" x="{names - 8}" y="{y + 13}" '
            f'text-anchor="end">{escape(name)}</text>'
        )
        marks.append(
            f'<rect class="bar" x="{names}" y="{y}" width="{width:.1f}" height="16" rx="3"/>'
        )
        marks.append(
            f'<text class="axis" x="{names + width + 8:.1f}" y="{y + 13}">{escape(text)}</text>'
        )

    return _svg(marks, len(rows) * step + 6, label)


def heat_map(rows: Sequence[tuple[str, Sequence[float]]], label: str) -> str:
    """One cell per value, darker for more: tokens per expert, one row per layer."""
    most = max((value for _, values in rows for value in values), default=0.0)
    columns = max((len(values) for _, values in rows), default=0)
    if most <= 0 or columns == 0:
        return ""

    names = _room(name for name, _ in rows)
    step = 22

    width = (WIDTH - names) / columns

    marks = []
    for row, (name, values) in enumerate(rows):
        y = row * step + 4  # a label is higher than its cell on a phone
        marks.append(
            f'<text class="axis" x="{names - 8}" y="{y + 15}" '
            f'text-anchor="end">{escape(name)}</text>'
        )
        for column, value in enumerate(values):
            strength = 0.06 + 0.94 * value / most
            tip = f"<title>{escape(name)}, expert {column}: {value:,.0f} tokens</title>"
            place = (
                f'x="{names + column * width:.1f}" y="{y + 1}" '
                f'width="{max(1.0, width - 1):.1f}" height="{step - 2}"'
            )
            marks.append(f'<rect class="bar" {place} fill-opacity="{strength:.2f}">{tip}</rect>')

    return _svg(marks, len(rows) * step + 8, label)


def _room(labels: Iterable[str]) -> int:
    """Width of the column of labels before or behind bars and cells."""
    return round(16 + LETTER * max(map(len, labels)))


def _powers(low: float, high: float) -> range:
    """Of ten, from `low` to `high`."""
    return range(round(math.log10(low)), round(math.log10(high)) + 1)


def _decades(low: float, high: float, left: int, y_of) -> Iterable[str]:
    """A line and a label for every power of ten."""
    for power in _powers(low, high):
        y = y_of(10.0**power)
        yield f'<line class="rule" x1="{left}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield (
            f'<text class="axis" x="{left - 8}" y="{y + 4:.1f}" '
            f'text-anchor="end">{_percent(10.0**power)}</text>'
        )


def _percent(value: float) -> str:
    return f"{100 * value:g} %"


def _svg(marks: Iterable[str], height: int, label: str) -> str:
    body = "\n".join(marks)
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{escape(label)}">\n{body}\n</svg>'
    )
