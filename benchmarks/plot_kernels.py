"""Draws time against tokens from a result of `kernels_products.py`, as an SVG without other
software.

python benchmarks/plot_kernels.py benchmarks/results/kernels-h100.json docs/kernels-h100.svg
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

# Marlin's and AutoAWQ's sums on an H100, microseconds, float16, same shapes and method:
# docs/kernels.md names their source.
PEERS = {
    "Marlin": {1: 74.4, 16: 77.9, 64: 164.5, 256: 357, 1024: 1361, 4096: 5659},
    "AutoAWQ 0.2.9": {1: 278, 16: 255, 64: 482, 256: 1794, 1024: 790, 4096: 2792},
}
COLORS = {
    "this package": "#c0392b",
    "float16 cuBLAS": "#2c3e50",
    "Marlin": "#2980b9",
    "AutoAWQ 0.2.9": "#7f8c8d",
    "tinygemm": "#27ae60",
}
WIDTH, HEIGHT, LEFT, TOP = 760, 420, 60, 30


def place(tokens: float, time: float) -> tuple[float, float]:
    """Pixel of a point; both axes are logarithmic: 1 … 4096 tokens, 30 … 6000 µs."""
    x = LEFT + math.log2(tokens) / 12 * (WIDTH - LEFT - 150)
    y = TOP + (1 - math.log(time / 30) / math.log(6000 / 30)) * (HEIGHT - TOP - 50)
    return round(x, 1), round(y, 1)


def draw(results: dict) -> str:
    sums = {
        "this package": results["float16"]["ours"]["sum"],
        "float16 cuBLAS": results["float16"]["cublas"]["sum"],
        "tinygemm": results["bfloat16"]["tinygemm"]["sum"],
    }
    rows = PEERS | {name: {int(m): t for m, t in row.items()} for name, row in sums.items()}
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for time in (30, 100, 300, 1000, 3000):
        (x, y), (end, _) = place(1, time), place(4096, time)
        out += [
            f'<line x1="{x}" y1="{y}" x2="{end}" y2="{y}" stroke="#ddd"/>',
            f'<text x="{x - 8}" y="{y + 4}" text-anchor="end">{time}</text>',
        ]
    for tokens in (1, 4, 16, 64, 256, 1024, 4096):
        x, y = place(tokens, 30)
        out.append(f'<text x="{x}" y="{y + 18}" text-anchor="middle">{tokens}</text>')
    for name, row in sorted(rows.items(), key=lambda item: item[0] != "this package", reverse=True):
        points = [place(m, t) for m, t in sorted(row.items())]
        path, width = " ".join(f"{x},{y}" for x, y in points), 3 if name == "this package" else 1.5
        out.append(
            f'<polyline points="{path}" fill="none" stroke="{COLORS[name]}" '
            f'stroke-width="{width}"/>'
        )
    for number, name in enumerate(COLORS):
        y = TOP + 20 + 20 * number
        out += [
            f'<line x1="{WIDTH - 140}" y1="{y - 4}" x2="{WIDTH - 120}" y2="{y - 4}" '
            f'stroke="{COLORS[name]}" stroke-width="3"/>',
            f'<text x="{WIDTH - 115}" y="{y}">{name}</text>',
        ]
    gpu = results["environment"]["gpu"]
    out.append(
        f'<text x="{LEFT}" y="18">µs for the four products of a Mistral-7B layer against tokens, '
        f"group 128, {gpu}</text></svg>"
    )
    return "\n".join(out) + "\n"


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(
        draw(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))), encoding="utf-8"
    )
