"""Mixtures of experts on a GPU: correctness, one expert block, and the time to quantize a block.

    python benchmarks/mixtures.py --json benchmarks/results/mixtures-h100.json

- check: a block of packed experts against the same in float64, and greedy tokens of fused
  generation against transformers' own loop on the same packed model.
- block: microseconds of one expert block (router, products, activation, sum) in replayed CUDA
  graphs, at several numbers of tokens. Blocks in turn, so that weights are not in the L2 cache.
- quantize: seconds for each block of a shape with random weights, 128 rows of 512 random tokens,
  preset "balanced". Random weights cost what trained ones do. `fast` beside it, to compare.

Speed of generation is `generate.py`'s.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import common
import torch
from generate import config_of, random_model
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.initialization import no_init_weights

from awq.calibration import CalibrationBatch
from awq.config import AwqConfig
from awq.kernels.triton.timing import graph_time, warm_up
from awq.models.base import BaseAWQForCausalLM
from awq.nn.block_calls import hidden_of
from awq.nn.packed_experts import AwqExperts
from awq.quantize import QuantizeOptions, pipeline, quantize_model

ROWS, LENGTH = 128, 512
TOLERANCE = 5e-3  # of float16, relative to float64


def routed_modules(model: nn.Module) -> list[nn.Module]:
    """The modules that route tokens to the packed experts of each layer."""
    names = [n for n, module in model.named_modules() if isinstance(module, AwqExperts)]
    return [model.get_submodule(name.rpartition(".")[0]) for name in names]


@torch.no_grad()
def check_experts(model: nn.Module, device: str) -> float:
    """Largest relative error of packed experts in float16 against dense ones in float64."""
    worst = 0.0
    experts = next(module for module in model.modules() if isinstance(module, AwqExperts))
    shape = experts.shape
    parts = [experts.weights_of(number) for number in range(shape.num_experts)]
    names = experts.names
    for tokens in (1, 5, 64):
        x = torch.randn(tokens, shape.hidden, device=device).half()
        index = torch.rand(tokens, shape.num_experts, device=device).topk(2).indices
        weights = torch.rand(tokens, 2, device=device)
        expected = torch.zeros(tokens, shape.hidden, dtype=torch.float64, device=device)
        for token in range(tokens):
            for number, weight in zip(index[token].tolist(), weights[token].double()):
                gate, up, down = (
                    parts[number][name][0].dequantize(torch.float64)
                    for name in (names.gate, names.up, names.down)
                )
                row = x[token].double()
                expected[token] += weight * (down @ (nn.functional.silu(gate @ row) * (up @ row)))
        found = experts(x, index, weights).double()
        worst = max(worst, float((found - expected).norm() / expected.norm()))
    assert worst < TOLERANCE, worst
    return worst


def check_generation(shape: str, device: str, layers: int) -> dict[str, Any]:
    """Fused tokens beside transformers' own loop on the same packed model."""
    model = random_model(shape, torch.float16, device, True, layers)
    wrapper = BaseAWQForCausalLM(model, shape)
    ids = torch.randint(3, 900, (2, 24), generator=torch.Generator().manual_seed(2)).to(device)
    settings = dict(attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
    settings |= dict(eos_token_id=None, pad_token_id=0)
    theirs = model.generate(ids, **settings)
    wrapper.fuse_layers(64, 2)
    ours = wrapper.generate(ids, **settings)
    same = (ours == theirs).float().mean().item()
    result = {"fusion": str(wrapper.fusion), "equal_tokens": same}
    wrapper.unfuse()
    return result | {"relative_error": check_experts(model, device)}


@torch.no_grad()
def block_times(shape: str, tokens: list[int], device: str) -> dict[str, float]:
    """Microseconds of one expert block by number of tokens."""
    model = random_model(shape, torch.float16, device, True, 4)
    blocks = routed_modules(model)
    hidden = model.config.hidden_size
    warm_up()
    times = {}
    for count in tokens:
        inputs = [torch.randn(1, count, hidden, device=device).half() for _ in blocks]
        calls = [lambda b=b, x=x: hidden_of(b(x)) for b, x in zip(blocks, inputs)]
        times[str(count)] = round(graph_time(calls, 7), 2)
    return times


def dense_model(shape: str, layers: int, device: str) -> Any:
    """A bfloat16 model with random weights."""
    with torch.device("meta"), no_init_weights():
        model = AutoModelForCausalLM.from_config(config_of(shape, layers), dtype=torch.bfloat16)
    rotary = type(model.model.rotary_emb)(config=model.config).to(device)
    model = model.to_empty(device=device)
    model.model.rotary_emb = rotary
    generator = torch.Generator(device).manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.02, generator=generator)
        else:
            parameter.data.fill_(1)
    return model.eval()


def quantize_time(shape: str, layers: int, preset: str, device: str) -> dict[str, Any]:
    """Seconds of each block. The first one also compiles kernels and looks for folds."""
    model = dense_model(shape, layers, device)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (ROWS, LENGTH), generator=generator)
    batches = [CalibrationBatch(ids, torch.ones_like(ids))]
    begun, ends = time.perf_counter(), []

    def note() -> None:
        if device == "cuda":
            torch.cuda.synchronize()
        ends.append(time.perf_counter())

    options = QuantizeOptions(preset=preset, progress=False)
    with every_block_noted(note):
        report = quantize_model(model, batches, AwqConfig(group_size=128), options)
    seconds = [round(b - a, 2) for a, b in zip([begun, *ends], ends)]
    later = seconds[1:] or seconds
    assert report.loss < report.loss_rtn, (report.loss, report.loss_rtn)
    whole = config_of(shape).num_hidden_layers
    mean = sum(later) / len(later)
    return {
        "preset": preset,
        "blocks": layers,
        "seconds_by_block": seconds,
        "minutes_for_all_blocks": round((seconds[0] + mean * (whole - 1)) / 60, 2),
        "phases": {name: round(value, 2) for name, value in report.phases.items()},
        "loss": report.loss,
        "loss_nearest": report.loss_rtn,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None,
    }


@contextmanager
def every_block_noted(note: Callable[[], None]) -> Iterator[None]:
    """While open, calls `note` whenever a block is quantized."""
    original = pipeline.quantize_block

    def timed(run: Any, visit: Any) -> None:
        original(run, visit)
        note()

    pipeline.quantize_block = timed
    try:
        yield
    finally:
        pipeline.quantize_block = original


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", default=["check", "block", "quantize"])
    parser.add_argument("--check-shape", default="tiny-moe")
    parser.add_argument("--block-shapes", nargs="+", default=["mixtral-8x7b", "qwen3-30b-a3b"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--quantize-shape", default="qwen3-30b-a3b")
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--presets", nargs="+", default=["balanced"])
    parser.add_argument("--commit", help="of the code, where git does not tell")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, default=Path("mixtures.json"))
    given = parser.parse_args()
    result: dict[str, Any] = {"commit": given.commit} if given.commit else {}

    def note(name: str, found: Any) -> None:
        result[name] = found
        print(name, found, flush=True)
        common.write(given.json, given.device, result)

    if "check" in given.parts:
        note("check", check_generation(given.check_shape, given.device, 2))
    if "block" in given.parts:
        for shape in given.block_shapes:
            note(f"block {shape} us", block_times(shape, given.tokens, given.device))
    if "quantize" in given.parts:
        for preset in given.presets:
            found = quantize_time(given.quantize_shape, given.blocks, preset, given.device)
            note(f"quantize {given.quantize_shape} {preset}", found)


if __name__ == "__main__":
    main()
