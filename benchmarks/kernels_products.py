"""Int4 products on a GPU: times beside float16 and torch's own int4 kernel, and a sweep that writes
the table. That they are right is what `tests/test_gpu_products.py` checks.

    python benchmarks/kernels_products.py --time --out kernels.json
    python benchmarks/kernels_products.py --tune --table awq/kernels/triton/tables/sm90.json \
        --out tune.json

Times are medians over replays of a CUDA graph that goes through copies of the weight larger
together than the L2 cache. Shapes (outputs × inputs) are Mistral-7B's with siblings joined; "sum"
adds one layer's four products.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from awq.core.weight import round_to_nearest
from awq.kernels import Shape
from awq.kernels.triton import configs, launcher, matmul_launch
from awq.kernels.triton.timing import copies_of, graph_time, random_packed, warm_up
from awq.kernels.triton.tuning import Job, compile_job, in_processes, tune, write_table
from awq.nn.layout import prepare
from awq.nn.linear import WQLinear

LAYER = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
DEVICE = "cuda"


# ---------------------------------------------------------------- times


def time_layer(dtype: torch.dtype, tokens: tuple[int, ...], rounds: int = 3) -> dict:
    """Microseconds by kind, product and tokens, and their sum over the layer; medians over rounds
    through all tokens.

    The rounds go up and down in turn: a card that has just computed a large product clocks lower
    for a while.
    """
    warm_up()
    times: dict = {
        kind: {name: {} for name in LAYER}
        for kind in ("ours", "dense_weight", "cublas", "tinygemm")
    }

    def note(kind: str, name: str, m: int, calls: list) -> None:
        times[kind][name].setdefault(m, []).append(graph_time(calls, warm=0.1))

    for name, (n, k) in LAYER.items():
        weights = [random_packed(n, k) for _ in range(copies_of(n, k, 4.25))]
        dense = [torch.randn(n, k, device=DEVICE, dtype=dtype) for _ in range(copies_of(n, k, 16))]
        tiny = []
        if dtype == torch.bfloat16:
            raw = torch.randint(0, 255, (n, k // 2), dtype=torch.uint8, device=DEVICE)
            table = torch.rand(k // 128, n, 2, dtype=dtype, device=DEVICE)
            tiny = [torch.ops.aten._convert_weight_to_int4pack(raw, 8) for _ in weights]
        warm_up(0.3)  # while weights were made, the GPU was idle for long
        for m in [
            m for number in range(rounds) for m in (tokens if number % 2 == 0 else reversed(tokens))
        ]:
            x = torch.randn(m, k, device=DEVICE, dtype=dtype)
            note("ours", name, m, [lambda w=w: matmul_launch.linear(x, w, None) for w in weights])
            note("cublas", name, m, [lambda w=w: F.linear(x, w) for w in dense])
            if m >= 128:
                note(
                    "dense_weight",
                    name,
                    m,
                    [lambda w=w: matmul_launch.through_dense(x, w, None) for w in weights[:3]],
                )
            if tiny and m <= 64:
                note(
                    "tinygemm",
                    name,
                    m,
                    [
                        lambda w=w: torch.ops.aten._weight_int4pack_mm(x, w, 128, table)
                        for w in tiny
                    ],
                )
        del weights, dense, tiny
        torch.cuda.empty_cache()
    for kind in times.values():
        for name in LAYER:
            kind[name] = {m: statistics.median(found) for m, found in kind[name].items()}
        shared = set.intersection(*(set(row) for row in kind.values()))
        kind["sum"] = {m: round(sum(row[m] for row in kind.values()), 1) for m in sorted(shared)}
        for name in LAYER:
            kind[name] = {m: round(t, 2) for m, t in kind[name].items()}
    return {kind: rows for kind, rows in times.items() if rows["sum"]}


def compile_chosen(tokens: tuple[int, ...], workers: int) -> float:
    """Seconds that the kernels of `time_layer` take to compile, in processes side by side."""
    start, gpu = time.perf_counter(), launcher.architecture(0)
    jobs = {
        Job(shape, dtype, config.bm, config)
        for shape in (Shape(k, n, 128) for n, k in LAYER.values())
        for dtype in (torch.float16, torch.bfloat16)
        for m in tokens
        if (config := configs.config_for(*gpu, shape, m, dtype)) is not None
    }
    assert not any(in_processes(compile_job, list(jobs), workers))
    return round(time.perf_counter() - start, 1)


def time_host() -> dict:
    """Host microseconds of one eager call (the GPU is not waited for)."""
    weight = round_to_nearest(torch.randn(4096, 4096), 128)
    linear = WQLinear.from_quantized(weight).to(DEVICE)
    x = torch.randn(1, 4096, device=DEVICE).half()
    dense = torch.randn(4096, 4096, device=DEVICE).half()
    packed = None
    found = {}
    with torch.no_grad():
        for name in ("module", "launch", "cublas"):
            call = {
                "module": lambda: linear(x),
                "launch": lambda: matmul_launch.linear(x, packed, None),
                "cublas": lambda: F.linear(x, dense),
            }[name]
            linear(x)
            packed = linear.packed
            best = math.inf
            for _ in range(5):
                torch.cuda.synchronize()
                start = time.perf_counter()
                for _ in range(200):
                    call()
                best = min(best, (time.perf_counter() - start) / 200 * 1e6)
            found[name] = round(best, 2)
    return found


def time_loading() -> dict:
    """Seconds to move a 7B model's 32 layers from the gemm layout, and from there to the first
    outputs at 1 token and at 100."""
    torch.zeros(1, device=DEVICE)
    layers = []
    for number in range(32):
        for n, k in (
            (4096, 4096),
            (1024, 4096),
            (1024, 4096),
            (4096, 4096),
            (14336, 4096),
            (14336, 4096),
            (4096, 14336),
        ):
            linear = WQLinear(k, n, format="gemm", device=DEVICE)
            linear.qweight.random_(-(2**31), 2**31 - 1) if number == 0 else None
            layers.append(linear)
    model = torch.nn.ModuleList(layers)
    torch.cuda.synchronize()
    start = time.perf_counter()
    prepare(model, torch.float16)
    torch.cuda.synchronize()
    moved = time.perf_counter()
    with torch.no_grad():
        for m in (1, 100):
            for linear in layers:
                linear(torch.ones(m, linear.in_features, device=DEVICE, dtype=torch.float16))
    torch.cuda.synchronize()
    ready = time.perf_counter()
    return {
        "relayout_s": round(moved - start, 2),
        "first_calls_s": round(ready - moved, 2),
        "ready_s": round(ready - start, 2),
    }


def time_cold_start() -> dict:
    """`time_loading` in new processes: with an empty Triton cache, then with the one that the first
    has filled."""
    found = {}
    with tempfile.TemporaryDirectory() as cache:
        for name in ("cold", "warm"):
            start = time.perf_counter()
            done = subprocess.run(
                [sys.executable, __file__, "--loading"],
                capture_output=True,
                text=True,
                env=os.environ | {"TRITON_CACHE_DIR": cache},
            )
            assert done.returncode == 0, done.stderr[-2000:]
            found[name] = json.loads(done.stdout) | {
                "process_s": round(time.perf_counter() - start, 2)
            }
    return found


# ---------------------------------------------------------------- the script


def environment(commit: str | None) -> dict:
    import triton

    if commit is None:
        head = ["git", "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(
            head, capture_output=True, text=True, cwd=Path(__file__).parent
        ).stdout.strip()
    arguments = [Path(a).name if a.startswith("/") else a for a in sys.argv[1:]]
    return {
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *arguments]),
        "commit": commit or None,
        "gpu": torch.cuda.get_device_name(0),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--time", action="store_true", help="times beside float16 cuBLAS and tinygemm"
    )
    parser.add_argument("--tune", action="store_true", help="time candidate configurations")
    for dtype in ("float16", "bfloat16"):
        parser.add_argument(
            f"--{dtype}",
            type=int,
            nargs="*",
            default=configs.BUCKETS,
            help="numbers of tokens for --tune",
        )
    parser.add_argument("--table", help="where --tune writes the best of them")
    parser.add_argument("--tokens", type=int, nargs="*", help="numbers of tokens for --time")
    parser.add_argument(
        "--seconds", type=float, default=120, help="at most so long for the timing of --tune"
    )
    parser.add_argument("--workers", type=int, default=14, help="processes that compile for --tune")
    parser.add_argument("--commit", help="of this code, where git does not know it")
    parser.add_argument("--out", help="JSON file for the results")
    # the child of `time_cold_start`
    parser.add_argument("--loading", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.loading:
        print(json.dumps(time_loading()))
        return
    torch.manual_seed(0)
    results: dict = {"environment": environment(args.commit)}

    def stage(name, function, *arguments):
        start = time.perf_counter()
        try:
            results[name] = function(*arguments)
        except Exception as error:  # the other stages are still worth their results
            results[name] = {"failed": f"{type(error).__name__}: {error}"}
            import traceback

            traceback.print_exc()
        print(
            f"{name}: {time.perf_counter() - start:.1f} s {json.dumps(results[name])[:1500]}",
            flush=True,
        )
        if args.out:
            Path(args.out).write_text(
                json.dumps(results, indent=1, default=list) + "\n", encoding="utf-8"
            )

    if args.tune:

        def tuning():
            shapes = [Shape(k, n, 128) for n, k in LAYER.values()]
            tokens = {torch.float16: args.float16, torch.bfloat16: args.bfloat16}
            found = tune(shapes, tokens, args.seconds, args.workers)
            if args.table:
                write_table(Path(args.table), torch.cuda.get_device_name(0), found)
                configs.table.cache_clear()
                matmul_launch._config.cache_clear()
            return {
                f"{configs.size_of(shape)} {str(dtype)[6:]} {m}": [
                    [round(t, 2), c] for t, c in rows[:12]
                ]
                for (shape, dtype, m), rows in found.items()
            }

        stage("tune", tuning)
    if args.time:
        tokens = tuple(args.tokens or TOKENS)
        stage("compiled_s", compile_chosen, tokens, args.workers)
        stage("float16", time_layer, torch.float16, tokens)
        stage("bfloat16", time_layer, torch.bfloat16, tokens)
        stage("host_us", time_host)
        stage("loading", time_cold_start)


if __name__ == "__main__":
    main()
