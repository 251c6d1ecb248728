r"""`Encoder` of an earlier commit beside today's on one device, by turns.

    git archive 3b18d81 awq | tar x -C before
    python benchmarks/encoder_commits.py --before before --model all-MiniLM-L6-v2 --json out.json

The model has the shape and tokenizer of `--model` and random weights, is quantized to 4 bits, and
runs in bfloat16. Both encoders live in processes of their own and take turns, shape by shape.
Figures are medians over turns of a call's median milliseconds; `tokenizing_ms` is the part of it
that makes token ids. `least_cosine` compares the two encoders' embeddings of all texts.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SHAPES = ("1×16", "8×16", "64×16", "1×256", "64×256", "mixed")
MIXED_TEXTS = 128
WARM_CALLS = 4  # a CUDA graph is made when its shape comes for the second time
WORDS = ("river", "hill", "tree", "stone", "water", "fire", "house", "road")
ROOT = Path(__file__).resolve().parent.parent


def texts_of(tokens: int, count: int) -> list[str]:
    """Texts of `tokens` tokens, two special ones included; each word is one token."""
    return [
        " ".join(WORDS[(i + j * (1 + i % 7)) % 8] for j in range(tokens - 2)) for i in range(count)
    ]


def all_texts() -> dict[str, list[str]]:
    chance = random.Random(0)
    found = {}
    for shape in SHAPES:
        if shape == "mixed":
            lengths = [int(2 ** chance.uniform(2, 8)) for _ in range(MIXED_TEXTS)]
            found[shape] = [texts_of(length, 1)[0] for length in lengths]
        else:
            count, tokens = map(int, shape.split("×"))
            found[shape] = texts_of(tokens, count)
    return found


def make(model: str, work: Path) -> Path:
    """A quantized directory of the model's shape, rounded to nearest."""
    import torch
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    import awq

    torch.manual_seed(0)
    dense = work / "dense"
    AutoModel.from_config(AutoConfig.from_pretrained(model)).save_pretrained(dense)
    AutoTokenizer.from_pretrained(model).save_pretrained(dense)
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    rows = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(modules)
    ]
    (dense / "modules.json").write_text(json.dumps(rows))
    (dense / "1_Pooling").mkdir()
    (dense / "1_Pooling/config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    (dense / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 256}))
    quantized = work / "awq"
    model_ = awq.AutoAWQForEmbedding.from_pretrained(
        str(dense), torch_dtype="float32", device_map="cpu"
    )
    nearest = {"preset": "fast", "scaling": False, "clip": False, "bias_correction": False}
    model_.quantize(
        texts=all_texts()["64×16"],
        quant_config={"q_group_size": 128},
        evaluate=False,
        general_texts=False,
        **nearest,
    )
    model_.save_quantized(str(quantized))
    return quantized


def serve(arguments: argparse.Namespace) -> None:
    """Answers every line of input, a shape or a file for embeddings, with a line of JSON."""
    import numpy
    import torch

    import awq

    texts = all_texts()
    encoder = awq.Encoder.from_pretrained(
        arguments.worker, device=arguments.device, dtype="bfloat16"
    )
    for shape in SHAPES:
        for _ in range(WARM_CALLS):
            encoder.encode(texts[shape])
    print(json.dumps({"ready": awq.__file__}), flush=True)
    for line in sys.stdin:
        word = line.strip()
        if word in texts:
            answer = {
                "p50_ms": _median_ms(lambda t=texts[word]: encoder.encode(t), arguments.seconds),
                "tokenizing_ms": _median_ms(lambda t=texts[word]: encoder._tokenize(t), 0.0),
            }
        else:
            numpy.save(word, torch.cat([encoder.encode(texts[shape]) for shape in SHAPES]).numpy())
            on_gpu = arguments.device != "cpu"
            peak = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else None
            answer = {"gpu_peak_mb": peak}
        print(json.dumps(answer), flush=True)


def _median_ms(call: Any, seconds: float) -> float:
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - start < seconds:
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return 1e3 * statistics.median(times)


class Worker:
    """A process with the package of one folder."""

    def __init__(self, folder: Path, quantized: Path, arguments: argparse.Namespace) -> None:
        command = [sys.executable, __file__, "--worker", str(quantized)]
        command += ["--device", arguments.device, "--seconds", str(arguments.seconds)]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(folder.resolve())},
            cwd=quantized.parent,
        )

    def ask(self, word: str | None = None) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        if word is not None:
            print(word, file=self.process.stdin, flush=True)
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit("a worker ended")


def measure(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    import numpy

    quantized = make(arguments.model, work)
    folders = {"before": arguments.before, "today": ROOT}
    workers = {name: Worker(folder, quantized, arguments) for name, folder in folders.items()}
    for worker in workers.values():
        worker.ask()
    turns: dict[tuple[str, str], list[dict[str, float]]] = {}
    for _ in range(arguments.repeats):
        for shape in SHAPES:
            for name, worker in workers.items():
                turns.setdefault((name, shape), []).append(worker.ask(shape))
    result: dict[str, Any] = {}
    found = []
    for name, worker in workers.items():
        result[name] = worker.ask(str(work / f"{name}.npy"))
        found.append(numpy.load(work / f"{name}.npy"))
        for shape in SHAPES:
            own = turns[name, shape]
            medians = {key: statistics.median(turn[key] for turn in own) for key in own[0]}
            result[name][shape] = medians | {"p50_turns": [turn["p50_ms"] for turn in own]}
        worker.process.kill()
    sizes = [numpy.linalg.norm(rows, axis=1) for rows in found]
    result["least_cosine"] = float(((found[0] * found[1]).sum(1) / sizes[0] / sizes[1]).min())
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", type=Path, help="a folder that holds the earlier `awq`")
    parser.add_argument("--model", help="a directory with a config and a tokenizer")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.8)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        serve(arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        result = measure(arguments, Path(folder))
    for shape in SHAPES:
        before, today = (result[name][shape]["p50_ms"] for name in ("before", "today"))
        print(f"{shape:7s} {before:8.2f} → {today:8.2f} ms  {before / today:.2f} times")
    if arguments.json:
        import common

        common.write(arguments.json, arguments.device, result)


if __name__ == "__main__":
    main()
