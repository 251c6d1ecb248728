"""Host microseconds of one `WQLinear` call and of one eager decode step: what Python costs before a
kernel runs.

    python benchmarks/host_time.py --device cuda
    git worktree add ../before 3b18d81
    python benchmarks/host_time.py --device cuda --before ../before --out host-time.json

Weights are tiny, so that on a CPU arithmetic costs little beside the call; a GPU is not waited for.
Times are CPU time of the calling thread, which other work on the machine disturbs least; the
fastest round's mean is given. With `--before`, this script runs on that checkout's package and on
this one in turn, each time in a process of its own: the result holds the median of each, and their
ratio.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import write
from transformers import AutoModelForCausalLM, LlamaConfig

from awq.core.weight import round_to_nearest
from awq.generate import build_decoder
from awq.nn.linear import WQLinear

BLOCKS = 8


def microseconds(call: Callable[[], object], calls: int, rounds: int) -> float:
    """Of one call: the fastest round's mean."""
    best = float("inf")
    for _ in range(rounds):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.thread_time()
        for _ in range(calls):
            call()
        best = min(best, (time.thread_time() - start) / calls * 1e6)
    return best


def linear_call(device: str, dtype: torch.dtype) -> Callable[[], object]:
    linear = WQLinear.from_quantized(round_to_nearest(torch.randn(64, 128), 128)).to(device, dtype)
    x = torch.randn(1, 128, device=device, dtype=dtype)
    return lambda: linear(x)


def decode_step(device: str, dtype: torch.dtype) -> Callable[[], object]:
    """A llama of `BLOCKS` narrow blocks, fused: one token after 16, without a CUDA graph."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(device, dtype).eval()
    decoder = build_decoder(model, 64)
    decoder.prefill(torch.arange(16, device=device).unsqueeze(0), [16])
    ids = torch.zeros(1, dtype=torch.int64, device=device)
    lengths = torch.full((1,), 16, dtype=torch.int32, device=device)

    @torch.inference_mode()
    def step() -> object:
        return decoder.eager_step(ids, lengths, 16)

    return step


def measure(device: str, dtype: torch.dtype, rounds: int) -> dict[str, float]:
    """Microseconds by what was called, of the package that this process imports."""
    torch.set_num_threads(1)
    with torch.no_grad():
        module = linear_call(device, dtype)
        step = decode_step(device, dtype)
        return {
            "WQLinear call": round(microseconds(module, 500, rounds), 2),
            f"eager decode step of {BLOCKS} blocks": round(microseconds(step, 20, rounds), 1),
        }


def measure_checkout(root: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """`measure` by a process that imports the package of the checkout `root`."""
    options = [f"--{name}={getattr(arguments, name)}" for name in ("device", "dtype", "rounds")]
    done = subprocess.run(
        [sys.executable, __file__, *options],
        env=os.environ | {"PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def compare(before: Path, arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """{what was called: {"before", "after", "ratio"}}, medians over the repeats."""
    after = Path(__file__).resolve().parent.parent
    runs: dict[str, list[dict[str, float]]] = {"before": [], "after": []}
    for _ in range(arguments.repeats):
        runs["before"].append(measure_checkout(before.resolve(), arguments))
        runs["after"].append(measure_checkout(after, arguments))
    rows = {}
    for name in runs["after"][0]:
        medians = {
            tree: statistics.median(run[name] for run in found) for tree, found in runs.items()
        }
        rows[name] = medians | {"ratio": round(medians["after"] / medians["before"], 3)}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--before", type=Path, help="a checkout to compare with")
    parser.add_argument("--repeats", type=int, default=3, help="processes for each checkout")
    parser.add_argument("--commit", help="of this code, where git does not know it")
    parser.add_argument("--commit-before", help="of the other checkout")
    parser.add_argument("--out", type=Path, help="JSON to write, with --before")
    arguments = parser.parse_args()
    if arguments.before is None:
        found = measure(arguments.device, getattr(torch, arguments.dtype), arguments.rounds)
        print(json.dumps(found, ensure_ascii=False))
        return
    rows = compare(arguments.before, arguments)
    print(json.dumps(rows, ensure_ascii=False, indent=1))
    if arguments.out is not None:
        settings = {"dtype": arguments.dtype, "rounds": arguments.rounds}
        settings |= {"repeats": arguments.repeats, "before": arguments.commit_before}
        if arguments.commit is not None:
            settings["commit"] = arguments.commit
        write(arguments.out, arguments.device, settings | {"microseconds": rows})


if __name__ == "__main__":
    main()
