r"""Quality and speed of a quantized sentence encoder, through the saved directory.

    python benchmarks/embedding.py --model all-MiniLM-L6-v2 \
        --calibration sts2014-headlines.tsv sts2014-OnWN.tsv \
        --measure sts2014-images.tsv --samples 512 --speed --json out.json

Quality: calibrated on sentences of the `--calibration` files, measured on the pairs of the
`--measure` file (lines `score<TAB>sentence<TAB>sentence`). Sentences that occur in both are left
out of calibration.
Speed: every variant in a process of its own; the variants take turns, `--repeats` times, so that
other work on the machine meets all of them alike. Sentences per second are the median of runs of at
least `--seconds`; memory is the process's peak. The shape 32×mixed is 128 texts of 4 to 256 tokens
(log-uniform, in random order) in one call with batches of 32: what padding costs, and what
Encoder's batches by length save. ONNX int8 is torch's export, quantized by onnxruntime (dynamic,
per tensor).
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

import common
import torch

import awq
from awq import Encoder, clean_texts
from awq.evals.similarity import embeddings_of, judge, read_pairs

VARIANTS = (
    "float32",
    "bfloat16",
    "onnx-int8",
    "awq-float32",
    "awq-bfloat16",
    "float32-encoder",
    "bfloat16-encoder",
    "awq-encoder-float32",
    "awq-encoder-bfloat16",
)
MIXED = 0  # "tokens" of the shape whose texts differ in length
MIXED_TEXTS = 128
SHAPES = [(batch, tokens) for tokens in (16, 256) for batch in (1, 8, 64)] + [(32, MIXED)]


def reader(directory: str, device: str) -> Any:
    """sentence-transformers where it is installed, else `Encoder`, which gives the same to 1e-5."""
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        return Encoder.from_pretrained(directory, device=device)
    return SentenceTransformer(directory, device=device)


def measure_quality(arguments: argparse.Namespace, folder: Path) -> dict:
    """One row per preset or variant; the last one's directory stays in `folder`."""
    pairs = read_pairs(arguments.measure)
    measured = [*pairs[1], *pairs[2]]
    held_out = set(measured)
    sentences = clean_texts(
        s for path in arguments.calibration for part in read_pairs(path)[1:] for s in part
    )
    sentences = [s for s in sentences if s not in held_out]
    before = embeddings_of(reader(arguments.model, arguments.device), measured)
    rows = []
    for name, options in common.jobs(arguments.presets, arguments.variants):
        model = getattr(awq, arguments.door).from_pretrained(arguments.model, torch_dtype="float32")
        start = time.perf_counter()
        report = model.quantize(
            quant_config={"q_group_size": arguments.group_size},
            calib_data=sentences,
            max_calib_samples=arguments.samples,
            evaluate=False,
            **options,
        )
        seconds = time.perf_counter() - start
        model.save_quantized(folder)
        after = embeddings_of(reader(str(folder), arguments.device), measured)
        drift = judge(before, after, pairs)
        rows.append(
            {
                "name": name,
                **drift.to_dict(),
                "seconds": seconds,
                "calibration_tokens": report.tokens,
                "loss": report.loss,
                "loss_rtn": report.loss_rtn,
                "tuning": report.tuning,
                "options": options,
            }
        )
        print(f"{name:12s} {drift.summary()}  ({seconds:.1f} s)", flush=True)
    size = {"float32": arguments.model, "quantized": folder}
    return {
        "door": arguments.door,
        "group_size": arguments.group_size,
        "samples": arguments.samples,
        "measured_on": arguments.measure.name,
        "calibrated_on": [p.name for p in arguments.calibration],
        "rows": rows,
        "weight_bytes": {
            n: sum(f.stat().st_size for f in Path(d).glob("*.safetensors")) for n, d in size.items()
        },
    }


class _Hidden(torch.nn.Module):
    """Positional tensors in, hidden states out: what torch's exporter traces."""

    def __init__(self, body: torch.nn.Module, names: list[str]) -> None:
        super().__init__()
        self.body, self.names = body, names

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.body(**dict(zip(self.names, inputs))).last_hidden_state


