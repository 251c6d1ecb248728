"""Finding the fastest launch configurations on the GPU at hand, and writing them as a table of
`configs`.

Never runs while a model does: `awq tune` and `benchmarks/kernels_products.py --tune` call it.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch

from awq.kernels.packed import Shape
from awq.kernels.triton import configs, launcher
from awq.kernels.triton.configs import Config
from awq.kernels.triton.timing import copies_of, graph_time, random_packed, warm_up


def candidates(shape: Shape, tokens: int, processors: int) -> list[Config]:
    """Configurations worth timing for so many tokens on a GPU of so many multiprocessors."""
    n = shape.out_features
    k = shape.in_features
    m = tokens
    bms = [max(8, m)]
    scaled = [False]
    forms = [(64, 4), (128, 4), (128, 8)]

    splits: tuple[int, ...] = (1, 2, 3, 4, 6, 8)
    loads = (3, 4)
    if m <= 8:
        forms = [(64, 2), (128, 2), (128, 4)]
        loads = (3, 6)
        splits = (1, 2, 3, 8, 11, 16)
    elif m <= 16:
        forms = [(128, 4), (64, 2)]
        splits = (1, 2, 6, 8, 11)
    elif 32 < m <= 64:
        bms = [32, 64]
        scaled = [False, True]
        splits = (1, 2, 4)
    elif m > 256:
        bms = [64, 128, 256]
        scaled = [True]
        splits = (1,)
        forms = [(128, 4), (128, 8), (256, 8)]
    elif m > 64:
        bms = [64, 128]
        scaled = [True]
        splits = (1, 2, 4)
        forms = [(128, 4), (128, 8), (256, 8)]

    found = []
    for (bn, warps), bm, split, flag, stages in itertools.product(
        forms, bms, splits, scaled, loads
    ):
        tiles = -(-n // bn) * -(-m // bm)
        steps = -(-k // 128)
        waves = tiles * split / processors
        most = 7 if m <= 16 else 5 if m <= 64 else 3
        if split > 1 and (waves > most or steps / split < 2):
            continue  # more programs than help
        if waves < (1.4 if m <= 16 else 0.7) and split < splits[-1]:
            continue  # idle processors
        if (flag and bm == 32) or bn * bm > 128 * 32 * warps:
            continue  # more sums than registers
        if (flag or bn * bm <= 64 * 32 * warps) and (stages - (bm < 256)) * (
            bn * 68 + bm * 256
        ) < 225_000:
            found.append(Config(bm, bn, split, flag, warps, stages))

    return found


class Job(NamedTuple):
    """One configuration to time."""

    shape: Shape
    dtype: torch.dtype
    tokens: int
    config: Config


class Timing(NamedTuple):
    """Microseconds of one call. config None: through a dense weight."""

    microseconds: float
    config: Config | None


def tune(
    shapes: Iterable[Shape],
    tokens: Mapping[torch.dtype, Sequence[int]],
    seconds: float,
    workers: int,
    say: Callable[[str], None] = print,
) -> dict[tuple[Shape, torch.dtype, int], list[Timing]]:
    """Times of all candidates by shape, dtype and bucket of tokens, the fastest first.

    tokens: which buckets, by dtype. seconds: at most so long for the timing. workers: processes
    that compile before.
    """
    shapes = list(shapes)
    jobs = [
        Job(shape, dtype, m, config)
        for shape in shapes
        for dtype, ms in tokens.items()
        for m in ms
        for config in _to_time(shape, dtype, m)
    ]
    start = time.perf_counter()
    refused = {
        job: reason for job, reason in zip(jobs, in_processes(compile_job, jobs, workers)) if reason
    }
    say(
        f"{len(jobs)} configurations compiled in {time.perf_counter() - start:.0f} s, "
        f"{len(refused)} refused"
    )
    for reason in sorted(set(refused.values()))[:5]:
        say(f"  refused: {reason}")

    warm_up()
    stop = time.perf_counter() + seconds

    found = {}
    for shape in shapes:
        n = shape.out_features
        k = shape.in_features
        group = shape.group_size
        weights = [random_packed(n, k, group) for _ in range(copies_of(n, k, 4.25))]

        for dtype, m in ((dtype, m) for dtype, ms in tokens.items() for m in ms):
            ready = [
                job.config for job in jobs if job[:3] == (shape, dtype, m) and job not in refused
            ]
            rows = _time(
                weights, torch.randn(m, shape.in_features, device="cuda", dtype=dtype), ready, stop
            )
            if rows:
                found[shape, dtype, m] = rows
                best = ", ".join(
                    f"{t:.1f} {'dense' if c is None else tuple(map(int, c))}" for t, c in rows[:3]
                )
                say(f"{n}x{k} {str(dtype)[6:]} {m}: {best}")

        del weights

    return found


def _to_time(shape: Shape, dtype: torch.dtype, tokens: int) -> list[Config]:
    """The candidates, and the configuration that serves now, so that a gain over it is known."""
    architecture, processors = launcher.architecture(0)
    present = configs.config_for(architecture, processors, shape, tokens, dtype)
    found = dict.fromkeys(candidates(shape, tokens, processors))
    return list(found if present is None else found | {present: None})


def gain(timings: Sequence[Timing], present: Config | None) -> float | None:
    """How many times as fast the best of `timings`, the fastest first, is as the configuration that
    served before; None when that one was not timed."""
    before = next((t.microseconds for t in timings if t.config == present), None)
    return None if before is None else before / timings[0].microseconds


def _time(weights: list, x: torch.Tensor, ready: Iterable[Config], stop: float) -> list[Timing]:
    from awq.kernels.triton import matmul_launch

    rows = []
    for config in ready:
        if time.perf_counter() < stop:
            calls = [lambda w=w: matmul_launch.fused(x, w, None, config) for w in weights]  # type: ignore[misc]
            rows.append(Timing(graph_time(calls, 5), config))

    if rows and len(x) >= 128:
        calls = [lambda w=w: matmul_launch.through_dense(x, w, None) for w in weights[:3]]  # type: ignore[misc]
        rows.append(Timing(graph_time(calls, 5), None))

    return sorted(rows, key=lambda row: row.microseconds)


def in_processes(function: Callable, jobs: Sequence[Any], workers: int, chunk: int = 4) -> list:
    """[function(job)] computed by processes of their own: they fill Triton's disk cache."""
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return list(pool.map(function, jobs, chunksize=chunk))


