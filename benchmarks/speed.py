"""Time and memory of quantizing a large model: Mistral-7B's shape with random weights (neither
depends on their values).

    python benchmarks/speed.py --presets fast balanced --samples 128 --tokens 512 --json out.json

    torchrun --nproc-per-node 2 benchmarks/speed.py --json out.json

    python benchmarks/speed.py --processes 1 2 --json out.json

--processes: one number of processes after the other on this machine, each on a GPU of its own
(torchrun, NCCL; gloo on a CPU), and for every preset what the last takes of the first's time and
whether their bytes are equal; when they are not, the status is 1. --shape tiny: to try the script
itself.

Seconds run from loaded weights to packed model; memory is the peak beside the model's own weights.
The digest is of all packed tensors: for any number of processes it must be the same.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import common
import torch
from transformers import AutoModelForCausalLM, MistralConfig
from transformers.initialization import no_init_weights

import awq
from awq.calibration import CalibrationBatch
from awq.core.team import ALONE, present_team, several_processes, was_started_in_a_team
from awq.quantize import QuantizeOptions, quantize_model

SHAPES = {
    "7b": dict(
        hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8,
    ),
    "tiny": dict(
        hidden_size=256, intermediate_size=768, num_attention_heads=8, num_key_value_heads=2,
    ),
}  # fmt: skip
NAMES = {"7b": "Mistral-7B", "tiny": "tiny"}


def random_model(shape: str, layers: int, device: str) -> torch.nn.Module:
    """A shape ("7b": Mistral-7B-v0.1's) in bfloat16, weights N(0, 0.02²), norms 1."""
    config = MistralConfig(
        **SHAPES[shape],
        num_hidden_layers=layers,
        vocab_size=32000,
        sliding_window=None,
        max_position_embeddings=4096,
    )
    with torch.device(device), no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.ones_(parameter)
        else:
            parameter.data.normal_(0, 0.02, generator=generator)
    return model.eval()


def measure(arguments: argparse.Namespace, preset: str, layers: int) -> dict:
    model = random_model(arguments.shape, layers, arguments.device)
    ids = torch.randint(
        3, 32000, (arguments.samples, arguments.tokens), generator=torch.Generator().manual_seed(0)
    )
    batches = [CalibrationBatch(part, torch.ones_like(part)) for part in ids.split(8)]
    cuda = arguments.device == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        weights = torch.cuda.memory_allocated()
    start = time.perf_counter()
    report = quantize_model(
        model, batches, awq.AwqConfig(group_size=128), QuantizeOptions(preset=preset)
    )
    if cuda:
        torch.cuda.synchronize()
    row = {
        "preset": preset,
        "layers": layers,
        "processes": present_team().size,
        "seconds": time.perf_counter() - start,
        "phases": report.phases,
        "digest": digest(model),
    }
    if cuda:
        row["peak_gb_beside_model"] = (torch.cuda.max_memory_allocated() - weights) / 1e9
        row["model_gb"] = weights / 1e9
    return row


def digest(model: torch.nn.Module) -> str:
    """Of the model's tensors: sums in which every number's place counts, made where they lie."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        whole = tensor.contiguous().view(-1)
        numbers = whole.view(torch.int16) if whole.is_floating_point() else whole
        places = torch.arange(numbers.numel(), device=tensor.device) % 65521 + 1
        found.update(f"{name} {int((numbers.long() * places).sum())}".encode())
    return found.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--presets", nargs="+", default=["fast", "balanced"])
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--processes", type=int, nargs="+", default=[])
    arguments = parser.parse_args()
    if arguments.processes:
        compare(arguments)
        return

    with several_processes() if was_started_in_a_team() else nullcontext(ALONE) as team:
        measure_all(arguments, team.rank == 0)


def measure_all(arguments: argparse.Namespace, tells: bool) -> None:
    """tells: of several processes, whether this one prints."""
    for preset in arguments.presets:
        measure(arguments, preset, 1)  # kernels are compiled and the allocator is warm
    rows: list[dict] = []
    for preset in arguments.presets:
        rows.append(measure(arguments, preset, arguments.layers))
        if not tells:
            continue
        print(json.dumps(rows[-1]), flush=True)
        write(arguments, {"rows": rows})


def write(arguments: argparse.Namespace, found: dict) -> None:
    """Into the file that was asked for, with what was measured on."""
    if arguments.json:
        head = {
            "shape": f"{NAMES[arguments.shape]}, random weights, group 128",
            "samples": arguments.samples,
            "tokens": arguments.tokens,
        }
        common.write(arguments.json, arguments.device, head | found)


def compare(arguments: argparse.Namespace) -> None:
    """Runs this script with one number of processes after the other. Exits with 1 when two of them
    give other bytes."""
    rows: list[dict] = []
    for count in arguments.processes:
        rows += rows_of(arguments, count)
        compared = [comparison(rows, preset, count) for preset in arguments.presets]
        write(arguments, {"compared": compared, "rows": rows})

    for line in compared:
        print(json.dumps(line), flush=True)
    if not all(line["equal_bytes"] for line in compared):
        raise SystemExit(1)


def rows_of(arguments: argparse.Namespace, count: int) -> list[dict]:
    """What so many processes measure."""
    start = [sys.executable]
    if count > 1:
        # by number: a machine's own name need not lead to it
        start += ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
        start += ["--nproc-per-node", str(count)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        given = ["--presets", *arguments.presets, "--json", str(path)]
        for name in ("shape", "layers", "samples", "tokens", "device"):
            given += [f"--{name}", str(getattr(arguments, name))]
        subprocess.run([*start, __file__, *given], check=True)
        return json.loads(path.read_text())["rows"]


def comparison(rows: list[dict], preset: str, count: int) -> dict:
    """Of so many processes with the first number of them, for one preset."""
    own = [row for row in rows if row["preset"] == preset]
    first, last = own[0], next(row for row in own if row["processes"] == count)
    return {
        "preset": preset,
        "layers": last["layers"],
        "processes": [first["processes"], count],
        "seconds": [round(row["seconds"], 2) for row in (first, last)],
        "ratio": round(last["seconds"] / first["seconds"], 3),
        "equal_bytes": first["digest"] == last["digest"],
    }


if __name__ == "__main__":
    main()
