"""Launch configurations of a mixture's kernels on a GPU: correctness, times and a table.

    python benchmarks/experts_tune.py --check --out tune.json --table sm90.json

What is timed is everything between attention and the next block, as a decode step runs it, in
replayed CUDA graphs over random choices of experts: residual sum, norm and router; gate, up and
activation; down with the experts' weights; the sum. First the configuration of gate and up is
varied, then, with the best of them, that of down. A kernel timed alone says less: the next one
fetches its weights while it ends. The best go into the table (section "experts"; see
`awq.kernels.triton.configs`), and so do those of --dense linears, for which `awq tune` would start
its processes anew. `--check` compares results with float64 before.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from kernels_products import environment

from awq.kernels import Packed, Shape
from awq.kernels.moe import expert_of
from awq.kernels.reference.decode import ACTIVATIONS
from awq.kernels.specs import Norm, Router
from awq.kernels.triton import configs, expert_launch, matmul_launch, routing_launch, tuning
from awq.kernels.triton.configs import Config
from awq.kernels.triton.timing import copies_of, graph_time, random_packed, warm_up

DEVICE = "cuda"
PRODUCTS = ("first", "second")  # gate and up; down
CHOICES = 12  # random choices of experts that are timed in turn
MOST_WAVES, LEAST_WAVES = 6, 0.9  # programs of a kernel for each multiprocessor


class Mixture(NamedTuple):
    """experts of which `top` serve a token; sizes of their inputs and of what is inside."""

    experts: int
    top: int
    hidden: int
    inner: int

    def shape(self, product: str) -> Shape:
        """Of one expert's product: "first" (gate and up) or "second" (down)."""
        if product == "first":
            return Shape(self.hidden, 2 * self.inner, 128)
        return Shape(self.inner, self.hidden, 128)


MIXTURES = {
    "mixtral-8x7b": Mixture(8, 2, 4096, 14336),
    "qwen3-30b-a3b": Mixture(128, 8, 2048, 768),
    "deepseek-v2-lite": Mixture(64, 6, 2048, 1408),
    "tiny": Mixture(5, 2, 256, 384),
}


class Job(NamedTuple):
    """One configuration of one product to time."""

    mixture: Mixture
    product: str
    tokens: int
    config: Config


def random_stack(mixture: Mixture, product: str) -> Packed:
    """All experts' weights of random bits."""
    shape = mixture.shape(product)
    experts = range(mixture.experts)
    parts = [random_packed(shape.out_features, shape.in_features, 128) for _ in experts]
    tensors = [torch.stack([part[kind] for part in parts]) for kind in range(3)]
    return Packed(*tensors, shape, "planar")


