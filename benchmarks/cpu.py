"""4-bit inference on a CPU against what a CPU user would pick, in one run: products, perplexity per
backend, whole models.

    python benchmarks/cpu.py products --json benchmarks/results/cpu-products.json python
    benchmarks/cpu.py quality --model quantized-dir --text wikitext2-valid.txt --json
    benchmarks/results/cpu-quality.json python benchmarks/cpu.py models --llama-python
    venv/bin/python --json benchmarks/results/cpu-models.json

products: one 4096 × 4096 weight, group 128, of which so many copies take turns that none stays in a
cache; the variants take
turns too. models: a Llama's shape with random weights, 32 tokens in and 32 out, each engine in its
own process, the engines taking turns; llama.cpp (`pip install llama-cpp-python gguf` where
--llama-python is) reads a Q4_0 file that `cpu_models.py` writes, onnxruntime-genai what its own
builder makes of the dense model. Times are medians; "best" is the fastest, for machines that others
use too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import torch
import torch.nn.functional as F

from awq.core.weight import QuantizedWeight
from awq.evals.speed import read_bandwidth
from awq.formats import get_layout
from awq.kernels import Packed, Shape, use_backend
from awq.nn.linear import WQLinear

INPUTS = OUTPUTS = 4096
GROUP, COPIES = 128, 12
Run = Callable[[int], Any]


def random_weight() -> QuantizedWeight:
    codes = torch.randint(0, 16, (OUTPUTS, INPUTS), dtype=torch.uint8)
    zeros = torch.randint(0, 16, (OUTPUTS, INPUTS // GROUP), dtype=torch.uint8)
    return QuantizedWeight(codes, (torch.rand(zeros.shape) * 0.02 + 1e-3).half(), zeros)


def onnx_session(weight: QuantizedWeight, threads: int) -> Any:
    """onnxruntime's MatMulNBits, float32 in and out, activations of 8 bits inside (accuracy level
    4)."""
    import onnxruntime
    from onnx import TensorProto, helper

    codes, zeros = (t[:, 0::2] | (t[:, 1::2] << 4) for t in (weight.codes, weight.zeros))
    tensors = [
        ("q", TensorProto.UINT8, (OUTPUTS, INPUTS // GROUP, GROUP // 2), codes),
        ("s", TensorProto.FLOAT, (weight.scales.numel(),), weight.scales.float()),
        ("z", TensorProto.UINT8, (zeros.numel(),), zeros),
    ]
    node = helper.make_node(
        "MatMulNBits",
        ["x", "q", "s", "z"],
        ["y"],
        domain="com.microsoft",
        K=INPUTS,
        N=OUTPUTS,
        bits=4,
        block_size=GROUP,
        accuracy_level=4,
    )
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", INPUTS])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", OUTPUTS])],
        initializer=[
            helper.make_tensor(n, t, shape, v.contiguous().numpy().tobytes(), raw=True)
            for n, t, shape, v in tensors
        ],
    )
    imports = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    model = helper.make_model(graph, opset_imports=imports, ir_version=10).SerializeToString()
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def onnx_runs(weights: list[QuantizedWeight], tokens: int, threads: int, sessions: list) -> Run:
    import numpy

    if not sessions:
        sessions.extend(onnx_session(weight, threads) for weight in weights)
    x, y, bindings = torch.randn(tokens, INPUTS), torch.empty(tokens, OUTPUTS), []
    for session in sessions:
        binding = session.io_binding()
        binding.bind_input("x", "cpu", 0, numpy.float32, tuple(x.shape), x.data_ptr())
        binding.bind_output("y", "cpu", 0, numpy.float32, tuple(y.shape), y.data_ptr())
        bindings.append(binding)
    keep = (x, y)
    return lambda i: (sessions[i % COPIES].run_with_iobinding(bindings[i % COPIES]), keep)


def product_runs(
    weights: list[QuantizedWeight], tokens: int, threads: int, sessions: list
) -> dict[str, Run]:
    """Name → a product with the i-th copy of the weight."""
    runs: dict[str, Run] = {}
    for backend, dtype in (
        ("cpu", torch.float32),
        ("cpu", torch.bfloat16),
        ("cpu_int8", torch.bfloat16),
        ("torch_int4", torch.bfloat16),
    ):
        x = torch.randn(tokens, INPUTS).to(dtype)
        modules = [WQLinear.from_quantized(weight) for weight in weights]
        for module in modules:
            with use_backend(backend):
                module.settle(dtype)

        runs[f"awq {backend} {str(dtype)[6:]}"] = lambda i, modules=modules, x=x: modules[
            i % COPIES
        ](x)
    x = torch.randn(tokens, INPUTS).bfloat16()
    packs = [get_layout("int4pack").pack(weight) for weight in weights]
    runs["torch int4 operator bfloat16"] = lambda i: torch.ops.aten._weight_int4pack_mm_for_cpu(
        x, packs[i % COPIES]["qweight"], GROUP, packs[i % COPIES]["scales"]
    )
    runs["onnxruntime MatMulNBits level 4"] = onnx_runs(weights, tokens, threads, sessions)
    for dtype in (torch.bfloat16, torch.float32):
        dense = [torch.randn(OUTPUTS, INPUTS).to(dtype) for _ in range(4)]
        inputs = torch.randn(tokens, INPUTS).to(dtype)
        runs[f"dense {str(dtype)[6:]}"] = lambda i, dense=dense, inputs=inputs: F.linear(
            inputs, dense[i % 4]
        )
    return runs


def timed(run: Run, repeats: int) -> list[float]:
    """Seconds of each call, after two that are not counted. Before that, a pause in which another
    library's threads go to sleep."""
    time.sleep(0.05)
    times = []
    for i in range(repeats + 2):
        start = time.perf_counter()
        run(i)
        times.append(time.perf_counter() - start)
    return times[2:]


