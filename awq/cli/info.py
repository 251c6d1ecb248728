"""Show how a saved checkpoint is quantized."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="quantized directory")


def run(arguments: argparse.Namespace) -> None:
    from awq.checkpoint.files import check_directory, packed_tensors, weight_files
    from awq.checkpoint.save import read_settings
    from awq.cli.output import show

    check_directory(arguments.model)
    files = weight_files(arguments.model)
    result = read_settings(arguments.model).to_dict()
    result |= {"quantized_linears": len(packed_tensors(files)), "weight_bytes": sum(f.stat().st_size for f in files)}
    show(result, arguments.json)
