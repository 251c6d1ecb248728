r"""A sentence encoder on a CPU: this package beside what users would pick instead, in one run.

    python benchmarks/encoder_peers.py --model all-MiniLM-L6-v2 --quantized minilm-awq \
        --measure sts2014-images.tsv --json out.json

Peers, each in a process of its own, which imports nothing that it does not need:

- `st-float32`, `st-bfloat16`: sentence-transformers on torch;
- `onnx-int8`: onnxruntime's dynamic int8 (weights int8 per tensor), what sentence-transformers'
  `export_dynamic_quantized_onnx_model(…, "avx512_vnni")` asks of optimum, without optimum's Python;
- `openvino-int8`: NNCF's static int8 for transformers, calibrated on sentences of `--calibrate`;
- `fastembed`: its own class on the float32 ONNX file;
- `awq`, `awq-int8`: `Encoder` on the 4-bit directory, activations of 16 and of 8 bits;
- `awq-native`, `awq-native-int8`: `NativeEncoder` on the same, from images stored before.

A peer whose packages are missing is left out and named. Tokenizing is part of every time. Peers
take turns, shape by shape, so that the machine's other work meets all of them alike; a call's
latency is taken for `--seconds` a turn, and figures are medians over turns. `mixed` is one call
with 128 texts of 4 to 256 tokens (log-uniform, in random order). `start_mb` is resident memory
after the first shape, one short text; `peak_mb` the most there was; `first_s` is the time from the
start of a peer's process to its first embedding, with files in the system's cache. Cosines are to
`st-float32`, on the sentences of `--measure`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Encode = Callable[[list[str]], Any]  # texts → array [texts, features]

PEERS = (
    "st-float32",
    "st-bfloat16",
    "onnx-int8",
    "openvino-int8",
    "fastembed",
    "awq",
    "awq-int8",
    "awq-native",
    "awq-native-int8",
)
SHAPES = ("1×16", "8×16", "64×16", "1×256", "8×256", "64×256", "mixed")
MIXED_TEXTS = 128
BATCH = 32
WARM_CALLS = 20  # at most; no more than a turn's seconds
ONNX_INT8, OPENVINO = "int8.onnx", "openvino.xml"
CALIBRATION_SENTENCES = 300  # NNCF's own default
ROOT = Path(__file__).parent.parent


# Texts


def texts_of(tokenizer: Any, tokens: int, count: int) -> list[str]:
    """Different texts of exactly `tokens` tokens, special ones included; each word is one token."""
    words = ["river", "hill", "tree", "stone", "water", "fire", "house", "road"]
    special = len(tokenizer.encode("").ids)
    texts = []
    for i in range(count):
        step = 1 + i % 7
        texts.append(" ".join(words[(i + j * step) % 8] for j in range(tokens - special)))
    assert {len(tokenizer.encode(text).ids) for text in texts} == {tokens}
    return texts


def all_texts(model: str, shapes: list[str]) -> dict[str, list[str]]:
    tokenizer = _tokenizer(model)
    tokenizer.no_padding()
    chance = random.Random(0)
    found = {}
    for shape in shapes:
        if shape == "mixed":
            lengths = [int(2 ** chance.uniform(2, 8)) for _ in range(MIXED_TEXTS)]
            found[shape] = [texts_of(tokenizer, length, 1)[0] for length in lengths]
        else:
            count, tokens = map(int, shape.split("×"))
            found[shape] = texts_of(tokenizer, tokens, count)
    return found


def sentences_of(path: Path) -> list[str]:
    """Of lines `score<TAB>sentence<TAB>sentence`, each once."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return list(dict.fromkeys(s for line in lines for s in line.split("\t")[1:3]))


# Files that peers read


def _tokenizer(folder: str) -> Any:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
    tokenizer.enable_truncation(256)
    tokenizer.enable_padding()
    return tokenizer