def products(arguments: argparse.Namespace) -> dict[str, Any]:
    weights, sessions, rows = [random_weight() for _ in range(COPIES)], [], []
    bandwidth, packed = read_bandwidth("cpu"), _packed(weights[0])
    size = sum(t.nbytes for t in packed[:3])
    for tokens in arguments.tokens:
        runs = product_runs(weights, tokens, arguments.threads, sessions)
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(arguments.rounds):
            for name, run in runs.items():
                with use_backend(name.split()[1] if name.startswith("awq") else None):
                    times[name] += timed(run, 24 if tokens < 32 else 8)
        for name, found in times.items():
            median, best = statistics.median(found), min(found)
            row = {
                "tokens": tokens,
                "name": name,
                "us": median * 1e6,
                "best_us": best * 1e6,
                "gflops": 2 * tokens * INPUTS * OUTPUTS / median / 1e9,
            }
            if name.startswith("awq cpu"):
                row |= {
                    "gb_s": size / median / 1e9,
                    "share_of_read_bandwidth": size / median / bandwidth,
                }
            rows.append(row)
            print(
                {k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()}, flush=True
            )
        runs.clear()
    return {
        "shape": [OUTPUTS, INPUTS],
        "group": GROUP,
        "read_gb_s": bandwidth / 1e9,
        "weight_bytes": size,
        "rows": rows,
    }


def _packed(weight: QuantizedWeight) -> Packed:
    tensors = get_layout("rows16").pack(weight)
    return Packed(
        tensors["qweight"],
        tensors["qzeros"],
        tensors["scales"],
        Shape(INPUTS, OUTPUTS, GROUP),
        "rows16",
    )


