"""Show how a saved checkpoint is quantized."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="quantized directory")


def run(arguments: argparse.Namespace) -> None:
    from awq.checkpoint.source import Source
    from awq.cli.output import show

    source = Source.open(arguments.model)
    files = {entry["file"] for entry in source.headers.values()}
    result = source.settings.to_dict()
    result |= {"quantized_linears": len(source.packed), "weight_bytes": sum(f.stat().st_size for f in files)}
    show(result, arguments.json)