def write_onnx(model: str, work: Path) -> None:
    """`fastembed/model.onnx` in float32 with the tokenizer's files, and `int8.onnx`."""
    import torch
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from transformers import AutoModel

    body = AutoModel.from_pretrained(model, attn_implementation="eager").eval()
    names = ["input_ids", "attention_mask", "token_type_ids"]

    class Hidden(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = body

        def forward(self, ids: Any, mask: Any, types: Any) -> Any:
            inputs = dict(input_ids=ids, attention_mask=mask, token_type_ids=types)
            return self.body(**inputs).last_hidden_state

    folder = work / "fastembed"
    folder.mkdir(exist_ok=True)
    for file in Path(model).glob("*.json"):
        shutil.copy(file, folder)
    example = torch.ones(2, 5, dtype=torch.int64)
    axes = dict.fromkeys([*names, "last_hidden_state"], {0: "batch", 1: "tokens"})
    torch.onnx.export(
        Hidden(),
        (example, example, torch.zeros_like(example)),
        folder / "model.onnx",
        input_names=names,
        output_names=["last_hidden_state"],
        dynamic_axes=axes,
        dynamo=False,
        opset_version=17,
    )
    quantize_dynamic(folder / "model.onnx", work / ONNX_INT8, weight_type=QuantType.QInt8)


def write_openvino(model: str, work: Path, sentences: list[str]) -> None:
    """`openvino.xml`."""
    import nncf
    import openvino

    tokenizer = _tokenizer(model)
    dense = openvino.convert_model(work / "fastembed/model.onnx")
    samples = [_inputs(tokenizer, [s]) for s in sentences[:CALIBRATION_SENTENCES]]
    quantized = nncf.quantize(dense, nncf.Dataset(samples), model_type=nncf.ModelType.TRANSFORMER)
    openvino.save_model(quantized, work / OPENVINO)


# Peers


def _inputs(tokenizer: Any, texts: list[str]) -> dict[str, Any]:
    import numpy

    rows = tokenizer.encode_batch(texts)
    ids = numpy.array([row.ids for row in rows], numpy.int64)
    mask = numpy.array([row.attention_mask for row in rows], numpy.int64)
    types = numpy.array([row.type_ids for row in rows], numpy.int64)
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}


def _sorted_batches(model: str, run: Callable[[dict[str, Any]], Any]) -> Encode:
    """run: inputs → hidden states. Texts go in batches by length, as in sentence-transformers."""
    import numpy

    tokenizer = _tokenizer(model)

    def encode(texts: list[str]) -> Any:
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        out: Any = None
        for start in range(0, len(order), BATCH):
            part = order[start : start + BATCH]
            inputs = _inputs(tokenizer, [texts[i] for i in part])
            hidden = run(inputs)
            mask = inputs["attention_mask"][..., None]
            mean = (hidden * mask).sum(1) / mask.sum(1)
            if out is None:
                out = numpy.empty((len(texts), mean.shape[1]), numpy.float32)
            out[part] = mean / numpy.linalg.norm(mean, axis=1, keepdims=True)
        return out

    return encode


def sentence_transformers(model: str, dtype: str) -> Encode:
    import torch
    from sentence_transformers import SentenceTransformer

    kwargs = {"dtype": getattr(torch, dtype)}
    encoder = SentenceTransformer(model, device="cpu", model_kwargs=kwargs)
    return lambda texts: encoder.encode(texts, batch_size=BATCH)


def onnx(model: str, work: Path) -> Encode:
    import onnxruntime

    session = onnxruntime.InferenceSession(work / ONNX_INT8, providers=["CPUExecutionProvider"])
    return _sorted_batches(model, lambda inputs: session.run(None, inputs)[0])


def open_vino(model: str, work: Path) -> Encode:
    import openvino

    settings = {"PERFORMANCE_HINT": "LATENCY"}
    compiled = openvino.Core().compile_model(work / OPENVINO, "CPU", settings)
    return _sorted_batches(model, lambda inputs: compiled(inputs)[0])


def fast_embed(work: Path) -> Encode:
    import numpy
    from fastembed import TextEmbedding

    name = "sentence-transformers/all-MiniLM-L6-v2"
    encoder = TextEmbedding(name, specific_model_path=str(work / "fastembed"))
    return lambda texts: numpy.stack(list(encoder.embed(texts, batch_size=BATCH)))


def awq(quantized: str, precision: str) -> Encode:
    sys.path.insert(0, str(ROOT))
    from awq import Encoder

    encoder = Encoder.from_pretrained(
        quantized, device="cpu", dtype="bfloat16", precision=precision
    )
    if not encoder.compiled:
        print(f"not compiled: {encoder.compiled.reason}", file=sys.stderr)
    return lambda texts: encoder.encode(texts, batch_size=BATCH).numpy()


