"""The guide's table: prefill and decode speed and memory of language models in well-known shapes, with random weights.

    python benchmarks/generate.py --shapes mistral-7b --lengths 64/64 2048/2048 --batches 1 8 --peers eager --json out.json

Speed does not depend on the values of weights. Decode tok/s: new tokens of all rows over the time beyond the first token's;
prefill tok/s: prompt tokens over the time to the first token, a call of `generate` each, greedy. "floor" is the share of the
time that reading the packed weights, the head and the cache once per step would take at --bandwidth.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from pathlib import Path
from typing import Any

import common
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig
from transformers.initialization import no_init_weights

from awq.core.weight import QuantizedWeight
from awq.models.base import BaseAWQForCausalLM
from awq.nn.layout import prepare
from awq.nn.linear import WQLinear
from awq.nn.surgery import linear_shape, named_linears, replace_module

SHAPES: dict[str, tuple[type, dict[str, int]]] = {
    "tiny": (LlamaConfig, dict(hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
                               num_key_value_heads=2, vocab_size=1000)),
    "tinyllama-1.1b": (LlamaConfig, dict(hidden_size=2048, intermediate_size=5632, num_hidden_layers=22,
                                         num_attention_heads=32, num_key_value_heads=4, vocab_size=32000)),
    "mistral-7b": (MistralConfig, dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                                       num_attention_heads=32, num_key_value_heads=8, vocab_size=32000)),
    "llama-2-13b": (LlamaConfig, dict(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40,
                                      num_attention_heads=40, num_key_value_heads=40, vocab_size=32000)),
    "codellama-34b": (LlamaConfig, dict(hidden_size=8192, intermediate_size=22016, num_hidden_layers=48,
                                        num_attention_heads=64, num_key_value_heads=8, vocab_size=32000)),
}  # fmt: skip


def random_model(shape: str, dtype: torch.dtype, device: str, quantized: bool) -> Any:
    """A model of a known shape; linears but the head are packed, group 128, when `quantized`."""
    kind, settings = SHAPES[shape]
    config = kind(**settings, max_position_embeddings=8192)
    config.sliding_window = None
    config.eos_token_id = None
    with torch.device("meta"), no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    generator = torch.Generator(device).manual_seed(0)
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


def random_linear(in_features: int, out_features: int, device: str, generator: torch.Generator) -> WQLinear:
    codes = torch.randint(0, 16, (out_features, in_features), dtype=torch.uint8, device=device, generator=generator)
    groups = in_features // min(128, in_features)
    scales = torch.full((out_features, groups), 0.02 / 4.6, dtype=torch.float16, device=device)  # codes spread by 4.6
    zeros = torch.full((out_features, groups), 8, dtype=torch.uint8, device=device)
    return WQLinear.from_quantized(QuantizedWeight(codes, scales, zeros))


def seconds(model: Any, ids: torch.Tensor, new_tokens: int, **kwargs: Any) -> float:
    """One call of generate."""
    if ids.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False,
                         pad_token_id=0, **kwargs)  # fmt: skip
    if ids.is_cuda:
        torch.cuda.synchronize()
    assert out.shape[1] == ids.shape[1] + new_tokens
    return time.perf_counter() - start


def row(model: Any, name: str, batch: int, prompt: int, new: int, repeats: int, device: str, **kwargs: Any) -> dict:
    """One line of the table."""
    ids = torch.randint(3, 900, (batch, prompt), generator=torch.Generator().manual_seed(1)).to(device)
    cuda = device == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    first_call = seconds(model, ids, 2, **kwargs)
    prefill = statistics.median(seconds(model, ids, 1, **kwargs) for _ in range(max(2, repeats)))
    total = statistics.median(seconds(model, ids, new, **kwargs) for _ in range(repeats))
    decode = batch * (new - 1) / (total - prefill)
    found = {"name": name, "batch": batch, "prompt": prompt, "new": new, "prefill_tok_s": batch * prompt / prefill,
             "decode_tok_s": decode, "first_call_s": first_call}  # fmt: skip
    if cuda:
        found["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return found


def weight_bytes(model: nn.Module) -> int:
    """What a decode step reads of the model: all but the embedding table."""
    table = model.get_input_embeddings().weight  # type: ignore[operator]
    tensors = [*model.parameters(), *(b for m in model.modules() if isinstance(m, WQLinear) for b in m.buffers())]
    seen = {t.data_ptr(): t.numel() * t.element_size() for t in tensors if t is not table}
    return sum(seen.values())


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["mistral-7b"], choices=SHAPES)
    parser.add_argument("--lengths", nargs="+", default=["64/64", "2048/2048"], help="prompt/new tokens")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--peers", nargs="*", default=[], choices=["unfused", "eager", "compiled"])
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--bandwidth", type=float, default=3.0, help="TB/s, for the share of the floor")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    dtype, device = getattr(torch, arguments.dtype), arguments.device
    lengths = [tuple(map(int, text.split("/"))) for text in arguments.lengths]
    result: dict[str, Any] = {"dtype": arguments.dtype, "bandwidth_tb_s": arguments.bandwidth, "rows": []}

    def note(shape: str, found: dict) -> None:
        result["rows"].append({"shape": shape} | found)
        print({"shape": shape} | {k: round(v, 3) if isinstance(v, float) else v for k, v in found.items()}, flush=True)
        if arguments.json:
            common.write(arguments.json, device, result)

    for shape in arguments.shapes:
        start = time.perf_counter()
        model = random_model(shape, dtype, device, True)
        size = weight_bytes(model)
        wrapper = BaseAWQForCausalLM(model, shape)
        result.setdefault("made_s", {})[shape] = time.perf_counter() - start
        for batch in arguments.batches:
            for prompt, new in lengths:
                wrapper.fuse_layers(prompt + new, batch)
                start = time.perf_counter()
                wrapper.fuse()
                fused = time.perf_counter() - start
                found = row(wrapper, "fused", batch, prompt, new, arguments.repeats, device)
                cache = (
                    sum(a.k[0, :, 0].numel() for a in wrapper._decoder.cache)
                    * 2
                    * model.dtype.itemsize
                    * batch
                    * (prompt + new / 2)
                )
                floor = (size + cache) / arguments.bandwidth / 1e12
                note(
                    shape,
                    found | {"fuse_s": fused, "share_of_floor": floor * found["decode_tok_s"] / batch, "weights_gb": size / 1e9},
                )
                if arguments.profile:
                    note(
                        shape,
                        {
                            "name": "profile",
                            "batch": batch,
                            "prompt": prompt,
                            "us_per_step": profile(wrapper, batch, prompt, device),
                        },
                    )
        if "unfused" in arguments.peers:
            wrapper.unfuse()
            note(shape, row(model, "unfused", 1, *lengths[0], 1, device))
        del wrapper, model
        gc.collect()
        if not {"eager", "compiled"} & set(arguments.peers):
            continue
        model = random_model(shape, dtype, device, False)
        for peer in (p for p in arguments.peers if p != "unfused"):
            kwargs = {"cache_implementation": "static"} if peer == "compiled" else {}
            for batch in arguments.batches:
                for prompt, new in lengths:
                    repeats = 1 if new > 256 else arguments.repeats
                    note(
                        shape,
                        row(
                            model, f"transformers {arguments.dtype} {peer}", batch, prompt, min(new, 256), repeats, device, **kwargs
                        ),
                    )
        del model
        gc.collect()


if __name__ == "__main__":
    main()
