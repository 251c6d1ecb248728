"""Host microseconds of one `WQLinear` call and of one eager decode step: what Python costs before a
kernel runs.

    python benchmarks/host_time.py --device cuda
    PYTHONPATH=../before python benchmarks/host_time.py      # another checkout's code, by the same
    script

Weights are tiny, so that on a CPU arithmetic costs little beside the call; a GPU is not waited for.
Times are CPU time of the calling thread, which other work on the machine disturbs least; the
fastest round's mean is given.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(1)
    dtype = getattr(torch, args.dtype)
    with torch.no_grad():
        module = linear_call(args.device, dtype)
        step = decode_step(args.device, dtype)
        found = {
            "WQLinear call, µs": round(microseconds(module, 500, args.rounds), 2),
            f"eager decode step of {BLOCKS} blocks, µs": round(
                microseconds(step, 20, args.rounds), 1
            ),
        }
    print(json.dumps(found, ensure_ascii=False))


if __name__ == "__main__":
    main()