def awq_native(quantized: str, precision: str) -> Encode:
    sys.path.insert(0, str(ROOT))
    from awq import NativeEncoder

    encoder = NativeEncoder.from_pretrained(quantized, dtype="bfloat16", precision=precision)
    return encoder.encode


def load(peer: str, arguments: argparse.Namespace) -> Encode:
    work = arguments.work
    if peer.startswith("st-"):
        return sentence_transformers(arguments.model, peer.removeprefix("st-"))
    if peer == "onnx-int8":
        return onnx(arguments.model, work)
    if peer == "openvino-int8":
        return open_vino(arguments.model, work)
    if peer == "fastembed":
        return fast_embed(work)
    precision = "int8" if peer.endswith("int8") else "exact"
    make = awq_native if peer.startswith("awq-native") else awq
    return make(arguments.quantized, precision)


# The process of one peer


def memory_mb() -> dict[str, float]:
    """Resident memory of this process, and the most there was."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    words = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith("Vm")}
    return {"now_mb": int(words["VmRSS"]) / 1024, "peak_mb": int(words["VmHWM"]) / 1024}


def serve(arguments: argparse.Namespace) -> None:
    """Answers every line of input, a shape or a file for embeddings, with a line of JSON."""
    import numpy

    encode = load(arguments.worker, arguments)
    texts = json.loads((arguments.work / "texts.json").read_text(encoding="utf-8"))
    encode(["The river is cold."])
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        word = line.strip()
        if word in texts:
            print(json.dumps(_timed(encode, texts[word], arguments.seconds)), flush=True)
        else:
            numpy.save(word, numpy.asarray(encode(texts["measured"]), numpy.float32))
            print(json.dumps(memory_mb()), flush=True)


def _timed(encode: Encode, texts: list[str], seconds: float) -> dict[str, float]:
    start = time.perf_counter()
    for _ in range(WARM_CALLS):
        if time.perf_counter() - start < seconds:
            encode(texts)
    times: list[float] = []
    start = time.perf_counter()
    while not times or time.perf_counter() - start < seconds:
        began = time.perf_counter()
        encode(texts)
        times.append(time.perf_counter() - began)
    times.sort()
    p50, p95 = (times[min(len(times) - 1, int(len(times) * share))] for share in (0.5, 0.95))
    rates = {"p50_ms": 1e3 * p50, "p95_ms": 1e3 * p95, "texts_s": len(texts) / p50}
    return rates | memory_mb()


# All of them


class Peer:
    """A worker process."""

    def __init__(self, name: str, arguments: argparse.Namespace) -> None:
        command = [sys.executable, __file__, "--worker", name, "--work", str(arguments.work)]
        command += ["--model", arguments.model, "--quantized", arguments.quantized]
        command += ["--seconds", str(arguments.seconds)]
        self.name = name
        self.log = arguments.work / f"{name}.log"
        began = time.perf_counter()
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("w"),
            text=True,
        )
        self.is_ready = self._answer() is not None
        self.first_s = time.perf_counter() - began

    def ask(self, word: str) -> dict[str, float]:
        assert self.process.stdin is not None
        print(word, file=self.process.stdin, flush=True)
        found = self._answer()
        if found is None:
            raise SystemExit(f"{self.name} ended: {self.log.read_text()[-500:]}")
        return found

    def _answer(self) -> dict[str, float] | None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        return None

    def why_not(self) -> str:
        lines = self.log.read_text(encoding="utf-8").strip().splitlines()
        return lines[-1] if lines else "it ended without a word"


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    peers = [Peer(name, arguments) for name in arguments.peers]
    left_out = {peer.name: peer.why_not() for peer in peers if not peer.is_ready}
    peers = [peer for peer in peers if peer.is_ready]
    turns: dict[tuple[str, str], list[dict[str, float]]] = {}
    for _ in range(arguments.repeats):
        for shape in arguments.shapes:
            for peer in peers:
                turns.setdefault((peer.name, shape), []).append(peer.ask(shape))
    results = {}
    for peer in peers:
        first = turns[peer.name, arguments.shapes[0]][0]
        rows = {shape: _medians(turns[peer.name, shape]) for shape in arguments.shapes}
        file = arguments.work / f"{peer.name}.npy"
        peak = peer.ask(str(file))["peak_mb"]
        results[peer.name] = {
            "first_s": peer.first_s,
            "start_mb": first["now_mb"],
            "peak_mb": peak,
            "shapes": rows,
        }
        peer.process.kill()
        peer.process.wait()
    _add_cosines(results, arguments.work)
    return {"left_out": left_out, "peers": results}


def _medians(rows: list[dict[str, float]]) -> dict[str, Any]:
    names = ("p50_ms", "p95_ms", "texts_s")
    found: dict[str, Any] = {name: statistics.median(row[name] for row in rows) for name in names}
    return found | {"p50_turns": [row["p50_ms"] for row in rows]}


def _add_cosines(results: dict[str, Any], work: Path) -> None:
    import numpy

    if "st-float32" not in results:
        return
    reference = numpy.load(work / "st-float32.npy")
    for name, result in results.items():
        found = numpy.load(work / f"{name}.npy")
        product = (reference * found).sum(1)
        sizes = numpy.linalg.norm(reference, axis=1) * numpy.linalg.norm(found, axis=1)
        cosines = product / sizes
        result["mean_cosine"] = float(cosines.mean())
        result["least_cosine"] = float(cosines.min())


def prepare(arguments: argparse.Namespace) -> None:
    """Writes what the peers read; peers whose packages are missing find nothing and say so. Models
    that an earlier run wrote into the same folder stay."""
    measured = sentences_of(arguments.measure)
    texts = all_texts(arguments.model, arguments.shapes) | {"measured": measured}
    (arguments.work / "texts.json").write_text(json.dumps(texts), encoding="utf-8")
    calibration = sentences_of(arguments.calibrate) if arguments.calibrate else []
    held_out = set(measured)
    others = [s for s in calibration if s not in held_out]
    work = arguments.work
    asked = set(arguments.peers)
    try:
        if {"onnx-int8", "openvino-int8", "fastembed"} & asked and not (work / ONNX_INT8).exists():
            write_onnx(arguments.model, work)
        if "openvino-int8" in asked and others and not (work / OPENVINO).exists():
            write_openvino(arguments.model, work, others)
    except ImportError as error:
        print(f"not exported: {error}", file=sys.stderr)


def start_once(arguments: argparse.Namespace) -> None:
    """Files come into the system's cache, images of encoders are stored."""
    for name in arguments.peers:
        process = Peer(name, arguments).process
        process.kill()
        process.wait()


