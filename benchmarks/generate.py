"""The guide's table: prefill and decode speed and memory of language models in well-known shapes,
with random weights.

    python benchmarks/generate.py --shapes mistral-7b --lengths 64/64 2048/2048 --batches 1 8
    --peers eager --json out.json

Speed does not depend on the values of weights; `awq.evals.speed` says what is measured.
share_of_floor: of the time that reading the packed weights, the head and the cache once per step
would take at --bandwidth.
"""

from __future__ import annotations

import argparse
import gc
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen3MoeConfig,
)
from transformers.initialization import no_init_weights

from awq.config import AwqConfig
from awq.core.weight import QuantizedWeight
from awq.evals.speed import generation_speed, seconds, weight_bytes
from awq.models.base import BaseAWQForCausalLM
from awq.models.generation import Fusion
from awq.nn.expert_shape import ExpertNames, fused_experts
from awq.nn.layout import prepare
from awq.nn.linear import WQLinear
from awq.nn.packed_experts import AwqExperts, ExpertStack
from awq.nn.surgery import linear_shape, named_linears, replace_module

Note = Callable[[str, dict[str, Any]], None]
SHAPES: dict[str, tuple[type, dict[str, int]]] = {
    "tiny": (
        LlamaConfig,
        dict(
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=1000,
        ),
    ),
    "tinyllama-1.1b": (
        LlamaConfig,
        dict(
            hidden_size=2048,
            intermediate_size=5632,
            num_hidden_layers=22,
            num_attention_heads=32,
            num_key_value_heads=4,
            vocab_size=32000,
        ),
    ),
    "mistral-7b": (
        MistralConfig,
        dict(
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            vocab_size=32000,
        ),
    ),
    "llama-2-13b": (
        LlamaConfig,
        dict(
            hidden_size=5120,
            intermediate_size=13824,
            num_hidden_layers=40,
            num_attention_heads=40,
            num_key_value_heads=40,
            vocab_size=32000,
        ),
    ),
    "codellama-34b": (
        LlamaConfig,
        dict(
            hidden_size=8192,
            intermediate_size=22016,
            num_hidden_layers=48,
            num_attention_heads=64,
            num_key_value_heads=8,
            vocab_size=32000,
        ),
    ),
    "tiny-moe": (
        MixtralConfig,
        dict(
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
            num_experts_per_tok=2,
            vocab_size=1000,
        ),
    ),
    "mixtral-8x7b": (
        MixtralConfig,
        dict(
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            num_local_experts=8,
            num_experts_per_tok=2,
            vocab_size=32000,
        ),
    ),
    "qwen3-30b-a3b": (
        Qwen3MoeConfig,
        dict(
            hidden_size=2048,
            intermediate_size=6144,
            moe_intermediate_size=768,
            num_hidden_layers=48,
            num_attention_heads=32,
            num_key_value_heads=4,
            head_dim=128,
            num_experts=128,
            num_experts_per_tok=8,
            norm_topk_prob=True,
            vocab_size=151936,
        ),
    ),
}


def config_of(shape: str, layers: int | None = None) -> Any:
    """The config of a known shape, with all its layers or the first few."""
    kind, settings = SHAPES[shape]
    given = settings | ({} if layers is None else {"num_hidden_layers": layers})
    return kind(**given, max_position_embeddings=8192)


def random_model(
    shape: str, dtype: torch.dtype, device: str, quantized: bool, layers: int | None = None
) -> Any:
    """A model of a known shape; linears but the head are packed, group 128, when `quantized`.

    layers: so many instead of all.
    """
    config = config_of(shape, layers)
    config.sliding_window = None
    config.eos_token_id = None
    with torch.device("meta"), no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    generator = torch.Generator(device).manual_seed(0)
    if quantized:
        pack_random_experts(model, dtype, device, generator)
    for name, linear in named_linears(model).items():
        if quantized and name != "lm_head":
            replace_module(model, name, random_linear(*linear_shape(linear), device, generator))
            prepare(model.get_submodule(name), dtype)
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                value = torch.ones(parameter.shape, dtype=dtype, device=device)
                if parameter.dim() > 1:
                    value.normal_(0, 0.02, generator=generator)
                module._parameters[name] = nn.Parameter(value, requires_grad=False)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(device)
    return model.eval()


def random_linear(
    in_features: int, out_features: int, device: str, generator: torch.Generator
) -> WQLinear:
    # Around 8, for a mean that is not zero would add up to what float16 cannot hold, layer by
    # layer.
    codes = torch.randint(
        1, 16, (out_features, in_features), dtype=torch.uint8, device=device, generator=generator
    )
    groups = in_features // min(128, in_features)
    # codes spread by 4.3
    scales = torch.full((out_features, groups), 0.02 / 4.3, dtype=torch.float16, device=device)
    zeros = torch.full((out_features, groups), 8, dtype=torch.uint8, device=device)
    return WQLinear.from_quantized(QuantizedWeight(codes, scales, zeros))