def export_onnx_int8(directory: str, target: Path) -> None:
    """Writes `target`, a dynamically quantized ONNX file of the body."""
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from transformers import AutoModel, AutoTokenizer

    body = AutoModel.from_pretrained(directory, attn_implementation="eager").eval()
    example = dict(
        AutoTokenizer.from_pretrained(directory)(
            ["one", "two of them"], padding=True, return_tensors="pt"
        )
    )
    names = list(example)
    axes = dict.fromkeys([*names, "hidden"], {0: "batch", 1: "tokens"})
    with tempfile.TemporaryDirectory() as folder:
        torch.onnx.export(
            _Hidden(body, names),
            tuple(example.values()),
            f"{folder}/full.onnx",
            input_names=names,
            output_names=["hidden"],
            dynamic_axes=axes,
            dynamo=False,
            opset_version=17,
        )
        quantize_dynamic(f"{folder}/full.onnx", target, weight_type=QuantType.QInt8)


class OnnxInt8:
    """The exported body, pooled like the original (masked mean, L2 norm)."""

    def __init__(self, directory: str, path: Path) -> None:
        import onnxruntime
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = torch.get_num_threads()
        self.session = onnxruntime.InferenceSession(
            path, settings, providers=["CPUExecutionProvider"]
        )
        self.names = [i.name for i in self.session.get_inputs()]

    def encode(self, texts: list[str], batch_size: int = 32) -> torch.Tensor:
        out = []
        for start in range(0, len(texts), batch_size):
            inputs = self.tokenizer(
                texts[start : start + batch_size],
                padding=True,
                truncation=True,
                return_tensors="np",
            )
            hidden = torch.from_numpy(self.session.run(None, {k: inputs[k] for k in self.names})[0])
            mask = torch.from_numpy(inputs["attention_mask"]).unsqueeze(-1)
            out.append(torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1))
        return torch.cat(out)


def load_variant(name: str, model: str, quantized: str, device: str):
    if name == "onnx-int8":
        return OnnxInt8(model, Path(quantized).with_name("int8.onnx"))
    directory = quantized if name.startswith("awq") else model
    dtype = torch.bfloat16 if "bfloat16" in name else torch.float32
    if "encoder" in name:
        return Encoder.from_pretrained(directory, device=device, dtype=dtype)
    import transformers
    from sentence_transformers import SentenceTransformer

    key = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
    return SentenceTransformer(directory, device=device, model_kwargs={key: dtype})


def sentences_of(tokenizer, tokens: int, count: int) -> list[str]:
    """Different texts of exactly `tokens` tokens, special ones included (each word is one
    token)."""
    words = ["river", "hill", "tree", "stone", "water", "fire", "house", "road"]
    special = len(tokenizer("")["input_ids"])
    texts = [
        " ".join(words[(i + j * (1 + i % 7)) % 8] for j in range(tokens - special))
        for i in range(count)
    ]
    assert {len(ids) for ids in tokenizer(texts)["input_ids"]} == {tokens}
    return texts


def serve_variant(arguments: argparse.Namespace) -> None:
    """A worker: for every line `batch tokens` on stdin, one line of JSON with sentences per second,
    until stdin ends."""
    model = load_variant(arguments.worker, arguments.model, arguments.quantized, arguments.device)
    print("READY", flush=True)
    for line in sys.stdin:
        batch, tokens = map(int, line.split())
        texts = (
            mixed_sentences(model.tokenizer)
            if tokens == MIXED
            else sentences_of(model.tokenizer, tokens, batch)
        )
        model.encode(texts, batch_size=batch)
        start, count = time.perf_counter(), 0
        while count == 0 or time.perf_counter() - start < arguments.seconds:
            model.encode(texts, batch_size=batch)
            count += len(texts)
        print(f"RATE {count / (time.perf_counter() - start)}", flush=True)
    found = {"peak_rss_mb": peak_memory()}
    if isinstance(model, torch.nn.Module):
        found["weights_mb"] = (
            sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()]) / 1e6
        )
    if arguments.device == "cuda":
        found["peak_gpu_mb"] = torch.cuda.max_memory_allocated() / 1e6
    print("END " + json.dumps(found), flush=True)


