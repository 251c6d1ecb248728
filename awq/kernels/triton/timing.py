"""Microseconds of a GPU call, as a model meets it: in a replayed CUDA graph, on weights that are
not in the L2 cache."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from awq.formats import get_layout
from awq.kernels.packed import Packed, Shape

L2 = 200e6  # bytes that the copies of one weight must exceed


def graph_time(calls: Sequence[Callable[[], Any]], repeats: int = 9, warm: float = 0.03) -> float:
    """Median microseconds of one call; `calls` are replayed in order, 40 or more per replay, so
    that its start counts little.

    warm: seconds of replays before: what ran last (an allocation, nothing, or a product that drew
    all the power) still shows.
    """
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for call in calls:
            call()

    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    rounds = -(-40 // len(calls))
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()

    begun = time.perf_counter()
    while time.perf_counter() - begun < warm:
        graph.replay()
        torch.cuda.synchronize()

    times = []
    for _ in range(repeats):
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1000 / (len(calls) * rounds))

    return statistics.median(times)


@torch.no_grad()
def warm_up(seconds: float = 0.5) -> None:
    """Brings the clocks to where a busy GPU has them."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.float16)
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        a @ a
        torch.cuda.synchronize()


def copies_of(n: int, k: int, bits: float) -> int:
    """How many weights of n × k, `bits` each, exceed the L2 cache together."""
    return max(2, math.ceil(L2 / (n * k * bits / 8)) + 1)


def random_packed(n: int, k: int, group: int = 128) -> Packed:
    """A planar weight of random bits on the GPU, made without codes."""
    sizes = get_layout("planar").shapes(k, n, group)
    words_shape = sizes["qweight"][0]
    grid_shape = sizes["scales"][0]
    with torch.device("cuda"):
        words = torch.randint(-(2**15), 2**15, words_shape, dtype=torch.int16)
        scales = torch.rand(grid_shape, dtype=torch.float32) * 0.02 + 1e-3
        zeros = torch.randint(16, grid_shape, dtype=torch.int32)
        no_zeros = torch.empty(0, dtype=torch.uint8)  # they stand beside the scales

    scale_bits = scales.half().view(torch.int16).int()
    scales_and_zeros = scale_bits + (zeros << 16)
    return Packed(words, no_zeros, scales_and_zeros, Shape(k, n, group), "planar")