def quality(arguments: argparse.Namespace) -> dict[str, Any]:
    from awq import AutoAWQForCausalLM
    from awq.evals.perplexity import perplexity

    rows: list[dict[str, Any]] = []
    for dtype in arguments.dtypes:
        base: float | None = None
        for backend in ("reference", "cpu", "cpu_int8", "torch_int4"):
            with use_backend(backend):
                model = AutoAWQForCausalLM.from_quantized(
                    arguments.model, fuse_layers=False, device="cpu", torch_dtype=dtype
                )
                ids = model.tokenizer(
                    Path(arguments.text).read_text(encoding="utf-8"), return_tensors="pt"
                ).input_ids
                found = perplexity(model, ids[0, ids.shape[1] // 2 :], limit=arguments.limit)
            base = base or found
            rows.append(
                {
                    "dtype": dtype,
                    "backend": backend,
                    "perplexity": found,
                    "against_reference": found / base - 1,
                }
            )
            print(rows[-1], flush=True)
    return {"model": Path(arguments.model).name, "tokens": arguments.limit, "rows": rows}


def models(arguments: argparse.Namespace) -> dict[str, Any]:
    script = str(Path(__file__).with_name("cpu_models.py"))
    rows: dict[str, list[dict]] = {}
    environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads)}
    own = ["awq", "awq 4-bit head", "awq int8", "transformers bfloat16"] + [
        "transformers float32"
    ] * arguments.float32
    pythons = {
        "llama.cpp": arguments.llama_python,
        "autoawq": arguments.autoawq_python,
        "onnxruntime-genai": arguments.genai_python,
    }
    engines = dict.fromkeys(own, sys.executable) | {
        name: python for name, python in pythons.items() if python
    }
    writers = {"write-awq": sys.executable, "write-dense": sys.executable}
    if arguments.llama_python:
        writers["write-gguf"] = sys.executable
    if arguments.genai_python:
        writers["write-genai"] = arguments.genai_python
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        for kind, python in writers.items():
            subprocess.run(
                [python, script, kind, folder, arguments.shape],
                check=True,
                stdout=subprocess.DEVNULL,
            )
        for turn in range(arguments.rounds):
            for name, python in engines.items():
                if name == "autoawq" and turn:
                    continue  # one turn of it takes minutes
                command = [python, script, name, folder, arguments.shape]
                done = subprocess.run(
                    command, env=environment, stdout=subprocess.PIPE, text=True, check=True
                )
                rows.setdefault(name, []).append(
                    json.loads(done.stdout.splitlines()[-1])
                    | {"turn": turn, "load": os.getloadavg()[0]}
                )
                print(name, rows[name][-1], flush=True)
    summary = {
        n: {k: statistics.median(r[k] for r in found) for k in ("prefill_tok_s", "decode_tok_s")}
        for n, found in rows.items()
    }
    return {"shape": f"{arguments.shape}, 32 in, 32 out, batch 1", "medians": summary, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["products", "quality", "models"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--model", help="a quantized directory, for quality")
    parser.add_argument("--text", help="a text file; its second half is measured")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16", "float16"])
    parser.add_argument("--limit", type=int, default=8192)
    parser.add_argument("--llama-python", help="a Python with llama-cpp-python")
    parser.add_argument(
        "--genai-python", help="a Python with onnxruntime-genai, torch and transformers"
    )
    parser.add_argument(
        "--autoawq-python", help="a Python with AutoAWQ 0.2.9 and a transformers that it works with"
    )
    parser.add_argument(
        "--shape", choices=["tinyllama-1.1b", "llama-3.2-3b"], default="tinyllama-1.1b"
    )
    parser.add_argument("--float32", action="store_true", help="transformers in float32 too")
    parser.add_argument("--work", help="where to put 3 GB of random models for a while")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    before = os.getloadavg()
    result = {"products": products, "quality": quality, "models": models}[arguments.what](arguments)
    if arguments.json:
        common.write(
            arguments.json,
            "cpu",
            {"load_before": before[0], "load_after": os.getloadavg()[0]} | result,
        )


if __name__ == "__main__":
    main()