def mixed_sentences(tokenizer: Any) -> list[str]:
    chance = random.Random(0)
    return [
        sentences_of(tokenizer, int(2 ** chance.uniform(2, 8)), 1)[0] for _ in range(MIXED_TEXTS)
    ]


def peak_memory() -> float:
    """Peak resident memory of this process in MB. Not getrusage's: on Linux a child inherits its
    parent's peak there."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return (
        next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
        / 1024
    )


def answer(worker: subprocess.Popen, word: str) -> str | None:
    """What follows `word` on the worker's next line that begins with it; None when the worker has
    ended."""
    assert worker.stdout is not None
    return next(
        (line[len(word) :].strip() for line in worker.stdout if line.startswith(word)), None
    )


def shape_name(batch: int, tokens: int) -> str:
    return f"{batch}×{tokens or 'mixed'}"


def measure_speed(arguments: argparse.Namespace, folder: Path) -> list[dict]:
    if "onnx-int8" in arguments.speed_variants:
        try:
            export_onnx_int8(arguments.model, folder.with_name("int8.onnx"))
        except ImportError as error:
            print(f"no ONNX export: {error}", flush=True)
    workers = {}
    for name in arguments.speed_variants:
        command = [
            sys.executable,
            __file__,
            "--worker",
            name,
            "--model",
            arguments.model,
            "--quantized",
            str(folder),
            "--device",
            arguments.device,
            "--seconds",
            str(arguments.seconds),
        ]
        workers[name] = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
    shapes = [shape for shape in SHAPES if shape_name(*shape) in arguments.shapes]
    failed = [name for name, worker in workers.items() if answer(worker, "READY") is None]
    rates: dict[tuple, list[float]] = {
        (n, *shape): [] for n in workers if n not in failed for shape in shapes
    }
    for _ in range(arguments.repeats):
        for name, batch, tokens in sorted(rates, key=lambda key: key[1:]):
            workers[name].stdin.write(f"{batch} {tokens}\n")
            workers[name].stdin.flush()
            rates[name, batch, tokens].append(float(answer(workers[name], "RATE") or "nan"))
    results: list[dict] = [{"name": name, "error": "the worker did not start"} for name in failed]
    for name in (n for n in workers if n not in failed):
        workers[name].stdin.close()
        rows = [
            {
                "batch": b,
                "tokens": t,
                "sentences_per_second": statistics.median(rates[name, b, t]),
                "lowest": min(rates[name, b, t]),
                "highest": max(rates[name, b, t]),
            }
            for b, t in shapes
        ]
        results.append(
            {"name": name, **json.loads(answer(workers[name], "END") or "{}"), "rows": rows}
        )
        text = "  ".join(
            f"{shape_name(r['batch'], r['tokens'])}: {r['sentences_per_second']:.1f}" for r in rows
        )
        print(f"{name:20s} {text}  peak {results[-1].get('peak_rss_mb', 0):.0f} MB", flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="sentence-transformers directory")
    parser.add_argument("--calibration", type=Path, nargs="+", default=[])
    parser.add_argument("--measure", type=Path)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument(
        "--door",
        default="AutoAWQForEmbedding",
        choices=("AutoAWQForEmbedding", "AutoAWQForCausalLM"),
    )
    parser.add_argument("--presets", nargs="*", default=["rtn", "fast", "balanced"])
    parser.add_argument("--variants", default="[]", help='JSON list of {"name": …, option: …}')
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--speed-variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument(
        "--shapes",
        nargs="+",
        default=[shape_name(*shape) for shape in SHAPES],
        help="batch×tokens, or 32×mixed",
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--quantized", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        serve_variant(arguments)
        return
    if not arguments.calibration or arguments.measure is None:
        parser.error("give --calibration and --measure")
    with tempfile.TemporaryDirectory() as folder:
        result = {"quality": measure_quality(arguments, Path(folder) / "quantized")}
        if arguments.speed:
            result["speed"] = measure_speed(arguments, Path(folder) / "quantized")
    if arguments.json:
        common.write(arguments.json, arguments.device, {"load_average": os.getloadavg(), **result})


if __name__ == "__main__":
    main()