def show(result: dict[str, Any]) -> None:
    for name, reason in result["left_out"].items():
        print(f"{name}: left out, {reason}")
    for name, row in result["peers"].items():
        times = "  ".join(f"{shape} {r['p50_ms']:.2f}" for shape, r in row["shapes"].items())
        cosine = f"{row.get('mean_cosine', float('nan')):.4f}"
        least = f"{row.get('least_cosine', float('nan')):.4f}"
        start = f"{row['first_s']:.2f} s, {row['start_mb']:.0f} MB"
        print(f"{name:15s} p50 ms: {times}  {start}  cosine {cosine}, {least}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a sentence-transformers directory")
    parser.add_argument("--quantized", required=True, help="its 4-bit directory")
    parser.add_argument("--measure", type=Path, help="sentences to compare embeddings on")
    parser.add_argument("--calibrate", type=Path, help="sentences for OpenVINO's static int8")
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=PEERS)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", choices=PEERS, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help="a folder that keeps the peers' models")
    parser.add_argument("--prepare", action="store_true", help="only write into --work")
    parser.add_argument("--prepared", action="store_true", help="a run with --prepare was before")
    arguments = parser.parse_args()
    if arguments.worker:
        serve(arguments)
        return
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as folder:
        arguments.work = arguments.work or Path(folder)
        arguments.work.mkdir(exist_ok=True)
        prepare(arguments)
        if arguments.prepare or not arguments.prepared:
            start_once(arguments)
        if arguments.prepare:
            return
        result = measure(arguments)
    show(result)
    if arguments.json:
        import common

        common.write(arguments.json, "cpu", result)


if __name__ == "__main__":
    main()
