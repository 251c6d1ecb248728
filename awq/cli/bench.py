"""Measure prefill and decode speed and memory of a quantized language model."""

from __future__ import annotations

import argparse

from awq.cli.arguments import add_device, add_dtype, positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="quantized directory or hub id")
    parser.add_argument(
        "--batch-sizes", type=positive, nargs="+", default=[1], help="rows generated together"
    )
    parser.add_argument(
        "--lengths", nargs="+", default=["64/64", "256/256"], help="prompt/new tokens"
    )
    parser.add_argument(
        "--repeats", type=positive, default=3, help="runs, of which the best counts"
    )
    parser.add_argument("--no-fuse", action="store_true", help="transformers' own blocks and loop")
    parser.add_argument(
        "--quantize-lm-head", action="store_true", help="generate through a 4-bit copy of the head"
    )
    add_dtype(parser)
    add_device(parser)


def run(arguments: argparse.Namespace) -> None:
    from awq import AutoAWQForCausalLM
    from awq.cli.output import show
    from awq.evals.speed import as_table, generation_speed, read_bandwidth, weight_bytes

    lengths = [_lengths(text) for text in arguments.lengths]
    model = AutoAWQForCausalLM.from_quantized(
        arguments.model,
        device=arguments.device,
        fuse_layers=not arguments.no_fuse,
        torch_dtype=arguments.dtype,
        max_seq_len=max(sum(pair) for pair in lengths),
        batch_size=max(arguments.batch_sizes),
        quantize_lm_head=arguments.quantize_lm_head,
    )
    rows = [
        generation_speed(model, batch, prompt, new, arguments.repeats)
        for batch in arguments.batch_sizes
        for prompt, new in lengths
    ]
    device = str(model.device)
    read = weight_bytes(model.model)
    bandwidth = read_bandwidth(model.device)
    result = {
        "model": arguments.model,
        "device": device,
        "fusion": str(model.fusion),
        "rows": [r.to_dict() for r in rows],
    }
    result |= {"weight_gb": read / 1e9, "read_bandwidth_gb_s": bandwidth / 1e9}
    best = max(read * r.decode_tok_s / r.batch for r in rows)
    table = as_table(
        arguments.model.rstrip("/").rpartition("/")[2], model.quant_config.format, rows
    )
    speed = f"weights read at up to {best / 1e9:.1f} GB/s; a plain sum reads {bandwidth / 1e9:.1f}"
    show(result, arguments.json, f"{table}\n\non {device}; {model.fusion}; {speed}")


def _lengths(text: str) -> tuple[int, int]:
    from awq.errors import ConfigError

    prompt, _, new = text.partition("/")
    if not (prompt.isdigit() and new.isdigit() and int(prompt) > 0 and int(new) > 1):
        raise ConfigError(
            f"--lengths {text}: write prompt/new tokens, like 64/64, with at least 2 new ones."
        )
    return int(prompt), int(new)