def pack_random_experts(
    model: nn.Module, dtype: torch.dtype, device: str, generator: torch.Generator
) -> None:
    """Packed experts in the place of all experts, in place. Those of a layer hold equal numbers,
    each in memory of its own."""

    def stack(in_features: int, out_features: int, experts: int) -> ExpertStack:
        linear = random_linear(in_features, out_features, device, generator)
        made = ExpertStack([linear.quantized()], None, linear.format, linear.format)
        made.settle(dtype)
        for name in ("qweight", "qzeros", "scales"):
            tensor = getattr(made, name)
            made._buffers[name] = tensor.repeat(experts, *[1] * (tensor.dim() - 1))
        made.num_experts, made._settled = experts, made.qweight
        return made

    for name, shape in fused_experts(model).items():
        rows = shape.inner * (2 if shape.has_gate else 1)
        first = stack(shape.hidden, rows, shape.num_experts)
        second = stack(shape.inner, shape.hidden, shape.num_experts)
        original = model.get_submodule(name)
        replace_module(model, name, AwqExperts(original, shape, ExpertNames(), first, second))


def active_bytes(model: nn.Module, batch: int) -> float:
    """Bytes of the weights that one step of `batch` rows reads: of each layer's experts, the mean
    number of different ones that independent choices hit."""
    size = float(weight_bytes(model))
    top = getattr(model.config, "num_experts_per_tok", 0)
    for module in model.modules():
        if isinstance(module, AwqExperts):
            idle = (1 - top / module.shape.num_experts) ** batch
            size -= idle * sum(buffer.nbytes for buffer in module.buffers())
    return size


def profile(model: Any, batch: int, prompt: int, device: str) -> dict[str, float]:
    """Microseconds per kernel and decode step, by name, from the profiler."""
    ids = torch.randint(3, 900, (batch, prompt)).to(device)
    seconds(model, ids, 4)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        seconds(model, ids, 33)
    times: dict[str, float] = {}
    for event in found.key_averages():
        times[f"{event.key[:60]} x{event.count}"] = round(event.self_device_time_total / 32, 2)
    return dict(sorted(times.items(), key=lambda item: -item[1])[:24])


def ours(
    shape: str, arguments: argparse.Namespace, lengths: list[tuple[int, int]], note: Note
) -> None:
    """Rows of this package: fused, and (peers) the same packed model in transformers' own loop or
    its step captured."""
    dtype = getattr(torch, arguments.dtype)
    model = random_model(shape, dtype, arguments.device, True, arguments.layers)
    size, wrapper = weight_bytes(model), BaseAWQForCausalLM(model, shape)
    for quantize_head in (False, True) if arguments.quantize_lm_head else (False,):
        name = "fused, 4-bit head" if quantize_head else "fused"
        # once, for the longest and the largest: building proves every block
        longest, most = max(prompt + new for prompt, new in lengths), max(arguments.batches)
        wrapper.fuse_layers(longest, most, quantize_head)
        start = time.perf_counter()
        decoder = wrapper.fuse()
        fused = time.perf_counter() - start
        assert decoder is not None, wrapper.fusion
        for batch in arguments.batches:
            for prompt, new in lengths:
                speed = generation_speed(wrapper, batch, prompt, new, arguments.repeats)
                token = (
                    sum(2 * layer.k[0, :, 0].numel() for layer in decoder.cache)
                    * model.dtype.itemsize
                )
                # seconds per step
                floor = (
                    (active_bytes(model, batch) + token * batch * (prompt + new / 2))
                    / arguments.bandwidth
                    / 1e12
                )
                share = None if quantize_head else floor * speed.decode_tok_s / batch
                note(
                    shape,
                    {"name": name}
                    | speed.to_dict()
                    | {"fuse_s": fused, "share_of_floor": share, "weights_gb": size / 1e9},
                )
                if arguments.profile:
                    note(
                        shape,
                        {
                            "name": "profile",
                            "batch": batch,
                            "us_per_step": profile(wrapper, batch, prompt, arguments.device),
                        },
                    )
    wrapper.unfuse()
    if "unfused" in arguments.peers:
        note(shape, {"name": "unfused"} | generation_speed(model, 1, *lengths[0], 1).to_dict())
    if "captured" in arguments.peers:  # as if it could not be fused
        for batch in arguments.batches:
            for prompt, new in lengths:
                wrapper.fuse_layers(prompt + new, batch)
                wrapper._fusion = Fusion("unfused", "to be compared")
                wrapper._capture()
                speed = generation_speed(wrapper, batch, prompt, new, arguments.repeats)
                assert wrapper.fusion.state == "captured", wrapper.fusion
                note(shape, {"name": "captured, as if it could not be fused"} | speed.to_dict())


