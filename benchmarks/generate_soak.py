"""Many calls of `generate` with changing lengths and batches in one process: memory stays flat, and
every result is what a fresh process gives.

    python benchmarks/generate_soak.py QUANTIZED_DIR --calls 1000 --fresh 6 --json out.json

Memory is the process's resident size, and on a GPU what torch has allocated, after every tenth of
the calls.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import common
import torch

from awq import AutoAWQForCausalLM


def call(model: Any, index: int) -> list[list[int]]:
    """The index-th call: its own prompt lengths, batch and number of new tokens, left-padded,
    greedy."""
    chance = random.Random(index)
    batch, longest, new = (
        chance.choice((1, 1, 2, 3, 5, 8)),
        chance.randint(1, 64),
        chance.randint(1, 12),
    )
    ids = torch.tensor([[chance.randrange(3, 5000) for _ in range(longest)] for _ in range(batch)])
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        mask[row, : chance.randrange(longest)] = 0
    out = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
    )
    return out.tolist()


def resident() -> float:
    """10^6 bytes."""
    return (
        int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        * os.sysconf("SC_PAGE_SIZE")
        / 1e6
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument(
        "--fresh", type=int, default=6, help="calls repeated in a process of their own"
    )
    parser.add_argument("--only", type=int, help="make this one call and print its result")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    dtype = "float32" if arguments.device == "cpu" else "float16"
    model = AutoAWQForCausalLM.from_quantized(
        arguments.model, device=arguments.device, torch_dtype=dtype, max_seq_len=128, batch_size=8
    )
    if arguments.only is not None:
        print(json.dumps(call(model, arguments.only)))
        return
    chosen = set(random.Random(0).sample(range(arguments.calls), arguments.fresh))
    kept, memory = {}, []
    for index in range(arguments.calls):
        out = call(model, index)
        if index in chosen:
            kept[index] = out
        if (index + 1) % max(1, arguments.calls // 10) == 0:
            memory.append({"calls": index + 1, "resident_mb": round(resident(), 1)})
            if arguments.device == "cuda":
                memory[-1]["allocated_mb"] = round(torch.cuda.memory_allocated() / 1e6, 1)
            print(memory[-1], flush=True)
    equal = {}
    for index, out in kept.items():
        command = [
            sys.executable,
            __file__,
            arguments.model,
            "--only",
            str(index),
            "--device",
            arguments.device,
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        equal[index] = json.loads(done.stdout.splitlines()[-1]) == out
    result = {
        "fusion": str(model.fusion),
        "calls": arguments.calls,
        "memory": memory,
        "equal_to_fresh_process": equal,
    }
    print({"fusion": str(model.fusion), "equal_to_fresh_process": equal})
    if arguments.json:
        common.write(arguments.json, arguments.device, result)


if __name__ == "__main__":
    main()
