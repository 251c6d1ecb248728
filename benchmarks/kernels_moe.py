"""Products of a mixture of experts on a GPU: times beside one product per expert. That they are
right is what `tests/test_gpu_experts.py` checks.

    python benchmarks/kernels_moe.py --out benchmarks/results/kernels-moe-h100.json

The shape is Mixtral-8x7B's: 8 experts, 2 for each token, gate and up joined (28672 x 4096) and down
(4096 x 14336), group 128. Times are microseconds per call in replayed CUDA graphs; each call has
its own random choice of experts, so that what one reads is seldom in the L2 cache for the next.
"experts" is one product of this package per expert, "cublas" one in float16: both get their tokens
by lists that were made before, without asking the device, which is more than such a loop can do in
a model.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from kernels_products import environment

from awq.kernels import Packed, Shape, moe_linear, stack_experts
from awq.kernels.moe import expert_of
from awq.kernels.triton import configs, expert_launch, launcher, matmul_launch
from awq.kernels.triton.configs import Config
from awq.kernels.triton.timing import graph_time, random_packed, warm_up
from awq.kernels.triton.tuning import candidates, in_processes

PRODUCTS = {"gate_up": (28672, 4096), "down": (4096, 14336)}
EXPERTS, TOP = 8, 2
TOKENS = (1, 4, 16, 64, 512)
DEVICE = "cuda"


def routing(tokens: int, experts: int = EXPERTS, top: int = TOP) -> torch.Tensor:
    return torch.rand(tokens, experts, device=DEVICE).topk(top).indices


def stack(n: int, k: int) -> Packed:
    return stack_experts([random_packed(n, k) for _ in range(EXPERTS)])


def loop(product, x: torch.Tensor, lists: list, y: torch.Tensor) -> torch.Tensor:
    for number, rows, tokens in lists:
        y[rows] = product(x[tokens], number)
    return y


def swept_configurations(n: int, k: int, tokens: int) -> list[Config]:
    rows = tokens * TOP
    active, processors = (
        min(rows, EXPERTS),
        torch.cuda.get_device_properties(0).multi_processor_count,
    )
    sizes = {1: (8,), 4: (8,), 16: (8, 16), 64: (16, 32), 512: (64, 128)}.get(tokens, (64, 128))
    found = {
        c
        for bm in sizes
        for c in candidates(Shape(k, n * active, 128), bm, processors)
        if c.bm == bm and c.bn <= 128
    }
    return sorted(c for c in found if c.bm == 8 or c.stages == 3)


def compile_one(job: tuple) -> str | None:
    """Fills Triton's disk cache: the number of experts is not among what a kernel is compiled
    for."""
    n, k, tokens, config = job
    packed, x = (
        stack_experts([random_packed(n, k)]),
        torch.zeros(tokens, k, device=DEVICE, dtype=torch.float16),
    )
    chosen = torch.zeros(tokens, TOP, dtype=torch.int64, device=DEVICE)
    try:
        expert_launch.fused(
            x, packed, None, chosen, None, config, tokens * TOP <= expert_launch.FEW
        )
    except Exception as problem:  # no candidate then
        return f"{type(problem).__name__}: {str(problem)[:120]}"
    return None


def time_configurations(
    packed: Packed, x: torch.Tensor, choices: list[torch.Tensor], refused: set
) -> list:
    """[[microseconds, configuration]], the fastest first."""
    (k, n, _), m, rows = packed.shape, len(x), []
    few = m * TOP <= expert_launch.FEW
    for config in swept_configurations(n, k, m):
        if (n, k, m, config) not in refused:
            calls = [
                lambda c=c: expert_launch.fused(x, packed, None, c, None, config, few)
                for c in choices
            ]
            rows.append([round(graph_time(calls, 5), 1), config])
    return sorted(rows)


def time_products(tokens: tuple[int, ...], refused: set | None) -> tuple[dict, dict]:
    """Times by kind, product and tokens; and those of a sweep over configurations, unless `refused`
    is None."""
    times: dict = {kind: {name: {} for name in PRODUCTS} for kind in ("ours", "experts", "cublas")}
    swept: dict = {}
    for name, (n, k) in PRODUCTS.items():
        packed = stack(n, k)
        dense = torch.randn(EXPERTS, n, k, device=DEVICE, dtype=torch.float16)
        products = {
            "experts": lambda rows, e, packed=packed: matmul_launch.linear(
                rows, expert_of(packed, e), None
            ),
            "cublas": lambda rows, e, dense=dense: F.linear(rows, dense[e]),
        }
        for m in tokens:
            x = torch.randn(m, k, device=DEVICE, dtype=torch.float16)
            choices, lists = [routing(m) for _ in range(8 if m < 64 else 2)], []
            for chosen in choices:
                rows = [(chosen.reshape(-1) == e).nonzero().squeeze(-1) for e in range(EXPERTS)]
                lists.append([(e, r, r // TOP) for e, r in enumerate(rows) if len(r)])
            y = torch.empty(m * TOP, n, device=DEVICE, dtype=torch.float16)
            times["ours"][name][m] = graph_time(
                [lambda c=c: moe_linear(x, packed, c) for c in choices], 5
            )
            for kind, product in products.items():
                times[kind][name][m] = graph_time(
                    [lambda g=g: loop(product, x, g, y) for g in lists], 5
                )
            if refused is not None:
                swept[f"{name} {m}"] = time_configurations(packed, x, choices, refused)
                print(
                    name,
                    m,
                    [(t, tuple(map(int, c))) for t, c in swept[f"{name} {m}"][:4]],
                    flush=True,
                )
        packed = dense = products = product = None
        torch.cuda.empty_cache()
    rounded = {
        kind: {name: {m: round(t, 1) for m, t in row.items()} for name, row in rows.items()}
        for kind, rows in times.items()
    }
    for rows in rounded.values():
        rows["sum"] = {m: round(sum(rows[name][m] for name in PRODUCTS), 1) for m in tokens}
    return rounded, swept


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="*", default=TOKENS)
    parser.add_argument("--sweep", action="store_true", help="time other configurations too")
    parser.add_argument(
        "--workers", type=int, default=14, help="processes that compile for --sweep"
    )
    parser.add_argument("--commit", help="of this code, where git does not know it")
    parser.add_argument("--out", default="kernels-moe.json")
    args = parser.parse_args()
    torch.manual_seed(0)
    results: dict = {"environment": environment(args.commit)}
    refused = None
    if args.sweep:
        jobs = [
            (n, k, m, c)
            for n, k in PRODUCTS.values()
            for m in args.tokens
            for c in swept_configurations(n, k, m)
        ]
        start = time.perf_counter()
        refused = {
            job
            for job, reason in zip(jobs, in_processes(compile_one, jobs, args.workers))
            if reason
        }
        print(
            f"{len(jobs)} configurations compiled in {time.perf_counter() - start:.0f} s, "
            f"{len(refused)} refused",
            flush=True,
        )
    warm_up()
    results["microseconds"], swept = time_products(tuple(args.tokens), refused)
    results["chosen"] = {
        f"{name} {m}": configs.config_for_experts(
            *launcher.architecture(0), Shape(k, n, 128), m * TOP, EXPERTS
        )
        for name, (n, k) in PRODUCTS.items()
        for m in args.tokens
    }
    results |= {"sweep": {key: rows[:8] for key, rows in swept.items()}} if swept else {}
    for kind, rows in results["microseconds"].items():
        print(kind, rows)
    Path(args.out).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