def compile_job(job: Job) -> str | None:
    """Why a configuration does not compile or fit; None when it ran."""
    from awq.kernels.triton import matmul_launch

    shape = job.shape
    x = torch.zeros(job.tokens, shape.in_features, device="cuda", dtype=job.dtype)
    try:
        matmul_launch.fused(
            x,
            random_packed(shape.out_features, shape.in_features, shape.group_size),
            None,
            job.config,
        )
    except Exception as error:  # whatever Triton raises, it is no candidate
        return f"{type(error).__name__}: {str(error)[:120]}"

    return None


def write_table(
    path: Path,
    gpu: str,
    found: dict[tuple[Shape, torch.dtype, int], list[Timing]],
) -> None:
    """Adds the best configurations to the table at `path` ("shapes" for float16, "bfloat16" where
    that differs)."""
    best = {
        (configs.section(dtype), configs.size_of(shape), tokens): rows[0].config
        for (shape, dtype, tokens), rows in found.items()
    }
    write_entries(path, gpu, best)


def write_entries(
    path: Path,
    gpu: str,
    entries: Mapping[tuple[str, str, int], Config | None],
) -> None:
    """Adds entries to the table at `path`: (section, size, tokens or pairs) → configuration."""
    table = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for (section, size, count), config in entries.items():
        part = table.setdefault(section, {})
        rows = part.get(size, {}) | {str(count): config}
        part[size] = dict(sorted(rows.items(), key=lambda item: int(item[0])))

    table["measured_on"] = gpu
    parts = [f'"measured_on": {json.dumps(gpu)}']
    for name in configs.SECTIONS:
        if name in table:
            lines = ",\n".join(
                f"  {json.dumps(size)}: {json.dumps(rows, default=list)}"
                for size, rows in table[name].items()
            )
            parts.append(f'"{name}": {{\n{lines}\n}}')

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{" + ", ".join(parts) + "}\n", encoding="utf-8")
