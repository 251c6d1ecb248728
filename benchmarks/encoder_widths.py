r"""Encoders of the widths that people serve, random weights, on a CPU: compiled beside torch.

    python benchmarks/encoder_widths.py --work folder --make          # once; minutes a shape
    python benchmarks/encoder_widths.py --work folder --json out.json

Each shape (`encoder_shapes.py`) is rounded to nearest in 4 bits and run as `awq` (`Encoder`) and
`awq-int8` (`precision="int8"`), beside `torch-bfloat16`, the dense model in transformers. Every one
is a process of its own; they take turns, and figures are medians over turns of a call's median
milliseconds. `of_limit` is the share of the machine that a figure reaches: the least time that
`roofline.py` allows the products and the reading of weights, as measured in the same run, divided
by the time. `load_s`: reading the directory; `compile_s`: reading, compiling and proving the
program; `least_cosine`: of the compiled embeddings to transformers' forward of the same 4 bits.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import encoder_shapes as shapes

RUNS = {"1×16": (1, 16), "1×256": (1, 256), "16×64": (16, 64)}
VARIANTS = ("awq", "awq-int8", "torch-bfloat16")
PASSES = {"awq": 2, "awq-int8": 1}
LEAST_CALLS = 3
ROOT = Path(__file__).resolve().parent.parent


def serve(variant: str, folder: Path, seconds: float) -> None:
    """Says how it was loaded, then answers every line of input, a run's name, with a line of
    JSON."""
    sys.path.insert(0, str(ROOT))
    import torch

    from awq import Encoder
    from awq.nn.memory import resident_memory

    dense = variant == "torch-bfloat16"
    precision = "int8" if variant == "awq-int8" else "exact"
    began = time.perf_counter()
    encoder = Encoder.from_pretrained(
        folder / ("dense" if dense else "awq"), "cpu", precision="exact" if dense else precision
    )
    loaded = time.perf_counter()
    state = encoder.compiled
    done = time.perf_counter()
    first = {"load_s": loaded - began, "compile_s": done - loaded, "compiled": bool(state)}
    first["reason"] = state.reason

    @torch.no_grad()
    def by_torch(texts: list[str]) -> Any:
        return encoder({k: torch.tensor(rows) for k, rows in encoder._tokenize(texts).items()})

    sample = shapes.texts_of(16, 4)
    if not dense:
        found, wanted = encoder.encode(sample), by_torch(sample).float()
        first["least_cosine"] = float(torch.cosine_similarity(found, wanted).min())
    first["resident_mb"] = resident_memory() >> 20
    first["products"] = _products(encoder)
    print(json.dumps(first), flush=True)

    run = by_torch if dense else encoder.encode
    for line in sys.stdin:
        count, tokens = RUNS[line.strip()]
        texts = shapes.texts_of(tokens, count)
        run(texts)
        times: list[float] = []
        start = time.perf_counter()
        while len(times) < LEAST_CALLS or time.perf_counter() - start < seconds:
            began = time.perf_counter()
            run(texts)
            times.append(time.perf_counter() - began)
        answer = {"ms": 1e3 * statistics.median(times), "resident_mb": resident_memory() >> 20}
        print(json.dumps(answer), flush=True)


def _products(encoder: Any) -> int:
    """Multiply-adds of a token in the products of blocks; 0 for a model without a program."""
    if encoder.native is None:
        return 0
    spec = encoder.native.spec
    up = spec.inner * (2 if spec.gated else 1)
    inner = spec.hidden * (spec.channels + up) + spec.hidden * (spec.context + spec.inner)
    return spec.layers * inner


class Worker:
    """A process with one variant of one shape."""

    def __init__(self, variant: str, folder: Path, seconds: float) -> None:
        command = [sys.executable, __file__, "--worker", variant, "--work", str(folder)]
        self.process = subprocess.Popen(
            [*command, "--seconds", str(seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.first = self._answer()

    def ask(self, word: str) -> dict[str, Any]:
        print(word, file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit("a worker ended")


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    import roofline

    folder = arguments.work / name
    machine = roofline.measure()
    workers = {v: Worker(v, folder, arguments.seconds) for v in VARIANTS}
    turns: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for _ in range(arguments.repeats):
        for run in RUNS:
            for variant, worker in workers.items():
                turns.setdefault((variant, run), []).append(worker.ask(run))

    file_mb = (folder / "awq/model.safetensors").stat().st_size / 2**20
    result: dict[str, Any] = {"machine": machine._asdict(), "file_mb": round(file_mb)}
    for variant, worker in workers.items():
        worker.process.kill()
        worker.process.wait()
        own: dict[str, Any] = dict(worker.first)
        for run, (count, tokens) in RUNS.items():
            times = [turn["ms"] for turn in turns[variant, run]]
            row: dict[str, Any] = {"ms": statistics.median(times), "turns": times}
            if variant in PASSES and own["products"]:
                products = own["products"]
                floor = machine.floor_ms(products * count * tokens, PASSES[variant], products / 2)
                row["of_limit"] = None if floor is None else floor / row["ms"]
            own[run] = row
        result[variant] = own
        print(name, variant, _shown(own), flush=True)
    return result


def _shown(own: dict[str, Any]) -> str:
    parts = [f"compiled {own['compiled']}, {own['load_s']:.1f} + {own['compile_s']:.1f} s"]
    parts.append(f"{own['resident_mb']} MB, cosine {own.get('least_cosine', 1):.5f}")
    for run in RUNS:
        share = own[run].get("of_limit")
        parts.append(f"{run} {own[run]['ms']:.2f} ms" + (f" ({share:.0%})" if share else ""))
    return "; ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="a folder that keeps the models")
    parser.add_argument("--shapes", nargs="+", default=list(shapes.SHAPES))
    parser.add_argument("--make", action="store_true", help="only write the models")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", choices=VARIANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if arguments.worker:
        serve(arguments.worker, arguments.work, arguments.seconds)
        return
    if arguments.make:
        for name in arguments.shapes:
            folder = arguments.work / name
            shapes.write_shape(name, folder / "dense")
            sample = shapes.texts_of(16, 16)
            shapes.write_quantized(folder / "dense", folder / "awq", sample, "bfloat16")
        return

    import common

    results: dict[str, Any] = {}
    for name in arguments.shapes:
        results[name] = measure(name, arguments)
        if arguments.json:
            common.write(arguments.json, "cpu", {"shapes": results})


if __name__ == "__main__":
    main()
