"""Draws how quantization works, from a real run on SmolLM2-135M.

    PYTHONPATH=examples python benchmarks/draw_how.py

It takes a minute on two cores. It measures block 15: which scales fold where, how far the outputs
of the block move when random scales are folded in, how far when one fold is false, and how the
output error of one linear grows column by column, rounded to nearest and with error feedback.
The figures go to `benchmarks/results/how-smollm2-cpu.json`, the drawings to
`docs/figures/folds.svg` and `docs/figures/feedback.svg`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import write
from real_models import smollm2_dir
from svg import document, line, polyline, text
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from awq.calibration.batches import load_calibration
from awq.core.rounding import feedback_factor, round_with_feedback
from awq.core.weight import fake_quantize, group_range, scale_and_zero
from awq.folds import discover, prove
from awq.folds.fold import InputGroup
from awq.folds.proof import TOLERANCE, holds
from awq.nn.blocks import find_block_lists
from awq.nn.walk import BlockWalk

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks/results/how-smollm2-cpu.json"
FIGURES = ROOT / "docs/figures"
BLOCK = 15
LINEAR = "mlp.gate_proj"
GROUP_SIZE = 64
ROWS, TOKENS = 16, 256  # of the bundled text


def measure() -> dict[str, Any]:
    """What the drawings show: folds and their proofs, and errors column by column."""
    source = smollm2_dir()
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    batches = load_calibration(None, tokenizer, max_samples=ROWS, max_length=TOKENS)
    inputs = [{"input_ids": b.input_ids, "attention_mask": b.attention_mask} for b in batches]
    found: dict[str, Any] = {}
    with torch.no_grad():
        for visit in BlockWalk(model, find_block_lists(model), inputs, calibration=True):
            if visit.index == BLOCK:
                found = {"model": "SmolLM2-135M", "block": visit.name}
                found |= proofs(visit)
                found |= {"linear": LINEAR, "group_size": GROUP_SIZE}
                found |= columns(visit)
                break
            visit.advance()
    return found


def proofs(visit: Any) -> dict[str, Any]:
    """The folds of one block; how far its outputs move with all of them, and with a false one."""
    generator = torch.Generator().manual_seed(0)
    groups = discover(visit.block, visit.single, visit.many, generator)
    groups = prove(visit.block, groups, visit.many, generator)
    listed = [
        {
            "linears": list(group.consumers),
            "producer": group.fold.producer if group.fold else None,
            "fold": group.fold.describe() if group.fold else None,
        }
        for group in groups
    ]
    return {
        "folds": listed,
        "tolerance": TOLERANCE,
        "change_with_all_folds": holds(visit.block, groups, visit.many),
        "change_with_a_false_fold": holds(visit.block, with_false_fold(groups), visit.many),
    }


def with_false_fold(groups: list[InputGroup]) -> list[InputGroup]:
    """The fold of down_proj into gate_proj, whose output passes an activation first: false."""
    (group,) = [group for group in groups if group.consumers == ("mlp.down_proj",)]
    assert group.fold is not None
    return [replace(group, fold=replace(group.fold, producer="mlp.gate_proj"))]


def columns(visit: Any) -> dict[str, Any]:
    """Relative output error of one linear after each rounded column, both ways of rounding."""
    linear = visit.block.get_submodule(LINEAR)
    gram = gram_of(visit, linear)
    weight = linear.weight.detach().float()
    scale, zero = scale_and_zero(*group_range(weight, GROUP_SIZE))
    order, factor = feedback_factor(gram)
    nearest = fake_quantize(weight, scale, zero)
    energy = float(((weight @ gram) * weight).sum())

    def error(now: Tensor) -> float:
        moved = now - weight
        return float(((moved @ gram) * moved).sum()) / energy

    rest, half = weight.clone(), weight.clone()
    errors: dict[str, list[float]] = {"nearest": [], "feedback": []}
    for place, column in enumerate(order.tolist()):
        half[:, column] = nearest[:, column]
        rounded = fake_quantize(rest, scale, zero)[:, column]
        later = order[place + 1 :]
        push = (rest[:, column] - rounded) / factor[place, place]
        rest[:, later] -= push[:, None] * factor[place, place + 1 :]
        rest[:, column] = rounded
        if place % 8 == 7:
            errors["nearest"].append(error(half))
            errors["feedback"].append(error(rest))
    ours = round_with_feedback(weight, order, factor, scale, zero).dequantize()
    return {"columns_per_point": 8, "errors": errors, "error_of_the_package": error(ours)}


def gram_of(visit: Any, linear: nn.Module) -> Tensor:
    """Sum of x xᵀ over the inputs of the linear, float32 [in, in]."""
    seen: list[Tensor] = []

    def note(_module: nn.Module, args: tuple) -> None:
        seen.append(args[0].flatten(0, -2).float())

    handle = linear.register_forward_pre_hook(note)
    for call, hidden in visit.calls():
        call.run(visit.block, hidden)
    handle.remove()
    x = torch.cat(seen)
    return x.t() @ x


def draw_folds(found: dict[str, Any]) -> str:
    """Producers left, the linears that read them right, and what the proof measured."""
    out = [text(20, 28, "Folds of one block, found and proven", "title")]
    out.append(text(20, 48, f"{found['model']}, {found['block']}", "note"))
    for number, fold in enumerate(found["folds"]):
        y = 80 + 62 * number
        names = [name.rsplit(".", 1)[-1] for name in fold["linears"]]
        out += box(20, y, 250, str(fold["producer"] or "nothing"), "÷ s")
        out.append(f'<path d="M270,{y + 21} H330" class="arrow"/>')
        out += box(340, y, 250, ", ".join(names), "× s")
    top = 85 + 62 * len(found["folds"])
    good, bad = found["change_with_all_folds"], found["change_with_a_false_fold"]
    out.append(text(20, top + 10, "Largest relative change of any output, random s from 0.5 to 2:"))
    out.append(text(20, top + 34, f"all four folds: {good:.1e}", "good"))
    limit = f"a fold is accepted below {found['tolerance']:.0e}"
    out.append(text(590, top + 34, limit, "note", "end"))
    out.append(text(20, top + 56, f"down_proj folded into gate_proj: {bad:.1e}, refused", "bad"))
    return document(610, top + 75, "Folds of one block, found and proven", out)


def box(x: float, y: float, width: float, name: str, scale: str) -> list[str]:
    return [
        f'<rect x="{x}" y="{y}" width="{width}" height="42" rx="6" class="box"/>',
        text(x + 12, y + 26, name),
        text(x + width - 12, y + 26, scale, "note", "end"),
    ]


def draw_feedback(found: dict[str, Any]) -> str:
    """Output error against rounded columns: nearest rounding adds up, feedback makes up for it."""
    left, right, top, bottom = 70, 560, 75, 300
    errors = found["errors"]
    points = len(errors["nearest"])
    width = points * found["columns_per_point"]
    highest = max(errors["nearest"][-1], errors["feedback"][-1]) * 1.1

    def place(point: int, error: float) -> tuple[float, float]:
        x = left + (point + 1) / points * (right - left)
        return x, bottom - error / highest * (bottom - top)

    out = [text(20, 28, "Output error while columns are rounded", "title")]
    about = f"{found['model']}, {found['block']}.{found['linear']}, 4 bits, group size "
    out.append(text(20, 48, f"{about}{found['group_size']}", "note"))
    step = 10 ** math.floor(math.log10(highest))
    for mark in range(int(highest / step) + 1):
        _, y = place(0, mark * step)
        out += [
            line(left, y, right, y, "axis"),
            text(left - 8, y + 4, f"{mark * step:g}", "note", "end"),
        ]
    for column in (0, width // 4, width // 2, 3 * width // 4, width):
        x = left + column / width * (right - left)
        out.append(text(x, bottom + 20, str(column), "note", "middle"))
    out.append(text((left + right) / 2, bottom + 40, "columns rounded", "note", "middle"))
    for name, label, kind in (
        ("nearest", "to nearest", "other-line"),
        ("feedback", "error feedback", "line"),
    ):
        curve = [place(number, error) for number, error in enumerate(errors[name])]
        out.append(polyline(curve, kind))
        x, y = curve[-1]
        out.append(text(x + 8, y + 4, f"{label} {errors[name][-1]:.4f}"))
    return document(720, 355, "Output error while columns are rounded", out)


def draw(found: dict[str, Any], folder: Path) -> Sequence[Path]:
    pictures = {"folds.svg": draw_folds(found), "feedback.svg": draw_feedback(found)}
    for name, picture in pictures.items():
        (folder / name).write_text(picture, encoding="utf-8")
    return [folder / name for name in pictures]


def main() -> None:
    write(RESULT, "cpu", measure())
    draw(json.loads(RESULT.read_text(encoding="utf-8")), FIGURES)


if __name__ == "__main__":
    main()
