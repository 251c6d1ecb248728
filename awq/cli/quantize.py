"""Quantize a model directory or hub id to 4-bit AWQ."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="local directory or hub id")
    parser.add_argument("output", help="directory to write")
    parser.add_argument("--calib-data", default="pileval", help="dataset name or local .txt, .jsonl, .csv, .parquet file")
    parser.add_argument("--text-column", default="text")
    parser.add_argument("--split", default="train")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--version", default="GEMM", help="GEMM, GEMV or GEMVFast")
    parser.add_argument("--preset", default="balanced", help="fast, balanced or best")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=512, help="tokens per sample")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--skip", nargs="*", default=[], help="modules to leave in full precision")


def run(arguments: argparse.Namespace) -> None:
    from awq import AutoAWQForCausalLM
    from awq.cli.output import show
    from awq.errors import ModelError
    from awq.models.base import load_tokenizer

    model = AutoAWQForCausalLM.from_pretrained(arguments.model, torch_dtype=arguments.dtype)
    tokenizer = load_tokenizer(arguments.model)
    if tokenizer is None:
        raise ModelError(f"{arguments.model} has no tokenizer; calibration texts cannot be read.")
    report = model.quantize(
        tokenizer,
        quant_config={"q_group_size": arguments.group_size, "version": arguments.version,
                      "modules_to_not_convert": arguments.skip},
        calib_data=arguments.calib_data, split=arguments.split, text_column=arguments.text_column,
        max_calib_samples=arguments.samples, max_calib_seq_len=arguments.tokens, preset=arguments.preset,
    )  # fmt: skip
    model.tokenizer = tokenizer
    model.save_quantized(arguments.output)
    show(
        report.to_dict() | {"output": arguments.output},
        arguments.json,
        f"{report.summary()}\nsaved to {arguments.output}",
    )
