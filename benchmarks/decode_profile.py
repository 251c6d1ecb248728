"""Where a captured decode step spends its time: kernels in their order, and microseconds by layer.

    python benchmarks/decode_profile.py --shapes mixtral-8x7b qwen3-30b-a3b --json profile.json

A step is captured with few and with more layers; the difference of the replayed times is what a
layer costs, the rest is embedding, head and the graph's start. The profiler then names the kernels
of one replay. Dependent launch lets a kernel start while the one in front still runs, so a kernel's
own duration says little: `took_us` is the time from the end of whatever ended before it to its own
end, which adds up to the step. `floor_us` is the time that reading a layer's weights takes.
"""

from __future__ import annotations

import argparse
import gc
import statistics
from pathlib import Path
from typing import Any

import common
import torch
from generate import SHAPES, active_bytes, random_model

from awq.models.base import BaseAWQForCausalLM

PROMPT = 64


def captured_step(shape: str, layers: int, batch: int, dtype: torch.dtype) -> tuple[Any, Any]:
    """(model, the CUDA graph of its fused decode step)."""
    model = random_model(shape, dtype, "cuda", True, layers)
    wrapper = BaseAWQForCausalLM(model, shape)
    wrapper.fuse_layers(2 * PROMPT, batch)
    decoder = wrapper.fuse()
    assert decoder is not None, wrapper.fusion
    ids = torch.randint(3, 900, (batch, PROMPT)).cuda()
    decoder.prefill(ids, [PROMPT] * batch)
    lengths = torch.full((batch,), PROMPT, dtype=torch.int32, device="cuda")
    decoder.step(ids[:, 0], lengths, PROMPT)
    assert batch in decoder.graphs, "the step was not captured"
    return model, decoder.graphs[batch].graph


def replay_time(graph: Any, repeats: int = 30) -> float:
    """Median microseconds of a replay."""
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(4):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1000 / 4)
    return statistics.median(times)


def kernels_of(graph: Any) -> list[dict[str, Any]]:
    """Kernels and copies of one replay in the order of their ends."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as found:
        for _ in range(3):
            graph.replay()
        torch.cuda.synchronize()
    events = [
        (e.start_ns(), e.start_ns() + e.duration_ns(), e.name())
        for e in found.profiler.kineto_results.events()
        if e.device_type() == torch.autograd.DeviceType.CUDA
    ]
    events.sort(key=lambda event: event[1])
    last = events[len(events) // 3 * 2 :]
    rows, before = [], events[len(events) // 3 * 2 - 1][1]
    for start, end, name in last:
        rows.append({"name": name[:90], "us": (end - start) / 1e3, "took_us": (end - before) / 1e3})
        before = end
    return rows


def by_name(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sums over the kernels of a name, what takes longest first."""
    sums: dict[str, list[float]] = {}
    for row in rows:
        sums.setdefault(row["name"], []).append(row["took_us"])
    made = [
        {"name": name, "count": len(took), "took_us": round(sum(took), 1)}
        for name, took in sums.items()
    ]
    return sorted(made, key=lambda row: -row["took_us"])


def profile(shape: str, layers: tuple[int, int], batch: int, given: Any) -> dict[str, Any]:
    """Times of a step with few and with more layers, and the kernels of the latter."""
    times, launches, size = [], [], []
    rows: list[dict[str, Any]] = []
    for count in layers:
        model, graph = captured_step(shape, count, batch, getattr(torch, given.dtype))
        times.append(replay_time(graph))
        rows = kernels_of(graph)
        launches.append(len(rows))
        size.append(active_bytes(model, batch))
        del model, graph
        gc.collect()
        torch.cuda.empty_cache()
    more = layers[1] - layers[0]
    middle = rows[len(rows) // 2 :][: (launches[1] - launches[0]) // more]
    return {
        "batch": batch,
        "layers": list(layers),
        "step_us": [round(t, 1) for t in times],
        "layer_us": round((times[1] - times[0]) / more, 2),
        "floor_us": round((size[1] - size[0]) / more / given.bandwidth / 1e6, 2),
        "launches": launches,
        "launches_per_layer": (launches[1] - launches[0]) / more,
        "by_name": by_name(rows),
        "one_layer": [row | {k: round(row[k], 1) for k in ("us", "took_us")} for row in middle],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shapes", nargs="+", default=["mixtral-8x7b", "qwen3-30b-a3b"], choices=SHAPES
    )
    parser.add_argument("--layers", nargs=2, type=int, default=(2, 6))
    parser.add_argument("--batches", nargs="+", type=int, default=[1])
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--bandwidth", type=float, default=4.8, help="TB/s of the GPU")
    parser.add_argument("--commit", help="of the code, where git does not tell")
    parser.add_argument("--json", type=Path, default=Path("decode-profile.json"))
    given = parser.parse_args()
    result: dict[str, Any] = {"commit": given.commit} if given.commit else {}
    for shape in given.shapes:
        for batch in given.batches:
            found = profile(shape, tuple(given.layers), batch, given)
            result[f"{shape} batch {batch}"] = found
            print(shape, {k: v for k, v in found.items() if k not in ("by_name", "one_layer")})
            for row in found["one_layer"]:
                print(f"  {row['took_us']:8} {row['us']:8}  {row['name']}", flush=True)
            common.write(given.json, "cuda", result)


if __name__ == "__main__":
    main()
