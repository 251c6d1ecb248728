"""Host microseconds of one `WQLinear` call and of one eager decode step: what Python costs before a
kernel runs.

    python benchmarks/host_time.py --device cuda
    git worktree add ../before 3b18d81
    python benchmarks/host_time.py --device cuda --before ../before --out host-time.json

Weights are tiny, so that on a CPU arithmetic costs little beside the call; a GPU is not waited for.
Times are CPU time of the calling thread, which other work on the machine disturbs least. Without
`--before` the fastest round's mean is printed. With it, this script runs on that checkout's package
and on this one, each in a process of its own. The two take turns, so that both meet the same clocks
and neighbours: the result holds the median round of each, and the median of the rounds' ratios.
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


Calls = dict[str, tuple[Callable[[], object], int]]


def microseconds(call: Callable[[], object], count: int) -> float:
    """Of one call, the mean of `count`."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()

    start = time.thread_time()
    for _ in range(count):
        call()
    return (time.thread_time() - start) / count * 1e6


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


def prepare(device: str, dtype: torch.dtype) -> Calls:
    """What is called → (call, how often in a round), of the package that this process imports. The
    first calls, which compile kernels, are made here."""
    torch.set_num_threads(1)
    calls: Calls = {
        "WQLinear call": (linear_call(device, dtype), 500),
        f"eager decode step of {BLOCKS} blocks": (decode_step(device, dtype), 20),
    }
    for call, count in calls.values():
        for _ in range(count):
            call()
    return calls


@torch.no_grad()
def one_round(calls: Calls) -> dict[str, float]:
    """Microseconds by what was called."""
    return {name: microseconds(call, count) for name, (call, count) in calls.items()}


def take_turns(calls: Calls) -> None:
    """A round for each line on stdin; its times as a line of JSON."""
    print("ready", flush=True)
    for _ in sys.stdin:
        print(json.dumps(one_round(calls)), flush=True)


class Worker:
    """A process that imports the package of the checkout `root` and measures when it is asked."""

    def __init__(self, root: Path, arguments: argparse.Namespace) -> None:
        options = [f"--{name}={getattr(arguments, name)}" for name in ("device", "dtype")]
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--turns", *options],
            env=os.environ | {"PYTHONPATH": str(root)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a measuring process ended with {self.process.wait()}")
        return line

    def wait_until_ready(self) -> None:
        while self.answer().strip() != "ready":
            pass  # lines that libraries print

    def one_round(self) -> dict[str, float]:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return json.loads(self.answer())


def compare(before: Path, arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """{what was called: {"before", "after", "ratio"}}."""
    after = Path(__file__).resolve().parent.parent
    workers = [Worker(root, arguments) for root in (before.resolve(), after)]
    for worker in workers:
        worker.wait_until_ready()

    rounds = [[worker.one_round() for worker in workers] for _ in range(arguments.rounds)]
    for worker in workers:
        worker.process.communicate()

    rows = {}
    for name in rounds[0][1]:
        pairs = [(old[name], new[name]) for old, new in rounds]
        rows[name] = {
            "before": round(statistics.median(old for old, _ in pairs), 2),
            "after": round(statistics.median(new for _, new in pairs), 2),
            "ratio": round(statistics.median(new / old for old, new in pairs), 3),
        }

    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--before", type=Path, help="a checkout to compare with")
    parser.add_argument("--turns", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--commit", help="of this code, where git does not know it")
    parser.add_argument("--commit-before", help="of the other checkout")
    parser.add_argument("--out", type=Path, help="JSON to write, with --before")
    arguments = parser.parse_args()
    if arguments.before is None:
        calls = prepare(arguments.device, getattr(torch, arguments.dtype))
        if arguments.turns:
            take_turns(calls)
            return
        rounds = [one_round(calls) for _ in range(arguments.rounds)]
        best = {name: round(min(found[name] for found in rounds), 2) for name in calls}
        print(json.dumps(best, ensure_ascii=False))
        return

    rows = compare(arguments.before, arguments)
    print(json.dumps(rows, ensure_ascii=False, indent=1))
    if arguments.out is not None:
        settings = {"dtype": arguments.dtype, "rounds": arguments.rounds}
        settings |= {"before": arguments.commit_before}
        if arguments.commit is not None:
            settings["commit"] = arguments.commit
        write(arguments.out, arguments.device, settings | {"microseconds": rows})


if __name__ == "__main__":
    main()
