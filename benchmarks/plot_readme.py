"""Draws the picture of README.md from committed results: quality against time, and decoding against
the memory floor.

    python benchmarks/plot_readme.py

writes `docs/figures/overview.svg` and `overview.zh.svg`. The SVG follows the reader's light or dark
theme.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from svg import document, line, polyline, text

ROOT = Path(__file__).resolve().parent.parent
QUALITY = ROOT / "benchmarks/results/quality-smollm2-g64-natural-h200.json"
SPEED = ROOT / "benchmarks/results/generate-h100.json"
FIGURES = ROOT / "docs/figures"

WIDTH, HEIGHT = 880, 330
WORDS = {
    "en": {
        "quality": "Perplexity against quantization time",
        "quality note": "SmolLM2-135M, group 64, natural text, {device}; lower is better",
        "full precision": "full precision {value:.2f}",
        "rtn": "round to nearest",
        "seconds": "{value} s",
        "decode": "Decoding, tokens per second",
        "decode note": "Mistral-7B's shape, batch 1, 64 tokens in, 64 out, {device}",
        "fused": "this package, fused",
        "captured": "this package, not fused",
        "dense": "transformers, float16",
        "floor": "what memory bandwidth allows: {value:.0f}",
    },
    "zh": {
        "quality": "困惑度与量化用时",
        "quality note": "SmolLM2-135M，分组 64，自然文本，{device}；越低越好",
        "full precision": "全精度 {value:.2f}",
        "rtn": "最近舍入",
        "seconds": "{value} 秒",
        "decode": "解码速度（token/秒）",
        "decode note": "Mistral-7B 的形状，批大小 1，输入 64，输出 64，{device}",
        "fused": "本包，融合",
        "captured": "本包，未融合",
        "dense": "transformers，float16",
        "floor": "显存带宽允许的上限 {value:.0f}",
    },
}


def quality_panel(result: dict[str, Any], words: dict[str, str]) -> list[str]:
    """Perplexity of each preset over the seconds that it takes, with full precision as a dashed
    line."""
    left, right, top, bottom = 50, 430, 75, 275
    full = result["full_precision"]
    rows = result["rows"]
    lowest, highest = math.floor(full), math.ceil(max(row["perplexity"] for row in rows))

    def place(seconds: float, perplexity: float) -> tuple[float, float]:
        x = left + math.log(seconds) / math.log(40) * (right - left)
        y = bottom - (perplexity - lowest) / (highest - lowest) * (bottom - top)
        return x, y

    out = [text(left - 30, 25, words["quality"], "title")]
    out.append(
        text(left - 30, 45, words["quality note"].format(device=short(result["device"])), "note")
    )
    for value in range(lowest, highest + 1):
        _, y = place(1, value)
        out += [line(left, y, right, y, "axis"), text(left - 8, y + 4, str(value), "note", "end")]
    for seconds in (1, 2, 5, 10, 20, 40):
        x, _ = place(seconds, lowest)
        out.append(text(x, bottom + 20, words["seconds"].format(value=seconds), "note", "middle"))

    _, floor = place(1, full)
    out += [line(left, floor, right, floor, "floor")]
    out += [text(left + 6, floor - 6, words["full precision"].format(value=full), "floor-text")]

    points = [place(row["seconds"], row["perplexity"]) for row in rows]
    out.append(polyline(points, "line"))
    for row, (x, y) in zip(rows, points):
        name = words.get(row["name"], row["name"])
        out.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" class="ours"/>')
        out.append(text(x + 10, y - 8, f"{name} {row['perplexity']:.2f}"))
    return out


def decode_panel(result: dict[str, Any], words: dict[str, str]) -> list[str]:
    """Tokens per second of one sequence as bars, with what reading the weights once per token
    allows as a dashed line."""
    left, right, top = 490, 860, 75
    rows = {
        row["name"]: row
        for row in result["rows"]
        if (row["batch"], row.get("prompt"), row.get("new")) == (1, 64, 64)
    }
    fused = rows["fused"]
    floor = fused["decode_tok_s"] / fused["share_of_floor"]
    bars = [
        ("fused", fused["decode_tok_s"], "ours"),
        ("captured", rows["captured, as if it could not be fused"]["decode_tok_s"], "ours"),
        ("dense", rows["transformers float16 eager"]["decode_tok_s"], "other"),
    ]
    scale = (right - left - 20) / floor
    out = [text(left, 25, words["decode"], "title")]
    out.append(text(left, 45, words["decode note"].format(device=short(result["device"])), "note"))
    for number, (name, value, kind) in enumerate(bars):
        y = top + 20 + 62 * number
        out.append(text(left, y - 6, words[name]))
        out.append(
            f'<rect x="{left}" y="{y}" width="{value * scale:.1f}" height="24" rx="3" '
            f'class="{kind}"/>'
        )
        out.append(text(left + value * scale + 8, y + 17, f"{value:.0f}"))
    x = left + floor * scale
    out.append(line(x, top, x, top + 185, "floor"))
    out.append(text(x - 6, top + 200, words["floor"].format(value=floor), "floor-text", "end"))
    return out


def short(device: str) -> str:
    """The name of a GPU without its vendor and memory: "NVIDIA H100 80GB HBM3" → "H100"."""
    return device.replace("NVIDIA ", "").split()[0]


def draw(quality: dict[str, Any], speed: dict[str, Any], words: dict[str, str]) -> str:
    parts = quality_panel(quality, words) + decode_panel(speed, words)
    return document(WIDTH, HEIGHT, f"{words['quality']}; {words['decode']}", parts)


def main() -> None:
    quality = json.loads(QUALITY.read_text(encoding="utf-8"))
    speed = json.loads(SPEED.read_text(encoding="utf-8"))
    FIGURES.mkdir(exist_ok=True)
    for language, name in (("en", "overview.svg"), ("zh", "overview.zh.svg")):
        (FIGURES / name).write_text(draw(quality, speed, WORDS[language]), encoding="utf-8")


if __name__ == "__main__":
    main()