def candidates(mixture: Mixture, product: str, tokens: int, processors: int) -> list[Config]:
    """Configurations worth timing for few tokens."""
    shape = mixture.shape(product)
    pairs = tokens * mixture.top
    active = min(mixture.experts, pairs)
    steps, found = -(-shape.in_features // 128), []
    forms = [(32, 2), (64, 2), (64, 4), (128, 4)]
    for (bn, warps), stages, split in itertools.product(forms, (4, 6), (1, 2, 4, 8)):
        waves = active * -(-shape.out_features // bn) * split / processors
        alone = split == 1 and waves > LEAST_WAVES
        if alone or (LEAST_WAVES < waves < MOST_WAVES and steps // split >= 2):
            found.append(Config(8, bn, split, False, warps, stages))
    rule = configs.rule_for_experts("sm90", processors, shape, pairs, mixture.experts)
    return list(dict.fromkeys([rule, *found]))


def call_of(job: Job, packed: Packed, x: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """One kernel as `expert_launch.expert_parts` starts it."""
    few = chosen.numel() <= expert_launch.FEW
    if job.product == "first":
        return expert_launch.fused(x, packed, None, chosen, None, job.config, few, "silu")
    weights = torch.ones(chosen.shape, device=DEVICE)
    return expert_launch.fused(
        x, packed, None, chosen, weights, job.config, few, chosen_before=True
    )


def inputs(job: Job) -> torch.Tensor:
    size = job.mixture.shape(job.product).in_features
    rows = (job.tokens,) if job.product == "first" else (job.tokens, job.mixture.top)
    return torch.randn(*rows, size, device=DEVICE).half()


def compile_one(job: Job) -> str | None:
    """Fills Triton's disk cache; why a configuration is no candidate, or None."""
    shape = job.mixture.shape(job.product)
    packed = random_packed(shape.out_features, shape.in_features, 128)
    stack = Packed(*(t.unsqueeze(0) for t in packed[:3]), shape, "planar")
    chosen = torch.zeros(job.tokens, job.mixture.top, dtype=torch.int32, device=DEVICE)
    try:
        call_of(job, stack, inputs(job), chosen)
    except Exception as problem:
        return f"{type(problem).__name__}: {str(problem)[:120]}"
    return None


class Step:
    """A mixture between attention and the next block, for `tokens` rows and random experts."""

    def __init__(self, name: str, tokens: int, stacks: dict[str, Packed]) -> None:
        self.mixture, self.stacks = MIXTURES[name], stacks
        width, experts = self.mixture.hidden, self.mixture.experts
        self.norm = Norm(torch.ones(width, device=DEVICE), None, 1e-5, False)
        self.x, self.branch = (
            torch.randn(1, tokens, width, device=DEVICE).half() for _ in range(2)
        )
        weights = (torch.randn(experts, width, device=DEVICE).half() for _ in range(CHOICES))
        self.routers = [Router(weight, self.mixture.top) for weight in weights]
        self.few = tokens * self.mixture.top <= expert_launch.FEW

    def run(self, router: Router, first: Config, second: Config) -> torch.Tensor:
        total, y, index, weights = routing_launch.add_norm_route(
            self.x, self.branch, 1.0, self.norm, router
        )
        rows, width = y.view(-1, y.shape[-1]), y.shape[-1]
        gate_up, down = self.stacks["first"], self.stacks["second"]
        inner = expert_launch.fused(rows, gate_up, None, index, None, first, self.few, "silu")
        parts = expert_launch.fused(
            inner, down, None, index, weights, second, self.few, chosen_before=True
        )
        parts = parts.view(1, len(rows), -1, width)
        return routing_launch.add_norm(total, parts, 1.0, self.norm)[1]

    def time(self, first: Config, second: Config) -> float:
        """Microseconds."""
        calls = [lambda r=r: self.run(r, first, second) for r in self.routers]
        return round(graph_time(calls, 5, 0.005), 2)


def compile_any(job: Job | tuning.Job) -> str | None:
    return compile_one(job) if isinstance(job, Job) else tuning.compile_job(job)


def dense_jobs(sizes: list[str], tokens: list[int], processors: int) -> list[tuning.Job]:
    """Configurations of ordinary linears "N x K"."""
    shapes = [Shape(int(size.split("x")[1]), int(size.split("x")[0]), 128) for size in sizes]
    return [
        tuning.Job(shape, torch.float16, count, config)
        for shape in shapes
        for count in tokens
        for config in tuning.candidates(shape, count, processors)
    ]


def time_dense(jobs: list[tuning.Job]) -> list[tuple[float, Config]]:
    """(microseconds, configuration) of one linear, the fastest first."""
    (k, n, _), tokens = jobs[0].shape, jobs[0].tokens
    weights = [random_packed(n, k) for _ in range(copies_of(n, k, 4.25))]
    x, rows = torch.randn(tokens, k, device=DEVICE).half(), []
    for job in jobs:
        calls = [lambda w=w, c=job.config: matmul_launch.fused(x, w, None, c) for w in weights]
        rows.append((round(graph_time(calls, 5, 0.005), 2), job.config))
    return sorted(rows)


def tune(given: argparse.Namespace, note: Callable[[str, list], None]) -> dict:
    """Entries of a table. note: is told what was timed, by mixture, product and tokens."""
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    expert_jobs = [
        Job(MIXTURES[name], product, tokens, config)
        for name in given.mixtures
        for tokens in given.tokens
        for product in ("first", "second")
        for config in candidates(MIXTURES[name], product, tokens, processors)
    ]
    linears = dense_jobs(given.dense, given.tokens, processors)
    jobs: list[Any] = expert_jobs + linears
    start = time.perf_counter()
    reasons = tuning.in_processes(compile_any, jobs, given.workers, 1)
    refused = {job for job, reason in zip(jobs, reasons) if reason}
    seconds = time.perf_counter() - start
    print(f"{len(jobs)} compiled in {seconds:.0f} s, {len(refused)} refused", flush=True)
    warm_up()
    entries: dict[tuple[str, str, int], Config] = {}
    for (shape, _, tokens), group in itertools.groupby(linears, lambda job: job[:3]):
        rows = time_dense([job for job in group if job not in refused])
        entries["shapes", configs.size_of(shape), tokens] = rows[0][1]
        note(f"{configs.size_of(shape)} {tokens}", rows[:6])
    for name in given.mixtures:
        stacks = {product: random_stack(MIXTURES[name], product) for product in PRODUCTS}
        for tokens in given.tokens:
            step, chosen = Step(name, tokens, stacks), {}
            for product in PRODUCTS:
                pairs = tokens * step.mixture.top
                shape, experts = step.mixture.shape(product), step.mixture.experts
                ready = [
                    job.config
                    for job in expert_jobs
                    if job[:3] == (step.mixture, product, tokens) and job not in refused
                ]
                other = step.mixture.shape("second")
                rule = configs.rule_for_experts("sm90", processors, other, pairs, experts)
                rows = sorted(
                    (step.time(config, rule), config)
                    if product == "first"
                    else (step.time(chosen["first"], config), config)
                    for config in ready
                )
                chosen[product] = rows[0][1]
                size = configs.size_of_experts(shape, experts)
                entries["experts", size, pairs] = rows[0][1]
                by_rule = next(t for t, config in rows if config == ready[0])
                note(f"{name} {product} {tokens}, by rule {by_rule}", rows[:6])
                if given.table:
                    tuning.write_entries(given.table, torch.cuda.get_device_name(), entries)
        del stacks
        torch.cuda.empty_cache()
    return entries


def check(name: str, tokens: int, dtype: torch.dtype) -> float:
    """Relative error of the whole block to float64, with different experts; equal bits in a graph
    of it."""
    mixture = MIXTURES[name]
    first, second = random_stack(mixture, "first"), random_stack(mixture, "second")
    x = torch.randn(tokens, mixture.hidden, device=DEVICE).to(dtype)
    router = Router(
        torch.randn(mixture.experts, mixture.hidden, device=DEVICE).to(dtype), mixture.top
    )
    norm = Norm(torch.rand(mixture.hidden, device=DEVICE), None, 1e-5, False)

    def run() -> tuple[torch.Tensor, ...]:
        total, y, index, weights = routing_launch.add_norm_route(x, x, 0.5, norm, router)
        parts = expert_launch.expert_parts(
            y, first, second, (None, None), index, weights, "silu", False
        )
        return y, index, weights, parts

    y, index, weights, parts = run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        again = run()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip((y, index, weights, parts), again)), "not equal"
    score = (y.double() @ router.weight.double().t()).softmax(-1)
    best = score.topk(mixture.top)
    shares = best.values / best.values.sum(-1, keepdim=True)
    wanted, found = (
        torch.zeros_like(score).scatter(1, i.long(), w.double())
        for i, w in ((best.indices, shares), (index, weights))
    )
    assert (wanted - found).abs().max() < 1e-3, "routed otherwise"
    expected = torch.zeros(tokens, mixture.hidden, dtype=torch.float64, device=DEVICE)
    for token, slot in itertools.product(range(tokens), range(mixture.top)):
        number = int(index[token, slot])
        up_gate, down = (
            expert_of(p, number).unpack().dequantize(torch.float64) for p in (first, second)
        )
        gate, up = (up_gate @ y[token].double()).chunk(2)
        expected[token] += weights[token, slot].double() * (down @ (ACTIVATIONS["silu"](gate) * up))
    error = float((parts.double().sum(1) - expected).norm() / expected.norm())
    assert error < (1e-3 if dtype == torch.float16 else 8e-3), (name, tokens, dtype, error)
    return error


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [name for name in MIXTURES if name != "tiny"]
    parser.add_argument("--mixtures", nargs="+", default=names, choices=MIXTURES)
    parser.add_argument("--dense", nargs="*", default=[], metavar="NxK", help="linears, too")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--check", action="store_true", help="compare with float64 before")
    parser.add_argument("--workers", type=int, default=15, help="processes that compile")
    parser.add_argument("--table", type=Path, help="table to write or add to")
    parser.add_argument("--commit", help="of this code, where git does not know it")
    parser.add_argument("--out", type=Path, default=Path("experts-tune.json"))
    given = parser.parse_args()
    torch.manual_seed(0)
    result: dict[str, Any] = {"environment": environment(given.commit), "us": {}}
    if given.check:
        dtypes = (torch.float16, torch.bfloat16)
        result["relative_error"] = {
            f"{name} {tokens} {str(dtype)[6:]}": check(name, tokens, dtype)
            for name, tokens in (("tiny", 1), ("tiny", 3), ("tiny", 100), ("qwen3-30b-a3b", 1))
            for dtype in dtypes
        }
        print(result["relative_error"], flush=True)

    def note(what: str, rows: list) -> None:
        result["us"][what] = rows
        print(what, [(t, tuple(map(int, c))) for t, c in rows[:4]], flush=True)
        given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    tune(given, note)


if __name__ == "__main__":
    main()
