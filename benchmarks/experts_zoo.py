"""Every mixture of experts of the installed transformers: tiny, random, quantized, saved, loaded
again through both doors.

A type counts as a mixture when its tiny model (`tiny_kinds`) holds weights of experts, in whatever
form. For each one, in float32 with groups of 32:

- share: experts' weights that are 4-bit in the saved files, of all experts' weights of the model;
- fold error: change of the output when every fold that discovery finds is applied with random
scales, experts exposed;
- loaded: difference of the output of `AutoAWQForCausalLM.from_quantized` and of transformers' own
  class from the model in memory; 0 is equality. `bytes`: whether the loaded model saves the same
  bytes again;
- error and nearest: difference of the quantized model's output from the dense one, with the default
  preset and with nearest rounding of the same linears.

Differences are norms relative to the output compared with. What stays dense among the experts is
listed with its reason.

    python benchmarks/experts_zoo.py [--types mixtral qwen3_moe] [--out
    benchmarks/results/experts_zoo.json]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from common import ROUND_TO_NEAREST, head
from safetensors.torch import load_file
from tiny_kinds import Kind, all_kinds, build, inputs, is_linear
from torch import Tensor, nn

from awq import AutoAWQForCausalLM
from awq.calibration import CalibrationBatch
from awq.checkpoint import save_checkpoint
from awq.config import AwqConfig
from awq.folds import apply_fold
from awq.folds.find import find_folds
from awq.nn.expert_shape import fused_experts
from awq.nn.experts import every_token
from awq.nn.expose import expose_experts
from awq.quantize import QuantizeOptions, quantize_model

CONFIG = AwqConfig(group_size=32)
ROWS, LENGTH, TEXT_IDS = 6, 64, (5, 90)
SECONDS_PER_TYPE = 300
CODES_PER_WORD = 8
LIMITS = {"share": 0.98, "fold_error": 1e-4, "awq": 0.0, "transformers": 0.0}


def expert_weights(model: nn.Module) -> dict[str, int]:
    """Name of every parameter that holds weights of routed experts, or of one of them → number of
    values."""
    found = {}
    fused = fused_experts(model)
    for name, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            full = f"{name}.{leaf}"
            path = full.lower().split(".")
            inside = any("expert" in part and "shared" not in part for part in path[:-1])
            is_weight = (
                parameter.dim() == 3 or is_linear(module) or "moe" in type(module).__name__.lower()
            )
            if inside and parameter.dim() >= 2 and is_weight and not _routes(full):
                # rows beyond the experts' number are those of experts without weights
                known = parameter if name not in fused else parameter[: fused[name].num_experts]
                found[full] = known.numel()
    return found


def _routes(name: str) -> bool:
    return any(part in ("router", "gate", "layer", "classifier") for part in name.split(".")[-3:-1])


def packed_values(directory: Path, among: str = "expert") -> int:
    """Number of 4-bit weights of routed experts in the files."""
    values = 0
    for path in directory.glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            parts = name.split(".")
            routed = any(among in part and "shared" not in part for part in parts)
            if parts[-1] == "qweight" and routed and not _routes(name):
                values += CODES_PER_WORD * tensor.numel()
    return values


@torch.no_grad()
def output_of(model: nn.Module, item: dict[str, Tensor]) -> Tensor:
    """The first output that says what a model computes, of real tokens only."""
    found = model(**item)
    tensor = next(
        found[key]
        for key in ("logits", "last_hidden_state", "encoder_last_hidden_state")
        if key in found
    )
    return tensor.float()


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))


def calibration() -> list[CalibrationBatch]:
    ids = torch.randint(*TEXT_IDS, (ROWS, LENGTH), generator=torch.Generator().manual_seed(3))
    return [CalibrationBatch(ids, torch.ones_like(ids))]


def fold_error(kind: Kind, item: dict[str, Tensor], expected: Tensor) -> float:
    """Every fold with scales between 0.5 and 2."""
    model = build(kind)
    expose_experts(model)
    with every_token(model):
        found = list(find_folds(model))
    for name, groups in found:
        for group in groups:
            if group.fold:
                scales = group.fold.tie(torch.rand(group.in_features) * 1.5 + 0.5)
                apply_fold(model.get_submodule(name), group.fold, scales)
    return difference(output_of(model, item), expected)


def sweep(kind: Kind) -> dict[str, Any] | None:
    """All columns of one type, or None when it holds no experts."""
    dense = build(kind)
    weights = expert_weights(dense)
    if not weights:
        return None
    item = inputs(kind, dense)
    expected = output_of(dense, item)
    row: dict[str, Any] = {"class": kind.class_name, "weights of experts": sum(weights.values())}
    row["fold_error"] = fold_error(kind, item, expected)
    model, nearest = build(kind), build(kind)
    report = quantize_model(model, calibration(), CONFIG, QuantizeOptions())
    quantize_model(nearest, calibration(), CONFIG, QuantizeOptions(**ROUND_TO_NEAREST))
    in_memory = output_of(model, item)
    row["error"], row["nearest"] = (
        difference(in_memory, expected),
        difference(output_of(nearest, item), expected),
    )
    row["dense"] = sorted({reason for name, reason in report.skipped.items() if "expert" in name})
    row["warnings"] = report.warnings
    row["folds"] = sum(1 for line in report.linears if "expert" in line.name)
    folder = Path(tempfile.mkdtemp())
    try:
        save_checkpoint(model, folder / "a", CONFIG, report)
        row["share"] = packed_values(folder / "a") / row["weights of experts"]
        row |= doors(kind, folder, item, in_memory)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    row["passes"] = passes(row)
    return row


def doors(kind: Kind, folder: Path, item: dict[str, Tensor], in_memory: Tensor) -> dict[str, Any]:
    """Differences of what is loaded, or the error of loading, and whether it saves the same
    bytes."""
    row: dict[str, Any] = {}
    if kind.role == "causal":
        try:
            ours = AutoAWQForCausalLM.from_quantized(
                str(folder / "a"), torch_dtype="float32", device="cpu"
            )
            row["awq"] = difference(output_of(ours.model, item), in_memory)
        except Exception as error:
            row["awq"] = f"{type(error).__name__}: {error}"
    try:
        theirs = (
            getattr(transformers, kind.class_name)
            .from_pretrained(folder / "a", dtype=torch.float32)
            .eval()
        )
        row["transformers"] = difference(output_of(theirs, item), in_memory)
        save_checkpoint(theirs, folder / "b", CONFIG)
        names = sorted(path.name for path in (folder / "a").glob("*.safetensors"))
        row["bytes"] = all(
            (folder / "a" / name).read_bytes() == (folder / "b" / name).read_bytes()
            for name in names
        )
    except Exception as error:
        row["transformers"] = f"{type(error).__name__}: {error}"
    return row


def passes(row: dict[str, Any]) -> bool:
    """All columns within LIMITS, and no worse than nearest."""
    doors_equal = all(row.get(door, 0.0) == LIMITS[door] for door in ("awq", "transformers"))
    kept = row["fold_error"] <= LIMITS["fold_error"] and row["share"] >= LIMITS["share"]
    return bool(doors_equal and kept and row["error"] <= row["nearest"] and row.get("bytes"))


def apart(kind: Kind, seconds: int) -> dict[str, Any] | None:
    """`sweep` in a process of its own, so that what one type breaks or takes does not reach the
    next."""
    path = Path(tempfile.mkdtemp()) / "row.json"
    process = os.fork()
    if process == 0:
        signal.alarm(seconds)
        try:
            row = sweep(kind)
        except BaseException as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            row = {
                "failed": f"{type(error).__name__}: {error}"[:400],
                "at": f"{Path(place.filename).name}:{place.lineno}",
            }
        path.write_text(json.dumps(row), encoding="utf-8")
        os._exit(0)
    os.waitpid(process, 0)
    return (
        json.loads(path.read_text()) if path.exists() else {"failed": f"took more than {seconds} s"}
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--types", nargs="*", help="model types; all that hold experts when left out"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/experts_zoo.json"))
    parser.add_argument("--seconds", type=int, default=SECONDS_PER_TYPE, help="for one type")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    rows: dict[str, Any] = {}
    if arguments.types and arguments.out.exists():  # the others keep their rows
        rows = json.loads(arguments.out.read_text())["types"]
    for kind in all_kinds():
        if kind.role == "seqcls" or (arguments.types and kind.type not in arguments.types):
            continue
        row = apart(kind, arguments.seconds)
        if row is None:
            continue
        rows[str(kind)] = row
        print(kind, "passes" if row.get("passes") else json.dumps(row), flush=True)
        done = sum(bool(row.get("passes")) for row in rows.values())
        arguments.out.write_text(
            json.dumps(head("cpu") | {"passing": done, "of": len(rows), "types": rows}, indent=1)
            + "\n"
        )


if __name__ == "__main__":
    main()