def peers(
    shape: str, arguments: argparse.Namespace, lengths: list[tuple[int, int]], note: Note
) -> None:
    """Rows of transformers with dense weights; at most 64 new tokens, for they take long."""
    dtype = getattr(torch, arguments.dtype)
    model = random_model(shape, dtype, arguments.device, False, arguments.layers)
    for peer in (p for p in arguments.peers if p in ("eager", "compiled")):
        kwargs = {"cache_implementation": "static"} if peer == "compiled" else {}
        for batch in arguments.batches:
            for prompt, new in lengths:
                speed = generation_speed(
                    model,
                    batch,
                    prompt,
                    min(new, 64),
                    1 if new > 64 else arguments.repeats,
                    **kwargs,
                )
                note(shape, {"name": f"transformers {arguments.dtype} {peer}"} | speed.to_dict())


_START = """
import sys, time
begin = time.perf_counter()
import torch
from awq import AutoAWQForCausalLM
import awq.models.auto
torch.zeros(1, device={device!r})
t = time.perf_counter()
m = AutoAWQForCausalLM.from_quantized(
    {directory!r}, fuse_layers=True, device={device!r}, torch_dtype={dtype!r}
)
u = time.perf_counter()
m.fuse()
v = time.perf_counter()
ids = torch.arange(3, 67, device={device!r}).view(1, -1)
m.generate(input_ids=ids, max_new_tokens=1, pad_token_id=0).tolist()
w = time.perf_counter()
m.generate(input_ids=ids, max_new_tokens=2, pad_token_id=0).tolist()
assert m.fusion.state == "fused", m.fusion
print(t - begin, u - t, v - u, w - v, w - t, time.perf_counter() - w)
"""
_STAGES = ("import_s", "load_s", "fuse_s", "prompt_s", "first_token_s", "second_call_s")


def start_times(shape: str, dtype: str, device: str, directory: str) -> dict[str, float]:
    """Seconds of fresh processes, with an empty Triton cache ("cold") and with what the first of
    them compiled ("warm").

    first_token_s: from `from_quantized` to the first token, the sum of load, fuse and prompt;
    second_call_s: a second call, which captures the decode step, for two tokens; import_s: before
    all that.
    """
    model = random_model(shape, getattr(torch, dtype), device, True)
    wrapper = BaseAWQForCausalLM(model, shape, AwqConfig(group_size=128))
    wrapper.save_quantized(directory)
    del wrapper, model
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    code, times = _START.format(device=device, directory=directory, dtype=dtype), {}
    with tempfile.TemporaryDirectory() as cache:
        for name in ("cold", "warm"):
            begin = time.perf_counter()
            done = subprocess.run(
                [sys.executable, "-c", code],
                capture_output=True,
                text=True,
                env=os.environ | {"TRITON_CACHE_DIR": cache},
            )
            if done.returncode:
                raise RuntimeError(done.stderr[-2000:])
            times |= {
                f"{name}_{stage}": float(t) for stage, t in zip(_STAGES, done.stdout.split()[-6:])
            }
            times[f"{name}_process_s"] = time.perf_counter() - begin
    return times


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=["mistral-7b"], choices=SHAPES)
    parser.add_argument(
        "--lengths", nargs="+", default=["64/64", "2048/2048"], help="prompt/new tokens"
    )
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument(
        "--peers", nargs="*", default=[], choices=["unfused", "captured", "eager", "compiled"]
    )
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--layers", type=int, help="so many instead of all")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--bandwidth", type=float, default=3.0, help="TB/s, for the share of the floor"
    )
    parser.add_argument("--quantize-lm-head", action="store_true", help="also with a 4-bit head")
    parser.add_argument(
        "--start", help="only save the first shape to this directory and time fresh processes"
    )
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--commit", help="of the code, where git does not tell")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    lengths = [(int(p), int(n)) for p, n in (text.split("/") for text in arguments.lengths)]
    result: dict[str, Any] = {
        "dtype": arguments.dtype,
        "bandwidth_tb_s": arguments.bandwidth,
        "rows": [],
    }
    if arguments.commit:
        result["commit"] = arguments.commit

    def note(shape: str, found: dict[str, Any]) -> None:
        result["rows"].append({"shape": shape} | found)
        print(
            {"shape": shape}
            | {k: round(v, 3) if isinstance(v, float) else v for k, v in found.items()},
            flush=True,
        )
        if arguments.json:
            common.write(arguments.json, arguments.device, result)

    if arguments.start:
        shape = arguments.shapes[0]
        note(
            shape,
            {"name": "start"}
            | start_times(shape, arguments.dtype, arguments.device, arguments.start),
        )
        return
    for shape in arguments.shapes:
        ours(shape, arguments, lengths, note)
        gc.collect()
        if {"eager", "compiled"} & set(arguments.peers):
            peers(shape, arguments, lengths, note)
            gc.collect()


if __name__ == "__main__":
    main()
