"""Runs every kind of kernel on small shapes under NVIDIA's compute-sanitizer, and writes what it
reports.

    python benchmarks/kernels_sanitize.py --out benchmarks/results/kernels-sanitizer-h100.json

PyTorch's caching allocator is off in the child, so that every tensor has bounds of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path


def launch_all() -> int:
    """Launches split and whole products, dense weights and both kinds of expert products; returns
    how many."""
    import torch

    from awq.kernels import stack_experts
    from awq.kernels.triton import expert_launch, matmul_launch
    from awq.kernels.triton.configs import Config
    from awq.kernels.triton.timing import random_packed

    count = 0
    for n, k, group in ((72, 640, 128), (200, 288, 32), (136, 136, 136)):
        packed = random_packed(n, k, group)
        experts = stack_experts([packed, packed, packed])
        for m, config in (
            (1, (8, 64, 2, False, 2, 3)),
            (5, (8, 128, 1, False, 2, 4)),
            (70, (64, 64, 2, True, 4, 3)),
        ):
            x = torch.randn(m, k, device="cuda").half()
            matmul_launch.fused(x, packed, torch.randn(n, device="cuda").half(), Config(*config))
            chosen = torch.rand(m, 3, device="cuda").topk(2).indices
            for few in (True, False) if m < 64 else (False,):
                expert_launch.fused(
                    x, experts, None, chosen, torch.rand(m, 2, device="cuda"), Config(*config), few
                )
                count += 1
            count += 1
        matmul_launch.through_dense(torch.randn(9, k, device="cuda").half(), packed, None)
        count += 1
    torch.cuda.synchronize()
    return count


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tools", nargs="*", default=["memcheck"], help="memcheck, racecheck, initcheck, synccheck"
    )
    parser.add_argument("--commit", help="of this code, where git does not know it")
    parser.add_argument("--out", default="kernels-sanitizer.json")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print("launched", launch_all())
        return
    from kernels_products import environment

    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    results: dict = {"environment": environment(args.commit)}
    for tool in args.tools:
        command = [
            program,
            "--tool",
            tool,
            "--error-exitcode",
            "9",
            sys.executable,
            __file__,
            "--child",
        ]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        )
        text = done.stdout + done.stderr
        summary = re.findall(r"=========\s+(.*SUMMARY.*)", text)
        results[tool] = {
            "exit_status": done.returncode,
            "summary": summary,
            "launched": re.findall(r"launched (\d+)", text),
        }
        print(tool, results[tool], "" if done.returncode == 0 else text[-3000:], flush=True)
        Path(args.out).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
