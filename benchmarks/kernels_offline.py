"""Compiles every shipped configuration for every target, without a GPU: registers, spills, shared
memory, instructions.

    python benchmarks/kernels_offline.py --out benchmarks/results/kernels-offline.json

Shipped are the measured tables on their own architecture, and the rules for shapes and GPUs without
a table, and for a mixture of experts, on every target.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import triton

from awq.kernels.packed import Shape
from awq.kernels.triton import configs

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import offline

RULE_SHAPES = [
    Shape(4096, 6144, 128),
    Shape(4096, 28672, 128),
    Shape(14336, 4096, 128),
    Shape(896, 4864, 64),
    Shape(576, 1536, 32),
    Shape(1536, 576, 1536),
    Shape(4224, 72, 128),
]


def name_of(target: int | str) -> str:
    return target if isinstance(target, str) else f"sm{target}"


# and how many experts
EXPERTS = [
    (Shape(4096, 28672, 128), 8),
    (Shape(14336, 4096, 128), 8),
    (Shape(2048, 1536, 128), 128),
]


def jobs() -> list[tuple]:
    """(target, shape, configuration, dtype, rows): rows None for an ordinary product, 0 for sorted
    rows of experts."""
    found = []
    for target in offline.TARGETS:
        for dtype in (torch.float16, torch.bfloat16):
            shipped = set()
            for shape in RULE_SHAPES:
                shipped |= {
                    (shape, configs.rule(name_of(target), 108, shape, m))
                    for m in (1, 8, 16, 32, 64, 128, 256)
                }
            for size, rows in configs.table(name_of(target), dtype).items():
                n, k = map(int, size.split("x"))
                shipped |= {
                    (Shape(k, n, 128), config) for config in rows.values() if config is not None
                }
            found += [(target, *item, dtype, None) for item in shipped]
            for (shape, experts), rows in itertools.product(EXPERTS, (2, 8, 32, 128, 256, 1024)):
                config = configs.config_for_experts(name_of(target), 108, shape, rows, experts)
                found.append((target, shape, config, dtype, rows if rows <= 128 else 0))
    return sorted(found, key=str)


def measure(job: tuple) -> dict:
    target, shape, config, dtype, rows = job
    row = {
        "target": name_of(target),
        "shape": shape,
        "config": config,
        "dtype": str(dtype).split(".")[1],
    }
    row |= {} if rows is None else {"rows of experts": rows or "sorted"}
    try:
        if rows is None:
            code = offline.compile_product(target, shape, config, dtype)
        else:
            code = offline.compile_experts(target, shape, config, rows or None, dtype)
    except Exception as error:  # reported, and counted as a failure below
        return row | {"failed": f"{type(error).__name__}: {str(error)[-200:]}"}
    weights = config.bn * 128 / (32 * config.warps)
    per_weight = round(len(code.instructions) / weights, 2) if code.instructions else None
    return row | {
        "registers": code.registers,
        "spilled": code.spilled,
        "shared": code.shared,
        "per_weight": per_weight,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", default="kernels-offline.json")
    args = parser.parse_args()
    with ProcessPoolExecutor(args.workers) as pool:
        rows = list(pool.map(measure, jobs(), chunksize=4))
    failed = [row for row in rows if "failed" in row or row["spilled"]]
    summary = {
        name: {
            "compiled": sum(row["target"] == name and "failed" not in row for row in rows),
            "spilling": sum(row["target"] == name and bool(row.get("spilled")) for row in rows),
        }
        for name in map(name_of, offline.TARGETS)
    }
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    head = json.dumps({"triton": triton.__version__, "targets": summary})[:-1]
    Path(args.out).write_text(f'{head}, "rows": [\n{lines}\n]}}\n', encoding="utf-8")
    print(json.dumps(summary, indent=1))
    for row in failed:
        print("spills or fails:", json.dumps(row))


if __name__ == "__main__":
    main()
